"""The Wan 2.1 and 2.2 video autoencoders (diffusers `AutoencoderKLWan`), streamed exactly.

Source: Wan (arXiv 2503.20314), section 4.1: a causal 3-D autoencoder that runs group by group over a cache of features.
diffusers clears that cache on every call; here it is the stream's state.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vidistill.codecs.frames import check_latents, check_px, check_sides, to_latent_frames, to_px_frames
from vidistill.io import not_found

State = tuple[Any, ...]  # one entry per causal convolution: its last input frames, None before, "Rep" (diffusers' mark)

# fmt: off
_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


@dataclass(frozen=True)
class WanCodecConfig:
    """Geometry of a WanCodec. The defaults are Wan 2.1: spatial 8, temporal 4, 16 channels."""

    latent_channels: int = 16
    encoder_width: int = 96
    decoder_width: int = 96
    width_multiples: tuple[int, ...] = (1, 2, 4, 4)
    temporal: tuple[bool, ...] = (False, True, True)  # which of the halvings in space also halve time
    num_res_blocks: int = 2
    residual: bool = False  # Wan 2.2: average and repeat shortcuts around each stage
    patch_size: int = 1
    latent_mean: tuple[float, ...] = _MEAN_21
    latent_std: tuple[float, ...] = _STD_21

    def __post_init__(self):
        if len(self.temporal) != len(self.width_multiples) - 1:
            raise ValueError(
                f"temporal {self.temporal} needs one entry fewer than width_multiples {self.width_multiples}"
            )
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(
                f"latent_mean has {len(self.latent_mean)} and latent_std {len(self.latent_std)} entries; "
                f"latent_channels is {self.latent_channels}"
            )
        if min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive; got {self.latent_std}")


WAN_2_2 = WanCodecConfig(
    latent_channels=48,
    encoder_width=160,
    decoder_width=256,
    residual=True,
    patch_size=2,
    latent_mean=_MEAN_22,
    latent_std=_STD_22,
)


class WanCodec(nn.Module):
    """A `Codec` around an `AutoencoderKLWan`, frozen; gradients still flow to pixels and latents.

    For half precision cast `codec.vae` only: pixels, latents, mean and std stay float32.
    """

    def __init__(self, cfg: WanCodecConfig, vae: nn.Module | None = None):
        """`vae` is a loaded `AutoencoderKLWan` of cfg's geometry; None builds one with random weights."""
        super().__init__()
        self.cfg = cfg
        self.latent_channels = cfg.latent_channels
        self.spatial_factor = cfg.patch_size * 2 ** len(cfg.temporal)
        self.temporal_factor = 2 ** sum(cfg.temporal)
        self.vae = (_build(cfg) if vae is None else vae).eval().requires_grad_(False)
        self.register_buffer("latent_mean", torch.tensor(cfg.latent_mean))
        self.register_buffer("latent_std", torch.tensor(cfg.latent_std))

    @classmethod
    def from_original(cls, state_dict: Mapping[str, Tensor], cfg: WanCodecConfig) -> "WanCodec":
        """A codec with the weights of Wan's own checkpoint; names and shapes must match cfg exactly."""
        codec = cls(cfg)
        codec.vae.load_state_dict({_diffusers_name(k, cfg.num_res_blocks): v for k, v in state_dict.items()})
        return codec

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, offline: bool = False) -> "WanCodec":
        """A codec from a diffusers folder or hub name; geometry, mean and std come from its config."""
        try:
            wan: Any = _diffusers_wan().AutoencoderKLWan
            vae = wan.from_pretrained(str(source), subfolder=subfolder, local_files_only=offline)
        except OSError as error:
            raise not_found(source, "the codec", error, offline) from error
        return cls(_read_config(vae.config), vae)

    @classmethod
    def load(cls, cfg: WanCodecConfig, weights: str | Path | None) -> "WanCodec":
        """A codec of geometry cfg from a safetensors file with Wan's own names; None: random weights."""
        if weights is None:
            return cls(cfg)
        return cls.from_original(load_file(weights), cfg)

    def px_frames(self, frames: int) -> int:
        """Px frames that `frames` latents of a fresh stream decode to."""
        return to_px_frames(frames, self.temporal_factor)

    def latent_shape(self, px_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, h, w) of a clip of `px_frames` frames of height x width px."""
        check_sides(height, width, self.spatial_factor)
        frames = to_latent_frames(px_frames, self.temporal_factor)
        return frames, self.latent_channels, height // self.spatial_factor, width // self.spatial_factor

    def encode(self, px: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] (the posterior's mean) of a whole clip px [B, f, 3, H, W], f = 1 + t * (F - 1)."""
        return self.encode_stream(px)[0]

    def encode_stream(self, px: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Latents of the next px frames and the new state: 1 + t * k frames on a fresh stream, t * k frames later."""
        check_px(px, self.spatial_factor, self.temporal_factor, fresh=state is None)
        x = _patchify(px.transpose(1, 2).to(self.vae.dtype) * 2 - 1, self.cfg.patch_size)
        first = [1] if state is None else []
        groups = first + [self.temporal_factor] * ((px.shape[1] - len(first)) // self.temporal_factor)
        cache = _fresh_cache(self.vae.encoder) if state is None else list(state)
        moments = [self.vae.encoder(group, feat_cache=cache, feat_idx=[0]) for group in x.split(groups, dim=2)]
        mean = self.vae.quant_conv(torch.cat(moments, dim=2))[:, : self.latent_channels]
        raw = mean.transpose(1, 2).float()
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None], tuple(cache)

    def decode(self, latents: Tensor) -> Tensor:
        """Px [B, 1 + t * (F - 1), 3, H, W] in [0, 1] of a whole clip of latents [B, F, C, h, w]."""
        return self.decode_stream(latents)[0]

    def decode_stream(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Px frames of the next latents and the new state: the first latent of a stream is 1 px frame, others t."""
        check_latents(latents, self.latent_channels)
        raw = latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        x = self.vae.post_quant_conv(raw.transpose(1, 2).to(self.vae.dtype))
        cache = _fresh_cache(self.vae.decoder) if state is None else list(state)
        frames = []
        for i, frame in enumerate(x.split(1, dim=2)):
            first = state is None and i == 0
            frames.append(self.vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=first))
        out = _unpatchify(torch.cat(frames, dim=2), self.cfg.patch_size)
        px = (out.transpose(1, 2).float().clamp(-1, 1) + 1) / 2
        return px, tuple(cache)


def _diffusers_wan() -> Any:
    """The diffusers module that holds `AutoencoderKLWan`."""
    try:
        from diffusers.models.autoencoders import autoencoder_kl_wan
    except ImportError as error:
        raise ImportError("the wan codec needs diffusers: pip install 'vidistill[wan]'") from error
    return autoencoder_kl_wan


def _build(cfg: WanCodecConfig) -> nn.Module:
    channels = 3 * cfg.patch_size**2
    return _diffusers_wan().AutoencoderKLWan(
        base_dim=cfg.encoder_width,
        decoder_base_dim=cfg.decoder_width,
        z_dim=cfg.latent_channels,
        dim_mult=list(cfg.width_multiples),
        num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=list(cfg.temporal),
        latents_mean=list(cfg.latent_mean),
        latents_std=list(cfg.latent_std),
        is_residual=cfg.residual,
        in_channels=channels,
        out_channels=channels,
        patch_size=None if cfg.patch_size == 1 else cfg.patch_size,
        scale_factor_temporal=2 ** sum(cfg.temporal),
        scale_factor_spatial=cfg.patch_size * 2 ** len(cfg.temporal),
    )


def _read_config(config: Mapping[str, Any]) -> WanCodecConfig:
    """Our config of a diffusers one."""
    if config["attn_scales"]:
        raise ValueError(
            f"attn_scales is {config['attn_scales']}; only [] (every published Wan autoencoder) is supported"
        )
    return WanCodecConfig(
        latent_channels=config["z_dim"],
        encoder_width=config["base_dim"],
        decoder_width=config["decoder_base_dim"] or config["base_dim"],
        width_multiples=tuple(config["dim_mult"]),
        temporal=tuple(config["temperal_downsample"]),
        num_res_blocks=config["num_res_blocks"],
        residual=config["is_residual"],
        patch_size=config["patch_size"] or 1,
        latent_mean=tuple(config["latents_mean"]),
        latent_std=tuple(config["latents_std"]),
    )


def _fresh_cache(half: nn.Module) -> list[Any]:
    """One empty slot for every causal convolution; the few that keep no past leave theirs unused."""
    return [None] * sum(isinstance(m, _diffusers_wan().WanCausalConv3d) for m in half.modules())


_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def _diffusers_name(name: str, num_res_blocks: int) -> str:
    """diffusers' name of a parameter in Wan's own checkpoint, 2.1 (flat lists of layers) or 2.2 (nested stages)."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"encoder\.downsamples\.(\d+)\.downsamples\.(\d+)\.(.*)", name):
        stage, layer, rest = int(match[1]), int(match[2]), match[3]
        part = f"resnets.{layer}" if layer < num_res_blocks else "downsampler"
        return f"encoder.down_blocks.{stage}.{part}.{rest}"
    if match := re.match(r"decoder\.upsamples\.(\d+)\.upsamples\.(\d+)\.(.*)", name):
        stage, layer, rest = int(match[1]), int(match[2]), match[3]
        part = f"resnets.{layer}" if layer <= num_res_blocks else "upsampler"
        return f"decoder.up_blocks.{stage}.{part}.{rest}"
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        stage, layer = divmod(int(match[1]), num_res_blocks + 2)
        part = f"resnets.{layer}" if layer <= num_res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{stage}.{part}.{match[2]}"
    return name.replace("encoder.downsamples.", "encoder.down_blocks.")


def _patchify(x: Tensor, patch_size: int) -> Tensor:
    return _diffusers_wan().patchify(x, patch_size)


def _unpatchify(x: Tensor, patch_size: int) -> Tensor:
    return _diffusers_wan().unpatchify(x, patch_size)
