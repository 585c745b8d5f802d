"""Times a StreamSession, and a teacher's clips beside it; no second loop. Each figure is explained at its field."""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.bench.growth import batch_row, growth_rows
from vidistill.bench.machine import environment, flops_per_pass, matmul_peak_gflops, peak_bytes, threads
from vidistill.bench.random_weights import RandomConfig, random_bench
from vidistill.bench.result import SPREAD, BenchResult, Progress
from vidistill.checkpoint import Bundle, is_published, load, load_codec, load_student, locate, read_record
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition, branches
from vidistill.conditioning.controls import LiveConditions
from vidistill.models.dit import VideoDiT
from vidistill.sampling import sample
from vidistill.streaming.engine import Frame
from vidistill.streaming.runtime import SpeedConfig, fast_decoder, for_inference, named
from vidistill.streaming.session import StreamConfig, StreamSession

__all__ = ["BenchConfig", "BenchResult", "ConsistencyError", "RandomConfig", "bench", "random_bench"]


class ConsistencyError(RuntimeError):
    """The stream is not what its rollout says; no speed is worth printing."""


@dataclass(frozen=True)
class BenchConfig:
    """Rounds alternate between the student and what it is held against. In each, `chunks` chunks are timed once memory
    is full and `warmup_chunks` have passed, then `inputs` inputs are set at random moments.

    `gate_chunks` are compared with the rollout first (0: until memory has begun to forget). A teacher makes clips of
    `clip_frames` latents in `clip_steps` steps; `guidance` (None: its checkpoint's) doubles its evaluations unless it
    is 1. A student that hears is spoken to for `speech_s` seconds in real time. `growth_minutes`: also time
    `growth_chunks` chunks up to each of these minutes of one stream that walks, if it takes actions. It really runs for
    the first `growth_run` minutes; past that its clock is advanced, its memory as full as it is, and rows say so.
    `batch`: also time so many streams in one pass, beside one alone.
    """

    rounds: int = 5
    chunks: int = 12
    inputs: int = 6
    warmup_chunks: int = 3
    gate_chunks: int = 0
    seed: int = 0
    threads: int = 0  # 0: as torch is set
    pipelined: bool = True
    clip_frames: int = 21
    clip_steps: int = 50
    guidance: float | None = None
    speech_s: float = 6.0
    growth_minutes: tuple[float, ...] = ()
    growth_chunks: int = 50
    growth_run: float = 1.0
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("rounds", "chunks", "clip_frames", "clip_steps", "growth_chunks", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("inputs", "warmup_chunks", "gate_chunks", "threads", "growth_run"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"bench.{name} must not be negative, got {getattr(self, name)}")
        if any(minutes <= 0 for minutes in self.growth_minutes):
            raise ValueError(f"bench.growth_minutes must be positive, got {list(self.growth_minutes)}")


@dataclass
class Timings:
    """What the rounds of one contender gave."""

    fps: list[float] = field(default_factory=list)
    latents_per_s: list[float] = field(default_factory=list)
    first_frame_ms: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    input_ms: list[float] = field(default_factory=list)
    speech_ms: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)

    def part(self, name: str) -> float:
        return statistics.median(p[name] for p in self.parts)


class StreamTimer:
    """Times streams of one student, computed as `speed` says; `origin` tells which student it is, however computed."""

    def __init__(
        self, bundle: Bundle, codec: Codec, cfg: BenchConfig, image: np.ndarray | None, speed: SpeedConfig | None = None
    ) -> None:
        self.speed, self.cfg, self.origin = speed or SpeedConfig(), cfg, (bundle.folder, bundle.name, bundle.record)
        self.codec, bundle = fast_decoder(codec, self.speed), for_inference(bundle, self.speed)
        self.name, self.bundle = bundle.name, bundle
        self.image = self.default_image() if image is None and bundle.given_frames else image
        self.timings, self.device = Timings(), bundle.net.net.device
        with self.open() as session:
            self.nfe, self.memory_bytes, self.fps = session.nfe_per_chunk, session.memory_bytes, session.fps
            self.frames_per_chunk, self.inputs = session.frames_per_chunk, session.inputs
            self.lookahead_ms = session.takes["audio"]["lookahead_ms"] if "audio" in session.takes else None
            self.memory_config = session.memory_config
            self.fill = self.memory_config.chunks_to_fill(bundle.net.cfg.chunk)

    def default_image(self) -> np.ndarray:
        """A grey picture, or clip, to start from: what is in it costs nothing."""
        shape, scale = self.bundle.shape, self.codec.spatial_factor
        frames = self.codec.px_frames(self.bundle.given_frames)
        return np.full((frames, shape.height * scale, shape.width * scale, 3), 128, np.uint8)

    def open(self, pipelined: bool | None = None) -> StreamSession:
        cfg = StreamConfig(self.cfg.seed, self.cfg.pipelined if pipelined is None else pipelined)
        return StreamSession(self.bundle, self.codec, cfg, image=self.image)

    def gate(self) -> None:
        """GateError unless streamed latents equal the rollout and pipelined frames equal plain ones, bit for bit.

        With one thread each, because the order of sums in a product is that of its threads.
        """
        chunks = self.cfg.gate_chunks or self.bundle.schedule.given_chunks + self.fill + 1
        with self.open(pipelined=False) as session:
            expected = session.reference(chunks)
            if not torch.equal(torch.cat(list(islice(session.latents(), chunks)), dim=1), expected):
                raise ConsistencyError(f"{self.name}: the stream's latents differ from its rollout; nothing was timed")
        count = chunks * self.frames_per_chunk
        with threads(1), self.open(pipelined=False) as plain, self.open(pipelined=True) as ahead:
            for a, b in zip(islice(plain.frames(), count), islice(ahead.frames(), count), strict=True):
                if not np.array_equal(a.px, b.px):
                    raise ConsistencyError(f"{self.name}: frame {a.index} changes when pipelined; nothing was timed")

    def send(self, session: StreamSession, number: int) -> int:
        """Set some input that the student has."""
        return session.set(**self.inputs.example(number))

    def warm_up(self) -> float:
        """Milliseconds of two chunks; of a cold process if called first, what they have compiled included."""
        began = time.perf_counter()
        with self.open() as session:
            next(f for f in session.frames() if f.chunk == self.bundle.schedule.given_chunks + 1)
        return 1000 * (time.perf_counter() - began)

    def round(self, number: int) -> None:
        """One session: first frame, steady chunks, inputs."""
        t, per = self.timings, self.frames_per_chunk
        with self.open() as session:
            frames = session.frames()
            began = time.perf_counter()
            if self.inputs.example(number):
                self.send(session, number)
            first = next(f for f in frames if f.chunk == self.bundle.schedule.given_chunks)
            t.first_frame_ms.append(1000 * (first.made_at - began))
            chunk = self.bundle.net.cfg.chunk
            next(f for f in frames if f.chunk == first.chunk + self.fill + self.cfg.warmup_chunks)
            heads = [take_chunk(frames, per - 1)]  # the rest of that chunk; from here on whole chunks
            heads += [take_chunk(frames, per) for _ in range(self.cfg.chunks)]
            seconds = heads[-1].made_at - heads[0].made_at
            t.fps.append(self.cfg.chunks * per / seconds)
            t.latents_per_s.append(self.cfg.chunks * chunk / seconds)
            t.chunk_ms += [1000 * (b.made_at - a.made_at) for a, b in pairwise(heads)]
            t.parts += [head.stats for head in heads[1:]]
            if self.inputs.example(number):
                t.input_ms += self.time_inputs(session, frames, statistics.median(t.chunk_ms), number)

    def time_inputs(
        self, session: StreamSession, frames: Iterator[Frame], chunk_ms: float, number: int
    ) -> Iterator[float]:
        """Milliseconds from inputs, at random moments of a chunk, to the first image that used each."""
        random = Random(number)
        for i in range(self.cfg.inputs):
            time.sleep(random.random() * chunk_ms / 1000)
            began = time.perf_counter()
            wanted = self.send(session, i)
            used = next(f for f in frames if f.input_id >= wanted)
            yield 1000 * (used.made_at - began)
            take_chunk(frames, self.frames_per_chunk - 1)

    def speech(self) -> list[float]:
        """Milliseconds from sound, which comes as it is spoken, to the picture shown with it at the world's pace."""
        late, pause = [], 1 / self.fps
        cfg = StreamConfig(self.cfg.seed, self.cfg.pipelined, queue_frames=1 if self.cfg.pipelined else 0)
        with StreamSession(self.bundle, self.codec, cfg, image=self.image) as session:
            if "audio" not in session.takes:
                return []
            spoken = np.random.default_rng(0).uniform(-0.3, 0.3, round(session.takes["audio"]["rate"] * pause))
            frames = session.frames()
            next(frames)
            due = time.perf_counter()
            for _ in range(round(self.cfg.speech_s * self.fps)):
                session.set(audio=spoken)
                frame = next(frames)
                time.sleep(max(0.0, due - time.perf_counter()))
                now = time.perf_counter()
                if "audio_to_lip_ms" in frame.stats:
                    late.append(frame.stats["audio_to_lip_ms"] + 1000 * (now - frame.made_at))
                due = max(due + pause, now)
        return late

    def growth(self, progress: Progress) -> list[dict[str, float]]:
        """Chunk times and bytes around each of `growth_minutes` of one stream, in turn with a young one."""
        with self.open(pipelined=False) as old, self.open(pipelined=False) as young:
            return growth_rows(old, young, self.fill, self.cfg, progress)


class ClipTimer:
    """Times whole clips of a teacher, computed as `speed` says and started from the student's own start."""

    def __init__(
        self, bundle: Bundle, codec: Codec, cfg: BenchConfig, given: Tensor | None, speed: SpeedConfig | None = None
    ) -> None:
        self.speed, self.cfg, self.given = speed or SpeedConfig(), cfg, given
        frames = cfg.clip_frames + (0 if given is None else given.shape[1])
        self.codec, bundle = fast_decoder(codec, self.speed), faster_teacher(bundle, self.speed, frames)
        self.name, self.bundle = bundle.name, bundle
        own = bundle.record.get("guidance", 1.0), bundle.record.get("audio_guidance", 0.0)
        self.guidance = own if cfg.guidance is None else (cfg.guidance, 0.0)
        self.nfe = cfg.clip_steps * (1 + len(branches(Condition(), *self.guidance)[1]))
        self.timings = Timings()

    def warm_up(self) -> None:
        self.clip(1, 0)

    def round(self, number: int) -> None:
        """One clip, from the condition to images on the host."""
        began = time.perf_counter()
        made = self.clip(self.cfg.clip_steps, number)
        seconds = time.perf_counter() - began
        self.timings.fps.append(made / seconds)
        self.timings.first_frame_ms.append(1000 * seconds)

    def clip(self, steps: int, number: int) -> int:
        """Sample and decode one clip; returns how many frames of it were not given."""
        net, shape, given = self.bundle.net, self.bundle.shape, 0 if self.given is None else self.given.shape[1]
        frames, device = self.cfg.clip_frames + given, next(net.parameters()).device
        inputs = LiveConditions.of(self.bundle.record, self.codec.temporal_factor, device)
        inputs.begin(self.given)
        cond = inputs.condition(inputs.control, 0, frames)
        nulls, scales = branches(cond, *self.guidance)
        rng = torch.Generator().manual_seed(self.cfg.seed + number)
        noise = torch.randn(1, frames, shape.channels, shape.height, shape.width, generator=rng).to(device)
        sigmas = self.bundle.noise.steps(steps)
        latents = sample(net, noise, sigmas, cond, given=self.given, nulls=nulls, scales=scales)
        with torch.no_grad():
            px = self.codec.decode_stream(latents)[0].cpu()
        return px.shape[1] - (self.codec.px_frames(given) if given else 0)


def bench(
    student: str | Path | Bundle,
    cfg: BenchConfig | None = None,
    *,
    vs: str | Path | Bundle | None = None,
    codec: Codec | None = None,
    image: np.ndarray | None = None,
    speed: SpeedConfig | None = None,
    growth: bool = False,
    progress: Progress = lambda part, what: None,
) -> BenchResult:
    """Times a student, and `vs` (another student, or a teacher) in alternating rounds. Raises GateError before timing.

    `codec` (default: its own) and `image` (default: grey) are the student's; another student uses its own codec.
    `speed`: how networks and decoders of both are computed, ValueError where one cannot be; a student held against
    itself is plain there, which shows what `speed` gains. `growth`: also after 1, 10 and 60 minutes of stream, where
    `cfg` names no others.
    """
    cfg = cfg or BenchConfig()
    if growth and not cfg.growth_minutes:
        cfg = replace(cfg, growth_minutes=(1.0, 10.0, 60.0))
    bundle = student if isinstance(student, Bundle) else load_student(student)
    if isinstance(vs, str | Path) and not is_published(vs):
        check_baseline(str(vs), read_record(locate(vs))["kind"])  # told before anything runs
    with threads(cfg.threads):
        own = StreamTimer(bundle, codec or load_codec(bundle), cfg, image, speed)
        del bundle  # plain weights are not kept beside those of another kind
        progress(0.0, "warming up")
        warmup_ms = own.warm_up()
        progress(0.0, "correctness gate")
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
        streams = None
        if cfg.batch > 1:
            progress(0.9, f"{cfg.batch} streams in one pass")
            streams = batch_row(own.bundle, own.codec.temporal_factor, cfg.batch, cfg.rounds, own.fill, cfg.chunks)
        return summary(own, other, warmup_ms, peak, rows, streams)


def check_baseline(name: str, kind: str) -> None:
    """ValueError unless a checkpoint of this kind makes clips."""
    if kind not in ("student", "teacher"):
        raise ValueError(f"{name} is a {kind}; a student is held against a student or a teacher")


def baseline_of(own: StreamTimer, vs: Bundle, cfg: BenchConfig, image: np.ndarray | None) -> StreamTimer | ClipTimer:
    """What the student is held against, computed at its own speed setting; plainly if it is the very same student."""
    check_baseline(vs.name, vs.kind)
    codec = load_codec(vs)
    if vs.kind == "student":
        itself = (vs.folder, vs.name, vs.record) == own.origin
        return StreamTimer(vs, codec, cfg, image, own.speed.baseline if itself else own.speed)
    with own.open() as session:
        return ClipTimer(vs, codec, cfg, session.given, own.speed)


def faster_teacher(bundle: Bundle, speed: SpeedConfig, frames: int) -> Bundle:
    """The teacher `bundle` of the same weights, computed as `speed` says in passes of `frames` latent frames.

    ValueError where that cannot run here.
    """
    if speed.keeps(bundle.net):
        return bundle
    if isinstance(bundle.net, VideoDiT):
        return named(bundle, speed, bundle.net.for_inference(frames * bundle.shape.tokens_per_frame, *speed.how))
    if not speed.plain:
        raise ValueError(
            f"{bundle.name} is a {type(bundle.net).__name__}, which cannot be compiled or get other linear layers, and "
            "both sides must run alike: leave --compile and --linears out, or bench without --vs"
        )
    return named(bundle, speed, copy.deepcopy(bundle.net).to(speed.where, speed.dtype))


def summary(
    own: StreamTimer,
    other: StreamTimer | ClipTimer | None,
    warmup_ms: float,
    peak: int,
    growth: Sequence[Mapping[str, float]] | None,
    streams: Mapping[str, Any] | None,
) -> BenchResult:
    t, net = own.timings, own.bundle.net
    p50, p95 = np.percentile(t.chunk_ms, 50), np.percentile(t.chunk_ms, 95)
    fps, gflops = statistics.median(t.fps), matmul_peak_gflops(own.device)
    tokens, chunk = net.shape.tokens_per_frame, net.cfg.chunk
    seen = net.new_memory(1, cfg=own.memory_config).tokens - tokens * chunk
    context = own.bundle.schedule.context != "last_step"
    needed = sum(
        passes * flops_per_pass(net.net.cfg, tokens * chunk, seen, frames=chunk, output=output)
        for passes, output in ((own.nfe - context, True), (context, False))
    )
    parts = {name: t.part(f"{name}_ms") for name in ("denoise", "context", "decode", "host")}
    return BenchResult(
        name=own.name,
        fps=fps,
        real_time_factor=fps / own.fps,
        first_frame_ms=statistics.median(t.first_frame_ms),
        chunk_ms_p50=float(p50),
        chunk_ms_p95=float(p95),
        input_to_frame_ms_p95=float(np.percentile(t.input_ms, 95)) if t.input_ms else None,
        nfe_per_chunk=own.nfe,
        latents_per_s=statistics.median(t.latents_per_s),
        memory_bytes=own.memory_bytes,
        peak_bytes=peak,
        parts_ms=parts,
        steady=bool(p95 <= SPREAD * p50),
        matmul_peak_gflops=gflops,
        model_flops_utilisation=needed / (1e6 * t.part("chunk_ms")) / gflops,
        warmup_ms=warmup_ms,
        ranges={name: (min(v), max(v)) for name, v in (("fps", t.fps), ("first_frame_ms", t.first_frame_ms))},
        env=environment(net)
        | {"shape": asdict(net.shape), "chunk": chunk, "bench": asdict(own.cfg), "speed": asdict(own.speed)},
        audio_lookahead_ms=own.lookahead_ms,
        audio_to_lip_ms_p95=float(np.percentile(t.speech_ms, 95)) if t.speech_ms else None,
        vs=compare(own, other) if other else None,
        growth=growth,
        batch=streams,
    )


def compare(own: StreamTimer, other: StreamTimer | ClipTimer) -> dict[str, Any]:
    """Medians, over rounds, of the student's speed over the other's; above 1 the student is better in each."""
    fps = [a / b for a, b in zip(own.timings.fps, other.timings.fps, strict=True)]
    firsts = zip(own.timings.first_frame_ms, other.timings.first_frame_ms, strict=True)
    return {
        "name": other.name,
        "speed": asdict(other.speed),
        **difference(own, other),
        "fps_ratio": statistics.median(fps),
        "first_frame_ratio": statistics.median(b / a for a, b in firsts),
        "nfe_ratio": other.nfe / own.nfe,
        "fps": statistics.median(other.timings.fps),
        "first_frame_ms": statistics.median(other.timings.first_frame_ms),
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


def take_chunk(frames: Iterator[Frame], count: int) -> Frame:
    """The last of the next `count` frames."""
    return list(islice(frames, count))[-1]
