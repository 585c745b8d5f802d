"""Which token may look at which, told per frame: block-causal, window + sinks, teacher forcing, or anything else."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FrameMask:
    """`seen` [Fq, Fk] is True where a frame may look at another; every frame has `tokens` tokens.

    Every query frame must see at least one frame. The forms that backends want are built once and kept, so make one
    mask and pass it to every layer.
    """

    seen: Tensor
    tokens: int = 1
    _forms: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seen.ndim != 2 or self.seen.dtype != torch.bool or self.tokens < 1:
            raise ValueError(
                f"FrameMask needs a bool tensor [Fq, Fk] and tokens >= 1, got {self.seen.dtype} "
                f"{tuple(self.seen.shape)} and {self.tokens}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Query and key tokens."""
        return self.seen.shape[0] * self.tokens, self.seen.shape[1] * self.tokens

    def _form(self, name: str, make: Callable[[], Any]) -> Any:
        if name in self._forms:
            return self._forms[name]
        if torch.compiler.is_compiling():  # nothing that a graph makes outlives it
            return make()
        return self._forms.setdefault(name, make())

    @property
    def dense(self) -> Tensor:
        """Bool [Sq, Sk]."""
        if self.tokens == 1:
            return self.seen
        return self._form(
            "dense", lambda: self.seen.repeat_interleave(self.tokens, 0).repeat_interleave(self.tokens, 1)
        )

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
        return (queries * self.tokens).tolist(), (keys * self.tokens).tolist(), seen

    @property
    def block(self) -> Any:
        """Block-sparse form for flex attention: blocks that nobody looks at are never computed."""
        return self._form("block", self._block)

    def _block(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        seen, n = self.seen, self.tokens
        return create_block_mask(
            lambda b, h, q, k: seen[q // n, k // n], None, None, *self.shape, device=str(seen.device)
        )

    def bias(self, q: Tensor, align: int = 8) -> Tensor:
        """Additive form for xformers: 0 or -inf, [B, h, Sq, Sk] in the dtype of `q` [B, Sq, h, d].

        It is a view of rows padded to a multiple of `align`, as the operator demands, repeated over batch and heads.
        """
        rows, columns = self.shape
        padded = q.new_zeros(rows, -(-columns // align) * align)
        padded[:, :columns].masked_fill_(~self.dense, float("-inf"))
        return padded[:, :columns].expand(q.shape[0], q.shape[2], rows, columns)


def frame_mask(mask: Tensor | FrameMask) -> FrameMask:
    """`mask` as a FrameMask; a bool tensor [Sq, Sk] becomes one of single tokens."""
    return mask if isinstance(mask, FrameMask) else FrameMask(mask)
