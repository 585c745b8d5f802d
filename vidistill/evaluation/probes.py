"""A small network trained on real video of a world that reads back what a clip shows: actions and walls, or shapes."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidistill import checkpoint
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.data.shards import read_meta
from vidistill.data.types import IGNORED
from vidistill.io import write_json
from vidistill.metrics import balanced_accuracy
from vidistill.ops.precision import autocast
from vidistill.progress import Bar
from vidistill.worlds import WORLDS
from vidistill.worlds.doom.labels import TURNS, WALKS
from vidistill.worlds.shapes import ATTRIBUTES
from vidistill.worlds.spec import WorldSpec

BEFORE, AFTER = 2, 1  # frames of a stack before and after the one its labels belong to
STACK = BEFORE + 1 + AFTER
Labelled = tuple[Tensor, dict[str, Tensor]]  # stacks of frames, and what is right about each
Progress = Callable[[dict[str, Tensor]], object]  # called with the losses of a step
PLACES = ("told", "same")
DAMAGES = ("blur", "saturation", "contrast", "noise")
BUNDLED = WORLDS["doom"].probe  # in the zoo, but no network that `checkpoint.load` rebuilds


@dataclass(frozen=True)
class ProbeConfig:
    """Size of the probe; `features` is the width of the layer that all its answers are read from.

    `heads`: what it answers, and in how many classes (1: a number); empty: what there is to read in Doom.
    `places`: whether the features are `told` where in the picture something is seen, or are the `same` everywhere.
    """

    size: int = 64
    unshuffle: int = 2
    widths: tuple[int, ...] = (32, 48, 96, 128)
    features: int = 64
    textures: int = 33
    heads: Mapping[str, int] = field(default_factory=dict)
    places: str = "told"

    def __post_init__(self) -> None:
        if self.places not in PLACES:
            raise ValueError(f"probe.places {self.places!r} is unknown; choose one of {', '.join(PLACES)}")

    @property
    def answers(self) -> dict[str, int]:
        """Outputs of every head but `damage`, by name."""
        doom = {"turn": len(TURNS), "walk": len(WALKS), "texture": self.textures, "distance": 1}
        return dict(self.heads) or doom

    @property
    def classes(self) -> dict[str, int]:
        """Number of classes of the heads that choose one."""
        return {name: num for name, num in self.answers.items() if num > 1}


class Probe(nn.Module):
    """Stacks of 4 frames [N, 4, 3, H, W] -> features [N, D]; linear heads read the labels of the third frame from them.

    The features must serve every head, and one head estimates how a clip was damaged (blur, colour, contrast, noise):
    so they are about content, motion and picture quality. They are standardised by their deviation on real video.
    """

    def __init__(self, cfg: ProbeConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths = (STACK * 3 * cfg.unshuffle**2, *cfg.widths)
        layers: list[nn.Module] = [nn.PixelUnshuffle(cfg.unshuffle)]
        for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            conv = nn.Conv2d(width_in, width_out, 3, stride=1 if i == 0 else 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width_out), nn.SiLU()]
        side = cfg.size // cfg.unshuffle // 2 ** (len(cfg.widths) - 1)
        places = side**2 if cfg.places == "told" else 1
        pool = [] if cfg.places == "told" else [nn.AdaptiveMaxPool2d(1)]
        self.trunk = nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(widths[-1] * places, cfg.features))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(cfg.features, num) for name, num in {**cfg.answers, "damage": len(DAMAGES)}.items()}
        )
        self.register_buffer("mean", torch.zeros(cfg.features))
        self.register_buffer("std", torch.ones(cfg.features))

    def raw(self, stacks: Tensor) -> Tensor:
        """Features before they are standardised."""
        return self.trunk((stacks - 0.5).flatten(1, 2).contiguous(memory_format=torch.channels_last)).float()

    def answers(self, raw: Tensor) -> dict[str, Tensor]:
        """Class scores, numbers (Doom: log(1 + `distance`)), and `damage` in units of its largest value."""
        hidden = F.silu(raw)
        return {name: head(hidden) for name, head in self.heads.items()}

    def forward(self, stacks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raw = self.raw(stacks)
        return (raw - self.mean) / self.std, self.answers(raw)


@dataclass(frozen=True)
class Reading:
    """What a probe saw at frames `times` [n]: features [B, n, D], and class indices [B, n] by the name of the head."""

    features: Tensor
    labels: Mapping[str, Tensor]
    times: Tensor


def stack_frames(px: Tensor, times: Tensor) -> Tensor:
    """Stacks [B, n, 4, 3, H, W] of clips px [B, T, 3, H, W] around frames `times`."""
    index = times[:, None] + torch.arange(-BEFORE, AFTER + 1)
    return px[:, index]


SHAPES_PROBE = ProbeConfig(32, 1, (24, 48, 64), 48, places="same", heads={n: len(w) for n, w in ATTRIBUTES.items()})


@torch.no_grad()
def read(probe: Probe, px: Tensor, stride: int = 1, batch: int = 256) -> Reading:
    """The probe's reading of clips px [B, T, 3, H, W] at every `stride`-th frame that has neighbours enough."""
    if px.shape[1] < STACK or px.shape[-1] != probe.cfg.size or px.shape[-2] != probe.cfg.size:
        size = probe.cfg.size
        raise ValueError(f"px is {tuple(px.shape)}; the probe reads clips of at least {STACK} frames of {size}x{size}")
    times = torch.arange(BEFORE, px.shape[1] - AFTER, stride)
    few = max(1, batch // len(times))
    parts = [probe(stack_frames(part, times).flatten(0, 1)) for part in px.split(few)]
    shape = (px.shape[0], len(times))
    labels = {name: torch.cat([a[name].argmax(-1) for _, a in parts]).view(shape) for name in probe.cfg.classes}
    return Reading(torch.cat([f for f, _ in parts]).view(*shape, -1), labels, times)


def labels_of(clips: Clips) -> dict[str, Tensor]:
    """Labels [N, T] of every recorded frame, as the world of the clips has them."""
    labels = world_of(clips).labels
    assert labels is not None, "a world without labels has no probe"
    return labels(clips)


def world_of(clips: Clips) -> WorldSpec:
    return WORLDS[clips.meta.get("source", "doom")]


def draw(
    clips: Clips, labels: dict[str, Tensor], batch: int, rng: np.random.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random stacks [B, 4, 3, H, W] and their labels; half of them mirrored."""
    frames = clips.tensors["frames"]
    episode = torch.from_numpy(rng.integers(0, frames.shape[0], batch))
    time = torch.from_numpy(rng.integers(BEFORE, frames.shape[1] - AFTER, batch))
    index = time[:, None] + torch.arange(-BEFORE, AFTER + 1)
    px = frames[episode[:, None], index].permute(0, 1, 4, 2, 3).float() / 255
    own = {name: values[episode, time] for name, values in labels.items()}
    mirror = torch.from_numpy(rng.random(batch) < 0.5)
    px = torch.where(mirror[:, None, None, None, None], px.flip(-1), px)
    for name, classes in world_of(clips).mirrored.items():
        own[name] = torch.where(mirror, torch.tensor(classes)[own[name]], own[name])
    return px, own


def damage(px: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stacks [B, 4, 3, H, W] of which the first half is blurred, recoloured and made noisy at random, and by how much.

    Amounts [B, 4]: blur and noise 0 to 1, saturation and contrast -1 to 1; 0 where nothing was done.
    """
    half = px.shape[0] // 2
    amount = torch.rand(half, 4, generator=rng)
    amount[:, 1:3] = 2 * amount[:, 1:3] - 1
    amount *= torch.rand(half, 4, generator=rng) < 0.5
    blur, colour, contrast, noise = (a.view(half, 1, 1, 1, 1) for a in amount.unbind(1))
    hurt = px[:half]
    small = F.interpolate(hurt.flatten(0, 1), scale_factor=0.4, mode="bilinear", antialias=True)
    soft = F.interpolate(small, size=px.shape[-2:], mode="bilinear").view_as(hurt)
    hurt = torch.lerp(hurt, soft, blur)
    grey = hurt.mean(2, keepdim=True)
    hurt = grey + (hurt - grey) * (1 + 0.4 * colour)
    level = hurt.mean((1, 2, 3, 4), keepdim=True)
    hurt = level + (hurt - level) * (1 + 0.3 * contrast)
    hurt = hurt + 0.06 * noise * torch.randn(hurt.shape, generator=rng)
    return torch.cat((hurt.clamp(0, 1), px[half:])), F.pad(amount, (0, 0, 0, px.shape[0] - half))


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights that make every class count equally."""
    counts = torch.bincount(labels[labels >= 0].flatten(), minlength=classes).double()
    return (counts.sum() / classes / counts.clamp_min(1)).float()


def fit_probe(
    cfg: ProbeConfig,
    draw: Callable[[], Labelled],
    weights: Mapping[str, Tensor],
    progress: Progress,
    *,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    plain: Callable[[], Labelled] | None = None,
) -> Probe:
    """A probe trained on the stacks [B, 4, 3, H, W] and labels that `draw()` gives, half of them damaged.

    weights: of the classes of every head that has classes. Features are standardised on stacks of `plain()`, else of
    `draw()`. `progress(losses)` is called after every step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = Probe(cfg).train().to(memory_format=torch.channels_last)
    optim = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.02)
    plan = torch.optim.lr_scheduler.OneCycleLR(optim, lr, total_steps=steps, pct_start=0.1)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        px, own = draw()
        px, own["damage"] = damage(px, rng)
        with autocast("auto"):
            raw = probe.raw(px)
        losses = probe_losses(probe.answers(raw), own, weights)
        optim.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optim.step()
        plan.step()
        progress({name: loss.detach() for name, loss in losses.items()})
    standardise(probe.eval(), ((plain or draw)()[0] for _ in range(40)))
    return probe.requires_grad_(False)


def train_probes(
    frames: str | Path,
    *,
    seed: int = 0,
    steps: int = 1500,
    batch: int = 64,
    lr: float = 2e-3,
    cfg: ProbeConfig = ProbeConfig(),
    progress: Progress = lambda losses: None,
) -> Probe:
    """A probe trained on a folder of recorded frames; `progress(losses)` is called after every step."""
    clips = Clips(frames)
    labels = labels_of(clips)
    weights = {
        name: class_weights(labels[name], num) if name in world_of(clips).balanced else torch.ones(num)
        for name, num in cfg.classes.items()
    }
    draws = partial(draw, clips, labels, batch, np.random.default_rng(seed))
    return fit_probe(cfg, draws, weights, progress, steps=steps, seed=seed, lr=lr)


def probe_losses(
    answers: Mapping[str, Tensor], own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One loss for each head."""
    losses = {name: F.cross_entropy(answers[name], own[name], weights[name], ignore_index=IGNORED) for name in weights}
    for name in own.keys() - weights.keys() - {"damage"}:
        losses[name] = F.smooth_l1_loss(answers[name][:, 0], own[name])
    losses["damage"] = F.mse_loss(answers["damage"], own["damage"])
    return losses


@torch.no_grad()
def standardise(probe: Probe, batches: Iterator[Tensor]) -> None:
    """Set the mean and deviation of the features on real stacks, in place."""
    raw = torch.cat([probe.raw(px) for px in batches])
    probe.mean.copy_(raw.mean(0))
    probe.std.copy_(raw.std(0).clamp_min(1e-4))


@torch.no_grad()
def probe_figures(probe: Probe, frames: str | Path, stride: int = 4, near: float = 6.0) -> dict[str, float]:
    """Accuracy of every head on real frames; Doom: balanced for turn and walk, texture also of walls within `near`."""
    clips = Clips(frames)
    labels = labels_of(clips)
    parts = []
    for episode in clips.tensors["frames"].split(8):
        parts.append(read(probe, episode.permute(0, 1, 4, 2, 3).float() / 255, stride))
    got = {name: torch.cat([p.labels[name] for p in parts]) for name in probe.cfg.classes}
    own = {name: values[:, parts[0].times] for name, values in labels.items()}
    if "turn" not in got:
        return {name: float((got[name] == own[name]).double().mean()) for name in got}
    right = (got["texture"] == own["texture"]).double()
    close = own["distance"] < np.log1p(near)
    figures = {
        "turn": balanced_accuracy(got["turn"], own["turn"], len(TURNS)),
        "walk": balanced_accuracy(got["walk"], own["walk"], len(WALKS)),
        "texture": float(right.mean()),
        "texture_chance": 1 / probe.cfg.textures,
    }
    return figures | ({"texture_near": float(right[close].mean())} if bool(close.any()) else {})


def save_probe(path: str | Path, probe: Probe, card: dict[str, Any]) -> None:
    """Write PATH.safetensors (half precision) and PATH.json."""
    path = Path(path)
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in probe.state_dict().items()}
    record = {"format": checkpoint.FORMAT, "kind": "probe", "config": asdict(probe.cfg), "card": card}
    checkpoint.save_tensors(path.with_suffix(".safetensors"), tensors, record)
    write_json(path.with_suffix(".json"), record)


def make_probe(
    frames: str | Path,
    held_out: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    steps: int = 1500,
    batch: int = 64,
    cfg: ProbeConfig = ProbeConfig(),
) -> dict[str, float]:
    """Train a probe on `frames`, measure it on `held_out`, save it as `out` with its card; returns the figures."""
    with Bar(steps, unit="step") as bar:

        def progress(losses: dict[str, Tensor]) -> None:
            bar.update()
            bar.note(", ".join(f"{name}={float(loss):.3f}" for name, loss in losses.items()))

        probe = train_probes(frames, seed=seed, steps=steps, batch=batch, cfg=cfg, progress=progress)
    figures = probe_figures(probe, held_out)
    trained, judged = (read_meta(folder) for folder in (frames, held_out))
    card = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "train_seeds": [trained["described"][k]["seed"] for k in (0, -1)],
        "held_out_seeds": [judged["described"][k]["seed"] for k in (0, -1)],
        "held_out": figures,
    }
    save_probe(out, probe, card)
    return figures


def load_probe(path: str | Path | None = None, bundled: str = BUNDLED) -> Probe:
    """The bundled probe of a world, or the one at `path`."""
    path = checkpoint.zoo_folder() / bundled if path is None else Path(path)
    tensors, record = checkpoint.read_tensors(path.with_suffix(".safetensors"))
    if record.get("kind") != "probe":
        raise checkpoint.CheckpointError(f"{path} holds a {record.get('kind')}, a probe is needed here")
    probe = Probe(build(ProbeConfig, record["config"]))
    probe.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()})
    return probe.eval().requires_grad_(False)
