"""CausalStudent: a VideoDiT that generates chunk by chunk. No loop here, see rollout.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidistill.conditioning.condition import Condition, concat
from vidistill.diffusion import LatentShape
from vidistill.memory.cache import KVMemory
from vidistill.memory.history import Again, ClipHistory, EntryRecorder
from vidistill.memory.policies import MemoryConfig, kept_before, sink_times
from vidistill.memory.pooling import Pooling
from vidistill.memory.spec import CacheSpec
from vidistill.models.dit import VideoDiT
from vidistill.ops.masks import FrameMask


@dataclass(frozen=True)
class StudentConfig:
    """Chunking and memory of a student; `first_chunk` is the length of chunk 0 (0: as all others)."""

    chunk: int = 3
    first_chunk: int = 0
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.first_chunk < 0:
            raise ValueError(
                f"student.chunk must be at least 1 and first_chunk at least 0, got {self.chunk}, {self.first_chunk}"
            )
        self.memory.check_chunks(self.chunk, self.first_chunk)


class CausalStudent(nn.Module):
    """A network, its chunks and the memory it generates with."""

    def __init__(self, net: VideoDiT, cfg: StudentConfig, shape: LatentShape) -> None:
        super().__init__()
        self.net, self.cfg, self.shape = net, cfg, shape

    def for_inference(self, *how: Any) -> "CausalStudent":
        """A student of the same weights that only runs; its network is what `VideoDiT.for_inference` returns."""
        net = self.net.for_inference(self.cfg.chunk * self.shape.tokens_per_frame, *how)
        return CausalStudent(net, self.cfg, self.shape).eval()

    def first_frame(self, chunk: int) -> int:
        """First latent frame of a chunk: the only place that knows a shorter first chunk."""
        return 0 if chunk == 0 else (self.cfg.first_chunk or self.cfg.chunk) + (chunk - 1) * self.cfg.chunk

    def num_chunks(self, frames: int) -> int:
        """Chunks in a clip of `frames` latent frames; raises ValueError if it does not end with a chunk."""
        chunk = 0
        while self.first_frame(chunk) < frames:
            chunk += 1
        if self.first_frame(chunk) != frames:
            raise ValueError(
                f"{frames} latent frames are not whole chunks; the nearest lengths are "
                f"{self.first_frame(chunk - 1)} and {self.first_frame(chunk)}"
            )
        return chunk

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        *,
        start: int = 0,
        memory: KVMemory | None = None,
        output: bool = True,
    ) -> Tensor:
        """Velocity of frames that start at latent frame `start`, given what `memory` holds.

        Without `output` memory is written and the velocity is zero, which costs less.
        """
        return self.net(x, sigma, cond, start=start, memory=memory, output=output)

    def new_memory(self, batch: int, *, dtype: torch.dtype | None = None, cfg: MemoryConfig | None = None) -> KVMemory:
        """An empty memory for `batch` streams; its entries are of `dtype`, None: that of the weights."""
        dit, cfg = self.net.cfg, cfg or self.cfg.memory
        size = (dit.layers, batch, self.net.own_heads, dit.head_dim, self.shape.grid)
        made = self.net.new_rotation(), self.pooling(cfg), self.net.device, dtype or self.net.dtype
        return KVMemory(cfg, CacheSpec(*size, *made))

    def pooling(self, cfg: MemoryConfig) -> Pooling:
        """What compresses frames for a memory of this student."""
        return Pooling(cfg.pool, self.shape.grid, self.net.pool_scores, cfg.stretch)

    @torch.no_grad()
    def commit(self, memory: KVMemory, x: Tensor, cond: Condition, *, start: int) -> None:
        """Keep the chunk staged last; `x` [B, f, C, H, W] are its finished latents, from frame `start` on.

        Where memory wants frames encoded again at the resolution it keeps them at, each is pooled and seen alone.
        """
        memory.commit()
        if not (memory.cfg.remembers and memory.cfg.pool == "reencode"):
            return
        for i in range(x.shape[1]):
            factor = memory.factor(start + i)
            if factor == 1:
                continue
            if any(side % (factor * p) for side, p in zip(x.shape[-2:], self.net.cfg.patch[1:], strict=True)):
                raise ValueError(
                    f"memory.pool 'reencode' needs latents whose sides {tuple(x.shape[-2:])} are multiples of factor "
                    f"{factor} times the patch {self.net.cfg.patch[1:]}; choose another pool or pattern"
                )
            small = F.avg_pool2d(x[:, i], factor)[:, None]
            timestep, sketch = torch.zeros(x.shape[0], 1, device=x.device), EntryRecorder()
            part = cond.frames(i, i + 1)
            self.net(small, timestep, part, start=start + i, memory=sketch, factor=factor, output=False)
            memory.sketch(start + i, sketch.entries)

    def lengths(self, frames: int) -> tuple[int, ...]:
        """Latent frames of each chunk of a clip; raises ValueError if it does not end with a chunk."""
        return tuple(self.first_frame(c + 1) - self.first_frame(c) for c in range(self.num_chunks(frames)))

    def chunk_of_frames(self, frames: int) -> Tensor:
        """Chunk index [F] of every latent frame."""
        lengths = self.lengths(frames)
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def causal_mask(self, frames: int) -> Tensor:
        """Block-causal frame mask [F, F] with the reach of this student's memory, whatever its policy.

        Source: Self Forcing 2506.08009, section 3; CausVid 2412.07772.
        """
        seen = torch.zeros(frames, frames, dtype=torch.bool)
        for own, kept in kept_before(self.cfg.memory, self.lengths(frames)):
            seen[own.start : own.stop, [*kept, *own]] = True
        return seen

    def sink_shift(self, frames: int) -> Tensor:
        """How many frames later than written [F] the sinks lie that a frame sees."""
        shift = torch.zeros(frames, dtype=torch.long)
        for own, kept in kept_before(self.cfg.memory, self.lengths(frames)):
            times = sink_times(kept, own.start, self.cfg.memory)
            shift[own.start : own.stop] = next((time - sink for sink, time in times.items()), 0)
        return shift

    def older(self, frames: int) -> Tensor:
        """Frame mask [F, F] of what a chunk sees in compressed form: frames before it that have left its window."""
        chunk = self.chunk_of_frames(frames)
        return (chunk[None] < chunk[:, None]) & ~self.causal_mask(frames)

    def teacher_forcing_mask(self, frames: int) -> Tensor:
        """Frame mask [2 F, 2 F] of a clean clip and then a noisy one, whose chunks see clean history and themselves."""
        chunk = self.chunk_of_frames(frames)
        clean = self.causal_mask(frames)
        own = chunk[None] == chunk[:, None]
        top = torch.cat((clean, torch.zeros_like(clean)), dim=1)
        return torch.cat((top, torch.cat((clean & ~own, own), dim=1)), dim=0)

    def masked(
        self, x: Tensor, sigma: Tensor, cond: Condition, *, times: Tensor, seen: Tensor, older: Tensor
    ) -> Tensor:
        """Velocity [B, N, C, H, W] of `N` frames at `times`, each seeing those of `seen` [N, N] in full.

        Where the memory compresses, it also sees those of `older` [N, F], the first F of the frames, in compressed
        form, and where sinks move with the window it sees them there, as it will when streaming.
        Source: RELIC 2512.04040, hybrid forcing.
        """
        memory = self.cfg.memory
        if memory.remembers:
            again = self.compressed(older, times)
        else:
            seen, again = self.moved_sinks(seen, self.sink_shift(older.shape[1])[times])
        if not again:
            return self.net(x, sigma, cond, start=times.to(x.device), causal=seen.to(x.device))
        pooling = self.pooling(memory) if memory.remembers else Pooling("average", self.shape.grid)
        clip = ClipHistory(times.to(x.device), again, pooling, self.net.new_rotation())
        columns = torch.cat((seen, *(part.seen for part in again)), dim=1).to(x.device)
        widths = [self.shape.tokens_per_frame] * len(times) + clip.widths
        return self.net(x, sigma, cond, memory=clip, causal=FrameMask(columns, widths[0], tuple(widths)))

    def compressed(self, older: Tensor, times: Tensor) -> list[Again]:
        """The frames that anybody sees in compressed form, those of one factor together."""
        by_factor: dict[int, list[int]] = {}
        for f in range(int(older.any(0).nonzero().max()) + 1 if bool(older.any()) else 0):
            by_factor.setdefault(self.cfg.memory.factor(f), []).append(f)
        return [Again(fs, times[fs], older[:, fs], factor) for factor, fs in sorted(by_factor.items())]

    def moved_sinks(self, seen: Tensor, shift: Tensor) -> tuple[Tensor, list[Again]]:
        """`seen` without the sinks that a frame finds `shift` [N] frames later, and these at each of those places."""
        sinks = torch.arange(self.cfg.memory.sinks)
        again = [
            Again(sinks.tolist(), sinks + by, seen[:, sinks] & (shift == by)[:, None])
            for by in shift.unique().tolist()
            if by
        ]
        still = seen.clone()
        still[shift > 0, : len(sinks)] = False
        return still, again

    def block_causal(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Velocity of a clip [B, F, C, H, W] whose chunks see the chunks before them as far as the memory reaches."""
        f = x.shape[1]
        return self.masked(x, sigma, cond, times=torch.arange(f), seen=self.causal_mask(f), older=self.older(f))

    def teacher_forced(
        self, x: Tensor, sigma: Tensor, cond: Condition, clean: Tensor, clean_sigma: Tensor, first: int = 0
    ) -> Tensor:
        """Velocity of a noisy clip whose chunks see the `clean` clip's earlier chunks instead of their own.

        Both clips are [B, F, C, H, W] at levels [B, F]; `clean` may be noised a little, `clean_sigma` says how much.
        `first`: only frames from this one on (the start of a chunk) are computed, the velocity of the others is zero.
        """
        frames = x.shape[1]
        rows = torch.cat((torch.arange(frames), torch.arange(frames + first, 2 * frames)))
        seen = self.teacher_forcing_mask(frames)[rows][:, rows]
        v = self.masked(
            torch.cat((clean, x[:, first:]), dim=1),
            torch.cat((clean_sigma, sigma[:, first:]), dim=1),
            concat([cond, cond.frames(first, frames)], dim=1),
            times=rows % frames,
            seen=seen,
            older=self.older(frames)[rows % frames],
        )
        return torch.cat((torch.zeros_like(x[:, :first]), v[:, frames:]), dim=1)


def core(net: Any) -> Any:
    """The transformer inside a student, or `net` itself."""
    return net.net if isinstance(net, CausalStudent) else net
