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
# Numbers of scores where `products` changes its way (WHOLE of all heads together, KEPT and LONG of one), query rows at
# a time, and queries that make a run worth its own products: measured on Zen 4 and Zen 5 cores.
WHOLE, KEPT, LONG, ROWS, RUN = 3 * 2**20, 7 * 2**18, 2**17, 384, 32


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The specification: softmax(q k^T / sqrt(d)) v in the open. Shapes as in `attention`."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~frame_mask(mask).dense, -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _in_runs(q: Tensor, mask: FrameMask) -> bool:
    """Whether the runs of alike query frames in `mask` are long enough to be attended one by one: on a CPU."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling() and q.shape[1] >= RUN * len(mask.runs[0])


def _by_runs(backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
    """Attention run by run of alike query frames, over the keys that they see and no others."""
    queries, keys, seen = mask.runs
    k_runs, v_runs, parts = k.split(keys, 1), v.split(keys, 1), []
    for run, which in zip(q.split(queries, 1), seen, strict=True):
        k, v = (torch.cat([x[i] for i in which], 1) for x in (k_runs, v_runs))
        parts.append(backend(run, k, v, None))
    return torch.cat(parts, 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    if isinstance(mask, FrameMask) and _in_runs(q, mask):
        return _by_runs(sdpa, q, k, v, mask)
    dense = mask.dense if isinstance(mask, FrameMask) else mask
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=dense)
    return out.transpose(1, 2)


def _piece(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of `q` [N, Sq, d] over `k`, `v` [N, Sk, d] as two batched products and a softmax."""
    scale = q.shape[-1] ** -0.5
    if bias is None:
        scores = torch.bmm(q * scale, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(bias.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


def _long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, ROWS queries at a time, in one pair of buffers; quickest where `k` and `v` lie head by head."""
    b, sq, h, d = q.shape
    q, out = q * d**-0.5, torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = -(-sq // -(-sq // ROWS))
    scores, shares = q.new_empty(2, rows, k.shape[1])
    for i in range(b):
        for j in range(h):
            keys, values = k[i, :, j].t(), v[i, :, j]
            for start in range(0, sq, rows):
                n, here = min(rows, sq - start), slice(start, start + rows)
                torch.mm(q[i, here, j], keys, out=scores[:n])
                torch.softmax(scores[:n], -1, out=shares[:n])
                torch.mm(shares[:n], values, out=out[i, here, j])
    return out


def products(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention in the open where that beats torch's fused kernel on a CPU.

    That is: half precision that is differentiated, up to KEPT scores a head; with a fast matrix library
    (`precision.fast_float32`) float32 that is, or has up to WHOLE scores, and a long chunk over a long memory. All else
    goes to `sdpa`. What a mask hides from whole runs of frames is left out.
    """
    b, sq, h, d = q.shape
    size = sq * k.shape[1]
    recording = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if torch.compiler.is_compiling():
        return sdpa(q, k, v, mask)
    fast = torch.get_float32_matmul_precision() == "medium" if q.dtype == torch.float32 else recording
    if not fast:
        return sdpa(q, k, v, mask)
    mask = None if mask is None else frame_mask(mask)
    if mask is not None and _in_runs(q, mask):
        return _by_runs(products, q, k, v, mask)
    whole = size <= KEPT if recording else b * h * size <= WHOLE
    if not whole and size >= LONG and mask is None and not recording:
        return _long(q, k, v)
    if not whole:
        return sdpa(q, k, v, mask)
    bias = None if mask is None else mask.additive
    q, k, v = (x.transpose(1, 2).reshape(b * h, -1, d) for x in (q, k, v))
    n = max(1, KEPT // size)
    out = torch.cat([_piece(q[i : i + n], k[i : i + n], v[i : i + n], bias) for i in range(0, b * h, n)])
    return out.view(b, h, sq, d).transpose(1, 2)


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
    from vidistill.ops.kernels.attention import masked_attention

    if mask is None:
        return masked_attention(q, k, v, q.new_empty(0, 0, dtype=torch.bool), 1)
    mask = frame_mask(mask)
    if mask.widths:  # the kernel knows frames of one width alone
        mask = FrameMask(mask.dense)
    return masked_attention(q, k, v, mask.seen, mask.tokens)


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "sdpa": sdpa,
    "products": products,
    "flex": flex,
    "xformers": xformers,
    "triton": triton,
}
DENSE = ("sdpa", "products", "xformers")  # those that read a mask token by token
FLEX_FROM = (8, 0)  # the first compute capability with bfloat16 products, in which clips are trained


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


def choose(name: str, device: str, mask: str = "none", capability: tuple[int, int] = FLEX_FROM) -> tuple[str, str]:
    """Backend, and the reason for it, where `name` was asked for on a `device` ("cpu", "cuda") of such a capability.

    `mask`: `none`, `frames` (a FrameMask) or `dense` (a tensor). ValueError where a GPU would have to store a mask
    token by token, which at the size of published models is more than all the rest, and computes what it hides.
    """
    if device == "cuda" and mask == "dense":
        raise ValueError("attention on a GPU takes no mask [Sq, Sk] of tokens: pass a FrameMask, told by frames")
    if device == "cuda" and mask == "frames" and name in DENSE:
        raise ValueError(
            f"attention backend {name!r} would store this mask token by token: choose backend=flex or auto"
        )
    if name != "auto":
        return name, "asked for; experimental, not timed on a GPU yet" if name == "triton" else "asked for"
    if device == "cpu":
        return "products", "batched products where they beat torch's fused kernel, the kernel elsewhere"
    if device != "cuda" or mask == "none":
        return "sdpa", "torch's own kernels, nothing to install"
    if capability < FLEX_FROM:
        raise ValueError(
            f"masked attention needs compute capability {FLEX_FROM} or newer, this GPU has {capability}: train "
            "on a newer one, or on rollouts, which take no mask"
        )
    return "flex", "blocks of keys that a mask hides are skipped"


def constant_in_graphs(decide: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compiler.assume_constant_result` does, whose call loads the compiler: half the start of a command."""
    decide._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return decide


@cache
def _resolve(name: str, device: str, mask: str) -> str:
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else FLEX_FROM
    name, reason = choose(name, device, mask, capability)
    if name in NEEDS:
        NEEDS[name](device)
    masked = "" if mask == "none" else " under a mask"
    logger.debug("attention backend on %s%s: %s (%s)", device, masked, name, reason)
    return name


@constant_in_graphs
def resolve(name: str, device: str, mask: str = "none") -> str:
    """What `choose` says for the GPU that is here; logged once; raises ValueError where it cannot run."""
    return _resolve(name, device, mask)


def choice() -> str:
    """The backend asked for: `auto` or a key of BACKENDS."""
    return _choice


def chosen(device: str) -> str:
    """Name of the backend that `attention` uses on `device`."""
    return resolve(_choice, device)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention output [B, Sq, h, d] of `q` [B, Sq, h, d] over `k`, `v` [B, Sk, h, d].

    `mask` is a FrameMask, or (on a CPU) a bool tensor [Sq, Sk] that is True where a query may look.
    """
    kind = "none" if mask is None else "frames" if isinstance(mask, FrameMask) else "dense"
    return BACKENDS[resolve(_choice, q.device.type, kind)](q, k, v, mask)
