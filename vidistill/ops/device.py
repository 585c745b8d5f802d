"""Where networks run."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def accelerator() -> torch.device:
    """The GPU that torch works on, if it finds one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def named_device(name: str) -> torch.device:
    """The device of a name: "auto" (`accelerator`), "cpu", "cuda" or "cuda:1"; ValueError if it is not here."""
    if name == "auto":
        return accelerator()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # each backend that torch knows by name and lacks has an error of its own, of many lines
        found = torch.cuda.device_count()
        here = f"{found} GPUs" if torch.backends.cuda.is_built() else "a torch that is built without CUDA"
        raise ValueError(
            f"device {name!r} is not on this machine, which has {here}: choose auto, cpu or cuda"
        ) from error
    return accelerator() if device == torch.device("cuda") else device


def kept_on_host(on: bool, device: torch.device) -> AbstractContextManager[Any]:
    """If `on`, what autograd saves inside waits in host memory (page-locked beside a GPU) for its backward pass."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if on else nullcontext()


def wait_for(device: torch.device) -> None:
    """Wait until all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
