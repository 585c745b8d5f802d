"""Several processes on one job: ranks, sharded parameters (FSDP2), means, checkpoints that any count can read."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def init(device: str = "cpu") -> int:
    """Join the job that torchrun started, if any; returns this process's rank (0 alone)."""
    if "RANK" not in os.environ or dist.is_initialized():
        return rank()
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return rank()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def finish() -> None:
    """Leave the job; does nothing alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over all ranks; `x` itself alone."""
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def share(batch: int) -> slice:
    """The rows of a global batch that belong to this rank; raises ValueError if they cannot be split evenly."""
    if batch % world_size():
        raise ValueError(f"a global batch of {batch} cannot be split over {world_size()} processes")
    part = batch // world_size()
    return slice(rank() * part, (rank() + 1) * part)


def shard(net: nn.Module, blocks: Iterable[nn.Module], *, dtype: torch.dtype | None = None) -> nn.Module:
    """`net` with its parameters sharded over all ranks, block by block; does nothing alone.

    `dtype`: precision of gathered parameters in the forward (gradients are reduced in float32). Each rank then runs its
    share of the batch, and gradients are means over ranks. Source: `torch.distributed.fsdp.fully_shard`.
    """
    if world_size() == 1:
        return net
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = next(net.parameters()).device.type
    mesh = init_device_mesh(kind, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def whole(x: Tensor) -> Tensor:
    """A parameter or gradient in one piece; every rank must ask."""
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def save(folder: str | Path, net: nn.Module, optim: torch.optim.Optimizer | None = None) -> None:
    """Write weights (and optimiser state) so that any number of processes can read them; every rank must call it."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state_of(net, optim), checkpoint_id=str(folder), no_dist=world_size() == 1)


def load(folder: str | Path, net: nn.Module, optim: torch.optim.Optimizer | None = None) -> None:
    """Read what `save` wrote into `net` (and `optim`), whatever the number of processes then and now."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = state_of(net, optim)
    dcp.load(state, checkpoint_id=str(folder), no_dist=world_size() == 1)
    set_state_dict(
        net, [optim] if optim else [], model_state_dict=state["net"], optim_state_dict=state.get("optim", {})
    )


def state_of(net: nn.Module, optim: torch.optim.Optimizer | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(net, [optim] if optim else [])
    state: dict[str, Mapping[str, Any]] = {"net": weights}
    if optim:
        state["optim"] = moments
    return dict(state)
