"""Does a student that hears move its lips to the sound, and stay who it is? Judged beside teacher and real video."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.audio import AudioConfig, clip_features, from_pcm16
from vidistill.conditioning.condition import Condition, pack_audio, reference_channels
from vidistill.conditioning.script import Cue
from vidistill.config import build
from vidistill.data.types import Talk
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import Batch, Data, Tally, picture_ratios
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.report import Metric, Sheet, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import streamed
from vidistill.evaluation.suite import Judgement, Suite, clip_size
from vidistill.io import to_float
from vidistill.memory.policies import MemoryConfig
from vidistill.progress import track
from vidistill.worlds import WORLDS

BLACK = 0.06  # brightness below which a frame is black
FROZEN, FROZEN_RUN = 0.05, 4  # of the motion of real video, for at least so many frames in a row
# Rooms of a split: the first of validation watch trainings (data/talker-heldout), then clips, then long streams.
CLIP_ROOMS, LONG_ROOMS = 100, 500


@dataclass(frozen=True)
class LipSyncConfig(SuiteConfig):
    """`clips` held-out people and sentences as long as the student was trained on, and `streams` of `long_seconds`,
    whose first and last `window` seconds are compared. `guidance` None: the teacher's own for text and for audio."""

    clips: int = 64
    batch: int = 16
    streams: int = 4
    long_seconds: float = 120.0
    precision: str = "fp32"
    window: float = 5.0
    workers: int = 2

    @property
    def span(self) -> float:
        return self.window


def people(bundle: Bundle, rooms: Rooms, size: int, frames: int, offset: int, count: int, cfg: Any) -> list[Talk]:
    """People of rooms, talking for `frames` px frames."""
    audio = build(AudioConfig, bundle.record.get("audio") or {})
    how = rooms.world.config(size=size, num_frames=frames, audio=audio)
    clips = rooms.world.record(how, rooms.seeds(offset, count), cfg.workers)
    return list(track(clips, "real clips", total=count, unit="clip"))


def talk_condition(clips: Sequence[Talk], bundle: Bundle, codec: Codec, given: Tensor | None) -> Condition:
    """What a network is told of clips: caption, audio, the picture they begin with."""
    audio, net, px_frames = build(AudioConfig, bundle.record["audio"]), bundle.net, len(clips[0].frames)
    heard = torch.from_numpy(np.stack([clip_features(from_pcm16(c.pcm), px_frames, audio) for c in clips]))
    encode, dit = checkpoint.text_encoder(bundle.record), net.cfg if bundle.kind == "teacher" else net.net.cfg
    tokens = encode([c.caption for c in clips]) if encode is not None and dit.text_dim else None
    packed = pack_audio(heard, codec.temporal_factor)
    channels = reference_channels(given, 0, packed.shape[1]) if dit.extra_channels and given is not None else None
    return Condition(tokens, {"hidden": packed}, channels)


def talks(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: LipSyncConfig) -> Data:
    """Held-out people who say held-out sentences, as long as the clips a checkpoint was trained on."""
    frames, size = clip_size(bundle, codec, rooms.world)
    clips = people(bundle, rooms, size, codec.px_frames(frames), CLIP_ROOMS, cfg.clips, cfg)
    batches = []
    for i in range(0, len(clips), cfg.batch):
        few = clips[i : i + cfg.batch]
        px = torch.stack([to_float(c.frames) for c in few])
        facts = {"mouth": torch.stack([torch.from_numpy(c.mouth[:, 0]) for c in few])}
        batches.append(Batch(px, partial(talk_condition, few), derived_seed(cfg.seed, i), facts=facts))
    return Data(batches, rooms.world.config().fps)


# --- figures ----------------------------------------------------------------------------------------------------------


def reader(name: str, px: Tensor) -> Tensor:
    """What a reader of the world of talkers finds [B, T, ...] in clips [B, T, 3, H, W]."""
    found = (WORLDS["talker"].readers[name](clip.permute(0, 2, 3, 1).numpy()) for clip in px)
    return torch.stack([torch.from_numpy(x) for x in found])


def frozen(motion: Tensor, real_motion: float) -> float:
    """Share of steps [B, T] in passages that stand still, where real video never does."""
    still = motion < FROZEN * real_motion
    runs = still.unfold(1, FROZEN_RUN, 1).all(-1) if still.shape[1] >= FROZEN_RUN else still[:, :0]
    inside = torch.zeros_like(still)
    for k in range(FROZEN_RUN):
        inside[:, k : k + runs.shape[1]] |= runs
    return float(inside.double().mean())


def identity(looks: Tensor, fps: float, window: float, others: float) -> list[float]:
    """How much a stream, looks [T, D], is in each `window` seconds like its first picture: 1 the same person, 0 as
    different as two people are on average (`others`)."""
    n = max(1, round(window * fps))
    parts = [looks[i : i + n].mean(0) for i in range(0, len(looks) - n + 1, n)]
    return [1 - float((part - looks[0]).norm()) / others for part in parts]


def apart(looks: Tensor) -> float:
    """Mean distance of the looks [B, T, D] of different people."""
    means, count = looks.mean(1), len(looks)
    return float(torch.cdist(means[None], means[None]).sum() / max(1, count * (count - 1))) or 1.0


def identity_drift(streams: Sequence[Tensor], fps: float, window: float, others: float) -> tuple[float, list[float]]:
    """How much less alike the last window is than the first, as a share of the first, and the mean curve; nan where the
    first window is no more alike than two people are."""
    curves = [identity(looks, fps, window, others) for looks in streams]
    curve = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    return (curve[0] - curve[-1]) / curve[0] if curve[0] > 0 else math.nan, curve


def clip_drift(row: Tally, real: Tally) -> float:
    """`identity_drift` over clips, whose halves are the windows."""
    looks, fps = row["looks"], row.data.fps
    return identity_drift(
        list(looks), fps, min(LipSyncConfig().window, looks.shape[1] / fps / 2), apart(real["looks"])
    )[0]


MOUTH = {"mouth": lambda v: reader("mouth", v.px[:, 1:])[..., 0]}  # that of the given picture does not count
TRUTH = {"truth": lambda v: v.batch.facts["mouth"][:, 1:]}
METRICS = {
    "sync_corr": Metric(
        "correlation of the mouth with the true one, at the best shift",
        lambda row, _: metrics.sync(row["mouth"], row["truth"])[0],
        MOUTH | TRUTH,
        best="high",
    ),
    "sync_offset_frames": Metric("that shift", lambda row, _: metrics.sync(row["mouth"], row["truth"])[1]),
    "identity_drift": Metric(
        "how much less the end looks like the first picture than the beginning, of long streams where there are any",
        clip_drift,
        {"looks": lambda v: reader("looks", v.px)},
        glance=False,
        best="low",
    ),
    "black_frames": Metric(
        "share of black frames",
        lambda row, _: float((row["light"] < BLACK).double().mean()),
        {"light": lambda v: metrics.luma(v.px).mean((-2, -1))},
        best="low",
    ),
    "frozen_frames": Metric(
        "share of frames in passages that stand still",
        lambda row, real: frozen(row["motion"], float(real["motion"].mean())),
        {"motion": lambda v: metrics.motion(v.px)},
        best="low",
    ),
    **picture_ratios(),
    "mouth_motion_ratio": Metric(
        "motion of the mouth, against real",
        lambda row, real: metrics.pace(row["mouth"], real["mouth"]),
        best="one",
    ),
}


def targets(result: Mapping[str, Any]) -> list[Target]:
    student, teacher, real = (result.get(row) for row in ("student", "teacher", "real"))
    if not teacher or not real:
        return []
    sync = "sync_corr"
    out = [Target("teacher's sync beside the reader's on real video", teacher[sync], 0.8 * real[sync])]
    if student:
        drift = student["identity_drift"]
        out += [
            Target("student's sync beside the teacher's", student[sync], 0.95 * teacher[sync]),
            Target("student's mouth motion beside real", student["mouth_motion_ratio"], 0.8),
            Target("likeness kept over a long stream", 0.0 if drift is None else 1 - drift, 0.95),
        ]
    return out


def long_identity(judged: Judgement) -> None:
    """Identity of long streams, with anchors and with a window alone, and of real video as long."""
    judged.result["names"] = {row: bundle.name for row, bundle in judged.bundles.items()}
    cfg, student, fps = judged.cfg, judged.bundles.get("student"), judged.data.fps
    if student is None or not cfg.long_seconds:
        return
    length, own = round(cfg.long_seconds * fps), student.net.cfg.memory
    size = clip_size(student, judged.codec, judged.rooms.world)[1]
    clips = people(student, judged.rooms, size, length, LONG_ROOMS, cfg.streams, cfg)
    memories = {"student": None, "window": MemoryConfig("window", own.frames, 0, own.phase)}
    made: dict[str, list[Tensor]] = {"student": [], "window": [], "real": [to_float(c.frames) for c in clips]}
    for k, clip in enumerate(track(clips, "long streams", unit="stream")):
        sound, cues = from_pcm16(clip.pcm), [Cue(0.0, clip.caption)]
        for row, memory in memories.items():
            px = streamed(student, judged.codec, length, cfg.seed + k, cues, clip.frames[0], sound, memory)
            made[row].append(px)
    others, result = apart(judged.tallies["real"][0]["looks"]), judged.result
    looks = {row: [reader("looks", px[None])[0] for px in streams] for row, streams in made.items()}
    found = {row: identity_drift(x, fps, cfg.window, others) for row, x in looks.items()}
    result["streams"] = {row: {"drift": drift, "curve": curve} for row, (drift, curve) in found.items()}
    for row in ("student", "real"):
        result[row]["identity_drift"] = found[row][0]
    shown = {row: torch.stack(streams[:2]) for row, streams in made.items()}
    pictures = {row: (px.movedim(2, -1) * 255).round().byte().numpy() for row, px in shown.items()}
    judged.pictures.sheets.append(Sheet.beside("streams", pictures, "Long streams.", "stream", length / 12))


SUITE = Suite("lip_sync", LipSyncConfig, talks, METRICS, targets, long_identity)
