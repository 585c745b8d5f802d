"""What a network of true size costs, without its weights: parameters, FLOPs, memory, and a roofline on named GPUs.

Speeds are those of a stream whose memory is full; a first chunk has none yet, and its context pass comes after it is
seen. Left out: text encoder, codec, host, kernel launches, normalisation and rotary arithmetic, and any inefficiency.
A ratio of measured to predicted speed near 0.5 is a well-tuned implementation; what falls far below has something to
gain.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape
from vidistill.interop.families import family
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.ops.attention import use_backend
from vidistill.schedules import ScheduleConfig, evaluations
from vidistill.teachers.wan import PAIRS

TEXT_TOKENS = 512
TEMPORAL = 4  # pixel frames of a latent frame
STEADY_CHUNKS = 16  # long enough that memory is full and the schedule repeats


@dataclass(frozen=True)
class GPU:
    """Dense bf16 peak and memory bandwidth, as the vendor states them."""

    tflops: float
    gb_per_s: float


GPUS = {
    "H100": GPU(989, 3350),
    "H200": GPU(989, 4800),
    "B200": GPU(2250, 8000),
    "A100": GPU(312, 2039),
    "RTX 4090": GPU(165, 1008),
    "RTX 5090": GPU(210, 1792),
}
WAN = DiTConfig(width=1536, layers=30, heads=12, ffn=8960, text_dim=4096)
NETWORKS: dict[str, DiTConfig] = {
    "wan-1.3b": WAN,
    "wan-14b": replace(WAN, width=5120, layers=40, heads=40, ffn=13824),
    "wan-5b": replace(WAN, channels=48, width=3072, layers=30, heads=24, ffn=14336),
    "wan-14b-i2v": replace(WAN, width=5120, layers=40, heads=40, ffn=13824, extra_channels=20, image_dim=1280),
    "wan-a14b-i2v": replace(WAN, width=5120, layers=40, heads=40, ffn=13824, extra_channels=20),
}
FOLDERS = {  # what published folders and hub ids are called -> network
    "wan2.1-t2v-1.3b": "wan-1.3b",
    "wan2.1-t2v-14b": "wan-14b",
    "wan2.1-i2v-14b": "wan-14b-i2v",
    "wan2.2-ti2v-5b": "wan-5b",
    "wan2.2-t2v-a14b": "wan-14b",
    "wan2.2-i2v-a14b": "wan-a14b-i2v",
}
SIZES = {"wan-5b": (44, 80)}  # latent height and width where it is not 480x832 at 8 pixels a latent
DEFAULT_SIZE = (60, 104)


@dataclass(frozen=True)
class Published:
    """A speed that a paper reports: frames per second in steady state, and the latency of a chunk or first frame."""

    system: str
    network: str
    family: str
    gpu: str
    fps: float
    latency_s: float
    source: str
    gpus: int = 1
    size: tuple[int, int] = DEFAULT_SIZE


PUBLISHED = (
    Published("Self Forcing", "wan-1.3b", "self-forcing", "H100", 17.0, 0.69, "2506.08009"),
    Published("Diagonal Distillation", "wan-1.3b", "diagonal", "H100", 31.0, 0.37, "2603.09488"),
    Published("LongLive 1.0", "wan-1.3b", "longlive", "H100", 20.7, 0.0, "2509.22622"),
    Published("CausVid", "wan-1.3b", "causvid", "H100", 9.4, 1.3, "2412.07772"),
    Published("LiveTalk", "wan-1.3b", "livetalk", "H100", 24.82, 0.33, "2512.23576", size=(64, 64)),
    Published("Krea realtime", "wan-14b", "self-forcing", "B200", 11.0, 1.0, "Krea blog"),
)


def network_called(source: str) -> str | None:
    """The network of NETWORKS that a published folder or hub id holds, by its name."""
    return next((network for name, network in FOLDERS.items() if name in source.lower()), None)


def experts_called(source: str) -> int:
    """How many experts a published folder or hub id holds, by its name; 1 for one of them."""
    return 2 if "a14b" in source.lower() and Path(source).name not in chain(*PAIRS) else 1


def parameters(cfg: DiTConfig) -> int:
    """Number of parameters, counted on the meta device; blocks that are alike are counted once."""
    if cfg.layers > 2 and not any(site.layers for site in cfg.sites.values()):
        one, two = (parameters(replace(cfg, layers=n)) for n in (1, 2))
        return one + (cfg.layers - 1) * (two - one)
    with torch.device("meta"):
        net = VideoDiT(cfg)
    return sum(p.numel() for p in net.parameters())


def blank_condition(dit: DiTConfig, x: Tensor, text: int = TEXT_TOKENS) -> Condition:
    """Everything that a network of this architecture is told beside latents `x` [B, F, C, H, W], all zero."""
    b, f, _, height, width = x.shape
    image = dit.image_tokens if dit.image_dim else 0
    return Condition(
        x.new_zeros(b, text + image, max(dit.text_dim, dit.image_dim)) if dit.text_dim else None,
        {name: x.new_zeros(b, f, site.dim) for name, site in dit.sites.items()},
        x.new_zeros(b, f, dit.extra_channels, height, width) if dit.extra_channels else None,
    )


def pass_flops(
    dit: DiTConfig,
    shape: LatentShape,
    frames: int,
    seen: float,
    *,
    text: int = TEXT_TOKENS,
    prompt: bool = True,
    output: bool = True,
) -> dict[str, float]:
    """FLOPs (a multiply-add is two) by part of one forward of `frames` latent frames, whose tokens see `seen` tokens.

    Counted by torch as the network runs on the meta device: matrix products alone, no element-wise work. Without
    `prompt` the keys and values of the `text` tokens are there already; without `output` (a context pass) the last
    block ends with its own.
    """

    def count(layers: int) -> dict[str, int]:
        return counted_flops(replace(dit, layers=layers, checkpoint=False), shape, frames, text, prompt, output)

    if any(site.layers for site in dit.sites.values()):
        parts = count(dit.layers)
    else:  # layers are alike: two say what all of them cost
        one, two = count(1), count(2)
        parts = {part: one[part] + (dit.layers - 1) * (two[part] - one[part]) for part in one}
    return {**parts, "self_attention": parts["self_attention"] * seen / (frames * shape.tokens_per_frame)}


def counted_flops(
    dit: DiTConfig, shape: LatentShape, frames: int, text: int, prompt: bool, output: bool
) -> dict[str, int]:
    """As `pass_flops`, every layer run, tokens seeing each other alone."""
    with torch.no_grad(), torch.device("meta"), use_backend("reference"):
        net, x = VideoDiT(dit), torch.zeros(1, frames, shape.channels, shape.height, shape.width)
        with FlopCounterMode(display=False) as counter:
            net(x, torch.zeros(1, frames), blank_condition(dit, x, text), output=output)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(pattern: str) -> int:
        return sum(count for name, count in counts.items() if re.search(pattern, name))

    cross = of(r"\.cross_attn$") - of(r"\.cross_attn\.[qo]$")
    read = of(r"\.cross_attn\.[kv]"), of(r"\.(text_embedding|img_emb)$")
    parts = {
        "projections": of(r"_attn\.\w+$") - (0 if prompt else read[0]),
        "ffn": of(r"\.ffn$"),
        "self_attention": counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0) - cross,
        "cross_attention": cross,
    }
    return {**parts, "ends": counts["Global"] - sum(parts.values()) - (0 if prompt else sum(read))}


def policies(memory: MemoryConfig) -> dict[str, MemoryConfig]:
    """The memory in question, and every policy in the size that a published system runs it in.

    Full: Self Forcing's clip; sinks: LongLive; anchors (identity sinks): LiveTalk; compressed: RELIC's 20 seconds.
    """
    compressed = MemoryConfig("compressed", frames=9, history=72)
    return {
        "this": memory,
        "full, 21 frames": MemoryConfig("full", frames=21),
        "window 12, sinks 3": MemoryConfig("window", frames=12, sinks=3),
        "window 15, anchors 9": MemoryConfig("window", frames=15, sinks=9),
        "compressed, 9 + 72": compressed,
        "compressed, 8 bit": replace(compressed, entries="int8"),
        "endless, 9 + 72": replace(compressed, policy="endless"),
    }


def roofline_s(flops: float, moved_bytes: float, gpu: GPU, gpus: int = 1) -> float:
    """Seconds that arithmetic or memory traffic alone would take, whichever is more."""
    return max(flops / (gpu.tflops * 1e12), moved_bytes / (gpu.gb_per_s * 1e9)) / gpus


def cost(
    cfg: DiTConfig,
    shape: LatentShape,
    memory: MemoryConfig,
    schedule: ScheduleConfig,
    *,
    chunk: int = 3,
    itemsize: int = 2,
    gpus: Mapping[str, GPU] = GPUS,
) -> dict[str, Any]:
    """Everything `vidistill info` prints about a student of true size; plain numbers, ready for JSON."""
    n, count, context = shape.tokens_per_frame, parameters(cfg), memory.tokens(shape.grid)
    parts = pass_flops(cfg, shape, chunk, context)
    flops = sum(parts.values())
    kv = {
        name: m.bytes(
            layers=cfg.layers, width=cfg.width, tokens_per_frame=n, itemsize=itemsize, grid=shape.grid, heads=cfg.heads
        )
        for name, m in policies(memory).items()
    }
    moved = count * itemsize + 2.0 * context * cfg.layers * cfg.width * itemsize
    nfe = evaluations(schedule, STEADY_CHUNKS)
    first = flops - parts["self_attention"] * (1 - chunk * n / context)  # it sees itself alone
    unseen = schedule.context != "last_step"
    rows = {}
    for name, gpu in gpus.items():
        per_pass = roofline_s(flops, moved, gpu)
        rows[name] = {
            "pass_ms": 1000 * per_pass,
            "fps": TEMPORAL * chunk / (nfe[-1] * per_pass),
            "first_chunk_ms": 1000 * (nfe[0] - unseen) * roofline_s(first, count * itemsize, gpu),
        }
    return {
        "parameters": count,
        "weight_bytes": count * itemsize,
        "tokens_per_frame": n,
        "flops_per_pass": flops,
        "flops_by_part": parts,
        "flops_per_chunk": nfe[-1] * flops,
        "nfe_per_chunk": nfe[:7],
        "kv_bytes": kv,
        "gpus": rows,
        "left_out": (__doc__ or "").split("\n\n")[1].replace("\n", " ").strip(),
    }


def named_cost(network: str, student: str = "self-forcing") -> dict[str, Any]:
    """`cost` of a named network run as a published student family; raises ValueError with the known names."""
    if network not in NETWORKS:
        raise ValueError(f"no network is called {network!r}; known: {', '.join(NETWORKS)}")
    cfg, kind = NETWORKS[network], family(student)
    height, width = SIZES.get(network, DEFAULT_SIZE)
    shape = LatentShape(21, cfg.channels, height, width, patch=cfg.patch)
    return {
        "network": network,
        "student": student,
        "dit": asdict(cfg),
        **cost(cfg, shape, kind.memory(), kind.schedule(), chunk=kind.chunk),
    }


def against_papers() -> list[dict[str, Any]]:
    """Predicted beside published speed of every system we know, with measured / predicted; latency 0: not published."""
    rows = []
    for paper in PUBLISHED:
        cfg, kind = NETWORKS[paper.network], family(paper.family)
        shape = LatentShape(21, cfg.channels, *paper.size, patch=cfg.patch)
        found = cost(cfg, shape, kind.memory(), kind.schedule(), chunk=kind.chunk, gpus={paper.gpu: GPUS[paper.gpu]})
        predicted = found["gpus"][paper.gpu]["fps"] * paper.gpus
        latency = found["gpus"][paper.gpu]["first_chunk_ms"] / 1000 / paper.gpus
        rows.append(
            {
                "system": paper.system,
                "gpu": f"{paper.gpus} x {paper.gpu}" if paper.gpus > 1 else paper.gpu,
                "predicted_fps": predicted,
                "published_fps": paper.fps,
                "ratio": paper.fps / predicted,
                "predicted_latency_s": latency,
                "published_latency_s": paper.latency_s,
                "latency_ratio": paper.latency_s / latency,
                "source": paper.source,
            }
        )
    return rows


def report(row: Mapping[str, Any]) -> Iterator[str]:
    """Lines about what a network costs at its true size, and the speeds of papers beside the prediction."""
    yield (
        f"{row['network']}: {row['parameters'] / 1e9:.2f} B parameters, {row['tokens_per_frame']} tokens a latent frame"
    )
    yield f"a pass {row['flops_per_pass'] / 1e12:.2f} TFLOP, a chunk {row['flops_per_chunk'] / 1e12:.2f} TFLOP"
    for name, size in row["kv_bytes"].items():
        yield f"memory {name:20s} {size / 1e9:7.2f} GB"
    for name, found in row["gpus"].items():
        gpu = f"{GPUS[name].tflops:.0f} TFLOP/s, {GPUS[name].gb_per_s:.0f} GB/s"
        yield f"{name:10s} {found['fps']:7.1f} frames/s at most, first chunk {found['first_chunk_ms']:6.0f} ms ({gpu})"
    yield row["left_out"]
    yield "published speeds, measured / predicted:"
    for paper in against_papers():
        said = f"{paper['published_fps']:6.1f} of {paper['predicted_fps']:6.1f} ({paper['ratio']:.2f})"
        latency = f", first chunk {paper['published_latency_s']:.2f} s of {paper['predicted_latency_s']:.3f} s"
        latency = f"{latency} ({paper['latency_ratio']:.1f})" if paper["published_latency_s"] else ""
        yield f"  {paper['system']:28s} {paper['gpu']:12s} {said}{latency}"
