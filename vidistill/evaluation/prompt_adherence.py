"""Does a student that reads prompts show what it is told, before and after a switch? Judged beside its teacher."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition
from vidistill.conditioning.script import Cue
from vidistill.data.types import Captioned
from vidistill.diffusion import derived_seed
from vidistill.evaluation import quality
from vidistill.evaluation.clips import DRIFTS, Batch, Data, Tally, codec_row, picture_ratios, read_parts, teacher_row
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.intervals import certain
from vidistill.evaluation.probes import Reading, load_probe
from vidistill.evaluation.report import Metric, Sheet, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import StreamTally, streamed
from vidistill.evaluation.suite import Judgement, Suite, clip_size
from vidistill.io import to_float, to_uint8
from vidistill.progress import track
from vidistill.streaming.prompt_switch import SWITCHES
from vidistill.streaming.session import refused_switches
from vidistill.worlds.spec import WorldSpec

ASKED = ("colour", "shape", "motion")  # what a shape must show to be the one that was asked for
STEADY = 0.8  # share of the next second's readings that must be right
SECOND_SEEDS = 100_000  # rooms of the split whose captions streams are switched to


@dataclass(frozen=True)
class AdherenceConfig(SuiteConfig):
    """`clips` held-out captions; the first `switched` of them are streamed for `before` s, then switched to another for
    `after` s. `window`: seconds at the end of both parts that are judged."""

    switched: int = 64
    streams: int = 8
    before: float = 5.0
    after: float = 8.0
    window: float = 3.0
    stride: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window > min(self.before, self.after):
            raise ValueError(f"eval.window {self.window} must fit {self.before} s before and {self.after} s after")

    @property
    def span(self) -> float:
        return self.window


def scenes(rooms: Rooms, count: int, first: int = 0, **how: Any) -> list[Captioned]:
    """Clips of rooms, drawn as `how` says."""
    return list(rooms.world.record(rooms.world.config(**how), rooms.seeds(first, count)))


def asked_of(world: WorldSpec, clips: Sequence[Captioned], frames: int = 1) -> Tensor:
    """What every frame of captioned clips is asked to show, as classes [B, T, heads]."""
    rows = [[words.index(clip.labels[name]) for name, words in world.heads.items()] for clip in clips]
    return torch.tensor(rows)[:, None].expand(-1, frames, -1)


def caption_condition(clips: Sequence[Captioned], bundle: Bundle, codec: Codec, given: Tensor | None) -> Condition:
    """What a network is told of clips: their captions."""
    encode = checkpoint.text_encoder(bundle.record)
    assert encode is not None
    return Condition(encode([clip.caption for clip in clips]))


def scene_numbers(world: WorldSpec, clips: Sequence[Captioned]) -> Tensor:
    """A number for each combination of attributes [N]: clips of one are alike, and drawn together for an interval."""
    asked, number = asked_of(world, clips)[:, 0], torch.zeros(len(clips), dtype=torch.long)
    for i, words in enumerate(world.heads.values()):
        number = number * len(words) + asked[:, i]
    return number


def batch_of(world: WorldSpec, clips: Sequence[Captioned], seed: int) -> Batch:
    px, numbers = torch.stack([to_float(clip.frames) for clip in clips]), scene_numbers(world, clips)
    facts = {"asked": asked_of(world, clips, px.shape[1]), "episodes": halves(numbers)}
    return Batch(px, partial(caption_condition, clips), seed, False, rooms=numbers, facts=facts)


def halves(numbers: Tensor) -> Tensor:
    """0 or 1 for each number [N], about as often; the same number gets the same."""
    return (numbers * 2_654_435_761 >> 16) % 2


def captions(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: AdherenceConfig, first: int = 0) -> Data:
    """Held-out scenes, as long as the clips a checkpoint was trained on."""
    world, (frames, size) = rooms.world, clip_size(bundle, codec, rooms.world)
    clips = scenes(rooms, cfg.clips, first, size=size, num_frames=codec.px_frames(frames))
    seed = derived_seed(cfg.seed, first)
    batches = [batch_of(world, clips[i : i + cfg.batch], seed + i) for i in range(0, len(clips), cfg.batch)]
    heads = {name: len(words) for name, words in world.heads.items()}
    return Data(batches, world.config().fps, load_probe(cfg.probe, world.probe), heads, cfg.stride)


# --- figures ----------------------------------------------------------------------------------------------------------


def accuracy(right: Tensor, heads: Sequence[str]) -> dict[str, float]:
    """Share of readings that show what was told, by attribute, of right [B, n, heads]; `asked`: the mean of ASKED."""
    shares = {name: float(right[..., i].double().mean()) for i, name in enumerate(heads)}
    return {**shares, "asked": sum(shares[name] for name in ASKED) / len(ASKED)}


def right_of(reading: Reading, asked: Tensor, heads: Sequence[str]) -> Tensor:
    """Where a reading shows what is asked [B, 1, heads]: [B, n, heads]."""
    return torch.stack([reading.labels[name] for name in heads], -1) == asked


def time_to_adherence(
    right: Tensor, times: Tensor, heads: Sequence[str], switched: int, fps: float
) -> dict[str, float]:
    """Seconds from px frame `switched` until colour, shape and motion are right and stay so for a second.

    right [B, n, heads] at frames `times` [n]. `median_s` over the streams that get there, and the share that does
    (`reached`).
    """
    whole = right[..., [list(heads).index(name) for name in ASKED]].all(-1)
    span = max(1, round(fps / int(times[1] - times[0])))
    ahead = whole.double().unfold(1, span, 1).mean(-1) >= STEADY
    good = ahead & whole[:, : ahead.shape[1]] & (times[: ahead.shape[1]] >= switched)
    found = [float(times[int(row.nonzero()[0])] - switched) / fps for row in good if bool(row.any())]
    return {"median_s": statistics.median(found) if found else math.nan, "reached": len(found) / len(right)}


def confusion(read: Tensor, asked: Tensor, heads: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Share of readings [N, n, heads] that show each word: by attribute, word asked for, word read."""
    found: dict[str, Any] = {}
    for i, (name, words) in enumerate(heads.items()):
        own = [(word, read[..., i][asked[..., i] == k]) for k, word in enumerate(words)]
        found[name] = {
            word: {other: float((shown == k).double().mean()) for k, other in enumerate(words)}
            for word, shown in own
            if len(shown)
        }
    return found


METRICS = {
    "frechet_paired": replace(
        quality.METRICS["frechet_paired"],
        text="Frechet distance of probe features, against drawn clips of the same captions",
        parts=read_parts() | {"episodes": lambda v: v.batch.facts["episodes"]},
    ),
    "frechet_unpaired": replace(
        quality.METRICS["frechet_unpaired"], text="the same to drawn clips of other captions, half as many"
    ),
    **picture_ratios(),
    "before": Metric(
        "share of readings that show what was asked",
        lambda row, _: accuracy(row["read"] == row["asked"], list(row.data.heads)),
        best="high",
    ),
    "after": Metric("the same after a switch to another caption", best="high"),
    "time_to_adherence": Metric("from a switch until everything asked for is shown"),
    **DRIFTS,
}


def targets(result: Mapping[str, Any]) -> list[Target]:
    if not {"switch", "teacher"} <= result.keys():
        return []
    best = max(result["switch"].values(), key=lambda found: found["after"]["asked"])
    limits = {part: 0.9 * result["teacher"][part]["asked"] for part in ("before", "after")}
    return [Target(f"student shows what was asked {p} a switch", best[p]["asked"], low) for p, low in limits.items()]


# --- switches and long streams ----------------------------------------------------------------------------------------


def switches(judged: Judgement) -> None:
    """The teacher under the second captions, every switch policy of the student, and its drift over long streams."""
    cfg, data, rooms, codec = judged.cfg, judged.data, judged.rooms, judged.codec
    student, heads = judged.bundles.get("student"), list(data.heads)
    if student is None:
        return
    count, words = min(cfg.switched, cfg.clips), rooms.world.heads
    for row in ("real", "codec", "teacher", "student"):
        judged.result[row] |= confused(judged.tallies[row], words, cfg.draws)
    first, second = scenes(rooms, count), scenes(rooms, count, SECOND_SEEDS)
    made, later = teacher_row(judged.bundles["teacher"], codec, cfg), Tally(data)
    for batch in captions(student, codec, rooms, replace(cfg, clips=count), SECOND_SEEDS).batches:
        later.add(read_parts(), made(batch), batch)
    right = later["read"] == later["asked"]
    judged.result["teacher"] |= certain(later["rooms"], lambda at: {"after": accuracy(right[at], heads)}, cfg.draws)
    streams = {
        p: switched(student, codec, first, second, p, cfg) for p in SWITCHES if p not in refused_switches(student)
    }
    asked, scene = (asked_of(rooms.world, first), asked_of(rooms.world, second)), scene_numbers(rooms.world, second)
    judged.result["switch"] = {p: judge_switch(px, *asked, scene, data, cfg) for p, px in streams.items()}
    shown = {policy: to_uint8(px[:2]) for policy, px in streams.items()}
    judged.pictures.sheets.append(Sheet.beside("switches", shown, "Every switch policy.", "stream", data.fps / 2))
    if cfg.long_seconds:
        judged.add_streams(long_streams(student, codec, rooms, data, cfg))


def confused(runs: Sequence[Tally], words: Mapping[str, Sequence[str]], draws: int) -> dict[str, Any]:
    """The confusion of all runs of a row, with intervals over scenes."""
    shown, asked, scene = (torch.cat([tally[part] for tally in runs]) for part in ("read", "asked", "rooms"))
    return certain(scene, lambda at: {"confusion": confusion(shown[at], asked[at], words)}, draws)


def switched(
    student: Bundle, codec: Codec, first: Sequence[Captioned], second: Sequence[Captioned], policy: str, cfg: Any
) -> Tensor:
    """Streams [B, T, 3, H, W] that are told a caption, and `cfg.before` seconds later another one."""
    frames, out = round((cfg.before + cfg.after) * (student.spec.played.fps or 0)), []
    for k, (a, b) in enumerate(zip(track(first, f"switch: {policy}", unit="stream"), second, strict=True)):
        cues = [Cue(0.0, a.caption), Cue(cfg.before, b.caption, policy)]
        out.append(streamed(student, codec, frames, cfg.seed + k, cues))
    return torch.stack(out)


def judge_switch(
    px: Tensor, first: Tensor, second: Tensor, scene: Tensor, data: Data, cfg: AdherenceConfig
) -> dict[str, Any]:
    """Accuracy before and after the switch, and the time it takes, with intervals over scenes [B]; first, second
    [B, 1, heads] are asked for."""
    at, n, heads = round(cfg.before * data.fps), round(cfg.window * data.fps), list(data.heads)
    whole = data.read(px)
    before = right_of(data.read(px[:, at - n : at]), first, heads)
    after, all_ = right_of(data.read(px[:, -n:]), second, heads), right_of(whole, second, heads)

    def figures(index: Tensor) -> dict[str, Any]:
        return {
            "before": accuracy(before[index], heads),
            "after": accuracy(after[index], heads),
            "time_to_adherence": time_to_adherence(all_[index], whole.times, heads, at, data.fps),
        }

    return certain(scene, figures, cfg.draws)


def long_streams(student: Bundle, codec: Codec, rooms: Rooms, data: Data, cfg: Any) -> dict[str, StreamTally]:
    """Long streams under one caption each, and drawn ones."""
    frames, count = round(cfg.long_seconds * data.fps), min(cfg.streams, cfg.clips)
    drawn = scenes(rooms, count, size=clip_size(student, codec, rooms.world)[1], num_frames=frames)
    told = [[Cue(0.0, clip.caption)] for clip in track(drawn, "long streams", unit="stream")]
    made = [streamed(student, codec, frames, cfg.seed + k, cues) for k, cues in enumerate(told)]
    tallies = {name: StreamTally(frames, round(cfg.window * data.fps)) for name in ("real", "student")}
    tallies["real"].add(torch.stack([to_float(clip.frames) for clip in drawn]))
    tallies["student"].add(torch.stack(made))
    return tallies


SUITE = Suite(
    "prompt_adherence",
    AdherenceConfig,
    captions,
    METRICS,
    targets,
    switches,
    {"codec": codec_row},
    spread=("before",),
)
