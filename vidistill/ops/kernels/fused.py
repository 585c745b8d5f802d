"""Norm + rotation of queries and keys, modulated norm and gated sum, forward and backward, as Triton kernels.

A program takes ROWS tokens at a time. Sums over tokens (gradients of weights, shifts, scales, gates) are written as one
partial row a program and added up outside, so the result does not depend on the order of programs.
Source: Zhang & Sennrich 1910.07467 (RMS norm), Peebles & Xie 2212.09748 (adaptive layer norm with gates).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidistill.ops.launch import launch_config, padded
from vidistill.ops.tuning import MODULATION, NORM_ROPE, Config


@triton.jit
def _pair(base, rows, pairs, limit, HALF: tl.constexpr):
    """Even and odd columns of dense rows of width 2 HALF, as float32."""
    inside = (rows < limit)[:, None] & (pairs < HALF)[None, :]
    where = base + rows[:, None].to(tl.int64) * (2 * HALF) + 2 * pairs[None, :]
    a = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    return a, tl.load(where + 1, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(base, rows, pairs, limit, a, b, HALF: tl.constexpr):
    inside = (rows < limit)[:, None] & (pairs < HALF)[None, :]
    where = base + rows[:, None].to(tl.int64) * (2 * HALF) + 2 * pairs[None, :]
    tl.store(where, a.to(base.dtype.element_ty), mask=inside)
    tl.store(where + 1, b.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _angles(table, rows, pairs, limit, tokens, HALF: tl.constexpr, HEAD_HALF: tl.constexpr):
    """Cosines and sines [rows, pairs] of the token of each row and the place of each pair in its head."""
    inside = (rows < limit)[:, None] & (pairs < HALF)[None, :]
    where = table + (rows % tokens)[:, None] * HEAD_HALF + (pairs % HEAD_HALF)[None, :]
    cos = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    return cos, tl.load(where + tokens * HEAD_HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm_rope(
    x0, x1, w0, w1, table, y0, y1, limit, tokens, eps,
    HALF: tl.constexpr, HEAD_HALF: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, PAD)
    second = tl.program_id(1) == 1
    x, w, y = x0, w0, y0
    if second:
        x, w, y = x1, w1, y1
    a, b = _pair(x, rows, pairs, limit, HALF)
    r = 1 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)
    wa = tl.load(w + 2 * pairs, mask=pairs < HALF, other=0.0).to(tl.float32)
    wb = tl.load(w + 2 * pairs + 1, mask=pairs < HALF, other=0.0).to(tl.float32)
    a, b = a * r[:, None] * wa[None, :], b * r[:, None] * wb[None, :]
    cos, sin = _angles(table, rows, pairs, limit, tokens, HALF, HEAD_HALF)
    _store_pair(y, rows, pairs, limit, a * cos - b * sin, a * sin + b * cos, HALF)


@triton.jit
def _norm_rope_backward(
    x0, x1, w0, w1, table, g0, g1, dx0, dx1, dw, limit, tokens, eps,
    HALF: tl.constexpr, HEAD_HALF: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pairs = tl.arange(0, PAD)
    second = tl.program_id(1) == 1
    x, w, g, dx = x0, w0, g0, dx0
    if second:
        x, w, g, dx = x1, w1, g1, dx1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    a, b = _pair(x, rows, pairs, limit, HALF)
    r = (1 / tl.sqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps))[:, None]
    wa = tl.load(w + 2 * pairs, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]
    wb = tl.load(w + 2 * pairs + 1, mask=pairs < HALF, other=0.0).to(tl.float32)[None, :]
    ga, gb = _pair(g, rows, pairs, limit, HALF)
    cos, sin = _angles(table, rows, pairs, limit, tokens, HALF, HEAD_HALF)
    ga, gb = ga * cos + gb * sin, gb * cos - ga * sin
    dw += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (2 * HALF)
    tl.store(dw + 2 * pairs, tl.sum(ga * a * r, 0), mask=pairs < HALF)
    tl.store(dw + 2 * pairs + 1, tl.sum(gb * b * r, 0), mask=pairs < HALF)
    ga, gb = ga * wa, gb * wb
    along = (tl.sum(ga * a + gb * b, 1) / (2 * HALF))[:, None] * r * r
    _store_pair(dx, rows, pairs, limit, r * (ga - a * along), r * (gb - b * along), HALF)


@triton.jit
def _rows_of(frame, part, offset, tokens, ROWS: tl.constexpr):
    """Rows of a frame that a step takes, and where the frame ends."""
    rows = part * ROWS + offset + tl.arange(0, ROWS)
    return rows, rows < tokens, frame.to(tl.int64) * tokens + rows


@triton.jit
def _load(base, rows, live, dims, D: tl.constexpr):
    inside = live[:, None] & (dims < D)[None, :]
    return tl.load(base + rows[:, None] * D + dims[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, rows, live, dims, x, D: tl.constexpr):
    inside = live[:, None] & (dims < D)[None, :]
    tl.store(base + rows[:, None] * D + dims[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _normed(x, dims, eps, D: tl.constexpr):
    """Rows with mean 0 and variance 1, and the factor that made them so."""
    centred = tl.where((dims < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * r[:, None], r[:, None]


@triton.jit
def _modulate(x, shift, scale, y, tokens, eps, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    dims = tl.arange(0, PAD)
    _, live, rows = _rows_of(tl.program_id(0), tl.program_id(1), 0, tokens, ROWS)
    n, _ = _normed(_load(x, rows, live, dims, D), dims, eps, D)
    here = tl.program_id(0).to(tl.int64) * D + dims
    s = tl.load(scale + here, mask=dims < D, other=0.0).to(tl.float32)
    t = tl.load(shift + here, mask=dims < D, other=0.0).to(tl.float32)
    _store(y, rows, live, dims, n * (1 + s)[None, :] + t[None, :], D)


@triton.jit
def _modulate_backward(
    x, scale, g, dx, dshift, dscale, tokens, eps, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    dims = tl.arange(0, PAD)
    _, live, rows = _rows_of(tl.program_id(0), tl.program_id(1), 0, tokens, ROWS)
    n, r = _normed(_load(x, rows, live, dims, D), dims, eps, D)
    grad = _load(g, rows, live, dims, D)
    s = tl.load(scale + tl.program_id(0).to(tl.int64) * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D + dims
    tl.store(dshift + part, tl.sum(grad, 0), mask=dims < D)
    tl.store(dscale + part, tl.sum(grad * n, 0), mask=dims < D)
    grad = grad * (1 + s)[None, :]
    mean = (tl.sum(grad, 1) / D)[:, None]
    along = (tl.sum(grad * n, 1) / D)[:, None]
    _store(dx, rows, live, dims, r * (grad - mean - n * along), D)


@triton.jit
def _gate(x, y, gate, out, tokens, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    dims = tl.arange(0, PAD)
    _, live, rows = _rows_of(tl.program_id(0), tl.program_id(1), 0, tokens, ROWS)
    s = tl.load(gate + tl.program_id(0).to(tl.int64) * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    _store(out, rows, live, dims, _load(x, rows, live, dims, D) + _load(y, rows, live, dims, D) * s[None, :], D)


@triton.jit
def _gate_backward(y, gate, g, dy, dgate, tokens, D: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):
    dims = tl.arange(0, PAD)
    _, live, rows = _rows_of(tl.program_id(0), tl.program_id(1), 0, tokens, ROWS)
    s = tl.load(gate + tl.program_id(0).to(tl.int64) * D + dims, mask=dims < D, other=0.0).to(tl.float32)
    grad = _load(g, rows, live, dims, D)
    part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D + dims
    tl.store(dgate + part, tl.sum(grad * _load(y, rows, live, dims, D), 0), mask=dims < D)
    _store(dy, rows, live, dims, grad * s[None, :], D)


def _frames(x: Tensor, config: Config) -> tuple[int, int, int]:
    """Frames of `x` [B, F, n, D], tokens of each, and the programs that share one."""
    return x.shape[0] * x.shape[1], x.shape[2], triton.cdiv(x.shape[2], config["ROWS"])


def _width(x: Tensor) -> dict[str, int]:
    return {"D": x.shape[-1], "PAD": padded(x.shape[-1])}


def _per_frame(x: Tensor, like: Tensor) -> Tensor:
    """A shift, scale or gate [B, F, 1, D] as dense [B F, D], however it was broadcast."""
    return x.expand(*like.shape[:2], 1, like.shape[-1]).reshape(-1, like.shape[-1]).contiguous()


def _joined(parts: Tensor, like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Partial sums [B F, programs, D] as the gradient of a shift, scale or gate of `shape`."""
    return parts.sum(1).view(*like.shape[:2], 1, -1).sum_to_size(shape).to(dtype)


# --- norm + rotation --------------------------------------------------------------------------------------------------


def launch_norm_rope(q, k, q_weight, k_weight, table, out_q, out_k, heads: int, eps: float, config: Config) -> None:
    """Write normed and turned `q` and `k` [B, S, D] into `out_q`, `out_k` [B, S, h, d]; all dense."""
    half, limit = q.shape[-1] // 2, q.shape[0] * q.shape[1]
    _norm_rope[(triton.cdiv(limit, config["ROWS"]), 2)](
        q, k, q_weight, k_weight, table, out_q, out_k, limit, q.shape[1], eps,
        HALF=half, HEAD_HALF=half // heads, PAD=padded(half), **config,
    )  # fmt: skip


def launch_norm_rope_backward(
    q, k, q_weight, k_weight, table, grad_q, grad_k, dq, dk, dw, heads: int, eps: float, config: Config
) -> None:
    """Write `dq`, `dk` [B, S, D] and partial weight gradients `dw` [2, programs, D]; all dense."""
    half, limit = q.shape[-1] // 2, q.shape[0] * q.shape[1]
    _norm_rope_backward[(dw.shape[1], 2)](
        q, k, q_weight, k_weight, table, grad_q, grad_k, dq, dk, dw, limit, q.shape[1], eps,
        HALF=half, HEAD_HALF=half // heads, PAD=padded(half), **config,
    )  # fmt: skip


@torch.library.custom_op("vidistill::norm_rope", mutates_args=())
def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], heads, q.shape[2] // heads)
    out_q, out_k = q.new_empty(shape), k.new_empty(shape)
    q, k, q_weight, k_weight, table = (x.contiguous() for x in (q, k, q_weight, k_weight, table))
    launch_norm_rope(q, k, q_weight, k_weight, table, out_q, out_k, heads, eps, launch_config(NORM_ROPE, q))
    return out_q, out_k


@norm_rope.register_fake
def _(q, k, q_weight, k_weight, table, heads, eps):
    shape = (*q.shape[:2], heads, q.shape[2] // heads)
    return q.new_empty(shape), k.new_empty(shape)


@torch.library.custom_op("vidistill::norm_rope_backward", mutates_args=())
def _norm_rope_gradient(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor,
    heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, q_weight, k_weight, table = (x.contiguous() for x in (q, k, q_weight, k_weight, table))
    config = launch_config(NORM_ROPE, q)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dw = torch.empty(2, triton.cdiv(q.shape[0] * q.shape[1], config["ROWS"]), q.shape[-1], device=q.device)
    launch_norm_rope_backward(
        q, k, q_weight, k_weight, table, grad_q.contiguous(), grad_k.contiguous(), dq, dk, dw, heads, eps, config
    )
    return dq, dk, dw.sum(1).to(q_weight.dtype)


@_norm_rope_gradient.register_fake
def _(grad_q, grad_k, q, k, q_weight, k_weight, table, heads, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape), q_weight.new_empty(2, q.shape[-1])


def _norm_rope_save(ctx, inputs, output) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_rope_grad(ctx, grad_q: Tensor, grad_k: Tensor):
    dq, dk, dw = _norm_rope_gradient(grad_q, grad_k, *ctx.saved_tensors, ctx.heads, ctx.eps)
    return dq, dk, dw[0], dw[1], None, None, None


norm_rope.register_autograd(_norm_rope_grad, setup_context=_norm_rope_save)


# --- modulated norm ---------------------------------------------------------------------------------------------------


def launch_modulated_norm(x, shift, scale, y, eps: float, config: Config) -> None:
    """Write into `y` [B, F, n, D]; `shift` and `scale` are dense [B F, D]."""
    frames, tokens, parts = _frames(x, config)
    _modulate[(frames, parts)](x, shift, scale, y, tokens, eps, **_width(x), **config)


def launch_modulated_norm_backward(x, scale, grad, dx, dshift, dscale, eps: float, config: Config) -> None:
    """Write `dx` and partial sums `dshift`, `dscale` [B F, programs, D]."""
    frames, tokens, parts = _frames(x, config)
    _modulate_backward[(frames, parts)](x, scale, grad, dx, dshift, dscale, tokens, eps, **_width(x), **config)


@torch.library.custom_op("vidistill::modulated_norm", mutates_args=())
def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    launch_modulated_norm(x, _per_frame(shift, x), _per_frame(scale, x), y, eps, launch_config(MODULATION, x))
    return y


@modulated_norm.register_fake
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@torch.library.custom_op("vidistill::modulated_norm_backward", mutates_args=())
def _modulated_norm_gradient(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    config = launch_config(MODULATION, x)
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    frames, _, parts = _frames(x, config)
    dshift, dscale = torch.empty(2, frames, parts, x.shape[-1], device=x.device)
    launch_modulated_norm_backward(x, _per_frame(scale, x), grad, dx, dshift, dscale, eps, config)
    return dx, _joined(dshift, x, shift.shape, shift.dtype), _joined(dscale, x, scale.shape, scale.dtype)


@_modulated_norm_gradient.register_fake
def _(grad, x, shift, scale, eps):
    return x.new_empty(x.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)


def _modulated_norm_save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _modulated_norm_grad(ctx, grad: Tensor):
    return *_modulated_norm_gradient(grad, *ctx.saved_tensors, ctx.eps), None


modulated_norm.register_autograd(_modulated_norm_grad, setup_context=_modulated_norm_save)


# --- gated sum --------------------------------------------------------------------------------------------------------


def launch_gated_sum(x, y, gate, out, config: Config) -> None:
    """Write into `out` [B, F, n, D]; `gate` is dense [B F, D]."""
    frames, tokens, parts = _frames(x, config)
    _gate[(frames, parts)](x, y, gate, out, tokens, **_width(x), **config)


def launch_gated_sum_backward(y, gate, grad, dy, dgate, config: Config) -> None:
    """Write `dy` and partial sums `dgate` [B F, programs, D]."""
    frames, tokens, parts = _frames(y, config)
    _gate_backward[(frames, parts)](y, gate, grad, dy, dgate, tokens, **_width(y), **config)


@torch.library.custom_op("vidistill::gated_sum", mutates_args=())
def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    launch_gated_sum(x, y.contiguous(), _per_frame(gate, x), out, launch_config(MODULATION, x))
    return out


@gated_sum.register_fake
def _(x, y, gate):
    return x.new_empty(x.shape)


@torch.library.custom_op("vidistill::gated_sum_backward", mutates_args=())
def _gated_sum_gradient(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    config = launch_config(MODULATION, y)
    y, grad = y.contiguous(), grad.contiguous()
    dy = torch.empty_like(y)
    frames, _, parts = _frames(y, config)
    dgate = torch.empty(frames, parts, y.shape[-1], device=y.device)
    launch_gated_sum_backward(y, _per_frame(gate, y), grad, dy, dgate, config)
    return dy, _joined(dgate, y, gate.shape, gate.dtype)


@_gated_sum_gradient.register_fake
def _(grad, y, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _gated_sum_save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gated_sum_grad(ctx, grad: Tensor):
    return grad, *_gated_sum_gradient(grad, *ctx.saved_tensors)


gated_sum.register_autograd(_gated_sum_grad, setup_context=_gated_sum_save)
