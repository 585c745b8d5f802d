"""3-D rotary position embedding: interleaved pairs, head width split over time, rows and columns."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """Width of the time, row and column parts of a head. Source: Wan2.1, `rope_params`."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@dataclass(frozen=True)
class Yarn:
    """Rotary embedding for clips `ratio` times as long as the `frames` latents a network was trained on; 1: as it was.

    Time frequencies that turned fewer than `slow` times in those frames are slowed down by the ratio, those above
    `fast` kept, between them the blend moves evenly; queries are multiplied by `sharpness`. Source: YaRN 2309.00071,
    eq. 22 and 23; `fast` is 32 there, for texts of thousands of tokens.
    """

    ratio: float = 1.0
    frames: int = 22
    slow: float = 1.0
    fast: float = 4.0

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.frames < 1 or not 0 < self.slow < self.fast:
            raise ValueError(f"yarn needs ratio >= 1, frames >= 1 and 0 < slow < fast, got {self}")

    @property
    def sharpness(self) -> float:
        return (0.1 * math.log(self.ratio) + 1.0) ** 2

    def slowed(self, frequencies: Tensor) -> Tensor:
        """Time frequencies (radians a frame) of the longer clips."""
        turns = self.frames * frequencies / (2 * math.pi)
        keep = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / self.ratio)


PLAIN = Yarn()


@dataclass(frozen=True)
class Panorama:
    """Columns told as directions: a frame spans `fov` degrees in `columns` tokens; 0: columns are told as they are.

    A token's direction is that of its column plus that of its frame's camera, so what stays in place in the world keeps
    its angle however the camera turns, and a full turn comes back to it: frequencies are whole numbers of turns, the
    last of them half a turn a column. After: Cameras as Relative Positional Encoding 2507.10496, for turns alone.
    """

    fov: float = 0.0
    columns: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.fov < 180 or self.columns < 1:
            raise ValueError(f"panorama needs 0 <= fov < 180 and columns >= 1, got {self}")

    def direction(self, column: Tensor) -> Tensor:
        """Radians to the right of the middle of the picture, of token columns (fractions are allowed)."""
        across = 2 * (column.double() + 0.5) / self.columns - 1
        return torch.atan(across * math.tan(math.radians(self.fov) / 2))

    def frequencies(self, count: int) -> Tensor:
        """`count` rising whole numbers (float64)."""
        top = math.pi * self.columns / (2 * math.tan(math.radians(self.fov) / 2))
        turns = [0]
        for i in range(count):
            turns.append(max(turns[-1] + 1, round(top ** (i / max(1, count - 1)))))
        return torch.tensor(turns[1:], dtype=torch.float64)


FLAT = Panorama()


def rope_angles(
    positions: Tensor, head_dim: int, theta: float = 10_000.0, yarn: Yarn = PLAIN, panorama: Panorama = FLAT
) -> Tensor:
    """Angles [S, head_dim / 2] of float64 `positions` [S, 3] (time, row, column); fractions are allowed."""
    parts = []
    for axis, width in enumerate(axis_split(head_dim)):
        if axis == 2 and panorama.fov:
            turns = panorama.frequencies(width // 2).to(positions.device)
            parts.append(panorama.direction(positions[:, 2:]) * turns)
            continue
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        frequencies = theta**-exponent
        if axis == 0 and yarn.ratio != 1.0:
            frequencies = yarn.slowed(frequencies)
        parts.append(positions[:, axis : axis + 1].double() * frequencies)
    return torch.cat(parts, dim=1)


def rope_table(
    positions: Tensor,
    head_dim: int,
    theta: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    yarn: Yarn = PLAIN,
    panorama: Panorama = FLAT,
) -> Tensor:
    """Cosines and sines [2, S, 1, head_dim / 2] for `rotate`, computed in float64 so that late frames stay exact."""
    angles = rope_angles(positions, head_dim, theta, yarn, panorama)
    return torch.stack((angles.cos(), angles.sin()))[:, :, None].to(dtype)


def view_table(heading: Tensor, tokens: int, head_dim: int, panorama: Panorama) -> Tensor:
    """Cosines and sines [2, B, F tokens, 1, head_dim / 2] that turn the tokens of frames by their camera's heading.

    `heading` [B, F] is in radians to the left; times and rows are not turned.
    """
    *others, side = (width // 2 for width in axis_split(head_dim))
    turned = -heading.double()[..., None] * panorama.frequencies(side).to(heading.device)
    angles = torch.nn.functional.pad(turned, (sum(others), 0)).repeat_interleave(tokens, dim=1)
    return torch.stack((angles.cos(), angles.sin()))[:, :, :, None].float()


def composed(table: Tensor, other: Tensor) -> Tensor:
    """The table that turns as `table` and then `other`; both broadcast."""
    (a, b), (c, d) = table, other
    return torch.stack((a * c - b * d, a * d + b * c))


def rotate(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """`x` [B, S, h, d] turned by the angles of `table` [2, (B,) S, 1, d / 2] (back by them if `inverse`)."""
    cos, sin = table
    if inverse:
        sin = -sin
    if x.dtype == table.dtype == torch.float32 and not torch.compiler.is_compiling():
        # Complex products are 4 to 13 times as fast on a CPU.
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
