"""What a network of true size costs, without its weights: parameters, FLOPs, memory, and a roofline on named GPUs.

Speeds are those of a stream whose memory is full; a first chunk has none yet, and its context pass comes after it is
seen. Left out: text encoder, codec, host, kernel launches, normalisation and rotary arithmetic, and any inefficiency.
A ratio of measured to predicted speed near 0.5 is a well-tuned implementation; what falls far below has something to
gain.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vidistill.diffusion import LatentShape
from vidistill.interop.families import family
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.schedules import ScheduleConfig, evaluations

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
}
FOLDERS = {  # what published folders and hub ids are called -> network
    "wan2.1-t2v-1.3b": "wan-1.3b",
    "wan2.1-t2v-14b": "wan-14b",
    "wan2.1-i2v-14b": "wan-14b-i2v",
    "wan2.2-ti2v-5b": "wan-5b",
    "wan2.2-t2v-a14b": "wan-14b",
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


def parameters(cfg: DiTConfig) -> int:
    """Number of parameters, counted on the meta device."""
    with torch.device("meta"):
        net = VideoDiT(cfg)
    return sum(p.numel() for p in net.parameters())


def pass_flops(cfg: DiTConfig, tokens: int, context: int, text: int = TEXT_TOKENS) -> dict[str, float]:
    """FLOPs of one forward over `tokens` new tokens that attend to `context` tokens (themselves included).

    A multiply and an add are two. `text` keys and values are counted in every pass.
    """
    d, layers = cfg.width, cfg.layers
    text = (text + (cfg.image_tokens if cfg.image_dim else 0)) if cfg.text_dim else 0
    cross = tokens * 4 * d * d + text * 4 * d * d if text else 0
    parts = {
        "projections": layers * (tokens * 8 * d * d + cross),
        "ffn": layers * tokens * 4 * d * cfg.ffn,
        "self_attention": layers * 4.0 * tokens * context * d,
        "cross_attention": layers * 4.0 * tokens * text * d,
        "ends": 2.0
        * tokens
        * d
        * (cfg.patch_dim + (cfg.patch_dim // cfg.channels) * (cfg.channels + cfg.extra_channels)),
    }
    return parts


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
    n, count = shape.tokens_per_frame, parameters(cfg)
    tokens, context = chunk * n, memory.tokens(shape.grid)
    parts = pass_flops(cfg, tokens, context)
    flops = sum(parts.values())
    kv = {
        name: m.bytes(
            layers=cfg.layers, width=cfg.width, tokens_per_frame=n, itemsize=itemsize, grid=shape.grid, heads=cfg.heads
        )
        for name, m in policies(memory).items()
    }
    moved = count * itemsize + 2.0 * context * cfg.layers * cfg.width * itemsize
    nfe = evaluations(schedule, STEADY_CHUNKS)
    first, unseen = sum(pass_flops(cfg, tokens, tokens).values()), schedule.context != "last_step"
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
