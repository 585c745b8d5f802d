"""A student of any shape, with random weights or given ones, for the bench: no checkpoint, no codec."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vidistill.bench.bench import bench
from vidistill.bench.config import BenchConfig
from vidistill.bench.result import BenchResult, Progress
from vidistill.checkpoint import Bundle, rebuild
from vidistill.config import build, settings
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.streaming.runtime import SpeedConfig


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
    growth_run: float = 1.0
    noise: str = ""

    def __post_init__(self) -> None:
        for f in fields(self):
            lowest = 0 if f.name in ("seed", "threads", "sinks", "history") else 1
            if f.type is int and getattr(self, f.name) < lowest:
                raise ValueError(f"{f.name} must be at least {lowest}, got {getattr(self, f.name)}")
        if not self.growth_run >= 0:
            raise ValueError(f"growth_run must not be negative, got {self.growth_run}")
        sizes("latent", self.latent, "CHANNELSxHEIGHTxWIDTH")
        if self.text:
            sizes("text", self.text, "TOKENSxWIDTH")

    @classmethod
    def parse(cls, items: Sequence[str]) -> "RandomConfig":
        """From `key=value` words of a command line."""
        values = {key: "" if value is None else value for key, value in settings(items).items()}
        return build(cls, values, "random_weights.")

    def drawn(self) -> dict[str, Tensor]:
        """Random numbers of a stream: text, and what the file `noise` holds; ValueError unless it fits this shape."""
        found: dict[str, Tensor] = {}
        if self.text:
            rng = torch.Generator().manual_seed(self.seed)
            found["text"] = torch.randn(sizes("text", self.text, "TOKENSxWIDTH"), generator=rng)
        return found | self.recorded() if self.noise else found

    def recorded(self) -> dict[str, Tensor]:
        """What the file `noise` holds."""
        try:
            found = load_file(self.noise)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"noise {self.noise!r} is no whole safetensors file ({error})") from error
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
        raise ValueError(f"{name} must be {form}, got {text!r}")
    return tuple(map(int, parts))


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
    The rest is as in `bench`.
    """
    cfg = cfg if isinstance(cfg, RandomConfig) else RandomConfig.parse(cfg)
    bundle = bundle or cfg.bundle()
    if vs is None and speed and speed != speed.baseline:
        vs = bundle
    common = {
        name: getattr(cfg, name) for name in ("rounds", "chunks", "seed", "threads", "growth_chunks", "growth_run")
    }
    how = BenchConfig(gate_chunks=1, batch=batch, **common)
    found = bench(
        bundle, how, vs=vs, speed=speed, drawn=cfg.drawn(), growth=growth, profiled=profiled, progress=progress
    )
    return replace(found, env={**found.env, "random_weights": asdict(cfg)})
