"""StreamSession: a student that runs for ever, its inputs switchable at chunk boundaries. No training imports."""

import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.controls import Audio, LiveConditions
from vidistill.conditioning.script import Cue, Script
from vidistill.memory.policies import MemoryConfig
from vidistill.rollout import rollout
from vidistill.schedules import endless, finite
from vidistill.streaming.drawn import Drawn
from vidistill.streaming.engine import Chunk, Engine, Frame, Run
from vidistill.streaming.pipeline import Pipeline, inline
from vidistill.streaming.prompt_switch import SWITCHES
from vidistill.streaming.runtime import SpeedConfig, for_inference, load_fast

__all__ = [
    "SWITCHES",
    "Chunk",
    "Frame",
    "SpeedConfig",
    "StreamConfig",
    "StreamSession",
    "check_gain",
    "for_inference",
    "load_fast",
    "refused_switches",
]


def cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system: all there are
        return os.cpu_count() or 1


MAX_GAIN = 10.0


def check_gain(bundle: Bundle, codec: Codec, gain: float) -> None:
    """ValueError if a session of this student would refuse `gain`."""
    LiveConditions.of(bundle.spec, codec.temporal_factor, "cpu").speed_up(gain)


@dataclass(frozen=True)
class StreamConfig:
    """How a session runs.

    `pipelined`: denoise and decode in two worker threads, so that the next chunk is denoised while this one is decoded;
    otherwise everything happens in the thread that asks for frames. `queue_frames`: frames that may wait for the
    consumer (None: two chunks, which keeps both workers busy); a chunk starts when it fits there or nothing waits; with
    0, only when its first frame is asked for, so that its inputs are fresh. `memory` replaces the student's own.
    `threads` and `decode_threads` are intra-op threads of the two workers (0: the caller's shared out, a quarter of
    them, at least one, for decoding); where they are more than the cores of a CPU one worker does both. `switch`: what
    a change of the prompt does to memory unless `set` says otherwise, one of SWITCHES; `rewarm` replaces the schedule's
    own. `gain`: how far a walker goes by the same action, for students conditioned on camera motion.
    """

    seed: int = 0
    pipelined: bool = True
    queue_frames: int | None = None
    memory: MemoryConfig | None = None
    threads: int = 0
    decode_threads: int = 0
    switch: str = "keep"
    rewarm: int | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gain <= MAX_GAIN:
            raise ValueError(f"stream.gain must be above 0 and at most {MAX_GAIN:g}, got {self.gain}")
        for name in ("queue_frames", "threads", "decode_threads"):
            if (count := getattr(self, name)) is not None and count < 0:
                raise ValueError(f"stream.{name} must not be negative, got {count}")
        if self.switch not in SWITCHES:
            raise ValueError(f"stream.switch {self.switch!r} is unknown; choose one of {', '.join(SWITCHES)}")
        if not self.pipelined and (self.threads or self.decode_threads):
            raise ValueError(
                "stream.threads and decode_threads set the workers of a pipelined stream; without workers call "
                "torch.set_num_threads"
            )


def refused_switches(bundle: Bundle) -> dict[str, str]:
    """The switches that a student cannot make, and why."""
    name = bundle.schedule.name
    if name != "chunkwise":
        return dict.fromkeys(
            set(SWITCHES) - {"keep"}, f"a {name} schedule has chunks in flight: its only switch is keep"
        )
    if bundle.spec.audio:
        return {"cut": "this student takes audio, which goes on: it cannot cut to a new scene; reset() instead"}
    if bundle.picture_frames:
        return {"cut": "this student starts from a picture and cannot cut to a new scene; reset() with one"}
    return {}


class StreamSession:
    """A student that runs for ever: pictures from `frames`, inputs through `set`, a new start through `reset`.

    One consumer; `set`, `reset` and `close` may be called from any thread. Memory is constant for any length.

    takes: what `set` takes and a page may ask for, name -> its control and bounds as JSON; a prompt's has `switches`.
    actions: names of those among them. navigator: map, way back, and the switch of what the memory holds beside its
    window. frames_per_chunk: px frames of every chunk but the first. nfe_per_chunk: network evaluations of a chunk once
    the schedule repeats itself, context passes included. memory_config: the memory in use, the student's made endless,
    of `memory_bytes`.
    """

    def __init__(
        self,
        bundle: Bundle,
        codec: Codec | None,
        cfg: StreamConfig | None = None,
        *,
        image: np.ndarray | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        """A session of a loaded student; ValueError if codec, image or memory do not fit it.

        image: uint8 [H, W, 3], the picture to start from; a clip [T, H, W, 3] where the student is given more. Without
        a codec there are latents but no frames. drawn: random numbers from elsewhere, for every run.
        """
        fps = bundle.spec.played.fps
        if fps is None:
            raise ValueError(f"{bundle.name} does not say how many frames a second its world has (world.fps)")
        self.fps = fps
        self.cfg = cfg = cfg or StreamConfig()
        self._engine = engine = Engine(bundle, codec, cfg.seed, cfg.memory, cfg.rewarm, drawn)
        self._refused = refused_switches(bundle)
        self.inputs, self.navigator = engine.inputs, engine.navigator
        self.takes, self.actions = self._described(), engine.inputs.net.actions
        self.inputs.speed_up(cfg.gain)
        self.memory_config, self.memory_bytes = engine.memory_config, engine.memory.memory_bytes
        self.frames_per_chunk = engine.px_frames(1)
        last = engine.schedule.given_chunks + len(engine.schedule.lists)  # from here on the schedule repeats itself
        self.nfe_per_chunk = sum(len(p.sigma) for p in finite(endless(engine.schedule), last + 1) if p.chunk == last)
        self._resets = itertools.count(1)
        engine.begin(Run(0, cfg.seed, *engine.encode(image)))
        self._pipeline: Pipeline | None = None
        if cfg.pipelined:
            decode_threads = cfg.decode_threads or max(1, torch.get_num_threads() // 4)
            threads = cfg.threads or max(1, torch.get_num_threads() - decode_threads)
            capacity = 2 * self.frames_per_chunk if cfg.queue_frames is None else cfg.queue_frames
            crowded = engine.device.type == "cpu" and threads + decode_threads > cores()
            self._pipeline = Pipeline(engine, capacity, threads, decode_threads, crowded)
        self._source = self._pipeline.frames() if self._pipeline else inline(engine)
        self._use = ""  # "frames" or "latents", once one was asked for
        weakref.finalize(self, (self._pipeline or engine).close)

    def _described(self) -> dict[str, Mapping[str, Any]]:
        takes = self.inputs.takes
        if "prompt" in takes:
            takes["prompt"] = {**takes["prompt"], "switches": [name for name in SWITCHES if name not in self._refused]}
        return takes

    @property
    def queued_audio_s(self) -> float:
        """Seconds of audio that wait for their turn."""
        audio = self.inputs.find(Audio)
        return 0.0 if audio is None else audio.track.waiting / audio.track.cfg.rate

    def clear_audio(self) -> None:
        """Interrupt: audio that waits for its turn is dropped; nothing else is forgotten."""
        if audio := self.inputs.find(Audio):
            audio.track.clear_audio()

    @property
    def given(self) -> Tensor | None:
        """The latents [1, F, C, H, W] that the run starts from; None for one from noise."""
        return self._engine.run.given

    def set(self, *, switch: str | None = None, **inputs: Any) -> int:
        """Use these inputs from the next chunk on, until replaced; returns the number frames made with them carry.

        The student says in `takes` which it has. action: values in [0, 1] by name (those left out are 0) or one per
        action. prompt: text; tokens: [L, D], what it is read as, for any student that cross-attends. switch: what a
        prompt that comes in the middle of a run does to memory, one of SWITCHES (default: the config's). audio: speech,
        float [S] at its rate, that follows what still waits; where there is none the student gets silence. None is as
        if left out. ValueError for what the student does not take; then nothing changes.
        """
        return self.inputs.set(inputs, self._policy(switch))

    def _policy(self, switch: str | None) -> str:
        switch = switch or self.cfg.switch
        if switch not in SWITCHES:
            raise ValueError(f"switch {switch!r} is unknown; choose one of {', '.join(SWITCHES)}")
        if why := self._refused.get(switch):
            raise ValueError(why)
        return switch

    def reset(self, *, seed: int | None = None, image: np.ndarray | None = None) -> None:
        """Start a new run before the next pass, by default from the same seed and picture.

        Frames not yet taken are dropped. Inputs stay: call `set` first if the new run is to begin with others.
        """
        old = self._engine.run
        start = (old.given, old.picture) if image is None else self._engine.encode(image)
        (self._pipeline or self._engine).begin(Run(next(self._resets), old.seed if seed is None else seed, *start))

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

    def record(
        self, count: int, script: Script = (), cues: Sequence[Cue] = (), made: Callable[[], object] = lambda: None
    ) -> np.ndarray:
        """The next `count` frames, uint8 [T, H, W, 3], of a run that has not begun yet.

        Each chunk takes the actions of `script` at its first frame, and the cues that are due there. `made` is called
        after every frame.
        """
        if count < 1:
            raise ValueError(f"count is {count}; at least 1 frame can be recorded")
        engine = self._engine
        for action, _ in script:
            self.inputs.read({"action": action})
        timed = [(round(c.seconds * self.fps), replace(c, switch=self._policy(c.switch))) for c in cues]
        for cue in cues:  # now: an encoder may have to be loaded, and nothing is to be refused in the middle
            self.inputs.read({"prompt": cue.prompt})
        engine.script, engine.cues = script, deque(sorted(timed, key=lambda item: item[0]))
        try:
            frames = []
            for frame in itertools.islice(self.frames(), count):
                frames.append(frame.px)
                made()
            return np.stack(frames)
        finally:
            engine.script, engine.cues = (), deque()

    def chunks(self) -> Iterator[Chunk]:
        """Finished chunks from the start of a new run, for ever, not decoded, in the thread that asks for them."""
        self._claim("latents")
        self.reset()
        yield from self._engine.chunks(self._engine.run)

    def latents(self) -> Iterator[Tensor]:
        """The latents [1, f, C, H, W] of `chunks`."""
        return (chunk.latents for chunk in self.chunks())

    @torch.no_grad()
    def reference(self, chunks: int) -> Tensor:
        """Latents [1, F, C, H, W] of a plain finite rollout under the present inputs: what the stream must equal."""
        engine = self._engine
        self.inputs.begin(engine.run.given, engine.run.picture)
        noise, rng = engine.randomness(engine.run)
        finished = rollout(
            engine.student,
            finite(endless(engine.schedule), chunks),
            noise=noise,
            cond=partial(self.inputs.condition, self.inputs.control),
            memory=engine.student.new_memory(1, cfg=engine.memory_config),
            rng=rng,
            clamped=engine.run.given,
        )
        return torch.cat(list(finished), dim=1)

    def advance(self, minutes: float) -> float:
        """Let time pass unseen before the next chunk that is begun, memory as full as it is; the minutes that pass.

        Shows what a stream of that age costs without waiting for it. Not for rolling schedules (ValueError).
        """
        engine = self._engine
        if engine.schedule.name == "rolling":
            raise ValueError("a rolling schedule has chunks in flight and cannot advance; let it run")
        step = len(self.memory_config.pattern)  # so that frames keep their compression factors
        chunks = step * round(minutes * 60 * self.fps / self.frames_per_chunk / step)
        engine.ahead += chunks
        return chunks * self.frames_per_chunk / self.fps / 60

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
