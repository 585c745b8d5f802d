"""Compressed history: what is kept of frames that have left the window, at which resolution, and what goes first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidistill.memory.policies import ENTRIES, MemoryConfig
from vidistill.memory.pooling import Pooling, frame_positions, num_cells
from vidistill.memory.spec import CacheSpec, Rotate
from vidistill.ops import quant
from vidistill.ops.memory_attention import Segment

Frames = dict[int, tuple[Tensor, Tensor]]  # layer -> un-rotated keys and values [B, m, h, d]


@dataclass(frozen=True)
class Stored:
    """A remembered frame: its number, how many tokens a side became one, and how many tokens it has left."""

    frame: int
    factor: int
    tokens: int


@dataclass(frozen=True)
class Store:
    """A buffer [B, S, h, d] of keys or values, dense or in 8 bits; tokens are written and read from the front."""

    data: Tensor | quant.Quantised

    @property
    def tensors(self) -> list[Tensor]:
        return [self.data.data, self.data.scale] if isinstance(self.data, quant.Quantised) else [self.data]

    def first(self, used: int) -> Tensor | quant.Quantised:
        """The first `used` tokens, as they are kept."""
        if isinstance(self.data, quant.Quantised):
            return quant.Quantised(self.data.data[:, :used], self.data.scale[:, :used])
        return self.data[:, :used]

    def keep(self, index: Tensor) -> None:
        """Move the tokens `index` to the front."""
        for x in self.tensors:
            bits = x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x  # index_select knows no fp8
            bits[:, : len(index)] = bits.index_select(1, index)


def put(keys: Store, values: Store, at: int, k: Tensor, v: Tensor) -> None:
    """Write the entries `k`, `v` [B, m, h, d] from token `at` on."""
    if isinstance(keys.data, quant.Quantised) and isinstance(values.data, quant.Quantised):
        where = torch.arange(at, at + k.shape[1], device=k.device)
        quant.append_entries(keys.data, values.data, k, v, where)
        return
    for store, x in ((keys, k), (values, v)):
        assert isinstance(store.data, Tensor)
        store.data[:, at : at + x.shape[1]] = x


class History:
    """Un-rotated keys and values of frames that have left the window, in the order they left.

    Keys are turned to the frame's own time, or (`relative`) so that the history ends where the window begins, which are
    the same as long as no frame was dropped: dense ones once a chunk, into `shown`, where the values are as well; 8-bit
    ones whenever they are read. `poses` travel with the entries.
    """

    def __init__(self, cfg: MemoryConfig, spec: CacheSpec, shown: tuple[Tensor, Tensor]) -> None:
        """`shown`: turned keys and values [layers, B, S, h, d], with room for all tokens if entries are dense."""
        self.capacity, self.relative = cfg.history_tokens(spec.grid), cfg.phase == "relative"
        self._cfg, self._spec, self._kind = cfg, spec, ENTRIES[cfg.entries]
        self._positions = torch.zeros(0, 3, dtype=torch.float64)
        self.clear()
        shape = (spec.batch, self.capacity, spec.heads, spec.head_dim)
        self._turned = shown[0] if self._kind is None else ()
        if self._kind is None:
            self._keys, self._values = ([Store(x) for x in y] for y in (spec.buffer(self.capacity), shown[1]))
        else:
            self._keys, self._values = (
                [Store(quant.empty(shape, self._kind, spec.device)) for _ in range(spec.layers)] for _ in range(2)
            )

    @property
    def bytes(self) -> int:
        """Bytes of its own buffers, those that it was given to show its entries in left out."""
        own = self._keys if self._kind is None else (*self._keys, *self._values)
        return sum(t.numel() * t.element_size() for s in own for t in s.tensors)

    @property
    def used(self) -> int:
        return sum(s.tokens for s in self.stored)

    def factor(self, frame: int) -> int:
        """The factor a side of a frame once it is here."""
        return self._cfg.factor(frame - self._origin)

    def clear(self, origin: int = 0) -> None:
        """Forget everything; frame numbers count from `origin`."""
        self.stored: list[Stored] = []
        self._placed: list[tuple[int, Stored]] = []  # times that the keys are turned to
        self.poses: dict[int, Tensor] = {}
        self._origin = origin

    def forget(self, frame: int) -> None:
        """Drop `frame` and all after it."""
        self._drop([s for s in self.stored if s.frame >= frame])

    def admit(self, frames: Sequence[int], poses: dict[int, Tensor]) -> set[int]:
        """Which of the `frames` about to come are worth a place; drops others until those fit.

        Of the two frames whose poses are nearest to each other the newer goes: the older one is closer to what was
        there first. Poses of a batch count by their mean distance, frames without by their time.
        """
        incoming = [Stored(f, s, num_cells(self._spec.grid, s)) for f in frames for s in (self.factor(f),)]
        left, known = [*self.stored, *incoming], {**poses, **self.poses}
        used = sum(s.tokens for s in left)
        while used > self.capacity:
            used -= left.pop(self._least(left, known)).tokens
        self._drop([s for s in self.stored if s not in left])
        return {s.frame for s in incoming if s in left}

    @staticmethod
    def _least(stored: list[Stored], known: dict[int, Tensor]) -> int:
        if len(stored) == 1:
            return 0
        if all(s.frame in known for s in stored):
            poses = torch.stack([known[s.frame].float() for s in stored], dim=1)  # [B, m, D]
            distance = torch.cdist(poses, poses, compute_mode="donot_use_mm_for_euclid_dist").mean(0)
        else:
            times = torch.tensor([float(s.frame) for s in stored])
            distance = (times[:, None] - times[None]).abs()
        distance.fill_diagonal_(float("inf"))
        return max(divmod(int(distance.argmin()), len(stored)))

    def _drop(self, gone: list[Stored]) -> None:
        if not gone:
            return
        kept, index, at = [], [], 0
        for s in self.stored:
            if s in gone:
                self.poses.pop(s.frame, None)
            else:
                kept.append(s)
                index.append(torch.arange(at, at + s.tokens))
            at += s.tokens
        self.stored = kept
        if index:
            where = torch.cat(index).to(self._spec.device)
            for store in (*self._keys, *self._values):
                store.keep(where)

    def add(self, frame: int, entries: Frames, pose: Tensor | None, *, pooled: bool) -> None:
        """Keep a frame's un-rotated entries of every layer, compressed here unless they are `pooled` already."""
        at, factor = self.used, self.factor(frame)
        tokens = num_cells(self._spec.grid, factor)
        for layer, (keys, values) in entries.items():
            if pooled:
                keys = self._spec.pooling.stretched(keys)
            else:
                keys, values = self._spec.pooling(layer, keys, values, factor)
            put(self._keys[layer], self._values[layer], at, keys.detach(), values.detach())
        self.stored.append(Stored(frame, factor, tokens))
        if pose is not None:
            self.poses[frame] = pose.detach().float()

    def place(self, window_start: int) -> None:
        """Decide the times that keys are turned to, given the oldest frame of the window."""
        first = window_start - len(self.stored)
        times = [first + i if self.relative else s.frame for i, s in enumerate(self.stored)]
        placed = list(zip(times, self.stored, strict=True))
        if placed == self._placed:
            return
        self._placed = placed
        parts = [frame_positions(torch.tensor([float(t)]), self._spec.grid, s.factor) for t, s in placed]
        self._positions = torch.cat(parts).to(self._spec.device) if parts else torch.zeros(0, 3, dtype=torch.float64)
        for keys, turned in zip(self._keys, self._turned, strict=self._kind is None):
            raw = keys.first(self.used)
            assert isinstance(raw, Tensor)
            turned[:, : self.used] = self._spec.rotate(raw, self._positions, False)

    def segment(self, layer: int) -> Segment:
        """The entries as attention reads them; 8-bit keys with the table that turns them."""
        values = self._values[layer].first(self.used)
        if self._kind is None:
            return Segment(self._turned[layer][:, : self.used], values)
        return Segment(
            self._keys[layer].first(self.used),
            values,
            self._spec.rotate.table(self._positions, torch.device(self._spec.device)),
        )


class EntryRecorder:
    """Takes down what a network makes of a few frames alone: a memory that remembers nothing before them."""

    def __init__(self) -> None:
        self.entries: Frames = {}

    wants_raw = True

    def begin(self, start: int, frames: int, poses: Tensor | None = None) -> Tensor:
        return torch.arange(start, start + frames, dtype=torch.float64)

    def recall(self) -> "EntryRecorder":
        return self

    def cached(self, kind: str, of: object, read: Callable[[], Any]) -> Any:
        return read()

    def segments(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> list[Segment]:
        assert raw is not None
        self.entries[layer] = raw, values
        return [Segment(keys, values)]


@dataclass(frozen=True, eq=False)
class Again:
    """Frames of a clip that are seen once more, as `frames` of a memory would be: coarser, or at other `times` [n].

    `seen` [F, n] says which frames of the clip look at them there.
    """

    frames: list[int]
    times: Tensor
    seen: Tensor
    factor: int = 1


class ClipHistory(EntryRecorder):
    """The memory of a clip that is seen in one masked forward: behind the keys of its frames, those of some of them
    `again`, with gradient. `times` [F] are those of all frames of the forward.

    Source: RELIC 2512.04040, hybrid forcing.
    """

    def __init__(self, times: Tensor, again: Sequence[Again], pooling: Pooling, rotate: Rotate) -> None:
        self._times, self._again, self._pooling, self._rotate = times, again, pooling, rotate
        self._tokens = pooling.grid[0] * pooling.grid[1]
        self._positions = [frame_positions(part.times, pooling.grid, part.factor) for part in again]

    def begin(self, start: int, frames: int, poses: Tensor | None = None) -> Tensor:
        return self._times

    @property
    def widths(self) -> list[int]:
        """Tokens of each frame that is seen again, in the order of its keys."""
        return [num_cells(self._pooling.grid, part.factor) for part in self._again for _ in part.frames]

    def segments(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> list[Segment]:
        """The clip's own keys and values [B, S, h, d] and those that are seen again behind them."""
        assert raw is not None
        frames, shown = (x.unflatten(1, (-1, self._tokens)) for x in (raw, values))
        for part, positions in zip(self._again, self._positions, strict=True):
            k, v = (x[:, part.frames].flatten(0, 1) for x in (frames, shown))
            k, v = self._pooling(layer, k, v, part.factor)
            k, v = (x.unflatten(0, (raw.shape[0], -1)).flatten(1, 2) for x in (k, v))
            keys = torch.cat((keys, self._rotate(k, positions, False)), dim=1)
            values = torch.cat((values, v), dim=1)
        return [Segment(keys, values)]
