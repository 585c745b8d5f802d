"""A student of any world judged on held-out clips of it: `vidistill eval NAME --data HELD_OUT`.

Nothing is known of such a world but its clips. Features for distances, and a reader of actions, are learned from its
training clips (`own_probe`); where an environment is deterministic it is asked for the true future of other actions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill import metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import POSE_SITE, VIEW_SITE, Condition
from vidistill.diffusion import derived_seed
from vidistill.evaluation import quality
from vidistill.evaluation.clips import (
    DRIFTS,
    Batch,
    Data,
    Tally,
    codec_row,
    picture_ratios,
    read_parts,
    repeat_row,
    student_row,
    teacher_row,
)
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.footage import Footage, Windows, check_fits, check_world
from vidistill.evaluation.intervals import LEAST_ROOMS, add_intervals, bootstrap
from vidistill.evaluation.own_probe import PACE, OwnProbeConfig, own_probe
from vidistill.evaluation.report import Metric, Target
from vidistill.evaluation.streams import StreamTally, pieces
from vidistill.evaluation.suite import CODEC_FRAMES, Judgement, Suite, measure
from vidistill.io import to_float
from vidistill.progress import Bar, track
from vidistill.worlds.futures import true_future

FUTURES = (0.5, 1.0)  # seconds after which a true future is compared
PIECE = 64  # px frames of real video measured at once


@dataclass(frozen=True)
class AnyWorldConfig(SuiteConfig):
    """`data`: a folder of splits, or that of one split with `train` beside it. `window`: seconds at both ends of a long
    stream that are compared; `futures`: episodes whose true future is asked for, where it can be."""

    clips: int = 128
    batch: int = 16
    streams: int = 8
    window: float = 4.0
    stride: int = 2
    futures: int = 32
    data: str = ""
    own_probe: OwnProbeConfig = field(default_factory=OwnProbeConfig)

    @property
    def span(self) -> float:
        return self.window


def footage_of(suite: str, bundles: Mapping[str, Bundle], cfg: AnyWorldConfig, split: str) -> Footage:
    """The held-out footage that is asked for."""
    if not cfg.data:
        raise ValueError("eval.data is empty: name a folder of held-out clips (--data)")
    if cfg.first_seed:
        raise ValueError(f"eval.first_seed is {cfg.first_seed}: recorded clips (--data) have no seeds to choose from")
    footage = Footage.open(cfg.data, split)
    for bundle in bundles.values():
        check_world(bundle, footage)
    return footage


def held_out(bundle: Bundle, codec: Codec, footage: Footage, cfg: AnyWorldConfig) -> Data:
    """Clips of held-out footage as long as those that a checkpoint was trained on."""
    check_fits(bundle, codec, footage)
    latents = CODEC_FRAMES if bundle.kind == "codec" else bundle.shape.frames
    footage.windows(footage.length(latents, codec.temporal_factor), cfg.clips)  # before minutes of training
    with Bar(cfg.own_probe.steps, "features of this world", "step") as bar:
        own = own_probe(footage, codec, cfg.own_probe, lambda step: bar.update())
    windows = Windows(footage, codec, latents, cfg.clips, cfg.batch, cfg.seed, own.classes)
    return Data(windows, footage.fps, own.probe, own.classes.heads, cfg.stride, fitted=True)


# --- figures ----------------------------------------------------------------------------------------------------------


def following(row: Tally, roll: int = 0) -> float | None:
    """Balanced accuracy of the actions that are read back; None in a world without actions."""
    return quality.following(row, roll=roll) if row.data.heads else None


def chance(row: Tally) -> float | None:
    return following(row, max(1, len(row["read"]) // 2))


def above_chance(row: Tally, real: Tally) -> float | None:
    """Following beyond that of other clips' actions, as a share of what there is: 0 by luck, 1 if all is read back."""
    own, luck = following(row), chance(row)
    if own is None or luck is None:
        return None
    return (own - luck) / (1 - luck) if luck < 1 else math.nan  # one class alone is read back by luck as well


def by_action(row: Tally, real: Tally) -> dict[str, float] | None:
    """Balanced accuracy of every action by its name; None in a world without actions."""
    named = dict(zip(windows_of(row.data).classes.edges, row.data.heads, strict=True))
    return {name: quality.following(row, head) or 0.0 for name, head in named.items()} or None


def windows_of(data: Data) -> Windows:
    assert isinstance(data.batches, Windows)
    return data.batches


def of_pace(row: Tally, real: Tally) -> float | None:
    """Share of stacks that are read as played forwards at their own pace; None in a world with actions."""
    return float((row["pace"] == 0).double().mean()) if not row.data.heads else None


def no_future(figure: Any) -> Any:
    """A figure against the recorded future, which a clip that was given no picture does not continue."""
    return lambda row, real: figure(row, real) if bool(row["begun"].all()) else None


BEGUN = {"begun": lambda v: torch.full((len(v.px),), v.batch.given)}
METRICS = {
    "frechet_paired": replace(
        quality.METRICS["frechet_paired"],
        text="Frechet distance of learned features to real video of the same clips",
        parts=read_parts() | {"episodes": lambda v: v.batch.facts["episodes"]} | BEGUN,
    ),
    "frechet_unpaired": replace(
        quality.METRICS["frechet_unpaired"], text="the same to real video of other episodes, half as many clips"
    ),
    "action_following": Metric(
        "balanced accuracy of actions a network reads back, mean", lambda row, _: following(row), best="high"
    ),
    "action_chance": Metric("the same against the actions of other clips", lambda row, _: chance(row)),
    "action_above_chance": Metric("what following has beyond that, 0 to 1", above_chance, best="high"),
    "action_following_each": Metric("balanced accuracy of one action", by_action, best="high"),
    "pace": Metric(
        "share of frames read as played forwards at their own pace",
        of_pace,
        {"pace": lambda v: v.reading.labels.get(PACE, torch.zeros(v.reading.features.shape[:2]))},
        best="high",
    ),
    **picture_ratios(),
    **{name: quality.METRICS[name] for name in ("flat_frames", "stuck_frames", "returns")},
    "psnr": Metric(None, no_future(quality.psnr), best="high"),
    "psnr_by_horizon": replace(quality.METRICS["psnr_by_horizon"], figure=no_future(quality.psnr_by_horizon)),
    "psnr_above_repeat": Metric(
        "dB above the start picture repeated, against the true future of other actions", best="high"
    ),
    **DRIFTS,
}


def targets(result: Mapping[str, Any]) -> list[Target]:
    student, real, out = result.get("student"), result.get("real"), list[Target]()
    if not student or not real:
        return out
    for name in ("sharpness_ratio", "saturation_ratio", "motion_ratio"):
        out.append(Target(f"student's {name}", student[name], 0.8, 1.2))
    if (limit := real.get("action_above_chance")) is not None:
        out.append(Target("student's actions read above chance", student["action_above_chance"], 0.9 * limit))
    if "psnr_above_repeat" in student:
        out.append(Target("student's PSNR at 0.5 s above a still picture, dB", student["psnr_above_repeat"]["0.5"], 0))
    return out


# --- true futures and long streams ------------------------------------------------------------------------------------


def beyond_clips(judged: Judgement) -> None:
    """What is judged beside clips: the true future of other actions, and long streams."""
    judged.protocol |= {"probe": str(judged.rooms.training.parent), "clips": len(windows_of(judged.data).windows)}
    for row in ("student", "teacher", "real"):
        if row in judged.result:
            judged.result[row] |= dict.fromkeys(DRIFTS)
    true_futures(judged)
    if "student" in judged.bundles and judged.cfg.long_seconds:
        long_streams(judged)


@torch.inference_mode()
def true_futures(judged: Judgement) -> None:
    """PSNR to what an environment shows when an episode's start is played on with another episode's actions."""
    footage, cfg, codec = judged.rooms, judged.cfg, judged.codec
    if not footage.meta.get("deterministic") or not judged.data.heads:
        judged.protocol["true_futures"] = 0
        return
    batch, ends = future_batch(judged)
    judged.protocol["true_futures"] = 0 if batch is None else len(batch.px)
    if batch is None:
        return
    makers = {"student": student_row, "teacher": teacher_row}
    rows = {row: makers[b.kind](b, codec, cfg) for row, b in judged.bundles.items() if b.kind in makers}
    runs = {row: cfg.seeds if row == "student" else cfg.teacher_seeds for row in rows}
    wanted = {"psnr": Metric(parts=quality.ERROR)}
    tallies = measure(wanted, {**rows, "repeat": repeat_row}, Data([batch], footage.fps), runs)

    def gains(picked: Mapping[str, Any], index: Tensor | slice = slice(None)) -> dict[str, Any]:
        found = {}
        for row in rows:
            errors = torch.stack([tally["error"][index] for tally in picked[row]]).double().mean((0, 1))
            still = picked["repeat"][0]["error"][index].double().mean(0)
            gain = metrics.decibels(errors) - metrics.decibels(still)
            found[row] = {"psnr_above_repeat": {name: float(gain[t]) for name, t in ends.items()}}
        return found

    def drawn(index: Tensor, rng: np.random.Generator) -> dict[str, Any]:
        noise = {row: rng.integers(len(own), size=len(own)) for row, own in tallies.items()}
        return gains({row: [tallies[row][k] for k in picked] for row, picked in noise.items()}, index)

    draws = bootstrap(torch.arange(len(batch.px)), drawn, cfg.draws)
    for row, found in gains(tallies).items():
        add_intervals(found, draws, row)
        judged.result[row] |= found


def future_batch(judged: Judgement) -> tuple[Batch | None, dict[str, int]]:
    """Starts of episodes, the actions of the next ones, and what the environment shows of them; and the frames after
    which they are compared. None where the environment ends too soon."""
    footage, codec, cfg = judged.rooms, judged.codec, judged.cfg
    factor, bundle = codec.temporal_factor, next(iter(judged.bundles.values()))
    ends = {f"{s:g}": round(s * footage.fps) for s in FUTURES}
    latents = 1 + math.ceil(max(ends.values()) / factor)
    if bundle.kind == "student":
        latents = next(n for k in range(1, latents + 1) if (n := bundle.net.first_frame(k)) >= latents)
    length, px_frames = footage.length(latents, factor), codec.px_frames(latents)
    lengths = footage.clips.lengths("actions")
    long = [k for k, rows in enumerate(lengths) if rows >= length]
    starts, true = [], []
    for k, other in zip(long[: cfg.futures], long[1 : cfg.futures + 1] + long[:1], strict=False):
        actions = footage.actions((other, 0), length, factor).numpy()
        frames = true_future(footage.meta, footage.meta["described"][k], actions)
        if len(frames) >= px_frames:
            starts.append((other, 0))
            true.append(frames[:px_frames])
    if len(true) < LEAST_ROOMS:
        return None, ends
    condition = partial(footage.condition, starts, length)
    return Batch(to_float(np.stack(true)), condition, derived_seed(cfg.seed, 777_777)), ends


@torch.inference_mode()
def long_streams(judged: Judgement) -> None:
    """Streams at constant memory that are told over and over what an episode was, beside that episode to and fro."""
    footage, cfg, codec, data = judged.rooms, judged.cfg, judged.codec, judged.data
    student, factor = judged.bundles["student"], codec.temporal_factor
    lengths = footage.clips.lengths("frames" if footage.of_frames else "latents")
    longest = sorted(range(len(lengths)), key=lambda k: -lengths[k])[: cfg.streams]
    own = min(lengths[k] for k in longest)
    latents = 1 + (own - 1) // factor if footage.of_frames else own
    length = math.ceil(cfg.long_seconds * footage.fps) + 1
    camera = student.spec.played.camera
    if camera is not None and {POSE_SITE, VIEW_SITE}.intersection(camera.sites):  # a pose that jumps back is no walk
        length = min(length, codec.px_frames(latents))
    if length < 2 * round(cfg.window * footage.fps):
        judged.protocol["long_streams"] = 0
        return
    windows = [(k, 0) for k in longest]
    given = codec.encode(footage.px(windows, footage.length(1, factor), codec))
    cond = footage.condition(windows, footage.length(latents, factor), student, codec, given)
    chunks = next(k for k in range(1, length + 2) if codec.px_frames(student.net.first_frame(k)) >= length)
    again = around(student.net.first_frame(chunks), latents)
    cond = Condition(
        cond.tokens,
        {site: x[:, again] for site, x in cond.per_frame.items()},
        None if cond.channels is None else cond.channels[:, again],
    )
    tallies = {name: StreamTally(length, round(cfg.window * footage.fps)) for name in ("real", "student")}
    real = torch.stack([footage.episode(k, codec)[: codec.px_frames(latents)] for k in longest])
    for times in to_and_fro(length, real.shape[1]).split(PIECE):
        tallies["real"].add(to_float(real[:, times].numpy()))
    start = given if footage.clips.given else given[:, :0]
    seed = derived_seed(cfg.seed, 999_983)
    made = pieces(student, codec, start, cond, chunks, seed, cfg.precision)
    for px in track(made, f"{len(longest)} streams", total=chunks, unit="chunk"):
        tallies["student"].add(px)
    judged.protocol["long_streams"] = len(longest)
    judged.add_streams(tallies)
    if data.heads:
        classes, whole = windows_of(data).classes, footage.length(latents, factor)
        asked = torch.stack([classes(footage.actions(window, whole, factor)) for window in windows])
        asked = asked[:, around(length, asked.shape[1])]
        quality.add_late_following(judged.result["student"], tallies["student"], asked, data, cfg.draws)


def around(count: int, period: int) -> Tensor:
    """Indices [count] that begin with 0, and then go through 1..period - 1 over and over."""
    return torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.arange(count - 1) % (period - 1)))


def to_and_fro(count: int, length: int) -> Tensor:
    """Indices [count] that go from 0 to length - 1 and back, over and over: real video without a cut."""
    phase = torch.arange(count) % (2 * (length - 1))
    return torch.minimum(phase, 2 * (length - 1) - phase)


QUICK = {"clips": 24, "long_seconds": 0.0, "futures": 8, "seeds": 1, "draws": 100}
ROWS = {"codec": codec_row, "repeat": lambda codec: repeat_row}
SUITE = Suite(
    "any_world", AnyWorldConfig, held_out, METRICS, targets, beyond_clips, ROWS, quick=QUICK, place=footage_of
)
