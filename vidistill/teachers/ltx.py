"""LTX-Video as a teacher: diffusers' own transformer behind `Denoiser`, to show that the door fits other families."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.io import not_found
from vidistill.teachers import Teacher

SPATIAL, TEMPORAL = 32, 8  # pixels of a latent, a side and in time


class LTX(nn.Module):
    """`LTXVideoTransformer3DModel` as a `Denoiser`: one token a latent pixel, one level a frame."""

    def __init__(self, net: nn.Module, fps: float = 25.0) -> None:
        super().__init__()
        self.net, self.scale = net, (TEMPORAL / fps, SPATIAL, SPATIAL)

    @property
    def units(self) -> list[list[nn.Module]]:
        return [[block] for block in self.net.transformer_blocks]

    def compile_regions(self) -> None:
        """Compile each block as a whole."""
        for block in self.net.transformer_blocks:
            block.compile()

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Velocity [B, F, C, H, W]; condition tokens [B, L, D] that are all zero are padding."""
        return self(x, sigma, cond)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        if cond.tokens is None:
            raise ValueError("LTX-Video cross-attends: Condition.tokens is missing")
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        timestep = (sigma * 1000).repeat_interleave(height * width, dim=1)
        dtype = next(self.net.parameters()).dtype
        mask = cond.tokens.abs().amax(dim=-1) > 0
        mask = mask | ~mask.any(dim=1, keepdim=True)  # an empty prompt attends to all of its zeros
        out = self.net(
            hidden_states=rearrange(x.to(dtype), "b f c h w -> b (f h w) c"),
            encoder_hidden_states=cond.tokens.to(dtype),
            timestep=timestep.to(dtype),
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=self.scale,
            return_dict=False,
        )[0]
        return rearrange(out.to(x.dtype), "b (f h w) c -> b f c h w", f=frames, h=height)


def load(
    source: str | Path,
    *,
    height: int = 512,
    width: int = 704,
    frames: int = 16,
    dtype: str = "bfloat16",
    device: str = "cpu",
    offline: bool = False,
    fps: float = 25.0,
) -> Teacher:
    """An LTX-Video teacher from a diffusers folder or hub id; `frames` are latent frames, `dtype` "" the stored one."""
    try:
        from diffusers import LTXVideoTransformer3DModel
    except ImportError as error:
        raise ImportError("LTX-Video needs diffusers: pip install 'vidistill[wan]'") from error
    try:
        wanted = getattr(torch, dtype) if dtype else "auto"
        net = LTXVideoTransformer3DModel.from_pretrained(
            str(source), subfolder="transformer", torch_dtype=wanted, local_files_only=offline
        )
    except OSError as error:
        raise not_found(source, "the LTX-Video transformer of", error, offline) from error
    channels: Any = net.config["in_channels"]
    shape = LatentShape(frames, channels, height // SPATIAL, width // SPATIAL, patch=(1, 1, 1))
    net = LTX(net.to(device).eval().requires_grad_(False), fps)
    return Teacher(net, NoiseSchedule(), shape, "ltx", str(source), world={"fps": fps, "temporal": TEMPORAL})
