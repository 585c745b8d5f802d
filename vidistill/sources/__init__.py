"""Where clips come from: each source returns `Episode`s, captioned or plain clips."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

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
