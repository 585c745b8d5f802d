"""What all suites share: clips of student, teacher and codec beside real ones, long streams, figures, the report.

A suite is data, what a network is told of it, a table of metrics and a list of targets; a world in `worlds.WORLDS`
names the suite that judges its students.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle, CheckpointError
from vidistill.codecs import Codec
from vidistill.evaluation import report
from vidistill.evaluation.clips import (
    NOWHERE,
    Batch,
    Data,
    Row,
    Tally,
    Unfinished,
    codec_row,
    digest,
    real_row,
    student_row,
    teacher_row,
)
from vidistill.evaluation.intervals import add_intervals, bootstrap, compare, mean_of
from vidistill.evaluation.published import published
from vidistill.evaluation.report import Metric, Pictures, Sheet, Target
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import CURVES, StreamTally, check_finite, curve_drifts
from vidistill.io import check_folder
from vidistill.progress import Bar
from vidistill.worlds import WORLDS
from vidistill.worlds.spec import WorldSpec

RENAMED = {"frechet": "frechet_paired", "frechet_other_half": "frechet_unpaired"}  # keys of schema 1
QUICK = {"clips": 24, "long_seconds": 0.0, "seeds": 1, "draws": 100}
RUN_STEP = 7_919_000_003  # between the seeds of runs
CODEC_FRAMES = 22  # latents of a clip where only a codec is judged


# --- a suite ----------------------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """One evaluation as it goes on: what is judged, on what, and what was found."""

    bundles: Mapping[str, Bundle]
    codec: Codec
    rooms: Any  # what `Suite.place` gave
    cfg: Any
    data: Data
    tallies: Mapping[str, Sequence[Tally]]
    result: dict[str, Any]
    pictures: Pictures
    protocol: dict[str, Any] = field(default_factory=dict)
    unfinished: Unfinished = NOWHERE

    def add_streams(self, tallies: Mapping[str, StreamTally]) -> None:
        """The drift, curves and pictures of long streams, `real` and `student`."""
        fps, real = self.data.fps, tallies["real"]

        def drawn(index: Tensor, rng: np.random.Generator) -> dict[str, Any]:
            picked = {name: tally.pick(index) for name, tally in tallies.items()}
            return {name: curve_drifts(tally, picked["real"]) for name, tally in picked.items()}

        draws = bootstrap(torch.arange(len(real.curve("motion"))), drawn, self.cfg.draws)
        for name, tally in tallies.items():
            found = curve_drifts(tally, real)
            add_intervals(found, draws, name)
            self.result[name] |= found
            self.pictures.curves[name] = {c: metrics.curve(tally.curve(c), round(fps)) for c in CURVES}
        shown = {name: torch.cat(t.pictures, dim=1).numpy() for name, t in tallies.items()}
        caption = "Long streams, one picture for every window of the protocol."
        self.pictures.sheets.append(Sheet.beside("streams", shown, caption, "stream"))


def beside_student(student: Bundle, named: Mapping[str, str | None]) -> Mapping[str, Bundle]:
    """Its teacher, the one that is named or else the one in its card, and another student where one is named."""
    name, other = named.get("teacher"), named.get("vs")
    found = {"teacher": checkpoint.load(name, "teacher") if name else teacher_of(student)}
    return found | ({"vs": checkpoint.load(other, "student")} if other else {})


def find(name: str) -> Bundle:
    """A parent by the path in a card, or bundled under its last part."""
    try:
        return checkpoint.load_named(name)
    except CheckpointError:
        return checkpoint.load_named(Path(name).name)


def teacher_of(bundle: Bundle) -> Bundle:
    """The teacher a student descends from, by its card."""
    for name in reversed(bundle.record.get("card", {}).get("parents", [])):
        parent = find(name)
        return parent if parent.kind == "teacher" else teacher_of(parent)
    raise CheckpointError(f"the card of {bundle.name} names no teacher; say which one to compare it with")


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
            f"{', '.join(WORLDS)}, which are judged here, say nothing about it: name held-out clips of its own (--data)"
        )
    return source, WORLDS[source]


def bundled_rooms(suite: str, bundles: Mapping[str, Bundle], cfg: Any, split: str) -> Rooms:
    """Rooms of the world that checkpoints learned from; ValueError where they or the suite are of another one."""
    first = next(iter(bundles.values()))
    source, world = world_of(first.name, first.record)
    for bundle in bundles.values():
        if source_of(bundle.record) not in (source, None) or suite not in world.suites:
            raise ValueError(
                f"{bundle.name} did not learn from a world of the suite {suite} that judges {first.name} but from "
                f"{source_of(bundle.record)}; leave the choice of the suite to `vidistill eval {bundle.name}`"
            )
    return Rooms(source, world, split, cfg.first_seed)


@dataclass(frozen=True)
class Suite:
    """What one suite does its own way.

    data: the clips that a checkpoint is judged on. metrics: every figure, in the order of the report. more: what is
    judged beside clips; it may be given no student. rows: made beside the networks that are judged. spread: figures
    with parts that a glance shows by themselves. student: its clips. others: networks beside a student, some of them
    named by the user. quick: settings of a first look, whose intervals say how little it tells. place: where its clips
    come from, by the name of the suite: rooms of a bundled world, if not said otherwise. teacher: its clips. variants:
    rows that a student's row has more of.
    """

    name: str
    config: Callable[..., Any]
    data: Callable[[Bundle, Codec, Any, Any], Data]
    metrics: Mapping[str, Metric]
    targets: Callable[[Mapping[str, Any]], list[Target]]
    more: Callable[[Judgement], None] = lambda judged: None
    rows: Mapping[str, Callable[[Codec], Row]] = field(default_factory=dict)
    spread: tuple[str, ...] = ()
    student: Callable[[Bundle, Codec, Any], Row] = student_row
    others: Callable[[Bundle, Mapping[str, str | None]], Mapping[str, Bundle]] = beside_student
    quick: Mapping[str, Any] = field(default_factory=lambda: QUICK)
    place: Callable[[str, Mapping[str, Bundle], Any, str], Any] = bundled_rooms
    teacher: Callable[[Bundle, Codec, Any], Row] = teacher_row
    variants: Mapping[str, Callable[[Any], Row | None]] = field(default_factory=dict)


def clip_size(bundle: Bundle, codec: Codec, world: WorldSpec) -> tuple[int, int]:
    """(latents, pixels a side) of the clips that a checkpoint is judged on: as those that it learned from."""
    if bundle.kind == "codec":
        return CODEC_FRAMES, world.config().size
    return bundle.shape.frames, bundle.shape.width * codec.spatial_factor


def judge(suite: Suite, bundles: Mapping[str, Bundle], cfg: Any, split: str, glance: bool = False) -> Judgement:
    """Figures of `real` and every row on the clips of a split."""
    first = next(iter(bundles.values()))
    rooms = suite.place(suite.name, bundles, cfg, split)
    codec: Codec = first.net if first.kind == "codec" else checkpoint.load_codec(first)
    data = suite.data(first, codec, rooms, cfg)
    makers = {"student": suite.student, "teacher": suite.teacher, "codec": lambda bundle, *_: codec_row(bundle.net)}
    rows: dict[str, Row] = {row: makers[bundle.kind](bundle, codec, cfg) for row, bundle in bundles.items()}
    if not glance and "codec" not in bundles:
        rows |= {name: make(codec) for name, make in suite.rows.items()}
    if "student" in bundles:
        rows |= {name: row for name, make in suite.variants.items() if (row := make(rows["student"]))}
    wanted = {key: m for key, m in suite.metrics.items() if m.figure and (m.glance or not glance)}
    runs = {"student": 1 if glance else cfg.seeds, "teacher": cfg.teacher_seeds}
    kept = Unfinished("" if glance else cfg.cache, "" if glance else fingerprint(bundles, codec, cfg, wanted, data))
    counts = {row: runs.get(bundle.kind, 1) for row, bundle in bundles.items()}
    tallies = measure(wanted, rows, data, counts, kept)
    result = {name: run_figures(wanted, own, tallies["real"][0]) for name, own in tallies.items()}
    if not glance:
        add_certainty(wanted, result, tallies, bundles, cfg.draws)
    pictures = Pictures(data.fps)
    if not glance:
        shown = {name: own[0].shown for name, own in tallies.items() if "repeat" not in name}
        every, caption = data.fps * data.every, "Same start, same conditions."
        pictures.sheets.append(Sheet.beside("clips", shown, caption, "clip", every, data.names, video=True))
        if "motion" in tallies["real"][0].parts:
            quarter = report.quarter(data.fps)
            pictures.motion = {name: metrics.curve(own[0]["motion"], quarter) for name, own in tallies.items()}
    return Judgement(bundles, codec, rooms, cfg, data, tallies, result, pictures, unfinished=kept)


def stamps(path: str) -> list[tuple[str, int, int]]:
    """Name, bytes and time of a file, or of those in a folder."""
    found = sorted(p for p in (Path(path), *Path(path).rglob("*")) if p.is_file())
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found]


def fingerprint(bundles: Mapping[str, Bundle], codec: Codec, cfg: Any, wanted: Mapping[str, Metric], data: Data) -> str:
    """All that the measurements of clips depend on, but the clips: also the weights of what judges, whatever file they
    are read from."""
    told = {row: {k: v for k, v in bundle.record.items() if k != "card"} for row, bundle in bundles.items()}
    nets = {row: digest(bundle.net.state_dict()) for row, bundle in bundles.items()}
    shown = digest(codec.state_dict()) if isinstance(codec, nn.Module) else ""
    judges: list[Any] = [stamps(path) for path in cfg.metrics.values() if path]
    judges += [digest(data.probe.state_dict())] if data.probe else []
    judges += [digest({"reader": data.reader.weights})] if data.reader else []
    return json.dumps(
        [told, nets, shown, judges, {**asdict(cfg), "out": ""}, sorted(wanted), checkpoint.git_commit()], default=str
    )


@torch.inference_mode()
def measure(
    wanted: Mapping[str, Metric],
    rows: Mapping[str, Row],
    data: Data,
    runs: Mapping[str, int] = {},
    unfinished: Unfinished = NOWHERE,
) -> dict[str, list[Tally]]:
    """Tallies for `real` and for every row over all clips, one for each of its `runs` with noise of its own."""
    parts = {name: part for metric in wanted.values() for name, part in metric.parts.items()}
    tallies = {name: [Tally(data) for _ in range(runs.get(name, 1))] for name in ("real", *rows)}
    with Bar(len(data.batches) * sum(map(len, tallies.values())), unit="batch") as bar:
        for batch in data.batches:
            for name, row in {"real": real_row, **rows}.items():
                bar.describe(f"clips: {name}")
                for k, tally in enumerate(tallies[name]):
                    own = replace(batch, seed=batch.seed + k * RUN_STEP)
                    unfinished.add(f"{name} {k}", partial(add_row, name, tally, parts, row, own), tally, own)
                    bar.update()
    return tallies


def add_row(name: str, tally: Tally, parts: Mapping[str, Callable[..., Tensor]], row: Row, batch: Batch) -> None:
    """Measure the clips that a row shows for a batch."""
    px = row(batch)
    check_finite(px, f"clips of {name}")
    tally.add(parts, px, batch)


def figures(wanted: Mapping[str, Metric], row: Tally, real: Tally) -> dict[str, Any]:
    """What the metrics say of a row; those that say nothing (None) are left out."""
    found = {key: metric.figure(row, real) for key, metric in wanted.items() if metric.figure}
    return {key: value for key, value in found.items() if value is not None}


def run_figures(wanted: Mapping[str, Metric], runs: Sequence[Tally], real: Tally) -> dict[str, Any]:
    """The mean of the figures of several runs."""
    found: dict[str, Any] = mean_of([figures(wanted, row, real) for row in runs])
    return found


def add_certainty(
    wanted: Mapping[str, Metric],
    result: dict[str, Any],
    tallies: Mapping[str, Sequence[Tally]],
    networks: Collection[str],
    count: int,
) -> None:
    """Intervals of all figures, and how the student differs from the other `networks`, by the names of their rows."""

    def drawn(index: Tensor, rng: np.random.Generator) -> dict[str, Any]:
        real = tallies["real"][0].pick(index)
        noise = {name: rng.integers(len(own), size=len(own)) for name, own in tallies.items() if name != "real"}
        picked = {name: [tallies[name][k].pick(index) for k in runs] for name, runs in noise.items()}
        return {name: run_figures(wanted, own, real) for name, own in {**picked, "real": [real]}.items()}

    draws = bootstrap(tallies["real"][0]["rooms"], drawn, count)
    others = [row for row in networks if row != "student"] if "student" in networks else []
    difference = {f"student - {row}": compare(wanted, result, draws, "student", row) for row in others}
    for name, row in result.items():
        add_intervals(row, draws, name)
    if difference:
        result["difference"] = difference


def extended(suite: Suite, cfg: Any) -> Suite:
    """The suite with the published metrics that are asked for."""
    missing = {name: path for name, path in cfg.metrics.items() if name.replace(".", "_") not in suite.metrics}
    return replace(suite, metrics={**suite.metrics, **published(missing, cfg.allow_pickle)}) if missing else suite


# --- the commands -----------------------------------------------------------------------------------------------------


def evaluate(
    suite: Suite, name: str, cfg: Any = None, split: str = "test", quick: bool = False, **named: str | None
) -> dict[str, Any]:
    """Figures of a checkpoint beside others and real video, plain numbers (None for what cannot be measured).

    Settings are chosen on split "validation"; what is published is of "test". A teacher or a codec is judged alone, a
    student beside its teacher or the baselines that are `named`; `quick`: clips of the student alone. With `cfg.out` a
    report is written; ImportError if it could not be drawn.
    """
    began, cfg = time.time(), cfg or suite.config()
    suite = extended(suite, cfg)
    if cfg.out:
        report.check_plots()
        check_folder(Path(cfg.out))
    first = checkpoint.load(name)
    bundles = {first.kind: first}
    if first.kind == "student" and not quick:
        bundles |= suite.others(first, named)
    if len({b.record.get("codec") for b in bundles.values()}) > 1:
        told = " and ".join(f"{b.name} in those of {b.record['codec']}" for b in bundles.values())
        raise ValueError(f"{first.name} and its teacher live in different latents: {told}")
    if cfg.out:
        rows = {row: {"name": bundle.name} for row, bundle in bundles.items()}
        report.check_out(report.folder_of(rows, suite.name, cfg.out))
    judged = judge(suite, bundles, cfg, split)
    if not quick:
        suite.more(judged)
    for row, bundle in bundles.items():
        judged.result[row] = {"name": bundle.name, **judged.result[row]}
    taken = {"features": "probe features", "seconds_taken": round(time.time() - began, 1)}
    if "teacher" in bundles and cfg.cache:
        taken["teacher_samples_bytes"] = sum(file.stat().st_size for file in Path(cfg.cache).glob("*.safetensors"))
    judged.result |= {"schema": 2, "renamed": RENAMED}
    judged.result["protocol"] = {**asdict(cfg), "split": split, **judged.protocol, **taken}
    plain: dict[str, Any] = report.plain(judged.result)
    judged.unfinished.done()
    if cfg.out:
        report.write(
            report.folder_of(plain, suite.name, cfg.out), suite.metrics, plain, judged.pictures, suite.targets(plain)
        )
    return plain


def glance(suite: Suite, name: str | Bundle, cfg: Any = None) -> dict[str, Any]:
    """Figures of a student's clips against real video, without teacher, long streams or report: to watch a training and
    to choose, and so of validation alone."""
    student = name if isinstance(name, Bundle) else checkpoint.load(name, "student")
    cfg = cfg or suite.config()
    suite = extended(suite, cfg)
    found = judge(suite, {"student": student}, cfg, "validation", glance=True).result["student"]
    parts = {key: value for name in suite.spread for key, value in found.pop(name).items()}
    plain: dict[str, Any] = report.plain({**found, **parts})
    return plain


def choose_guidance(suite: Suite, name: str, scales: Sequence[float], cfg: Any) -> dict[str, Any]:
    """The guidance scale at which a teacher is nearest to real video of the validation split, and why it is that one.

    The least `frechet_paired` is chosen; the rest are told with their intervals and the paired difference to it.
    """
    suite, teacher = extended(suite, cfg), checkpoint.load(name, "teacher")
    codec: Codec = checkpoint.load_codec(teacher)
    data = suite.data(teacher, codec, suite.place(suite.name, {"teacher": teacher}, cfg, "validation"), cfg)
    rows = {f"{scale:g}": teacher_row(teacher, codec, replace(cfg, guidance=scale)) for scale in scales}
    wanted = {key: m for key, m in suite.metrics.items() if m.figure and m.glance}
    tallies = measure(wanted, rows, data)
    found = {scale: run_figures(wanted, tallies[scale], tallies["real"][0]) for scale in rows}
    best = min(found, key=lambda scale: found[scale]["frechet_paired"])
    result: dict[str, Any] = {"student": found[best], **found}
    add_certainty(wanted, result, {**tallies, "student": tallies[best]}, ["student", *found], cfg.draws)
    lost = {scale: result["difference"][f"student - {scale}"]["frechet_paired"] for scale in found if scale != best}
    clear = [scale for scale, d in lost.items() if d.get("verdict") == "better"]
    why = f"least frechet_paired ({found[best]['frechet_paired']:.3g}) of {', '.join(found)} on validation; clearly "
    why += f"less than at {', '.join(clear)}" if clear else "less than at none"
    own = {"teacher": teacher.name, "split": "validation", "clips": cfg.clips, "steps": cfg.steps}
    plain: dict[str, Any] = report.plain({**own, "guidance": float(best), "why": why, "scales": found, "lost": lost})
    return plain


def run(
    suite: Suite, name: str, named: Mapping[str, str | None], split: str, quick: bool, **settings: Any
) -> dict[str, Any]:
    """Judge a checkpoint by the protocol of a suite; table and targets go to stderr."""
    cfg = suite.config(**{**(suite.quick if quick else {}), **settings})
    suite = extended(suite, cfg)
    result = evaluate(suite, name, cfg, split, quick, **named)
    report.show(suite.metrics, result, suite.targets(result), cfg.out and report.folder_of(result, suite.name, cfg.out))
    return result
