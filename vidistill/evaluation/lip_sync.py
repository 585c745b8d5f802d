"""Does a student that hears move its lips to the sound, and stay who it is? Judged beside teacher and real video."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.audio import AudioConfig, clip_features, from_pcm16
from vidistill.conditioning.condition import Condition, branches, pack_audio, reference_channels
from vidistill.conditioning.script import Cue
from vidistill.config import build
from vidistill.data.types import Talk
from vidistill.diffusion import derived_seed
from vidistill.evaluation import report
from vidistill.evaluation.quality import teacher_of
from vidistill.io import contact_sheet, save_png, to_float
from vidistill.memory.policies import MemoryConfig
from vidistill.rollout import roll_out
from vidistill.sampling import sample
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.worlds.talker.face import likeness, read_mouth
from vidistill.worlds.talker.recorder import TalkerConfig, record_many, seeds

BLACK = 0.06  # brightness below which a frame is black
FROZEN, FROZEN_RUN = 0.05, 4  # of the motion of real video, for at least so many frames in a row
# Held-out people: the first are for choosing between checkpoints (data/talker-heldout), then clips, then long streams.
CLIP_SEEDS, LONG_SEEDS = 100, 500
SYNC, WHOLE = ("sync_corr", "sync_offset_frames"), ("black_frames", "frozen_frames", "flicker_ratio")
KEYS = (*SYNC, "identity_drift", *WHOLE, "mouth_motion_ratio")


@dataclass(frozen=True)
class LipSyncConfig:
    """The protocol: `clips` held-out people and sentences as long as the student was trained on, and `streams` of
    `long_seconds` (0: none), whose first and last `window` seconds are compared."""

    clips: int = 64
    batch: int = 16
    streams: int = 4
    long_seconds: float = 120.0
    window: float = 5.0
    steps: int = 50
    guidance: float | None = None  # None: what the teacher's record says, for text and for audio
    seed: int = 0
    workers: int = 2
    out: str = "out/eval"

    def __post_init__(self) -> None:
        for name in ("clips", "batch", "streams", "window", "steps", "workers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval.{name} must be positive, got {getattr(self, name)}")
        if self.long_seconds and self.long_seconds < 2 * self.window:
            raise ValueError(f"eval.long_seconds is {self.long_seconds}; needed is 0 or at least 2 x {self.window}")


def real_clips(bundle: Bundle, frames: int, count: int, first: int, workers: int) -> list[Talk]:
    """Held-out people talking for `frames` px frames, in the world of a checkpoint; ValueError for another world."""
    size = bundle.record["world"].get("px_size")
    if size is None:
        raise ValueError(f"{bundle.name} was not trained on the drawn faces that are judged here")
    cfg = TalkerConfig(size=size, num_frames=frames, audio=build(AudioConfig, bundle.record["audio"]))
    picked = seeds("held_out", first + count)[first:]
    return list(tqdm(record_many(cfg, picked, workers), "real clips", total=count, unit="clip"))


def pixels(clips: Sequence[Talk]) -> Tensor:
    """Clips [B, T, 3, H, W] in [0, 1]."""
    return torch.stack([to_float(c.frames) for c in clips])


def condition(bundle: Bundle, clips: Sequence[Talk], given: Tensor, frames: int, factor: int) -> Condition:
    """What a network is told of clips of `frames` latents: caption, audio, the picture they begin with."""
    audio = build(AudioConfig, bundle.record["audio"])
    heard = [clip_features(from_pcm16(c.pcm), 1 + factor * (frames - 1), audio) for c in clips]
    encode, net = checkpoint.text_encoder(bundle.record), bundle.net
    dit = net.cfg if bundle.kind == "teacher" else net.net.cfg
    tokens = encode([c.caption for c in clips]) if encode is not None and dit.text_dim else None
    channels = reference_channels(given, 0, frames) if dit.extra_channels else None
    return Condition(tokens, {"hidden": pack_audio(torch.from_numpy(np.stack(heard)), factor)}, channels)


@torch.inference_mode()
def made_clips(bundle: Bundle, codec: Codec, clips: Sequence[Talk], frames: int, cfg: LipSyncConfig) -> Tensor:
    """Clips [B, T, 3, H, W] that a teacher samples, or a student rolls out, for the pictures and sound of real ones."""
    parts = []
    for i in tqdm(range(0, len(clips), cfg.batch), bundle.name, unit="batch"):
        few = clips[i : i + cfg.batch]
        given = codec.encode(pixels(few)[:, :1])
        cond = condition(bundle, few, given, frames, codec.temporal_factor)
        make = sampled if bundle.kind == "teacher" else rolled
        parts.append(codec.decode(make(bundle, given, cond, frames, cfg, derived_seed(cfg.seed, i)).float()))
    return torch.cat(parts)


def sampled(bundle: Bundle, given: Tensor, cond: Condition, frames: int, cfg: LipSyncConfig, seed: int) -> Tensor:
    own = bundle.record.get("guidance", 1.0), bundle.record.get("audio_guidance", 0.0)
    nulls, scales = branches(cond, *(own if cfg.guidance is None else (cfg.guidance,)))
    noise = torch.randn(len(given), frames, *given.shape[2:], generator=torch.Generator().manual_seed(seed))
    return sample(bundle.net, noise, bundle.noise.steps(cfg.steps), cond, given=given, nulls=nulls, scales=scales)


def rolled(bundle: Bundle, given: Tensor, cond: Condition, frames: int, cfg: LipSyncConfig, seed: int) -> Tensor:
    return roll_out(bundle.net, bundle.schedule, cond, (len(given), frames), seed=seed, given=given)


def stream(
    bundle: Bundle, codec: Codec, clip: Talk, frames: int, memory: MemoryConfig | None = None, seed: int = 0
) -> Tensor:
    """A stream [T, 3, H, W] that begins with a real clip's picture and hears its sound, at constant memory."""
    cfg = StreamConfig(seed=seed, pipelined=False, memory=memory)
    with StreamSession(bundle, codec, cfg, image=clip.frames[0]) as session:
        session.set(audio=from_pcm16(clip.pcm))
        cues = [Cue(0.0, clip.caption)] if session.takes_prompts else []
        return to_float(session.record(frames, cues=cues))


# --- measuring --------------------------------------------------------------------------------------------------------


def mouths(px: Tensor) -> Tensor:
    """How far mouths are open [B, T] in clips [B, T, 3, H, W], read from the pixels."""
    return torch.stack([torch.from_numpy(read_mouth(c.permute(0, 2, 3, 1).numpy())[:, 0]) for c in px])


def frozen(px: Tensor, real_motion: float) -> float:
    """Share of frames in passages that stand still, where real video never does."""
    still = metrics.motion(px) < FROZEN * real_motion
    runs = still.unfold(1, FROZEN_RUN, 1).all(-1) if still.shape[1] >= FROZEN_RUN else still[:, :0]
    inside = torch.zeros_like(still)
    for k in range(FROZEN_RUN):
        inside[:, k : k + runs.shape[1]] |= runs
    return float(inside.double().mean())


def figures(px: Tensor, real: Tensor, truth: Tensor) -> dict[str, float]:
    """Figures of clips [B, T, 3, H, W] beside real ones and the true opening of the mouth [B, T].

    The mouth of the given picture does not count.
    """
    read, own = mouths(px[:, 1:]), mouths(real[:, 1:])
    corr, offset = metrics.sync(read, truth[:, 1:])
    return {
        "sync_corr": corr,
        "sync_offset_frames": offset,
        "black_frames": float((metrics.luma(px).mean((-2, -1)) < BLACK).double().mean()),
        "frozen_frames": frozen(px, float(metrics.motion(real).mean())),
        "flicker_ratio": metrics.ratio(float(metrics.flicker(px).mean()), float(metrics.flicker(real).mean())),
        "mouth_motion_ratio": metrics.pace(read, own),
    }


def identity(px: Tensor, fps: float, window: float, others: float) -> list[float]:
    """How much a stream [T, 3, H, W] looks, in each `window` seconds, like its first picture: 1 the same person, 0 as
    different as two people are on average (`others`)."""
    looks = torch.from_numpy(likeness(px.permute(0, 2, 3, 1).numpy()))
    n = max(1, round(window * fps))
    parts = [looks[i : i + n].mean(0) for i in range(0, len(looks) - n + 1, n)]
    return [1 - float((part - looks[0]).norm()) / others for part in parts]


def apart(real: Tensor) -> float:
    """Mean distance of the looks of different people, from clips [B, T, 3, H, W]."""
    looks = torch.stack([torch.from_numpy(likeness(c.permute(0, 2, 3, 1).numpy())).mean(0) for c in real])
    distances = torch.cdist(looks[None], looks[None])[0]
    count = len(looks)
    return float(distances.sum() / max(1, count * (count - 1))) or 1.0


def identity_drift(streams: Sequence[Tensor], fps: float, window: float, others: float) -> tuple[float, list[float]]:
    """How much less alike the last window is than the first, as a share of the first, and the mean curve; nan where the
    first window is no more alike than two people are."""
    curves = [identity(px, fps, window, others) for px in streams]
    curve = [sum(values) / len(values) for values in zip(*curves, strict=True)]
    return (curve[0] - curve[-1]) / curve[0] if curve[0] > 0 else math.nan, curve


def evaluate(name: str, teacher_name: str | None = None, cfg: LipSyncConfig = LipSyncConfig()) -> dict[str, Any]:
    """Figures (KEYS) of student, teacher and real video on the same held-out people and sentences, and a report.

    `name` may be a teacher, which is then judged alone. `identity_drift` of a student and of real video is that of long
    streams, where there are any, of the teacher that of its clips; `streams` has the curves, with and without anchors.
    """
    first = checkpoint.load(name)
    student = first if first.kind == "student" else None
    if student is None and first.kind != "teacher":
        raise ValueError(f"{name} is a {first.kind}; a student or a teacher that hears is judged here")
    teacher = (
        first if student is None else checkpoint.load(teacher_name, "teacher") if teacher_name else teacher_of(first)
    )
    codec, fps, frames = checkpoint.load_codec(first), float(first.record["world"]["fps"]), first.shape.frames
    clips = real_clips(first, codec.px_frames(frames), cfg.clips, CLIP_SEEDS, cfg.workers)
    real, truth = pixels(clips), torch.stack([torch.from_numpy(c.mouth[:, 0]) for c in clips])
    judged = {"student": student, "teacher": teacher}
    rows = {row: made_clips(net, codec, clips, frames, cfg) for row, net in judged.items() if net is not None}
    rows["real"] = real
    result: dict[str, Any] = {row: figures(px, real, truth) for row, px in rows.items()}
    others, short = apart(real), min(cfg.window, codec.px_frames(frames) / fps / 2)
    for row, px in rows.items():
        result[row]["identity_drift"] = identity_drift(list(px), fps, short, others)[0]
    sheets = {row: list(px[:3]) for row, px in rows.items()}
    if cfg.long_seconds and student is not None:
        long, sheets["streams"] = long_identity(student, codec, fps, others, cfg)
        for row in ("student", "real"):
            result[row]["identity_drift"] = long[row]["drift"]
        result["streams"] = long
    result |= {"names": {row: net.name for row, net in judged.items() if net is not None}, "protocol": asdict(cfg)}
    plain: dict[str, Any] = report.plain(result)
    if cfg.out:
        write(Path(cfg.out) / "-".join(plain["names"].values()), plain, sheets)
    return plain


def long_identity(
    student: Bundle, codec: Codec, fps: float, others: float, cfg: LipSyncConfig
) -> tuple[dict[str, dict[str, Any]], list[Tensor]]:
    """Identity of long streams, with anchors and with a window alone, and of real video as long; some streams."""
    length = round(cfg.long_seconds * fps)
    clips = real_clips(student, length, cfg.streams, LONG_SEEDS, cfg.workers)
    own = student.net.cfg.memory
    plain = MemoryConfig("window", own.frames, 0, own.phase)
    made: dict[str, list[Tensor]] = {"anchors": [], "window": []}
    for k, clip in enumerate(tqdm(clips, "long streams", unit="stream")):
        made["anchors"].append(stream(student, codec, clip, length, seed=cfg.seed + k))
        made["window"].append(stream(student, codec, clip, length, plain, cfg.seed + k))
    made["real"] = [to_float(c.frames) for c in clips]
    found = {}
    for row, px in made.items():
        drift, curve = identity_drift(px, fps, cfg.window, others)
        found[{"anchors": "student"}.get(row, row)] = {"drift": drift, "curve": curve}
    return found, [*made["anchors"][:2], *made["window"][:2]]


def glance(name: str | Bundle, cfg: LipSyncConfig = LipSyncConfig()) -> dict[str, Any]:
    """Figures of a student's clips against real ones, without teacher, streams or report: to watch a training."""
    student = name if isinstance(name, Bundle) else checkpoint.load(name, "student")
    codec = checkpoint.load_codec(student)
    clips = real_clips(student, codec.px_frames(student.shape.frames), cfg.clips, CLIP_SEEDS, cfg.workers)
    truth = torch.stack([torch.from_numpy(c.mouth[:, 0]) for c in clips])
    plain: dict[str, Any] = report.plain(
        figures(made_clips(student, codec, clips, student.shape.frames, cfg), pixels(clips), truth)
    )
    return plain


def write(folder: Path, result: Mapping[str, Any], sheets: Mapping[str, Sequence[Tensor]]) -> None:
    """result.json and a contact sheet of clips and streams in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, streams in sheets.items():
        pictures = [(px.permute(0, 2, 3, 1) * 255).round().byte().numpy() for px in streams]
        save_png(folder / f"{name}.png", contact_sheet(pictures, every=max(1, len(pictures[0]) // 12), scale=2))


def table(result: Mapping[str, Any]) -> Table:
    out = Table(title=f"{result['protocol']['clips']} held-out people and sentences")
    for name in ("", *KEYS):
        out.add_column(name.replace("_", " "), justify="left" if not name else "right")
    for row in (row for row in ("real", "teacher", "student") if row in result):
        out.add_row(row, *(report.number(result[row], key) for key in KEYS))
    return out


def run(name: str, *, clips: int = 64, out: str | Path = "out/eval", teacher: str | None = None) -> dict[str, Any]:
    """Judge a network that hears by the fixed protocol; the table and what was promised go to stderr."""
    result = evaluate(name, teacher, LipSyncConfig(clips=clips, out=str(out)))
    console = Console(stderr=True)
    console.print(table(result))
    student, teacher_row, real = (result.get(row, {}) for row in ("student", "teacher", "real"))
    targets = [
        report.Target(
            "teacher's sync beside the reader's on real video", teacher_row["sync_corr"], 0.8 * real["sync_corr"]
        ),
    ]
    drift = student.get("identity_drift")
    targets += student and [
        report.Target("student's sync beside the teacher's", student["sync_corr"], 0.95 * teacher_row["sync_corr"]),
        report.Target("student's mouth motion beside real", student["mouth_motion_ratio"], 0.8),
        report.Target("likeness kept over a long stream", 0.0 if drift is None else 1 - drift, 0.95),
    ]
    for gate in targets:
        console.print(str(gate))
    return result
