"""What a prompt switch does to what a stream remembers: named policies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition
from vidistill.memory.cache import KVMemory
from vidistill.models.student import CausalStudent
from vidistill.rollout import recache as write_again
from vidistill.schedules import ScheduleConfig


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
    """The remembered frames are written again under the new prompt: `rollout.recache`."""
    rng = torch.Generator().manual_seed(past.seed)
    write_again(past.student, past.schedule, past.memory, past.latents, cond, past.start, rng)
    return False


def cut(past: Past, cond: Condition) -> bool:
    """Memory is emptied: a new scene begins, decoded without a trace of the old one."""
    past.memory.reset(past.start)  # positions go on, so that the schedule and the inputs keep their frame numbers
    return True


# (stream at the switch, condition of its latents under the new prompt) -> whether a new scene begins
SWITCHES: dict[str, Callable[[Past, Condition], bool]] = {"keep": keep, "recache": recache, "cut": cut}
