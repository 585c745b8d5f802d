"""Attention with a frame mask, forward and backward, as Triton kernels behind one torch operator.

Source: FlashAttention-2 2307.08691, algorithms 1 and 2; the mask is looked up per frame, never stored per token.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidistill.ops.launch import interpreted, launch_config, padded, precision
from vidistill.ops.tuning import ATTENTION_BACKWARD, ATTENTION_FORWARD, Config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(base, rows, columns, stride, row_end, width: tl.constexpr, WIDEN: tl.constexpr):
    """[rows, columns] of a [S, d] matrix, zeros outside of it."""
    inside = (rows < row_end)[:, None] & (columns < width)[None, :]
    x = tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) if WIDEN else x


@triton.jit
def _allowed(seen, rows, columns, row_end, column_end, frames, TOKENS: tl.constexpr, MASKED: tl.constexpr):
    """Bool [rows, columns]: inside the matrix and seen by its frame mask [Fq, Fk]."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    if MASKED:
        where = (rows // TOKENS)[:, None] * frames + (columns // TOKENS)[None, :]
        inside = inside & (tl.load(seen + where, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _any(allowed, MASKED: tl.constexpr):
    """Whether a tile has anything to compute; without a mask every tile has, which costs no test."""
    if MASKED:
        return tl.max(tl.max(allowed.to(tl.int32), 1), 0) > 0
    else:
        return True


@triton.jit
def _forward_step(
    acc, top, total, x, k, v, columns, dims, allowed, k_s, v_s, sk, scale,
    D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys = _tile(k, columns, dims, k_s, sk, D, WIDEN)
    scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    scores = tl.where(allowed, scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    values = _tile(v, columns, dims, v_s, sk, D, WIDEN)
    acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward(
    q, k, v, seen, out, lse, sq, sk, heads, frames, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    TOKENS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    k += batch.to(tl.int64) * k_b + head * k_h
    v += batch.to(tl.int64) * v_b + head * v_h
    x = _tile(q + batch.to(tl.int64) * q_b + head * q_h, rows, dims, q_s, sq, D, WIDEN)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(0, sk, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        allowed = _allowed(seen, rows, columns, sq, sk, frames, TOKENS, MASKED)
        if _any(allowed, MASKED):
            acc, top, total = _forward_step(
                acc, top, total, x, k, v, columns, dims, allowed, k_s, v_s, sk, scale, D, WIDEN, PRECISION
            )
    inside = (rows < sq)[:, None] & (dims < D)[None, :]
    out += batch.to(tl.int64) * o_b + head * o_h
    total = tl.where(total > 0, total, 1.0)  # rows past the end
    tl.store(out + rows[:, None] * o_s + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + tl.program_id(1).to(tl.int64) * sq + rows, top + tl.log2(total), mask=rows < sq)


@triton.jit
def _queries_step(
    acc, x, g, level, offset, k, v, columns, dims, allowed, k_s, v_s, sk, scale,
    D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys = _tile(k, columns, dims, k_s, sk, D, WIDEN)
    values = _tile(v, columns, dims, v_s, sk, D, WIDEN)
    scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    p = tl.where(allowed, tl.exp2(scores - level[:, None]), 0.0)
    dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - offset[:, None]) * scale
    return acc + tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)


@triton.jit
def _backward_queries(
    q, k, v, seen, grad, lse, delta, dq, sq, sk, heads, frames, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h,
    TOKENS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D_PAD)
    k += batch.to(tl.int64) * k_b + head * k_h
    v += batch.to(tl.int64) * v_b + head * v_h
    x = _tile(q + batch.to(tl.int64) * q_b + head * q_h, rows, dims, q_s, sq, D, WIDEN)
    g = _tile(grad + batch.to(tl.int64) * o_b + head * o_h, rows, dims, o_s, sq, D, WIDEN)
    line = tl.program_id(1).to(tl.int64) * sq + rows
    level = tl.load(lse + line, mask=rows < sq, other=0.0)
    offset = tl.load(delta + line, mask=rows < sq, other=0.0)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for start in range(0, sk, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        allowed = _allowed(seen, rows, columns, sq, sk, frames, TOKENS, MASKED)
        if _any(allowed, MASKED):
            acc = _queries_step(
                acc, x, g, level, offset, k, v, columns, dims, allowed, k_s, v_s, sk, scale, D, WIDEN, PRECISION
            )
    inside = (rows < sq)[:, None] & (dims < D)[None, :]
    dq += batch.to(tl.int64) * o_b + head * o_h
    tl.store(dq + rows[:, None] * o_s + dims[None, :], acc.to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _keys_step(
    acc_k, acc_v, keys, values, q, grad, lse, delta, rows, dims, allowed, q_s, o_s, sq, scale,
    D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x = _tile(q, rows, dims, q_s, sq, D, WIDEN)
    g = _tile(grad, rows, dims, o_s, sq, D, WIDEN)
    level = tl.load(lse + rows, mask=rows < sq, other=0.0)
    offset = tl.load(delta + rows, mask=rows < sq, other=0.0)
    scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
    p = tl.where(allowed, tl.exp2(scores - level[:, None]), 0.0)
    acc_v += tl.dot(tl.trans(p.to(g.dtype)), g, input_precision=PRECISION)
    dp = tl.dot(g, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - offset[:, None]) * scale
    return acc_k + tl.dot(tl.trans(ds.to(x.dtype)), x, input_precision=PRECISION), acc_v


@triton.jit
def _backward_keys(
    q, k, v, seen, grad, lse, delta, dk, dv, sq, sk, heads, frames, scale,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, o_b, o_s, o_h, g_b, g_s, g_h,
    TOKENS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D_PAD)
    q += batch.to(tl.int64) * q_b + head * q_h
    grad += batch.to(tl.int64) * o_b + head * o_h
    keys = _tile(k + batch.to(tl.int64) * k_b + head * k_h, columns, dims, k_s, sk, D, WIDEN)
    values = _tile(v + batch.to(tl.int64) * v_b + head * v_h, columns, dims, v_s, sk, D, WIDEN)
    lse += tl.program_id(1).to(tl.int64) * sq
    delta += tl.program_id(1).to(tl.int64) * sq
    acc_k = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    acc_v = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for start in range(0, sq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        allowed = _allowed(seen, rows, columns, sq, sk, frames, TOKENS, MASKED)
        if _any(allowed, MASKED):
            acc_k, acc_v = _keys_step(
                acc_k, acc_v, keys, values, q, grad, lse, delta, rows, dims, allowed, q_s, o_s, sq, scale,
                D, WIDEN, PRECISION,
            )  # fmt: skip
    inside = (columns < sk)[:, None] & (dims < D)[None, :]
    where = batch.to(tl.int64) * g_b + head * g_h + columns[:, None] * g_s + dims[None, :]
    tl.store(dk + where, acc_k.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + where, acc_v.to(dv.dtype.element_ty), mask=inside)


def _meta(q: Tensor, seen: Tensor, tokens: int, config: Config) -> dict:
    return {
        "TOKENS": tokens,
        "MASKED": seen.numel() > 0,
        "D": q.shape[-1],
        "D_PAD": padded(q.shape[-1]),
        "WIDEN": interpreted(),  # its tl.dot takes no bfloat16
        "PRECISION": precision(q.dtype),
        **config,
    }


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int, out: Tensor, lse: Tensor, config: Config
) -> None:
    """Write attention into `out` [B, Sq, h, d] and the base-2 log-sum-exp into `lse` [B, h, Sq]."""
    b, sq, h, d = q.shape
    grid = (triton.cdiv(sq, config["BLOCK_M"]), b * h)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    frames = seen.shape[1] if seen.numel() else 0
    _forward[grid](
        q, k, v, seen, out, lse, sq, k.shape[1], h, frames, 1 / math.sqrt(d), *strides, **_meta(q, seen, tokens, config)
    )  # fmt: skip


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, config: Config,
) -> None:  # fmt: skip
    """Write gradients into `dq`, `dk`, `dv`; `delta` [B, h, Sq] is the sum of gradient times output."""
    b, sq, h, d = q.shape
    sk = k.shape[1]
    strides = [s for x in (q, k, v, grad) for s in x.stride()[:3]]
    sizes = (sq, sk, h, seen.shape[1] if seen.numel() else 0, 1 / math.sqrt(d))
    meta = _meta(q, seen, tokens, config)
    _backward_queries[(triton.cdiv(sq, config["BLOCK_M"]), b * h)](
        q, k, v, seen, grad, lse, delta, dq, *sizes, *strides, **meta
    )
    _backward_keys[(triton.cdiv(sk, config["BLOCK_N"]), b * h)](
        q, k, v, seen, grad, lse, delta, dk, dv, *sizes, *strides, *dk.stride()[:3], **meta
    )


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("vidistill::masked_attention", mutates_args=())
def _operator(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    q, k, v = map(_last_dense, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    launch_forward(q, k, v, seen.contiguous(), tokens, out, lse, launch_config(ATTENTION_FORWARD, q))
    return out, lse


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32
    )


@torch.library.custom_op("vidistill::masked_attention_backward", mutates_args=())
def _gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = _last_dense(q), _last_dense(k), _last_dense(v), grad.contiguous()
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    config = launch_config(ATTENTION_BACKWARD, q)
    launch_backward(grad, q, k, v, seen.contiguous(), tokens, lse, delta, dq, dk, dv, config)
    return dq, dk, dv


@_gradient.register_fake
def _(grad, q, k, v, seen, tokens, out, lse):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, seen, tokens = inputs
    ctx.save_for_backward(q, k, v, seen, *output)
    ctx.tokens = tokens


def _backward(ctx, grad: Tensor, _lse: Tensor | None):
    q, k, v, seen, out, lse = ctx.saved_tensors
    return *_gradient(grad, q, k, v, seen, ctx.tokens, out, lse), None, None


_operator.register_autograd(_backward, setup_context=_save)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, tokens: int) -> Tensor:
    """As `attention`; `seen` [Fq, Fk] is a frame mask of `tokens` tokens a frame, or empty for none."""
    return _operator(q, k, v, seen, tokens)[0]
