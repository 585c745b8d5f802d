"""Timers of one student's streams and of a teacher's clips, round by round; no second loop."""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.bench.config import BenchConfig
from vidistill.bench.cost import pass_flops
from vidistill.bench.growth import batch_row, growth_rows
from vidistill.bench.machine import profile, threads
from vidistill.bench.result import Progress
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition, branches
from vidistill.conditioning.controls import LiveConditions
from vidistill.models.dit import VideoDiT
from vidistill.sampling import sample
from vidistill.streaming.drawn import Drawn
from vidistill.streaming.engine import Chunk, Frame
from vidistill.streaming.runtime import SpeedConfig, fast_decoder, for_inference, named
from vidistill.streaming.session import StreamConfig, StreamSession


class ConsistencyError(RuntimeError):
    """The stream is not what its rollout says; no speed is worth printing."""


@dataclass
class Timings:
    """What the rounds of a student or a teacher gave."""

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
    """Times streams of one student, computed as `speed` says; `origin` tells which student it is, however computed.

    With a codec it times frames of streams whose memory is full; without one (`codec` None) the passes of the first
    chunks of streams, as many as `cfg.chunks`. `drawn`: numbers that a stream begins with, see `bench`.
    """

    def __init__(
        self,
        bundle: Bundle,
        codec: Codec | None,
        cfg: BenchConfig,
        image: np.ndarray | None = None,
        speed: SpeedConfig | None = None,
        drawn: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.speed, self.cfg, self.origin = speed or SpeedConfig(), cfg, (bundle.folder, bundle.name, bundle.record)
        self.codec, self.drawn = codec and fast_decoder(codec, self.speed), drawn or {}
        self.bundle = for_inference(bundle, self.speed)
        self.name, self.timings, self.device = self.bundle.name, Timings(), self.bundle.net.net.device
        self._session: StreamSession | None = None  # of `rollout`
        self.image = self.default_image(codec) if image is None and codec and bundle.picture_frames else image
        with self.open() as session:
            self.nfe, self.memory_bytes, self.fps = session.nfe_per_chunk, session.memory_bytes, session.fps
            self.frames_per_chunk, self.inputs = session.frames_per_chunk, session.inputs
            self.lookahead_ms = session.takes["audio"]["lookahead_ms"] if "audio" in session.takes else None
            self.memory_config = session.memory_config
            self.fill = self.memory_config.chunks_to_fill(bundle.net.cfg.chunk)

    def default_image(self, codec: Codec) -> np.ndarray:
        """A grey picture, or clip, to start from: what is in it costs nothing."""
        shape, scale = self.bundle.shape, codec.spatial_factor
        frames = codec.px_frames(self.bundle.picture_frames)
        return np.full((frames, shape.height * scale, shape.width * scale, 3), 128, np.uint8)

    def open(self, pipelined: bool | None = None, queue_frames: int | None = None) -> StreamSession:
        pipelined = self.codec is not None and (self.cfg.pipelined if pipelined is None else pipelined)
        cfg = StreamConfig(self.cfg.seed, pipelined, queue_frames if pipelined else None)
        noise = self.drawn.get("noise")
        recorded = None if noise is None else Drawn(noise, self.drawn.get("fresh"))
        session = StreamSession(self.bundle, self.codec, cfg, image=self.image, drawn=recorded)
        if "text" in self.drawn:
            session.set(tokens=self.drawn["text"])
        return session

    def gate(self) -> None:
        """ConsistencyError unless latents equal those of the rollout, and pipelined frames plain ones, bit for bit.

        Frames are made with one thread each, because the order of sums in a product is that of its threads.
        """
        chunks = self.cfg.gate_chunks or self.bundle.schedule.given_chunks + self.fill + 1
        with self.open(pipelined=False) as session:
            expected = session.reference(chunks)
            if not torch.equal(torch.cat(list(islice(session.latents(), chunks)), dim=1), expected):
                raise ConsistencyError(f"{self.name}: the stream's latents differ from its rollout; nothing was timed")
        if self.codec is None:
            return
        count = chunks * self.frames_per_chunk
        with threads(1), self.open(pipelined=False) as plain, self.open(pipelined=True) as ahead:
            for a, b in zip(islice(plain.frames(), count), islice(ahead.frames(), count), strict=True):
                if not np.array_equal(a.px, b.px):
                    raise ConsistencyError(f"{self.name}: frame {a.index} changes when pipelined; nothing was timed")

    def send(self, session: StreamSession, number: int) -> int:
        """Set some input that the student has."""
        return session.set(**self.inputs.example(number))

    def warm_up(self) -> float:
        """Milliseconds of two chunks, without a codec of a round; of a cold process if called first, what they have
        compiled included."""
        if self.codec is None:
            return sum(chunk.stats["chunk_ms"] for chunk in self.rollout())
        began = time.perf_counter()
        with self.open() as session:
            next(f for f in session.frames() if f.chunk == self.bundle.schedule.given_chunks + 1)
        return 1000 * (time.perf_counter() - began)

    def rollout(self) -> list[Chunk]:
        """A chunk more than is timed: the context pass of a chunk runs before the next one."""
        self._session = self._session or self.open()  # one for all rounds, whose memory is touched already
        return list(islice(self._session.chunks(), self.cfg.chunks + 1))

    def round(self, number: int) -> None:
        """One session: its first chunks; with a codec first frame, steady chunks, inputs."""
        t, chunk = self.timings, self.bundle.net.cfg.chunk
        if self.codec is None:
            for a, b in pairwise(c.stats for c in self.rollout()):
                own = {"denoise_ms": a["denoise_ms"], "context_ms": b["context_ms"]}
                t.parts.append({**own, "chunk_ms": sum(own.values())})
            t.chunk_ms += (took := [p["chunk_ms"] for p in t.parts[-self.cfg.chunks :]])
            t.latents_per_s.append(1000 * self.cfg.chunks * chunk / sum(took))
            return
        per = self.frames_per_chunk
        with self.open() as session:
            frames = session.frames()
            began = time.perf_counter()
            if self.inputs.example(number):
                self.send(session, number)
            first = next(f for f in frames if f.chunk == self.bundle.schedule.given_chunks)
            t.first_frame_ms.append(1000 * (first.made_at - began))
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
        with self.open(queue_frames=1) as session:
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

    def batch(self) -> dict[str, Any]:
        """The passes of `cfg.batch` streams at once beside those of one."""
        fill, chunks = (self.fill, self.cfg.chunks) if self.codec else (1, self.cfg.chunks - 1)
        factor = self.codec.temporal_factor if self.codec else 1
        return batch_row(self.bundle, factor, self.cfg.batch, self.cfg.rounds, fill, chunks)

    def profile(self) -> dict[str, float]:
        """Share of each kind of operator in the chunk after those that a round times."""
        with self.open(pipelined=False) as session:
            chunks = session.chunks()
            for _ in range(self.cfg.chunks):
                next(chunks)
            return profile(lambda: next(chunks))

    @property
    def by_chunk(self) -> np.ndarray:
        """Milliseconds [chunks] that the passes of each timed chunk of a round take, medians over rounds."""
        return np.median(np.reshape([p["chunk_ms"] for p in self.timings.parts], (-1, self.cfg.chunks)), axis=0)

    @property
    def flops_per_s(self) -> float:
        """FLOPs that the passes of the timed chunks need over the time they take."""
        net, context = self.bundle.net, self.bundle.schedule.context != "last_step"
        seen: float = self.memory_config.tokens(net.shape.grid)
        if self.codec is None:  # the first of these chunks sees itself alone
            seen = net.shape.tokens_per_frame * net.cfg.chunk * (1 + self.cfg.chunks) / 2
        text = len(self.drawn["text"]) if "text" in self.drawn else 1  # `send` sets one token
        needed = sum(
            passes
            * sum(
                pass_flops(net.net.cfg, net.shape, net.cfg.chunk, seen, text=text, prompt=False, output=output).values()
            )
            for passes, output in ((self.nfe - context, True), (context, False))
        )
        return 1000 * needed / float(self.by_chunk.mean())


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
        inputs = LiveConditions.of(self.bundle.spec, self.codec.temporal_factor, device)
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


def take_chunk(frames: Iterator[Frame], count: int) -> Frame:
    """The last of the next `count` frames."""
    return list(islice(frames, count))[-1]
