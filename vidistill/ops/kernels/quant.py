"""Append to an 8-bit store: a chunk's keys and values are scaled, rounded and put in their slots in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidistill.ops.launch import launch_config, padded
from vidistill.ops.precision import LARGEST
from vidistill.ops.tuning import APPEND, Config


@triton.jit
def _row(
    x, data, scales, batch, head, n, slot, live,
    x_b, x_s, x_h, d_b, d_s, d_h, s_b, s_s, s_h, largest, D: tl.constexpr, PAD: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, PAD)
    inside = live[:, None] & (dims < D)[None, :]
    x += batch.to(tl.int64) * x_b + head * x_h + n[:, None] * x_s + dims[None, :]
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value), 1) / largest
    value = value / tl.where(scale > 0, scale, 1.0)[:, None]
    value = tl.minimum(tl.maximum(value, -largest), largest)
    if INTEGER:  # to the nearest even integer, as torch.round does: adding 1.5 * 2^23 leaves no bits for fractions
        value = (value + 12582912.0) - 12582912.0
    data += batch.to(tl.int64) * d_b + head * d_h + slot[:, None] * d_s + dims[None, :]
    tl.store(data, value.to(data.dtype.element_ty), mask=inside)
    tl.store(scales + batch.to(tl.int64) * s_b + head * s_h + slot * s_s, scale, mask=live)


@triton.jit
def _append(
    k, v, keys, values, key_scales, value_scales, where, tokens, heads, largest,
    k_b, k_s, k_h, v_b, v_s, v_h, d_b, d_s, d_h, e_b, e_s, e_h, s_b, s_s, s_h, t_b, t_s, t_h,
    D: tl.constexpr, PAD: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = n < tokens
    slot = tl.load(where + n, mask=live, other=0)
    if tl.program_id(2) == 0:
        _row(k, keys, key_scales, batch, head, n, slot, live,
             k_b, k_s, k_h, d_b, d_s, d_h, s_b, s_s, s_h, largest, D, PAD, INTEGER)  # fmt: skip
    else:
        _row(v, values, value_scales, batch, head, n, slot, live,
             v_b, v_s, v_h, e_b, e_s, e_h, t_b, t_s, t_h, largest, D, PAD, INTEGER)  # fmt: skip


def launch(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor, where: Tensor,
    config: Config,
) -> None:  # fmt: skip
    """Quantise `k`, `v` [B, S, h, d] into tokens `where` [S] of the stores [B, C, h, d] and their scales [B, C, h]."""
    b, s, h, d = k.shape
    strides = [x for t in (k, v, keys, values, key_scales, value_scales) for x in t.stride()[:3]]
    _append[(triton.cdiv(s, config["ROWS"]), b * h, 2)](
        k, v, keys, values, key_scales, value_scales, where, s, h, LARGEST[keys.dtype], *strides,
        D=d, PAD=padded(d), INTEGER=keys.dtype == torch.int8, **config,
    )  # fmt: skip


@torch.library.custom_op("vidistill::append_quantised", mutates_args=("keys", "values", "key_scales", "value_scales"))
def append_quantised(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor, where: Tensor
) -> None:
    """As `vidistill.ops.quant.append` for keys and values at once; `where` [S] is int64 and names no slot twice."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    launch(k, v, keys, values, key_scales, value_scales, where.contiguous(), launch_config(APPEND, k))


@append_quantised.register_fake
def _(k, v, keys, values, key_scales, value_scales, where):
    return None
