"""What all suites share: clips of student, teacher and codec beside real ones, long streams, figures, the report.

A suite is data, what a network is told of it, a table of metrics and a list of targets; a world in `worlds.WORLDS`
names the suite that judges its students.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle, CheckpointError
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition, branches
from vidistill.evaluation import report
from vidistill.evaluation.probes import AFTER, Probe, Reading, read
from vidistill.evaluation.report import Metric, Pictures, Sheet, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import CURVES, PICTURES, SHOWN, StreamTally, curve_drifts
from vidistill.io import to_uint8
from vidistill.ops.precision import PRECISIONS, autocast, working_dtype
from vidistill.rollout import roll_out
from vidistill.sampling import sample
from vidistill.worlds import WORLDS
from vidistill.worlds.spec import WorldSpec

CODEC_FRAMES = 22  # latents of a clip where only a codec is judged
MAY_BE_ZERO = ("long_seconds", "seed", "first_seed", "threads")


@dataclass(frozen=True)
class SuiteConfig:
    """What every protocol says; smaller runs (`clips`, `streams`, `long_seconds`) are for a first look.

    Samples of the teacher are kept in `cache` under a hash of everything they depend on (empty: sample anew).
    """

    clips: int = 256
    batch: int = 32
    streams: int = 16
    long_seconds: float = 60.0  # 0: no long stream
    steps: int = 50
    guidance: float | None = None  # None: what the teacher's record says, else 1
    seed: int = 0
    first_seed: int = 0  # the first room of the split
    cache: str = "data/teacher-samples"
    out: str = "out/eval"
    probe: str | None = None  # None: the bundled one
    precision: str = "auto"

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in MAY_BE_ZERO):
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"eval.{name} must be positive, got {value}")
        if self.clips < 2:
            raise ValueError(f"eval.clips must be at least 2 for a distance of two sets, got {self.clips}")
        if self.long_seconds and self.long_seconds < 2 * self.span:
            raise ValueError(f"eval.long_seconds is {self.long_seconds}; needed is 0 or at least 2 x {self.span}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"eval.precision {self.precision!r} is unknown; choose one of {PRECISIONS}")

    @property
    def span(self) -> float:
        """Seconds at both ends of a long stream that are compared."""
        raise NotImplementedError


# --- clips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Real clips px [B, T, 3, H, W] that are judged together, and what is true of them (`facts`, B rows each).

    `condition(bundle, codec, given)` is what a network is told of them; `given`: whether it knows the start image. The
    first `shown` are kept to look at.
    """

    px: Tensor
    condition: Callable[[Bundle, Codec, Tensor | None], Condition]
    seed: int
    given: bool = True
    shown: int = SHOWN
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What all rows are judged on. `window`: px frames after the start image that count, None for all of them.

    heads: what a probe reads of them, every `stride`-th frame, and in how many classes: fact "asked" [B, T, heads].
    """

    batches: Sequence[Batch] | Any
    fps: float
    probe: Probe | None = None
    heads: Mapping[str, int] = field(default_factory=dict)
    stride: int = 1
    window: int | None = None
    reader: Any = None  # of camera motion, where a suite reads it


@dataclass(frozen=True)
class View:
    """The clips px [B, T, 3, H, W] that a row shows for a batch, as metrics see them."""

    px: Tensor
    batch: Batch
    data: Data

    @property
    def seen(self) -> Tensor:
        """The frames that count, and the start image."""
        return self.px if self.data.window is None else self.px[:, : self.data.window + 1]

    @property
    def made(self) -> Tensor:
        """The frames that count."""
        return self.seen[:, int(self.batch.given) :]

    @cached_property
    def reading(self) -> Reading:
        """What the probe sees of them."""
        assert self.data.probe is not None
        end = None if self.data.window is None else self.data.window + 1 + AFTER
        return read(self.data.probe, self.px[:, :end], self.data.stride)


class Tally:
    """What was measured of one row, clip by clip; pixels are not kept, but for a few clips to look at."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.parts: dict[str, list[Tensor]] = {}
        self.shown: list[np.ndarray] = []

    def add(self, parts: Mapping[str, Callable[[View], Tensor]], px: Tensor, batch: Batch) -> None:
        """Measure the clips px that stand for those of a batch; ValueError if they are of another size."""
        view = View(px, batch, self.data)
        if view.px.shape != view.batch.px.shape:
            raise ValueError(f"clips are {tuple(view.px.shape)} where real ones are {tuple(view.batch.px.shape)}")
        for name, measure in parts.items():
            self.parts.setdefault(name, []).append(measure(view))
        few = min(batch.shown, SHOWN - len(self.shown))
        self.shown += list(to_uint8(px[: max(0, few)]))

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])

    def mean(self, name: str) -> float:
        return float(self[name].double().mean())


def read_parts() -> dict[str, Callable[[View], Tensor]]:
    """Parts of every metric that a probe takes part in: features [B, n, D], classes that are read and that were asked
    for [B, n, heads]."""
    return {
        "features": lambda v: v.reading.features,
        "read": lambda v: torch.stack([v.reading.labels[name] for name in v.data.heads], -1),
        "asked": lambda v: v.batch.facts["asked"][:, v.reading.times],
    }


def ratio(name: str, measure: Callable[[View], Tensor], text: str) -> Metric:
    """The mean of a measure, against that of real clips."""
    return Metric(
        f"{text}, against real", lambda row, real: metrics.ratio(row.mean(name), real.mean(name)), {name: measure}
    )


def made_by(measure: Callable[[Tensor], Tensor]) -> Callable[[View], Tensor]:
    """A measure of pictures, of the frames that a row made."""
    return lambda view: measure(view.made)


def picture_ratios() -> dict[str, Metric]:
    """What every suite says of pictures."""
    found = {name: ratio(name, made_by(f), TEXTS[name]) for name, f in PICTURES.items()}
    found["motion"] = ratio("motion", lambda v: metrics.motion(v.seen), TEXTS["motion"])
    found["flicker"] = ratio("flicker", lambda v: metrics.flicker(v.seen), TEXTS["flicker"])
    return {f"{name}_ratio": metric for name, metric in found.items()}


TEXTS = {
    "sharpness": "mean gradient",
    "saturation": "mean chroma",
    "contrast": "deviation of brightness",
    "motion": "mean change between frames",
    "flicker": "brightness of blocks that comes and goes within three frames",
}
LAST = "last seconds of a long stream against the first"
DRIFTS = {f"{name}_drift": Metric(None if name == "contrast" else LAST) for name in CURVES}


# --- what fills the rows ----------------------------------------------------------------------------------------------

Row = Callable[[Batch], Tensor]  # real clips -> the clips [B, T, 3, H, W] of one row


def codec_row(codec: Codec) -> Row:
    return lambda batch: codec.decode(codec.encode(batch.px))


def repeat_row(batch: Batch) -> Tensor:
    """The start image, standing still: what any prediction must beat."""
    return batch.px[:, :1].expand_as(batch.px)


def start(bundle: Bundle, codec: Codec, batch: Batch) -> tuple[Tensor | None, Condition, tuple[int, int]]:
    """The given latent, what the network is told, and (clips, latents)."""
    given = codec.encode(batch.px[:, :1]) if batch.given else None
    frames = 1 + (batch.px.shape[1] - 1) // codec.temporal_factor
    return given, batch.condition(bundle, codec, given), (len(batch.px), frames)


def teacher_row(teacher: Bundle, codec: Codec, cfg: SuiteConfig) -> Row:
    """Clips that the teacher samples in `cfg.steps` guided Euler steps, kept in `cfg.cache`."""
    record, sigmas = teacher.record, teacher.noise.steps(cfg.steps)
    text, audio = float(record.get("guidance", 1.0)), float(record.get("audio_guidance", 0.0))
    text, audio = (text, audio) if cfg.guidance is None else (cfg.guidance, 0.0)
    weights, dtype = digest(teacher.net.state_dict()), str(working_dtype(cfg.precision))

    def row(batch: Batch) -> Tensor:
        given, cond, size = start(teacher, codec, batch)
        shape, rng = teacher.shape, torch.Generator().manual_seed(batch.seed)
        noise = torch.randn(*size, shape.channels, shape.height, shape.width, generator=rng)
        nulls, scales = branches(cond, text, audio)

        def make() -> Tensor:
            with autocast(cfg.precision):
                return sample(teacher.net, noise, sigmas, cond, given=given, nulls=nulls, scales=scales).float()

        inputs = {"given": given, "noise": noise, "tokens": cond.tokens, "channels": cond.channels, **cond.per_frame}
        known = {name: x for name, x in inputs.items() if x is not None}
        settings = [sigmas, [text, audio] if audio else text, dtype, record.get("dit")]
        return codec.decode(cached(cfg.cache, digest(known, weights, json.dumps(settings)), make))

    return row


def digest(tensors: Mapping[str, Tensor], *more: str) -> str:
    """A hash of numbers and texts."""
    made = hashlib.sha256("".join(more).encode())
    for name, x in sorted(tensors.items()):
        made.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        made.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:24]


def cached(folder: str, key: str, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before under this key; half precision either way."""
    path = Path(folder) / f"{key}.safetensors"
    if folder and path.is_file():
        return checkpoint.read_tensors(path)[0]["x"].float()
    x = make().half()
    if folder:
        checkpoint.save_tensors(path, {"x": x}, {"key": key})
    return x.float()


def student_row(student: Bundle, codec: Codec, cfg: SuiteConfig) -> Row:
    """Clips of the student's own rollouts."""

    def row(batch: Batch) -> Tensor:
        given, cond, size = start(student, codec, batch)
        with autocast(cfg.precision):
            dtype = working_dtype(cfg.precision)
            x = roll_out(student.net, student.schedule, cond, size, seed=batch.seed, given=given, dtype=dtype)
        return codec.decode(x.float())

    return row


# --- a suite ----------------------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """One evaluation as it goes on: what is judged, on what, and what was found."""

    bundles: Mapping[str, Bundle]
    codec: Codec
    rooms: Rooms
    cfg: Any
    data: Data
    tallies: dict[str, Tally]
    result: dict[str, Any]
    pictures: Pictures
    protocol: dict[str, Any] = field(default_factory=dict)

    def add_streams(self, tallies: Mapping[str, StreamTally]) -> None:
        """The drift, curves and pictures of long streams, `real` and `student`."""
        fps = self.data.fps
        for name, tally in tallies.items():
            self.result[name] |= curve_drifts(tally, tallies["real"])
            self.pictures.curves[name] = {c: metrics.curve(tally.curve(c), round(fps)) for c in CURVES}
        shown = {name: torch.cat(t.pictures, dim=1).numpy() for name, t in tallies.items()}
        caption = "Long streams, one picture for every window of the protocol."
        self.pictures.sheets.append(Sheet.beside("streams", shown, caption, "stream"))


def beside_student(student: Bundle, named: Mapping[str, str | None]) -> Mapping[str, Bundle]:
    """Its teacher: the one that is named, else the one in its card."""
    name = named.get("teacher")
    return {"teacher": checkpoint.load(name, "teacher") if name else teacher_of(student)}


def find(name: str) -> Bundle:
    """A parent by the path in a card, or bundled under its last part."""
    try:
        return checkpoint.load(name)
    except CheckpointError:
        return checkpoint.load(Path(name).name)


def teacher_of(bundle: Bundle) -> Bundle:
    """The teacher a student descends from, by its card."""
    for name in reversed(bundle.record.get("card", {}).get("parents", [])):
        parent = find(name)
        return parent if parent.kind == "teacher" else teacher_of(parent)
    raise CheckpointError(f"the card of {bundle.name} names no teacher; say which one to compare it with")


@dataclass(frozen=True)
class Suite:
    """What one suite does its own way.

    data: the clips that a checkpoint is judged on. metrics: every figure, in the order of the report. more: what is
    judged beside clips; it may be given no student. rows: made beside the networks that are judged. spread: figures
    with parts that a glance shows by themselves. student: its clips. others: networks beside a student, some of them
    named by the user.
    """

    name: str
    config: Callable[..., Any]
    data: Callable[[Bundle, Codec, Rooms, Any], Data]
    metrics: Mapping[str, Metric]
    targets: Callable[[Mapping[str, Any]], list[Target]]
    more: Callable[[Judgement], None] = lambda judged: None
    rows: Mapping[str, Callable[[Codec], Row]] = field(default_factory=dict)
    spread: tuple[str, ...] = ()
    student: Callable[[Bundle, Codec, Any], Row] = student_row
    others: Callable[[Bundle, Mapping[str, str | None]], Mapping[str, Bundle]] = beside_student


def source_of(record: Mapping[str, Any]) -> str | None:
    """What a checkpoint's clips were recorded from, as its card says."""
    data = record.get("card", {}).get("data")
    return str(data["source"]) if isinstance(data, Mapping) and "source" in data else None


def world_of(name: str, record: Mapping[str, Any]) -> tuple[str, WorldSpec]:
    """The bundled world that judges a checkpoint: the one it learned from; any for a codec that does not say."""
    source = source_of(record) or (next(iter(WORLDS)) if record["kind"] == "codec" else None)
    if source is None or source not in WORLDS:
        raise ValueError(
            f"{name} learned from {source or 'a world its card does not name'} (card.data.source); the clips of "
            f"{', '.join(WORLDS)}, which are judged here, say nothing about it"
        )
    return source, WORLDS[source]


def clip_size(bundle: Bundle, codec: Codec, world: WorldSpec) -> tuple[int, int]:
    """(latents, pixels a side) of the clips that a checkpoint is judged on: as those that it learned from."""
    if bundle.kind == "codec":
        return CODEC_FRAMES, world.config().size
    return bundle.shape.frames, bundle.shape.width * codec.spatial_factor


def judge(suite: Suite, bundles: Mapping[str, Bundle], cfg: Any, split: str, glance: bool = False) -> Judgement:
    """Figures of `real` and every row on the clips of a split."""
    first = next(iter(bundles.values()))
    source, world = world_of(first.name, first.record)
    for bundle in bundles.values():
        if source_of(bundle.record) not in (source, None) or suite.name not in world.suites:
            raise ValueError(
                f"{bundle.name} did not learn from a world of the suite {suite.name} that judges {first.name} but from "
                f"{source_of(bundle.record)}; leave the choice of the suite to `vidistill eval {bundle.name}`"
            )
    codec: Codec = first.net if first.kind == "codec" else checkpoint.load_codec(first)
    rooms = Rooms(source, world, split, cfg.first_seed)
    data = suite.data(first, codec, rooms, cfg)
    makers = {"student": suite.student, "teacher": teacher_row, "codec": lambda bundle, *_: codec_row(bundle.net)}
    rows: dict[str, Row] = {row: makers[bundle.kind](bundle, codec, cfg) for row, bundle in bundles.items()}
    if not glance and "codec" not in bundles:
        rows |= {name: make(codec) for name, make in suite.rows.items()}
    wanted = {key: m for key, m in suite.metrics.items() if m.figure and (m.glance or not glance)}
    tallies = measure(wanted, rows, data)
    result = {name: figures(wanted, tally, tallies["real"]) for name, tally in tallies.items()}
    pictures = Pictures(data.fps)
    if not glance:
        shown = {name: tally.shown for name, tally in tallies.items() if "repeat" not in name}
        pictures.sheets.append(Sheet.beside("clips", shown, "Same start, same conditions.", "clip", data.fps * 0.4))
        if "motion" in tallies["real"].parts:
            quarter = report.quarter(data.fps)
            pictures.motion = {name: metrics.curve(t["motion"], quarter) for name, t in tallies.items()}
    return Judgement(bundles, codec, rooms, cfg, data, tallies, result, pictures)


@torch.inference_mode()
def measure(wanted: Mapping[str, Metric], rows: Mapping[str, Row], data: Data) -> dict[str, Tally]:
    """A tally for `real` and for every row, over all clips."""
    parts = {name: part for metric in wanted.values() for name, part in metric.parts.items()}
    tallies = {name: Tally(data) for name in ("real", *rows)}
    with tqdm(total=len(data.batches) * len(rows), unit="batch") as bar:
        for batch in data.batches:
            tallies["real"].add(parts, batch.px, batch)
            for name, row in rows.items():
                bar.set_description(f"clips: {name}")
                tallies[name].add(parts, row(batch), batch)
                bar.update()
    return tallies


def figures(wanted: Mapping[str, Metric], row: Tally, real: Tally) -> dict[str, Any]:
    """What the metrics say of a row; those that say nothing (None) are left out."""
    found = {key: metric.figure(row, real) for key, metric in wanted.items() if metric.figure}
    return {key: value for key, value in found.items() if value is not None}


# --- the commands -----------------------------------------------------------------------------------------------------


def evaluate(suite: Suite, name: str, cfg: Any = None, split: str = "test", **named: str | None) -> dict[str, Any]:
    """Figures of a checkpoint beside others and real video, plain numbers (None for what cannot be measured).

    Only figures of split "test" are to be published; settings are chosen on "validation".
    A teacher or a codec is judged alone, a student beside its teacher or the baselines that are `named`. With `cfg.out`
    a report is written; ImportError if it could not be drawn.
    """
    began, cfg = time.time(), cfg or suite.config()
    if cfg.out:
        report.check_plots()
    first = checkpoint.load(name)
    bundles = {first.kind: first}
    if first.kind == "student":
        bundles |= suite.others(first, named)
    if len({b.record.get("codec") for b in bundles.values()}) > 1:
        told = " and ".join(f"{b.name} in those of {b.record['codec']}" for b in bundles.values())
        raise ValueError(f"{first.name} and its teacher live in different latents: {told}")
    judged = judge(suite, bundles, cfg, split)
    suite.more(judged)
    for row, bundle in bundles.items():
        judged.result[row] = {"name": bundle.name, **judged.result[row]}
    taken = {"features": "probe features", "seconds_taken": round(time.time() - began, 1)}
    judged.result["protocol"] = {**asdict(cfg), "split": split, **judged.protocol, **taken}
    plain: dict[str, Any] = report.plain(judged.result)
    if cfg.out:
        report.write(
            report.folder_of(plain, suite.name, cfg.out), suite.metrics, plain, judged.pictures, suite.targets(plain)
        )
    return plain


def glance(suite: Suite, name: str | Bundle, cfg: Any = None) -> dict[str, Any]:
    """Figures of a student's clips against real video, without teacher, long streams or report: to watch a training and
    to choose, and so of validation alone."""
    student = name if isinstance(name, Bundle) else checkpoint.load(name, "student")
    found = judge(suite, {"student": student}, cfg or suite.config(), "validation", glance=True).result["student"]
    parts = {key: value for name in suite.spread for key, value in found.pop(name).items()}
    plain: dict[str, Any] = report.plain({**found, **parts})
    return plain


def run(
    suite: Suite, name: str, named: Mapping[str, str | None], split: str = "test", **settings: Any
) -> dict[str, Any]:
    """Judge a checkpoint by the protocol of a suite; table and targets go to stderr."""
    cfg = suite.config(**settings)
    result = evaluate(suite, name, cfg, split, **named)
    report.show(suite.metrics, result, suite.targets(result), cfg.out and report.folder_of(result, suite.name, cfg.out))
    return result
