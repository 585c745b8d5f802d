"""What a user sees over minutes: walks of the engine, of a student and of a teacher, with and without the filter."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.codecs.tiny import TinyCodec, filtered
from vidistill.conditioning.condition import branches
from vidistill.data.clips import Clips
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import TEXTS, Batch, Data, Row, Tally, View, repeat_row, without_filter
from vidistill.evaluation.config import JudgeConfig
from vidistill.evaluation.probes import load_probe
from vidistill.evaluation.quality import stuck, walk_along, walk_condition
from vidistill.evaluation.recall import likeness, returns
from vidistill.evaluation.report import Metric
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.spatial_memory import HEADS, PoseReader, recorded
from vidistill.evaluation.streams import FLAT, PICTURES
from vidistill.evaluation.suite import Suite
from vidistill.io import to_float
from vidistill.ops.precision import PRECISIONS, autocast
from vidistill.sampling import sample
from vidistill.worlds.doom.labels import action_labels, visible_walks

FIRST_WALK = 1024  # of a split: rooms that no other suite opens


@dataclass(frozen=True)
class MinutesConfig(JudgeConfig):
    """`streams` walks as long as the last of `marks`; a figure at a mark is of the `span` seconds before it."""

    streams: int = 64
    marks: tuple[float, ...] = (10.0, 30.0, 60.0)
    span: float = 10.0
    batch: int = 4
    steps: int = 50  # of the teacher
    data: str = "data/doom-{split}"

    def __post_init__(self) -> None:
        if min(self.streams, self.batch, self.steps, self.seeds) < 1 or self.precision not in PRECISIONS:
            raise ValueError(
                f"minutes needs streams, batch, steps, seeds above 0, precision of {PRECISIONS}; got {self}"
            )
        if not self.marks or self.span <= 0 or min(self.marks) < self.span:
            raise ValueError(f"minutes.marks are {self.marks}; needed are seconds, none below the span of {self.span}")


# --- walks and rows ---------------------------------------------------------------------------------------------------


class Walks:
    """Batches of recorded walks; pictures become float batch by batch."""

    def __init__(self, clips: Clips, cfg: MinutesConfig, length: int) -> None:
        self.clips, self.cfg, self.length = clips, cfg, length

    def __len__(self) -> int:
        return math.ceil(self.cfg.streams / self.cfg.batch)

    def __iter__(self) -> Iterator[Batch]:
        tensors, speed = self.clips.tensors, self.clips.meta["config"]["speed"]
        for start in range(0, self.cfg.streams, self.cfg.batch):
            part = slice(start, min(self.cfg.streams, start + self.cfg.batch))
            frames, actions, poses = (tensors[name][part, : self.length] for name in ("frames", "actions", "poses"))
            turn, walk = action_labels(actions)
            facts = {
                "actions": actions,
                "poses": poses,
                "asked": torch.stack((turn, visible_walks(walk, poses, speed)), -1),
            }
            condition, rooms = partial(walk_condition, actions, poses), torch.arange(part.start, part.stop)
            yield Batch(
                to_float(frames.numpy()), condition, derived_seed(self.cfg.seed, start), facts=facts, rooms=rooms
            )


def walks(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: MinutesConfig) -> Data:
    length = math.ceil(max(cfg.marks) * rooms.world.config().fps) + 1
    clips = rooms.episodes(cfg.data, "minutes", (cfg.streams, length), (cfg.streams, length), FIRST_WALK)
    probe, fps = load_probe(cfg.probe, rooms.world.probe), clips.meta["fps"]
    ends = [round(mark * fps) for mark in cfg.marks]
    windows = {f"{mark:g}": range(end - round(cfg.span * fps), end) for mark, end in zip(cfg.marks, ends, strict=True)}
    reader = PoseReader(probe, recorded(rooms, cfg))
    found = Walks(clips, cfg, length)
    return Data(found, fps, probe, dict.fromkeys(HEADS, 3), 2, reader=reader, windows=windows, every=3.0)


class Streams:
    """The student's streams along walks, at constant memory; those of the last batch are kept as they were unfiltered,
    one for each seed.

    A codec's filter works on pictures that are decoded, so that one rollout shows both.
    """

    def __init__(self, student: Bundle, codec: Codec, cfg: MinutesConfig) -> None:
        self.student, self.cfg = student, cfg
        self.kept: dict[int, Tensor] = {}  # by seed, the oldest first
        self.spread = codec.cfg.smooth if isinstance(codec, TinyCodec) else 0.0
        self.codec = codec if not isinstance(codec, TinyCodec) else without_filter(codec)

    def unfiltered(self, batch: Batch) -> Tensor:
        if batch.seed not in self.kept:
            if len(self.kept) == self.cfg.seeds:
                del self.kept[next(iter(self.kept))]
            walk, total = (batch.facts["actions"], batch.facts["poses"]), batch.px.shape[1]
            made = walk_along(self.student, self.codec, batch.px[:, :1], *walk, total, batch.seed, self.cfg.precision)
            self.kept[batch.seed] = torch.cat(list(made), dim=1)[:, :total]
        return self.kept[batch.seed]

    def __call__(self, batch: Batch) -> Tensor:
        px = self.unfiltered(batch)
        return torch.cat([filtered(x, None, self.spread) for x in px.split(1)]) if self.spread else px


def continued(teacher: Bundle, codec: Codec, cfg: MinutesConfig) -> Row:
    """The teacher's clips one after the other, each from the last picture of the one before."""
    record, sigmas = teacher.record, teacher.noise.steps(cfg.steps)
    text, frames, shape = float(record.get("guidance", 1.0)), teacher.shape.frames, teacher.shape
    span = codec.px_frames(frames) - 1

    def row(batch: Batch) -> Tensor:
        actions, poses, px = batch.facts["actions"], batch.facts["poses"], [batch.px[:, :1]]
        rng, total = torch.Generator().manual_seed(batch.seed), batch.px.shape[1]
        for start in range(0, total - 1, span):
            times = torch.arange(start, start + span + 1).clamp_max(total - 1)
            told = actions[:, times] * (torch.arange(start, start + span + 1) < total)[:, None]
            given = codec.encode(px[-1][:, -1:])
            cond = walk_condition(told, poses[:, times], teacher, codec)
            noise = torch.randn(len(given), frames, shape.channels, shape.height, shape.width, generator=rng)
            nulls, scales = branches(cond, text, 0.0)
            with autocast(cfg.precision):
                x = sample(teacher.net, noise, sigmas, cond, given=given, nulls=nulls, scales=scales).float()
            px.append(codec.decode(x)[:, 1:])
        return torch.cat(px, dim=1)[:, :total]

    return row


def teacher_beside(student: Bundle, named: Mapping[str, str | None]) -> dict[str, Bundle]:
    """The teacher, if it is asked for: minutes of it take hours."""
    return {"teacher": checkpoint.load(name, "teacher")} if (name := named.get("teacher")) else {}


# --- figures ----------------------------------------------------------------------------------------------------------


def at_marks(view: View, values: Tensor, times: Tensor | None = None) -> Tensor:
    """Means [B, marks, ...] of values [B, n, ...] at frames `times` [n] in the window before each mark."""
    times = torch.arange(values.shape[1]) if times is None else times
    inside = [(times >= w.start) & (times < w.stop) for w in view.data.windows.values()]
    return torch.stack([values[:, part].double().nanmean(1) for part in inside], 1)


def by_mark(name: str, column: int | None = None) -> Callable[[Tally, Tally], dict[str, float]]:
    """The mean over streams at every mark."""

    def figure(row: Tally, real: Tally) -> dict[str, float]:
        values = row[name] if column is None else row[name][..., column]
        return {mark: float(values[:, k].nanmean()) for k, mark in enumerate(row.data.windows)}

    return figure


def ratio_by_mark(name: str) -> Callable[[Tally, Tally], dict[str, float]]:
    def figure(row: Tally, real: Tally) -> dict[str, float]:
        own, true = by_mark(name)(row, real), by_mark(name)(real, real)
        return {mark: metrics.ratio(own[mark], true[mark]) for mark in own}

    return figure


def followed(view: View) -> Tensor:
    """Share of frames in which each action was asked for, and read, in each window [B, marks, heads, classes, 2]."""
    seen = torch.stack([view.reading.labels[name] for name in HEADS], -1)[..., None]
    asked = view.batch.facts["asked"][:, view.reading.times][..., None]
    each = asked == torch.arange(3)
    return at_marks(view, torch.stack((each, each & (seen == asked)), -1), view.reading.times)


def following(row: Tally, real: Tally) -> dict[str, float]:
    """Balanced accuracy of turns and of steps, the mean."""
    asked, got = row["followed"].sum(0).unbind(-1)
    shares = (got / asked).nanmean(-1).nanmean(-1)
    return {mark: float(shares[k]) for k, mark in enumerate(row.data.windows)}


def returned(view: View) -> Tensor:
    own, true = likeness(view.px), likeness(view.batch.px)
    return at_marks(view, returns(own, true, view.batch.facts["poses"]))


def stood(view: View) -> Tensor:
    return at_marks(view, stuck(view), torch.arange(1, view.px.shape[1]))


def moved_wrong(view: View) -> Tensor:
    wrong = view.data.reader.error(view.reading, view.batch.facts["poses"])
    return at_marks(view, wrong, view.reading.times)


def curve(name: str) -> Callable[[View], Tensor]:
    """A measure of pictures, or how they move, at the marks."""
    if name in PICTURES:
        return lambda view: at_marks(view, PICTURES[name](view.px))
    return lambda view: at_marks(view, metrics.motion(view.px), torch.arange(1, view.px.shape[1]))


MOVED = {"pose": moved_wrong}
METRICS = {
    "flat_frames": Metric(
        "share of frames that show next to nothing, such as a wall right ahead",
        by_mark("flat"),
        {"flat": lambda v: at_marks(v, (metrics.contrast(v.px) < FLAT).double())},
        best="low",
    ),
    "returns": Metric(
        "share of frames that show an earlier picture again although the pose is another one",
        by_mark("returned"),
        {"returned": returned},
        best="low",
    ),
    "stuck_frames": Metric(
        "share of the steps that real video takes in which nothing moves",
        by_mark("stood"),
        {"stood": stood},
        best="low",
    ),
    "action_following": Metric(
        "balanced accuracy of actions a probe reads back", following, {"followed": followed}, best="high"
    ),
    "rpe_trans": Metric(
        "error of the motion that is read back, in map units / 64 a frame", by_mark("pose", 0), MOVED, best="low"
    ),
    "rpe_rot": Metric("the same of turns, in degrees a frame", by_mark("pose", 1), MOVED, best="low"),
    **{
        f"{name}_ratio": Metric(f"{TEXTS[name]}, against real", ratio_by_mark(name), {name: curve(name)}, best="one")
        for name in ("saturation", "sharpness")
    },
    "motion_ratio": Metric(
        f"{TEXTS['motion']}, against real", ratio_by_mark("moved"), {"moved": curve("motion")}, best="one"
    ),
}
SUITE = Suite(
    "minutes",
    MinutesConfig,
    walks,
    METRICS,
    lambda result: [],
    rows={"repeat": lambda codec: repeat_row},
    student=Streams,
    others=teacher_beside,
    quick={"streams": 8, "marks": (10.0, 30.0), "draws": 100},
    teacher=continued,
    variants={"student_unfiltered": lambda row: row.unfiltered if row.spread else None},
)
