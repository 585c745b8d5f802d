"""Held-out evaluation: student, teacher, codec and real video side by side, on the same episodes, in one run."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle, CheckpointError
from vidistill.codecs import Codec
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import ACTION_SITE, Condition, branches, pack_actions, walked
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.data.shards import frame_shards, write_shards
from vidistill.diffusion import derived_seed
from vidistill.evaluation import report
from vidistill.evaluation.probes import Probe, action_labels, load_probe, visible_walks
from vidistill.evaluation.tally import CURVES, ClipBatch, StreamTally, Tally, drifts, figures
from vidistill.io import to_float
from vidistill.memory.cache import KVMemory
from vidistill.memory.policies import stream_memory
from vidistill.ops.precision import PRECISIONS, autocast, working_dtype
from vidistill.rollout import chunk_noise, roll_out, rollout
from vidistill.sampling import sample
from vidistill.schedules import endless, finite
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds

RECORDED_FRAMES = 321  # of an episode that clips are cut from
LONG_EPISODES_FROM = 64  # held-out seeds of the long walks come after those of the clips


@dataclass(frozen=True)
class EvalConfig:
    """The fixed protocol; smaller runs (`clips`, `streams`, `long_seconds`) are for a first look.

    Episodes in `data` are recorded when they are missing. Samples of the teacher are kept in `cache` under a hash of
    everything they depend on (empty: sample anew).
    """

    clips: int = 256
    batch: int = 32
    seconds: float = 4.0  # window of the ratios, and of both ends of a drift
    streams: int = 16
    long_seconds: float = 60.0  # 0: no long stream
    frames: int = 22  # latents of a clip, the start image included
    steps: int = 50
    guidance: float | None = None  # None: what the teacher's record says, else 1
    stride: int = 2  # the probe reads every `stride`-th frame
    seed: int = 0
    episodes: int = 64
    data: str = "data/doom-heldout"
    cache: str = "data/teacher-samples"
    out: str = "out/eval"
    probe: str | None = None  # None: the bundled one
    precision: str = "auto"
    threads: int = 0  # 0: as torch chooses

    def __post_init__(self) -> None:
        for name in ("clips", "batch", "streams", "frames", "steps", "stride", "episodes", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval.{name} must be positive, got {getattr(self, name)}")
        if self.clips < 2:
            raise ValueError(f"eval.clips must be at least 2 for a distance of two sets, got {self.clips}")
        if self.long_seconds and self.long_seconds < 2 * self.seconds:
            raise ValueError(f"eval.long_seconds is {self.long_seconds}; needed is 0 or at least 2 x {self.seconds}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"eval.precision {self.precision!r} is unknown; choose one of {PRECISIONS}")


# --- held-out episodes ------------------------------------------------------------------------------------------------


def episodes_at(folder: Path, made: tuple[int, int], need: tuple[int, int], first: int = 0) -> Clips:
    """Held-out episodes in `folder`, recorded now if it is missing.

    made, need: (episodes, frames) to record, and that suffice; `first` is the first held-out seed.
    """
    if not folder.exists():
        cfg = DoomConfig(num_frames=made[1])
        wanted = seeds("held_out", first + made[0])[first:]
        episodes = tqdm(record_many(cfg, wanted), f"recording {folder}", total=made[0], unit="episode")
        meta = {"source": "doom", "split": "held_out", "config": asdict(cfg), "fps": cfg.fps}
        write_shards(folder, frame_shards(episodes, 16), meta)
    clips = Clips(folder)
    have = tuple(clips.tensors["frames"].shape[:2])
    if clips.meta["split"] != "held_out":
        raise ValueError(f"{folder} holds episodes of split {clips.meta['split']!r}; a measure needs held-out ones")
    if have[0] < need[0] or have[1] < need[1]:
        raise ValueError(
            f"{folder} holds {have[0]} episodes of {have[1]} frames, needed are {need[0]} of {need[1]}: "
            "remove it to record them, or name another eval.data"
        )
    return clips


class HeldOut:
    """Clips cut from held-out episodes at evenly spaced frames: one of every episode, then another of every episode."""

    def __init__(self, clips: Clips, cfg: EvalConfig, px_frames: int) -> None:
        self.cfg, self.px_frames = cfg, px_frames
        self.frames, self.actions, self.poses = (clips.tensors[n] for n in ("frames", "actions", "poses"))
        self.fps: float = clips.meta["fps"]
        self.turn, walk = action_labels(self.actions)
        self.walk = visible_walks(walk, self.poses, clips.meta["config"]["speed"])
        self.windows = windows(min(len(clips), cfg.episodes), self.frames.shape[1], px_frames, cfg.clips)

    def __len__(self) -> int:
        return math.ceil(len(self.windows) / self.cfg.batch)

    def __iter__(self) -> Iterator[ClipBatch]:
        for i in range(len(self)):
            yield self.batch(self.windows[i * self.cfg.batch : (i + 1) * self.cfg.batch], i)

    def batch(self, picked: list[tuple[int, int]], index: int) -> ClipBatch:
        """The real clips of some windows."""

        def cut(x: Tensor) -> Tensor:
            return torch.stack([x[e, s : s + self.px_frames] for e, s in picked])

        px = to_float(cut(self.frames).numpy())
        episodes = torch.tensor([e for e, _ in picked])
        return ClipBatch(index, px, cut(self.actions), cut(self.poses), cut(self.turn), cut(self.walk), episodes)


def windows(episodes: int, total: int, length: int, num: int) -> list[tuple[int, int]]:
    """(episode, first frame) of `num` windows of `length` frames, as far apart as they can be."""
    if length > total:
        raise ValueError(f"clips of {length} frames do not fit episodes of {total}; record longer ones")
    per = math.ceil(num / episodes)
    slack = total - length
    starts = [slack // 2] if per == 1 else [slack * k // (per - 1) for k in range(per)]
    return [(e, s) for s in starts for e in range(episodes)][:num]


def walk_condition(bundle: Bundle, actions: Tensor, poses: Tensor, factor: int) -> Condition:
    """What a network hears of walks: actions [B, T, A] and, where it takes them, the real motion of poses [B, T, 3].

    The first frame is given, nothing led to it.
    """
    actions = actions.clone()
    actions[:, 0] = 0.0
    per_frame, camera = {ACTION_SITE: pack_actions(actions, factor)}, bundle.record["world"].get("camera")
    if camera is not None:
        per_frame |= walked(poses[:, ::factor], build(CameraConfig, camera), factor)
    return Condition(per_frame=per_frame)


# --- what fills the rows ----------------------------------------------------------------------------------------------

Source = Callable[[ClipBatch], Tensor]  # real clips -> the clips [B, T, 3, H, W] of one row


def codec_row(codec: Codec) -> Source:
    return lambda batch: codec.decode(codec.encode(batch.px))


def repeat_row(batch: ClipBatch) -> Tensor:
    """The start image, standing still: what any prediction must beat."""
    return batch.px[:, :1].expand_as(batch.px)


def teacher_row(teacher: Bundle, codec: Codec, cfg: EvalConfig) -> Source:
    """Clips that the teacher samples from the start image and the actions in `cfg.steps` Euler steps."""
    scale = float(teacher.record.get("guidance", 1.0)) if cfg.guidance is None else cfg.guidance
    sigmas = teacher.noise.steps(cfg.steps)
    weights, architecture = digest(teacher.net.state_dict()), teacher.record.get("dit")

    def row(batch: ClipBatch) -> Tensor:
        given = codec.encode(batch.px[:, :1])
        cond = walk_condition(teacher, batch.actions, batch.poses, codec.temporal_factor)
        rng = torch.Generator().manual_seed(derived_seed(cfg.seed, batch.index))
        noise = torch.randn(given.shape[0], cfg.frames, *given.shape[2:], generator=rng)
        nulls, scales = branches(cond, scale)

        def make() -> Tensor:
            with autocast(cfg.precision):
                return sample(teacher.net, noise, sigmas, cond, given=given, nulls=nulls, scales=scales).float()

        inputs = {"given": given, "noise": noise, **cond.per_frame}
        key = digest(inputs, weights, json.dumps([sigmas, scale, str(working_dtype(cfg.precision)), architecture]))
        return codec.decode(cached(cfg.cache, key, make))

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


def student_chunks(
    student: Bundle, given: Tensor, cond: Condition, chunks: int, cfg: EvalConfig, seed: int, memory: KVMemory
) -> Iterator[Tensor]:
    """The student's own rollout from the given first latent: `chunks` finished chunks."""
    noise = chunk_noise(student.net, given.shape[0], seed, given)
    passes = finite(endless(student.schedule), chunks)
    rng = torch.Generator().manual_seed(seed)
    made = rollout(student.net, passes, noise=noise, cond=cond.frames, memory=memory, rng=rng)
    for _ in range(chunks):
        with autocast(cfg.precision):  # not around the loop: it would hold for whoever asks for the chunks, too
            chunk = next(made)
        yield chunk.float()


def student_row(student: Bundle, codec: Codec, cfg: EvalConfig) -> Source:
    net = student.net
    if net.first_frame(student.schedule.given_chunks) != 1:
        raise ValueError(
            f"{student.name} does not start from one picture: its {student.schedule.given_chunks} given chunks are "
            f"{net.first_frame(student.schedule.given_chunks)} latents; evaluation gives exactly the start image"
        )

    def row(batch: ClipBatch) -> Tensor:
        given = codec.encode(batch.px[:, :1])
        cond = walk_condition(student, batch.actions, batch.poses, codec.temporal_factor)
        size, seed = (given.shape[0], cfg.frames), derived_seed(cfg.seed, batch.index)
        with autocast(cfg.precision):
            dtype = working_dtype(cfg.precision)
            made = roll_out(net, student.schedule, cond, size, seed=seed, given=given, dtype=dtype)
        return codec.decode(made.float())

    return row


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(rows: Mapping[str, Source], data: HeldOut, probe: Probe, cfg: EvalConfig) -> dict[str, Tally]:
    """A tally for `real` and for every row, over all clips."""
    window = round(cfg.seconds * data.fps)
    tallies = {name: Tally(probe, cfg.stride, window) for name in ("real", *rows)}
    with tqdm(total=len(data) * len(rows), unit="batch") as bar, torch.inference_mode():
        for batch in data:
            tallies["real"].add(batch.px, batch)
            for name, source in rows.items():
                bar.set_description(f"clips: {name}")
                px = source(batch)
                if px.shape != batch.px.shape:
                    raise ValueError(
                        f"{name} gives clips {tuple(px.shape)} where real ones are {tuple(batch.px.shape)}"
                    )
                tallies[name].add(px, batch)
                bar.update()
    return tallies


# --- long streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongWalks:
    """Real streams of one length: frames uint8 [S, T, H, W, 3], actions [S, T', A] and poses [S, T', 3], T' >= T."""

    frames: Tensor
    actions: Tensor
    poses: Tensor
    turn: Tensor
    walk: Tensor
    length: int
    fps: float

    def tally(self, cfg: EvalConfig) -> StreamTally:
        return StreamTally(self.length, round(cfg.seconds * self.fps))


def long_walks(cfg: EvalConfig, fps: float) -> LongWalks:
    length = math.ceil(cfg.long_seconds * fps) + 1
    clips = episodes_at(Path(cfg.data) / "long", (cfg.streams, length), (cfg.streams, length), LONG_EPISODES_FROM)
    frames, actions, poses = (clips.tensors[name][: cfg.streams] for name in ("frames", "actions", "poses"))
    turn, walk = action_labels(actions)
    walk = visible_walks(walk, poses, clips.meta["config"]["speed"])
    return LongWalks(frames, actions, poses, turn, walk, length, fps)


@torch.inference_mode()
def stream_student(student: Bundle, codec: Codec, walks: LongWalks, cfg: EvalConfig) -> StreamTally:
    """The student's streams along the long walks, at constant memory."""
    net, tally = student.net, walks.tally(cfg)
    chunks = 1
    while codec.px_frames(net.first_frame(chunks)) < walks.length:
        chunks += 1
    total = codec.px_frames(net.first_frame(chunks))
    actions, poses = walks.actions[:, :total], walks.poses[:, :total]
    short = total - actions.shape[1]  # of the last chunk, which ends standing still
    actions = torch.cat((actions, actions.new_zeros(actions.shape[0], short, actions.shape[2])), dim=1)
    poses = torch.cat((poses, poses[:, -1:].expand(-1, short, -1)), dim=1)
    given = codec.encode(to_float(walks.frames[:, :1].numpy()))
    endless_memory = stream_memory(net.cfg.memory, net.cfg.chunk)
    memory = net.new_memory(given.shape[0], dtype=working_dtype(cfg.precision), cfg=endless_memory)
    cond, state = walk_condition(student, actions, poses, codec.temporal_factor), None
    made = student_chunks(student, given, cond, chunks, cfg, derived_seed(cfg.seed, 999_983), memory)
    for chunk in tqdm(made, f"{cfg.long_seconds:g} s streams", total=chunks, unit="chunk"):
        px, state = codec.decode_stream(chunk, state)
        tally.add(px)
    return tally


def stream_real(walks: LongWalks, cfg: EvalConfig) -> StreamTally:
    tally = walks.tally(cfg)
    for piece in walks.frames.split(64, dim=1):
        tally.add(to_float(piece.numpy()))
    return tally


# --- the three evaluations --------------------------------------------------------------------------------------------


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


def source_of(bundle: Bundle) -> str | None:
    """What a checkpoint's clips were recorded from, as its card says; "doom" for a walker whose card says nothing."""
    data = bundle.record.get("card", {}).get("data")
    if isinstance(data, Mapping) and "source" in data:
        return str(data["source"])
    return "doom" if bundle.record.get("world", {}).get("actions") else None


def check(bundle: Bundle, cfg: EvalConfig | None = None) -> None:
    """ValueError if held-out walks of doom cannot judge `bundle`; a codec whose card names no source may be judged.

    With the `cfg` of a report also ImportError if it could not be drawn.
    """
    source = source_of(bundle)
    if source != "doom" and not (source is None and bundle.kind == "codec"):
        student = source if source in checkpoint.zoo_names() else "STUDENT"
        hint = {
            "codec": f"judge a student that dreams in its latents: vidistill eval {student}",
            "teacher": f"judge it beside a student: vidistill eval {student} --teacher {bundle.name}",
        }
        raise ValueError(
            f"{bundle.name} did not learn from doom but from {source or 'a world its card does not name'}: walks of "
            f"doom say nothing about it; {hint.get(bundle.kind, 'students that walk, listen or talk can be judged')}"
        )
    if cfg and cfg.out:
        report.check_plots()


def judge(rows: Mapping[str, Source], codec: Codec, cfg: EvalConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures, pictures) of `real` and every row on the held-out clips."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    px_frames = codec.px_frames(cfg.frames)
    made, need = (cfg.episodes, max(px_frames, RECORDED_FRAMES)), (min(cfg.episodes, cfg.clips), px_frames)
    clips = episodes_at(Path(cfg.data) / "frames", made, need)
    data = HeldOut(clips, cfg, px_frames)
    tallies = measure(rows, data, load_probe(cfg.probe), cfg)
    result = {name: figures(tally, tallies["real"], data.fps) for name, tally in tallies.items()}
    pictures = {
        "fps": data.fps,
        "clips": {name: tally.all("shown").numpy() for name, tally in tallies.items()},
        "motion": {name: metrics.curve(t.all("motion"), report.quarter(data.fps)) for name, t in tallies.items()},
    }
    return result, pictures


def finish(
    result: dict[str, Any], pictures: dict[str, Any], names: Mapping[str, str], cfg: EvalConfig, began: float
) -> dict:
    """Add names and protocol, write the report, return plain numbers (None for what cannot be measured)."""
    for row, name in names.items():
        result[row] = {"name": name, **result[row]}
    result["protocol"] = {**asdict(cfg), "features": "probe features", "seconds_taken": round(time.time() - began, 1)}
    plain = report.plain(result)
    if cfg.out:
        report.write(report.folder_of(plain, cfg.out), plain, pictures)
    return plain


def evaluate(name: str, teacher_name: str | None = None, cfg: EvalConfig = EvalConfig()) -> dict[str, Any]:
    """Figures of student, teacher and real video on the same held-out episodes, written as a report into `cfg.out`."""
    began = time.time()
    student = checkpoint.load(name, "student")
    check(student, cfg)
    teacher = checkpoint.load(teacher_name, "teacher") if teacher_name else teacher_of(student)
    if student.record["codec"] != teacher.record["codec"]:
        raise ValueError(
            f"{student.name} lives in the latents of {student.record['codec']}, {teacher.name} in those of "
            f"{teacher.record['codec']}"
        )
    codec = checkpoint.load_codec(student)
    rows = {"student": student_row(student, codec, cfg), "teacher": teacher_row(teacher, codec, cfg)}
    result, pictures = judge(rows | {"codec": codec_row(codec), "repeat": repeat_row}, codec, cfg)
    drifting = [f"{name}_drift" for name in CURVES]
    result["teacher"] |= dict.fromkeys(drifting)
    if cfg.long_seconds:
        walks = long_walks(cfg, pictures["fps"])
        probe = load_probe(cfg.probe)
        streams = {"real": stream_real(walks, cfg), "student": stream_student(student, codec, walks, cfg)}
        for name, tally in streams.items():
            result[name] |= drifts(tally, streams["real"], walks.turn, walks.walk, probe, cfg.stride)
        second = round(walks.fps)
        pictures["curves"] = {n: {c: metrics.curve(t.curve(c), second) for c in CURVES} for n, t in streams.items()}
        pictures["streams"] = {n: torch.cat(t.pictures, dim=1).numpy() for n, t in streams.items()}
    else:
        for name in ("student", "real"):
            result[name] |= dict.fromkeys(drifting)
    return finish(result, pictures, {"student": student.name, "teacher": teacher.name}, cfg, began)


def evaluate_teacher(teacher_name: str, cfg: EvalConfig = EvalConfig()) -> dict[str, Any]:
    """Figures of a teacher alone against codec reconstructions, real video and its start image."""
    began = time.time()
    teacher = checkpoint.load(teacher_name, "teacher")
    check(teacher, cfg)
    codec = checkpoint.load_codec(teacher)
    rows = {"teacher": teacher_row(teacher, codec, cfg), "codec": codec_row(codec), "repeat": repeat_row}
    result, pictures = judge(rows, codec, cfg)
    return finish(result, pictures, {"teacher": teacher.name}, cfg, began)


def evaluate_codec(codec: str, cfg: EvalConfig = EvalConfig()) -> dict[str, Any]:
    """Figures of a codec's reconstructions against real video; `psnr` is the mean over clips and frames."""
    began = time.time()
    bundle = checkpoint.load(codec, "codec")
    check(bundle, cfg)
    result, pictures = judge({"codec": codec_row(bundle.net)}, bundle.net, cfg)
    return finish(result, pictures, {"codec": bundle.name}, cfg, began)


def glance(name: str | Bundle, cfg: EvalConfig = EvalConfig()) -> dict[str, Any]:
    """Figures of a student's clips against real video, without teacher, long streams or report: to watch a training."""
    student = name if isinstance(name, Bundle) else checkpoint.load(name, "student")
    check(student)
    codec = checkpoint.load_codec(student)
    result, _ = judge({"student": student_row(student, codec, cfg)}, codec, cfg)
    return report.plain(result["student"])


def run(name: str, *, clips: int = 256, out: str | Path = "out/eval", teacher: str | None = None) -> dict[str, Any]:
    """Judge a checkpoint of any kind by the fixed protocol; the table and what was promised go to stderr."""
    cfg = EvalConfig(clips=clips, out=str(out))
    alone = {"teacher": evaluate_teacher, "codec": evaluate_codec}
    kind = checkpoint.load(name).kind
    result = alone[kind](name, cfg) if kind in alone else evaluate(name, teacher, cfg)
    report.show(result, cfg.out)
    return result
