"""Attention of a chunk over what a memory holds: sinks, window and compressed history, read in one pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.ops.attention import attention, chosen
from vidistill.ops.quant import Quantised
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


def _dense(x: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    return x.dequantise(dtype) if isinstance(x, Quantised) else x.to(dtype)


def _gathered(q: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor | None]:
    """All keys (turned) and values [B, S, h, d], and additive scores [S] where a segment needs them."""
    keys, values, scores = [], [], []
    for s in segments:
        k = _dense(s.keys, q.dtype)
        keys.append(k if s.table is None else rotate(k, s.table).to(q.dtype))
        values.append(_dense(s.values, q.dtype))
        score = torch.full((k.shape[1],), math.log(s.represents), device=q.device)
        if s.used is not None:
            score = score.masked_fill(torch.arange(k.shape[1], device=q.device) >= s.used, -math.inf)
        scores.append(score)
    plain = all(s.used is None and s.represents == 1.0 for s in segments)
    return torch.cat(keys, 1), torch.cat(values, 1), None if plain else torch.cat(scores)


def attend_reference(q: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The specification of `attend`: everything dense, turned, joined, softmax in the open."""
    k, v, extra = _gathered(q, segments)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() / math.sqrt(q.shape[-1])
    if extra is not None:
        scores = scores + extra
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(q.dtype), v)


def attend(q: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Output [B, Sq, h, d] of turned queries `q` [B, Sq, h, d] over 1 to 3 segments; no gradient reaches the memory."""
    if not 1 <= len(segments) <= 3:
        raise ValueError(f"memory attention reads 1 to 3 segments, got {len(segments)}")
    if chosen(q.device.type) == "triton":
        return _attend_triton(q, segments)
    k, v, extra = _gathered(q, segments)
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
    from vidistill.ops.triton_memory import memory_attention

    return memory_attention(q, *kernel_arguments(q, segments))
