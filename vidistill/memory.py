"""KV memory: what a student remembers of finished frames, what it costs, what stays. No attention maths."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("vidistill")

Rotate = Callable[[Tensor, Tensor, bool], Tensor]  # keys [B, S, h, d], positions [S, 3], inverse -> keys


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


POLICIES = {"full": keep_all, "window": keep_window}
PHASES = ("relative", "absolute")


@dataclass(frozen=True)
class MemoryConfig:
    """Layout x policy of a memory.

    `frames`: latent frames a chunk can look at, itself included. `sinks`: first frames that never leave. `phase`:
    `relative` places the sinks right before the window in time, so that a stream has no maximum length; `absolute`
    keeps the phase they were written with (published students need it).
    """

    policy: str = "full"
    frames: int = 22
    sinks: int = 0
    phase: str = "relative"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"memory.policy {self.policy!r} is unknown; choose one of {sorted(POLICIES)}")
        if self.phase not in PHASES:
            raise ValueError(f"memory.phase {self.phase!r} is unknown; choose one of {PHASES}")
        if self.frames < 1 or not 0 <= self.sinks < self.frames:
            raise ValueError(f"memory needs frames >= 1 and 0 <= sinks < frames, got {self.frames} and {self.sinks}")

    def bytes(self, *, layers: int, width: int, tokens_per_frame: int, batch: int = 1, itemsize: int = 4) -> int:
        """Bytes of all buffers, known before anything is allocated."""
        entries = 2 * self.frames + self.sinks  # keys and values, and the un-rotated keys of the sinks
        return batch * layers * entries * tokens_per_frame * width * itemsize


def stream_memory(cfg: MemoryConfig, chunk: int) -> MemoryConfig:
    """The memory of a stream without end: a `full` one becomes a window of the same size; says so once."""
    if cfg.frames < cfg.sinks + chunk:
        raise ValueError(f"memory.frames {cfg.frames} cannot hold {cfg.sinks} sinks and a chunk of {chunk} frames")
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
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
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

    @property
    def frames(self) -> list[int]:
        """Remembered frames, oldest first."""
        return sorted(f for f in self._slots if f >= 0)

    @property
    def next_frame(self) -> int:
        """The frame that the next chunk starts with."""
        return self._next

    @property
    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values, self._raw_sinks))

    def begin(self, start: int, frames: int) -> Tensor:
        """Make room for a chunk; returns the times [frames] (float64) its queries and keys are rotated to.

        A chunk must fit beside the sinks, except right after `rewind(keep_sinks=True)`: then its first frames only look
        and leave no trace.
        """
        if start != self._next:
            raise ValueError(f"memory expects a chunk that starts at frame {self._next}, got {start}")
        drop = POLICIES[self.cfg.policy]([f - self._origin for f in self.frames], frames, self.cfg)
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
        return torch.arange(start, start + frames, dtype=torch.float64)

    def stage(self, layer: int, raw: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, h, d] that the chunk's queries attend to: the remembered ones and its own.

        `raw` and `keys` [B, f n, h, d] are the chunk's keys before and after rotation. While autograd records, the
        result is a fresh tensor in which only the chunk's own part carries gradient; otherwise it is a view.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            return self.recall().stage(layer, raw, keys, values)
        self.write(layer, raw, keys, values)
        used = sorted(self._past_slots() + self._staged)
        return self._gather(self._keys[layer], used), self._gather(self._values[layer], used)

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
        return self._gather(self._keys[layer], slots).clone(), self._gather(self._values[layer], slots).clone()

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
        self._staged, self._next, self._rewriting = [], min(self._next, frame), keep_sinks

    def fork(self) -> "KVMemory":
        """An independent copy."""
        twin = object.__new__(KVMemory)
        twin.__dict__.update(self.__dict__)
        twin._keys, twin._values, twin._raw_sinks = self._keys.clone(), self._values.clone(), self._raw_sinks.clone()
        twin._slots, twin._positions, twin._staged = list(self._slots), dict(self._positions), list(self._staged)
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


def frame_positions(times: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions [F n, 3] (time, row, column) of all tokens of frames at `times` [F]."""
    rows, columns = grid
    t, r, c = torch.meshgrid(
        times.double(),
        torch.arange(rows, dtype=torch.float64, device=times.device),
        torch.arange(columns, dtype=torch.float64, device=times.device),
        indexing="ij",
    )
    return torch.stack((t, r, c), dim=-1).reshape(-1, 3)
