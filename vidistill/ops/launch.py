"""What all launches of Triton kernels share. Triton itself is imported only when it is asked for."""

import torch
from torch import Tensor

from vidistill.ops.tuning import Config, config


def interpreted() -> bool:
    """Whether kernels run in numpy on a CPU: TRITON_INTERPRET=1 when Triton was imported."""
    import triton
    import triton.language as tl

    return not isinstance(tl.cdiv, triton.JITFunction)


def launch_config(kernel: str, x: Tensor) -> Config:
    return config(kernel, x.device.type, x.device.index)


def padded(size: int, least: int = 16) -> int:
    """The power of two that a tile of `size` needs; tl.dot takes no axis below 16."""
    return max(least, 1 << (size - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: as torch.backends.cuda.matmul says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
