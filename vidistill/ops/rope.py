"""3-D rotary position embedding: interleaved pairs, head width split over time, rows and columns."""

import torch
from torch import Tensor


def axis_split(head_dim: int) -> tuple[int, int, int]:
    """Width of the time, row and column parts of a head. Source: Wan2.1, `rope_params`."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """Angles [S, head_dim / 2] of float64 `positions` [S, 3] (time, row, column); fractions are allowed."""
    parts = []
    for axis, width in enumerate(axis_split(head_dim)):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        parts.append(positions[:, axis : axis + 1].double() * theta**-exponent)
    return torch.cat(parts, dim=1)


def rope_table(positions: Tensor, head_dim: int, theta: float = 10_000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines and sines [2, S, 1, head_dim / 2] for `rotate`, computed in float64 so that late frames stay exact."""
    angles = rope_angles(positions, head_dim, theta)
    return torch.stack((angles.cos(), angles.sin()))[:, :, None].to(dtype)


def rotate(x: Tensor, table: Tensor, inverse: bool = False) -> Tensor:
    """`x` [B, S, h, d] turned by the angles of `table` [2, S, 1, d / 2] (back by them if `inverse`)."""
    cos, sin = table
    if inverse:
        sin = -sin
    if x.dtype == table.dtype == torch.float32 and x.shape[-1] % 32 == 0 and not torch.compiler.is_compiling():
        # Whole vectors: complex products have the same bits and are 4 to 13 times as fast on a CPU.
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
