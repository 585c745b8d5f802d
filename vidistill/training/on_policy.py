"""What a turn of training learns from: the student's own rollouts, or recorded clips.

Rollouts that one graph cannot hold are continued step by step (streams) or run again chunk by chunk (replay).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor

from vidistill.conditioning.condition import VIEW_SITE, Condition, branches, concat
from vidistill.data.clips import start_of_clip
from vidistill.data.types import Batch
from vidistill.diffusion import (
    AnyGenerator,
    Denoiser,
    NoiseSchedule,
    RowGenerator,
    decide,
    derived_seed,
    randn_like,
)
from vidistill.memory.cache import KVMemory
from vidistill.models.student import CausalStudent
from vidistill.rollout import Record, chunk_noise, recache, replay, rollout
from vidistill.sampling import sample as sample_teacher
from vidistill.schedules import Pass, ScheduleConfig, training
from vidistill.training.config import Turn
from vidistill.training.losses import LossConfig, noised_sample

Repicture = Callable[[Tensor], Tensor]  # latents [B, n, C, H, W] -> latent [B, 1, C, H, W] of their last picture alone


class Sample(Protocol):
    """What a loss is taken on: `x0` [B, F, C, H, W], and the batch it is of."""

    x0: Tensor
    batch: Batch


@dataclass
class Clip:
    """A sample that no rollout made."""

    x0: Tensor
    batch: Batch


@dataclass
class Rollout:
    """A student's sample and what is needed to run it again with gradient.

    `x0` [B, F, C, H, W] ends with the generated frames of `batch`, whose `given` first frames are known; `memory` is as
    it was before the first recorded pass.
    """

    x0: Tensor
    batch: Batch
    memory: KVMemory
    cond: Condition  # of latents `first` and on
    first: int  # latent of the stream that `cond` starts with
    skipped: int  # latents of the stream before `x0`
    records: list[Record] = field(default_factory=list)


class Sampler(Protocol):
    """Makes the sample of a turn, and takes the gradient of its loss to the network whose turn it is."""

    def __call__(self, batch: Batch, rng: AnyGenerator, turn: Turn) -> Sample: ...

    def backward(self, loss: Tensor, sample: Any) -> None: ...


class DataSampler:
    """Recorded clips; with `levels` what `student` predicts from them, noised to these levels (CausVid)."""

    def __init__(self, student: Any, levels: tuple[float, ...] = ()) -> None:
        self.student, self.levels = student, levels

    def __call__(self, batch: Batch, rng: AnyGenerator, turn: Turn) -> Clip:
        if not self.levels:
            return Clip(batch.x, batch)
        with torch.set_grad_enabled(turn.of_student):
            return Clip(noised_sample(self.student, batch, self.levels, rng), batch)

    def backward(self, loss: Tensor, sample: Clip) -> None:
        loss.backward()


def last_picture(codec: Any) -> Repicture:
    """What makes the latent of the last picture of latents with `codec`."""

    @torch.no_grad()
    def repicture(latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            px = codec.decode(latents[:, -4:].float())  # a few latents suffice: the codec looks back a few frames
            return codec.encode(px[:, -1:])

    return repicture


def whole_chunks(student: CausalStudent, given: int) -> int:
    """Chunks that lie entirely inside the first `given` frames."""
    chunks = 0
    while student.first_frame(chunks + 1) <= given:
        chunks += 1
    return chunks


def passes_from(cfg: ScheduleConfig, start: int, stop: int, draw: Random) -> Iterator[Pass]:
    """The training passes of chunks start..stop-1 of a stream."""
    return (p for p in training(cfg, stop, draw) if p.chunk >= start)


class LongRollout:
    """On-policy samples of `frames` latents that continue one stream up to `limit` latents, then start a new one.

    Every call continues by as many whole chunks as leave at least one chunk of overlap; memory is kept, detached. The
    sample is the newest `frames` latents, of which only the new ones may carry gradient; the first one is given, as in
    every clip. With `limit` 0 every call is a clip of its own. A stream also starts anew where `restart` says so: no
    saved state holds its memory, so a run resumes exactly only where one starts. A share `switching` of the streams is
    told the prompt of another clip from a drawn call on: what is remembered of the sample before is written again under
    it, and the samples from there on are of the new prompt.
    Source: LongLive 2509.22622, streaming long tuning with KV-recache; Self Forcing 2506.08009, alg. 1.
    """

    def __init__(
        self,
        student: CausalStudent,
        schedule: ScheduleConfig,
        limit: int = 0,
        repicture: Repicture | None = None,
        dtype: torch.dtype = torch.float32,
        switching: float = 0.0,
    ) -> None:
        self.student, self.schedule, self.limit = student, schedule, limit
        self.repicture, self.dtype, self.switching = repicture, dtype, switching
        self.switch_at: int | None = None  # length at which the stream is told another prompt
        self.memory: KVMemory | None = None
        self.length = 0  # latents of the stream so far
        self.seed = 0
        self.tail: Tensor | None = None  # newest latents [B, F, C, H, W] of the stream
        self.cond = Condition()  # their condition

    def new_frames(self, frames: int) -> int:
        """Latents by which a stream grows in one step."""
        chunk = self.student.cfg.chunk
        return max(chunk, (frames - chunk) // chunk * chunk)

    def __call__(
        self, batch: Batch, rng: AnyGenerator, *, grad: bool, restart: bool = False, record: bool = False
    ) -> Rollout:
        """The next sample; `grad` keeps the graph of its new frames, `record` what `replayed_backward` needs."""
        draw = Random(decide(2**31, rng))
        frames = batch.x.shape[1]
        extend = self.length + self.new_frames(frames)
        if self.tail is None or restart or extend > self.limit:
            return self.start_stream(batch, draw, rng, grad=grad, record=record)
        return self.continue_stream(batch, draw, rng, grad=grad, record=record)

    def start_stream(self, batch: Batch, draw: Random, rng: AnyGenerator, *, grad: bool, record: bool) -> Rollout:
        student, (b, frames) = self.student, batch.x.shape[:2]
        passes = training(self.schedule, student.num_chunks(frames), draw)
        self.memory = student.new_memory(b, dtype=self.dtype)
        self.seed, self.length, self.cond = draw.randrange(2**31), frames, batch.cond
        self.switch_at = self.draw_switch(frames, draw) if self.switching else None
        out = self.roll(passes, batch, 0, batch.cond, rng, grad, record)
        if self.limit:
            self.tail = out.x0.detach()  # history: a later step's gradient ends where its own frames begin
        else:
            self.memory = None  # nothing goes on from here: a replay has a memory of its own
        return out

    def continue_stream(self, batch: Batch, draw: Random, rng: AnyGenerator, *, grad: bool, record: bool) -> Rollout:
        assert self.tail is not None and self.memory is not None
        self.memory.clear_cache()  # text was read by earlier weights
        student, frames = self.student, batch.x.shape[1]
        new = self.new_frames(frames)
        first = whole_chunks(student, self.length)
        passes = passes_from(self.schedule, first, whole_chunks(student, self.length + new), draw)
        if self.length == self.switch_at:
            self.switch_prompt(batch.cond, first, rng)
        following = self.next_condition(batch.cond, new)
        out = self.roll(passes, replace(batch, given=0), self.length, following, rng, grad, record)
        self.length += new
        kept = self.tail[:, new:]
        cond = replace(concat([self.cond.frames(new, frames), following], dim=1), negative=self.cond.negative)
        picture = kept[:, :1] if self.repicture is None else self.repicture(self.tail[:, : new + 1])
        self.tail, self.cond = torch.cat((kept, out.x0.detach()), dim=1), cond
        out.x0 = torch.cat((picture, kept[:, 1:], out.x0), dim=1)
        out.batch = Batch(out.x0.detach(), start_of_clip(cond), given=batch.given)
        out.skipped = self.length - frames
        return out

    def draw_switch(self, frames: int, draw: Random) -> int | None:
        """The length at which a new stream is told another prompt: any at which it goes on; None for a stream without.

        Source: LongLive 2509.22622, whose streams of 240 switch at 21, 39, ... or 201.
        """
        lengths = range(frames, self.limit - self.new_frames(frames) + 1, self.new_frames(frames))
        return draw.choice(lengths) if draw.random() < self.switching else None

    def switch_prompt(self, cond: Condition, chunk: int, rng: AnyGenerator) -> None:
        """Tell the stream the prompt of `cond` from `chunk` on, and write what it remembers again under it."""
        assert self.tail is not None and self.memory is not None
        self.cond = replace(self.cond, tokens=cond.tokens, negative=cond.negative)
        frames = self.tail.shape[1]
        count = min(frames, self.student.cfg.memory.frames)
        drawn = torch.Generator().manual_seed(derived_seed(self.seed, chunk))
        own = rng.of(drawn) if isinstance(rng, RowGenerator) else drawn
        told = self.cond.frames(frames - count, frames)
        recache(self.student, self.schedule, self.memory, self.tail[:, -count:], told, self.length, own)

    def next_condition(self, cond: Condition, new: int) -> Condition:
        """What the stream is told for `new` latents: the recorded actions of another clip, all else as before.

        The camera goes on from the heading it has.
        """
        held, per_frame = self.cond.channels, dict(cond.frames(1, 1 + new).per_frame)
        if VIEW_SITE in per_frame:
            turned = self.cond.per_frame[VIEW_SITE][:, -1:] - cond.per_frame[VIEW_SITE][:, :1]
            per_frame[VIEW_SITE] = per_frame[VIEW_SITE] + turned
        return Condition(
            self.cond.tokens,
            per_frame,
            None if held is None else held[:, -1:].expand(-1, new, -1, -1, -1),
            self.cond.negative,
        )

    def roll(
        self, passes: Any, batch: Batch, start: int, cond: Condition, rng: AnyGenerator, grad: bool, record: bool
    ) -> Rollout:
        """Run `passes` from latent `start` of the stream on."""
        assert self.memory is not None
        given = batch.x[:, : batch.given] if batch.given else None
        noise = chunk_noise(self.student, batch.x.shape[0], self.seed, given, rng)
        records: list[Record] | None = [] if record else None
        before = self.memory.fork() if record else self.memory
        # Only the emitted predictions carry gradient (`Pass.grad`): what a chunk becomes at its next level, and what is
        # written to memory, is detached, as Self Forcing's paper has it.
        with torch.set_grad_enabled(grad):
            chunks = rollout(
                self.student,
                passes,
                noise=noise,
                cond=lambda lo, hi: cond.frames(lo - start, hi - start),
                memory=self.memory,
                rng=rng,
                records=records,
                clamped=given if start == 0 else None,
            )
            x0 = torch.cat(list(chunks), dim=1)
        return Rollout(x0, batch, before, cond, start, start, records or [])

    def noise_of(self, sample: Rollout, rng: AnyGenerator) -> Tensor:
        """The noise [B, F, C, H, W] that a sample's new frames began with, fresh noise where it overlaps older ones."""
        noise = chunk_noise(self.student, sample.x0.shape[0], self.seed, rows=rng)
        first, last = whole_chunks(self.student, sample.first), whole_chunks(self.student, self.length)
        own = torch.cat([noise(c) for c in range(first, last)], dim=1)
        overlap = randn_like(own.new_empty(sample.x0[:, own.shape[1] :].shape), rng)
        return torch.cat((overlap, own), dim=1)


def replayed_backward(student: CausalStudent, sample: Rollout, grad: Tensor) -> None:
    """Add to the student's gradients what `grad` [B, F, C, H, W] on `sample.x0` sends back, one chunk at a time.

    Source: RELIC 2512.04040, replayed back-propagation.
    """
    cond = sample.cond
    chunks = replay(
        student,
        sample.records,
        cond=lambda lo, hi: cond.frames(lo - sample.first, hi - sample.first),
        memory=sample.memory,
        clamped=sample.batch.x[:, : sample.batch.given] if sample.first == 0 else None,
    )
    for chunk, x0 in chunks:
        lo, hi = student.first_frame(chunk), student.first_frame(chunk + 1)
        x0[:, : hi - lo].backward(grad[:, lo - sample.skipped : hi - sample.skipped].to(x0.dtype))


class OnPolicySampler:
    """The student's own rollouts: made in its turn, shared by so many critic turns as learn from one, replayed.

    `replay`: a student turn records its passes instead of their graph, and `backward` runs them again chunk by chunk.
    `teacher`, `noise`: what samples the target of losses that compare with it.
    """

    def __init__(
        self, rollouts: LongRollout, replay: bool = False, teacher: Denoiser | None = None, noise: Any = None
    ) -> None:
        self.rollouts, self.replay = rollouts, replay
        self.teacher, self.noise = teacher, noise or NoiseSchedule()
        self.kept: tuple[int, Rollout] | None = None  # step it was drawn at, for the critic turns that share it

    def __call__(self, batch: Batch, rng: AnyGenerator, turn: Turn) -> Rollout:
        if self.kept is None or self.kept[0] != turn.drawn:  # the first to use it, or a run resumed in between
            own = turn.drawn == turn.step
            self.kept = turn.drawn, self.roll(batch, rng if own else turn.rng(turn.drawn), turn)
        sample = self.kept[1]
        if not turn.shared:
            self.kept = None
        if turn.of_student and turn.loss.needs_target:
            sample.batch = replace(sample.batch, target=self.target(sample, turn.loss, rng))
        return sample

    def roll(self, batch: Batch, rng: AnyGenerator, turn: Turn) -> Rollout:
        """A new rollout for the condition and given frames of `batch`, with gradient where it is the student's turn."""
        recorded = turn.of_student and self.replay
        grad = turn.of_student and not recorded
        sample = self.rollouts(batch, rng, grad=grad, restart=turn.restart, record=recorded)
        if recorded:
            sample.x0 = sample.x0.detach().requires_grad_()
        return sample

    def target(self, sample: Rollout, cfg: LossConfig, rng: AnyGenerator) -> Tensor:
        """The teacher's sample [B, F, C, H, W] for the noise, condition and given frames of a rollout."""
        assert self.teacher is not None
        batch, noise = sample.batch, self.rollouts.noise_of(sample, rng)
        nulls, scales = branches(batch.cond, cfg.guidance, cfg.audio_guidance)
        given, sigmas = batch.x[:, : batch.given], self.noise.steps(cfg.target_steps)
        return sample_teacher(self.teacher, noise, sigmas, batch.cond, given=given, nulls=nulls, scales=scales)

    def backward(self, loss: Tensor, sample: Rollout) -> None:
        loss.backward()
        if sample.records:
            assert sample.x0.grad is not None
            replayed_backward(self.rollouts.student, sample, sample.x0.grad)
