"""What recorders give and what trainers take: an episode, a captioned clip, a talking face, a batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

    def first(self, clips: int) -> "Batch":
        """The first so many clips, or all where there are fewer."""
        return replace(self, x=self.x[:clips], cond=self.cond.map(lambda x: x[:clips]))

    def to(self, device: torch.device) -> "Batch":
        """The clips and their condition on a device."""
        return replace(self, x=self.x.to(device), cond=self.cond.to(device))


ENDS = ".ends"  # `frames.ends` [N]: where each episode ends in `frames`, whose episodes of other lengths lie in a row


def pack_rows(name: str, episodes: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors of a shard that hold `episodes` [T, ...]: stacked [N, T, ...], or in a row where lengths differ."""
    if len({len(x) for x in episodes}) == 1:
        return {name: torch.stack(list(episodes))}
    return {name: torch.cat(list(episodes)), name + ENDS: torch.tensor([len(x) for x in episodes]).cumsum(0)}


def count_episodes(part: Mapping[str, Tensor]) -> int:
    """Episodes of a shard."""
    name = next(iter(part)).removesuffix(ENDS)
    return len(part.get(name + ENDS, part[name]))


def row_lengths(part: Mapping[str, Tensor], name: str) -> list[int]:
    """Rows of tensor `name` in each episode of a shard."""
    if name + ENDS not in part:
        return [part[name].shape[1]] * len(part[name])
    return part[name + ENDS].diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


def unpack_rows(part: Mapping[str, Tensor], name: str, k: int) -> Tensor:
    """Tensor `name` [T, ...] of episode `k` of a shard, not copied."""
    if name + ENDS not in part:
        return part[name][k]
    ends = part[name + ENDS]
    return part[name][int(ends[k - 1]) if k else 0 : int(ends[k])]


IGNORED = -100  # a label that no picture shows
HELD_OUT_SEED = 1_000_000  # seeds from here on are never trained on
TEST_SEED = 1_700_000  # seeds from here on choose nothing
SPLITS: Mapping[str, range] = {
    "train": range(HELD_OUT_SEED),
    "validation": range(HELD_OUT_SEED, TEST_SEED),
    "test": range(TEST_SEED, 2_000_000),
}
OLD_SPLITS = {"held_out": "validation"}


def split_name(split: str) -> str:
    """The name of a split, which older data may call otherwise."""
    return OLD_SPLITS.get(split, split)


def split_seeds(split: str, num: int, splits: Mapping[str, range] = SPLITS) -> range:
    """The first seeds of a split; those of two splits never meet. ValueError for another split, or too many."""
    found = splits.get(split_name(split))
    if found is None:
        raise ValueError(f"split is {split!r}; allowed are {', '.join([*splits, *OLD_SPLITS])}")
    if not 0 <= num <= len(found):
        raise ValueError(f"num is {num}; {split} has {len(found)} seeds")
    return found[:num]


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
