"""What all Triton kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidistill.ops.tuning import Config, config


@triton.jit
def _probe(x):
    tl.store(x, 0)


# TRITON_INTERPRET=1 at import: kernels run in numpy on a CPU. Its tl.dot takes no bfloat16, so tiles are widened there.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


def launch_config(kernel: str, x: Tensor) -> Config:
    return config(kernel, x.device.type, x.device.index)


def padded(size: int, least: int = 16) -> int:
    """The power of two that a tile of `size` needs; tl.dot takes no axis below 16."""
    return max(least, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32: as torch.backends.cuda.matmul says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
