"""Which token may look at which, told per frame: block-causal, window + sinks, teacher forcing, or anything else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # tokens a side of the blocks that flex attention computes or leaves out


@dataclass(frozen=True, eq=False)
class FrameMask:
    """`seen` [Fq, Fk] is True where a frame may look at another; every frame has `tokens` tokens.

    `widths`: tokens of each key frame, where some have fewer (frames in compressed form). Every query frame must see at
    least one frame. The forms that backends want are built once and kept, so make one mask and pass it to every layer.
    """

    seen: Tensor
    tokens: int = 1
    widths: tuple[int, ...] = ()
    _forms: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seen.ndim != 2 or self.seen.dtype != torch.bool or self.tokens < 1:
            raise ValueError(
                f"FrameMask needs a bool tensor [Fq, Fk] and tokens >= 1, got {self.seen.dtype} "
                f"{tuple(self.seen.shape)} and {self.tokens}"
            )
        if self.widths and len(self.widths) != self.seen.shape[1]:
            raise ValueError(f"FrameMask.widths names {len(self.widths)} key frames, seen {self.seen.shape[1]}")

    @property
    def shape(self) -> tuple[int, int]:
        """Query and key tokens."""
        return self.seen.shape[0] * self.tokens, sum(self.widths) or self.seen.shape[1] * self.tokens

    def _form(self, name: str, make: Callable[[], Any]) -> Any:
        if name in self._forms:
            return self._forms[name]
        if torch.compiler.is_compiling():  # nothing that a graph makes outlives it
            return make()
        return self._forms.setdefault(name, make())

    def _spread(self, columns: Tensor) -> Tensor:
        """One number a key frame, along the last axis -> one a key token."""
        if not self.widths:
            return columns.repeat_interleave(self.tokens, -1)
        widths = torch.tensor(self.widths, device=columns.device)
        return columns.repeat_interleave(widths, -1, output_size=sum(self.widths))  # known without asking the device

    @property
    def dense(self) -> Tensor:
        """Bool [Sq, Sk]."""
        if self.tokens == 1 and not self.widths:
            return self.seen
        return self._form("dense", lambda: self._spread(self.seen.repeat_interleave(self.tokens, 0)))

    @property
    def additive(self) -> Tensor:
        """0 where a token may look, -inf elsewhere: float32 [Sq, Sk]."""
        return self._form("additive", lambda: torch.where(self.dense, 0.0, float("-inf")))

    @property
    def runs(self) -> tuple[list[int], list[int], list[list[int]]]:
        """Tokens of each run of alike query frames and of alike key frames, and which runs each of the former sees."""
        return self._form("runs", self._runs)

    def _runs(self) -> tuple[list[int], list[int], list[list[int]]]:
        rows, queries = torch.unique_consecutive(self.seen, dim=0, return_counts=True)
        columns, keys = torch.unique_consecutive(rows, dim=1, return_counts=True)
        seen = [[i for i, yes in enumerate(row) if yes] for row in columns.tolist()]
        widths = torch.tensor(self.widths or [self.tokens] * self.seen.shape[1])
        tokens = [int(part.sum()) for part in widths.split(keys.tolist())]
        return (queries * self.tokens).tolist(), tokens, seen

    @property
    def block(self) -> Any:
        """Block-sparse form for flex attention: blocks that nobody looks at are never computed."""
        return self._form("block", self._block)

    def _block(self) -> Any:
        """As `create_block_mask` makes it, from frames: that one would first build the mask of all tokens."""
        from torch.nn.attention.flex_attention import BlockMask

        seen, n, device = self.seen, self.tokens, self.seen.device
        frame = self._spread(torch.arange(seen.shape[1], device=device))  # of each key token
        blocks = F.pad(self._spread(seen), (0, -self.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        some, whole = blocks.any(2), blocks.all(2)  # of the keys of a block [Fq, blocks]
        rows = torch.arange(self.shape[0], device=device) // n  # frame of each query token
        rows = F.pad(rows + 1, (0, -self.shape[0] % BLOCK)).view(-1, BLOCK)  # 0: past the end, where nothing is seen
        some, whole = (F.pad(x, (0, 0, 1, 0))[rows] for x in (some, whole))
        some, whole = some.any(1), whole.all(1)
        partial, full = _ordered(some & ~whole), _ordered(whole)

        def look(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return seen[q // n, frame[k]]

        return BlockMask.from_kv_blocks(*partial, *full, BLOCK, look, self.shape)

    def bias(self, q: Tensor, align: int = 8) -> Tensor:
        """Additive form for xformers: 0 or -inf, [B, h, Sq, Sk] in the dtype of `q` [B, Sq, h, d].

        It is a view of rows padded to a multiple of `align`, as the operator demands, repeated over batch and heads.
        """
        rows, columns = self.shape
        padded = q.new_zeros(rows, -(-columns // align) * align)
        padded[:, :columns].masked_fill_(~self.dense, float("-inf"))
        return padded[:, :columns].expand(q.shape[0], q.shape[2], rows, columns)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries reads, and which, those first [1, 1, Q], [1, 1, Q, K] (int32)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def frame_mask(mask: Tensor | FrameMask) -> FrameMask:
    """`mask` as a FrameMask; a bool tensor [Sq, Sk] becomes one of single tokens."""
    return mask if isinstance(mask, FrameMask) else FrameMask(mask)
