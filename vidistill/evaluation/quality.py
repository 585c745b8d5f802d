"""A walker judged on held-out walks: student, teacher, codec and real video side by side, on the same episodes."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vidistill import metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import ACTION_SITE, Condition, pack_actions, walked
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import (
    DRIFTS,
    Batch,
    Data,
    Tally,
    View,
    codec_row,
    picture_ratios,
    read_parts,
    repeat_row,
    student_row,
    teacher_row,
    without_filter,
)
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.intervals import certain
from vidistill.evaluation.probes import load_probe
from vidistill.evaluation.report import Metric, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import FLAT, StreamTally, pieces
from vidistill.evaluation.suite import QUICK, Judgement, Suite, add_certainty, measure, run_figures
from vidistill.io import to_float
from vidistill.progress import track
from vidistill.worlds.spec import WorldSpec

RECORDED_FRAMES = 321  # of an episode that clips are cut from
LONG_EPISODES_FROM = 64  # rooms of the long walks come after those of the clips
HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds
STILL, MOVING = 0.1, 0.01  # of the motion of real video a frame; motion that is one
RETURN_DB = 6.0  # by which a frame is nearer to the start image than before, and than in real video
NONE = 1  # the class of an action that is not taken, of three


@dataclass(frozen=True)
class EvalConfig(SuiteConfig):
    """Episodes in `data`, where {split} stands for the split, are recorded when they are missing."""

    seconds: float = 4.0  # window of the ratios, and of both ends of a drift
    frames: int = 22  # latents of a clip, the start image included
    stride: int = 2  # the probe reads every `stride`-th frame
    episodes: int = 64
    data: str = "data/doom-{split}"
    unfiltered: int = 64  # clips that are also judged without the decoder's filter
    threads: int = 0  # 0: as torch chooses

    @property
    def span(self) -> float:
        return self.seconds


# --- held-out episodes ------------------------------------------------------------------------------------------------


class HeldOut:
    """Clips cut from held-out episodes at evenly spaced frames: one of every episode, then another of every episode."""

    def __init__(self, clips: Clips, world: WorldSpec, cfg: EvalConfig, px_frames: int) -> None:
        assert world.asked is not None
        self.cfg, self.px_frames, self.tensors = cfg, px_frames, clips.tensors
        self.asked = torch.stack(list(world.asked(clips).values()), -1)
        self.windows = windows(min(len(clips), cfg.episodes), self.tensors["frames"].shape[1], px_frames, cfg.clips)

    def __len__(self) -> int:
        return math.ceil(len(self.windows) / self.cfg.batch)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            picked = self.windows[i * self.cfg.batch : (i + 1) * self.cfg.batch]
            px = to_float(self.cut(self.tensors["frames"], picked).numpy())
            actions, poses = (self.cut(self.tensors[name], picked) for name in ("actions", "poses"))
            rooms = torch.tensor([e for e, _ in picked])
            facts = {"asked": self.cut(self.asked, picked), "episodes": rooms}
            told, seed = partial(walk_condition, actions, poses), derived_seed(self.cfg.seed, i)
            yield Batch(px, told, seed, facts=facts, rooms=rooms)

    def cut(self, x: Tensor, picked: list[tuple[int, int]]) -> Tensor:
        return torch.stack([x[e, s : s + self.px_frames] for e, s in picked])


def windows(episodes: int, total: int, length: int, num: int) -> list[tuple[int, int]]:
    """(episode, first frame) of `num` windows of `length` frames, as far apart as they can be."""
    if length > total:
        raise ValueError(f"clips of {length} frames do not fit episodes of {total}; record longer ones")
    per = math.ceil(num / episodes)
    slack = total - length
    starts = [slack // 2] if per == 1 else [slack * k // (per - 1) for k in range(per)]
    return [(e, s) for s in starts for e in range(episodes)][:num]


def walk_condition(
    actions: Tensor, poses: Tensor, bundle: Bundle, codec: Codec, given: Tensor | None = None
) -> Condition:
    """What a network is told of walks: actions [B, T, A] and, where it takes them, the real motion of poses [B, T, 3].

    The first frame is given, nothing led to it.
    """
    actions, factor = actions.clone(), codec.temporal_factor
    actions[:, 0] = 0.0
    per_frame, camera = {ACTION_SITE: pack_actions(actions, factor)}, (bundle.record.get("world") or {}).get("camera")
    if camera is not None:
        per_frame |= walked(poses[:, ::factor], build(CameraConfig, camera), factor)
    return Condition(per_frame=per_frame)


def held_out(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: EvalConfig) -> Data:
    """Clips of held-out walks; ValueError for a student that does not start from exactly one picture."""
    if bundle.kind == "student" and (start := bundle.net.first_frame(bundle.schedule.given_chunks)) != 1:
        raise ValueError(
            f"{bundle.name} does not start from one picture: its {bundle.schedule.given_chunks} given chunks are "
            f"{start} latents; evaluation gives exactly the start image"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    px_frames = codec.px_frames(cfg.frames)
    made, need = (cfg.episodes, max(px_frames, RECORDED_FRAMES)), (min(cfg.episodes, cfg.clips), px_frames)
    clips, world = rooms.episodes(cfg.data, "frames", made, need), rooms.world
    assert world.asked is not None
    heads = {name: len(world.heads[name]) for name in world.asked(clips)}
    batches = HeldOut(clips, world, cfg, px_frames)
    probe, fps = load_probe(cfg.probe, world.probe), clips.meta["fps"]
    return Data(batches, fps, probe, heads, cfg.stride, round(cfg.seconds * fps))


# --- figures ----------------------------------------------------------------------------------------------------------


def following(row: Tally, name: str = "", roll: int = 0) -> float | None:
    """Balanced accuracy of the actions that the probe reads, of one head or the mean of all; None without the head.

    `roll` compares with the actions of other clips (chance).
    """
    read, asked = row["read"], row["asked"].roll(roll, 0)
    scores = {
        head: metrics.balanced_accuracy(read[..., i], asked[..., i], classes)
        for i, (head, classes) in enumerate(row.data.heads.items())
    }
    return scores.get(name) if name else sum(scores.values()) / len(scores)


def frechet(row: Tally, real: Tally) -> float | None:
    """Distance of probe features to those of the same clips; None for real video itself."""
    if row is real:
        return None
    return metrics.frechet(row["features"].flatten(0, 1), real["features"].flatten(0, 1))


def other_half(row: Tally, real: Tally) -> float:
    """Distance of the clips of even episodes to real ones of odd episodes and the other way round, the mean; nan where
    all are even, or odd."""
    odd = real["episodes"] % 2 == 1
    if odd.all() or not odd.any():
        return math.nan
    pairs = ((row["features"][half].flatten(0, 1), real["features"][~half].flatten(0, 1)) for half in (~odd, odd))
    return sum(metrics.frechet(a, b) for a, b in pairs) / 2


def flow_agrees(row: Tally, real: Tally) -> float | None:
    """Share of frames in which the picture moves the way that was turned: a left turn moves it to the right."""
    if "turn" not in row.data.heads:
        return None
    asked = row["asked"][..., list(row.data.heads).index("turn")]
    turning = asked != NONE
    return float((row["flow"][turning].sign() == 1 - asked[turning]).double().mean())


def psnr(row: Tally, real: Tally) -> float | None:
    """dB against the true future, of the squared error averaged over clips and frames."""
    return None if row is real else float(metrics.decibels(row["error"].double().mean()))


def psnr_by_horizon(row: Tally, real: Tally) -> dict[str, float] | None:
    """dB against the true future that the recorded actions led to, of the squared error averaged over clips."""
    error = row["error"].double().mean(0)
    ends = {f"{h:g}": round(h * row.data.fps) for h in HORIZONS}
    return None if row is real else {n: float(metrics.decibels(error[t])) for n, t in ends.items() if t < len(error)}


def stuck(view: View) -> Tensor:
    """Where [B, T] a clip stands still although real video moves: 1 or 0, nan where that stands still as well."""
    own, real = (metrics.motion(px[:, : view.seen.shape[1]]) for px in (view.px, view.batch.px))
    return (own < STILL * real).double().masked_fill(real < MOVING, torch.nan)


def returned(view: View) -> Tensor:
    """Whether frames [B, T] are again like the start image that a clip had left, though in real video they are not."""
    own, real = (metrics.psnr(px[:, 1:], px[:, :1]) for px in (view.px, view.batch.px))
    return ((own - own.cummin(1).values > RETURN_DB) & (own - real > RETURN_DB)).double()


READ = read_parts() | {"episodes": lambda v: v.batch.facts["episodes"]}
ERROR = {"error": lambda v: metrics.mse(v.px, v.batch.px)}
IDLE = {"still": lambda v: (v.batch.facts["asked"] == NONE).all(-1)[:, 1 : v.seen.shape[1]]}
FLOW = {"flow": lambda v: metrics.horizontal_flow(v.px[:, v.reading.times - 1], v.px[:, v.reading.times]).float()}
METRICS = {
    "frechet_paired": Metric(
        "Frechet distance of probe features to real video of the same rooms and actions", frechet, READ, best="low"
    ),
    "frechet_unpaired": Metric("the same to real video of other rooms, half as many clips", other_half, best="low"),
    "action_following": Metric(
        "balanced accuracy of actions a probe reads back, mean", lambda row, _: following(row), best="high"
    ),
    "turn_following": Metric(None, lambda row, _: following(row, "turn"), best="high"),
    "walk_following": Metric(None, lambda row, _: following(row, "walk"), best="high"),
    "action_chance": Metric(
        "the same against the actions of other clips", lambda row, _: following(row, roll=max(1, len(row["read"]) // 2))
    ),
    "turn_flow_agrees": Metric(None, flow_agrees, FLOW, best="high"),
    **picture_ratios(),
    "flat_frames": Metric(
        "share of frames that show next to nothing, such as a wall right ahead",
        lambda row, _: float((row["contrast"] < FLAT).double().mean()),
        best="low",
    ),
    "stuck_frames": Metric(
        "share of the steps that real video takes in which nothing moves",
        lambda row, _: float(row["stuck"].nanmean()),
        {"stuck": stuck},
        best="low",
    ),
    "returns": Metric(
        "share of frames that fall back to the start picture where the walk has left it",
        lambda row, _: row.mean("returned"),
        {"returned": returned},
        best="low",
    ),
    "idle_motion": Metric(
        "mean change between frames where no action was given",
        lambda row, _: float(row["motion"][row["still"]].double().mean()),
        IDLE,
    ),
    "psnr": Metric(None, psnr, best="high"),
    "psnr_by_horizon": Metric("PSNR in dB after so many seconds", psnr_by_horizon, ERROR, best="high"),
    "unfiltered": Metric("ratios of the first clips without the filter of the decoder"),
    **DRIFTS,
}


def targets(result: Mapping[str, Any]) -> list[Target]:
    """The targets that can be checked with the rows of `result`."""
    real, codec, teacher, student = (result.get(row) for row in ("real", "codec", "teacher", "student"))
    out = []
    if codec:
        out += [Target("codec PSNR, dB", codec["psnr"], 30), Target("codec sharpness", codec["sharpness_ratio"], 0.85)]
    if teacher and codec and real:
        name, limit = "frechet_unpaired", 3 * codec["frechet_unpaired"]
        out += [
            Target("teacher's action following", teacher["action_following"], 0.95 * real["action_following"]),
            Target("teacher's sharpness", teacher["sharpness_ratio"], 0.85, 1.15),
            Target("teacher's Frechet distance to other episodes", teacher[name], high=limit),
        ]
        if "0.5" in teacher["psnr_by_horizon"]:
            ahead, still = (result[row]["psnr_by_horizon"]["0.5"] for row in ("teacher", "repeat"))
            out.append(Target("teacher's PSNR at 0.5 s, dB", ahead, still))
    if student and teacher and real:
        out += [
            Target("student's Frechet distance", student["frechet_paired"], high=1.25 * teacher["frechet_paired"]),
            Target("student's action following", student["action_following"], 0.9 * real["action_following"]),
        ]
        parts = {"first": student, "last": student.get("late", {})}
        for name in (f"{name}_ratio" for name in ("sharpness", "saturation", "motion")):
            told = {when: row[name] for when, row in parts.items() if name in row}
            out += [Target(f"student's {name} in the {when} seconds", value, 0.8, 1.2) for when, value in told.items()]
    return out


# --- long streams -----------------------------------------------------------------------------------------------------


def beside_clips(judged: Judgement) -> None:
    """What is judged beside clips: pictures as the decoder gives them without its filter, and long walks."""
    unfiltered_ratios(judged)
    long_walks(judged)


def unfiltered_ratios(judged: Judgement) -> None:
    """The picture ratios of the first clips, of a codec whose filter is off: what it hides."""
    cfg, codec = judged.cfg, judged.codec
    if not isinstance(codec, TinyCodec) or not codec.cfg.smooth or not cfg.unfiltered:
        return
    bare = without_filter(codec)
    makers = {"student": student_row, "teacher": teacher_row}
    rows = {row: makers[b.kind](b, bare, cfg) for row, b in judged.bundles.items() if b.kind in makers}
    few = itertools.islice(judged.data.batches, -(-min(cfg.unfiltered, cfg.clips) // cfg.batch))
    wanted, data = picture_ratios(), replace(judged.data, batches=list(few))
    tallies = measure(wanted, {**rows, "codec": codec_row(bare)}, data)
    result = {name: run_figures(wanted, own, tallies["real"][0]) for name, own in tallies.items()}
    add_certainty(wanted, result, tallies, {}, cfg.draws)
    for name in (*rows, "codec"):
        edges = {key: result[name][f"{key}_interval"] for key in wanted if f"{key}_interval" in result[name]}
        judged.result[name]["unfiltered"] = {key: result[name][key] for key in wanted}
        judged.result[name] |= {"unfiltered_interval": edges} if edges else {}


@torch.inference_mode()
def long_walks(judged: Judgement) -> None:
    """Drift of the student's streams along long walks, at constant memory, beside the engine's own."""
    cfg, data, student, codec = judged.cfg, judged.data, judged.bundles.get("student"), judged.codec
    if student is None:
        return
    for row in ("student", "teacher", "real"):
        judged.result[row] |= dict.fromkeys(DRIFTS)
    if not cfg.long_seconds:
        return
    length = math.ceil(cfg.long_seconds * data.fps) + 1
    size = (cfg.streams, length)
    clips = judged.rooms.episodes(cfg.data, "long", size, size, LONG_EPISODES_FROM)
    frames, actions, poses = (clips.tensors[name][: cfg.streams] for name in ("frames", "actions", "poses"))
    tallies = {name: StreamTally(length, data.window or 1) for name in ("real", "student")}
    seed = derived_seed(cfg.seed, 999_983)
    for piece in frames.split(64, dim=1):
        tallies["real"].add(to_float(piece.numpy()))
    for px in walk_along(student, codec, to_float(frames[:, :1].numpy()), actions, poses, length, seed, cfg.precision):
        tallies["student"].add(px)
    judged.add_streams(tallies)
    assert judged.rooms.world.asked is not None and data.probe is not None
    asked = torch.stack(list(judged.rooms.world.asked(clips).values()), -1)[: cfg.streams]
    for name, tally in tallies.items():
        add_late_following(judged.result[name], tally, asked, data, cfg.draws)


def add_late_following(row: dict[str, Any], tally: StreamTally, asked: Tensor, data: Data, draws: int) -> None:
    """How well the last window of streams follows the actions asked [S, T, heads] along them, and its interval."""
    assert tally.tail is not None
    reading = data.read(tally.tail)
    times = reading.times + tally.seen - tally.tail.shape[1]

    def figures(index: Tensor) -> dict[str, float]:
        scores = [
            metrics.balanced_accuracy(reading.labels[name][index], asked[index][:, times, i], classes)
            for i, (name, classes) in enumerate(data.heads.items())
        ]
        return {"action_following": sum(scores) / len(scores)}

    found = certain(torch.arange(len(asked)), figures, draws)
    row["late"]["action_following"] = found["action_following"]
    if edges := found.get("action_following_interval"):
        row.setdefault("late_interval", {})["action_following"] = edges


def walk_along(
    student: Bundle,
    codec: Codec,
    px: Tensor,
    actions: Tensor,
    poses: Tensor,
    length: int,
    seed: int,
    precision: str,
) -> Iterator[Tensor]:
    """Pieces [B, t, 3, H, W] of streams from start images px [B, 1, 3, H, W] along walks, at least `length` frames.

    Walks that end before the last chunk does stand still to its end.
    """
    net, chunks = student.net, 1
    while codec.px_frames(net.first_frame(chunks)) < length:
        chunks += 1
    total = codec.px_frames(net.first_frame(chunks))
    short = max(0, total - actions.shape[1])
    actions = torch.cat((actions, actions.new_zeros(len(actions), short, actions.shape[2])), dim=1)[:, :total]
    poses = torch.cat((poses, poses[:, -1:].expand(-1, short, -1)), dim=1)[:, :total]
    cond = walk_condition(actions, poses, student, codec)
    made = pieces(student, codec, codec.encode(px), cond, chunks, seed, precision)
    return track(made, f"{len(px)} streams", total=chunks, unit="chunk")


ROWS = {"codec": codec_row, "repeat": lambda codec: repeat_row}
SUITE = Suite("quality", EvalConfig, held_out, METRICS, targets, beside_clips, ROWS, quick={**QUICK, "unfiltered": 0})
