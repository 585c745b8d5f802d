"""Checks, times and tunes the Triton kernels on your machine.

    python scripts/verify_kernels.py             parity with the plain references, then times against them (needs a GPU)
    python scripts/verify_kernels.py --tune      also times every row of the launch tables and names the best
    python scripts/verify_kernels.py --build     compiles every row for Hopper and Ada, GPU or not, and prints its size

A kernel that fails parity is never timed. Without a GPU, parity runs in Triton's interpreter (a minute or two), and
there are no times. Exit code 1 if anything failed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

ARCHITECTURES = {"hopper": (90, 227 * 1024), "ada": (89, 99 * 1024)}  # compute capability, shared memory of a block


def parity(device: str) -> dict[str, bool]:
    """Kernel -> whether all its cases agree with the reference; prints a line for each kernel and for each failure."""
    from kernel_parity import cases, traced

    from vidistill.ops.tuning import config

    worst: dict[str, list[float]] = {}
    for case in cases(device):
        error = case.error(config(case.kernel, device, 0), device)
        worst.setdefault(case.kernel, []).append(error / case.tolerance)
        if error > case.tolerance:
            print(f"FAILED {case.kernel}: {case.name}, {case.dtype}: error {error:.1e}, allowed {case.tolerance:.0e}")
    for name, error in traced(device):
        worst.setdefault("traced", []).append(error / 1e-5)
        print(f"traced without a graph break: {name}")
        if error > 1e-5:
            print(f"FAILED traced: {name}: error {error:.1e}")
    for kernel, ratios in worst.items():
        state = "ok" if max(ratios) <= 1 else "FAILED"
        print(f"parity {kernel:20s} {state:6s} {len(ratios):3d} cases, worst {max(ratios):.2f} of what is allowed")
    return {kernel: max(ratios) <= 1 for kernel, ratios in worst.items()}


Run = Callable[[dict], None]
Timed = tuple[str, str, Run, Callable[[], object]]  # kernel, case, launch with a config, what torch does instead


def timed_attention(device: str) -> Iterator[Timed]:
    from kernel_parity import masks

    from vidistill.ops.attention import sdpa
    from vidistill.ops.kernels import attention as kernels
    from vidistill.ops.masks import FrameMask

    half = {"device": device, "dtype": torch.bfloat16}
    for frames, tokens, heads, dim in ((21, 168, 6, 64), (9, 1560, 12, 128)):
        s = frames * tokens
        q, k, v, grad = (torch.randn(1, s, heads, dim, **half) for _ in range(4))
        out, lse = torch.empty_like(q), torch.empty(1, heads, s, device=device)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for name in ("full", "block-causal", "window and sink"):
            seen = torch.empty(0, 0, dtype=torch.bool) if name == "full" else masks(frames, 3)[name]
            seen = seen.to(device)
            dense = None if name == "full" else FrameMask(seen, tokens).dense
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            graph = sdpa(*leaves, dense)
            case = f"{name}, {s} tokens, {heads} x {dim}"
            yield (
                "attention_forward",
                case,
                lambda c, a=(q, k, v, seen, tokens, out, lse): kernels.launch_forward(*a, c),
                lambda a=(q, k, v, dense): sdpa(*a),
            )
            yield (
                "attention_backward",
                case,
                lambda c, a=(grad, q, k, v, seen, tokens, lse, lse, *grads): kernels.launch_backward(*a, c),
                lambda g=graph, x=leaves, dy=grad: torch.autograd.grad(g, x, dy, retain_graph=True),
            )


def timed_memory(device: str) -> Iterator[Timed]:
    from vidistill.ops.kernels import memory, quant
    from vidistill.ops.memory_attention import Segment, attend, kernel_arguments
    from vidistill.ops.quant import append, empty, quantise
    from vidistill.ops.rope import rope_table

    half = {"device": device, "dtype": torch.bfloat16}
    for tokens, heads, dim in ((168, 6, 64), (1560, 12, 128)):
        q = torch.randn(1, 3 * tokens, heads, dim, **half)
        stored = [torch.randn(1, n * tokens, heads, dim, **half) for n in (3, 18)]
        tables = [rope_table(torch.rand(x.shape[1], 3), dim).to(device) for x in stored]
        for name, kind in (("bf16", lambda x: x), ("int8", quantise)):
            parts = [Segment(kind(x), kind(x), t) for x, t in zip(stored, tables, strict=True)]
            args, out = kernel_arguments(q, parts), torch.empty_like(q)
            yield (
                "memory_attention",
                f"{name}, sinks 3 + window 18 of {tokens} tokens, turned at read",
                lambda c, a=(q, *args, out): memory.launch(*a, c),
                lambda a=(q, parts): attend(*a),
            )
        stores = [empty((1, 21 * tokens, heads, dim), device=device) for _ in range(2)]
        where = torch.arange(3 * tokens, device=device)
        flat = (stores[0].data, stores[1].data, stores[0].scale, stores[1].scale)
        yield (
            "append",
            f"3 frames of {tokens} tokens, int8",
            lambda c, a=(q, q, *flat, where): quant.launch(*a, c),
            lambda s=stores, x=q, w=where: [append(y, x, w) for y in s],
        )


def timed_fused(device: str) -> Iterator[Timed]:
    from vidistill.ops import fused
    from vidistill.ops.kernels import fused as kernels
    from vidistill.ops.rope import rope_table

    half = {"device": device, "dtype": torch.bfloat16}
    norm_rope, modulated = (torch.compile(f) for f in (fused.norm_rope_reference, fused.modulated_norm_reference))
    for tokens, heads, dim in ((168, 6, 64), (1560, 12, 128)):
        width = heads * dim
        x = torch.randn(1, 3, tokens, width, **half)
        flat = x.view(1, -1, width)
        weight, shift = torch.ones(width, device=device), torch.randn(1, 3, 1, width, device=device)
        table = rope_table(torch.rand(3 * tokens, 3), dim).to(device)
        outs, y = [torch.empty(1, 3 * tokens, heads, dim, **half) for _ in range(2)], torch.empty_like(x)
        rows = shift.view(3, width)
        yield (
            "norm_rope",
            f"{3 * tokens} tokens of {width}, queries and keys (against torch.compile)",
            lambda c, a=(flat, flat, weight, weight, table, *outs, heads, 1e-6): kernels.launch_norm_rope(*a, c),
            lambda a=(flat, weight, table, heads, 1e-6): [norm_rope(*a) for _ in range(2)],
        )
        yield (
            "modulation",
            f"{3 * tokens} tokens of {width}, modulated norm (against torch.compile)",
            lambda c, a=(x, rows, rows, y, 1e-6): kernels.launch_modulated_norm(*a, c),
            lambda a=(x, shift, shift, 1e-6): modulated(*a),
        )


def times(device: str, sound: dict[str, bool], tune: bool) -> None:
    """Print the time of every sound kernel beside what torch does; with `tune` for every row of the launch table."""
    from triton.testing import do_bench

    from vidistill.ops.tuning import TABLES, table_for

    table = table_for(torch.cuda.get_device_capability())
    print(f"{torch.cuda.get_device_name()}: launch table '{table}'; medians in microseconds")
    for make in (timed_attention, timed_memory, timed_fused):
        for kernel, case, run, instead in make(device):
            if not sound[kernel]:
                print(f"{kernel}, {case}: not timed, parity failed")
                continue
            base = 1e3 * do_bench(instead, return_mode="median")
            rows = TABLES[table][kernel] if tune else TABLES[table][kernel][:1]
            found = []
            for row in rows:
                found.append((1e3 * do_bench(partial(run, row), return_mode="median"), row))
                print(f"{kernel}, {case}: {found[-1][0]:.1f}, torch {base:.1f} ({base / found[-1][0]:.2f} x)  {row}")
            if tune:
                print(f"  best: {min(found, key=lambda f: f[0])[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="time every row of the launch tables")
    parser.add_argument("--build", action="store_true", help="compile every row for Hopper and Ada")
    args = parser.parse_args()
    if args.build:
        from kernel_build import build

        return 0 if build(ARCHITECTURES) else 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (
        device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    ):  # Triton reads it when it is imported: start again
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    sound = parity(device)
    if device == "cuda":
        times(device, sound, args.tune)
    else:
        print("no GPU: parity ran in Triton's interpreter; times need a GPU")
    return 0 if all(sound.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
