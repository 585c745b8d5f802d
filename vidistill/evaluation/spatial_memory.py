"""The memory benchmark: leave a view and come back to it, go where it must not be seen again, and walk straight.

Students are told the same actions as the real engine, and start from the same picture, on the paths of
`worlds.doom.paths`. A student that pastes what it remembers wins some of the figures and loses others.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.camera import (
    CameraConfig,
    Pose,
    integrate,
    latent_rate,
    moves,
    planar,
    relative,
    signed,
    wanted,
)
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import Batch, Data, Row, Tally, View, repeat_row
from vidistill.evaluation.config import JudgeConfig
from vidistill.evaluation.probes import AFTER, BEFORE, Probe, Reading, load_probe, read
from vidistill.evaluation.quality import walk_along, walk_condition
from vidistill.evaluation.recall import false_recall, likeness, nearest, returns, snaps
from vidistill.evaluation.report import Metric
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import Judgement, Suite
from vidistill.io import to_float
from vidistill.memory.policies import stream_memory
from vidistill.ops.precision import PRECISIONS
from vidistill.worlds.doom.labels import action_labels, visible_walks
from vidistill.worlds.doom.paths import FIRST_ROOM, FORWARD, KINDS, REVISITS, Path, PathConfig, paths_of
from vidistill.worlds.doom.recorder import ACTIONS

log = logging.getLogger("vidistill")

BASELINES = ("window", "full")  # the same student with another memory: NAME-window, NAME-full
HEADS = ("turn", "walk")  # of the probe, that actions are read from
FEW_ROOMS = 6  # of a kind of path: that fewer agree is chance in more than 5 % (a sign test)
SAME_DB = 40.0  # beyond it no eye tells two pictures apart


@dataclass(frozen=True)
class SpatialMemoryConfig(PathConfig, JudgeConfig):
    """The paths, and how they are played."""

    batch: int = 8
    data: str = "data/doom-{split}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1 or self.precision not in PRECISIONS:
            raise ValueError(f"revisit needs a batch above 0 and a precision of {PRECISIONS}; got {self}")


class PoseReader:
    """Reads camera motion from pictures: ridge regression from a probe's features, fitted on real video.

    Motion is (forward, left, turn to the left) a px frame, in map units / 64 and radians.
    """

    def __init__(self, probe: Probe, clips: Clips, episodes: int = 24, ridge: float = 1e-2) -> None:
        self.probe = probe
        frames, poses = clips.tensors["frames"][:episodes], clips.tensors["poses"][:episodes]
        xs, ys = [], []
        for px, path in zip(frames, poses, strict=True):
            reading = read(probe, to_float(px.numpy())[None], 2)
            xs.append(self.inputs(reading.features[0]))
            ys.append(planar_motion(path)[reading.times])
        x, y = torch.cat(xs).double(), torch.cat(ys)
        if len(x) < x.shape[1]:
            log.warning(
                "%s has %d frames to fit what reads motion on, fewer than its %d weights: errors of motion will be "
                "large; remove the folder to record more",
                clips.folder,
                len(x),
                x.shape[1],
            )
        self.frames = len(x)
        self.weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    @staticmethod
    def inputs(features: Tensor) -> Tensor:
        """Features, what a rectifier makes of them, and a constant."""
        return torch.cat((features, F.relu(features), F.relu(-features), torch.ones_like(features[..., :1])), -1)

    def error(self, reading: Reading, poses: Tensor) -> Tensor:
        """(distance, angle in degrees) [B, n, 2] between the motion that is read and that of poses [B, T, 3]."""
        got = self.inputs(reading.features).double() @ self.weights
        wrong = got - planar_motion(poses)[:, reading.times]
        return torch.stack((wrong[..., :2].norm(dim=-1), wrong[..., 2].abs().rad2deg()), -1)


def planar_motion(poses: Tensor) -> Tensor:
    """Forward, left and turn [..., T, 3] from poses [..., T, 3]."""
    return moves(planar(poses))[..., [0, 1, 3]]


def pose_error(recorded: Clips, camera: CameraConfig, factor: int) -> dict[str, float]:
    """How far integrated poses are from the engine's at the end of recorded walks, means in map units / 64.

    `told`: from the relative actions of latents of `factor` px frames, as a network is told them. `keys`: from what the
    keys ask for, as in a stream, which knows no walls. `seconds`: how long the walks are.
    """
    actions, true = recorded.tensors["actions"], planar(recorded.tensors["poses"])
    frames = (actions.shape[1] - 1) // factor * factor
    start, end = Pose(true.position[:, :1], true.rotation[:, :1]), true.position[:, frames]
    at_latents, _ = latent_rate(moves(true)[:, 1 : 1 + frames], factor, start)
    paths = {
        "told": signed(relative(at_latents, camera, factor), camera, factor),
        "keys": wanted(actions[:, 1 : 1 + frames], ACTIONS, camera),
    }
    off = {name: float((integrate(m, start).position[:, -1] - end).norm(dim=-1).mean()) for name, m in paths.items()}
    return {"seconds": frames / recorded.meta["fps"], **off}


# --- paths and rows ---------------------------------------------------------------------------------------------------


def recorded(rooms: Rooms, cfg: Any) -> Clips:
    """Walks of validation that motion is read from."""
    return Rooms(rooms.source, rooms.world).episodes(cfg.data, "frames", (64, 321), (1, 8))


def walks(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: SpatialMemoryConfig) -> Data:
    """Batches of paths of one length, with the engine's pictures of them."""
    return judged_on(batches_of(rooms, cfg, codec.temporal_factor * bundle.net.cfg.chunk), rooms, cfg)


def batches_of(rooms: Rooms, cfg: SpatialMemoryConfig, chunked: int) -> list[Batch]:
    """The paths in rooms, each of 1 + a multiple of `chunked` frames; of the first batch with all kinds of path the
    first of each is kept to look at."""
    engine, batches = rooms.world.config(), list[Batch]()
    for seconds in cfg.seconds:
        seeds = rooms.seeds(FIRST_ROOM, cfg.paths * cfg.tries * len(KINDS))
        paths = paths_of(cfg, engine, seconds, chunked, seeds)
        parts = [paths[i : i + cfg.batch] for i in range(0, len(paths), cfg.batch)]
        batches += [batch_of(part, seconds, engine.speed, cfg.seed) for part in parts]
    kinds = [len(batch.facts["kind"].unique()) for batch in batches]
    chosen = kinds.index(max(kinds))
    return [replace(batch, shown=kinds[k] if k == chosen else 0) for k, batch in enumerate(batches)]


def judged_on(batches: Sequence[Batch], rooms: Rooms, cfg: SpatialMemoryConfig) -> Data:
    probe, fps = load_probe(cfg.probe, rooms.world.probe), rooms.world.config().fps
    names = [list(KINDS)[int(kind)] for batch in batches for kind in batch.facts["kind"][: batch.shown]]
    reader, heads = PoseReader(probe, recorded(rooms, cfg)), dict.fromkeys(HEADS, 3)
    return Data(batches, fps, probe, heads, stride=2, reader=reader, shown=len(names), names=names)


def batch_of(paths: Sequence[Path], seconds: float, speed: float, seed: int) -> Batch:
    walks = [path.walk for path in paths]
    frames, actions, poses = (np.stack([getattr(w, name) for w in walks]) for name in ("frames", "actions", "poses"))
    facts = {"actions": torch.from_numpy(actions), "poses": torch.from_numpy(poses)}
    facts |= {name: torch.tensor([getattr(p, name) for p in paths]) for name in ("label", "away")}
    facts["kind"] = torch.tensor([list(KINDS).index(p.kind) for p in paths])
    facts["judged"] = torch.tensor([[p.judged.start, p.judged.stop] for p in paths])
    facts["pairs"] = torch.from_numpy(np.stack([p.pairs for p in paths]))
    facts["seconds"] = torch.full((len(paths),), seconds)
    turn, walk = action_labels(facts["actions"])
    facts["asked"] = torch.stack((turn, visible_walks(walk, facts["poses"], speed)), -1)
    rooms, condition = torch.tensor([w.seed for w in walks]), partial(walk_condition, facts["actions"], facts["poses"])
    return Batch(to_float(frames), condition, derived_seed(seed, walks[0].seed), facts=facts, rooms=rooms)


def is_kind(facts: Mapping[str, Tensor] | Tally, *kinds: str) -> Tensor:
    """Which clips [N] are of some kinds."""
    return torch.isin(facts["kind"], torch.tensor([list(KINDS).index(kind) for kind in kinds]))


def played(bundle: Bundle, codec: Codec, cfg: SpatialMemoryConfig) -> Row:
    """The student's streams along the paths, at constant memory."""

    def row(batch: Batch) -> Tensor:
        told, total = (batch.facts["actions"], batch.facts["poses"]), batch.px.shape[1]
        made = walk_along(bundle, codec, batch.px[:, :1], *told, total, batch.seed, cfg.precision)
        return torch.cat(list(made), dim=1)[:, :total]

    return row


def repeat_last(batch: Batch) -> Tensor:
    """The last view away from the one that comes back, for ever."""
    own = batch.px[torch.arange(len(batch.px)), batch.facts["away"]]
    return own[:, None].expand_as(batch.px)


def paste_nearest(batch: Batch) -> Tensor:
    """Real video until it is away, from then on its frame of before that was seen from nearest: memory and no more."""
    poses, away = batch.facts["poses"], batch.facts["away"]
    times = torch.arange(poses.shape[1])
    chosen = torch.where(times > away[:, None], nearest(poses, away + 1), times)
    return batch.px[torch.arange(len(poses))[:, None], chosen]


def contenders(student: Bundle, named: Mapping[str, str | None]) -> dict[str, Bundle]:
    """The baselines of a student: those named, else NAME-window and NAME-full where they exist."""
    found = {}
    for row in BASELINES:
        own = f"{student.name}-{row}"
        own = own if own in checkpoint.zoo_names() else str(student.folder / own)
        if named.get(row) or checkpoint.find_checkpoint(own) or own in checkpoint.zoo_names():
            found[row] = checkpoint.load(named.get(row) or own, "student")
        else:
            log.warning("%s has no baseline %s; name a student that has that memory (--%s)", student.name, own, row)
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def judged_frames(view: View, px: Tensor, beyond: int = 0) -> Tensor:
    """The frames of a clip that are compared, and what the probe needs around them."""
    start, stop = view.batch.facts["judged"][0].tolist()
    return px[:, start - 2 * beyond : stop + beyond]


def revisited(view: View) -> Tensor:
    """Squared error, whether most frames show the wall picture that was there, and distance of features [B, 3] of the
    start view after the return against the true one; nan for paths that do not return to it."""
    assert view.data.probe is not None
    shown, true = (read(view.data.probe, judged_frames(view, px, 1)) for px in (view.px, view.batch.px))
    known = most(shown.labels["texture"]) == view.batch.facts["label"]
    wrong = metrics.mse(judged_frames(view, view.px), judged_frames(view, view.batch.px)).mean(1)
    found = torch.stack((wrong, known.float(), (shown.features - true.features).norm(dim=-1).mean(1)), -1)
    return found.masked_fill(~is_kind(view.batch.facts, *REVISITS)[:, None], math.nan)


def most(labels: Tensor) -> Tensor:
    """The class that most frames [B, n] show."""
    return F.one_hot(labels).sum(1).argmax(-1)


def consistent(view: View) -> Tensor:
    """How a view that comes back agrees with what the same clip first showed of it [B, 2]: by how many dB it is nearer
    to that than what was shown in between; whether it is the same wall picture again after another one."""
    assert view.data.probe is not None
    clips, pairs = torch.arange(len(view.px))[:, None], view.batch.facts["pairs"]
    again, first, between = (view.px[clips, times] for times in pairs.unbind(-1))
    gain = metrics.psnr(again, first).clamp_max(SAME_DB) - metrics.psnr(between, first).clamp_max(SAME_DB)
    around = pairs[..., None] + torch.arange(-BEFORE, AFTER + 1)
    stacks = view.px[clips[..., None, None], around].flatten(0, 2)
    seen = view.data.probe(stacks)[1]["texture"].argmax(-1).view(pairs.shape)
    now, then, meanwhile = (most(labels) for labels in seen.unbind(-1))
    found = torch.stack((gain.mean(1), ((now == then) & (then != meanwhile)).float()), -1)
    return found.masked_fill(is_kind(view.batch.facts, "straight")[:, None], math.nan)


def recall_of(view: View) -> Tensor:
    """Share of frames elsewhere that show the start picture, share that return to an earlier picture, and whether the
    start picture comes back [B, 3]."""
    own, true, poses = likeness(view.px), likeness(view.batch.px), view.batch.facts["poses"]
    back = returns(own, true, poses).double().mean(1)
    return torch.stack((false_recall(own, true, poses), back, snaps(own, true).any(1).double()), -1)


def counts(view: View) -> Tensor:
    """Which of the frames that the probe reads count [B, n]: of straight walks those in which the walker walks."""
    ahead = view.batch.facts["actions"][:, view.reading.times, FORWARD] > 0
    return ahead | ~is_kind(view.batch.facts, "straight")[:, None]


def moved_wrong(view: View) -> Tensor:
    """Error of the motion read back [B, 2]: map units / 64 and degrees a frame."""
    wrong = view.data.reader.error(view.reading, view.batch.facts["poses"])
    return wrong.masked_fill(~counts(view)[..., None], math.nan).nanmean(1)


def followed(view: View) -> Tensor:
    """How often each action was asked for and how often it was read [B, heads, classes, 2]."""
    seen = torch.stack([view.reading.labels[name] for name in HEADS], -1)[..., None]
    asked = view.batch.facts["asked"][:, view.reading.times][..., None]
    each = (asked == torch.arange(3)) & counts(view)[..., None, None]
    return torch.stack((each.sum(1), (each & (seen == asked)).sum(1)), -1)


def has_figures(row: Tally, kinds: Sequence[str], seconds: float | None = None) -> bool:
    """Whether a row has figures of some paths: always as a whole, drawn anew only if there are rooms enough."""
    batches = row.data.batches
    rooms = torch.cat([batch.rooms for batch in batches if batch.rooms is not None])
    if torch.equal(rooms, row["rooms"]):
        return True
    own = torch.cat([is_kind(batch.facts, *kinds) for batch in batches])
    if seconds is not None:
        own &= torch.cat([batch.facts["seconds"] for batch in batches]) == seconds
    return len(rooms[own].unique()) >= FEW_ROOMS


def by_seconds(column: int, of: Callable[[Tensor], Any] = float) -> Callable[[Tally, Tally], dict[str, float]]:
    """The mean over revisits of the start view for every time away."""

    def figure(row: Tally, real: Tally) -> dict[str, float]:
        values, away = row["revisited"][:, column].double(), row["seconds"]
        lengths = [float(s) for s in away.unique() if has_figures(row, REVISITS, float(s))]
        return {f"{s:g}": float(of(values[away == s].nanmean())) for s in lengths}

    return figure


def by_kind(name: str, column: int, kinds: Sequence[str]) -> Callable[[Tally, Tally], dict[str, float]]:
    """The mean for every kind of path."""

    def figure(row: Tally, real: Tally) -> dict[str, float]:
        enough = [kind for kind in kinds if has_figures(row, [kind])]
        own = {kind: row[name][is_kind(row, kind), column].double() for kind in enough}
        return {kind: float(values.nanmean()) for kind, values in own.items() if len(values)}

    return figure


def mean_of(name: str, column: int, *kinds: str) -> Callable[[Tally, Tally], float]:
    """The mean over paths of some kinds."""

    def figure(row: Tally, real: Tally) -> float:
        values = row[name][is_kind(row, *kinds or KINDS), column].double()
        return float(values.nanmean()) if has_figures(row, kinds or [*KINDS]) else math.nan

    return figure


def following(*kinds: str) -> Callable[[Tally, Tally], float]:
    """Balanced accuracy of turns and of steps, the mean, on paths of some kinds."""

    def figure(row: Tally, real: Tally) -> float:
        asked, got = row["followed"][is_kind(row, *kinds or KINDS)].sum(0).double().unbind(-1)
        return float((got / asked).nanmean(-1).nanmean()) if has_figures(row, kinds or [*KINDS]) else math.nan

    return figure


SECONDS = {"seconds": lambda v: v.batch.facts["seconds"], "kind": lambda v: v.batch.facts["kind"]}
REVISITED, CONSISTENT = {"revisited": revisited} | SECONDS, {"consistent": consistent} | SECONDS
RECALL, FOLLOWED = {"recall": recall_of} | SECONDS, {"followed": followed} | SECONDS
POSE = {"pose": moved_wrong} | SECONDS
METRICS = {
    "revisit_psnr": Metric(
        "PSNR of the start view after the return, in dB, by seconds away",
        lambda row, real: None if row is real else by_seconds(0, metrics.decibels)(row, real),
        REVISITED,
        best="high",
    ),
    "revisit_texture_acc": Metric("share of its wall pictures recognised", by_seconds(1), REVISITED, best="high"),
    "revisit_feature_distance": Metric("distance of its probe features", by_seconds(2), REVISITED, best="low"),
    "consistency_gain": Metric(
        "dB by which a view that comes back is nearer to what it first was than the view in between, by kind of path",
        by_kind("consistent", 0, [kind for kind in KINDS if kind != "straight"]),
        CONSISTENT,
        best="high",
    ),
    "consistency_texture": Metric(
        "share of views made by the student that show the same wall picture again, after another one",
        mean_of("consistent", 1, "generated", "elsewhere"),
        CONSISTENT,
        best="high",
    ),
    "false_recall": Metric(
        "share of frames seen from another place that show the start picture",
        by_kind("recall", 0, ("elsewhere", "straight")),
        RECALL,
        best="low",
    ),
    "returns": Metric(
        "share of frames that show an earlier picture again although the pose is another one",
        mean_of("recall", 1),
        RECALL,
        best="low",
    ),
    "snap_back": Metric(
        "share of straight walks that are thrown back to the start picture",
        mean_of("recall", 2, "straight"),
        RECALL,
        best="low",
    ),
    "action_following": Metric("balanced accuracy of actions a probe reads back", following(), FOLLOWED, best="high"),
    "straight_following": Metric("the same on straight walks", following("straight"), FOLLOWED, best="high"),
    "rpe_trans": Metric(
        "error of the motion that is read back, in map units / 64 a frame", mean_of("pose", 0), POSE, best="low"
    ),
    "rpe_rot": Metric("the same of turns, in degrees a frame", mean_of("pose", 1), POSE, best="low"),
    "straight_rpe_trans": Metric("on straight walks", mean_of("pose", 0, "straight"), POSE, best="low"),
    "straight_rpe_rot": Metric("on straight walks", mean_of("pose", 1, "straight"), POSE, best="low"),
}


def details(judged: Judgement) -> None:
    """What the memories cost, how exact poses are, and how many paths of each kind counted."""
    result, student, cfg = judged.result, judged.bundles["student"], judged.cfg
    for row, bundle in judged.bundles.items():
        result[row] |= memory_of(bundle)
    result |= {row: None for row in BASELINES if row not in result}
    result |= {key: result["student"][key] for key in ("rpe_trans", "rpe_rot")}
    camera, factor = (student.record.get("world") or {}).get("camera"), judged.codec.temporal_factor
    walks = recorded(judged.rooms, cfg)
    result["pose_error"] = pose_error(walks, build(CameraConfig, camera), factor) if camera else None
    assert judged.data.probe is not None
    judged.protocol |= {"counted": counted(judged.data, cfg), "texture_chance": 1 / judged.data.probe.cfg.textures}
    judged.protocol |= {"motion_frames": judged.data.reader.frames}


def counted(data: Data, cfg: SpatialMemoryConfig) -> dict[str, dict[str, int]]:
    """How many paths there are of every kind, by seconds away."""
    out = {f"{s:g}": dict.fromkeys(KINDS, 0) for s in cfg.seconds}
    for batch in data.batches:
        for kind in batch.facts["kind"]:
            out[f"{float(batch.facts['seconds'][0]):g}"][list(KINDS)[int(kind)]] += 1
    return out


def memory_of(bundle: Bundle) -> dict[str, int]:
    """Tokens and bytes that a stream of a student remembers."""
    net = bundle.net
    memory = net.new_memory(1, cfg=stream_memory(net.cfg.memory, net.cfg.chunk))
    return {"memory_tokens": memory.tokens, "memory_bytes": memory.memory_bytes}


ROWS = {"repeat_last": repeat_last, "paste_start": repeat_row, "paste_nearest": paste_nearest}
SUITE = Suite(
    "memory",
    SpatialMemoryConfig,
    walks,
    METRICS,
    lambda result: [],
    details,
    rows={name: partial(lambda row, codec: row, row) for name, row in ROWS.items()},
    student=played,
    others=contenders,
    quick={"paths": FEW_ROOMS, "seconds": (5.0,), "seeds": 1, "draws": 100},
)
