"""KV memory: what a student remembers of finished frames, what it costs, what stays. No attention maths."""

import copy
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vidistill.memory.autograd import AutogradView
from vidistill.memory.history import Frames, History, Stored
from vidistill.memory.policies import POLICIES, MemoryConfig, sink_times
from vidistill.memory.pooling import frame_positions, num_cells
from vidistill.memory.spec import CacheSpec
from vidistill.ops.memory_attention import Segment, joined

CACHE_SIZES = {"prompt": 1, "levels": 32, "sites": 1}  # what is read once, and of how many objects it is kept


FREE = -1  # the frame of a slot that holds none


def neighbours(slots: list[int]) -> list[tuple[int, int, int]]:
    """Runs of slots that lie one after the other: (place in the list, first slot, slots)."""
    runs = [list(run) for _, run in groupby(enumerate(slots), key=lambda pair: pair[1] - pair[0])]
    return [(*run[0], len(run)) for run in runs]


class KVMemory:
    """Keys and values of remembered frames, one buffer per layer, filled slot by slot.

    Life of a chunk: `begin(start, frames)` makes room, `segments(layer, ...)` takes the chunk's own keys and values and
    returns everything its queries attend to, `commit()` keeps what came last. A chunk that is never committed leaves
    no trace. Entries are detached: history is frozen, as the papers say (tested).

    Keys rest rotated to their absolute frame; sinks are turned again when they move relative to the window.
    `origin` is the frame that the first sink is or will be: where the stream, or its newest scene, began; `next_frame`
    the one that the next chunk starts with.
    """

    def __init__(self, cfg: MemoryConfig, spec: CacheSpec) -> None:
        self.cfg, self._spec = cfg, spec
        self.tokens_per_frame = spec.tokens_per_frame
        window = cfg.frames * self.tokens_per_frame
        # A dense history lies behind the window in the same buffer, so that attention reads both as one view.
        behind = cfg.history_tokens(spec.grid) if cfg.entries == "dense" else 0
        self._keys, self._values = spec.buffer(window + behind), spec.buffer(window + behind)
        self._raw_sinks = spec.buffer(cfg.sinks * self.tokens_per_frame)
        shown = self._keys[:, :, window:], self._values[:, :, window:]
        self._history = History(cfg, spec, shown) if cfg.remembers else None
        self._history_shown = True
        self._lent = False  # whether a backward pass may still read views of the buffers
        self.reset()

    def reset(self, start: int = 0) -> None:
        """Forget everything; the next chunk starts at frame `start`, and its first frames become the sinks."""
        self._take_back()
        self._slots = [FREE] * self.cfg.frames  # slot -> frame it holds
        self._staged: list[int] = []  # slots of the chunk in flight
        self._sink_times: dict[int, int] = {}  # sinks whose keys are rotated to another time than their own
        self.origin = self.next_frame = self._start = start  # `_start`: first staged frame of the chunk in flight
        self._rewriting = False  # frames are written again beside sinks that stay: a chunk may be longer than its room
        self._once: dict[str, dict[int, tuple[object, Any]]] = {}  # kind -> id -> an object and what was read of it
        self._poses: dict[int, Tensor] = {}  # frame of the window -> its pose numbers [B, D]
        self._sketches: dict[int, Frames] = {}  # frame -> its entries encoded again, coarsely
        if self._history is not None:
            self._history.clear(start)

    @property
    def frames(self) -> list[int]:
        """Frames remembered in full, oldest first."""
        return sorted(f for f in self._slots if f != FREE)

    @property
    def stored(self) -> list[Stored]:
        """All remembered frames, oldest first, and what is left of each."""
        old = [] if self._history is None else self._history.stored
        return [*old, *(Stored(f, 1, self.tokens_per_frame) for f in self.frames)]

    @property
    def tokens(self) -> int:
        """Tokens there is room for."""
        return self.cfg.tokens(self._spec.grid)

    def factor(self, frame: int) -> int:
        """The factor a side of a frame once it has left the window."""
        return self.cfg.factor(frame - self.origin)

    @property
    def poses(self) -> dict[int, Tensor]:
        """Pose numbers [B, D] of remembered frames; empty for a memory without history."""
        return {} if self._history is None else {**self._history.poses, **self._poses}

    @property
    def history_shown(self) -> bool:
        return self._history is not None and self._history_shown

    def show_history(self, on: bool) -> None:
        """Let chunks look at the compressed history, or at the window alone; it is kept up to date either way."""
        self._history_shown = on

    @property
    def memory_bytes(self) -> int:
        window = sum(t.numel() * t.element_size() for t in (self._keys, self._values, self._raw_sinks))
        return window + (0 if self._history is None else self._history.bytes)

    def begin(self, start: int, frames: int, poses: Tensor | None = None) -> Tensor:
        """Make room for a chunk; returns the times [frames] (float64) its queries and keys are rotated to.

        `poses` [B, frames, D] are the chunk's own, kept with its entries.

        A chunk must fit beside the sinks, except right after `rewind(keep_sinks=True)`: then its first frames only look
        and leave no trace.
        """
        if start != self.next_frame:
            raise ValueError(f"memory expects a chunk that starts at frame {self.next_frame}, got {start}")
        drop = POLICIES[self.cfg.policy]([f - self.origin for f in self.frames], frames, self.cfg)
        self._hand_over([self.origin + f for f in drop])
        self._slots = [FREE if f - self.origin in drop else f for f in self._slots]
        free = [slot for slot, f in enumerate(self._slots) if f == FREE]
        if len(free) < frames and not self._rewriting:
            raise ValueError(
                f"a chunk of {frames} frames and {len(self.frames)} remembered ones do not fit "
                f"memory.frames={self.cfg.frames}"
            )
        self._staged = free[:frames]
        self._start = start + frames - len(self._staged)
        self._rephase_sinks()
        if self._history is not None:
            if poses is not None:
                self._poses.update({start + i: poses[:, i] for i in range(frames)})
            self._history.place(min([*self.frames, self._start]))
        return torch.arange(start, start + frames, dtype=torch.float64)

    def _rephase_sinks(self) -> None:
        """Turn the sinks' keys so that they sit right before the oldest frame of the window.

        As they came from the network, not as they lie: turning a turned key again and again would add up its errors.
        """
        kept, n = [f - self.origin for f in self.frames], self.tokens_per_frame
        for sink, time in sink_times(kept, self._start - self.origin, self.cfg).items():
            frame, time = self.origin + sink, self.origin + time
            if self._time(frame) == time:
                continue
            positions = frame_positions(torch.tensor([time], dtype=torch.float64), self._spec.grid)
            slot, self._sink_times[frame] = self._slots.index(frame), time
            for keys, raw in zip(self._keys, self._raw_sinks, strict=True):
                turned = self._spec.rotate(raw[:, sink * n : (sink + 1) * n], positions, False)
                keys[:, slot * n : (slot + 1) * n] = turned

    def _time(self, frame: int) -> int:
        """The time that the keys of a remembered frame are rotated to."""
        return self._sink_times.get(frame, frame)

    def _hand_over(self, leaving: list[int]) -> None:
        """Move frames from the window to the history, un-rotated; ValueError if it is full and may not forget."""
        history = self._history
        if history is None or not leaving:
            return
        kept = set(leaving)
        if self.cfg.policy == "endless":
            kept = history.admit(leaving, self._poses)
        if history.used + sum(num_cells(self._spec.grid, self.factor(f)) for f in kept) > history.capacity:
            raise ValueError(
                f"the history of {self.cfg.history} frames is full at frame {self.next_frame} and memory.policy "
                f"{self.cfg.policy!r} forgets nothing here; raise memory.history or choose policy 'endless'"
            )
        for frame in leaving:
            sketch, pose = self._sketches.pop(frame, None), self._poses.pop(frame, None)
            if frame in kept:
                entries = sketch or {layer: self._read(layer, [frame], True) for layer in range(self._spec.layers)}
                history.add(frame, entries, pose, pooled=sketch is not None)

    def sketch(self, frame: int, entries: Frames) -> None:
        """Keep what the network made of a frame's pooled latents until the frame leaves the window."""
        self._sketches[frame] = entries

    def segments(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> list[Segment]:
        """What the chunk's queries attend to: the remembered entries and its own, in runs that lie together.

        `raw` and `keys` [B, f n, h, d] are the chunk's keys before (None unless `wants_raw`) and after rotation. While
        autograd records, the result is a fresh tensor in which only the chunk's own part carries gradient; otherwise it
        is a view.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return self.recall().segments(layer, raw, keys, values)
        self.write(layer, raw, keys, values)
        # Slots are read in the order they lie in: attention does not mind, and runs from the first on are views.
        used = sorted(self._past_slots() + self._staged)
        old = self._history if self._history_shown else None
        if old is None or not old.used:
            return [Segment(*self._gather(layer, used))]
        if self.cfg.entries == "dense" and len(used) == self.cfg.frames:
            stop = self.cfg.frames * self.tokens_per_frame + old.used
            return [Segment(self._keys[layer, :, :stop], self._values[layer, :, :stop])]
        return [old.segment(layer), Segment(*self._gather(layer, used))]

    @property
    def wants_raw(self) -> bool:
        """Whether the chunk in flight holds sinks, whose keys are also kept as they were before rotation."""
        return self._start - self.origin < self.cfg.sinks

    def write(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Put the chunk's entries, cut from their graph, into the slots that `begin` found for them."""
        n = self.tokens_per_frame
        skip = keys.shape[1] - len(self._staged) * n
        for frame, slot, count in neighbours(self._staged):
            here, there = slice(skip + frame * n, skip + (frame + count) * n), slice(slot * n, (slot + count) * n)
            self._keys[layer, :, there] = keys[:, here].detach()
            self._values[layer, :, there] = values[:, here].detach()
        first = self._start - self.origin
        sinks = min(self.cfg.sinks, first + len(self._staged))
        if sinks > first:
            assert raw is not None
            own = raw[:, skip : skip + (sinks - first) * n]
            self._raw_sinks[layer, :, first * n : sinks * n] = own.detach()

    def recall(self) -> "AutogradView":
        """This memory as one pass under autograd sees it."""
        return AutogradView(self, len(self._staged) * self.tokens_per_frame)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """The remembered keys and values [B, S, h, d], without the chunk in flight, as a backward pass may read them.

        They are copies wherever a slot may be used twice. Policy `full` fills every slot once: views stay as they are.
        """
        keys, values = self._gather(layer, self._past_slots())
        if self._history is not None and self._history_shown and self._history.used:
            return joined([self._history.segment(layer), Segment(keys, values)], keys.dtype)
        if self.cfg.policy != "full":
            return keys.clone(), values.clone()
        self._lent = True
        return keys, values

    def _take_back(self) -> None:
        """Before slots are filled anew: leave buffers that were lent to whoever reads them, and go on with others."""
        if self._lent:
            self._keys, self._values, self._lent = self._keys.clone(), self._values.clone(), False

    def cached(self, kind: str, of: object, read: Callable[[], Any]) -> Any:
        """What `read` returns, kept for the newest CACHE_SIZES[kind] objects `of`; read anew where autograd records."""
        if torch.is_grad_enabled():
            return read()
        found = self._once.setdefault(kind, {})
        if id(of) not in found:
            while len(found) >= CACHE_SIZES[kind]:
                del found[next(iter(found))]
            found[id(of)] = of, read()  # `of` is kept as well: as long as it lives, nothing else has its id
        return found[id(of)][1]

    def clear_cache(self) -> None:
        """Forget what was read once: the weights that read it have moved."""
        self._once = {}

    def commit(self) -> None:
        """Keep the chunk staged last."""
        for frame, slot in enumerate(self._staged, self._start):
            self._slots[slot] = frame
        self.next_frame = self._start + len(self._staged)
        self._staged, self._rewriting = [], False

    def rewind(self, frame: int, *, keep_sinks: bool = False) -> None:
        """Forget `frame` and all after it, so that they can be written again (a prompt switch re-encodes them).

        `keep_sinks`: sinks stay as they are even if they lie after `frame`; the next chunk may then be too long for the
        room beside them.
        """
        self._take_back()
        sinks = self.origin + self.cfg.sinks if keep_sinks else frame
        self._slots = [f if f < max(frame, sinks) else FREE for f in self._slots]
        self._sink_times = {f: t for f, t in self._sink_times.items() if f in self._slots}
        self._sketches = {f: entries for f, entries in self._sketches.items() if f < frame}
        if self._history is not None:
            self._history.forget(frame)
        self._staged, self.next_frame, self._rewriting = [], min(self.next_frame, frame), keep_sinks

    def advance(self, frames: int) -> None:
        """Let `frames` pass unseen between two chunks: the window moves on as it is, sinks and history stay.

        The stream then stands where a longer one would. ValueError unless frames keep their compression factors.
        """
        if self.cfg.remembers and frames % len(self.cfg.pattern):
            raise ValueError(f"advance by a multiple of {len(self.cfg.pattern)} (memory.pattern), got {frames}")
        assert not self._staged
        self._take_back()
        ahead = {f: f + frames for f in self.frames if f - self.origin >= self.cfg.sinks}
        shift, n = torch.tensor([[frames, 0, 0]], dtype=torch.float64), self.tokens_per_frame
        for slot, frame in enumerate(self._slots):
            if frame in ahead:
                for keys in self._keys[:, :, slot * n : (slot + 1) * n]:
                    keys.copy_(self._spec.rotate(keys, shift, False))
        self._slots = [ahead.get(f, f) for f in self._slots]
        self._poses = {ahead.get(f, f): pose for f, pose in self._poses.items()}
        self._sketches = {ahead.get(f, f): entries for f, entries in self._sketches.items()}
        self.next_frame += frames

    def fork(self) -> "KVMemory":
        """An independent copy; what was read once is read anew."""
        return copy.deepcopy(self, {id(self._spec): self._spec, id(self._once): {}})

    def entries(self, layer: int, *, unrotated: bool = False) -> tuple[Tensor, Tensor, list[int]]:
        """Copies of the remembered keys and values [B, S, h, d] in the order of their frames, and those frames.

        `unrotated` turns the keys back to what they were before rotary embedding.
        """
        keys, values = self._read(layer, self.frames, unrotated)
        return keys.clone(), values.clone(), self.frames

    def _read(self, layer: int, frames: list[int], unrotated: bool) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, h, d] of `frames` of the window, the keys as they lie or before rotation."""
        keys, values = self._gather(layer, [self._slots.index(f) for f in frames])
        if unrotated and frames:
            times = torch.tensor([self._time(f) for f in frames], dtype=torch.float64)
            keys = self._spec.rotate(keys, frame_positions(times, self._spec.grid), True)
        return keys, values

    def _past_slots(self) -> list[int]:
        return [slot for slot, f in enumerate(self._slots) if f != FREE]

    def _gather(self, layer: int, slots: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, h, d] of `slots` (ascending or not): views where they are the first ones."""
        n, buffers = self.tokens_per_frame, (self._keys[layer], self._values[layer])
        if slots == list(range(len(slots))):
            keys, values = (x[:, : len(slots) * n] for x in buffers)
        else:
            keys, values = (torch.cat([x[:, s * n : (s + 1) * n] for s in slots], dim=1) for x in buffers)
        return keys, values
