"""StreamSession: a student that runs for ever, its inputs switchable at chunk boundaries. No training imports."""

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning import Condition, Inputs, Script, Wish, concat, scripted
from vidistill.memory import MemoryConfig, stream_memory
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import Pass, endless, finite
from vidistill.student import CausalStudent
from vidistill.video import to_float, to_uint8

Admit = Callable[[int], bool]  # px frames of the next chunk -> may it start?


@dataclass(frozen=True)
class StreamConfig:
    """How a session runs.

    `pipelined`: denoise and decode in two worker threads, so that the next chunk is denoised while this one is decoded;
    otherwise everything happens in the thread that asks for frames. `queue_frames`: frames that may wait for the
    consumer (0: two chunks, which keeps both workers busy); a chunk starts when it fits there or when nothing waits, so
    1 starts every chunk as late as possible and keeps inputs fresh. `memory` replaces the student's own. `threads` and
    `decode_threads` (0: as the caller's) are intra-op threads of the two workers.
    """

    seed: int = 0
    pipelined: bool = True
    queue_frames: int = 0
    memory: MemoryConfig | None = None
    threads: int = 0
    decode_threads: int = 0

    def __post_init__(self) -> None:
        for name in ("queue_frames", "threads", "decode_threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"stream.{name} must not be negative, got {getattr(self, name)}")
        if not self.pipelined and (self.threads or self.decode_threads):
            raise ValueError(
                "stream.threads and decode_threads set the workers of a pipelined stream; without workers call "
                "torch.set_num_threads"
            )


@dataclass(frozen=True)
class Frame:
    """A picture of a stream.

    px: uint8 [H, W, 3]. index: pictures before it since the last reset. input_id: number of the last `set` that had a
    say in it, 0: none. dream: resets before it. made_at: `time.perf_counter()` when it was on the host. stats: what its
    chunk cost, in ms: denoise_ms and context_ms (passes since the chunk before), chunk_ms (both), decode_ms, host_ms.
    """

    px: np.ndarray
    index: int
    chunk: int
    input_id: int
    dream: int
    made_at: float
    stats: Mapping[str, float]


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: latents [1, f, C, H, W]; the rest as in `Frame`, stats before decoding."""

    latents: Tensor
    index: int
    input_id: int
    dream: int
    stats: Mapping[str, float]


@dataclass(eq=False)
class _Dream:
    """One run from a start to the next reset; `over` stops it before its next pass."""

    number: int
    seed: int
    given: Tensor | None  # latents [1, F, C, H, W] it starts from
    over: bool = False


class _Stopwatch:
    """Milliseconds spent on each kind of pass; waiting between `stop` and `start` is not counted."""

    def __init__(self) -> None:
        self._spent = {"denoise_ms": 0.0, "context_ms": 0.0}
        self._part, self._began = "", 0.0

    def start(self, part: str) -> None:
        self._part, self._began = part, time.perf_counter()

    def stop(self) -> None:
        if self._part:
            self._spent[self._part] += 1000 * (time.perf_counter() - self._began)
        self._part = ""

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        self.stop()
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return {**spent, "chunk_ms": sum(spent.values())}


class _Engine:
    """Denoiser and decoder of a session, without threads of its own."""

    def __init__(self, bundle: Bundle, codec: Codec | None, cfg: StreamConfig) -> None:
        if bundle.kind != "student":
            raise ValueError(f"{bundle.name} is a {bundle.kind}; only a student streams")
        self.student: CausalStudent = bundle.net
        self.codec, self.schedule = codec, bundle.schedule
        self.device = self.student.net.head.head.weight.device
        self.factor = codec.temporal_factor if codec else bundle.record["world"].get("temporal", 1)
        if codec is not None and codec.latent_channels != self.student.shape.channels:
            raise ValueError(f"{bundle.name} has {self.student.shape.channels} channels, not {codec.latent_channels}")
        self.memory_config = stream_memory(cfg.memory or self.student.cfg.memory, self.student.cfg.chunk)
        self.memory = self.student.new_memory(1, cfg=self.memory_config)
        self.inputs = Inputs.of(bundle.record, self.factor, self.device)
        self.script: Script = ()  # asked for at every chunk, in place of `set`
        self.closed = False
        self.dream = _Dream(0, cfg.seed, None)
        self._taken: dict[int, tuple[Wish, Condition]] = {}  # first latent frame of a chunk -> what it is made with
        self._watch = _Stopwatch()
        self._codec_state, self._next_index = None, 0

    def begin(self, dream: _Dream) -> None:
        """Go on with another dream; the present one ends before its next pass."""
        self.dream.over = True
        self.dream = dream

    def close(self) -> None:
        self.closed = self.dream.over = True

    def px_frames(self, chunk: int) -> int:
        """Px frames that `chunk` decodes to."""
        first, stop = self.student.first_frame(chunk), self.student.first_frame(chunk + 1)
        return self.factor * (stop - first) - (self.factor - 1 if chunk == 0 else 0)

    @torch.no_grad()
    def encode(self, image: np.ndarray | None) -> Tensor | None:
        """Latents [1, F, C, H, W] of the given chunks from uint8 `image` [H, W, 3], or a clip [T, H, W, 3]."""
        given = self.student.first_frame(self.schedule.given_chunks)
        if image is None:
            if given:
                raise ValueError("this student starts from a picture: pass `image`, uint8 [H, W, 3]")
            return None
        if not given:
            raise ValueError("this student starts from noise and takes no `image`")
        if self.codec is None:
            raise ValueError("a session without a codec cannot start from an `image`")
        shape, scale = self.student.shape, self.codec.spatial_factor
        clip = image[None] if image.ndim == 3 else image
        needed = (self.codec.px_frames(given), shape.height * scale, shape.width * scale, 3)
        if clip.dtype != np.uint8 or clip.shape != needed:
            raise ValueError(f"image is {image.dtype} {list(image.shape)}; needed is uint8 {list(needed)}")
        return self.codec.encode(to_float(clip)[None].to(self.device))

    @torch.no_grad()
    def chunks(self, dream: _Dream, admit: Admit = lambda px_frames: True) -> Iterator[Chunk]:
        """Finished chunks of `dream`, until it is over or `admit`, asked with the px frames of the next, says no."""
        self.memory.reset()
        self._taken.clear()
        self._watch.take()
        finished = rollout(
            self.student,
            self._passes(dream, admit),
            noise=chunk_noise(self.student, 1, dream.seed, dream.given),
            cond=self._condition,
            memory=self.memory,
            rng=torch.Generator().manual_seed(dream.seed),
        )
        for index, latents in enumerate(finished):
            wish = self._taken[self.student.first_frame(index)][0]
            yield Chunk(latents, index, wish.id, dream.number, self._watch.take())

    def _passes(self, dream: _Dream, admit: Admit) -> Iterator[Pass]:
        """The endless schedule, timed; a chunk takes the inputs of the moment it is admitted."""
        current = -1
        for p in endless(self.schedule):
            if p.chunk != current:
                current = p.chunk
                if not admit(self.px_frames(current)):
                    return
            if dream.over:
                return
            self._take_inputs(p)
            self._watch.start("context_ms" if p.next_sigma is None else "denoise_ms")
            yield p
            self._watch.stop()

    def _take_inputs(self, p: Pass) -> None:
        self._taken = {start: v for start, v in self._taken.items() if start >= self.student.first_frame(p.chunk)}
        for chunk in range(p.chunk, p.chunk + len(p.sigma)):
            start, stop = self.student.first_frame(chunk), self.student.first_frame(chunk + 1)
            if start not in self._taken:
                if self.script:
                    self.inputs.set(scripted(self.script, max(0, self.factor * (start - 1) + 1)), None, None)
                wish = self.inputs.wish
                self._taken[start] = (wish, self.inputs.condition(wish, start, stop))

    def _condition(self, start: int, stop: int) -> Condition:
        """What the chunks of latent frames start..stop-1 are made with; the tokens are those of the first chunk."""
        parts = [cond for first, (_, cond) in self._taken.items() if start <= first < stop]
        return parts[0] if len(parts) == 1 else concat(parts, dim=1)

    @torch.no_grad()
    def decode(self, chunk: Chunk) -> list[Frame]:
        """The pictures of a chunk; the chunks of a dream must come in order."""
        assert self.codec is not None
        if chunk.index == 0:
            self._codec_state, self._next_index = None, 0
        began = time.perf_counter()
        px, self._codec_state = self.codec.decode_stream(chunk.latents, self._codec_state)
        decoded = time.perf_counter()
        images = to_uint8(px[0])
        made_at = time.perf_counter()
        stats = {**chunk.stats, "decode_ms": 1000 * (decoded - began), "host_ms": 1000 * (made_at - decoded)}
        numbered = list(enumerate(images, self._next_index))
        self._next_index += len(images)
        return [Frame(px, i, chunk.index, chunk.input_id, chunk.dream, made_at, stats) for i, px in numbered]


def _inline(engine: _Engine) -> Iterator[Frame]:
    """Frames made in the thread that asks for them, from dream to dream, until the engine is closed."""
    while not engine.closed:
        dream = engine.dream
        for chunk in engine.chunks(dream):
            for frame in engine.decode(chunk):
                if dream.over:
                    break
                yield frame


class _Pipeline:
    """Makes frames ahead in two threads; holds no more than `capacity` frames, or one chunk if that is longer."""

    def __init__(self, engine: _Engine, capacity: int, threads: int, decode_threads: int) -> None:
        self.engine, self.capacity = engine, capacity
        self.error: BaseException | None = None
        self._turn = threading.Condition()
        self._todo: deque[Chunk] = deque()
        self._ready: deque[Frame] = deque()
        self._pending = 0  # frames of this dream that are denoised and not yet taken
        jobs = {"denoise": (self._denoise, threads), "decode": (self._decode, decode_threads)}
        self._workers = [
            threading.Thread(target=self._work, args=job, name=f"vidistill-{name}", daemon=True)
            for name, job in jobs.items()
        ]
        self._started = False

    def frames(self) -> Iterator[Frame]:
        """Frames of the current dream, each waited for, until the engine is closed; raises what a worker raised."""
        while frame := self._next():
            yield frame

    def _next(self) -> Frame | None:
        with self._turn:
            if not self._started and not self.engine.closed:
                self._started = True
                for worker in self._workers:
                    worker.start()
            self._turn.wait_for(lambda: self._ready or self._stopped)
            if self.error is not None:
                raise self.error
            if self.engine.closed:
                return None
            self._pending -= 1
            self._turn.notify_all()
            return self._ready.popleft()

    def begin(self, dream: _Dream) -> None:
        with self._turn:
            self.engine.begin(dream)
            self._todo.clear()
            self._ready.clear()
            self._pending = 0
            self._turn.notify_all()

    def close(self) -> None:
        """Stop the workers and wait for them."""
        with self._turn:
            self.engine.close()
            self._turn.notify_all()
            started = self._started
        for worker in self._workers if started else ():
            if worker is not threading.current_thread():
                worker.join()

    @property
    def _stopped(self) -> bool:
        return self.engine.closed or self.error is not None

    def _work(self, job: Callable[[], None], threads: int) -> None:
        """Run a worker; what it raises reaches the consumer and stops the other one."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            job()
        except BaseException as error:
            with self._turn:
                self.error = self.error or error
                self.engine.dream.over = True
                self._turn.notify_all()
        finally:
            torch.set_num_threads(before)

    def _denoise(self) -> None:
        while not self._stopped:
            dream = self.engine.dream
            for chunk in self.engine.chunks(dream, partial(self._admit, dream)):
                with self._turn:
                    if not dream.over:
                        self._pending += self.engine.px_frames(chunk.index)
                        self._todo.append(chunk)
                        self._turn.notify_all()

    def _admit(self, dream: _Dream, px_frames: int) -> bool:
        """Wait until a chunk fits, or nothing waits, or `dream` is over; True if the chunk may start."""
        with self._turn:
            self._turn.wait_for(lambda: dream.over or not self._pending or self._pending + px_frames <= self.capacity)
            return not dream.over

    def _decode(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._todo or self._stopped)
                if self._stopped:
                    return
                chunk = self._todo.popleft()
            frames = self.engine.decode(chunk)
            with self._turn:
                if chunk.dream == self.engine.dream.number:
                    self._ready.extend(frames)
                    self._turn.notify_all()


class StreamSession:
    """A student that runs for ever: pictures from `frames`, inputs through `set`, a new start through `reset`.

    One consumer; `set`, `reset` and `close` may be called from any thread. Memory is constant for any length.
    """

    def __init__(
        self,
        bundle: Bundle,
        codec: Codec | None,
        cfg: StreamConfig | None = None,
        *,
        image: np.ndarray | None = None,
    ) -> None:
        """A session of a loaded student; ValueError if codec, image or memory do not fit it.

        image: uint8 [H, W, 3], the picture to start from; a clip [T, H, W, 3] where the student is given more. Without
        a codec there are latents but no frames.
        """
        world = bundle.record.get("world", {})
        if "fps" not in world:
            raise ValueError(f"{bundle.name} does not say how many frames a second its world has (world.fps)")
        self.fps: float = world["fps"]
        self.cfg = cfg = cfg or StreamConfig()
        self._engine = engine = _Engine(bundle, codec, cfg)
        engine.begin(_Dream(0, cfg.seed, engine.encode(image)))
        self._pipeline: _Pipeline | None = None
        if cfg.pipelined:
            threads = cfg.threads or torch.get_num_threads()
            capacity = cfg.queue_frames or 2 * self.frames_per_chunk
            self._pipeline = _Pipeline(engine, capacity, threads, cfg.decode_threads or threads)
        self._source = self._pipeline.frames() if self._pipeline else _inline(engine)
        self._use = ""  # "frames" or "latents", once one was asked for
        weakref.finalize(self, (self._pipeline or engine).close)

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions that `set` takes; empty for a student without."""
        return self._engine.inputs.actions

    @property
    def frames_per_chunk(self) -> int:
        """Px frames of every chunk but the first."""
        return self._engine.px_frames(1)

    @property
    def nfe_per_chunk(self) -> int:
        """Network evaluations of a chunk once the schedule repeats itself, context passes included."""
        schedule = self._engine.schedule
        last = schedule.given_chunks + len(schedule.lists)
        return sum(len(p.sigma) for p in finite(endless(schedule), last + 1) if p.chunk == last)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers of the KV memory."""
        return self._engine.memory.memory_bytes

    @property
    def memory_config(self) -> MemoryConfig:
        """The memory in use: the student's, made endless."""
        return self._engine.memory_config

    def set(
        self,
        *,
        action: Mapping[str, float] | Sequence[float] | None = None,
        prompt: str | None = None,
        tokens: Tensor | None = None,
    ) -> int:
        """Use these inputs from the next chunk on, until replaced; returns the number frames made with them carry.

        action: values in [0, 1] by name (those left out are 0) or one per action. tokens: [L, D] for a student that
        cross-attends. ValueError for what the student does not know; then nothing changes.
        """
        return self._engine.inputs.set(action, prompt, tokens)

    def reset(self, *, seed: int | None = None, image: np.ndarray | None = None) -> None:
        """Start a new dream before the next pass, by default from the same seed and picture.

        Frames not yet taken are dropped. Inputs stay: call `set` first if the new dream is to begin with others.
        """
        old = self._engine.dream
        given = old.given if image is None else self._engine.encode(image)
        (self._pipeline or self._engine).begin(_Dream(old.number + 1, old.seed if seed is None else seed, given))

    def frames(self) -> Iterator[Frame]:
        """Frames in order, for ever; ends when the session is closed. Asked again, it goes on where it was left.

        An exception of a worker is raised here.
        """
        if self._engine.codec is None:
            raise ValueError("a session without a codec has no frames; ask for latents()")
        self._claim("frames")
        while frame := next(self._source, None):
            yield frame
        if not self._engine.closed:
            raise RuntimeError("this stream failed before; open another session")

    def record(self, count: int, script: Script = ()) -> np.ndarray:
        """The next `count` frames, uint8 [T, H, W, 3]; each chunk takes the actions of `script` at its first frame."""
        for action, _ in script:
            self._engine.inputs.read_action(action)
        self._engine.script = script
        try:
            return np.stack([frame.px for frame in itertools.islice(self.frames(), count)])
        finally:
            self._engine.script = ()

    def chunks(self) -> Iterator[Chunk]:
        """Finished chunks from the start of a new dream, for ever, not decoded, in the thread that asks for them."""
        self._claim("latents")
        self.reset()
        yield from self._engine.chunks(self._engine.dream)

    def latents(self) -> Iterator[Tensor]:
        """The latents [1, f, C, H, W] of `chunks`."""
        return (chunk.latents for chunk in self.chunks())

    @torch.no_grad()
    def reference(self, chunks: int) -> Tensor:
        """Latents [1, F, C, H, W] of a plain finite rollout under the present inputs: what the stream must equal."""
        engine = self._engine
        finished = rollout(
            engine.student,
            finite(endless(engine.schedule), chunks),
            noise=chunk_noise(engine.student, 1, engine.dream.seed, engine.dream.given),
            cond=partial(engine.inputs.condition, engine.inputs.wish),
            memory=engine.student.new_memory(1, cfg=engine.memory_config),
            rng=torch.Generator().manual_seed(engine.dream.seed),
        )
        return torch.cat(list(finished), dim=1)

    def close(self) -> None:
        """Stop the workers and wait for them; safe to call twice, and when the consumer stopped in the middle."""
        (self._pipeline or self._engine).close()

    def __enter__(self) -> "StreamSession":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _claim(self, use: str) -> None:
        if self._engine.closed:
            raise ValueError("this session is closed; open another one")
        if self._use not in ("", use):
            raise ValueError(f"this session already gives {self._use}; open another one for {use}")
        self._use = use
