"""Scaled dot-product attention: one function, a plain reference, a dict of backends chosen at first call."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill.ops.launch import interpreted
from vidistill.ops.masks import FrameMask, frame_mask

logger = logging.getLogger("vidistill")
Mask = Tensor | FrameMask | None
Backend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
BLOCK_ROWS, BLOCKED_FROM = 256, 2**19  # measured on two Zen 5 cores, see `blocked`


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The specification: softmax(q k^T / sqrt(d)) v in the open. Shapes as in `attention`."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~frame_mask(mask).dense, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    dense = mask.dense if isinstance(mask, FrameMask) else mask
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=dense)
    return out.transpose(1, 2)


def blocked(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """For a long chunk over a long memory on a CPU without gradients: head by head, BLOCK_ROWS queries at a time.

    Two plain products and a softmax run at the speed of the matrix library; the fused kernel of torch does not. All
    else goes to `sdpa`.
    """
    b, sq, h, d = q.shape
    small = sq * k.shape[1] < BLOCKED_FROM
    recording = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if mask is not None or small or recording or torch.compiler.is_compiling():
        return sdpa(q, k, v, mask)
    q, k, v = ((x.transpose(1, 2)).contiguous() for x in (q * d**-0.5, k, v))
    out = torch.empty(b, sq, h, d, dtype=q.dtype, device=q.device)
    rows = -(-sq // -(-sq // BLOCK_ROWS))
    for i in range(b):
        for j in range(h):
            for start in range(0, sq, rows):
                scores = q[i, j, start : start + rows] @ k[i, j].t()
                out[i, start : start + rows, j] = scores.softmax(-1) @ v[i, j]
    return out


@cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled on a GPU, where it becomes one kernel; on a CPU the plain operator."""
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain, dynamic=False) if device == "cuda" else plain


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError("attention backend 'flex' has no backward pass on a CPU: choose sdpa or auto")
        q, k, v = q.detach(), k.detach(), v.detach()
    block = None if mask is None else frame_mask(mask).block
    out = _flex(q.device.type)(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block)
    return out.transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v, attn_bias=None if mask is None else frame_mask(mask).bias(q))


def triton(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    from vidistill.ops.triton_attention import masked_attention

    if mask is None:
        return masked_attention(q, k, v, q.new_empty(0, 0, dtype=torch.bool), 1)
    mask = frame_mask(mask)
    return masked_attention(q, k, v, mask.seen, mask.tokens)


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "sdpa": sdpa,
    "blocked": blocked,
    "flex": flex,
    "xformers": xformers,
    "triton": triton,
}


def need_xformers(device: str) -> None:
    if device != "cuda":
        raise ValueError(
            f"attention backend 'xformers' runs on CUDA only and the tensors are on {device!r}: choose sdpa or auto"
        )
    try:
        import xformers.ops  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "attention backend 'xformers' is not installed: pip install 'vidistill[cuda]', or choose sdpa or auto"
        ) from error


def need_triton(device: str) -> None:
    try:
        here = interpreted() or device == "cuda"  # asks for Triton either way
    except ImportError as error:
        raise ValueError(
            "attention backend 'triton' is not installed: pip install 'vidistill[cuda]', or choose sdpa or auto"
        ) from error
    if not here:
        raise ValueError(
            f"attention backend 'triton' needs a CUDA device and the tensors are on {device!r}: choose sdpa or auto "
            "(TRITON_INTERPRET=1, set before Python starts, runs the kernels slowly on a CPU to check them)"
        )


NEEDS: dict[str, Callable[[str], None]] = {"xformers": need_xformers, "triton": need_triton}

# The one setting of this package that is not passed as an argument: which kernels run. Set by `set_backend`.
_choice = "auto"


def set_backend(name: str) -> None:
    """Choose the attention backend (`auto` or a key of BACKENDS) for this process; checked at the first call."""
    global _choice
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose one of {['auto', *BACKENDS]}")
    _choice = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`set_backend(name)` for a `with` block."""
    before = _choice
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


@cache
def _resolve(name: str, device: str) -> str:
    if name == "auto" and device == "cpu" and torch.get_float32_matmul_precision() == "medium":
        name, reason = "blocked", "float32 products run on oneDNN, which beats the fused kernel on long memories"
    elif name == "auto":
        name, reason = "sdpa", "torch's own kernels, nothing to install; scripts/verify_kernels.py compares the others"
    else:
        reason = "asked for"
        if name in NEEDS:
            NEEDS[name](device)
    logger.info("attention backend on %s: %s (%s)", device, name, reason)
    return name


@torch.compiler.assume_constant_result
def resolve(name: str, device: str) -> str:
    """The backend that `name` means on `device` ("cpu", "cuda"); logged once; raises ValueError where it cannot run."""
    return _resolve(name, device)


def chosen(device: str) -> str:
    """Name of the backend that `attention` uses on `device`."""
    return resolve(_choice, device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention output [B, Sq, h, d] of `q` [B, Sq, h, d] over `k`, `v` [B, Sk, h, d].

    `mask` is a FrameMask, or a bool tensor [Sq, Sk] that is True where a query may look.
    """
    return BACKENDS[resolve(_choice, q.device.type)](q, k, v, mask)
