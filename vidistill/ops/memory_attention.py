"""Attention of a chunk over what a memory holds: sinks, window and compressed history, read in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.ops.attention import Mask, attention, reference
from vidistill.ops.quant import Quantised, kernels
from vidistill.ops.rope import rotate


@dataclass(frozen=True)
class Segment:
    """A run of stored entries: `keys` and `values` [B, S, h, d], dense or 8-bit.

    `table` [2, S, 1, d / 2] turns the keys when they are read; None: they rest already turned.
    """

    keys: Tensor | Quantised
    values: Tensor | Quantised
    table: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is read as it lies."""
        return not isinstance(self.keys, Quantised) and self.table is None


def _dense(x: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    return x.dequantise(dtype) if isinstance(x, Quantised) else x.to(dtype)


def joined(segments: Sequence[Segment], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All keys (turned) and values [B, S, h, d]; views where there is one dense segment that needs nothing done."""
    keys, values = [], []
    for s in segments:
        k = _dense(s.keys, dtype)
        keys.append(k if s.table is None else rotate(k, s.table).to(dtype))
        values.append(_dense(s.values, dtype))
    return (keys[0], values[0]) if len(segments) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))


def attend_reference(q: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The specification of `attend`: everything dense, turned, joined, softmax in the open."""
    return reference(q, *joined(segments, q.dtype))


def attend(q: Tensor, segments: Sequence[Segment], mask: Mask = None) -> Tensor:
    """Output [B, Sq, h, d] of turned queries `q` [B, Sq, h, d] over 1 or 2 segments; gradient reaches plain ones only.

    `mask`, over all entries of plain segments, as in `attention`.
    """
    if len(segments) not in (1, 2):
        raise ValueError(f"memory attention reads 1 or 2 segments, history and window, got {len(segments)}")
    if len(segments) > 1 or not segments[0].plain:
        assert mask is None, "masks are for clips, segments for memories"
        if kernels(q.device.type):
            from vidistill.ops.kernels.memory import memory_attention

            out: Tensor = memory_attention(q, *kernel_arguments(q, segments))
            return out
    return attention(q, *joined(segments, q.dtype), mask)


Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def kernel_arguments(q: Tensor, segments: Sequence[Segment]) -> Lists:
    """Segments as the lists that the kernel takes: keys, values, their scales, tables; empty tensors for none."""
    none = q.new_empty(0, dtype=torch.float32)

    def split(entries: list[Tensor | Quantised]) -> tuple[list[Tensor], list[Tensor]]:
        eight = [x if isinstance(x, Quantised) else Quantised(x, none) for x in entries]
        return [x.data for x in eight], [x.scale for x in eight]

    keys, key_scales = split([s.keys for s in segments])
    values, value_scales = split([s.values for s in segments])
    return keys, values, key_scales, value_scales, [none if s.table is None else s.table for s in segments]
