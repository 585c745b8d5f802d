"""Where tokens lie, and how the keys and values of a frame become fewer: coarser cells and what fills them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Weights = Callable[[int, int], Tensor]  # layer, factor -> scores [h, factor, factor] of the tokens of a cell


def frame_positions(times: Tensor, grid: tuple[int, int], factor: int = 1) -> Tensor:
    """Positions [F m, 3] (time, row, column) of all tokens of frames at `times` [F] on a grid of rows and columns.

    With a `factor` the tokens are the cells of `coarse(grid, factor)`, each at the mean of the places it covers.
    """
    rows, columns = (centres(size, factor, times.device) for size in grid)
    t, r, c = torch.meshgrid(times.double(), rows, columns, indexing="ij")
    return torch.stack((t, r, c), dim=-1).reshape(-1, 3)


def centres(size: int, factor: int, device: torch.device | str = "cpu") -> Tensor:
    """Mean coordinate (float64) of each cell of `factor` places along a side of `size`; the last may be smaller."""
    first = torch.arange(0, size, factor, dtype=torch.float64, device=device)
    return (first + (first + factor).clamp_max(size) - 1) / 2


def coarse(grid: tuple[int, int], factor: int) -> tuple[int, int]:
    """Rows and columns of cells; an odd side is rounded up, its last cell covers what is left."""
    return -(-grid[0] // factor), -(-grid[1] // factor)


def num_cells(grid: tuple[int, int], factor: int) -> int:
    rows, columns = coarse(grid, factor)
    return rows * columns


def average(x: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Means [B, m, h, d] over the cells of `x` [B, n, h, d]; edge cells average the tokens they have."""
    if factor == 1:
        return x
    y = rearrange(x, "b (r c) h d -> b (h d) r c", r=grid[0])
    y = F.avg_pool2d(y, factor, ceil_mode=True, count_include_pad=False)
    return rearrange(y, "b (h d) r c -> b (r c) h d", h=x.shape[2])


def plain(keys: Tensor, values: Tensor, grid: tuple[int, int], factor: int, scores: Tensor | None) -> tuple:
    return average(keys, grid, factor), average(values, grid, factor)


def rescaled(keys: Tensor, values: Tensor, grid: tuple[int, int], factor: int, scores: Tensor | None) -> tuple:
    """Means, the keys stretched back to the mean length of those they stand for: an average is shorter."""
    mean, length = average(keys, grid, factor), average(keys.norm(dim=-1, keepdim=True), grid, factor)
    return mean * (length / mean.norm(dim=-1, keepdim=True).clamp_min(1e-6)), average(values, grid, factor)


def weighted(keys: Tensor, values: Tensor, grid: tuple[int, int], factor: int, scores: Tensor | None) -> tuple:
    """Means weighted by the softmax of learned `scores` [h, factor, factor] over the tokens of a cell."""
    assert scores is not None
    repeats = [-(-size // factor) for size in grid]
    share = scores.flatten(1).softmax(-1).view_as(scores).repeat(1, *repeats)[:, : grid[0], : grid[1]]
    share = rearrange(share, "h r c -> 1 (r c) h 1").to(keys.dtype)
    whole = average(share, grid, factor)
    return average(keys * share, grid, factor) / whole, average(values * share, grid, factor) / whole


POOLS: dict[str, Callable[..., tuple]] = {
    "average": plain,
    "rescaled": rescaled,
    "learned": weighted,
    "reencode": plain,  # of frames that were not encoded again, which only happens at factor 1
}


@dataclass(frozen=True)
class Pooling:
    """The operator `name` on frames of `grid`; `weights` are those of a network that has learned them.

    Keys come out `stretch` times as long, those of frames that stay as they are too.
    """

    name: str
    grid: tuple[int, int]
    weights: Weights | None = None
    stretch: float = 1.0

    def __call__(self, layer: int, keys: Tensor, values: Tensor, factor: int) -> tuple[Tensor, Tensor]:
        """Fewer un-rotated keys and values [B, m, h, d] for those [B, n, h, d] of whole frames."""
        if factor > 1:
            if self.name == "learned" and self.weights is None:
                raise ValueError("memory.pool 'learned' needs a network with dit.pool_factors")
            scores = self.weights(layer, factor) if self.name == "learned" and self.weights else None
            keys, values = POOLS[self.name](keys, values, self.grid, factor, scores)
        return self.stretched(keys), values

    def stretched(self, keys: Tensor) -> Tensor:
        return keys if self.stretch == 1.0 else keys * self.stretch
