"""CausalStudent: a VideoDiT that generates chunk by chunk. No loop here, see rollout.py."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vidistill.conditioning import Condition, concat
from vidistill.dit import DiTConfig, VideoDiT
from vidistill.memory import KVMemory, MemoryConfig
from vidistill.shapes import LatentShape, check_shape


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
        if self.memory.frames < self.chunk:
            raise ValueError(f"memory.frames {self.memory.frames} cannot hold one chunk of {self.chunk} frames")


class CausalStudent(nn.Module):
    """A network, its chunks and the memory it generates with."""

    def __init__(self, net: VideoDiT, cfg: StudentConfig, shape: LatentShape) -> None:
        super().__init__()
        self.net, self.cfg, self.shape = net, cfg, shape

    @classmethod
    def from_teacher(cls, teacher: VideoDiT, cfg: StudentConfig, shape: LatentShape) -> "CausalStudent":
        """A student that starts as a copy of a bidirectional teacher."""
        net = VideoDiT(teacher.cfg)
        net.load_state_dict(teacher.state_dict())
        return cls(net, cfg, shape)

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
        self, x: Tensor, sigma: Tensor, cond: Condition, *, start: int = 0, memory: KVMemory | None = None
    ) -> Tensor:
        """Velocity of frames that start at latent frame `start`, given what `memory` holds."""
        return self.net(x, sigma, cond, start=start, memory=memory)

    def new_memory(
        self, batch: int, *, dtype: torch.dtype = torch.float32, cfg: MemoryConfig | None = None
    ) -> KVMemory:
        """An empty memory for `batch` streams."""
        dit = self.net.cfg
        return KVMemory(
            cfg or self.cfg.memory,
            layers=dit.layers,
            batch=batch,
            heads=dit.heads,
            head_dim=dit.head_dim,
            grid=self.shape.grid,
            rotate=self.net.new_rotation,
            device=self.net.head.head.weight.device,
            dtype=dtype,
        )

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

    def teacher_forcing_mask(self, frames: int) -> Tensor:
        """Frame mask [2 F, 2 F] of a clean clip and then a noisy one, whose chunks see clean history and themselves."""
        chunk = self.chunk_of_frames(frames)
        clean = self.causal_mask(frames)
        own = chunk[None] == chunk[:, None]
        top = torch.cat((clean, torch.zeros_like(clean)), dim=1)
        return torch.cat((top, torch.cat((clean & ~own, own), dim=1)), dim=0)

    def teacher_forced(self, x: Tensor, sigma: Tensor, cond: Condition, clean: Tensor, clean_sigma: Tensor) -> Tensor:
        """Velocity of a noisy clip whose chunks see the `clean` clip's earlier chunks instead of their own.

        Both clips are [B, F, C, H, W] at levels [B, F]; `clean` may be noised a little, `clean_sigma` says how much.
        """
        frames = x.shape[1]
        v = self.net(
            torch.cat((clean, x), dim=1),
            torch.cat((clean_sigma, sigma), dim=1),
            concat([cond, cond], dim=1),
            start=torch.arange(frames, device=x.device).repeat(2),
            causal=self.teacher_forcing_mask(frames).to(x.device),
        )
        return v[:, frames:]

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless `x` [B, F, C, H, W] has this student's latent size."""
        check_shape(x, "B F C H W", C=self.shape.channels, H=self.shape.height, W=self.shape.width)
