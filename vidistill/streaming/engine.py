"""Denoiser and decoder of a stream, without threads of their own: chunks of a run, and the pictures of a chunk."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from vidistill import checkpoint
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition, concat, shown_clip
from vidistill.conditioning.controls import Audio, ControlInput, LiveConditions, Picture, StartPicture
from vidistill.conditioning.script import Cue, Script, scripted
from vidistill.diffusion import derived_seed
from vidistill.io import to_float, to_uint8
from vidistill.memory.policies import MemoryConfig, stream_memory
from vidistill.models.student import CausalStudent
from vidistill.ops.device import wait_for
from vidistill.rollout import Noise, Randomness, chunk_noise, rollout
from vidistill.schedules import Pass, endless
from vidistill.streaming.drawn import Drawn
from vidistill.streaming.navigation import Navigator
from vidistill.streaming.prompt_switch import SWITCHES, Past

Admit = Callable[[int], bool]  # px frames of the next chunk -> may it start?


@dataclass(frozen=True)
class Frame:
    """A picture of a stream.

    px: uint8 [H, W, 3]. index: pictures before it since the last reset. input_id: number of the last `set` that had a
    say in it, 0: none. run: resets before it. made_at: `time.perf_counter()` when it was on the host. stats: what its
    chunk cost, in ms: denoise_ms and context_ms (passes since the chunk before), chunk_ms (both), decode_ms and host_ms
    (so far); where sound was sent also audio_to_lip_ms, since it came. sound: float32 [n], what plays while the picture
    is shown; None for a student that takes no audio.
    """

    px: np.ndarray
    index: int
    chunk: int
    input_id: int
    run: int
    made_at: float
    stats: Mapping[str, float]
    sound: np.ndarray | None = None


@dataclass(frozen=True)
class Chunk:
    """A finished chunk: latents [1, f, C, H, W]; the rest as in `Frame`, stats before decoding.

    `fresh`: a scene begins with it, so that it is decoded as the start of a clip, to `px_frames` pictures. `sounds` of
    them, and when each came (`perf_counter`, None for silence).
    """

    latents: Tensor
    index: int
    fresh: bool
    px_frames: int
    input_id: int
    run: int
    stats: Mapping[str, float]
    sounds: tuple[tuple[np.ndarray, float | None], ...] = ()


@dataclass(eq=False)
class Run:
    """One run from a start to the next reset; `over` stops it before its next pass."""

    number: int
    seed: int
    given: Tensor | None  # latents [1, F, C, H, W] it starts from
    picture: Picture | None = None  # what an image-to-video network is shown
    over: bool = False


class Stopwatch:
    """Milliseconds spent on each kind of pass on a device; waiting between `stop` and `start` is not counted."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spent = {"denoise_ms": 0.0, "context_ms": 0.0}
        self._part, self._began = "", 0.0

    def start(self, part: str) -> None:
        self._part, self._began = part, time.perf_counter()

    def stop(self) -> None:
        if self._part:
            wait_for(self._device)
            self._spent[self._part] += 1000 * (time.perf_counter() - self._began)
        self._part = ""

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        self.stop()
        spent, self._spent = self._spent, dict.fromkeys(self._spent, 0.0)
        return {**spent, "chunk_ms": sum(spent.values())}


class Engine:
    """Denoiser and decoder of a session, without threads of its own."""

    def __init__(
        self,
        bundle: Bundle,
        codec: Codec | None,
        seed: int,
        memory: MemoryConfig | None,
        rewarm: int | None,
        drawn: Drawn | None = None,
    ) -> None:
        if bundle.kind != "student":
            raise ValueError(f"{bundle.name} is a {bundle.kind}; only a student streams")
        self.student: CausalStudent = bundle.net
        self.codec, self.schedule, self.drawn = codec, bundle.schedule, drawn
        if rewarm is not None:
            self.schedule = replace(self.schedule, rewarm=rewarm)
        self.picture_frames, self.read_picture = bundle.picture_frames, checkpoint.image_encoder(bundle.record)
        self.device = self.student.net.device
        self.factor = codec.temporal_factor if codec else bundle.spec.played.temporal or 1
        if codec is not None and codec.latent_channels != self.student.shape.channels:
            raise ValueError(f"{bundle.name} has {self.student.shape.channels} channels, not {codec.latent_channels}")
        self.memory_config = stream_memory(memory or self.student.cfg.memory, self.student.cfg.chunk)
        self.memory = self.student.new_memory(1, cfg=self.memory_config)
        self.inputs = LiveConditions.of(bundle.spec, self.factor, self.device, checkpoint.text_encoder(bundle.record))
        self.navigator = Navigator(self.memory, self.inputs)
        self.script: Script = ()  # asked for at every chunk, in place of `set`
        self.cues: deque[tuple[int, Cue]] = deque()  # (px frame, what is set there), in order
        self.closed = False
        self.run = Run(0, seed, None)
        # first latent frame of a chunk -> what it is made with
        self._taken: dict[int, tuple[ControlInput, Condition]] = {}
        self._newest: Tensor | None = None  # finished latents [1, F, C, H, W] that memory may hold
        self._scenes = [0]  # chunks that a scene began with
        self.ahead = 0  # chunks to leave out before the next
        self._emitted = 0  # the chunk that is finished
        self._watch = Stopwatch(self.device)
        self._codec_state, self._next_index = None, 0

    def begin(self, run: Run) -> None:
        """Go on with another run; the present one ends before its next pass."""
        self.run.over = True
        self.run = run

    def close(self) -> None:
        self.closed = self.run.over = True

    def px_frames(self, chunk: int, fresh: bool = False) -> int:
        """Px frames that `chunk` decodes to; one that begins a scene (`fresh`, and the first) to fewer."""
        first, stop = self.student.first_frame(chunk), self.student.first_frame(chunk + 1)
        return self.factor * (stop - first) - (self.factor - 1 if fresh or chunk == 0 else 0)

    @torch.no_grad()
    def encode(self, image: np.ndarray | None) -> tuple[Tensor | None, Picture | None]:
        """Latents [1, F, C, H, W] of the given frames from uint8 `image` [H, W, 3], or a clip [T, H, W, 3]; for an
        image-to-video student what it is shown of it instead."""
        given = self.picture_frames
        if image is None:
            if given:
                raise ValueError("this student starts from a picture: pass `image`, uint8 [H, W, 3]")
            return None, None
        if not given:
            raise ValueError("this student starts from noise and takes no `image`")
        if self.codec is None:
            raise ValueError("a session without a codec cannot start from an `image`")
        shape, scale = self.student.shape, self.codec.spatial_factor
        clip = image[None] if image.ndim == 3 else image
        needed = (self.codec.px_frames(given), shape.height * scale, shape.width * scale, 3)
        if clip.dtype != np.uint8 or clip.shape != needed:
            raise ValueError(f"image is {image.dtype} {list(image.shape)}; needed is uint8 {list(needed)}")
        px = to_float(clip)[None].to(self.device)
        if not self.inputs.find(StartPicture):
            return self.codec.encode(px), None
        latents = self.codec.encode(shown_clip(px, self.codec.px_frames(shape.frames)))
        tokens = self.read_picture([clip[0]]).to(self.device) if self.read_picture else None
        return None, Picture(latents, tokens)

    @torch.no_grad()
    def chunks(self, run: Run, admit: Admit = lambda px_frames: True) -> Iterator[Chunk]:
        """Finished chunks of `run`, until it is over or `admit`, asked with the px frames of the next, says no."""
        self.navigator.begin()
        self.inputs.begin(run.given, run.picture)
        self._taken.clear()
        self._newest, self._scenes = None, [0]
        self._watch.take()
        noise, rng = self.randomness(run)
        finished = rollout(
            self.student,
            self._passes(run, admit),
            noise=noise,
            cond=self._condition,
            memory=self.memory,
            rng=rng,
            clamped=run.given,
        )
        for latents in finished:
            self.navigator.update()
            index = self._emitted
            control = self._taken[self.student.first_frame(index)][0]
            fresh = index == self._scenes[-1]
            self._remember(latents, fresh)
            px_frames = self.px_frames(index, fresh)
            stats = self._watch.take()
            yield Chunk(latents, index, fresh, px_frames, control.id, run.number, stats, self._sounds(index))

    def randomness(self, run: Run) -> tuple[Noise, Randomness]:
        """What the chunks of a run begin as, and what renoising draws from."""
        noise = chunk_noise(self.student, 1, run.seed, run.given)
        rng = torch.Generator().manual_seed(run.seed)
        return (noise, rng) if self.drawn is None else self.drawn.sources(self.student, noise, rng)

    def _sounds(self, chunk: int) -> tuple[tuple[np.ndarray, float | None], ...]:
        """What sounds with the pictures of a chunk, and when it came."""
        audio = self.inputs.find(Audio)
        if audio is None:
            return ()
        first, stop = self.student.first_frame(chunk), self.student.first_frame(chunk + 1)
        return tuple((audio.track.sound(f), audio.track.came_at(f)) for f in range(*audio.net.px_frames(first, stop)))

    def _remember(self, latents: Tensor, fresh: bool) -> None:
        """Keep the newest finished latents, as many as memory holds, for a switch that writes them again."""
        if self.inputs.net.text_dim:
            whole = latents if fresh or self._newest is None else torch.cat((self._newest, latents), dim=1)
            self._newest = whole[:, -self.memory_config.frames :]

    def _passes(self, run: Run, admit: Admit) -> Iterator[Pass]:
        """The endless schedule, timed; a chunk takes the inputs of the moment it is admitted."""
        passes, current = endless(self.schedule), -1
        while True:
            p = next(passes)
            # Only at a chunk's first pass is there a wait or a jump: a chunk once begun is finished, and its inputs are
            # as late as they can be without changing between its passes.
            begins = p.chunk != current
            if (begins and not admit(self.px_frames(p.chunk))) or run.over:  # asked after `admit`, which may wait long
                return
            if begins and self.ahead and p.chunk > self.schedule.given_chunks:
                passes = self._advance(p.chunk)
                p = next(passes)
            current = p.chunk
            if self._take_inputs(p):
                # Memory changes before the chunk's first pass, never between two: all passes of a chunk see one past.
                # The schedule goes on as one that knows of the switch: `rewarm` may give its chunk more steps.
                self._switch(p.chunk, run)
                passes = endless(self.schedule, p.chunk, (p.chunk,))
                p = next(passes)
            self._watch.start(f"{p.kind}_ms")
            self._emitted = p.chunk
            yield p
            self._watch.stop()

    def _advance(self, chunk: int) -> Iterator[Pass]:
        """Leave out the chunks `ahead` before `chunk`."""
        chunks, self.ahead = self.ahead, 0
        frames = chunks * self.student.cfg.chunk
        self.memory.advance(frames)
        self.inputs.skip(frames)
        return endless(self.schedule, chunk + chunks)

    def _take_inputs(self, p: Pass) -> bool:
        """Take the inputs of the chunks of a pass that have none yet; whether a chunk meets a switch of its prompt."""
        first = self.student.first_frame(p.chunk)
        before = max((start for start in self._taken if start < first), default=None)
        prompt_before = None if before is None else self._taken[before][0].values.get("prompt")
        fresh = first not in self._taken
        taken = {start: v for start, v in self._taken.items() if start >= first}
        for chunk in range(p.chunk, p.chunk + len(p.sigma)):
            start, stop = self.student.first_frame(chunk), self.student.first_frame(chunk + 1)
            if start not in taken:  # a rolling schedule meets a chunk in several passes, always with the same inputs
                self._follow_script(start)
                control = self.navigator.control(start, stop)
                taken[start] = (control, self.inputs.condition(control, start, stop))
        self._taken = taken
        # The same object, not equal numbers: a prompt that is set again is a switch that somebody asked for.
        switched = fresh and prompt_before is not None and self._taken[first][0].values["prompt"] is not prompt_before
        return switched and p.chunk > self.schedule.given_chunks and self.schedule.name == "chunkwise"

    def _follow_script(self, start: int) -> None:
        """Set what script and cues hold for the chunk that begins with latent `start`."""
        lost = (self.factor - 1) * (len(self._scenes) - 1)  # px frames that scenes began without
        frame = max(0, self.factor * (start - 1) + 1 - lost)
        if script := self.script:
            self.inputs.set({"action": scripted(script, frame)})
        cues = self.cues  # replaced by another thread when a recording ends
        while cues and cues[0][0] <= frame:
            _, cue = cues.popleft()
            self.inputs.set({"prompt": cue.prompt}, cue.switch or "keep")

    def _switch(self, chunk: int, run: Run) -> None:
        """Do to memory what the switch of the prompt of `chunk` says."""
        assert self._newest is not None
        start, count = self.student.first_frame(chunk), self._newest.shape[1]
        control = self._taken[start][0]
        # A seed of the chunk's own: recached memory does not depend on how many passes the stream has run before.
        past = Past(self.student, self.schedule, self.memory, self._newest, start, derived_seed(run.seed, chunk))
        self._watch.start("context_ms")
        if SWITCHES[control.switch](past, self.inputs.condition(control, start - count, start)):
            self._scenes.append(chunk)
        self._watch.stop()

    def _condition(self, start: int, stop: int) -> Condition:
        """What the chunks of latent frames start..stop-1 are made with; the tokens are those of the first chunk."""
        parts = [cond for first, (_, cond) in self._taken.items() if start <= first < stop]
        return parts[0] if len(parts) == 1 else concat(parts, dim=1)

    @torch.no_grad()
    def decode(self, chunk: Chunk) -> Iterator[list[Frame]]:
        """The pictures of a chunk, those of its first latent before the others, so that they need not wait.

        The chunks of a run must come in order: the codec carries its state from one to the next.
        """
        assert self.codec is not None
        if chunk.fresh:
            self._codec_state = None
        if chunk.index == 0:
            self._next_index = 0
        stats = {**chunk.stats, "decode_ms": 0.0, "host_ms": 0.0}
        sounds = iter(chunk.sounds or ((None, None),) * chunk.px_frames)
        for latents in filter(lambda part: part.shape[1], (chunk.latents[:, :1], chunk.latents[:, 1:])):
            began = time.perf_counter()
            px, self._codec_state = self.codec.decode_stream(latents, self._codec_state)
            decoded = time.perf_counter()
            images = to_uint8(px[0])
            made_at = time.perf_counter()
            stats["decode_ms"] += 1000 * (decoded - began)
            stats["host_ms"] += 1000 * (made_at - decoded)
            frames = []
            for image, (sound, came) in zip(images, islice(sounds, len(images)), strict=True):
                own = dict(stats) if came is None else {**stats, "audio_to_lip_ms": 1000 * (made_at - came)}
                index, self._next_index = self._next_index, self._next_index + 1
                frames.append(Frame(image, index, chunk.index, chunk.input_id, chunk.run, made_at, own, sound))
            yield frames
        assert next(sounds, None) is None, "a sound for every picture, and no more"
