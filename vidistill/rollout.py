"""The one place where a student runs autoregressively: training, streaming and the bench all iterate it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import (
    AnyGenerator,
    Randomness,
    RowGenerator,
    add_noise,
    derived_seed,
    randn_like,
    renoise,
    x0_from_v,
)
from vidistill.memory.cache import KVMemory
from vidistill.models.student import CausalStudent
from vidistill.schedules import Pass, ScheduleConfig, context_level, endless, finite

Noise = Callable[[int], Tensor]  # chunk -> its noise, or its given latents [B, f, C, H, W]
Conditions = Callable[[int, int], Condition]  # latent frames start, stop -> their condition
Transition = Callable[..., Tensor]


@dataclass(frozen=True)
class Record:
    """What is needed to run one pass again: the pass and the latents that went in."""

    run: Pass
    x: Tensor


def per_frame(levels: Sequence[float], student: CausalStudent, chunk: int, x: Tensor) -> Tensor:
    """One level per chunk -> one per frame of `x` [B, F] (float64), starting at `chunk`; the same tensor every time."""
    first = [student.first_frame(chunk + i) for i in range(len(levels) + 1)]
    return spread(tuple(levels), tuple(b - a for a, b in pairwise(first)), x.shape[0], x.device)


@lru_cache(maxsize=1024)
def spread(levels: tuple[float, ...], counts: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Each level as often as its count says [B, F] (float64)."""
    with torch.inference_mode(False):  # kept beyond the stream that asked first: training asks for the same
        frames = torch.repeat_interleave(torch.tensor(levels, dtype=torch.float64), torch.tensor(counts))
        return frames.expand(batch, -1).to(device)


def clamp_frames(x: Tensor, clamped: Tensor | None, start: int) -> Tensor:
    """`x` [B, F, C, H, W] from frame `start` on, with the frames that `clamped` [B, P, C, H, W] covers replaced."""
    if clamped is None or start >= clamped.shape[1]:
        return x
    held = clamped[:, start : start + x.shape[1]].to(x.dtype)
    return torch.cat((held, x[:, held.shape[1] :]), dim=1)


def run_pass(
    student: CausalStudent, p: Pass, x: Tensor, cond: Conditions, memory: KVMemory, clamped: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity, prediction x0 (both [B, F, C, H, W]) and level [B, F] of one pass; commits if it says so.

    The velocity of a context pass is zero: only what it writes is wanted.
    """
    sigma = per_frame(p.sigma, student, p.chunk, x)
    timestep = sigma if p.timesteps is None else per_frame(p.timesteps, student, p.chunk, x)
    start = student.first_frame(p.chunk)
    shown = cond(start, start + x.shape[1])
    with torch.set_grad_enabled(p.grad and torch.is_grad_enabled()):
        output = p.kind == "denoise" or p.grad  # of a context pass only what it writes to memory is wanted
        v = student.velocity(x, timestep, shown, start=start, memory=memory, output=output)
        x0 = clamp_frames(x0_from_v(x, v, sigma), clamped, start)
    if p.commit:
        student.commit(memory, x if p.kind == "context" else x0.detach(), shown, start=start)
    return v, x0, sigma


def rollout(
    student: CausalStudent,
    passes: Iterable[Pass],
    *,
    noise: Noise,
    cond: Conditions,
    memory: KVMemory,
    rng: Randomness,
    transition: Transition = renoise,
    records: list[Record] | None = None,
    clamped: Tensor | None = None,
) -> Iterator[Tensor]:
    """Finished chunks [B, f, C, H, W], in order; given chunks are yielded as they are.

    `records` collects the passes that carry gradient or write memory, for `replay`. `clamped` [B, P, C, H, W] are known
    first frames (a reference image): every pass sees them clean, though told the chunk's level, and predicts them.
    Source: Self Forcing 2506.08009, alg. 1 and 2.
    """
    state: dict[int, Tensor] = {}
    for p in passes:
        chunks = range(p.chunk, p.chunk + len(p.sigma))
        for c in chunks:
            if c not in state:  # asked once and as late as possible: a stream without end has noise without end
                state[c] = noise(c)
        x = torch.cat([state[c] for c in chunks], dim=1) if len(chunks) > 1 else state[p.chunk]
        if p.kind == "context" and any(p.sigma):
            x = add_noise(x, randn_like(x, rng), per_frame(p.sigma, student, p.chunk, x))
        x = clamp_frames(x, clamped, student.first_frame(p.chunk))
        if records is not None and (p.grad or p.commit):
            records.append(Record(p, x))
        v, x0, sigma = run_pass(student, p, x, cond, memory, clamped)
        if p.next_sigma is not None:
            target = per_frame(p.next_sigma, student, p.chunk, x)
            # What is clean needs no randomness, which is known here: asking `target` would wait for the device.
            moved = transition(x, x0, v, sigma, target, rng if any(p.next_sigma) else None)
            # Gradient leaves through the emitted x0 alone: to later passes the state is data, so one pass is one graph.
            moved = moved.detach()
            lengths = [state[c].shape[1] for c in chunks]
            state.update(zip(chunks, moved.split(lengths, dim=1), strict=True))
        if p.emit:  # a context pass emits the chunk as it was given, any other what it predicts of its first chunk
            yield state[p.chunk] if p.kind == "context" else x0[:, : state[p.chunk].shape[1]]
        for c in [c for c in state if c < p.chunk]:
            del state[c]


def roll_out(
    student: CausalStudent,
    schedule: ScheduleConfig,
    cond: Condition,
    size: tuple[int, int],
    *,
    seed: int,
    given: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Clips [B, F, C, H, W] of `size` (B, F) as the student streams them under `cond`, from `given` first latents.

    All that is drawn follows from `seed`; memory is in `dtype`, None: that of the weights.
    """
    batch, frames = size
    made = rollout(
        student,
        finite(endless(schedule), student.num_chunks(frames)),
        noise=chunk_noise(student, batch, seed, given),
        cond=cond.frames,
        memory=student.new_memory(batch, dtype=dtype),
        rng=torch.Generator().manual_seed(seed),
        clamped=given,
    )
    return torch.cat(list(made), dim=1)


@torch.no_grad()
def reencode(
    student: CausalStudent,
    x: Tensor,
    cond: Condition,
    memory: KVMemory,
    *,
    start: int,
    timestep: float = 0.0,
    keep_sinks: bool = True,
    sigma: float = 0.0,
    rng: AnyGenerator | None = None,
) -> None:
    """Write the newest finished frames `x` [B, F, C, H, W] (from frame `start` on) to memory again, under `cond`.

    What a prompt switch does to what is remembered. One pass: the frames see each other in both directions, and the
    sinks, which stay unless they are rewritten themselves (`start` at the memory's origin); without `keep_sinks` the
    first of the frames become the new sinks. The frames are noised to `sigma` (drawn from `rng`), the network is told
    `timestep`.
    Source: LongLive 2509.22622, KV-recache.
    """
    if keep_sinks and start > memory.origin:
        memory.rewind(start, keep_sinks=True)
    else:
        memory.reset(start)
    if sigma:
        assert rng is not None
        x = add_noise(x, randn_like(x, rng), sigma)
    level = torch.full(x.shape[:2], timestep, dtype=torch.float64, device=x.device)
    student.velocity(x, level, cond, start=start, memory=memory, output=False)
    student.commit(memory, x, cond, start=start)


def recache(
    student: CausalStudent,
    schedule: ScheduleConfig,
    memory: KVMemory,
    latents: Tensor,
    cond: Condition,
    start: int,
    rng: AnyGenerator,
) -> None:
    """Write the newest finished `latents` [B, F, C, H, W] before latent `start` to memory again, under `cond`.

    In the state the schedule leaves finished chunks in: later ones were trained to look back at that. The sinks stay as
    they are, unless the stream is so young that they are rewritten with the rest.
    Source: LongLive 2509.22622, KV-recache.
    """
    sigma, timestep = context_level(schedule)
    first = start - latents.shape[1]
    reencode(student, latents, cond, memory, start=first, sigma=sigma, timestep=timestep, rng=rng)


def replay(
    student: CausalStudent,
    records: Iterable[Record],
    *,
    cond: Conditions,
    memory: KVMemory,
    clamped: Tensor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(chunk, prediction x0 with gradient) of every recorded pass that carries gradient, one graph at a time.

    Runs only the passes that carry gradient or write memory, so peak memory is that of one chunk. Call backward on each
    prediction before asking for the next. Source: RELIC 2512.04040, replayed back-propagation.
    """
    for record in records:
        _, x0, _ = run_pass(student, record.run, record.x, cond, memory, clamped)
        if record.run.grad:
            yield record.run.chunk, x0


def chunk_noise(
    student: CausalStudent, batch: int, seed: int, given: Tensor | None = None, rows: AnyGenerator | None = None
) -> Noise:
    """Noise of each chunk from (seed, chunk) alone; chunks inside `given` [B, F, C, H, W] return it instead.

    `rows`: a RowGenerator whose rows of a larger batch these are.
    """
    shape = student.shape
    given_frames = 0 if given is None else given.shape[1]

    def noise(chunk: int) -> Tensor:
        start, stop = student.first_frame(chunk), student.first_frame(chunk + 1)
        if stop <= given_frames:
            assert given is not None
            return given[:, start:stop]
        mixed = (derived_seed(seed, chunk) * 2_654_435_761 + 97) % 2**63  # never the seed of a caller's own draws
        rng = torch.Generator().manual_seed(mixed)
        x = torch.empty(batch, stop - start, shape.channels, shape.height, shape.width, device=student.net.device)
        return randn_like(x, rows.of(rng) if isinstance(rows, RowGenerator) else rng)

    return noise


class CallableModule(ModuleType):
    """This module, which runs the loop when it is called: `from vidistill import rollout` is the loop whether or not
    somebody has imported `vidistill.rollout` before, which puts the module in that name's place."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
        return rollout(*args, **kwargs)


sys.modules[__name__].__class__ = CallableModule
