"""Attention of a chunk over what a memory holds: sinks, window and compressed history, read in one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.ops.attention import Mask, attention
from vidistill.ops.quant import Quantised, kernels
from vidistill.ops.rope import rotate


@dataclass(frozen=True)
class Segment:
    """A run of stored entries: `keys` and `values` [B, S, h, d], dense or 8-bit.

    `table` [2, S, 1, d / 2] turns the keys when they are read; None: they rest already turned. `used` (int32, one
    element, on the device) says how many entries count, so that a buffer of fixed size fills without changing shapes;
    None: all. `represents`: how many tokens a merged entry stands for; its score grows by the logarithm, as if it
    were there that often (Source: Token Merging 2210.09461, eq. 1).
    """

    keys: Tensor | Quantised
    values: Tensor | Quantised
    table: Tensor | None = None
    used: Tensor | None = None
    represents: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether it is read as it lies."""
        return (
            not isinstance(self.keys, Quantised) and self.table is None and self.used is None and self.represents == 1
        )


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


def _scores(segments: Sequence[Segment], device: torch.device) -> Tensor | None:
    """What is added to the scores [S] of all entries; None: nothing."""
    if all(s.used is None and s.represents == 1.0 for s in segments):
        return None
    parts = []
    for s in segments:
        score = torch.full((s.keys.shape[1],), math.log(s.represents), device=device)
        if s.used is not None:
            score = score.masked_fill(torch.arange(s.keys.shape[1], device=device) >= s.used, -math.inf)
        parts.append(score)
    return torch.cat(parts)


def attend_reference(q: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The specification of `attend`: everything dense, turned, joined, softmax in the open."""
    k, v = joined(segments, q.dtype)
    scores, extra = torch.einsum("bqhd,bkhd->bhqk", q, k).float() / math.sqrt(q.shape[-1]), _scores(segments, q.device)
    if extra is not None:
        scores = scores + extra
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(q.dtype), v)


def attend(q: Tensor, segments: Sequence[Segment], mask: Mask = None) -> Tensor:
    """Output [B, Sq, h, d] of turned queries `q` [B, Sq, h, d] over 1 to 3 segments; gradient reaches plain ones only.

    `mask`, over all entries of plain segments, as in `attention`.
    """
    if not 1 <= len(segments) <= 3:
        raise ValueError(f"memory attention reads 1 to 3 segments, got {len(segments)}")
    if len(segments) == 1 and segments[0].plain:
        return attention(q, *joined(segments, q.dtype), mask)
    assert mask is None, "masks are for clips, segments for memories"
    if kernels(q.device.type):
        return _attend_triton(q, segments)
    (k, v), extra = joined(segments, q.dtype), _scores(segments, q.device)
    if extra is None:
        return attention(q, k, v)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=extra.to(q.dtype)[None, None, None]
    )
    return out.transpose(1, 2)


Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[float]]


def kernel_arguments(q: Tensor, segments: Sequence[Segment]) -> Lists:
    """Segments as the lists that the kernel takes: keys, values, their scales, tables, counts, added scores."""
    none = q.new_empty(0, dtype=torch.float32)
    count = q.new_empty(0, dtype=torch.int32)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    key_scales: list[Tensor] = []
    value_scales: list[Tensor] = []
    for s in segments:
        for x, data, scales in ((s.keys, keys, key_scales), (s.values, values, value_scales)):
            data.append(x.data if isinstance(x, Quantised) else x)
            scales.append(x.scale if isinstance(x, Quantised) else none)
    tables = [none if s.table is None else s.table for s in segments]
    used = [count if s.used is None else s.used for s in segments]
    return keys, values, key_scales, value_scales, tables, used, [math.log(s.represents) for s in segments]


def _attend_triton(q: Tensor, segments: Sequence[Segment]) -> Tensor:
    from vidistill.ops.kernels.memory import memory_attention

    return memory_attention(q, *kernel_arguments(q, segments))
