"""Does a student that listens to text show what it is told, before and after a switch? Judged beside its teacher."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition, branches
from vidistill.conditioning.script import Cue
from vidistill.data import types
from vidistill.diffusion import derived_seed
from vidistill.evaluation import report
from vidistill.evaluation.probes import SHAPES, Probe, Reading, load_probe, read
from vidistill.evaluation.quality import teacher_of
from vidistill.evaluation.tally import PICTURE_CURVES, StreamTally, curve_drifts
from vidistill.io import contact_sheet, save_png, to_float
from vidistill.ops.precision import autocast, working_dtype
from vidistill.rollout import roll_out
from vidistill.sampling import sample
from vidistill.streaming.prompt_switch import SWITCHES
from vidistill.streaming.session import StreamConfig, StreamSession, refused_switches
from vidistill.worlds import shapes
from vidistill.worlds.shapes import ATTRIBUTES, ShapesConfig

ASKED = ("colour", "shape", "motion")  # what a shape must show to be the one that was asked for
STEADY = 0.8  # share of the next second's readings that must be right
SECOND_SEEDS = 500_000  # held-out scenes that streams are switched to


@dataclass(frozen=True)
class AdherenceConfig:
    """The protocol: `clips` held-out captions, each streamed for `before` s, then switched to another for `after` s.

    `window`: seconds at the end of both parts that are judged. `long_seconds`: of `streams` streams, 0: no drift.
    """

    clips: int = 96
    batch: int = 32
    before: float = 5.0
    after: float = 8.0
    window: float = 3.0
    streams: int = 8
    long_seconds: float = 60.0
    steps: int = 50
    guidance: float | None = None  # None: what the teacher's record says, else 1
    stride: int = 2
    seed: int = 0
    probe: str | None = None  # None: the bundled one
    precision: str = "auto"
    out: str = "out/eval"

    def __post_init__(self) -> None:
        for name in ("clips", "batch", "before", "after", "window", "steps", "stride"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval.{name} must be positive, got {getattr(self, name)}")
        if self.clips < 2 or self.streams < 1 or not (self.long_seconds == 0 or self.long_seconds >= 2 * self.window):
            raise ValueError(
                f"eval needs 2 clips or more, a stream, and long_seconds 0 or at least 2 x {self.window}; got "
                f"{self.clips}, {self.streams} and {self.long_seconds}"
            )
        if self.window > min(self.before, self.after):
            raise ValueError(f"eval.window {self.window} must fit {self.before} s before and {self.after} s after")


Scenes = list[tuple[dict[str, str], str]]  # attributes and caption


def scenes(count: int, first: int = 0) -> Scenes:
    return [shapes.describe(types.HELD_OUT_SEED + first + k) for k in range(count)]


def right(reading: Reading, captions: Scenes) -> dict[str, Tensor]:
    """Where [B, n] a reading shows what was told, by attribute."""
    out = {}
    for name, words in ATTRIBUTES.items():
        own = torch.tensor([words.index(labels[name]) for labels, _ in captions])[:, None]
        out[name] = reading.labels[name] == own
    return out


def accuracy(reading: Reading, captions: Scenes) -> dict[str, float]:
    """Share of readings that show what was told, by attribute; `asked`: mean of colour, shape and motion."""
    shares = {name: float(hit.double().mean()) for name, hit in right(reading, captions).items()}
    return {**shares, "asked": sum(shares[name] for name in ASKED) / len(ASKED)}


def time_to_adherence(reading: Reading, captions: Scenes, switched: int, fps: float) -> dict[str, float]:
    """Seconds from px frame `switched` until colour, shape and motion are right and stay so for a second.

    `median_s` over the streams that get there, and the share that does (`reached`).
    """
    hits = right(reading, captions)
    whole = torch.stack([hits[name] for name in ASKED]).all(0)
    stride = int(reading.times[1] - reading.times[0])
    span = max(1, round(fps / stride))
    found = []
    for row in whole:
        ahead = row.double().unfold(0, span, 1).mean(-1) >= STEADY
        good = ahead & row[: len(ahead)] & (reading.times[: len(ahead)] >= switched)
        if bool(good.any()):
            found.append(float(reading.times[int(good.nonzero()[0])] - switched) / fps)
    median = statistics.median(found) if found else math.nan
    return {"median_s": median, "reached": len(found) / len(captions)}


def picture_figures(px: Tensor, real: Tensor, reading: Reading, truth: Reading) -> dict[str, float]:
    """Frechet distance of probe features and the usual ratios against real clips of the same captions."""
    out = {"frechet": metrics.frechet(reading.features.flatten(0, 1), truth.features.flatten(0, 1))}
    for name, measure in {**PICTURE_CURVES, "motion": metrics.motion, "flicker": metrics.flicker}.items():
        out[f"{name}_ratio"] = metrics.ratio(float(measure(px).mean()), float(measure(real).mean()))
    return out


def real_clips(captions: Scenes, frames: int, first: int, size: int) -> Tensor:
    """Drawn clips [B, T, 3, H, W] of scenes."""
    cfg = ShapesConfig(size=size, num_frames=frames)
    drawn = [shapes.draw(cfg, labels, types.HELD_OUT_SEED + first + k) for k, (labels, _) in enumerate(captions)]
    return torch.stack([to_float(px) for px in drawn])


@torch.inference_mode()
def teacher_clips(teacher: Bundle, codec: Codec, captions: Scenes, cfg: AdherenceConfig, seed: int) -> Tensor:
    """Clips [B, T, 3, H, W] that the teacher samples from captions alone."""
    encode = checkpoint.text_encoder(teacher.record)
    assert encode is not None
    scale = float(teacher.record.get("guidance", 1.0)) if cfg.guidance is None else cfg.guidance
    shape, rng, parts = teacher.shape, torch.Generator().manual_seed(seed), []
    for i in tqdm(range(0, len(captions), cfg.batch), "teacher", unit="batch"):
        cond = Condition(encode([words for _, words in captions[i : i + cfg.batch]]))
        assert cond.tokens is not None
        size = (len(cond.tokens), shape.frames, shape.channels, shape.height, shape.width)
        noise = torch.randn(size, generator=rng)
        nulls, scales = branches(cond, scale)
        with autocast(cfg.precision):
            x = sample(teacher.net, noise, teacher.noise.steps(cfg.steps), cond, nulls=nulls, scales=scales).float()
        parts.append(codec.decode(x))
    return torch.cat(parts)


@torch.inference_mode()
def student_clips(student: Bundle, codec: Codec, captions: Scenes, cfg: AdherenceConfig) -> Tensor:
    """Clips [B, T, 3, H, W] of the student's own rollouts under one caption each, as long as it was trained on."""
    encode, net = checkpoint.text_encoder(student.record), student.net
    assert encode is not None
    parts, dtype = [], working_dtype(cfg.precision)
    for i in tqdm(range(0, len(captions), cfg.batch), "student", unit="batch"):
        cond = Condition(encode([words for _, words in captions[i : i + cfg.batch]]))
        size = len(captions[i : i + cfg.batch]), student.shape.frames
        with autocast(cfg.precision):
            x = roll_out(net, student.schedule, cond, size, seed=derived_seed(cfg.seed, i), dtype=dtype)
        parts.append(codec.decode(x.float()))
    return torch.cat(parts)


def switched_streams(
    student: Bundle, codec: Codec, first: Scenes, second: Scenes, policy: str, cfg: AdherenceConfig
) -> Tensor:
    """Streams [B, T, 3, H, W] that are told a caption, and `cfg.before` seconds later another one."""
    out = []
    for k in tqdm(range(len(first)), f"switch: {policy}", unit="stream"):
        with StreamSession(student, codec, StreamConfig(seed=cfg.seed + k, pipelined=False)) as session:
            cues = [Cue(0.0, first[k][1]), Cue(cfg.before, second[k][1], policy)]
            out.append(to_float(session.record(round((cfg.before + cfg.after) * session.fps), cues=cues)))
    return torch.stack(out)


def judge_switch(
    px: Tensor, first: Scenes, second: Scenes, probe: Probe, fps: float, cfg: AdherenceConfig
) -> dict[str, Any]:
    """Accuracy before and after the switch, and the time it takes."""
    at, n = round(cfg.before * fps), round(cfg.window * fps)
    before, after = read(probe, px[:, at - n : at], cfg.stride), read(probe, px[:, -n:], cfg.stride)
    whole = read(probe, px, cfg.stride)
    return {
        "before": accuracy(before, first),
        "after": accuracy(after, second),
        "time_to_adherence": time_to_adherence(whole, second, at, fps),
    }


def long_drift(student: Bundle, codec: Codec, captions: Scenes, cfg: AdherenceConfig) -> dict[str, Any]:
    """Drift of long streams under one caption each, against drawn ones."""
    made, drawn = [], []
    for k in tqdm(range(min(cfg.streams, len(captions))), "long streams", unit="stream"):
        with StreamSession(student, codec, StreamConfig(seed=cfg.seed + k, pipelined=False)) as session:
            frames, fps = round(cfg.long_seconds * session.fps), session.fps
            made.append(to_float(session.record(frames, cues=[Cue(0.0, captions[k][1])])))
        drawn.append(real_clips(captions[k : k + 1], frames, k, made[-1].shape[-1])[0])
    tallies = []
    for clips in (made, drawn):
        tally = StreamTally(frames, round(cfg.window * fps))
        tally.add(torch.stack(clips))
        tallies.append(tally)
    return curve_drifts(*tallies)


def glance(name: str | Bundle, cfg: AdherenceConfig = AdherenceConfig()) -> dict[str, Any]:
    """Figures of a student's clips against drawn ones, without teacher, switches or report."""
    student = name if isinstance(name, Bundle) else checkpoint.load(name, "student")
    codec, probe = checkpoint.load_codec(student), load_probe(cfg.probe, SHAPES)
    captions = scenes(cfg.clips)
    px = student_clips(student, codec, captions, cfg)
    real = real_clips(captions, px.shape[1], 0, px.shape[-1])
    seen, truth = read(probe, px, cfg.stride), read(probe, real, cfg.stride)
    return report.plain({**picture_figures(px, real, seen, truth), **accuracy(seen, captions)})


def evaluate(name: str, teacher_name: str | None = None, cfg: AdherenceConfig = AdherenceConfig()) -> dict[str, Any]:
    """Figures of student, teacher and drawn video on held-out captions, every switch policy, and drift.

    `before` and `after` of the teacher are whole clips under the first and the second caption.
    """
    student = checkpoint.load(name, "student")
    teacher = checkpoint.load(teacher_name, "teacher") if teacher_name else teacher_of(student)
    codec, probe = checkpoint.load_codec(student), load_probe(cfg.probe, SHAPES)
    first, second = scenes(cfg.clips), scenes(cfg.clips, SECOND_SEEDS)
    policies = [policy for policy in SWITCHES if policy not in refused_switches(student)]
    real = real_clips(first, codec.px_frames(student.shape.frames), 0, student.shape.width * codec.spatial_factor)
    read(probe, real[:1], cfg.stride)  # pictures that it cannot read are refused before any are made
    clips = {
        "student": student_clips(student, codec, first, cfg),
        "teacher": teacher_clips(teacher, codec, first, cfg, 1),
        "real": real,
    }
    readings = {name: read(probe, px, cfg.stride) for name, px in clips.items()}
    result: dict[str, Any] = {
        name: picture_figures(px, real, readings[name], readings["real"]) | {"before": accuracy(readings[name], first)}
        for name, px in clips.items()
    }
    later = read(probe, teacher_clips(teacher, codec, second, cfg, 2), cfg.stride)
    result["teacher"]["after"] = accuracy(later, second)
    streams = {p: switched_streams(student, codec, first, second, p, cfg) for p in policies}
    fps = float(student.record["world"]["fps"])
    result["switch"] = {p: judge_switch(px, first, second, probe, fps, cfg) for p, px in streams.items()}
    if cfg.long_seconds:
        result["student"] |= long_drift(student, codec, first, cfg)
    result["student"]["name"], result["teacher"]["name"] = student.name, teacher.name
    result["protocol"] = asdict(cfg)
    plain: dict[str, Any] = report.plain(result)
    if cfg.out:
        write(Path(cfg.out) / f"{student.name}-{teacher.name}", plain, streams, fps)
    return plain


def write(folder: Path, result: Mapping[str, Any], streams: Mapping[str, Tensor], fps: float) -> None:
    """result.json and a contact sheet of switches, one row a policy, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [(f"{policy}, stream {k + 1}", px[k]) for k in range(2) for policy, px in streams.items() if k < len(px)]
    pictures = [(px.permute(0, 2, 3, 1) * 255).round().byte().numpy() for _, px in rows]
    sheet = contact_sheet(pictures, every=max(1, round(fps / 2)), labels=[label for label, _ in rows])
    save_png(folder / "switches.png", sheet)


def table(result: Mapping[str, Any]) -> Table:
    """What was asked for and shown, a row for each kind of video and switch."""
    out = Table(title=f"{result['protocol']['clips']} held-out captions, share shown")
    for name in ("", *ASKED, "asked", "after s", "reached"):
        out.add_column(name, justify="left" if not name else "right")
    rows = {
        f"{name}, {part}": result[name][part]
        for name in ("real", "teacher")
        for part in ("before", "after")
        if part in result[name]
    }
    rows |= {
        f"student, {p}, {part}": result["switch"][p][part] for p in result["switch"] for part in ("before", "after")
    }
    for label, shares in rows.items():
        words = label.split(", ")
        took = result["switch"][words[1]]["time_to_adherence"] if words[0] == "student" and words[-1] == "after" else {}
        cells = [report.number(shares, name) for name in (*ASKED, "asked")]
        out.add_row(label, *cells, report.number(took, "median_s"), report.number(took, "reached"))
    return out


def run(name: str, *, clips: int = 96, out: str | Path = "out/eval", teacher: str | None = None) -> dict[str, Any]:
    """Judge a student that listens to text by the fixed protocol; the table goes to stderr."""
    result = evaluate(name, teacher, AdherenceConfig(clips=clips, out=str(out)))
    console = Console(stderr=True)
    console.print(table(result))
    best = max(result["switch"].values(), key=lambda found: found["after"]["asked"])
    for part in ("before", "after"):
        need = 0.9 * result["teacher"][part]["asked"]
        console.print(str(report.Target(f"student shows what was asked {part} a switch", best[part]["asked"], need)))
    return result
