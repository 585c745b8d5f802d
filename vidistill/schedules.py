"""Distillation schedules as data: which forward passes a student makes, in which order. No tensors, no networks."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

CONTEXTS = ("clean", "noised", "last_step")
EXITS = ("none", "shared", "per_chunk")
PATTERN = r"\d*|\d+(-\d+)+"


@dataclass(frozen=True)
class Pass:
    """One forward of the student over one or more neighbouring chunks."""

    chunk: int  # first chunk in this forward
    sigma: tuple[float, ...]  # noise going in, one per chunk
    next_sigma: tuple[float, ...] | None  # noise going out; None: context pass, output unused
    timesteps: tuple[float, ...] | None = None  # level told to the network where it differs from the noise
    commit: bool = False  # write the tokens of this forward to memory
    grad: bool = False  # keep autograd
    emit: bool = False  # yield the prediction x0 of the first chunk of this forward (a given chunk: itself)

    @property
    def kind(self) -> str:
        """`denoise`, or `context`: the pass only shows finished or given chunks to memory."""
        return "context" if self.next_sigma is None else "denoise"


@dataclass(frozen=True)
class ScheduleConfig:
    """Steps per chunk and what a finished chunk shows to its successors.

    `levels` is the full list of noise levels; `pattern` says how many of them each generated chunk walks, as digits or
    with dashes ("4322222", "4-3-2-2-2-2-2"; the last number repeats for ever; empty: all of them everywhere); `steps`
    spells the lists out instead. `rewarm`: so many chunks from a prompt or scene switch on walk the first lists again
    (with "4322222" and 2: 4 and 3 steps, then 2). `context`: `clean` (an extra pass on the clean chunk, told
    `context_sigma`), `noised` (an extra pass on the chunk at `context_sigma`), `last_step` (what the last denoising
    pass itself wrote, no extra pass). `exit` (training only): take the output at a random step, the same relative step
    for all chunks of a rollout (`shared`: what is taken is what memory sees, as in Self Forcing) or one each
    (`per_chunk`: the chunk is still denoised to its end for memory, as it always is with `last_step` context).
    """

    name: str = "chunkwise"
    levels: tuple[float, ...] = (1.0, 0.9375, 0.8333, 0.625)
    pattern: str = ""
    steps: tuple[tuple[float, ...], ...] = ()
    timesteps: tuple[
        tuple[float, ...], ...
    ] = ()  # levels told to the network, list by list, where they differ from `steps`
    context: str = "clean"
    context_sigma: float = 0.0
    exit: str = "shared"
    rewarm: int = 0
    given_chunks: int = 0  # chunks at the start that are given (a start image, a video to continue), not generated

    def __post_init__(self) -> None:
        for name, choices in (("name", tuple(SCHEDULES)), ("context", CONTEXTS), ("exit", EXITS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"schedule.{name} {getattr(self, name)!r} is unknown; choose one of {choices}")
        if not re.fullmatch(PATTERN, self.pattern):
            raise ValueError(f"schedule.pattern {self.pattern!r} is neither digits nor numbers with dashes: '4322222'")
        for sigmas in self.lists:
            check_sigmas(sigmas)
        if self.timesteps and tuple(map(len, self.timesteps)) != tuple(map(len, self.steps)):
            raise ValueError(
                f"schedule.timesteps must match schedule.steps list by list, got {self.timesteps} and {self.steps}"
            )
        if not 0 <= self.context_sigma < 1:
            raise ValueError(f"schedule.context_sigma must lie in [0, 1), got {self.context_sigma}")
        if self.context == "noised" and not self.context_sigma:
            raise ValueError("schedule.context noised needs a context_sigma above 0; without noise it is clean")
        if self.context == "last_step" and self.context_sigma:
            raise ValueError(f"schedule.context last_step has no pass that {self.context_sigma} could be told to")
        for name in ("given_chunks", "rewarm"):
            if getattr(self, name) < 0:
                raise ValueError(f"schedule.{name} must not be negative, got {getattr(self, name)}")
        if self.name == "rolling" and (self.rewarm or len(set(self.lists)) > 1 or self.context == "last_step"):
            raise ValueError(
                "a rolling window walks one list of levels and shows each finished chunk in a pass of its own: leave "
                "schedule.rewarm 0 and schedule.pattern empty, give at most one list of steps, and choose context "
                "clean or noised"
            )

    @property
    def lists(self) -> tuple[tuple[float, ...], ...]:
        """Noise levels of generated chunk 0, 1, ...; the last list repeats for ever."""
        if self.steps:
            return self.steps
        counts = self.pattern.split("-") if "-" in self.pattern else self.pattern
        return tuple(pick(self.levels, int(n)) for n in counts) or (self.levels,)


def pick(levels: tuple[float, ...], n: int) -> tuple[float, ...]:
    """`n` of the levels: the first, the earliest in between, the last. Source: Diagonal Distillation, authors' code."""
    if not 1 <= n <= len(levels):
        raise ValueError(f"schedule.pattern asks for {n} steps, schedule.levels has {len(levels)}: {list(levels)}")
    return levels if n == len(levels) else (*levels[: n - 1], levels[-1]) if n > 1 else levels[:1]


def check_sigmas(sigmas: Sequence[float]) -> None:
    if not sigmas or sigmas[0] != 1.0:
        raise ValueError(f"a step list starts from pure noise, 1.0; got {list(sigmas)}")
    if any(b >= a for a, b in itertools.pairwise(sigmas)) or sigmas[-1] <= 0:
        raise ValueError(f"a step list falls strictly and stays above 0.0 (the end is implied); got {list(sigmas)}")


def chunk_passes(
    chunk: int, sigmas: Sequence[float], cfg: ScheduleConfig, timesteps: Sequence[float] | None = None
) -> Iterator[Pass]:
    """Passes of one generated chunk, from noise to the memory entries it leaves."""
    last = len(sigmas) - 1
    for i, sigma in enumerate(sigmas):
        done = i == last
        yield Pass(
            chunk,
            (sigma,),
            (0.0 if done else sigmas[i + 1],),
            None if timesteps is None else (timesteps[i],),
            commit=done and cfg.context == "last_step",
            emit=done,
        )
    if cfg.context != "last_step":
        yield context_pass(chunk, cfg)


def context_pass(chunk: int, cfg: ScheduleConfig) -> Pass:
    """The pass that shows a finished chunk to memory; given chunks are always shown clean."""
    given = chunk < cfg.given_chunks
    level = 0.0 if given else cfg.context_sigma
    if cfg.context == "noised" or not level:
        return Pass(chunk, (level,), None, commit=True, emit=given)
    return Pass(chunk, (0.0,), None, (level,), commit=True, emit=given)


def context_level(cfg: ScheduleConfig) -> tuple[float, float]:
    """(noise of a remembered chunk, level told with it) once the schedule repeats itself.

    The state in which finished chunks stand in memory, whoever writes them there: a context pass, the last denoising
    step, or a later pass that writes them again.
    """
    if cfg.context == "last_step":
        last = len(cfg.lists) - 1
        return cfg.lists[last][-1], (cfg.timesteps[last] if cfg.timesteps else cfg.lists[last])[-1]
    return (cfg.context_sigma if cfg.context == "noised" else 0.0), cfg.context_sigma


def list_of(cfg: ScheduleConfig, chunk: int, switches: Sequence[int] = ()) -> int:
    """Which step list `chunk` walks; `switches` are the chunks from which on a stream was told something else."""
    generated = min(chunk - cfg.given_chunks, len(cfg.lists) - 1)
    since = chunk - max((s for s in switches if s <= chunk), default=chunk - cfg.rewarm)
    return min(generated, since) if since < cfg.rewarm else generated


def chunkwise(cfg: ScheduleConfig, start: int = 0, switches: Sequence[int] = ()) -> Iterator[Pass]:
    """Endless passes, one chunk after the other; `start` > 0 goes on after `start` finished chunks.

    Both Self Forcing (one step list) and Diagonal Distillation (many steps early, few later) are this schedule.
    Source: Huang et al. 2506.08009, alg. 1; Diagonal Distillation 2603.09488, section 3.
    """
    for chunk in itertools.count(start):
        if chunk < cfg.given_chunks:
            yield context_pass(chunk, cfg)
        else:
            index = list_of(cfg, chunk, switches)
            yield from chunk_passes(chunk, cfg.lists[index], cfg, cfg.timesteps[index] if cfg.timesteps else None)


def rolling(cfg: ScheduleConfig, start: int = 0, switches: Sequence[int] = ()) -> Iterator[Pass]:
    """Endless passes over a window of chunks at rising noise: each pass denoises all of them by one level.

    The window holds one chunk per level; every pass finishes its first chunk and lets in a new one. Switches change
    nothing: the chunks in flight walk on.
    Source: Rolling Forcing 2509.25161, section 3.
    """
    levels, timesteps = cfg.lists[0], cfg.timesteps[0] if cfg.timesteps else None
    ladder = (*levels, 0.0)

    def window(chunk: int, width: int, emit: bool = False) -> Pass:
        """The pass over `width` chunks, the newest of which is at the first level, the one before it at the second."""
        rungs = range(width - 1, -1, -1)
        sigma, lower = tuple(levels[i] for i in rungs), tuple(ladder[i + 1] for i in rungs)
        return Pass(chunk, sigma, lower, None if timesteps is None else tuple(timesteps[i] for i in rungs), emit=emit)

    for chunk in range(start, cfg.given_chunks):
        yield context_pass(chunk, cfg)
    first = max(start, cfg.given_chunks)
    for width in range(1, len(levels)):  # let chunks in until the window is full
        yield window(first, width)
    for chunk in itertools.count(first):
        yield window(chunk, len(levels), emit=True)
        yield context_pass(chunk, cfg)


SCHEDULES = {"chunkwise": chunkwise, "rolling": rolling}


def endless(cfg: ScheduleConfig, start: int = 0, switches: Sequence[int] = ()) -> Iterator[Pass]:
    """The passes of a stream that never ends, told something else from each of the chunks `switches` on."""
    return SCHEDULES[cfg.name](cfg, start, switches)


def finite(passes: Iterable[Pass], chunks: int) -> Iterator[Pass]:
    """The passes that finish the first `chunks` chunks: a prefix of the endless schedule."""
    for p in passes:
        if p.chunk >= chunks:
            return
        yield p


def training(cfg: ScheduleConfig, chunks: int, rng: Random) -> Iterator[Pass]:
    """The passes of one training rollout of `chunks` chunks: a random exit step per chunk keeps its gradient.

    With one exit for all chunks and a context pass, the rollout stops at the exit step and shows that prediction to
    memory (Self Forcing); else the denoising runs on without gradient to the end of its list, so that memory holds
    exactly what streaming will write. Every step of every list is drawn with probability 1 / len(list).
    """
    if cfg.name == "rolling":
        yield from (replace(trim(p, chunks), grad=p.emit) for p in finite(endless(cfg), chunks))
        return
    shared = rng.random()
    by_chunk = itertools.groupby(finite(endless(cfg), chunks), key=lambda p: p.chunk)
    for _, group in by_chunk:
        passes = list(group)
        steps = [p for p in passes if p.kind == "denoise"]
        if not steps:
            yield from passes
            continue
        u = {"none": 0.9999, "shared": shared, "per_chunk": rng.random()}[cfg.exit]
        exit_step = len(steps) - 1 if cfg.exit == "none" else int(u * len(steps))
        yield from exit_at(passes, exit_step, complete=cfg.context == "last_step" or cfg.exit == "per_chunk")


def trim(p: Pass, chunks: int) -> Pass:
    """`p` without the chunks past the end of a clip of `chunks` chunks."""
    keep = min(len(p.sigma), chunks - p.chunk)
    return replace(
        p,
        sigma=p.sigma[:keep],
        next_sigma=None if p.next_sigma is None else p.next_sigma[:keep],
        timesteps=None if p.timesteps is None else p.timesteps[:keep],
    )


def exit_at(passes: Sequence[Pass], step: int, *, complete: bool) -> Iterator[Pass]:
    """The passes of one chunk with its output taken, with gradient, at denoising pass number `step`."""
    for i, p in enumerate(passes):
        if p.kind == "context" or i < step:
            yield replace(p, emit=False)
        elif i == step:
            yield replace(p, next_sigma=p.next_sigma if complete else (0.0,), grad=True, emit=True)
        elif complete:
            yield replace(p, emit=False)


def evaluations(cfg: ScheduleConfig, chunks: int, switches: Sequence[int] = ()) -> list[int]:
    """Evaluations of each of the first `chunks` generated chunks (a pass over n chunks counts once for each)."""
    total = chunks + cfg.given_chunks
    counts = [0] * total
    for p in finite(endless(cfg, switches=switches), total):
        for chunk in range(p.chunk, min(total, p.chunk + len(p.sigma))):
            counts[chunk] += 1
    return counts[cfg.given_chunks :]
