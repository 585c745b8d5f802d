"""8-bit memory entries: symmetric, one scale a token and head. int8 anywhere, fp8 (e4m3) where the GPU has it."""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vidistill.ops.attention import choice, constant_in_graphs, resolve
from vidistill.ops.precision import LARGEST

logger = logging.getLogger("vidistill")

SCALE_BYTES = 4


@cache
def _kernels(name: str, device: str) -> bool:
    if name != "auto" or device != "cuda":
        return name == "triton" and resolve(name, device) == name
    try:
        import triton  # noqa: F401
    except ImportError:
        logger.debug("stored entries on cuda: torch's own operators (Triton is not installed)")
        return False
    logger.debug("stored entries on cuda: Triton kernels (choose another backend than auto for none)")
    return True


@constant_in_graphs
def _decide(name: str, device: str) -> bool:
    return _kernels(name, device)


def kernels(device: str) -> bool:
    """Whether stored entries are read and written by Triton kernels on `device` ("cpu", "cuda"); decided once, logged.

    torch has no operator that turns keys and widens 8-bit entries as it reads them, so `auto` takes them on a GPU.
    """
    return _decide(choice(), device)


@dataclass(frozen=True)
class Quantised:
    """`data` [B, S, h, d] in 8 bits, `scale` [B, S, h] float32; the entry is data * scale."""

    data: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size() + self.scale.numel() * self.scale.element_size()

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, S, h, d] in `dtype`."""
        return (self.data.float() * self.scale[..., None]).to(dtype)


def quantise(x: Tensor, dtype: torch.dtype = torch.int8) -> Quantised:
    """`x` [B, S, h, d] in 8 bits; rows of zeros stay zeros."""
    if dtype not in LARGEST:
        raise ValueError(f"8-bit entries are {sorted(map(str, LARGEST))}, got {dtype}")
    largest = LARGEST[dtype]
    x = x.float()
    scale = x.abs().amax(-1) / largest
    data = x / torch.where(scale > 0, scale, 1.0)[..., None]
    if dtype == torch.int8:
        data = data.round()
    return Quantised(data.clamp(-largest, largest).to(dtype), scale)


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.int8, device: torch.device | str = "cpu") -> Quantised:
    """A store of zeros for entries [B, S, h, d]."""
    return Quantised(
        torch.zeros(shape, dtype=torch.int8, device=device).to(dtype), torch.zeros(shape[:-1], device=device)
    )


def entry_bytes(heads: int, head_dim: int) -> int:
    """Bytes of the keys (or values) of one token."""
    return heads * (head_dim + SCALE_BYTES)


def append(store: Quantised, x: Tensor, where: Tensor) -> None:
    """Write `x` [B, S, h, d] into tokens `where` [S] (int64) of `store`, in place: the specification of the kernel."""
    new = quantise(x, store.data.dtype)
    store.scale.index_copy_(1, where, new.scale)
    bits = store.data.view(torch.int8)  # index_copy_ knows no fp8
    bits.index_copy_(1, where, new.data.view(torch.int8))


def append_entries(keys: Quantised, values: Quantised, k: Tensor, v: Tensor, where: Tensor) -> None:
    """`append` of keys and of values; one kernel where Triton runs."""
    if kernels(k.device.type):
        from vidistill.ops.kernels.quant import append_quantised

        append_quantised(k, v, keys.data, values.data, keys.scale, values.scale, where)
        return
    append(keys, k, where)
    append(values, v, where)
