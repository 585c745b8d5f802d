"""A chunk's queries over one or two stored segments in one pass: turned and widened from 8 bits while they are read.

The halves of a pair are read apart, so that turning costs four products a pair and no shuffle, and scores are the sum
of two half-width products. 8-bit entries are multiplied as they are; their scales go to scores and probabilities.
Source: FlashAttention-2 2307.08691, algorithm 1; rotation at read StreamingLLM 2309.17453, section 3.2.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidistill.ops.launch import interpreted, launch_config, padded, precision
from vidistill.ops.tuning import MEMORY, Config

LOG2E = tl.constexpr(1.4426950408889634)
SEGMENTS = 2


@triton.jit
def _halves(base, rows, pairs, stride, row_end, HALF: tl.constexpr, COMPUTE: tl.constexpr):
    """Even and odd columns of rows of a [S, 2 HALF] matrix, zeros outside of it."""
    inside = (rows < row_end)[:, None] & (pairs < HALF)[None, :]
    where = base + rows[:, None] * stride + 2 * pairs[None, :]
    return tl.load(where, mask=inside, other=0.0).to(COMPUTE), tl.load(where + 1, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _segment(
    acc, top, total, even, odd, batch, head, k, v, k_scale, v_scale, table,
    k_b, k_s, k_h, v_b, v_s, v_h, ks_b, ks_s, ks_h, vs_b, vs_s, vs_h, size, scale,
    EIGHT: tl.constexpr, TURN: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k += batch.to(tl.int64) * k_b + head * k_h
    v += batch.to(tl.int64) * v_b + head * v_h
    k_scale += batch.to(tl.int64) * ks_b + head * ks_h
    v_scale += batch.to(tl.int64) * vs_b + head * vs_h
    pairs = tl.arange(0, HALF_PAD)
    dims = tl.arange(0, D_PAD)
    for start in range(0, size, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        a, b = _halves(k, n, pairs, k_s, size, HALF, COMPUTE)
        if TURN:
            inside = (n < size)[:, None] & (pairs < HALF)[None, :]
            angle = n[:, None] * HALF + pairs[None, :]
            cos = tl.load(table + angle, mask=inside, other=0.0)
            sin = tl.load(table + size * HALF + angle, mask=inside, other=0.0)
            turned = a * cos - b * sin
            b = (a * sin + b * cos).to(COMPUTE)
            a = turned.to(COMPUTE)
        scores = tl.dot(even, tl.trans(a), input_precision=PRECISION)
        scores += tl.dot(odd, tl.trans(b), input_precision=PRECISION)
        if EIGHT:
            scores *= tl.load(k_scale + n * ks_s, mask=n < size, other=0.0)[None, :]
        scores = tl.where((n < size)[None, :], scores * (scale * LOG2E), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if EIGHT:
            p *= tl.load(v_scale + n * vs_s, mask=n < size, other=0.0)[None, :]
        inside = (n < size)[:, None] & (dims < 2 * HALF)[None, :]
        values = tl.load(v + n[:, None] * v_s + dims[None, :], mask=inside, other=0.0).to(COMPUTE)
        acc = acc * shrink[:, None] + tl.dot(p.to(COMPUTE), values, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def _kernel(
    q, out, heads, sq, scale, q_b, q_s, q_h, o_b, o_s, o_h,
    k0, v0, ks0, vs0, t0, k0b, k0s, k0h, v0b, v0s, v0h, a0b, a0s, a0h, c0b, c0s, c0h, size0,
    k1, v1, ks1, vs1, t1, k1b, k1s, k1h, v1b, v1s, v1h, a1b, a1s, a1h, c1b, c1s, c1h, size1,
    SEGMENTS: tl.constexpr, E0: tl.constexpr, T0: tl.constexpr, E1: tl.constexpr, T1: tl.constexpr,
    HALF: tl.constexpr, HALF_PAD: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = q + batch.to(tl.int64) * q_b + head * q_h
    even, odd = _halves(here, rows, tl.arange(0, HALF_PAD), q_s, sq, HALF, COMPUTE)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    acc, top, total = _segment(
        acc, top, total, even, odd, batch, head, k0, v0, ks0, vs0, t0,
        k0b, k0s, k0h, v0b, v0s, v0h, a0b, a0s, a0h, c0b, c0s, c0h, size0, scale,
        E0, T0, HALF, HALF_PAD, D_PAD, BLOCK_N, COMPUTE, PRECISION,
    )  # fmt: skip
    if SEGMENTS > 1:
        acc, top, total = _segment(
            acc, top, total, even, odd, batch, head, k1, v1, ks1, vs1, t1,
            k1b, k1s, k1h, v1b, v1s, v1h, a1b, a1s, a1h, c1b, c1s, c1h, size1, scale,
            E1, T1, HALF, HALF_PAD, D_PAD, BLOCK_N, COMPUTE, PRECISION,
        )  # fmt: skip
    dims = tl.arange(0, D_PAD)
    inside = (rows < sq)[:, None] & (dims < 2 * HALF)[None, :]
    out += batch.to(tl.int64) * o_b + head * o_h + rows[:, None] * o_s + dims[None, :]
    tl.store(out, (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=inside)


COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _scale_strides(x: Tensor) -> tuple[int, ...]:
    return x.stride() if x.numel() else (0, 0, 0)


def launch(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor], tables: Sequence[Tensor],
    out: Tensor, config: Config,
) -> None:  # fmt: skip
    """Write attention into `out` [B, Sq, h, d]; empty tensors stand for no scales, no table."""
    b, sq, h, d = q.shape
    segments: list = []
    flags: dict[str, bool] = {}
    for i in range(SEGMENTS):
        j = min(i, len(keys) - 1)  # an absent segment repeats the other one and is never read
        k, v, ks, vs, t = keys[j], values[j], key_scales[j], value_scales[j], tables[j]
        strides = (*k.stride()[:3], *v.stride()[:3], *_scale_strides(ks), *_scale_strides(vs))
        segments += [k, v, ks, vs, t, *strides, k.shape[1]]
        flags |= {f"E{i}": ks.numel() > 0, f"T{i}": t.numel() > 0}
    _kernel[(triton.cdiv(sq, config["BLOCK_M"]), b * h)](
        q, out, h, sq, 1 / math.sqrt(d), *q.stride()[:3], *out.stride()[:3], *segments,
        SEGMENTS=len(keys), **flags, HALF=d // 2, HALF_PAD=padded(d // 2), D_PAD=padded(d),
        COMPUTE=tl.float32 if interpreted() else COMPUTE[q.dtype], PRECISION=precision(q.dtype), **config,
    )  # fmt: skip


@torch.library.custom_op("vidistill::memory_attention", mutates_args=())
def memory_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor],
    tables: Sequence[Tensor],
) -> Tensor:
    """Attention [B, Sq, h, d] of `q` over the segments, see `launch`. The last axis of every entry must be dense."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tables = [t.contiguous() for t in tables]
    launch(q, keys, values, key_scales, value_scales, tables, out, launch_config(MEMORY, q))
    return out


@memory_attention.register_fake
def _(q, keys, values, key_scales, value_scales, tables):
    return torch.empty_like(q, memory_format=torch.contiguous_format)
