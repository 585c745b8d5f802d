"""What a stream costs when it is old, and what several streams cost in one pass."""

import statistics
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import torch

from vidistill.bench.config import BenchConfig
from vidistill.bench.machine import resident_bytes
from vidistill.bench.result import Progress
from vidistill.checkpoint import Bundle
from vidistill.conditioning.condition import Condition
from vidistill.conditioning.controls import LiveConditions
from vidistill.diffusion import derived_seed
from vidistill.memory.policies import stream_memory
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import endless, finite
from vidistill.streaming.engine import Stopwatch
from vidistill.streaming.session import StreamSession

WALK = ("forward", "turn_left", "turn_right")
HELD_CHUNKS = 4  # chunks for which a walker does the same


def growth_rows(
    old: StreamSession, young: StreamSession, fill: int, cfg: BenchConfig, progress: Progress
) -> list[dict[str, Any]]:
    """A row for each of `growth_minutes` of the stream `old`: median time of a chunk's passes, and bytes, there.

    Every chunk that counts is made in turn with one of `young`, the same stream after the `fill` chunks that fill its
    memory: `beside_young`, the median ratio of their times, is free of a machine that slows down. Both walk, and do the
    same in chunks made in turn. `ran` is false where the clock was advanced, after `growth_run` minutes that really
    ran. Nothing is decoded: a decoder's state does not grow.
    """
    aged, fresh = old.chunks(), young.chunks()
    seconds, rows, chunk = old.frames_per_chunk / old.fps, [], 0
    for number in range(fill):
        walk(young, cfg.seed, number)
        next(fresh)
    for minutes in sorted(cfg.growth_minutes):
        ran, times, others = minutes <= cfg.growth_run, [], []  # type: bool, list[float], list[float]
        last = int(minutes * 60 / seconds)
        start = last - cfg.growth_chunks
        if not ran:
            while chunk < min(start, int(cfg.growth_run * 60 / seconds)):
                walk(old, cfg.seed, chunk + 1)
                chunk = next(aged).index
                progress(chunk / last, f"{minutes:g} minutes of stream")
            old.advance(max(0.0, start - chunk) * seconds / 60)
        while chunk < last or len(times) < 2:
            number = chunk + 1
            walk(old, cfg.seed, number)
            made = next(aged)
            chunk = made.index
            if chunk > start:
                walk(young, cfg.seed, number)
                times.append(made.stats["chunk_ms"])
                others.append(next(fresh).stats["chunk_ms"])
            progress(min(1.0, chunk / max(1, last)), f"{minutes:g} minutes of stream")
        rows.append(
            {
                "minutes": chunk * seconds / 60,
                "ran": ran,
                "chunk_ms_p50": float(np.percentile(times, 50)),
                "chunk_ms_p95": float(np.percentile(times, 95)),
                "beside_young": statistics.median(a / b for a, b in zip(times, others, strict=True)),
                "memory_bytes": old.memory_bytes,
                "rss_bytes": resident_bytes(),
            }
        )
    return rows


def walk(session: StreamSession, seed: int, chunk: int) -> None:
    """Tell `session` what to do in `chunk`: an action drawn from `seed` anew every `HELD_CHUNKS` chunks.

    One of `WALK` where the student knows any, else one of its actions; a student without actions is told nothing.
    """
    if known := [name for name in WALK if name in session.actions] or list(session.actions):
        session.set(action={Random(derived_seed(seed, chunk // HELD_CHUNKS)).choice(known): 1.0})


@torch.no_grad()
def batch_row(bundle: Bundle, factor: int, batch: int, rounds: int, fill: int, chunks: int) -> dict[str, Any]:
    """Time of a pass of `batch` streams at once beside that of one, alternating rounds; no decoding.

    Each round rolls out `fill` chunks and then times `chunks` more. A latent stands for `factor` px frames.
    """
    found = [[_chunk_ms(bundle, factor, n, fill, chunks) for n in (1, batch)] for _ in range(rounds)]
    one, many = (statistics.median(row[i] for row in found) for i in (0, 1))
    return {"streams": batch, "chunk_ms": many, "one_chunk_ms": one, "gain": batch * one / many}


def _chunk_ms(bundle: Bundle, factor: int, batch: int, fill: int, chunks: int) -> float:
    """Median milliseconds of the passes of a chunk of a rollout of `batch` streams."""
    student, schedule, device = bundle.net, bundle.schedule, bundle.net.net.device
    shape, watch = student.shape, Stopwatch(device)
    inputs = LiveConditions.of(bundle.spec, factor, device)
    conds: dict[int, Condition] = {}

    def cond(start: int, stop: int) -> Condition:
        if start not in conds:
            conds.clear()
            one = inputs.condition(inputs.control, start, stop)
            conds[start] = one.map(lambda t: t.expand(batch, *t.shape[1:]))
        return conds[start]

    def timed() -> Iterator[Any]:
        for p in finite(endless(schedule), schedule.given_chunks + fill + chunks):
            watch.start(f"{p.kind}_ms")
            yield p
            watch.stop()

    size = batch, bundle.given_frames, shape.channels, shape.height, shape.width
    given = torch.zeros(size, device=device) if bundle.given_frames else None
    inputs.begin(None if given is None else given[:1])
    memory = student.new_memory(batch, cfg=stream_memory(student.cfg.memory, student.cfg.chunk))
    noise, rng = chunk_noise(student, batch, 0, given), torch.Generator().manual_seed(0)
    made = rollout(student, timed(), noise=noise, cond=cond, memory=memory, rng=rng, clamped=given)
    times = [watch.take()["chunk_ms"] for _ in made]
    return statistics.median(times[-chunks:])
