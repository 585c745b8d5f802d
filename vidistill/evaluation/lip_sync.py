"""Does a student that hears move its lips to the sound, and stay who it is? Judged beside teacher and real video."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
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
from vidistill.evaluation import quality
from vidistill.evaluation.clips import Batch, Data, Tally, View, codec_row, picture_ratios, repeat_row
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.intervals import certain
from vidistill.evaluation.probes import Probe, load_probe
from vidistill.evaluation.report import Metric, Sheet, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import streamed
from vidistill.evaluation.suite import Judgement, Suite, beside_student, clip_size, source_of
from vidistill.evaluation.verifier import blinks, look_at
from vidistill.io import to_float, to_uint8
from vidistill.memory.policies import MemoryConfig
from vidistill.progress import track
from vidistill.worlds import WORLDS

log = logging.getLogger("vidistill")

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
    streams: int = 8
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
        facts["episodes"] = i + torch.arange(len(few))
        batches.append(Batch(px, partial(talk_condition, few), derived_seed(cfg.seed, i), facts=facts))
    return Data(batches, rooms.world.config().fps)


# --- figures ----------------------------------------------------------------------------------------------------------


def reader(name: str, px: Tensor) -> Tensor:
    """What a reader of the world of talkers finds [B, T, ...] in clips [B, T, 3, H, W]."""
    found = (WORLDS["talker"].readers[name](clip.permute(0, 2, 3, 1).numpy()) for clip in px)
    return torch.stack([torch.from_numpy(x) for x in found])


@functools.cache
def verifier() -> Probe:
    """The bundled network that knows faces."""
    return load_probe(None, WORLDS["talker"].probe)


FACE = ("same", "lids", "features")


def seen(view: View) -> dict[str, Tensor]:
    """What the verifier sees of every frame, beside the picture that the real clip begins with."""
    return dict(zip(FACE, look_at(verifier(), view.px, view.batch.px[:, 0]), strict=True))


def frozen(motion: Tensor, real_motion: float) -> float:
    """Share of steps [B, T] in passages that stand still, where real video never does."""
    still = motion < FROZEN * real_motion
    runs = still.unfold(1, FROZEN_RUN, 1).all(-1) if still.shape[1] >= FROZEN_RUN else still[:, :0]
    inside = torch.zeros_like(still)
    for k in range(FROZEN_RUN):
        inside[:, k : k + runs.shape[1]] |= runs
    return float(inside.double().mean())


def identity(same: Tensor, fps: float, window: float) -> list[float]:
    """Share of frames in each `window` seconds of a stream, likely `same` [T], that show who its picture shows."""
    n = max(1, round(window * fps))
    return [float((same[i : i + n] > 0.5).double().mean()) for i in range(0, len(same) - n + 1, n)]


def identity_drift(streams: Sequence[Tensor], fps: float, window: float) -> tuple[float, list[float]]:
    """How much less often the last window shows the person than the first, as a share of the first, and the mean curve;
    nan where the first never does."""
    curves = [identity(same, fps, window) for same in streams]
    curve = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    return (curve[0] - curve[-1]) / curve[0] if curve[0] > 0 else math.nan, curve


def stream_drift(same: Tensor, fps: float, window: float, at: Tensor) -> dict[str, float]:
    """`identity_drift` of the streams `at` of same [N, T]."""
    return {"identity_drift": identity_drift(list(same[at]), fps, window)[0]}


def clip_drift(row: Tally, real: Tally) -> float:
    """`identity_drift` over clips, whose halves are the windows."""
    same, fps = row["same"], row.data.fps
    return identity_drift(list(same), fps, min(LipSyncConfig().window, same.shape[1] / fps / 2))[0]


def blink_ratio(row: Tally, real: Tally) -> float:
    """How often eyes close, against real."""
    return metrics.ratio(*(float(blinks(own["lids"]).double().mean()) for own in (row, real)))


MOUTH = {"mouth": lambda v: reader("mouth", v.px[:, 1:])[..., 0]}  # that of the given picture does not count
TRUTH = {"truth": lambda v: v.batch.facts["mouth"][:, 1:]}
SEEN = {name: lambda v, name=name: v.kept("face", seen)[name] for name in FACE}
METRICS = {
    "sync_corr": Metric(
        "correlation of the mouth with the true one, at the best shift",
        lambda row, _: metrics.sync(row["mouth"], row["truth"])[0],
        MOUTH | TRUTH,
        best="high",
    ),
    "sync_offset_frames": Metric("that shift", lambda row, _: metrics.sync(row["mouth"], row["truth"])[1]),
    "identity_drift": Metric(
        "how much less often the end shows the person of the first picture, of long streams where there are any",
        clip_drift,
        SEEN,
        glance=False,
        best="low",
    ),
    "identity": Metric(
        "share of frames that show the person of the first picture, whole",
        lambda row, _: float((row["same"] > 0.5).double().mean()),
        SEEN,
        best="high",
    ),
    "blink_ratio": Metric("how often eyes close, against real", blink_ratio, SEEN, best="one"),
    "frechet_paired": replace(
        quality.METRICS["frechet_paired"],
        text="Frechet distance of the features of that network to real video of the same people",
        parts={**SEEN, "episodes": lambda v: v.batch.facts["episodes"]},
    ),
    "frechet_unpaired": replace(
        quality.METRICS["frechet_unpaired"], text="the same to real video of other people, half as many clips"
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
    result, pictures = judged.result, [px[0] for px in made["real"]]
    same = {
        row: [look_at(verifier(), px[None], first[None])[0][0] for px, first in zip(streams, pictures, strict=True)]
        for row, streams in made.items()
    }
    found = {row: identity_drift(x, fps, cfg.window) for row, x in same.items()}
    result["streams"] = {row: {"drift": drift, "curve": curve} for row, (drift, curve) in found.items()}
    for row in ("student", "real"):  # in place of that of clips, its interval and the differences in it
        told = torch.stack(same[row])
        result[row].pop("identity_drift_interval", None)
        rooms, drift = torch.arange(len(told)), partial(stream_drift, told, fps, cfg.window)
        result[row] |= certain(rooms, drift, cfg.draws)
    for difference in result.get("difference", {}).values():
        difference.pop("identity_drift", None)
    shown = {row: to_uint8(torch.stack(streams[:2])) for row, streams in made.items()}
    judged.pictures.sheets.append(Sheet.beside("streams", shown, "Long streams.", "stream", length / 12))


def beside_talker(student: Bundle, named: Mapping[str, str | None]) -> Mapping[str, Bundle]:
    """Its teacher, and another student: what it was trained from, unless one is named."""
    init = None if named.get("vs") else init_of(student)
    return {**beside_student(student, named), **({"vs": checkpoint.load(init, "student")} if init else {})}


def init_of(student: Bundle) -> str | None:
    """The talker a student was trained from, by its card; None where it was none, and a warning where a parent is not
    at hand."""
    own = student.folder / student.name
    for parent in student.record.get("card", {}).get("parents", []):
        names = [parent, Path(parent).name]
        here = [name for name in names if checkpoint.find_checkpoint(name) or name in checkpoint.zoo_names()]
        for path in map(checkpoint.locate, here):
            record = checkpoint.read_record(path)
            same = all(record.get(key) == student.record.get(key) for key in ("kind", "codec", "audio"))
            if same and source_of(record) == source_of(student.record) and path != own:
                return str(path)
        if not here:
            log.warning("%s was trained from %s, which is not here; name a student (--vs)", student.name, parent)
    return None


ROWS = {"codec": codec_row, "repeat": lambda codec: repeat_row}
SUITE = Suite("lip_sync", LipSyncConfig, talks, METRICS, targets, long_identity, ROWS, others=beside_talker)
