"""A small network that tells whether a talking face is still the one of a picture, and how far its lids are shut.

It is a `Probe` whose stack is that picture and three frames in a row. It learns from drawn people of the training
split, never from those that are judged: whole faces, faces of somebody else (half of them alike but for one thing),
blends of two, and faces of which a piece around the eyes has run. All of them also as a codec shows them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill.codecs import Codec
from vidistill.evaluation.probes import Probe, ProbeConfig, fit_probe, save_probe
from vidistill.progress import Bar, track
from vidistill.worlds.talker import face
from vidistill.worlds.talker.recorder import MANNERS, TalkerConfig, is_held_out, pose_of

CFG = ProbeConfig(64, 2, (24, 32, 48, 64), 32, heads={"same": 2, "lids": 1})
FRAMES = 25  # of a drawn person
EYES = ((18, 34), (16, 48))  # rows and columns, of 64, around which a face runs
RUN = (6, 12)  # px of a piece that runs
SEEN = 0.02  # mean change of a piece that can be seen
KINDS = ("same", "same", "same", "other", "run", "run")  # of a sample; one in six "other" is a blend


@dataclass(frozen=True)
class Faces:
    """Drawn people: frames uint8 [N, T, 3, H, W], as they are and as a codec shows them, and lids [N, T]."""

    frames: Tensor
    coded: Tensor
    lids: Tensor


def drawn_faces(count: int, codec: Codec, first: int = 0) -> Faces:
    """`count` people of the training split, each second one like the one before but for one thing."""
    cfg, frames, lids = TalkerConfig(num_frames=FRAMES), [], []
    look: dict[str, str] = {}
    for k in track(range(first, first + count), "faces", count, "person"):
        rng = np.random.default_rng([k, 11])
        look = changed(look, rng) if k % 2 else person(rng)
        steps = rng.normal(size=(FRAMES + 8, 2)).cumsum(0)
        mouth = np.abs(np.sin(np.stack([np.convolve(x, np.ones(3) / 3, "same") for x in steps.T], 1)))[:FRAMES]
        pose = pose_of(cfg, k, list(MANNERS)[rng.integers(len(MANNERS))], mouth.astype(np.float32))
        shut = np.clip(pose.lids + (rng.random(FRAMES) < 0.15), 0, 1).astype(np.float32)  # blinks are rare
        pose = face.Pose(pose.head, pose.tilt, shut, pose.mouth)
        frames.append(face.draw(look, list(face.MOODS)[rng.integers(len(face.MOODS))], pose, k - k % 2, 64))
        lids.append(shut)
    px = torch.from_numpy(np.stack(frames)).movedim(-1, 2)
    with torch.inference_mode():
        coded = [
            codec.decode(codec.encode(part.float() / 255)) for part in track(px.split(16), "as coded", unit="batch")
        ]
    return Faces(px, (torch.cat(coded) * 255).round().byte(), torch.from_numpy(np.stack(lids)))


def person(rng: np.random.Generator) -> dict[str, str]:
    """Somebody of the training split."""
    while True:
        look = {name: words[rng.integers(len(words))] for name, words in face.IDENTITY.items()}
        if not is_held_out(look):
            return look


def changed(look: Mapping[str, str], rng: np.random.Generator) -> dict[str, str]:
    """Somebody of the training split like another but for one thing."""
    while True:
        name = list(face.IDENTITY)[rng.integers(len(face.IDENTITY))]
        other = {**look, name: face.IDENTITY[name][rng.integers(len(face.IDENTITY[name]))]}
        if other != look and not is_held_out(other):
            return other


def samples(faces: Faces, batch: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Stacks [B, 4, 3, H, W] of a picture and three frames, whether they show the same whole face, and the lids."""
    own = rng.integers(0, len(faces.frames), batch)
    at = rng.integers(1, FRAMES - 1, batch)
    kinds = rng.integers(0, len(KINDS), batch)
    stacks, same = [], []
    for k, t, kind in zip(own, at, kinds, strict=True):
        source = faces.coded if rng.random() < 0.7 else faces.frames
        picture, shown = faces.frames[k, :1].float() / 255, source[k, t - 1 : t + 2].float() / 255
        whole = True
        if KINDS[kind] == "other":
            other = (
                k ^ 1 if rng.random() < 0.5 else (k + 2 + rng.integers(0, len(faces.frames) - 3)) % len(faces.frames)
            )
            another = source[other % len(source), t - 1 : t + 2].float() / 255
            shown, whole = torch.lerp(shown, another, 0.5 if rng.random() < 0.2 else 1.0), False
        elif KINDS[kind] == "run":
            shown, whole = run_together(shown, rng)
        stacks.append(torch.cat((picture, shown)))
        same.append(int(whole))
    return torch.stack(stacks), {"same": torch.tensor(same), "lids": faces.lids[own, at]}


def run_together(px: Tensor, rng: np.random.Generator) -> tuple[Tensor, bool]:
    """Frames [T, 3, H, W] of which a piece around the eyes has run, and whether they are as before to the eye."""
    side = [int(n) for n in rng.integers(RUN[0], RUN[1] + 1, 2)]
    top, left = (int(rng.integers(low, high - n)) for (low, high), n in zip(EYES, side, strict=True))
    piece = px[..., top : top + side[0], left : left + side[1]]
    soft = F.interpolate(F.adaptive_avg_pool2d(piece, (1 + int(rng.integers(2)), 1)), tuple(side), mode="bilinear")
    mixed = torch.lerp(piece, soft, 0.6 + 0.4 * float(rng.random()))
    out = px.clone()
    out[..., top : top + side[0], left : left + side[1]] = mixed
    return out, float((mixed - piece).abs().mean()) < SEEN


def train_verifier(faces: Faces, seed: int = 0, steps: int = 1200, batch: int = 64, lr: float = 2e-3) -> Probe:
    """The network, from drawn people; deterministic by its seed."""
    draw, weights = partial(samples, faces, batch, np.random.default_rng(seed)), {"same": torch.ones(2)}
    with Bar(steps, "verifier", "step") as bar:
        return fit_probe(CFG, draw, weights, lambda losses: bar.update(), steps=steps, seed=seed, lr=lr)


@torch.no_grad()
def judged(probe: Probe, faces: Faces, seed: int = 1, count: int = 1024) -> dict[str, float]:
    """How often the network is right about people it has not seen, and its mean error of lids."""
    px, own = samples(faces, count, np.random.default_rng(seed))
    answers = [probe(part)[1] for part in px.split(64)]
    found, lids = torch.cat([a["same"] for a in answers]).argmax(-1), torch.cat([a["lids"] for a in answers])[:, 0]
    right = found == own["same"]
    shares = {name: float(right[own["same"] == k].double().mean()) for k, name in enumerate(("strange", "same"))}
    return {**shares, "lids_error": float((lids - own["lids"]).abs().mean())}


def make_verifier(out: str | Path, codec: Codec, people: int = 384, **how: Any) -> dict[str, float]:
    """Train the network, measure it on other people, save it as `out` with its card; returns the figures."""
    probe = train_verifier(drawn_faces(people, codec), **how)
    figures = judged(probe, drawn_faces(128, codec, first=500_000))
    save_probe(out, probe, {"people": people, **how, "other_people": figures})
    return figures


@torch.no_grad()
def look_at(probe: Probe, px: Tensor, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of clips [B, T, 3, H, W]: how likely each frame but the first and last shows who `picture` [B, 3, H, W] shows,
    lids (0 open, 1 shut), both [B, T - 2], and features [B, T - 2, D]."""
    size = (probe.cfg.size,) * 2

    def fit(x: Tensor) -> Tensor:
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True)

    same, lids, features = [], [], []
    for clip, first in zip(px, picture, strict=True):
        shown, known = fit(clip), fit(first[None])
        frames = torch.stack((known.expand(len(shown) - 2, -1, -1, -1), shown[:-2], shown[1:-1], shown[2:]), 1)
        found = [probe(part) for part in frames.split(64)]
        features.append(torch.cat([f for f, _ in found]))
        same.append(torch.cat([a["same"].softmax(-1)[:, 1] for _, a in found]))
        lids.append(torch.cat([a["lids"][:, 0] for _, a in found]))
    return torch.stack(same), torch.stack(lids), torch.stack(features)


def blinks(lids: Tensor, shut: float = 0.5) -> Tensor:
    """How often lids [..., T] close."""
    closed = lids > shut
    return (closed[..., 1:] & ~closed[..., :-1]).sum(-1)
