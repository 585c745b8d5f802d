"""Which numbers are multiplied: bfloat16 where it is quick, float32 at the speed of the widest instructions."""

import logging
import platform
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("vidistill")

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what entries of 8 bits hold at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = ("auto", *DTYPES)
EXACT = 2e-6  # relative error of a float32 product of 256; bfloat16 would be at 1e-3


@cache
def _has_bfloat16(device: str) -> bool:
    """Whether products in bfloat16 are quicker than in float32: logged once, because results differ by it."""
    quick = torch.cuda.is_bf16_supported(False) if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
    logger.debug("precision=auto on %s: %s", device, "bf16" if quick else "fp32 (no bfloat16 products in hardware)")
    return quick


def working_dtype(precision: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The type that products run in: "fp32", "bf16", or "auto", which is bf16 where the hardware multiplies it.

    A CPU without such products emulates them at less than half the speed of float32.
    """
    if precision == "auto":
        return DTYPES["bf16" if _has_bfloat16(torch.device(device).type) else "fp32"]
    return DTYPES[precision]


def autocast(precision: str, device: torch.device | str = "cpu", cache: bool = True) -> torch.autocast:
    """A context in which products run in `working_dtype`; weights, norms and sums stay float32."""
    dtype = working_dtype(precision, device)
    return torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16, cache_enabled=cache)


def _error() -> float:
    """Largest error of a float32 product against float64, relative to its largest number."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=rng) for _ in range(2))
    wanted = a.double() @ b.double()
    return float(((a @ b).double() - wanted).abs().max() / wanted.abs().max())


def _maker() -> str:
    """Who made this CPU, as far as the system says; looked up for the name "GenuineIntel"."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor()


@cache
def fast_float32() -> bool:
    """Hand float32 products on a CPU to oneDNN where that is faster and as exact; True if it is done, logged once.

    MKL, the default of torch on x86, stays with AVX2 on processors of other makers; oneDNN uses AVX-512, twice as fast.
    On those of its own maker MKL is the quicker one, most of all where products are small.
    torch offers it only under the name of "medium" precision, which would mean bfloat16 on a CPU with AMX and TF32 on a
    GPU: there nothing is changed. Forward and backward passes change by rounding only, so training that resumes
    bitwise must call this before every run or before none.
    """
    if torch.cuda.is_available():
        reason = "a GPU is present, whose products the same switch would shorten"
    elif torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        reason = "no AVX-512 or no oneDNN"
    elif torch.backends.mkl.is_available() and "GenuineIntel" in _maker():
        reason = "MKL, on a CPU of its maker"
    elif torch.cpu._is_amx_tile_supported():
        reason = "this CPU has AMX, where it would mean bfloat16"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        error = _error()
        if error <= EXACT:
            logger.debug("float32 products on cpu: oneDNN (AVX-512, no AMX; relative error %.1e)", error)
            return True
        torch.set_float32_matmul_precision(before)
        reason = f"oneDNN is not exact here (relative error {error:.1e})"
    logger.debug("float32 products on cpu: torch's default (%s)", reason)
    return False
