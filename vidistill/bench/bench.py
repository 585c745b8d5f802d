"""Times a student beside another or a teacher, in alternating rounds. Each figure is explained at its field."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vidistill.bench.config import BenchConfig
from vidistill.bench.machine import environment, matmul_peak_gflops, peak_bytes, threads
from vidistill.bench.result import SPREAD, BenchResult, Progress
from vidistill.bench.timers import ClipTimer, StreamTimer
from vidistill.checkpoint import Bundle, is_published, load, load_codec, load_student, locate, read_record
from vidistill.codecs import Codec
from vidistill.streaming.runtime import SpeedConfig


def bench(
    student: str | Path | Bundle,
    cfg: BenchConfig | None = None,
    *,
    vs: str | Path | Bundle | None = None,
    codec: Codec | None = None,
    image: np.ndarray | None = None,
    speed: SpeedConfig | None = None,
    drawn: Mapping[str, Tensor] | None = None,
    growth: bool = False,
    profiled: bool = False,
    progress: Progress = lambda part, what: None,
) -> BenchResult:
    """Times a student, and `vs` (another student, or a teacher) in alternating rounds.

    Raises ConsistencyError before timing. `codec` (default: its own; one without makes latents only) and `image`
    (default: grey) are the student's; another student uses its own codec. `speed`: how networks and decoders of both
    are computed, ValueError where one cannot be; a student held against itself is plain there, which shows what `speed`
    gains. `drawn`: numbers from elsewhere, `noise` and `fresh` as in `streaming.drawn.Drawn`, and `text` [L, D].
    `growth`: also after 1, 10 and 60 minutes of stream, where `cfg` names no others. `profiled`: also which operators
    take the time of a chunk.
    """
    cfg = cfg or BenchConfig()
    if growth and not cfg.growth_minutes:
        cfg = replace(cfg, growth_minutes=(1.0, 10.0, 60.0))
    bundle = student if isinstance(student, Bundle) else load_student(student)
    if isinstance(vs, str | Path) and not is_published(vs):
        check_baseline(str(vs), read_record(locate(vs))["kind"])  # told before anything runs
    with threads(cfg.threads):
        own = StreamTimer(bundle, codec or own_codec(bundle), cfg, image, speed, drawn)
        del bundle  # plain weights are not kept beside those of another kind
        progress(0.0, "warming up")
        warmup_ms = own.warm_up()
        progress(0.0, "consistency gate")
        own.gate()
        peak = peak_bytes(own.device)
        other = None if vs is None else baseline_of(own, vs if isinstance(vs, Bundle) else load(vs), cfg, image)
        if other:
            other.warm_up()
        if isinstance(other, StreamTimer):
            other.gate()
        for number in range(cfg.rounds):
            progress(number / cfg.rounds, f"round {number + 1} of {cfg.rounds}")
            own.round(number)
            if other:
                other.round(number)
        rows = own.growth(progress) if cfg.growth_minutes else None
        own.timings.speech_ms += own.speech()
        progress(0.9, "the last figures")
        streams = own.batch() if cfg.batch > 1 else None
        return result(own, other, warmup_ms, peak, rows, streams, own.profile() if profiled else None)


def own_codec(bundle: Bundle) -> Codec | None:
    """The codec that a network's record names, if it names one."""
    return load_codec(bundle) if bundle.record.get("codec") else None


def check_baseline(name: str, kind: str) -> None:
    """ValueError unless a checkpoint of this kind makes clips."""
    if kind not in ("student", "teacher"):
        raise ValueError(f"{name} is a {kind}; a student is held against a student or a teacher")


def baseline_of(own: StreamTimer, vs: Bundle, cfg: BenchConfig, image: np.ndarray | None) -> StreamTimer | ClipTimer:
    """What the student is held against, computed at its own speed setting; plainly if it is the very same student."""
    check_baseline(vs.name, vs.kind)
    codec = own_codec(vs)
    if vs.kind == "student" and (codec is None) == (own.codec is None):
        itself = (vs.folder, vs.name, vs.record) == own.origin
        return StreamTimer(vs, codec, cfg, image, own.speed.baseline if itself else own.speed, own.drawn)
    if codec is None or own.codec is None:
        raise ValueError(
            f"{(own if codec else vs).name} has no codec: give it one, or compare it with a student without"
        )
    with own.open() as session:
        return ClipTimer(vs, codec, cfg, session.given, own.speed)


def result(
    own: StreamTimer,
    other: StreamTimer | ClipTimer | None,
    warmup_ms: float,
    peak: int,
    growth: Sequence[Mapping[str, float]] | None,
    streams: Mapping[str, Any] | None,
    shares: Mapping[str, float] | None,
) -> BenchResult:
    """The figures of all rounds; those of frames are None for a student without a codec."""
    t, net, frames = own.timings, own.bundle.net, own.codec is not None
    p50, p95 = np.percentile(t.chunk_ms, 50), np.percentile(t.chunk_ms, 95)
    fps, gflops = statistics.median(t.fps) if frames else None, matmul_peak_gflops(own.device)
    parts = ("denoise", "context", "decode", "host") if frames else ("denoise", "context")
    ranges = {"fps": t.fps, "first_frame_ms": t.first_frame_ms} if frames else {"latents_per_s": t.latents_per_s}
    setting = {"shape": asdict(net.shape), "chunk": net.cfg.chunk, "bench": asdict(own.cfg)}
    return BenchResult(
        name=own.name,
        fps=fps,
        real_time_factor=fps and fps / own.fps,
        first_frame_ms=statistics.median(t.first_frame_ms) if frames else None,
        chunk_ms_p50=float(p50),
        chunk_ms_p95=float(p95),
        input_to_frame_ms_p95=float(np.percentile(t.input_ms, 95)) if t.input_ms else None,
        nfe_per_chunk=own.nfe,
        latents_per_s=statistics.median(t.latents_per_s),
        memory_bytes=own.memory_bytes,
        peak_bytes=peak,
        parts_ms={name: t.part(f"{name}_ms") for name in parts},
        steady=bool(p95 <= SPREAD * p50),
        matmul_peak_gflops=gflops,
        model_flops_utilisation=own.flops_per_s / 1e9 / gflops,
        warmup_ms=warmup_ms,
        ranges={name: (min(values), max(values)) for name, values in ranges.items()},
        env=environment(net)
        | {"speed": asdict(own.speed), **(setting if frames else {"chunk_ms": own.by_chunk.tolist()})},
        audio_lookahead_ms=own.lookahead_ms,
        audio_to_lip_ms_p95=float(np.percentile(t.speech_ms, 95)) if t.speech_ms else None,
        vs=compare(own, other, gflops) if other else None,
        profile=shares,
        growth=growth,
        batch=streams,
    )


def compare(own: StreamTimer, other: StreamTimer | ClipTimer, gflops: float) -> dict[str, Any]:
    """Medians, over rounds, of the student's speed over the other's; above 1 the student is better in each."""
    a, b = own.timings, other.timings
    row = {"name": other.name, "speed": asdict(other.speed), **difference(own, other)}
    if own.codec is None and isinstance(other, StreamTimer):
        ratios = [x / y for x, y in zip(a.latents_per_s, b.latents_per_s, strict=True)]
        return row | {
            "chunk_ratio": statistics.median(ratios),
            "chunk_ratio_range": (min(ratios), max(ratios)),
            "chunk_ms_p50": statistics.median(b.chunk_ms),
            "model_flops_utilisation": other.flops_per_s / 1e9 / gflops,
        }
    fps = [x / y for x, y in zip(a.fps, b.fps, strict=True)]
    return row | {
        "fps_ratio": statistics.median(fps),
        "first_frame_ratio": statistics.median(y / x for x, y in zip(a.first_frame_ms, b.first_frame_ms, strict=True)),
        "nfe_ratio": other.nfe / own.nfe,
        "fps": statistics.median(b.fps),
        "first_frame_ms": statistics.median(b.first_frame_ms),
        "nfe": other.nfe,
        "fps_ratio_range": (min(fps), max(fps)),
    }


def difference(own: StreamTimer, other: StreamTimer | ClipTimer) -> dict[str, float]:
    """Relative difference of the first latents that two ways to compute the same student make; else nothing."""
    if not isinstance(other, StreamTimer) or other.bundle.record != own.bundle.record:
        return {}
    chunks = own.bundle.schedule.given_chunks + 1
    with own.open() as a, other.open() as b:
        x, y = a.reference(chunks), b.reference(chunks)
    return {"latents_difference": float((x - y).norm() / y.norm())}
