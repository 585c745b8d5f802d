"""What recorders give and what trainers take: an episode, a captioned clip, a talking face, a batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition


@dataclass(frozen=True)
class Batch:
    """A training batch: a clip `x` (latents [B, F, C, H, W], or pixels for a codec), its condition, how many of its
    first frames are given clean, and, where a loss asks for it, a teacher's sample `target` for the same noise. A part
    of a batch that is split has the latents of all its clips as `whole`. `poses` [B, F, 3 or 12] are as recorded."""

    x: Tensor
    cond: Condition = Condition()
    given: int = 0
    target: Tensor | None = None
    whole: Tensor | None = None
    poses: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The clips and their condition on a device."""
        return replace(self, x=self.x.to(device), cond=self.cond.to(device))


HELD_OUT_SEED = 1_000_000  # seeds from here on are never trained on
SPLITS = {"train": 0, "held_out": HELD_OUT_SEED}  # split -> its first seed


def split_seeds(split: str, num: int, splits: Mapping[str, int] = SPLITS) -> range:
    """The first seeds of a split; those of two splits never meet. ValueError for another split, or too many."""
    if split not in splits:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(splits)}")
    if not 0 <= num <= HELD_OUT_SEED:
        raise ValueError(f"num is {num}; allowed are 0 to {HELD_OUT_SEED}")
    return range(splits[split], splits[split] + num)


def in_order(pool: Executor, jobs: Iterable[Callable[[], Any]], ahead: int) -> Iterator[Any]:
    """What the jobs return, in order; no more than `ahead` are made before somebody takes the oldest."""
    waiting: deque[Future[Any]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class Episode:
    """A recorded walk: pictures, what was done between them, and where the camera was.

    frames: uint8 [T, H, W, 3]. actions: float32 [T, A]; actions[t] led from frame t-1 to frame t, actions[0] is zero.
    poses: float32 [T, 3], one row a frame: x and y in map units / 64, heading in radians, counter-clockwise and
    continuous (never wrapped). walls: a JSON-able description of the world, see `sources.doom_world.describe`.
    """

    frames: np.ndarray
    actions: np.ndarray
    poses: np.ndarray
    seed: int
    walls: dict


@dataclass(frozen=True)
class Captioned:
    """A clip with what it shows in words: frames uint8 [T, H, W, 3], and the words the caption is made of by name."""

    frames: np.ndarray
    caption: str
    labels: dict[str, str]
    seed: int


@dataclass(frozen=True)
class Talk:
    """Somebody talking: frames uint8 [T, H, W, 3], pcm int16 [S] that may be longer, mouth float32 [T, 2] (opening and
    width, what the lips truly did), the caption and what it and the picture are made of."""

    frames: np.ndarray
    pcm: np.ndarray
    mouth: np.ndarray
    caption: str
    labels: dict[str, str]
    seed: int
