"""float32 products on a CPU at the speed of its widest instructions."""

import logging
from functools import cache

import torch

logger = logging.getLogger("vidistill")
EXACT = 2e-6  # relative error of a float32 product of 256; bfloat16 would be at 1e-3


def _error() -> float:
    """Largest error of a float32 product against float64, relative to its largest number."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=rng) for _ in range(2))
    wanted = a.double() @ b.double()
    return float(((a @ b).double() - wanted).abs().max() / wanted.abs().max())


@cache
def fast_float32() -> bool:
    """Hand float32 products on a CPU to oneDNN where that is faster and as exact; True if it is done, logged once.

    MKL, the default of torch on x86, stays with AVX2 on processors of other makers; oneDNN uses AVX-512, twice as fast.
    torch offers it only under the name of "medium" precision, which would mean bfloat16 on a CPU with AMX and TF32 on a
    GPU: there nothing is changed. Forward and backward passes change by rounding only, so training that resumes
    bitwise must call this before every run or before none.
    """
    if torch.cuda.is_available():
        reason = "a GPU is present, whose products the same switch would shorten"
    elif torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        reason = "no AVX-512 or no oneDNN"
    elif torch.cpu._is_amx_tile_supported():
        reason = "this CPU has AMX, where it would mean bfloat16"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        error = _error()
        if error <= EXACT:
            logger.info("float32 products on cpu: oneDNN (AVX-512, no AMX; relative error %.1e)", error)
            return True
        torch.set_float32_matmul_precision(before)
        reason = f"oneDNN is not exact here (relative error {error:.1e})"
    logger.info("float32 products on cpu: torch's default (%s)", reason)
    return False
