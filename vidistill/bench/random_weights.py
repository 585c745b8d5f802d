"""Times the passes of a student of any shape, with random weights or given ones: no checkpoint, no codec."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice

import numpy as np
import torch

from vidistill.bench.machine import environment, flops_per_pass, matmul_peak_gflops, peak_bytes, threads
from vidistill.bench.result import SPREAD, BenchResult, Progress
from vidistill.checkpoint import Bundle, rebuild
from vidistill.dit import DiTConfig
from vidistill.stream import Chunk, StreamConfig, StreamSession


@dataclass(frozen=True)
class RandomConfig:
    """Shape of a student and of what it makes: `text` is TOKENSxWIDTH (empty: none), `latent` CHANNELSxHEIGHTxWIDTH,
    `steps` denoising passes and one context pass a chunk, memory as long as `chunks` chunks of `chunk` frames.
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

    def __post_init__(self) -> None:
        for f in fields(self):
            lowest = 0 if f.name in ("seed", "threads") else 1
            if f.type is int and getattr(self, f.name) < lowest:
                raise ValueError(f"random weights: {f.name} must be at least {lowest}, got {getattr(self, f.name)}")
        sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        if self.text:
            sizes("text", self.text, "TOKENSxWIDTH")

    @classmethod
    def parse(cls, items: Sequence[str]) -> "RandomConfig":
        """From `key=value` words of a command line."""
        kinds = {f.name: f.type for f in fields(cls)}
        values: dict[str, int | str] = {}
        for item in items:
            key, mark, value = item.partition("=")
            if not mark or key not in kinds:
                raise ValueError(f"random weights: {item!r} is not KEY=VALUE with a key of {', '.join(kinds)}")
            if kinds[key] is str:
                values[key] = value
            elif value.lstrip("-").isdigit():
                values[key] = int(value)
            else:
                raise ValueError(f"random weights: {key} must be a whole number, got {value!r}")
        return cls(**values)  # type: ignore[arg-type]

    @property
    def text_tokens(self) -> int:
        return sizes("text", self.text, "TOKENSxWIDTH")[0] if self.text else 0

    def bundle(self) -> Bundle:
        """A student of this shape with random weights, not zero anywhere."""
        channels, height, width = sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        dit = DiTConfig(
            channels=channels,
            width=self.dim,
            layers=self.layers,
            heads=self.heads,
            ffn=self.ffn,
            text_dim=sizes("text", self.text, "TOKENSxWIDTH")[1] if self.text else 0,
        )
        frames = self.chunk * self.chunks
        record = {
            "kind": "student",
            "dit": asdict(dit),
            "student": {"chunk": self.chunk, "memory": {"policy": "window", "frames": frames}},
            "shape": {"frames": frames, "channels": channels, "height": height, "width": width},
            "schedule": {"levels": [1 - i / self.steps for i in range(self.steps)]},
            "world": {"fps": 16.0},
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = rebuild(record)
            for weight in net.parameters():
                if not weight.any():
                    torch.nn.init.normal_(weight, std=0.02)
        return Bundle("random weights", "student", net.eval().requires_grad_(False), record)


def sizes(name: str, text: str, form: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != len(form.split("x")) or not all(p.isdigit() and int(p) for p in parts):
        raise ValueError(f"random weights: {name} must be {form}, got {text!r}")
    return tuple(map(int, parts))


def random_bench(
    cfg: RandomConfig | Sequence[str] = (), bundle: Bundle | None = None, progress: Progress = lambda part, what: None
) -> BenchResult:
    """Times `rounds` rollouts of `chunks` chunks; `cfg` may be `key=value` words.

    `bundle` brings the weights of a student of that shape.
    """
    cfg = cfg if isinstance(cfg, RandomConfig) else RandomConfig.parse(cfg)
    bundle = bundle or cfg.bundle()
    with threads(cfg.threads):
        session = StreamSession(bundle, None, StreamConfig(cfg.seed, pipelined=False))
        if cfg.text:
            rng = torch.Generator().manual_seed(cfg.seed)
            session.set(tokens=torch.randn(cfg.text_tokens, bundle.net.net.cfg.text_dim, generator=rng))
        rounds = []
        for number in range(cfg.rounds + 1):  # one chunk more: the context pass of a chunk runs before the next one
            progress(number / (cfg.rounds + 1), f"round {number} of {cfg.rounds}" if number else "warming up")
            rounds.append(list(islice(session.chunks(), cfg.chunks + 1)))
        return result(cfg, bundle, session, rounds)


def result(cfg: RandomConfig, bundle: Bundle, session: StreamSession, rounds: list[list[Chunk]]) -> BenchResult:
    """The figures of all rounds but the first, which warmed up."""
    net = bundle.net
    denoise = np.array([[c.stats["denoise_ms"] for c in r[:-1]] for r in rounds])
    context = np.array([[c.stats["context_ms"] for c in r[1:]] for r in rounds])
    chunk_ms = (denoise + context)[1:]
    tokens = net.shape.tokens_per_frame * cfg.chunk
    needed = sum(
        cfg.steps * flops_per_pass(net.net.cfg, tokens, chunk * tokens, frames=cfg.chunk, text_tokens=cfg.text_tokens)
        for chunk in range(cfg.chunks)
    )
    gflops = matmul_peak_gflops(net.net.head.head.weight.device)
    seconds = statistics.median(denoise[1:].sum(1)) / 1000
    latents = cfg.chunk * cfg.chunks / (chunk_ms.sum(1) / 1000)
    p50, p95 = float(np.percentile(chunk_ms, 50)), float(np.percentile(chunk_ms, 95))
    by_chunk = np.median(chunk_ms, axis=0)
    return BenchResult(
        name=bundle.name,
        fps=None,
        real_time_factor=None,
        first_frame_ms=None,
        chunk_ms_p50=p50,
        chunk_ms_p95=p95,
        input_to_frame_ms_p95=None,
        nfe_per_chunk=session.nfe_per_chunk,
        latents_per_s=float(np.median(latents)),
        memory_bytes=session.memory_bytes,
        peak_bytes=peak_bytes(),
        parts_ms={"denoise": float(np.median(denoise[1:])), "context": float(np.median(context[1:]))},
        steady=p95 <= SPREAD * p50,
        matmul_peak_gflops=gflops,
        model_flops_utilisation=needed / seconds / 1e9 / gflops,
        warmup_ms=float(denoise[0].sum() + context[0].sum()),
        ranges={"latents_per_s": (float(latents.min()), float(latents.max()))},
        env=environment(net) | {"random_weights": asdict(cfg), "chunk_ms": by_chunk.tolist()},
    )
