"""What a machine can do and what a pass asks of it: versions, bytes, the speed of matrix products, FLOPs."""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidistill import __version__
from vidistill.models.layers import DiTConfig
from vidistill.ops.attention import chosen
from vidistill.ops.device import wait_for

MATMUL_SIZES = (1024, 1536, 2048)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` intra-op threads (0: as they are), for sessions opened inside too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_peak_gflops(device: torch.device | str = "cpu", repeats: int = 5) -> float:
    """Best, over `MATMUL_SIZES`, of the median speed of square float32 products at the present number of threads."""
    best = 0.0
    for n in MATMUL_SIZES:
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            a @ b
            wait_for(a.device)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * n**3 / statistics.median(times[1:]) / 1e9)
    return best


OPERATORS = {  # what a profile is told by; all else is "other"
    "linear layers": ("aten::addmm", "mkldnn::_linear_pointwise", "aten::_weight_int8pack_mm"),
    "attention products": ("aten::mm", "aten::bmm", "aten::baddbmm"),
    "softmax": ("aten::_softmax",),
    "fused attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_forward"),
    "copies": ("aten::copy_", "aten::cat"),
}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Share of the time of `run` on the host that each kind of operator takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    spent = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(spent.values())
    shares = {kind: sum(spent.get(name, 0.0) for name in names) / total for kind, names in OPERATORS.items()}
    return {**shares, "other": 1.0 - sum(shares.values())}


def resident_bytes() -> int:
    """Bytes of the process in memory now (where the system does not tell: the most there ever were)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else peak_bytes()


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """The most bytes this process has had: in memory, or allocated on a CUDA device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(net: nn.Module) -> dict[str, Any]:
    """Machine and versions that a figure of `net` belongs to."""
    weight = next(net.parameters())
    return {
        "vidistill": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "attention": chosen(weight.device.type),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def flops_per_pass(
    dit: DiTConfig,
    tokens: int,
    memory_tokens: int = 0,
    *,
    frames: int = 1,
    text_tokens: int = 0,
    embed_text: bool = False,
    output: bool = True,
) -> int:
    """Floating-point operations (a multiply-add is two) of one forward of `tokens` tokens in `frames` frames.

    Queries also look at `memory_tokens` and cross-attend to `text_tokens`. What depends on the text alone (its
    embedding, keys and values) is needed once a prompt, not once a pass, and counts only with `embed_text`. Without
    `output` (a context pass) the last block ends with its keys and values. Norms, activations and other element-wise
    work are left out.
    """
    d, image = dit.width, dit.image_tokens if dit.image_dim else 0
    text = text_tokens - image if dit.text_dim else 0
    block = 4 * tokens * d * d + 2 * tokens * d * dit.ffn + 2 * tokens * (tokens + memory_tokens) * d
    if dit.text_dim:
        block += 2 * tokens * d * d + 2 * tokens * text_tokens * d
        block += 2 * text_tokens * d * d if embed_text else 0
    patches = (
        tokens * dit.patch_dim * d + tokens * dit.patch_dim // dit.channels * (dit.channels + dit.extra_channels) * d
    )
    times = frames * (dit.freq_dim * d + d * d + 6 * d * d)
    embedding = text * (dit.text_dim * d + d * d) + image * (dit.image_dim**2 + dit.image_dim * d) if embed_text else 0
    sites = 0
    for name, site in dit.projected.items():
        takers = 1 if name == "modulation" else len(site.layers) or dit.layers
        sites += frames * takers * ((site.dim * site.hidden if site.hidden else 0) + (site.hidden or site.dim) * d)
    tail = 0
    if not output:
        prompt = 2 * text_tokens * d * d if dit.text_dim and embed_text else 0  # keys and values are there all the same
        tail = block - 3 * tokens * d * d - prompt + tokens * dit.patch_dim * d
    return 2 * (dit.layers * block - tail + patches + times + embedding + sites)
