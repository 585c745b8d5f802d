"""Compile every kernel and launch row for a GPU that is not here: does it build, does it fit the shared memory?

Triton stays pointed at that GPU: nothing can be launched afterwards in the same process.
"""

import warnings
from collections.abc import Callable, Iterator

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from vidistill.ops import tuning

HALF = torch.bfloat16
FRAMES, TOKENS, HEADS, DIM = 3, 168, 12, 128  # three frames of a network 1536 wide


class _Elsewhere:
    """The little that Triton's launcher asks of a driver, for a machine that is not here."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _attention(config: tuning.Config, backward: bool) -> None:
    from vidistill.ops.kernels import attention

    x = torch.empty(1, FRAMES * TOKENS, HEADS, DIM, dtype=HALF)
    line = torch.empty(1, HEADS, x.shape[1])
    seen = torch.empty(FRAMES, FRAMES, dtype=torch.bool)
    if backward:
        attention.launch_backward(x, x, x, x, seen, TOKENS, line, line, x, x, x, config)
    else:
        attention.launch_forward(x, x, x, seen, TOKENS, x, line, config)


def _memory(config: tuning.Config) -> None:
    from vidistill.ops.kernels import memory

    x = torch.empty(1, FRAMES * TOKENS, HEADS, DIM, dtype=HALF)
    none, scale = torch.empty(0), torch.empty(x.shape[:-1])
    table = torch.empty(2, x.shape[1], 1, DIM // 2)
    for eight in (torch.int8, torch.float8_e4m3fn):  # a history in 8 bits, turned as it is read, and the window
        stored, scales = [x.to(eight), x], [scale, none]
        memory.launch(x, stored, stored, scales, scales, [table, none], x, config)


def _norm_rope(config: tuning.Config) -> None:
    from vidistill.ops.kernels import fused

    x = torch.empty(1, FRAMES * TOKENS, HEADS * DIM, dtype=HALF)
    w, table = torch.empty(x.shape[-1]), torch.empty(2, x.shape[1], 1, DIM // 2)
    dw = torch.empty(2, triton.cdiv(x.shape[1], config["ROWS"]), x.shape[-1])
    fused.launch_norm_rope(x, x, w, w, table, x, x, HEADS, 1e-6, config)
    fused.launch_norm_rope_backward(x, x, w, w, table, x, x, x, x, dw, HEADS, 1e-6, config)


def _modulation(config: tuning.Config) -> None:
    from vidistill.ops.kernels import fused

    x = torch.empty(1, FRAMES, TOKENS, HEADS * DIM, dtype=HALF)
    row, parts = torch.empty(FRAMES, x.shape[-1]), torch.empty(FRAMES, TOKENS, x.shape[-1])
    fused.launch_modulated_norm(x, row, row, x, 1e-6, config)
    fused.launch_modulated_norm_backward(x, row, x, x, parts, parts, 1e-6, config)
    fused.launch_gated_sum(x, x, row, x, config)
    fused.launch_gated_sum_backward(x, row, x, x, parts, config)


def _append(config: tuning.Config) -> None:
    from vidistill.ops.kernels import quant

    x = torch.empty(1, FRAMES * TOKENS, HEADS, DIM, dtype=HALF)
    scale, where = torch.empty(x.shape[:-1]), torch.arange(x.shape[1])
    for eight in (torch.int8, torch.float8_e4m3fn):
        store = x.to(eight)
        quant.launch(x, x, store, store, scale, scale, where, config)


LAUNCHES: dict[str, Callable[[tuning.Config], None]] = {
    tuning.ATTENTION_FORWARD: lambda config: _attention(config, backward=False),
    tuning.ATTENTION_BACKWARD: lambda config: _attention(config, backward=True),
    tuning.MEMORY: _memory,
    tuning.NORM_ROPE: _norm_rope,
    tuning.MODULATION: _modulation,
    tuning.APPEND: _append,
}


def built(kernel: str, config: tuning.Config, capability: int) -> Iterator[tuple[str, int]]:
    """(function, bytes of shared memory) of what `kernel` launches, compiled down to machine code; nothing is run."""
    sizes: list[tuple[str, int]] = []

    def compile_instead(*, fn, compile, **rest) -> bool:
        function = fn.jit_function
        source = ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        binary = triton.compile(source, target=triton.runtime.driver.active.get_current_target(), options=options)
        sizes.append((function.__name__, binary.metadata.shared))
        return True  # the launcher stops here

    before = knobs.runtime.jit_cache_hook
    triton.runtime.driver.set_active(_Elsewhere(capability))
    knobs.runtime.jit_cache_hook = compile_instead
    try:
        LAUNCHES[kernel](config)
    finally:
        knobs.runtime.jit_cache_hook = before
    yield from sizes


def build(architectures: dict[str, tuple[int, int]], kernels: tuple[str, ...] = tuple(LAUNCHES)) -> bool:
    """Compile all rows for {table: (compute capability, shared memory)}; prints each; False if one does not fit."""
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    fits = True
    for name, (capability, limit) in architectures.items():
        for kernel in kernels:
            for config in tuning.TABLES[name][kernel]:
                for function, shared in built(kernel, config, capability):
                    fits = fits and shared <= limit
                    state = "" if shared <= limit else f"  TOO LARGE, {limit} bytes at most"
                    print(f"{name} {kernel}: {function} {config}: {shared} bytes of shared memory{state}", flush=True)
    return fits
