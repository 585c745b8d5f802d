"""CausalStudent: a VideoDiT that generates chunk by chunk. No loop here, see rollout.py."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidistill.conditioning import Condition, concat
from vidistill.dit import DiTConfig, VideoDiT
from vidistill.memory import ClipHistory, KVMemory, MemoryConfig, Pooling, Sketch
from vidistill.ops.masks import FrameMask
from vidistill.shapes import LatentShape


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

    def faster(self, *how: Any) -> "CausalStudent":
        """A student of the same weights that only runs, its network as `VideoDiT.faster` makes it for a chunk."""
        net = self.net.faster(self.cfg.chunk * self.shape.tokens_per_frame, *how)
        return CausalStudent(net, self.cfg, self.shape).eval()

    @property
    def dit_config(self) -> DiTConfig:
        return self.net.cfg

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
        return KVMemory(
            cfg,
            layers=dit.layers,
            batch=batch,
            heads=dit.heads,
            head_dim=dit.head_dim,
            grid=self.shape.grid,
            rotate=self.net.new_rotation(),
            pooling=self.pooling(cfg),
            device=self.net.device,
            dtype=dtype or self.net.dtype,
        )

    def pooling(self, cfg: MemoryConfig) -> Pooling:
        """What compresses frames for a memory of this student."""
        return Pooling(cfg.pool, self.shape.grid, self.net.pool_scores, cfg.stretch)

    @torch.no_grad()
    def remember(self, x: Tensor, cond: Condition, memory: KVMemory, *, start: int) -> None:
        """Where a memory wants frames encoded again at the resolution it keeps them at, do that for finished latents.

        `x` [B, f, C, H, W] from frame `start` on; each frame is pooled and seen alone. Does nothing for other pools.
        """
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
            told, sketch = torch.zeros(x.shape[0], 1, device=x.device), Sketch()
            part = cond.frames(i, i + 1)
            self.net(small, told, part, start=start + i, memory=sketch, factor=factor, output=False)
            memory.sketch(start + i, sketch.entries)

    def chunk_of_frames(self, frames: int) -> Tensor:
        """Chunk index [F] of every latent frame."""
        chunks = self.num_chunks(frames)
        lengths = [self.first_frame(c + 1) - self.first_frame(c) for c in range(chunks)]
        return torch.repeat_interleave(torch.arange(chunks), torch.tensor(lengths))

    def causal_mask(self, frames: int) -> Tensor:
        """Block-causal frame mask [F, F] with the reach of this student's memory (window and sinks).

        Source: Self Forcing 2506.08009, section 3; CausVid 2412.07772.
        """
        chunk = self.chunk_of_frames(frames)
        seen = chunk[None] <= chunk[:, None]
        if self.cfg.memory.policy == "full":
            return seen
        end = torch.tensor([self.first_frame(int(c) + 1) for c in chunk])
        key = torch.arange(frames)
        recent = key[None] >= (end - (self.cfg.memory.frames - self.cfg.memory.sinks))[:, None]
        return seen & (recent | (key < self.cfg.memory.sinks)[None])

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
        form, as it will when streaming. Source: RELIC 2512.04040, hybrid forcing.
        """
        memory = self.cfg.memory
        times, seen, older = (t.to(x.device) for t in (times, seen, older))
        kept = int(older.any(0).nonzero().max()) + 1 if memory.remembers and bool(older.any()) else 0
        if not kept:
            return self.net(x, sigma, cond, start=times, causal=seen)
        clip = ClipHistory(times, kept, memory.pattern, self.pooling(memory), self.net.new_rotation())
        n = self.shape.tokens_per_frame
        columns = torch.cat((seen.repeat_interleave(n, 1), clip.columns(older)), dim=1)
        return self.net(x, sigma, cond, memory=clip, causal=FrameMask(columns.repeat_interleave(n, 0)))

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
