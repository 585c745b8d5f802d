"""What a memory keeps, in which form, and what that costs before anything is allocated."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from vidistill.memory.pooling import POOLS, num_cells
from vidistill.ops.quant import entry_bytes

log = logging.getLogger("vidistill")
RELIC_PATTERN = (1, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4, 4, 4, 2, 4, 4, 2, 4)
ENTRIES = {"dense": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


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


def sink_times(kept: Sequence[int], start: int, cfg: "MemoryConfig") -> dict[int, int]:
    """Times of the remembered sinks when a chunk starts at frame `start`: right before the window they lead.

    Frames are counted from the first one since the last reset; `kept` are those in memory, in order. Empty where sinks
    stay at the time they were written at.
    """
    if cfg.phase == "absolute":
        return {}
    sinks, rest = [f for f in kept if f < cfg.sinks], [f for f in kept if f >= cfg.sinks]
    first = rest[0] if rest else start
    return {f: first - len(sinks) + i for i, f in enumerate(sinks)}


@cache
def kept_before(cfg: "MemoryConfig", lengths: tuple[int, ...]) -> tuple[tuple[range, tuple[int, ...]], ...]:
    """Frames of each chunk of a clip, and the earlier ones that its memory holds in full when the chunk starts.

    `lengths` are those of the chunks. Masks of every training pass ask for it, of few lengths in a run.
    """
    kept, start, found = tuple[int, ...](), 0, []
    for length in lengths:
        dropped = POLICIES[cfg.policy](kept, length, cfg)
        kept, own = tuple(f for f in kept if f not in dropped), range(start, start + length)
        found.append((own, kept))
        kept, start = (*kept, *own), start + length
    return tuple(found)


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
    `learned` weights; `reencode`: the network sees the pooled latents themselves. `stretch`: keys of the history are so
    many times as long, so that what is far back is looked at as sharply as what is near. `entries` of the history:
    `dense`, `int8` or `fp8`. Source: RELIC 2512.04040, section on compressed memory; factors count a side (D8).
    """

    policy: str = "full"
    frames: int = 22
    sinks: int = 0
    phase: str = "relative"
    history: int = 0
    pattern: tuple[int, ...] = RELIC_PATTERN
    pool: str = "average"
    stretch: float = 1.0
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
        if not 0 < self.stretch < math.inf:
            raise ValueError(
                f"memory.stretch is the length of keys, 1 as they are: it must be above 0, got {self.stretch}"
            )
        if not self.pattern or min(self.pattern) < 1:
            raise ValueError(f"memory.pattern holds factors of at least 1, got {list(self.pattern)}")

    @property
    def remembers(self) -> bool:
        """Whether frames that leave the window are kept in compressed form."""
        return self.policy in REMEMBERING

    @property
    def reach(self) -> float:
        """Latent frames of the longest stream it takes: `full` and `compressed` memories never forget."""
        return {"full": self.frames, "compressed": self.frames + self.history}.get(self.policy, math.inf)

    def check_chunks(self, chunk: int, first_chunk: int = 0) -> None:
        """Raise ValueError unless there is room for a chunk of so many frames beside the sinks."""
        sinks = 0 if self.policy == "full" else self.sinks  # where nothing leaves, nothing has to stay
        if self.frames < sinks + chunk:
            raise ValueError(f"memory.frames {self.frames} cannot hold {sinks} sinks and a chunk of {chunk} frames")
        if self.frames < first_chunk:
            raise ValueError(f"memory.frames {self.frames} cannot hold a first chunk of {first_chunk} frames")

    def chunks_to_fill(self, chunk: int) -> int:
        """Chunks of `chunk` frames until memory has begun to forget; a pass costs the same from then on."""
        return -(-(self.frames + self.history) // chunk) + 1

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
        # dense entries: keys un-rotated and turned, values; 8-bit ones are turned whenever they are read
        token = 3 * width * itemsize if self.entries == "dense" else 2 * entry_bytes(heads, width // heads)
        return window + batch * layers * self.history_tokens(grid) * token

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
    cfg.check_chunks(chunk)
    if cfg.policy == "compressed":
        return replace(cfg, policy="endless")
    if cfg.policy != "full":
        return cfg
    say_that_full_ends(cfg.frames)
    return replace(cfg, policy="window")


@cache
def say_that_full_ends(frames: int) -> None:
    log.debug("memory.policy 'full' has an end, a stream has none: it keeps a window of %d frames", frames)
