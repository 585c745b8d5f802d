"""Times the passes of a student of any shape, with random weights or given ones: no checkpoint, no codec."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidistill.bench.growth import batch_row, growth_rows
from vidistill.bench.machine import environment, flops_per_pass, matmul_peak_gflops, peak_bytes, profile, threads
from vidistill.bench.result import SPREAD, BenchResult, Progress
from vidistill.checkpoint import Bundle, rebuild
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.streaming.drawn import Drawn
from vidistill.streaming.engine import Chunk
from vidistill.streaming.runtime import SpeedConfig, for_inference
from vidistill.streaming.session import StreamConfig, StreamSession

GROWTH_MINUTES = (1.0, 10.0, 60.0)


@dataclass(frozen=True)
class RandomConfig:
    """Shape of a student and of what it makes: `text` is TOKENSxWIDTH (empty: none), `latent` CHANNELSxHEIGHTxWIDTH,
    `steps` denoising passes and one context pass a chunk, memory as long as `chunks` chunks of `chunk` frames, of which
    `sinks` never leave; `history` frames behind it are remembered in compressed form, as `entries` (see MemoryConfig).
    `noise`: a safetensors file of numbers drawn elsewhere, `noise` [F, C, H, W] and maybe `fresh` [N, f, C, H, W], both
    as in `streaming.drawn.Drawn`, and `text` [L, D]. `growth_chunks` and `growth_run`: see BenchConfig.
    """

    dim: int = 384
    layers: int = 8
    heads: int = 6
    ffn: int = 1536
    text: str = "512x4096"
    latent: str = "16x16x28"
    chunk: int = 3
    chunks: int = 8
    steps: int = 4
    rounds: int = 5
    seed: int = 0
    threads: int = 0
    sinks: int = 0
    history: int = 0
    entries: str = "dense"
    growth_chunks: int = 50
    growth_run: float = GROWTH_MINUTES[0]
    noise: str = ""

    @property
    def growth_minutes(self) -> tuple[float, ...]:
        return GROWTH_MINUTES

    def __post_init__(self) -> None:
        for f in fields(self):
            lowest = 0 if f.name in ("seed", "threads", "sinks", "history") else 1
            if f.type is int and getattr(self, f.name) < lowest:
                raise ValueError(f"random weights: {f.name} must be at least {lowest}, got {getattr(self, f.name)}")
        if not self.growth_run >= 0:
            raise ValueError(f"random weights: growth_run must not be negative, got {self.growth_run}")
        sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        if self.text:
            sizes("text", self.text, "TOKENSxWIDTH")

    @classmethod
    def parse(cls, items: Sequence[str]) -> "RandomConfig":
        """From `key=value` words of a command line."""
        kinds = {f.name: f.type for f in fields(cls)}
        values: dict[str, Any] = {}
        for item in items:
            key, mark, value = item.partition("=")
            if not mark or key not in kinds:
                raise ValueError(f"random weights: {item!r} is not KEY=VALUE with a key of {', '.join(kinds)}")
            kind: Any = kinds[key]
            try:
                values[key] = kind(value)
            except ValueError as error:
                whole = "a whole number" if kind is int else "a number"
                raise ValueError(f"random weights: {key} must be {whole}, got {value!r}") from error
        return cls(**values)

    @property
    def text_tokens(self) -> int:
        return sizes("text", self.text, "TOKENSxWIDTH")[0] if self.text else 0

    def drawn(self) -> dict[str, Tensor]:
        """What the file `noise` holds; ValueError unless its tensors fit this shape."""
        if not self.noise:
            return {}
        try:
            found = load_file(self.noise)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"random weights: noise {self.noise!r} is no whole safetensors file ({error})") from error
        size = sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        wanted = {"noise": ("frames", *size), "fresh": ("draws", self.chunk, *size)}
        if self.text:
            wanted["text"] = ("tokens", sizes("text", self.text, "TOKENSxWIDTH")[1])
        for name, x in found.items():
            shape = wanted.get(name, ())
            if x.ndim != len(shape) or tuple(x.shape[1:]) != tuple(shape[1:]):
                raise ValueError(f"{self.noise}: {name} is {list(x.shape)}; it may hold {wanted}")
        if "noise" not in found:
            raise ValueError(f"{self.noise} has no `noise`; it may hold {wanted}")
        return {name: x.float() for name, x in found.items()}

    @property
    def memory(self) -> dict[str, Any]:
        policy = {"policy": "endless", "history": self.history, "entries": self.entries} if self.history else {}
        return {"policy": "window", "frames": self.chunk * self.chunks, "sinks": self.sinks, **policy}

    def bundle(self, net: VideoDiT | None = None) -> Bundle:
        """A student of this shape with random weights, not zero anywhere, or those of `net`, which must have it."""
        channels, height, width = sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        dit = DiTConfig(
            channels=channels,
            width=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            text_dim=sizes("text", self.text, "TOKENSxWIDTH")[1] if self.text else 0,
        )
        if net is not None:
            names = ("channels", "width", "layers", "heads", "ffn", "text_dim")
            for name in names:
                if getattr(dit, name) != getattr(net.cfg, name):
                    raise ValueError(
                        f"these weights have {name} {getattr(net.cfg, name)} and the shape says {getattr(dit, name)}: "
                        f"give the shape of the weights (dim={net.cfg.width} layers={net.cfg.layers} "
                        f"heads={net.cfg.heads} ffn={net.cfg.ffn} text=TOKENSx{net.cfg.text_dim})"
                    )
            dit = net.cfg
        record = {
            "kind": "student",
            "dit": asdict(dit),
            "student": {"chunk": self.chunk, "memory": self.memory},
            "shape": {"frames": self.chunk * self.chunks, "channels": channels, "height": height, "width": width},
            "schedule": {"levels": [1 - i / self.steps for i in range(self.steps)]},
            "world": {"fps": 16.0},
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            student = rebuild(record)
            for weight in student.parameters():
                if not weight.any():
                    torch.nn.init.normal_(weight, std=0.02)
        if net is not None:
            student.net.load_state_dict(net.state_dict())
        name = "random weights" if net is None else "given weights"
        return Bundle(name, "student", student.eval().requires_grad_(False), record)


def sizes(name: str, text: str, form: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != len(form.split("x")) or not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f"random weights: {name} must be {form}, got {text!r}")
    return tuple(map(int, parts))


class Timed:
    """A student of a random shape, computed as `speed` says, and what its chunks took, round by round."""

    def __init__(self, cfg: RandomConfig, bundle: Bundle, speed: SpeedConfig | None = None) -> None:
        self.cfg, self.speed = cfg, speed or SpeedConfig()
        self.bundle = for_inference(bundle, self.speed)
        self.device = self.bundle.net.net.device
        self.session = self.open()
        self.rounds: list[list[Chunk]] = []
        self.peak_bytes = 0  # after its first round

    def open(self) -> StreamSession:
        """A new stream of the drawn or recorded noise and text."""
        drawn, cfg = self.cfg.drawn(), self.cfg
        recorded = Drawn(drawn["noise"], drawn.get("fresh")) if drawn else None
        session = StreamSession(self.bundle, None, StreamConfig(cfg.seed, pipelined=False), drawn=recorded)
        if cfg.text:
            rng = torch.Generator().manual_seed(cfg.seed)
            tokens = torch.randn(cfg.text_tokens, self.bundle.net.net.cfg.text_dim, generator=rng)
            session.set(tokens=drawn.get("text", tokens))
        return session

    def round(self) -> None:
        """One chunk more than is timed: the context pass of a chunk runs before the next one."""
        self.rounds.append(list(islice(self.session.chunks(), self.cfg.chunks + 1)))
        self.peak_bytes = self.peak_bytes or peak_bytes(self.device)

    def part(self, name: str) -> np.ndarray:
        """Milliseconds [rounds, chunks], the first round, which warmed up, left out."""
        shift = 1 if name == "context" else 0
        rows = [r[shift : shift + self.cfg.chunks] for r in self.rounds[1:]]
        return np.array([[c.stats[f"{name}_ms"] for c in r] for r in rows])

    @property
    def chunk_ms(self) -> np.ndarray:
        return self.part("denoise") + self.part("context")

    @property
    def warmup_ms(self) -> float:
        return sum(c.stats["chunk_ms"] for c in self.rounds[0])

    @property
    def flops_per_s(self) -> float:
        """FLOPs that the denoising passes of a round need over their time, median of rounds."""
        net, cfg = self.bundle.net, self.cfg
        tokens = net.shape.tokens_per_frame * cfg.chunk
        needed = sum(
            cfg.steps
            * flops_per_pass(net.net.cfg, tokens, chunk * tokens, frames=cfg.chunk, text_tokens=cfg.text_tokens)
            for chunk in range(cfg.chunks)
        )
        return needed / statistics.median(self.part("denoise").sum(1)) * 1000

    def profile(self) -> dict[str, float]:
        """Kinds of operators of the chunk after the memory has become full."""
        chunks = self.session.chunks()
        for _ in range(self.cfg.chunks):
            next(chunks)
        return profile(lambda: next(chunks))

    def growth(self, progress: Progress) -> list[dict[str, Any]]:
        """Chunk times and bytes after some minutes of one stream, in turn with a young one."""
        with self.open() as young:
            fill = self.session.memory_config.chunks_to_fill(self.cfg.chunk)
            return growth_rows(self.session, young, fill, self.cfg, progress)


def random_bench(
    cfg: RandomConfig | Sequence[str] = (),
    bundle: Bundle | None = None,
    *,
    vs: Bundle | None = None,
    speed: SpeedConfig | None = None,
    growth: bool = False,
    batch: int = 1,
    profiled: bool = False,
    progress: Progress = lambda part, what: None,
) -> BenchResult:
    """Times `rounds` rollouts of `chunks` chunks; `cfg` may be `key=value` words.

    `bundle`: a student of that shape (default: random weights); `vs` is timed beside it, in alternating rounds.
    `speed`: how `bundle` is computed; where that is not plain it is timed beside itself, plain, unless `vs` is given.
    `growth`: also after 1, 10 and 60 minutes. `batch`: also so many streams in one pass. `profiled`: also one chunk's
    operators.
    """
    cfg = cfg if isinstance(cfg, RandomConfig) else RandomConfig.parse(cfg)
    with threads(cfg.threads):
        bundle = bundle or cfg.bundle()
        progress(0.0, "warming up")
        own = Timed(cfg, bundle, speed)
        own.round()
        baseline = bundle if vs is None and own.speed != own.speed.baseline else vs
        other = Timed(cfg, baseline, own.speed.baseline) if baseline else None
        if other:
            other.round()
        for number in range(1, cfg.rounds + 1):
            progress(number / (cfg.rounds + 1), f"round {number} of {cfg.rounds}")
            own.round()
            if other:
                other.round()
        rows = own.growth(progress) if growth else None
        streams = batch_row(own.bundle, 1, batch, cfg.rounds, 1, cfg.chunks - 1) if batch > 1 else None
        return result(own, other, rows, streams, own.profile() if profiled else None)


def result(
    own: Timed,
    other: Timed | None,
    growth: list[dict[str, Any]] | None,
    streams: dict[str, Any] | None,
    shares: dict[str, float] | None,
) -> BenchResult:
    """The figures of all rounds but the first, which warmed up."""
    cfg, net = own.cfg, own.bundle.net
    denoise, context, chunk_ms = own.part("denoise"), own.part("context"), own.chunk_ms
    gflops = matmul_peak_gflops(own.device)
    latents = cfg.chunk * cfg.chunks / (chunk_ms.sum(1) / 1000)
    p50, p95 = float(np.percentile(chunk_ms, 50)), float(np.percentile(chunk_ms, 95))
    by_chunk = np.median(chunk_ms, axis=0)
    return BenchResult(
        name=own.bundle.name,
        fps=None,
        real_time_factor=None,
        first_frame_ms=None,
        chunk_ms_p50=p50,
        chunk_ms_p95=p95,
        input_to_frame_ms_p95=None,
        nfe_per_chunk=own.session.nfe_per_chunk,
        latents_per_s=float(np.median(latents)),
        memory_bytes=own.session.memory_bytes,
        peak_bytes=own.peak_bytes,
        parts_ms={"denoise": float(np.median(denoise)), "context": float(np.median(context))},
        steady=p95 <= SPREAD * p50,
        matmul_peak_gflops=gflops,
        model_flops_utilisation=own.flops_per_s / 1e9 / gflops,
        warmup_ms=own.warmup_ms,
        ranges={"latents_per_s": (float(latents.min()), float(latents.max()))},
        env=environment(net)
        | {"random_weights": asdict(cfg), "speed": asdict(own.speed), "chunk_ms": by_chunk.tolist()},
        vs=compare(own, other, gflops) if other else None,
        profile=shares,
        growth=growth,
        batch=streams,
    )


def compare(own: Timed, other: Timed, gflops: float) -> dict[str, Any]:
    """How much faster than the other, round by round, and how far the first chunk's latents are from its."""
    ratios = other.chunk_ms.sum(1) / own.chunk_ms.sum(1)
    x, y = own.rounds[0][0].latents, other.rounds[0][0].latents
    return {
        "name": other.bundle.name,
        "speed": asdict(other.speed),
        "chunk_ratio": float(np.median(ratios)),
        "chunk_ratio_range": (float(ratios.min()), float(ratios.max())),
        "chunk_ms_p50": float(np.median(other.chunk_ms)),
        "model_flops_utilisation": other.flops_per_s / 1e9 / gflops,
        "latents_difference": float((x - y).norm() / y.norm()),
    }
