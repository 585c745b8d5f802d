"""KV memory: what a student remembers of finished frames, what it costs, what stays. No attention maths."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidistill.memory.history import ENTRIES, RELIC_PATTERN, ClipHistory, History, Rotate, Sketch, Stored
from vidistill.memory.pooling import POOLS, Pooling, frame_positions, num_cells
from vidistill.ops.quant import entry_bytes

__all__ = [
    "RELIC_PATTERN",
    "ClipHistory",
    "KVMemory",
    "MemoryConfig",
    "Pooling",
    "Recall",
    "Rotate",
    "Sketch",
    "Stored",
    "frame_positions",
    "stream_memory",
]

log = logging.getLogger("vidistill")


def keep_all(kept: Sequence[int], incoming: int, cfg: "MemoryConfig") -> list[int]:
    """Frames to drop so that `incoming` frames fit: none; a full memory is an error of the user.

    Frames are counted from the first one since the last reset.
    """
    if len(kept) + incoming > cfg.frames:
        raise ValueError(
            f"memory holds {len(kept)} frames and cannot take {incoming} more: memory.frames is {cfg.frames} and "
            "memory.policy 'full' never forgets; raise memory.frames or choose policy 'window'"
        )
    return []


def keep_window(kept: Sequence[int], incoming: int, cfg: "MemoryConfig") -> list[int]:
    """Frames to drop: the oldest that are not among the first `sinks` frames. Source: StreamingLLM 2309.17453."""
    excess = max(0, len(kept) + incoming - cfg.frames)
    return sorted(f for f in kept if f >= cfg.sinks)[:excess]


POLICIES = {"full": keep_all, "window": keep_window, "compressed": keep_window, "endless": keep_window}
REMEMBERING = ("compressed", "endless")  # policies under which frames that leave the window become history
PHASES = ("relative", "absolute")


@dataclass(frozen=True)
class MemoryConfig:
    """Layout x policy of a memory.

    `frames`: latent frames a chunk can look at in full, itself included. `sinks`: first frames that never leave.
    `phase`: `relative` places what is older than the window right before it in time, so that a stream has no maximum
    length; `absolute` keeps the phase it was written with (published students need it).

    Policies: `full` never forgets and has an end; `window` keeps the newest frames and the sinks; `compressed` keeps
    what has left the window as well, pooled by `pattern` (tokens a side that become one, frame after frame), up to
    `history` frames; `endless` holds as many tokens, and lets frames go that others were seen from nearly the same
    pose as. `pool`: `average` of keys before rotation and of values; `rescaled`, with keys as long as before;
    `learned` weights; `reencode`: the network sees the pooled latents themselves. `entries` of the history: `dense`,
    `int8` or `fp8`. Source: RELIC 2512.04040, section on compressed memory; factors count a side (DECISIONS).
    """

    policy: str = "full"
    frames: int = 22
    sinks: int = 0
    phase: str = "relative"
    history: int = 0
    pattern: tuple[int, ...] = RELIC_PATTERN
    pool: str = "average"
    entries: str = "dense"

    def __post_init__(self) -> None:
        known = {"policy": POLICIES, "phase": PHASES, "pool": POOLS, "entries": ENTRIES}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"memory.{name} {value!r} is unknown; choose one of {sorted(choices)}")
        if self.frames < 1 or not 0 <= self.sinks < self.frames:
            raise ValueError(f"memory needs frames >= 1 and 0 <= sinks < frames, got {self.frames} and {self.sinks}")
        if self.remembers != (self.history > 0) or (self.remembers and self.sinks):
            raise ValueError(
                f"memory.history {self.history} and sinks {self.sinks} do not fit policy {self.policy!r}: "
                f"{' and '.join(REMEMBERING)} need history >= 1 and no sinks, the others no history"
            )
        if not self.pattern or min(self.pattern) < 1:
            raise ValueError(f"memory.pattern holds factors of at least 1, got {list(self.pattern)}")

    @property
    def remembers(self) -> bool:
        """Whether frames that leave the window are kept in compressed form."""
        return self.policy in REMEMBERING

    def factor(self, index: int) -> int:
        """The factor a side of the frame with this number since the last reset, once it has left the window."""
        return self.pattern[index % len(self.pattern)]

    def history_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of the first `history` frames in compressed form: what the history has room for."""
        return sum(num_cells(grid, self.factor(i)) for i in range(self.history))

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens a chunk can look at, itself included."""
        return self.frames * grid[0] * grid[1] + self.history_tokens(grid)

    def bytes(
        self,
        *,
        layers: int,
        width: int,
        tokens_per_frame: int,
        batch: int = 1,
        itemsize: int = 4,
        grid: tuple[int, int] | None = None,
        heads: int = 1,
    ) -> int:
        """Bytes of all buffers, known before anything is allocated; a history needs `grid`, 8-bit entries `heads`."""
        entries = 2 * self.frames + self.sinks  # keys and values, and the un-rotated keys of the sinks
        window = batch * layers * entries * tokens_per_frame * width * itemsize
        if not self.remembers:
            return window
        if grid is None:
            raise ValueError(
                "the bytes of a compressed history depend on the grid of tokens: pass grid=(rows, columns)"
            )
        token = width * itemsize if self.entries == "dense" else entry_bytes(heads, width // heads)
        return window + 2 * batch * layers * self.history_tokens(grid) * token

    def account(self, grid: tuple[int, int], *, layers: int, width: int, heads: int, itemsize: int = 4) -> dict:
        """Tokens and bytes of one stream, beside those of the same reach without compression."""
        n = grid[0] * grid[1]
        size = {"layers": layers, "width": width, "tokens_per_frame": n, "itemsize": itemsize}
        plain = (self.frames + self.history) * n
        return {
            "policy": self.policy,
            "frames": self.frames + self.history,
            "tokens": self.tokens(grid),
            "bytes": self.bytes(**size, grid=grid, heads=heads),
            "uncompressed_tokens": plain,
            "uncompressed_bytes": 2 * layers * plain * width * itemsize,
            "token_share": round(self.tokens(grid) / plain, 4),
        }


def stream_memory(cfg: MemoryConfig, chunk: int) -> MemoryConfig:
    """The memory of a stream without end: a `full` one becomes a window of the same size, a `compressed` one `endless`
    with the same tokens; says so once."""
    if cfg.frames < cfg.sinks + chunk:
        raise ValueError(f"memory.frames {cfg.frames} cannot hold {cfg.sinks} sinks and a chunk of {chunk} frames")
    if cfg.policy == "compressed":
        return replace(cfg, policy="endless")
    if cfg.policy != "full":
        return cfg
    log.info("memory.policy 'full' has an end, a stream has none: it keeps a window of %d frames", cfg.frames)
    return replace(cfg, policy="window")


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
        shape = (layers, batch, cfg.frames * self.tokens_per_frame, heads, head_dim)
        self._keys = torch.zeros(shape, device=device, dtype=dtype)
        self._values = torch.zeros(shape, device=device, dtype=dtype)
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
                pooling=pooling or Pooling(cfg.pool, grid),
                device=device,
                dtype=dtype,
            )
        self.reset()

    def reset(self, start: int = 0) -> None:
        """Forget everything; the next chunk starts at frame `start`, and its first frames become the sinks."""
        self._slots: list[int] = []  # slot -> frame it holds, -1: free
        self._positions: dict[int, int] = {}  # frame -> time its keys are rotated to
        self._staged: list[int] = []  # slots of the chunk in flight
        self._origin = start
        self._start = start  # first staged frame of the chunk in flight
        self._next = start
        self._rewriting = False
        self._prompt: tuple[object, Any] | None = None  # a prompt and what was read of it
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

    def stage(self, layer: int, raw: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, h, d] that the chunk's queries attend to: the remembered ones and its own.

        `raw` and `keys` [B, f n, h, d] are the chunk's keys before and after rotation. While autograd records, the
        result is a fresh tensor in which only the chunk's own part carries gradient; otherwise it is a view.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return self.recall().stage(layer, raw, keys, values)
        self.write(layer, raw, keys, values)
        used = sorted(self._past_slots() + self._staged)
        return self._with_history(layer, self._gather(self._keys[layer], used), self._gather(self._values[layer], used))

    def _with_history(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self._history is None or not self._history_shown or not self._history.stored:
            return keys, values
        old_keys, old_values = self._history.read(layer)
        return torch.cat((old_keys, keys), dim=1), torch.cat((old_values, values), dim=1)

    def write(self, layer: int, raw: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put the chunk's entries, cut from their graph, into the slots that `begin` found for them."""
        n = self.tokens_per_frame
        skip = raw.shape[1] - len(self._staged) * n
        for i, slot in enumerate(self._staged):
            here, there = slice(skip + i * n, skip + (i + 1) * n), slice(slot * n, (slot + 1) * n)
            self._keys[layer, :, there] = keys[:, here].detach()
            self._values[layer, :, there] = values[:, here].detach()
            sink = self._start + i - self._origin
            if sink < self.cfg.sinks:
                self._raw_sinks[layer, :, sink * n : (sink + 1) * n] = raw[:, here].detach()

    def recall(self) -> "Recall":
        """This memory as one pass under autograd sees it."""
        return Recall(self, len(self._staged) * self.tokens_per_frame)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of the remembered keys and values [B, S, h, d], without the chunk in flight."""
        slots = self._past_slots()
        keys, values = (self._gather(buffer[layer], slots).clone() for buffer in (self._keys, self._values))
        return self._with_history(layer, keys, values)

    def read_once(self, prompt: object, read: Callable[[], Any]) -> Any:
        """What `read` returns, kept until `prompt` is another object; read anew wherever autograd records."""
        if torch.is_grad_enabled():
            return read()
        if self._prompt is None or self._prompt[0] is not prompt:
            self._prompt = prompt, read()
        return self._prompt[1]

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
        if self._history is not None:
            self._history.forget(frame)
        self._staged, self._next, self._rewriting = [], min(self._next, frame), keep_sinks

    def fork(self) -> "KVMemory":
        """An independent copy."""
        twin = object.__new__(KVMemory)
        twin.__dict__.update(self.__dict__)
        twin._keys, twin._values, twin._raw_sinks = self._keys.clone(), self._values.clone(), self._raw_sinks.clone()
        twin._slots, twin._positions, twin._staged = list(self._slots), dict(self._positions), list(self._staged)
        twin._poses, twin._sketches = dict(self._poses), dict(self._sketches)
        twin._history = None if self._history is None else self._history.fork()
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
        if self.cfg.phase == "absolute" or not self.cfg.sinks:
            return
        border = self._origin + self.cfg.sinks
        sinks = [f for f in self.frames if f < border]
        rest = [f for f in self.frames if f >= border]
        first = rest[0] if rest else self._start
        for i, frame in enumerate(sinks):
            time = first - len(sinks) + i
            if self._positions[frame] != time:
                self._write_sink(frame, time)

    def _write_sink(self, frame: int, time: int) -> None:
        n, slot, sink = self.tokens_per_frame, self._slots.index(frame), frame - self._origin
        positions = frame_positions(torch.tensor([time], dtype=torch.float64), self._grid)
        for layer in range(self._layers):
            raw = self._raw_sinks[layer, :, sink * n : (sink + 1) * n]
            self._keys[layer, :, slot * n : (slot + 1) * n] = self._rotate(raw, positions, False)
        self._positions[frame] = time


class Recall:
    """A memory as one pass under autograd sees it: read once, written once, so that the backward pass may run a block
    again (activation checkpointing) and finds the history of the first time."""

    def __init__(self, memory: KVMemory, own_tokens: int) -> None:
        self._memory, self._own = memory, own_tokens
        self._past: dict[int, tuple[Tensor, Tensor]] = {}

    def stage(self, layer: int, raw: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `KVMemory.stage`; only the chunk's own part carries gradient."""
        if layer not in self._past:
            self._past[layer] = self._memory.past(layer)
            self._memory.write(layer, raw, keys, values)
        past_keys, past_values = self._past[layer]
        own = slice(keys.shape[1] - self._own, None)
        return torch.cat((past_keys, keys[:, own]), dim=1), torch.cat((past_values, values[:, own]), dim=1)
