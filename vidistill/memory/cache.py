"""KV memory: what a student remembers of finished frames, what it costs, what stays. No attention maths."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidistill.memory.autograd import AutogradView
from vidistill.memory.history import (
    RELIC_PATTERN,
    Again,
    ClipHistory,
    EntryRecorder,
    History,
    Rotate,
    Stored,
    head_major,
)
from vidistill.memory.policies import POLICIES, MemoryConfig, sink_times, stream_memory
from vidistill.memory.pooling import Pooling, frame_positions, num_cells
from vidistill.ops.memory_attention import Segment, joined

__all__ = [
    "POLICIES",
    "RELIC_PATTERN",
    "Again",
    "AutogradView",
    "ClipHistory",
    "EntryRecorder",
    "KVMemory",
    "MemoryConfig",
    "Pooling",
    "Rotate",
    "Stored",
    "frame_positions",
    "sink_times",
    "stream_memory",
]


CACHE_SIZES = {"prompt": 1, "levels": 32, "sites": 1}  # what is read once, and of how many objects it is kept


def neighbours(slots: list[int]) -> list[tuple[int, int, int]]:
    """Runs of slots that lie one after the other: (place in the list, first slot, slots)."""
    runs: list[tuple[int, int, int]] = []
    for i, slot in enumerate(slots):
        if runs and slot == sum(runs[-1][1:]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((i, slot, 1))
    return runs


class KVMemory:
    """Keys and values of remembered frames, one buffer per layer, filled slot by slot.

    Life of a chunk: `begin(start, frames)` makes room, `stage(layer, ...)` hands in the chunk's own keys and values and
    returns everything its queries attend to, `commit()` keeps what was staged last. A chunk that is never committed
    leaves no trace. Entries are detached: history is frozen, as the papers say (tested).

    Keys rest rotated to their absolute frame; sinks are turned again when they move relative to the window. The order
    of slots means nothing, positions travel with them.
    """

    def __init__(
        self,
        cfg: MemoryConfig,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        grid: tuple[int, int],
        rotate: Rotate,
        pooling: Pooling | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`pooling` compresses frames that leave the window; None: what `cfg.pool` says, without learned weights."""
        self.cfg = cfg
        self.tokens_per_frame = grid[0] * grid[1]
        self._grid = grid
        self._rotate = rotate
        self._layers = layers
        window = cfg.frames * self.tokens_per_frame
        behind = cfg.history_tokens(grid) if cfg.remembers and cfg.entries == "dense" else 0
        shape = (layers, batch, window + behind, heads, head_dim)  # what attention reads: the window, then the history
        self._keys, self._values = (head_major(shape, device, dtype) for _ in range(2))
        sink_shape = (layers, batch, cfg.sinks * self.tokens_per_frame, heads, head_dim)
        self._raw_sinks = torch.zeros(sink_shape, device=device, dtype=dtype)
        self._history: History | None = None
        self._history_shown = True
        if cfg.remembers:
            self._history = History(
                cfg.history_tokens(grid),
                cfg.pattern,
                cfg.entries,
                relative=cfg.phase == "relative",
                layers=layers,
                batch=batch,
                heads=heads,
                head_dim=head_dim,
                grid=grid,
                rotate=rotate,
                pooling=pooling or Pooling(cfg.pool, grid, stretch=cfg.stretch),
                shown=self._behind_window(),
                device=device,
                dtype=dtype,
            )
        self.reset()

    def _behind_window(self) -> tuple[Tensor, Tensor]:
        """Where a dense history puts its turned keys and its values [layers, B, S, h, d]."""
        window = self.cfg.frames * self.tokens_per_frame
        return self._keys[:, :, window:], self._values[:, :, window:]

    def reset(self, start: int = 0) -> None:
        """Forget everything; the next chunk starts at frame `start`, and its first frames become the sinks."""
        self._slots: list[int] = []  # slot -> frame it holds, -1: free
        self._positions: dict[int, int] = {}  # frame -> time its keys are rotated to
        self._staged: list[int] = []  # slots of the chunk in flight
        self._origin = start
        self._start = start  # first staged frame of the chunk in flight
        self._next = start
        self._rewriting = False
        self._once: dict[str, dict[int, tuple[object, Any]]] = {}  # kind -> id -> an object and what was read of it
        self._poses: dict[int, Tensor] = {}  # frame of the window -> its pose numbers [B, D]
        self._sketches: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # frame -> its entries encoded again, coarsely
        if self._history is not None:
            self._history.clear(start)

    @property
    def frames(self) -> list[int]:
        """Frames remembered in full, oldest first."""
        return sorted(f for f in self._slots if f >= 0)

    @property
    def stored(self) -> list[Stored]:
        """All remembered frames, oldest first, and what is left of each."""
        old = [] if self._history is None else self._history.stored
        return [*old, *(Stored(f, 1, self.tokens_per_frame) for f in self.frames)]

    @property
    def tokens(self) -> int:
        """Tokens there is room for."""
        return self.cfg.tokens(self._grid)

    def factor(self, frame: int) -> int:
        """The factor a side of a frame once it has left the window."""
        return self.cfg.factor(frame - self._origin)

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
    def origin(self) -> int:
        """The frame that the first sink is, or will be: where the stream, or its newest scene, began."""
        return self._origin

    @property
    def next_frame(self) -> int:
        """The frame that the next chunk starts with."""
        return self._next

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
        if start != self._next:
            raise ValueError(f"memory expects a chunk that starts at frame {self._next}, got {start}")
        drop = POLICIES[self.cfg.policy]([f - self._origin for f in self.frames], frames, self.cfg)
        self._hand_over([self._origin + f for f in drop])
        for slot, frame in enumerate(self._slots):
            if frame >= 0 and frame - self._origin in drop:
                self._slots[slot] = -1
                del self._positions[frame]
        staged = min(frames, self.cfg.frames - len(self.frames))
        if staged < frames and not self._rewriting:
            raise ValueError(
                f"a chunk of {frames} frames and {len(self.frames)} remembered ones do not fit "
                f"memory.frames={self.cfg.frames}"
            )
        free = [s for s, f in enumerate(self._slots) if f < 0]
        free += range(len(self._slots), len(self._slots) + staged - len(free))
        self._staged, self._start = free[:staged], start + frames - staged
        self._rephase_sinks()
        if poses is not None and self._history is not None:
            self._poses.update({start + i: poses[:, i] for i in range(frames)})
        if self._history is not None:
            self._history.place(min([*self.frames, self._start]))
        return torch.arange(start, start + frames, dtype=torch.float64)

    def _hand_over(self, leaving: list[int]) -> None:
        """Move frames from the window to the history, un-rotated; ValueError if it is full and may not forget."""
        history = self._history
        if history is None or not leaving:
            return
        kept = set(leaving)
        if self.cfg.policy == "endless":
            kept = history.admit(leaving, self._poses)
        if history.used + sum(num_cells(self._grid, self.factor(f)) for f in kept) > history.capacity:
            raise ValueError(
                f"the history of {self.cfg.history} frames is full at frame {self._next} and memory.policy "
                f"{self.cfg.policy!r} forgets nothing here; raise memory.history or choose policy 'endless'"
            )
        for frame in leaving:
            sketch, pose = self._sketches.pop(frame, None), self._poses.pop(frame, None)
            if frame in kept:
                entries = sketch or {layer: self._unrotated(layer, frame) for layer in range(self._layers)}
                history.add(frame, entries, pose, pooled=sketch is not None)

    def _unrotated(self, layer: int, frame: int) -> tuple[Tensor, Tensor]:
        """Keys before rotation, and values [B, n, h, d] of a frame of the window."""
        slots = [self._slots.index(frame)]
        keys, values = (self._gather(buffer[layer], slots) for buffer in (self._keys, self._values))
        time = torch.tensor([self._positions[frame]], dtype=torch.float64)
        return self._rotate(keys, frame_positions(time, self._grid), True), values

    def sketch(self, frame: int, entries: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Keep what the network made of a frame's pooled latents until the frame leaves the window."""
        self._sketches[frame] = entries

    def stage(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, h, d] that the chunk's queries attend to: the remembered ones and its own.

        `raw` and `keys` [B, f n, h, d] are the chunk's keys before (None unless `wants_raw`) and after rotation. While
        autograd records, the result is a fresh tensor in which only the chunk's own part carries gradient; otherwise it
        is a view.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return self.recall().stage(layer, raw, keys, values)
        return joined(self.segments(layer, raw, keys, values), self._keys.dtype)

    def segments(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> list[Segment]:
        """As `stage`, in the runs that `ops.memory_attention.attend` reads without joining them."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return self.recall().segments(layer, raw, keys, values)
        self.write(layer, raw, keys, values)
        used = sorted(self._past_slots() + self._staged)
        tokens = self._history.used if self._history is not None and self.history_shown else 0
        if tokens and self.cfg.entries == "dense" and len(used) == self.cfg.frames:
            stop = self.cfg.frames * self.tokens_per_frame + tokens
            return [Segment(self._keys[layer, :, :stop], self._values[layer, :, :stop])]
        window = Segment(self._gather(self._keys[layer], used), self._gather(self._values[layer], used))
        return [self._history.segment(layer), window] if self._history is not None and tokens else [window]

    def _with_history(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._history is None or not self._history_shown or not self._history.stored:
            return keys, values
        return joined([self._history.segment(layer), Segment(keys, values)], keys.dtype)

    @property
    def wants_raw(self) -> bool:
        """Whether the chunk in flight holds sinks, whose keys are also kept as they were before rotation."""
        return self._start - self._origin < self.cfg.sinks

    def write(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> None:
        """Put the chunk's entries, cut from their graph, into the slots that `begin` found for them."""
        n = self.tokens_per_frame
        skip = keys.shape[1] - len(self._staged) * n
        for frame, slot, count in neighbours(self._staged):
            here, there = slice(skip + frame * n, skip + (frame + count) * n), slice(slot * n, (slot + count) * n)
            self._keys[layer, :, there] = keys[:, here].detach()
            self._values[layer, :, there] = values[:, here].detach()
        first = self._start - self._origin
        sinks = min(self.cfg.sinks, first + len(self._staged))
        if sinks > first:
            assert raw is not None
            own = raw[:, skip : skip + (sinks - first) * n]
            self._raw_sinks[layer, :, first * n : sinks * n] = own.detach()

    def recall(self) -> "AutogradView":
        """This memory as one pass under autograd sees it."""
        return AutogradView(self, len(self._staged) * self.tokens_per_frame)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of the remembered keys and values [B, S, h, d], without the chunk in flight."""
        slots = self._past_slots()
        keys, values = (self._gather(buffer[layer], slots).clone() for buffer in (self._keys, self._values))
        return self._with_history(layer, keys, values)

    def cached(self, kind: str, of: object, read: Callable[[], Any]) -> Any:
        """What `read` returns, kept for the newest CACHE_SIZES[kind] objects `of`; read anew where autograd records."""
        if torch.is_grad_enabled():
            return read()
        found = self._once.setdefault(kind, {})
        if id(of) not in found:
            while len(found) >= CACHE_SIZES[kind]:
                del found[next(iter(found))]
            found[id(of)] = of, read()
        return found[id(of)][1]

    def clear_cache(self) -> None:
        """Forget what was read once: the weights that read it have moved."""
        self._once = {}

    def commit(self) -> None:
        """Keep the chunk staged last."""
        for i, slot in enumerate(self._staged):
            frame = self._start + i
            if slot < len(self._slots):
                self._slots[slot] = frame
            else:
                self._slots.append(frame)
            self._positions[frame] = frame
        self._next = self._start + len(self._staged)
        self._staged, self._rewriting = [], False

    def rewind(self, frame: int, *, keep_sinks: bool = False) -> None:
        """Forget `frame` and all after it, so that they can be written again (a prompt switch re-encodes them).

        `keep_sinks`: sinks stay as they are even if they lie after `frame`; the next chunk may then be too long for the
        room beside them.
        """

        def stays(f: int) -> bool:
            return f < frame or (keep_sinks and f - self._origin < self.cfg.sinks)

        self._slots = [f if stays(f) else -1 for f in self._slots]
        self._positions = {f: t for f, t in self._positions.items() if stays(f)}
        self._sketches = {f: entries for f, entries in self._sketches.items() if f < frame}
        if self._history is not None:
            self._history.forget(frame)
        self._staged, self._next, self._rewriting = [], min(self._next, frame), keep_sinks

    def advance(self, frames: int) -> None:
        """Let `frames` pass unseen between two chunks: the window moves on as it is, sinks and history stay.

        The stream then stands where a longer one would. ValueError unless frames keep their compression factors.
        """
        if self.cfg.remembers and frames % len(self.cfg.pattern):
            raise ValueError(f"advance by a multiple of {len(self.cfg.pattern)} (memory.pattern), got {frames}")
        assert not self._staged
        ahead = {f: f + frames for f in self.frames if f - self._origin >= self.cfg.sinks}
        shift = torch.zeros(self.tokens_per_frame, 3, dtype=torch.float64)
        shift[:, 0] = frames
        n = self.tokens_per_frame
        for slot, frame in enumerate(self._slots):
            if frame in ahead:
                for keys in self._keys[:, :, slot * n : (slot + 1) * n]:
                    keys.copy_(self._rotate(keys, shift, False))
        self._slots = [ahead.get(f, f) for f in self._slots]
        self._positions = {ahead.get(f, f): t + (frames if f in ahead else 0) for f, t in self._positions.items()}
        self._poses = {ahead.get(f, f): pose for f, pose in self._poses.items()}
        self._sketches = {ahead.get(f, f): entries for f, entries in self._sketches.items()}
        self._next += frames

    def fork(self) -> "KVMemory":
        """An independent copy."""
        twin = object.__new__(KVMemory)
        twin.__dict__.update(self.__dict__)
        twin._keys, twin._values, twin._raw_sinks = self._keys.clone(), self._values.clone(), self._raw_sinks.clone()
        twin._slots, twin._positions, twin._staged = list(self._slots), dict(self._positions), list(self._staged)
        twin._poses, twin._sketches, twin._once = dict(self._poses), dict(self._sketches), {}
        twin._history = None if self._history is None else self._history.fork(twin._behind_window())
        return twin

    def entries(self, layer: int, *, unrotated: bool = False) -> tuple[Tensor, Tensor, list[int]]:
        """Copies of the remembered keys and values [B, S, h, d] in the order of their frames, and those frames.

        `unrotated` turns the keys back to what they were before rotary embedding.
        """
        order = self.frames
        slots = [self._slots.index(f) for f in order]
        keys = self._gather(self._keys[layer], slots).clone()
        if unrotated and order:
            times = torch.tensor([self._positions[f] for f in order], dtype=torch.float64)
            keys = self._rotate(keys, frame_positions(times, self._grid), True)
        return keys, self._gather(self._values[layer], slots).clone(), order

    def _past_slots(self) -> list[int]:
        return [s for s, f in enumerate(self._slots) if f >= 0]

    def _gather(self, buffer: Tensor, slots: list[int]) -> Tensor:
        """Frames `slots` (ascending or not) of `buffer` [B, S, h, d]: a view where they are the first ones."""
        n = self.tokens_per_frame
        if slots == list(range(len(slots))):
            return buffer[:, : len(slots) * n]
        return torch.cat([buffer[:, s * n : (s + 1) * n] for s in slots], dim=1) if slots else buffer[:, :0]

    def _rephase_sinks(self) -> None:
        """Turn the sinks' keys so that they sit right before the oldest frame of the window."""
        kept, start = [f - self._origin for f in self.frames], self._start - self._origin
        for sink, time in sink_times(kept, start, self.cfg).items():
            if self._positions[self._origin + sink] != self._origin + time:
                self._write_sink(self._origin + sink, self._origin + time)

    def _write_sink(self, frame: int, time: int) -> None:
        n, slot, sink = self.tokens_per_frame, self._slots.index(frame), frame - self._origin
        positions = frame_positions(torch.tensor([time], dtype=torch.float64), self._grid)
        for layer in range(self._layers):
            raw = self._raw_sinks[layer, :, sink * n : (sink + 1) * n]
            self._keys[layer, :, slot * n : (slot + 1) * n] = self._rotate(raw, positions, False)
        self._positions[frame] = time
