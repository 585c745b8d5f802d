"""A small causal video codec in the TAEHV architecture, streamed chunk by chunk with its state passed as a value.

Source: TAEHV by Ollin Boer Bohan. Layer order and parameter names are TAEHV's, so published weights load unchanged.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vidistill.codecs.frames import check_latents, check_px, check_sides, to_latent_frames, to_px_frames
from vidistill.diffusion import AnyGenerator, randn_like

Ints = tuple[int, ...]
State = tuple[Tensor, ...]  # last input frame of every MemBlock [B, D, h, w]; last shown frame [B, 3, H, W] if smooth


@dataclass(frozen=True)
class TinyCodecConfig:
    """Geometry of a TinyCodec. The defaults suit 64x64 px clips: spatial 4, temporal 4, no layer at full resolution.

    Encoder stage i: time pooling, convolution from width i to width i+1 (strided where space is 2), MemBlocks.
    Decoder stage i: MemBlocks, upsampling, time growth, convolution from width i to width i+1.
    """

    patch_size: int = 4
    latent_channels: int = 16
    encoder_widths: Ints = (32, 48, 64)
    encoder_time: Ints = (2, 2)
    encoder_space: Ints = (1, 1)
    encoder_blocks: Ints = (1, 2)
    decoder_widths: Ints = (64, 48, 32)
    decoder_time: Ints = (2, 2)
    decoder_space: Ints = (1, 1)
    decoder_blocks: Ints = (2, 1)
    encoder_pad: str = "front"  # "back": published weights, whose latent i looks ahead (to px frame t*i + t - 1)
    smooth: float = 0.0  # spread of `smoothed` and `steadied`, which decoded frames pass (not in training); 0: off

    def __post_init__(self):
        _check_half("encoder", self.encoder_widths, self.encoder_time, self.encoder_space, self.encoder_blocks)
        _check_half("decoder", self.decoder_widths, self.decoder_time, self.decoder_space, self.decoder_blocks)
        if math.prod(self.encoder_time) != math.prod(self.decoder_time):
            raise ValueError(
                f"encoder_time {self.encoder_time} and decoder_time {self.decoder_time} must multiply to one factor"
            )
        if math.prod(self.encoder_space) != math.prod(self.decoder_space):
            raise ValueError(
                f"encoder_space {self.encoder_space} and decoder_space {self.decoder_space} must multiply to one factor"
            )
        if self.encoder_pad not in ("front", "back"):
            raise ValueError(f"encoder_pad is {self.encoder_pad!r}; allowed: 'front', 'back'")
        if not 0 <= self.smooth < math.inf:
            raise ValueError(f"smooth is {self.smooth}; it is a difference of colours: 0 (off) or above, 0.08 is usual")
        if self.patch_size < 1 or self.latent_channels < 1:
            raise ValueError(f"patch_size {self.patch_size} and latent_channels {self.latent_channels} must be >= 1")


def _check_half(half: str, widths: Ints, time: Ints, space: Ints, blocks: Ints) -> None:
    if not len(widths) - 1 == len(time) == len(space) == len(blocks) >= 1:
        raise ValueError(
            f"{half}_time {time}, {half}_space {space} and {half}_blocks {blocks} need one entry per stage and "
            f"{half}_widths {widths} one more"
        )
    if any(factor not in (1, 2) for factor in (*time, *space)):
        raise ValueError(f"{half}_time {time} and {half}_space {space} may hold only 1 and 2")
    if min(widths) < 1 or min(blocks) < 0:
        raise ValueError(f"{half}_widths {widths} must be >= 1 and {half}_blocks {blocks} >= 0")


def _published(patch_size: int, latent_channels: int) -> TinyCodecConfig:
    return TinyCodecConfig(
        patch_size=patch_size,
        latent_channels=latent_channels,
        encoder_widths=(64, 64, 64, 64),
        encoder_time=(2, 2, 1),
        encoder_space=(2, 2, 2),
        encoder_blocks=(3, 3, 3),
        decoder_widths=(256, 128, 64, 64),
        decoder_time=(1, 2, 2),
        decoder_space=(2, 2, 2),
        decoder_blocks=(3, 3, 3),
        encoder_pad="back",
    )


PUBLISHED = {  # geometries of published TAEHV weight files, by file name
    "taehv": _published(1, 16),
    "taew2_1": _published(1, 16),
    "taew2_2": _published(2, 48),
    "taehv1_5": _published(2, 32),
}


class TinyCodec(nn.Module):
    """A `Codec` that trains and streams on a CPU.

    There, `codec.to(memory_format=torch.channels_last)` makes it 10 to 25% faster to run and 15% slower to train.
    """

    def __init__(self, cfg: TinyCodecConfig):
        super().__init__()
        self.cfg = cfg
        self.latent_channels = cfg.latent_channels
        self.spatial_factor = cfg.patch_size * math.prod(cfg.encoder_space)
        self.temporal_factor = math.prod(cfg.encoder_time)
        self.encoder = _encoder(cfg)
        self.decoder = _decoder(cfg)
        self.initialise()
        self.register_buffer("latent_mean", torch.zeros(cfg.latent_channels))
        self.register_buffer("latent_std", torch.ones(cfg.latent_channels))
        self.register_load_state_dict_pre_hook(_default_normalisation)

    @torch.no_grad()
    def initialise(self) -> None:
        """Layers near the identity (extra channels carry the negative, past a ReLU), grey output.

        Without norms a random start spends thousands of steps before it passes any detail on.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                module.weight.mul_(0.3).add_(_signed_identity(module.weight))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, MemBlock):
                nn.init.zeros_(module.conv[-1].weight)
        self.decoder[-1].weight.mul_(0.3)
        nn.init.constant_(self.decoder[-1].bias, 0.3)

    @classmethod
    def load(cls, cfg: TinyCodecConfig, weights: str | Path | None) -> "TinyCodec":
        """A codec of geometry cfg from a safetensors file with TAEHV's names; None: untrained."""
        codec = cls(cfg)
        if weights is not None:
            codec.load_state_dict(load_file(weights))
        return codec

    def set_normalisation(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel mean and std [C] of raw latents, in place."""
        if mean.shape != self.latent_mean.shape or std.shape != self.latent_std.shape:
            raise ValueError(f"mean {tuple(mean.shape)} and std {tuple(std.shape)} must be [{self.latent_channels}]")
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive in every channel; got {std.tolist()}")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    @torch.no_grad()
    def normalise_on(self, clips: Iterable[Tensor]) -> None:
        """Set the normalisation to the mean and std of the raw latents of px clips [B, T, 3, H, W]."""
        raw = torch.cat([self(px)[1] for px in clips]).float()
        self.set_normalisation(raw.mean(dim=(0, 1, 3, 4)), raw.std(dim=(0, 1, 3, 4)))

    def px_frames(self, frames: int) -> int:
        """Px frames that `frames` latents of a fresh stream decode to."""
        return to_px_frames(frames, self.temporal_factor)

    def latent_shape(self, px_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, h, w) of a clip of `px_frames` frames of height x width px."""
        check_sides(height, width, self.spatial_factor)
        frames = to_latent_frames(px_frames, self.temporal_factor)
        return frames, self.latent_channels, height // self.spatial_factor, width // self.spatial_factor

    def encode(self, px: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] of a whole clip px [B, f, 3, H, W] in [0, 1] with f = 1 + t * (F - 1)."""
        check_px(px, self.spatial_factor, self.temporal_factor, fresh=True)
        return self._normalise(self._encode_raw(px))

    def encode_stream(self, px: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Latents of the next px frames and the new state: 1 + t * k frames on a fresh stream, t * k frames later."""
        if self.cfg.encoder_pad == "back":
            raise ValueError("an encoder with encoder_pad='back' looks ahead and cannot stream; encode the whole clip")
        check_px(px, self.spatial_factor, self.temporal_factor, fresh=state is None)
        if state is None:
            px = _pad_front(px, self.temporal_factor - 1)
        raw, state = _run(self.encoder, self._patchify(px), state)
        return self._normalise(raw), state

    def decode(self, latents: Tensor) -> Tensor:
        """Px [B, 1 + t * (F - 1), 3, H, W] in [0, 1] of a whole clip of latents [B, F, C, h, w]."""
        return self.decode_stream(latents)[0]

    def decode_stream(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Px frames of the next latents and the new state: the first latent of a stream is 1 px frame, others t."""
        check_latents(latents, self.latent_channels)
        smooth, shown = self.cfg.smooth, None
        if smooth and state is not None:
            *layers, shown = state
            state = tuple(layers)
        px, state = self._decode_raw(self._denormalise(latents), state)
        px = px.clamp(0, 1)
        if not smooth:
            return px, state
        px = (one_filter if torch.compiler.is_compiling() else filtered)(px, shown, smooth)
        return px, (*state, px[:, -1].clone())

    def forward(self, px: Tensor, noise_std: float = 0.0, rng: AnyGenerator | None = None) -> tuple[Tensor, Tensor]:
        """(reconstruction, raw latents) of a whole clip, for training: the reconstruction is not clamped.

        Gaussian noise of `noise_std` is added to the normalised latents, so that the decoder tolerates small errors.
        """
        check_px(px, self.spatial_factor, self.temporal_factor, fresh=True)
        raw = self._encode_raw(px)
        latents = self._normalise(raw)
        if noise_std > 0:
            latents = latents + noise_std * (torch.randn_like(latents) if rng is None else randn_like(latents, rng))
        return self._decode_raw(self._denormalise(latents), None)[0], raw

    def _encode_raw(self, px: Tensor) -> Tensor:
        """Raw latents of a whole clip: t - 1 copies of an end frame complete its groups."""
        pad = {"front": _pad_front, "back": _pad_back}[self.cfg.encoder_pad]
        return _run(self.encoder, self._patchify(pad(px, self.temporal_factor - 1)), None)[0]

    def _decode_raw(self, raw: Tensor, state: State | None) -> tuple[Tensor, State]:
        x, new_state = _run(self.decoder, raw.to(self.decoder[1].weight.dtype), state)
        if state is None:  # the first latent holds one px frame, the last of its group
            x = x[:, self.temporal_factor - 1 :]
        px = F.pixel_shuffle(x, self.cfg.patch_size) if self.cfg.patch_size > 1 else x
        return px.float(), new_state

    def _patchify(self, px: Tensor) -> Tensor:
        px = px.to(self.encoder[0].weight.dtype)
        return F.pixel_unshuffle(px, self.cfg.patch_size) if self.cfg.patch_size > 1 else px

    def _normalise(self, raw: Tensor) -> Tensor:
        return (raw.float() - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std[:, None, None] + self.latent_mean[:, None, None]


def filtered(px: Tensor, shown: Tensor | None, spread: float) -> Tensor:
    """px [B, T, C, H, W], smoothed and then steadied, see there."""
    return steadied(smoothed(px, spread), shown, spread)


@torch.library.custom_op("vidistill::filtered", mutates_args=())
def one_filter(px: Tensor, shown: Tensor | None, spread: float) -> Tensor:
    """`filtered` as one operator: its hundreds of small steps would take a compiler minutes."""
    return filtered(px, shown, spread)


@one_filter.register_fake
def _(px: Tensor, shown: Tensor | None, spread: float) -> Tensor:
    return torch.empty_like(px)


def smoothed(px: Tensor, spread: float, reach: int = 2) -> Tensor:
    """px [..., C, H, W], each pixel the mean of those within `reach` that look like it: grain goes, edges stay.

    A bilateral filter (Tomasi and Manduchi, 1998) with a flat window, as video codecs run one in their loop.
    """
    height, width = px.shape[-2:]
    total, weights = px.clone(), torch.ones_like(px[..., :1, :, :])
    for down in range(reach + 1):
        for right in range(-reach if down else 1, reach + 1):  # each pair of pixels once
            here = (..., slice(height - down), slice(max(-right, 0), width - max(right, 0)))
            there = (..., slice(down, None), slice(max(right, 0), width + min(right, 0)))
            weight = _likeness(px[there], px[here], spread)
            total[here] += weight * px[there]
            total[there] += weight * px[here]
            weights[here] += weight
            weights[there] += weight
    return total / weights


def steadied(px: Tensor, shown: Tensor | None, spread: float) -> Tensor:
    """px [B, T, C, H, W], each pixel averaged with what was shown there a frame before, as far as that looks like it.

    `shown` [B, C, H, W] is what was shown before px (None: nothing). The filter of `smoothed`, in time: what stands
    still does not shimmer.
    """
    frames = []
    for frame in px.unbind(1):
        if shown is not None:
            weight = _likeness(frame, shown, spread)
            frame = (frame + weight * shown) / (1 + weight)
        frames.append(frame)
        shown = frame
    return torch.stack(frames, 1)


def _likeness(a: Tensor, b: Tensor, spread: float) -> Tensor:
    """exp(-d^2 / (2 spread^2)) [..., 1, H, W], d the distance of the colours of a and b [..., C, H, W]."""
    return torch.exp((a - b).square().sum(-3, keepdim=True) * (-0.5 / spread**2))


class Clamp(nn.Module):
    """Soft limit to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it: x, past [N, D, h, w] -> [N, D', h, w]."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width_in, width_out),
            nn.ReLU(inplace=True),
            _conv(width_out, width_out),
            nn.ReLU(inplace=True),
            _conv(width_out, width_out),
        )
        self.skip = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class TPool(nn.Module):
    """Each group of `stride` frames becomes one: [N, D, h, w] -> [N / stride, D, h, w]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, width, h, w = x.shape
        return self.conv(x.reshape(-1, self.stride * width, h, w))


class TGrow(nn.Module):
    """Each frame becomes `stride` frames, `scale` times larger: [N, D, h, w] -> [N * stride, D, h * scale, w * scale].

    TAEHV upsamples before this 1x1 convolution; nearest upsampling commutes with it and is cheaper after it.
    """

    def __init__(self, width: int, stride: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, width, h, w = x.shape
        x = self.conv(x).reshape(-1, width, h, w)
        return F.interpolate(x, scale_factor=self.scale, mode="nearest") if self.scale > 1 else x


def _signed_identity(weight: Tensor) -> Tensor:
    """A kernel [O, I, k, k] that passes input channel o mod I to output channel o, negated in every second round."""
    identity, width_in = torch.zeros_like(weight), weight.shape[1]
    centre = weight.shape[2] // 2
    for o in range(weight.shape[0]):
        identity[o, o % width_in, centre, centre] = -1.0 if (o // width_in) % 2 else 1.0
    return identity


def _conv(width_in: int, width_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=bias)


def _encoder(cfg: TinyCodecConfig) -> nn.Sequential:
    widths = cfg.encoder_widths
    layers = [_conv(3 * cfg.patch_size**2, widths[0]), nn.ReLU(inplace=True)]
    for i, num_blocks in enumerate(cfg.encoder_blocks):
        layers += [TPool(widths[i], cfg.encoder_time[i])]
        layers += [_conv(widths[i], widths[i + 1], stride=cfg.encoder_space[i], bias=False)]
        layers += [MemBlock(widths[i + 1], widths[i + 1]) for _ in range(num_blocks)]
    return nn.Sequential(*layers, _conv(widths[-1], cfg.latent_channels))


def _decoder(cfg: TinyCodecConfig) -> nn.Sequential:
    widths = cfg.decoder_widths
    layers = [Clamp(), _conv(cfg.latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for i, num_blocks in enumerate(cfg.decoder_blocks):
        layers += [MemBlock(widths[i], widths[i]) for _ in range(num_blocks)]
        layers += [nn.Identity()]  # keeps TAEHV's numbering: its upsampling stands here, ours is inside TGrow
        layers += [TGrow(widths[i], cfg.decoder_time[i], cfg.decoder_space[i])]
        layers += [_conv(widths[i], widths[i + 1], bias=False)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(widths[-1], 3 * cfg.patch_size**2))


def _run(layers: nn.Sequential, x: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Output [B, f', D', h', w'] of `layers` on a chunk x [B, f, D, h, w], and the state for the next chunk.

    All frames go through a layer at once; a MemBlock sees them shifted by one, the carried frame (or zeros) in front.
    """
    batch = x.shape[0]
    last_frames: list[Tensor] = []
    x = x.flatten(0, 1)
    for layer in layers:
        if isinstance(layer, MemBlock):
            clip = x.unflatten(0, (batch, -1))
            before = torch.zeros_like(clip[:, 0]) if state is None else state[len(last_frames)]
            last_frames.append(clip[:, -1].clone())  # a view would keep the whole chunk's activations alive
            x = layer(x, torch.cat([before[:, None], clip[:, :-1]], 1).flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1)), tuple(last_frames)


def _pad_front(px: Tensor, num: int) -> Tensor:
    return torch.cat([px[:, :1].expand(-1, num, -1, -1, -1), px], 1)


def _pad_back(px: Tensor, num: int) -> Tensor:
    return torch.cat([px, px[:, -1:].expand(-1, num, -1, -1, -1)], 1)


def _default_normalisation(codec: TinyCodec, state_dict: dict, prefix: str, *_) -> None:
    """Published weights have no normalisation: their latents are the teacher's normalised ones already."""
    state_dict.setdefault(f"{prefix}latent_mean", torch.zeros_like(codec.latent_mean))
    state_dict.setdefault(f"{prefix}latent_std", torch.ones_like(codec.latent_std))
