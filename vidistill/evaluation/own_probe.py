"""A small network that is trained on a world's own clips, in minutes, to give features that distances are taken of.

Where there are actions it reads them back (inverse dynamics, Agrawal et al. 1606.07419). Where there are none it tells
whether a stack of frames is played forwards, backwards or twice as fast (Benaim et al. 2004.06130). In both cases it
also tells which training episode a stack is of, as a class of its own (Dosovitskiy et al. 1406.6909), and how it was
damaged: so its features are about motion, about what is shown, and about how well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import checkpoint
from vidistill.codecs import Codec
from vidistill.data.clips import Clips
from vidistill.data.types import count_episodes
from vidistill.evaluation.footage import Footage
from vidistill.evaluation.probes import (
    BEFORE,
    STACK,
    Probe,
    ProbeConfig,
    Progress,
    class_weights,
    fit_probe,
    load_probe,
    save_probe,
)

SCENE, PACE = "scene", "pace"
PACES = ("forwards", "backwards", "twice as fast")
SIDE = 64  # px that clips are resized to, whatever their shape


@dataclass(frozen=True)
class OwnProbeConfig:
    """How the network is trained; `episodes` of training are used at most."""

    steps: int = 800
    batch: int = 48
    lr: float = 2e-3
    seed: int = 0
    episodes: int = 256
    size: int = SIDE
    widths: tuple[int, ...] = (32, 48, 96, 128)
    features: int = 64


@dataclass(frozen=True)
class ActionClasses:
    """Numbers of actions as classes: each action lies between `edges`; one that never changes has none.

    An edge is half of what is usual where anything is done, on both sides of nothing where an action has two.
    """

    edges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    columns: Sequence[int] = ()

    @classmethod
    def of(cls, names: Sequence[str], actions: Tensor) -> "ActionClasses":
        """Classes for actions [N, A] as they were recorded."""
        edges: dict[str, list[float]] = {}
        columns = []
        for i, name in enumerate(names):
            own = actions[:, i]
            pushed = own[own != 0].abs()
            if len(pushed) and bool((own != own[0]).any()):
                half = float(pushed.median()) / 2
                edges[name] = [-half, half] if bool((own < 0).any()) else [half]
                columns.append(i)
        return cls(edges, columns)

    @property
    def heads(self) -> dict[str, int]:
        """Number of classes by the name of a head, which an action may not spell as it likes."""
        return {f"action_{i}": len(edges) + 1 for i, edges in enumerate(self.edges.values())}

    def __call__(self, actions: Tensor) -> Tensor:
        """Classes [..., heads] of actions [..., A]."""
        own = [torch.bucketize(actions[..., i].contiguous(), torch.tensor(list(e))) for i, e in self.pairs]
        return torch.stack(own, -1) if own else torch.zeros(*actions.shape[:-1], 0, dtype=torch.long)

    @property
    def pairs(self) -> list[tuple[int, Sequence[float]]]:
        return list(zip(self.columns, self.edges.values(), strict=True))


@dataclass(frozen=True)
class OwnProbe:
    """The network, what its actions mean, and where it is kept."""

    probe: Probe
    classes: ActionClasses
    path: Path


def own_probe(footage: Footage, codec: Codec, cfg: OwnProbeConfig, progress: Progress) -> OwnProbe:
    """The network of the world that footage shows, trained on its training clips unless it is kept beside them.

    The name it is kept under holds a hash of those clips and of `cfg`; `progress(losses)` after every step.
    """
    training = footage.training
    path = training.parent / f"probe-{fingerprint(training, cfg)}"
    if not path.with_suffix(".json").is_file():
        source = Footage(training, "train")
        episodes = range(min(len(source.clips), cfg.episodes))
        clips = [shrunk(source.episode(k, codec), cfg.size) for k in episodes]
        actions = actions_of(source, codec, episodes)
        names = source.meta.get("actions") or []
        classes = ActionClasses.of(names, torch.cat(actions)) if actions else ActionClasses()
        probe = train(clips, [classes(x) for x in actions], classes, cfg, progress)
        save_probe(path, probe, {"edges": dict(classes.edges), "columns": list(classes.columns), **asdict(cfg)})
    card = checkpoint.read_tensors(path.with_suffix(".safetensors"))[1]["card"]
    return OwnProbe(load_probe(path), ActionClasses(card["edges"], card["columns"]), path)


def actions_of(source: Footage, codec: Codec, episodes: Sequence[int]) -> list[Tensor]:
    """Actions [T, A] of episodes, a row a px frame; empty where there are none."""
    if not source.clips.width_of("actions"):
        return []
    whole = source.clips.lengths("actions")
    if source.of_frames:
        return [source.clips.episode("actions", k).float() for k in episodes]
    return [source.actions((k, 0), whole[k], codec.temporal_factor) for k in episodes]


def fingerprint(folder: Path, cfg: OwnProbeConfig) -> str:
    """A hash of the clips in a folder, as far as they are used, and of settings."""
    made = hashlib.sha256(json.dumps(asdict(cfg), sort_keys=True).encode())
    clips = Clips(folder, episodes=cfg.episodes)
    made.update(json.dumps({k: v for k, v in clips.meta.items() if k != "described"}, sort_keys=True).encode())
    for part in clips.parts:
        for name, x in sorted(part.items()):
            made.update(f"{name}{tuple(x.shape)}{count_episodes(part)}".encode())
            made.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return made.hexdigest()[:16]


def shrunk(frames: Tensor, side: int) -> Tensor:
    """Frames uint8 [T, H, W, 3] as uint8 [T, 3, side, side]."""
    parts = [fit(part.permute(0, 3, 1, 2).float() / 255, side) for part in frames.split(256)]
    return (torch.cat(parts) * 255).round().byte()


def fit(px: Tensor, side: int) -> Tensor:
    """Pictures [N, 3, H, W] as they are, or resized to a square of `side`."""
    if px.shape[-2:] == (side, side):
        return px
    return F.interpolate(px, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    clips: Sequence[Tensor],
    actions: Sequence[Tensor],
    classes: ActionClasses,
    cfg: OwnProbeConfig,
    progress: Progress,
) -> Probe:
    """A network trained on clips uint8 [T, 3, H, W] and the classes of their actions [T, heads]; by its seed alone."""
    heads = {**(classes.heads or {PACE: len(PACES)}), SCENE: max(2, len(clips))}
    joined = torch.cat(list(actions)) if actions else None
    weights = {
        name: class_weights(joined[:, i], num) if joined is not None and name in classes.heads else torch.ones(num)
        for i, (name, num) in enumerate(heads.items())
    }
    sizes = ProbeConfig(cfg.size, 2, cfg.widths, cfg.features, heads=heads)
    draws = np.random.default_rng(cfg.seed)
    draw = partial(stacks, clips, actions, list(classes.heads), cfg.batch, draws)
    plain = partial(stacks, clips, (), (), cfg.batch, draws, paces=1)
    return fit_probe(sizes, draw, weights, progress, steps=cfg.steps, seed=cfg.seed, lr=cfg.lr, plain=plain)


def stacks(
    clips: Sequence[Tensor],
    actions: Sequence[Tensor],
    names: Sequence[str],
    batch: int,
    rng: np.random.Generator,
    paces: int = len(PACES),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Random stacks [B, 4, 3, H, W] and their labels: scene, and actions, or else how fast they are played."""
    long = [k for k, clip in enumerate(clips) if len(clip) >= 2 * STACK]
    scene = rng.choice(long, batch)
    pace = np.zeros(batch, np.int64) if names else rng.integers(0, paces, batch)
    reach = np.where(pace == PACES.index("twice as fast"), 2, 1)
    first = np.array([rng.integers(0, len(clips[k]) - r * (STACK - 1)) for k, r in zip(scene, reach, strict=True)])
    times = first[:, None] + reach[:, None] * np.arange(STACK)
    times = np.where((pace == PACES.index("backwards"))[:, None], times[:, ::-1], times)
    px = torch.stack([clips[k][torch.from_numpy(t)] for k, t in zip(scene, times, strict=True)]).float() / 255
    own = {SCENE: torch.from_numpy(scene.astype(np.int64))}
    if not names:
        return px, {PACE: torch.from_numpy(pace), **own}
    led = torch.stack([actions[k][t[BEFORE]] for k, t in zip(scene, times, strict=True)])
    return px, {**{name: led[:, i] for i, name in enumerate(names)}, **own}
