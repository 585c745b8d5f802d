"""What a memory has to know of the network whose entries it keeps, and of the streams that it keeps them for."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vidistill.memory.pooling import Pooling


class Rotate(Protocol):
    """Turns keys [B, S, h, d] to `positions` [S, 3], or back; `table` is what a kernel turns them by."""

    def __call__(self, keys: Tensor, positions: Tensor, inverse: bool) -> Tensor: ...

    def table(self, positions: Tensor, device: torch.device) -> Tensor: ...


@dataclass(frozen=True)
class CacheSpec:
    """Entries of `layers` layers for `batch` streams: `heads` of `head_dim`, one token for each place of `grid`."""

    layers: int
    batch: int
    heads: int
    head_dim: int
    grid: tuple[int, int]  # rows and columns of tokens of a frame
    rotate: Rotate
    pooling: Pooling  # of frames that leave the window
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def buffer(self, tokens: int) -> Tensor:
        """Zeros [layers, B, tokens, h, d] that lie head by head, as attention reads them."""
        shape = (self.layers, self.batch, self.heads, tokens, self.head_dim)
        return torch.zeros(shape, device=self.device, dtype=self.dtype).transpose(2, 3)
