"""What a prompt switch does to what a stream remembers: named policies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition
from vidistill.memory.cache import KVMemory
from vidistill.models.student import CausalStudent
from vidistill.rollout import reencode
from vidistill.schedules import ScheduleConfig, context_level


@dataclass(frozen=True)
class Past:
    """A stream at a switch: the memory, the newest finished latents [1, F, C, H, W] before latent `start`, a seed."""

    student: CausalStudent
    schedule: ScheduleConfig
    memory: KVMemory
    latents: Tensor
    start: int
    seed: int


def keep(past: Past, cond: Condition) -> bool:
    """Memory stays as it was written under the old prompt."""
    return False


def recache(past: Past, cond: Condition) -> bool:
    """The remembered frames are written again under the new prompt, in the state the schedule leaves them in.

    The sinks stay as they are, unless the stream is so young that they are rewritten with the rest.
    Source: LongLive 2509.22622, KV-recache.
    """
    # At the noise level at which the schedule leaves finished chunks: later chunks were trained to look back at that.
    sigma, timestep = context_level(past.schedule)
    rng = torch.Generator().manual_seed(past.seed)
    start = past.start - past.latents.shape[1]
    reencode(past.student, past.latents, cond, past.memory, start=start, sigma=sigma, timestep=timestep, rng=rng)
    return False


def cut(past: Past, cond: Condition) -> bool:
    """Memory is emptied: a new scene begins, decoded without a trace of the old one."""
    past.memory.reset(past.start)  # positions go on, so that the schedule and the inputs keep their frame numbers
    return True


# (stream at the switch, condition of its latents under the new prompt) -> whether a new scene begins
SWITCHES: dict[str, Callable[[Past, Condition], bool]] = {"keep": keep, "recache": recache, "cut": cut}
