"""Small random networks for the tests of the core: no weight is zero, so that nothing is vacuously equal."""

from dataclasses import replace

import torch

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.models.student import CausalStudent, StudentConfig

SHAPE = LatentShape(9, 4, 4, 4)
DIT = DiTConfig(channels=4, width=24, layers=2, heads=2, ffn=32, freq_dim=16, text_dim=8)
SITES = {
    "modulation": SiteConfig(5),
    "hidden": SiteConfig(5, hidden=4, layers=(1,), place="after_attention"),
    "qk": SiteConfig(5),
}
VIEW = {"sites": {**SITES, "view": SiteConfig(1)}, "grid": (2, 2), "fov": 84.0}  # tokens placed by direction


def tiny_dit(cfg: DiTConfig = DIT, seed: int = 0, std: float = 0.2) -> VideoDiT:
    net = VideoDiT(cfg)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * std)
    return net


def tiny_ltx(channels: int, tokens: int, layers: int = 1):
    """diffusers' LTX transformer for latents of so many channels and prompts of `tokens` numbers a word."""
    from diffusers import LTXVideoTransformer3DModel

    size = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": layers}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LTXVideoTransformer3DModel(
            in_channels=channels, out_channels=channels, caption_channels=tokens, **size
        ).eval()


def tiny_student(
    memory: MemoryConfig | None = None, *, chunk: int = 3, first: int = 0, dit: DiTConfig = DIT, **changes: object
) -> CausalStudent:
    memory = memory or MemoryConfig("full", frames=12)
    net = tiny_dit(replace(dit, **changes) if changes else dit)
    return CausalStudent(net, StudentConfig(chunk=chunk, first_chunk=first, memory=memory), SHAPE)


def clip(frames: int = 9, batch: int = 1, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, SHAPE.channels, SHAPE.height, SHAPE.width, generator=rng)


def condition(frames: int = 9, batch: int = 1, seed: int = 2, sites: tuple[str, ...] = ()) -> Condition:
    rng = torch.Generator().manual_seed(seed)
    per_frame = {site: torch.randn(batch, frames, 1 if site == "view" else 5, generator=rng) for site in sites}
    return Condition(tokens=torch.randn(batch, 6, DIT.text_dim, generator=rng), per_frame=per_frame)


def chunk_levels(student: CausalStudent, frames: int, batch: int = 1, seed: int = 3) -> torch.Tensor:
    """A random noise level per chunk, one per frame [B, F]."""
    chunk = student.chunk_of_frames(frames)
    return torch.rand(batch, int(chunk[-1]) + 1, generator=torch.Generator().manual_seed(seed))[:, chunk]


def cached(student, x, sigma, cond):
    """The clip chunk by chunk through the student's memory, every chunk's pass kept."""
    memory, out, start = student.new_memory(x.shape[0]), [], 0
    for chunk in range(student.num_chunks(x.shape[1])):
        stop = student.first_frame(chunk + 1)
        part = cond.frames(start, stop)
        out.append(student.velocity(x[:, start:stop], sigma[:, start:stop], part, start=start, memory=memory))
        memory.commit()
        start = stop
    return torch.cat(out, dim=1)
