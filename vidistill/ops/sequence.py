"""Sequence parallelism: processes that share the tokens of every frame, and trade them for heads around attention.

All that a block does token by token runs on a part of each frame; attention runs on all tokens with a part of the
heads, so masks, memories and compressed history are what they are in one process, of fewer heads.
Source: DeepSpeed Ulysses 2309.14509, section 3.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Traded(torch.autograd.Function):
    """Equal pieces along the first axis, piece r to process r; its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, out = group, torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad := grad.contiguous())
        dist.all_to_all_single(out, grad, group=ctx.group)
        return out, None


class _Gathered(torch.autograd.Function):
    """What all processes hold, along a new first axis.

    Each of them goes on with the same numbers, so the gradient of a part is the sum of what they say about it: `size`
    times that of one, which the mean over all processes of the run, in which the others' parts are missing, takes back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, out = group, x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad := grad.contiguous())
        dist.all_to_all_single(out, grad, group=ctx.group)
        return out.sum(0), None


@dataclass(frozen=True)
class SequenceGroup:
    """The `size` processes of `group`, of which this one, `rank`, holds the rank-th part of the tokens of a frame."""

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> "SequenceGroup":
        """The processes of a torch.distributed group."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def check(self, heads: int, tokens: int = 0) -> None:
        """Raise ValueError unless the heads of a network and the `tokens` of its frames can be shared."""
        if heads % self.size:
            raise ValueError(f"sequence {self.size} does not divide the {heads} heads of the network: choose a divisor")
        if tokens % self.size:
            raise ValueError(
                f"sequence {self.size} does not divide the {tokens} tokens of a frame: choose a divisor, or another "
                "frame size"
            )

    def own(self, x: Tensor, dim: int = 2) -> Tensor:
        """This process's part of the tokens of each frame, along `dim` of a tensor that every process has whole."""
        self.check(0, x.shape[dim])
        size = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * size, size)

    def own_table(self, table: Tensor, frames: int) -> Tensor:
        """Rows of a rotary table [2, (B,) F n, 1, d / 2] for the tokens of this process."""
        return self.own(table.unflatten(-3, (frames, -1)), -3).flatten(-4, -3)

    def to_heads(self, x: Tensor, frames: int) -> Tensor:
        """Own tokens of all heads [B, F m, h, d] -> all tokens of own heads [B, F n, h / size, d], n = size m."""
        b, _, h, d = x.shape
        parts = x.reshape(b, frames, -1, self.size, h // self.size, d).permute(3, 0, 1, 2, 4, 5)
        whole = _Traded.apply(parts.contiguous(), self.group).permute(1, 2, 0, 3, 4, 5)
        return whole.reshape(b, -1, h // self.size, d)

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The way back: [B, F n, h / size, d] -> [B, F m, h, d]."""
        b, _, h, d = x.shape
        parts = x.reshape(b, frames, self.size, -1, h, d).permute(2, 0, 1, 3, 4, 5)
        whole = _Traded.apply(parts.contiguous(), self.group).permute(1, 2, 3, 0, 4, 5)
        return whole.reshape(b, -1, h * self.size, d)

    def whole(self, x: Tensor) -> Tensor:
        """All tokens [B, F, n, D] of each frame from those [B, F, m, D] that each process has."""
        parts = _Gathered.apply(x.contiguous(), self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)
