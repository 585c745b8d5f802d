"""Every Triton kernel against its plain reference: odd shapes, dtypes, outputs filled with NaN beforehand.

The tests run this in Triton's interpreter on a CPU, `scripts/verify_kernels.py` on a GPU before it times anything.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.ops import fused, quant
from vidistill.ops.attention import reference
from vidistill.ops.masks import FrameMask
from vidistill.ops.memory_attention import Segment, attend_reference, kernel_arguments
from vidistill.ops.rope import rope_table
from vidistill.ops.tuning import APPEND, ATTENTION_BACKWARD, ATTENTION_FORWARD, MEMORY, MODULATION, NORM_ROPE, Config

Pairs = list[tuple[Tensor, Tensor]]  # what a kernel wrote, what the reference says
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One comparison: `run(config, device)` launches `kernel` with those launch parameters."""

    kernel: str
    name: str
    dtype: torch.dtype
    run: Callable[[Config, str], Pairs]

    def error(self, config: Config, device: str) -> float:
        """Largest difference over the largest number of the reference; infinite where something is not finite."""
        worst = 0.0
        for got, wanted in self.run(config, device):
            got, wanted = got.double(), wanted.double()
            if got.shape != wanted.shape or not bool(got.isfinite().all()):
                return float("inf")
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
        return worst

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def _random(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).to(device=device, dtype=dtype)


def _nan(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


def _table(tokens: int, head_dim: int, device: str) -> Tensor:
    return rope_table(torch.rand(tokens, 3, generator=torch.Generator().manual_seed(tokens)) * 30, head_dim).to(device)


def _size(device: str, gpu: int, interpreted: int) -> int:
    """A size past the edge of a tile: those of a GPU are large, those of the interpreter small and slow."""
    return gpu if device == "cuda" else interpreted


def masks(frames: int, chunk: int) -> dict[str, Tensor]:
    """Frame masks of the field: block-causal, with a window and a sink, and teacher forcing (queries twice as long)."""
    c = torch.arange(frames) // chunk
    causal = c[None] <= c[:, None]
    window = causal & ((c[None] >= c[:, None] - 1) | (torch.arange(frames) < 1)[None])
    own = c[None] == c[:, None]
    clean = torch.cat((causal, torch.zeros_like(causal)), 1)
    return {
        "block-causal": causal,
        "window and sink": window,
        "teacher forcing": torch.cat((clean, torch.cat((causal & ~own, own), 1))),
    }


# --- attention --------------------------------------------------------------------------------------------------------


def _attention(shape: tuple[int, ...], seen: Tensor | None, tokens: int, dtype: torch.dtype, backward: bool):
    b, sq, sk, h, d = shape

    def run(config: Config, device: str) -> Pairs:
        from vidistill.ops.kernels import attention as kernels

        q, k, v = (_random(b, s, h, d, device=device, dtype=dtype) for s in (sq, sk, sk))
        v = v.flip(1).contiguous()
        frames = torch.empty(0, 0, dtype=torch.bool, device=device) if seen is None else seen.to(device)
        mask = None if seen is None else FrameMask(frames, tokens)
        out, lse = _nan(b, sq, h, d, device=device, dtype=dtype), _nan(b, h, sq, device=device)
        if not backward:
            kernels.launch_forward(q, k, v, frames, tokens, out, lse, config)
            return [(out, reference(q.float(), k.float(), v.float(), mask))]
        a, b_, c = (x.float().requires_grad_() for x in (q, k, v))
        wanted = reference(a, b_, c, mask)
        grad = _random(b, sq, h, d, device=device, dtype=dtype)
        out, lse = torch.ops.vidistill.masked_attention(q, k, v, frames, tokens)
        delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv = (_nan(*x.shape, device=device, dtype=dtype) for x in (q, k, v))
        kernels.launch_backward(grad, q, k, v, frames, tokens, lse, delta, dq, dk, dv, config)
        return list(zip((dq, dk, dv), torch.autograd.grad(wanted, (a, b_, c), grad.float()), strict=True))

    return run


def attention_cases(device: str) -> Iterator[Case]:
    long = (2, 33, _size(device, 129, 65), _size(device, 3, 2), 20)
    for kernel, backward in ((ATTENTION_FORWARD, False), (ATTENTION_BACKWARD, True)):
        for dtype in TOLERANCE:
            for shape in ((1, 63, 63, 2, 16), long, (1, 1, 100, 1, 64)):
                yield Case(kernel, f"full {shape}", dtype, _attention(shape, None, 1, dtype, backward))
        for name, seen in masks(9, 3).items():
            s = seen.shape[0] * 7
            run = _attention((1, s, s, 2, 24), seen, 7, torch.float32, backward)
            yield Case(kernel, f"{name} ({s} tokens)", torch.float32, run)


# --- memory attention -------------------------------------------------------------------------------------------------


def _segments(kinds: str, d: int, dtype: torch.dtype, device: str) -> list[Segment]:
    """One segment a letter: d and t dense, 8 int8, f fp8; all but d turned as it is read."""
    segments = []
    for i, kind in enumerate(kinds):
        tokens = (_size(device, 63, 33), _size(device, 100, 63))[i]
        dense = [_random(2, tokens + j, _size(device, 3, 2), d, device=device, dtype=dtype)[:, :tokens] for j in (0, 1)]
        eight = [quant.quantise(x, torch.float8_e4m3fn if kind == "f" else torch.int8) for x in dense]
        entries: list = eight if kind in "8f" else dense
        segments.append(
            Segment(
                entries[0],
                entries[1],
                _table(tokens, d, device) if kind != "d" else None,
            )
        )
    return segments


def _memory(kinds: str, sq: int, d: int, dtype: torch.dtype):
    def run(config: Config, device: str) -> Pairs:
        from vidistill.ops.kernels.memory import launch

        q = _random(2, sq, _size(device, 3, 2), d, device=device, dtype=dtype)
        segments = _segments(kinds, d, dtype, device)
        out = _nan(*q.shape, device=device, dtype=dtype)
        launch(q, *kernel_arguments(q, segments), out, config)
        return [(out, attend_reference(q.float(), segments))]

    return run


def memory_cases(device: str) -> Iterator[Case]:
    kinds = ["d", "t", "8", "dt", "t8", "8d", "88", *(["f", "fd"] if device == "cuda" else [])]
    for dtype in TOLERANCE:
        for kind in kinds if dtype == torch.float32 else ("t8", "8d"):
            for sq, d in ((33, 20), (63, 64)) if len(kind) > 1 else ((50, 16),):
                yield Case(MEMORY, f"segments {kind!r}, {sq} queries, d {d}", dtype, _memory(kind, sq, d, dtype))


# --- what stands between the matrix products --------------------------------------------------------------------------


def _gradients(function: Callable[..., Tensor], args: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.float().requires_grad_() for x in args]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, grad.float()))


def _norm_rope(b: int, s: int, heads: int, d: int, dtype: torch.dtype):
    def run(config: Config, device: str) -> Pairs:
        from vidistill.ops.kernels import fused as kernels

        width = heads * d
        xs = [_random(b, s, width + i, device=device, dtype=dtype)[..., :width].contiguous() for i in (0, 1)]
        ws = [_random(width + i, device=device)[:width].contiguous() for i in (0, 1)]
        gs = [_random(b, s, heads, d + 2 * i, device=device, dtype=dtype)[..., :d].contiguous() for i in (0, 1)]
        table, rows = _table(s, d, device), -(-b * s // config["ROWS"])
        outs = [_nan(b, s, heads, d, device=device, dtype=dtype) for _ in xs]
        dxs, dw = [_nan(*x.shape, device=device, dtype=dtype) for x in xs], _nan(2, rows, width, device=device)
        shared = (xs[0], xs[1], ws[0], ws[1], table)
        kernels.launch_norm_rope(*shared, outs[0], outs[1], heads, EPS, config)
        kernels.launch_norm_rope_backward(*shared, gs[0], gs[1], dxs[0], dxs[1], dw, heads, EPS, config)
        pairs = []
        for i in (0, 1):
            wanted, (dx, weight) = _gradients(
                lambda x, w: fused.norm_rope_reference(x, w, table, heads, EPS), [xs[i], ws[i]], gs[i]
            )
            pairs += [(outs[i], wanted), (dxs[i], dx), (dw[i].sum(0), weight)]
        return pairs

    return run


def _modulation(frames: int, tokens: int, width: int, dtype: torch.dtype):
    def run(config: Config, device: str) -> Pairs:
        from vidistill.ops.kernels import fused as kernels

        x, y, g = (_random(2, frames, tokens, width + i, device=device, dtype=dtype)[..., :width] for i in range(3))
        x, y, g = x.contiguous(), y.contiguous(), g.contiguous()
        shift, scale, gate = (_random(2, frames, 1, width + i, device=device)[..., :width] for i in range(3))
        t, s, gt = (z.reshape(-1, width).contiguous() for z in (shift, scale, gate))
        normed, summed, dx, dy = (_nan(*x.shape, device=device, dtype=dtype) for _ in range(4))
        parts = [_nan(2 * frames, -(-tokens // config["ROWS"]), width, device=device) for _ in range(3)]
        kernels.launch_modulated_norm(x, t, s, normed, EPS, config)
        kernels.launch_modulated_norm_backward(x, s, g, dx, parts[0], parts[1], EPS, config)
        kernels.launch_gated_sum(x, y, gt, summed, config)
        kernels.launch_gated_sum_backward(y, gt, g, dy, parts[2], config)
        dt, ds, dg = (p.sum(1).view(2, frames, 1, width) for p in parts)
        want, (wx, wt, ws) = _gradients(
            lambda a, b, c: fused.modulated_norm_reference(a, b, c, EPS), [x, shift, scale], g
        )
        total, (_, wy, wg) = _gradients(fused.gated_sum_reference, [x, y, gate], g)
        return [(normed, want), (dx, wx), (dt, wt), (ds, ws), (summed, total), (dy, wy), (dg, wg)]

    return run


def fused_cases(device: str) -> Iterator[Case]:
    rows = [_size(device, gpu, few) for gpu, few in ((63, 21), (100, 33), (129, 37))]
    for dtype in TOLERANCE:
        for shape in ((2, rows[0], 3, 20), (1, rows[1], 2, 64), (1, 1, 1, 6)):
            yield Case(NORM_ROPE, f"B S h d {shape}", dtype, _norm_rope(*shape, dtype))
        for size in ((3, 21, 100), (1, rows[2], 63), (2, 1, 7)):
            yield Case(MODULATION, f"F n D {size}", dtype, _modulation(*size, dtype))


def _append(s: int, heads: int, d: int, dtype: torch.dtype, eight: torch.dtype):
    def run(config: Config, device: str) -> Pairs:
        from vidistill.ops.kernels.quant import launch

        k, v = (_random(2, s + i, heads, d, device=device, dtype=dtype)[:, :s].contiguous() for i in (0, 1))
        k[:, 0] = 0  # a row of zeros has no scale
        where = torch.randperm(2 * s, generator=torch.Generator().manual_seed(s))[:s].to(device)
        want = [quant.empty((2, 2 * s, heads, d), eight, device) for _ in (k, v)]
        got = [quant.empty((2, 2 * s, heads, d), eight, device) for _ in (k, v)]
        for store, x in zip(want, (k, v), strict=True):
            quant.append(store, x, where)
        launch(k, v, got[0].data, got[1].data, got[0].scale, got[1].scale, where, config)
        return [(g.dequantise(), w.dequantise()) for g, w in zip(got, want, strict=True)]

    return run


def append_cases(device: str) -> Iterator[Case]:
    for dtype in TOLERANCE:
        for s, h, d in ((_size(device, 63, 21), 3, 20), (13, 2, 64), (_size(device, 100, 33), 1, 7)):
            for eight in (torch.int8, torch.float8_e4m3fn) if device == "cuda" else (torch.int8,):
                yield Case(APPEND, f"{s} tokens of {h} x {d} in {eight}", dtype, _append(s, h, d, dtype, eight))


def cases(device: str) -> Iterator[Case]:
    """All comparisons that `device` can run; fp8 needs a GPU, Triton's interpreter rounds it differently."""
    yield from attention_cases(device)
    yield from memory_cases(device)
    yield from fused_cases(device)
    yield from append_cases(device)


# --- tracing ----------------------------------------------------------------------------------------------------------


def _compiled_equals_eager(function: Callable[..., Tensor], args: list[Tensor]) -> float:
    """Largest difference of outputs and gradients between a traced and a plain call; raises on a graph break."""
    found = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_(x.is_floating_point() and torch.is_grad_enabled()) for x in args]
        out = call(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        found.append((out, *(torch.autograd.grad(out.square().sum(), wanted) if out.requires_grad else ())))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def traced(device: str) -> Iterator[tuple[str, float]]:
    """Operator, error: each under torch.compile(fullgraph=True), with its backward pass where it has one."""
    from vidistill.ops.kernels import attention, memory
    from vidistill.ops.kernels import fused as fused_kernels
    from vidistill.ops.kernels import quant as quant_kernels

    def r(*shape: int) -> Tensor:
        return _random(*shape, device=device)

    seen, table = masks(3, 1)["block-causal"].to(device), _table(21, 16, device)
    yield (
        "masked_attention",
        _compiled_equals_eager(
            lambda q, k, v: attention.masked_attention(q, k, v, seen, 7), [r(1, 21, 2, 16) for _ in range(3)]
        ),
    )
    yield (
        "norm_rope",
        _compiled_equals_eager(
            lambda q, k, w: torch.cat(fused_kernels.norm_rope(q, k, w, w, table, 2, EPS)),
            [r(1, 21, 32), r(1, 21, 32), r(32)],
        ),
    )
    x, shift = r(1, 3, 7, 32), r(1, 3, 1, 32)
    yield (
        "modulated_norm",
        _compiled_equals_eager(lambda x, t, s: fused_kernels.modulated_norm(x, t, s, EPS), [x, shift, shift]),
    )
    yield "gated_sum", _compiled_equals_eager(fused_kernels.gated_sum, [x, x, shift])
    segments = _segments("8d", 16, torch.float32, device)
    q = r(2, 21, _size(device, 3, 2), 16)
    arguments = kernel_arguments(q, segments)

    def attend(q: Tensor) -> Tensor:
        return memory.memory_attention(q, *arguments)

    def append(keys: Tensor, values: Tensor, key_scales: Tensor, value_scales: Tensor) -> Tensor:
        where = torch.arange(21, device=device) + 4
        quant_kernels.append_quantised(q, q, keys, values, key_scales, value_scales, where)
        return keys * key_scales[..., None] + values * value_scales[..., None]

    with torch.no_grad():
        yield "memory_attention", _compiled_equals_eager(attend, [q])
        store = quant.empty((2, 30, q.shape[2], 16), device=device)
        yield "append_quantised", _compiled_equals_eager(append, [store.data, store.data, store.scale, store.scale])
