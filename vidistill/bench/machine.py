"""What a machine is and can do: versions, bytes, the speed of matrix products."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidistill import __version__
from vidistill.ops.attention import chosen
from vidistill.ops.device import wait_for

MATMUL_SIZES = (1024, 1536, 2048)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` intra-op threads (0: as they are), for sessions opened inside too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_peak_gflops(device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Best, over `MATMUL_SIZES`, of the median speed of square float32 products at the present number of threads."""
    best = 0.0
    for n in MATMUL_SIZES:
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            a @ b
            wait_for(a.device)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * n**3 / statistics.median(times[1:]) / 1e9)
    return best


OPERATORS = {  # what a profile is told by; all else is "other"
    "linear layers": ("aten::addmm", "mkldnn::_linear_pointwise", "aten::_weight_int8pack_mm"),
    "attention products": ("aten::mm", "aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax",),
    "fused attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_forward"),
    "copies": ("aten::copy_", "aten::cat"),
}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Share of the time of `run` on the host that each kind of operator takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    shares = {kind: sum(spent.get(name, 0.0) for name in names) / total for kind, names in OPERATORS.items()}
    return {**shares, "other": 1.0 - sum(shares.values())}


def resident_bytes() -> int:
    """Bytes of the process in memory now (where the system does not tell: the most there ever were)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_bytes().split()[1]) * resource.getpagesize() if statm.is_file() else peak_bytes()


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most bytes this process has had: in memory, or allocated on a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(net: nn.Module) -> dict[str, Any]:
    """Machine and versions that a figure of `net` belongs to."""
    weight = next(net.parameters())
    return {
        "vidistill": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "attention": chosen(weight.device.type),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
