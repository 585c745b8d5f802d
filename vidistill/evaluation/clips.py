"""Clips of student, teacher and codec beside real ones, made and measured batch by batch."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import Condition, branches
from vidistill.evaluation.config import SuiteConfig
from vidistill.evaluation.probes import AFTER, Probe, Reading, read
from vidistill.evaluation.report import Metric
from vidistill.evaluation.streams import CURVES, PICTURES, SHOWN
from vidistill.io import to_uint8
from vidistill.ops.precision import autocast, working_dtype
from vidistill.rollout import roll_out
from vidistill.sampling import sample

log = logging.getLogger("vidistill")


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
    rooms: Tensor | None = None  # [B], None: a room a clip
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """What all rows are judged on. `window`: px frames after the start image that count, None for all of them.

    heads: what a probe reads of them, every `stride`-th frame, and in how many classes: fact "asked" [B, T, heads].
    fitted: clips are resized to what the probe reads.
    """

    batches: Sequence[Batch] | Any
    fps: float
    probe: Probe | None = None
    heads: Mapping[str, int] = field(default_factory=dict)
    stride: int = 1
    window: int | None = None
    reader: Any = None  # of camera motion, where a suite reads it
    fitted: bool = False
    shown: int = SHOWN  # clips kept to look at
    names: Sequence[str] = ()  # of those, if they have any
    every: float = 0.4  # seconds between two pictures of them
    windows: Mapping[str, range] = field(default_factory=dict)  # of frames, where figures are by time

    def read(self, px: Tensor) -> Reading:
        """What the probe sees of clips px [B, T, 3, H, W]."""
        assert self.probe is not None
        if self.fitted:
            size = (self.probe.cfg.size,) * 2
            px = F.interpolate(px.flatten(0, 1), size, mode="bilinear", antialias=True).unflatten(0, px.shape[:2])
        return read(self.probe, px, self.stride)


@dataclass(frozen=True)
class View:
    """The clips px [B, T, 3, H, W] that a row shows for a batch, as metrics see them."""

    px: Tensor
    batch: Batch
    data: Data
    held: dict[str, Any] = field(default_factory=dict)

    def kept(self, name: str, measure: "Callable[[View], Any]") -> Any:
        """What is measured once for several parts."""
        if name not in self.held:
            self.held[name] = measure(self)
        return self.held[name]

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
        end = None if self.data.window is None else self.data.window + 1 + AFTER
        return self.data.read(self.px[:, :end])


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
        rooms = batch.rooms if batch.rooms is not None else batch.seed + torch.arange(len(px))
        self.parts.setdefault("rooms", []).append(rooms)
        for name, measure in parts.items():
            self.parts.setdefault(name, []).append(measure(view))
        few = min(batch.shown, self.data.shown - len(self.shown))
        self.shown += list(to_uint8(px[: max(0, few)]))

    @property
    def last(self) -> dict[str, Tensor]:
        """What was measured of the clips that came last."""
        return {name: parts[-1].clone() for name, parts in self.parts.items()}

    def take(self, parts: Mapping[str, Tensor], shown: Sequence[np.ndarray]) -> None:
        """Clips that were measured before, as `last` gave them."""
        for name, x in parts.items():
            self.parts.setdefault(name, []).append(x)
        self.shown += shown

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])

    def pick(self, index: Tensor) -> "Tally":
        """The same of some of the clips [N]."""
        own = Tally(self.data)
        own.parts = {name: [self[name][index]] for name in self.parts}
        return own

    def mean(self, name: str) -> float:
        return float(self[name].double().mean())


def answers(view: View) -> Tensor:
    """The classes [B, n, heads] that the probe reads."""
    found = [view.reading.labels[name] for name in view.data.heads]
    return torch.stack(found, -1) if found else torch.zeros(*view.reading.features.shape[:2], 0)


def read_parts() -> dict[str, Callable[[View], Tensor]]:
    """Parts of every metric that a probe takes part in: features [B, n, D], classes that are read and that were asked
    for [B, n, heads]."""
    return {
        "features": lambda v: v.reading.features,
        "read": answers,
        "asked": lambda v: v.batch.facts["asked"][:, v.reading.times],
    }


def ratio(name: str, measure: Callable[[View], Tensor], text: str) -> Metric:
    """The mean of a measure, against that of real clips."""
    return Metric(
        f"{text}, against real",
        lambda row, real: metrics.ratio(row.mean(name), real.mean(name)),
        {name: measure},
        best="one",
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
DRIFTS = {f"{name}_drift": Metric(None if name == "contrast" else LAST, best="one") for name in CURVES}
DRIFTS["long_flat_frames"] = Metric("share of frames of long streams that show next to nothing", best="low")


# --- what fills the rows ----------------------------------------------------------------------------------------------

Row = Callable[[Batch], Tensor]  # real clips -> the clips [B, T, 3, H, W] of one row


def without_filter(codec: TinyCodec) -> TinyCodec:
    """The codec whose decoded frames stay as they are."""
    plain = TinyCodec(replace(codec.cfg, smooth=0.0)).eval()
    plain.load_state_dict(codec.state_dict())
    return plain


def codec_row(codec: Codec) -> Row:
    return lambda batch: codec.decode(codec.encode(batch.px))


def real_row(batch: Batch) -> Tensor:
    return batch.px


def repeat_row(batch: Batch) -> Tensor:
    """The start image, standing still: what any prediction must beat."""
    return batch.px[:, :1].expand_as(batch.px)


def start(bundle: Bundle, codec: Codec, batch: Batch) -> tuple[Tensor | None, Condition, tuple[int, int]]:
    """The given latent, what the network is told, and (clips, latents)."""
    given = codec.encode(batch.px[:, :1]) if batch.given else None
    frames = 1 + (batch.px.shape[1] - 1) // codec.temporal_factor
    return given, batch.condition(bundle, codec, given), (len(batch.px), frames)


def teacher_row(teacher: Bundle, codec: Codec, cfg: SuiteConfig) -> Row:
    """Clips that the teacher samples in `cfg.steps` guided Euler steps, kept in `cfg.cache`. `cfg.guidance` is that of
    text or actions; a sound has the scale that the record says."""
    record, sigmas = teacher.record, teacher.noise.steps(cfg.steps)
    text, audio = float(record.get("guidance", 1.0)), float(record.get("audio_guidance", 0.0))
    text = text if cfg.guidance is None else cfg.guidance
    weights, dtype = digest(teacher.net.state_dict()), str(working_dtype(cfg.precision))
    unsaid = bool(cfg.cache) and any(Path(cfg.cache).glob("*.safetensors"))

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
        key = digest(known, weights, json.dumps(settings))
        nonlocal unsaid
        if unsaid and not sample_file(cfg.cache, key).is_file():
            log.info("%s keeps samples of other settings or clips; these are sampled anew", cfg.cache)
        unsaid = False  # the first clips tell
        return codec.decode(cached(cfg.cache, key, make))

    return row


def digest(tensors: Mapping[str, Tensor], *more: str) -> str:
    """A hash of numbers and texts."""
    made = hashlib.sha256("".join(more).encode())
    for name, x in sorted(tensors.items()):
        made.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        made.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:24]


def sample_file(folder: str, key: str) -> Path:
    return Path(folder) / f"{key}.safetensors"


def cached(folder: str, key: str, make: Callable[[], Tensor]) -> Tensor:
    """`make()`, or what it gave before under this key; half precision either way."""
    path = sample_file(folder, key)
    if folder and path.is_file():
        return checkpoint.read_tensors(path)[0]["x"].float()
    x = make().half()
    if folder:
        checkpoint.save_tensors(path, {"x": x}, {"key": key})
    return x.float()


SHOWN_KEY = "clips to look at"


class Unfinished:
    """What an evaluation has measured, batch by batch, in `folder` ("": nowhere) until it is done: one that was stopped
    goes on from there. Names hold a hash of the clips and of `settings`: all that figures depend on."""

    def __init__(self, folder: str, settings: str) -> None:
        self.folder, self.settings = folder, settings
        self.held: list[Path] = []

    def add(self, row: str, make: Callable[[], None], tally: Tally, batch: Batch) -> None:
        """Let `make` measure a batch into a tally, or take what it measured before."""
        if not self.folder:
            return make()
        name = digest({"px": batch.px}, self.settings, row, str(batch.seed))
        path = Path(self.folder) / "unfinished" / f"{name}.safetensors"
        if path.is_file():
            parts = checkpoint.read_tensors(path)[0]
            tally.take(parts, list(parts.pop(SHOWN_KEY, torch.empty(0)).numpy()))
        else:
            before = len(tally.shown)
            make()
            shown = tally.shown[before:]
            more = {SHOWN_KEY: torch.from_numpy(np.stack(shown))} if shown else {}
            checkpoint.save_tensors(path, {**tally.last, **more}, {"row": row})
        self.held.append(path)

    def done(self) -> None:
        """Forget what was kept."""
        for path in self.held:
            path.unlink(missing_ok=True)


NOWHERE = Unfinished("", "")


def student_row(student: Bundle, codec: Codec, cfg: SuiteConfig) -> Row:
    """Clips of the student's own rollouts."""

    def row(batch: Batch) -> Tensor:
        given, cond, size = start(student, codec, batch)
        with autocast(cfg.precision):
            dtype = working_dtype(cfg.precision)
            x = roll_out(student.net, student.schedule, cond, size, seed=batch.seed, given=given, dtype=dtype)
        return codec.decode(x.float())

    return row
