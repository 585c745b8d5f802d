"""Conditions as a network sees them: tokens, vectors per frame, channels; and how actions and sound are packed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vidistill.conditioning.camera import CameraConfig, Pose, integrate, moves, numbers, pose_of, relative, walk_of

Encode = Callable[[Sequence[str]], Tensor]  # prompts -> tokens [B, L, D]

SITES = ("modulation", "hidden", "qk", "view")
ACTION_SITE = "modulation"
MOVE_SITE, POSE_SITE = "hidden", "qk"  # relative and absolute camera motion. Source: RELIC 2512.04040
VIEW_SITE = "view"  # heading of the camera in radians, which turns queries and keys: `ops.rope.Panorama`
AUDIO_SITE = "hidden"  # Source: OmniAvatar 2506.18866


@dataclass(frozen=True)
class Condition:
    """What a network is told beside noise: three kinds of tensors, each optional.

    tokens [B, L, D]: cross-attended (text, image features). per_frame {site: [B, F, D]}: one vector a latent frame
    (actions, camera, audio); sites are those of SITES. channels [B, F, C', H, W]: concatenated to the latents
    (reference image, mask). `negative` [B, L, D]: tokens of the unconditional counterpart (a negative prompt); None:
    zeros.
    """

    tokens: Tensor | None = None
    per_frame: Mapping[str, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None
    negative: Tensor | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.per_frame) - set(SITES))
        if unknown:
            raise ValueError(f"Condition.per_frame has no site {unknown}; sites are {SITES}")

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """A condition with `fn` applied to every tensor."""
        return Condition(
            None if self.tokens is None else fn(self.tokens),
            {site: fn(x) for site, x in self.per_frame.items()},
            None if self.channels is None else fn(self.channels),
            None if self.negative is None else fn(self.negative),
        )

    def frames(self, start: int, stop: int) -> "Condition":
        """The condition of latent frames start..stop-1; tokens hold for the whole clip."""
        return Condition(
            self.tokens,
            {site: x[:, start:stop] for site, x in self.per_frame.items()},
            None if self.channels is None else self.channels[:, start:stop],
            self.negative,
        )

    def to(self, device: torch.device | str) -> "Condition":
        return self.map(lambda x: x.to(device))

    def null(self) -> "Condition":
        """The unconditional counterpart: `negative` or zero tokens, zero vectors.

        Channels and headings stay: they are given, and say where things are, not what happens.
        """
        zeros = None if self.tokens is None else torch.zeros_like(self.tokens)
        return Condition(
            zeros if self.negative is None else self.negative,
            {site: x if site == VIEW_SITE else torch.zeros_like(x) for site, x in self.per_frame.items()},
            self.channels,
        )

    def mute(self, keep: Tensor | None = None) -> "Condition":
        """Without its audio: everywhere, or where `keep` [B] is False."""
        heard = self.per_frame.get(AUDIO_SITE)
        if heard is None:
            return self
        silent = torch.zeros_like(heard) if keep is None else heard * keep.view(-1, 1, 1).to(heard)
        return replace(self, per_frame={**self.per_frame, AUDIO_SITE: silent})

    def drop(self, keep: Tensor) -> "Condition":
        """Null condition where `keep` [B] is False (condition dropout for guidance)."""

        def pick(x: Tensor, null: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (x.ndim - 1)).to(x.device), x, null)

        null = self.null()
        return Condition(
            None if self.tokens is None or null.tokens is None else pick(self.tokens, null.tokens),
            {site: pick(x, null.per_frame[site]) for site, x in self.per_frame.items()},
            self.channels,
            self.negative,
        )


def branches(cond: Condition, scale: float, audio_scale: float = 0.0) -> tuple[list[Condition], list[float]]:
    """Null conditions and their scales for `sampling.guided`: nothing for scale 1; one for text and audio alike.

    An `audio_scale` of its own: v = u + scale (t - u) + audio_scale (c - t), where t knows the text alone.
    Source: LiveTalk 2512.23576, authors' code for unequal scales.
    """
    if not audio_scale or audio_scale == scale:
        return ([], []) if scale == 1.0 else ([cond.null()], [scale])
    return [cond.mute(), cond.null()], [audio_scale, scale]


def reference_channels(image: Tensor, start: int, stop: int) -> Tensor:
    """Channels [B, F, C + 1, H, W] of latent frames start..stop-1 of a clip that begins with `image` [B, 1, C, H, W].

    The picture again at every frame, and a mask that is 0 where the frame itself is the picture and 1 elsewhere.
    Source: OmniAvatar 2506.18866.
    """
    b, _, _, h, w = image.shape
    mask = (torch.arange(start, stop, device=image.device) > 0).to(image)[None, :, None, None, None]
    return torch.cat((image.expand(-1, stop - start, -1, -1, -1), mask.expand(b, -1, -1, h, w)), dim=2)


MASKS = 4  # mask channels of Wan's image-to-video networks: one for each pixel frame of a latent


def shown_clip(picture: Tensor, px_frames: int) -> Tensor:
    """Pixels [B, px_frames, 3, H, W] whose latents an image-to-video network is shown: `picture` [B, 1, 3, H, W] in
    [0, 1], then grey. Source: Wan 2503.20314, section 5.1 and its code."""
    grey = torch.full_like(picture, 0.5).expand(-1, px_frames - 1, -1, -1, -1)
    return torch.cat((picture, grey), dim=1)


def shown_channels(latents: Tensor, start: int, stop: int) -> Tensor:
    """Channels [B, F, MASKS + C, H, W] of latent frames start..stop-1 from the latents [B, n, C, H, W] of a clip as
    `shown_clip` gives it: a mask, 1 where the picture is given, and the latents, of which the last one goes on."""
    frames = torch.arange(start, stop, device=latents.device)
    mask = (frames == 0).to(latents)[None, :, None, None, None]
    picked = latents[:, frames.clamp(max=latents.shape[1] - 1)]
    return torch.cat((mask.expand(len(picked), -1, MASKS, *picked.shape[-2:]), picked), dim=2)


def before_text(image: Tensor, text: Tensor) -> Tensor:
    """Tokens [B, M + L, D] of a picture [B, M, .] and of text [B, L, .]; the narrower ones end with zeros."""
    width = max(image.shape[-1], text.shape[-1])
    wide = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (image.to(text), text)]
    return torch.cat(wide, dim=1)


def is_shown(channels: int, extra_channels: int) -> bool:
    """Whether condition channels are those of `shown_channels`, beside so many latent channels."""
    return extra_channels == channels + MASKS


def check_pictured(source: str, channels: int, extra_channels: int, image_dim: int = 0) -> None:
    """Raise ValueError unless a network's condition channels are none, those of `reference_channels` or of
    `shown_channels`, the only ones that go with image tokens."""
    shown = is_shown(channels, extra_channels)
    if not shown and (extra_channels not in (0, channels + 1) or image_dim):
        raise ValueError(
            f"{source} takes {extra_channels} condition channels{' and image tokens' if image_dim else ''} beside "
            f"{channels} latent ones; networks that are known take none, a picture and its mask ({channels + 1}), or, "
            f"as Wan's image-to-video networks, the latents of a clip that begins with it and {MASKS} masks "
            f"({channels + MASKS})"
        )


def concat(conditions: list[Condition], dim: int = 0) -> Condition:
    """Conditions joined along the batch (dim 0) or along frames (dim 1; tokens of the first are kept)."""
    first = conditions[0]

    def join(xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, dim=dim)

    tokens = None
    if first.tokens is not None:
        tokens = join([c.tokens for c in conditions if c.tokens is not None]) if dim == 0 else first.tokens
    return Condition(
        tokens,
        {site: join([c.per_frame[site] for c in conditions]) for site in first.per_frame},
        None if first.channels is None else join([c.channels for c in conditions if c.channels is not None]),
    )


def pack_actions(actions: Tensor, factor: int) -> Tensor:
    """Actions at latent rate [B, F, factor * A + 1] from one action a pixel frame [B, 1 + factor * (F - 1), A].

    Latent i holds the actions that led to its `factor` pixel frames; latent 0 holds the single first frame. The last
    entry is 1: it tells "standing still" from "no condition", which is all zeros.
    """
    b, t, a = actions.shape
    if (t - 1) % factor:
        raise ValueError(f"actions must cover 1 + {factor} * k pixel frames, got {t}")
    padded = torch.cat((actions.new_zeros(b, factor - 1, a), actions), dim=1)
    packed = padded.reshape(b, -1, factor * a)
    return torch.cat((packed, packed.new_ones(*packed.shape[:2], 1)), dim=-1)


def pack_audio(features: Tensor, factor: int) -> Tensor:
    """Audio features at latent rate [B, F, factor * D] from one vector a pixel frame [B, 1 + factor * (F - 1), D].

    The first vector is repeated in front, so that latent 0 holds the single first frame `factor` times.
    """
    b, t, d = features.shape
    if (t - 1) % factor:
        raise ValueError(f"audio features must cover 1 + {factor} * k pixel frames, got {t}")
    return torch.cat((features[:, :1].expand(-1, factor - 1, -1), features), dim=1).reshape(b, -1, factor * d)


def pack_camera(moved: Tensor, pose: Pose, cfg: CameraConfig, factor: int) -> dict[str, Tensor]:
    """What a network is told of a camera [B, F] at the sites that `cfg` tells, from moves and poses at latent rate."""
    vectors = {
        MOVE_SITE: lambda: relative(moved, cfg, factor),
        POSE_SITE: lambda: numbers(pose, cfg),
        VIEW_SITE: lambda: walk_of(pose)[..., 2:].float(),
    }
    return {site: vectors[site]() for site in cfg.sites}


def walked(poses: Tensor, cfg: CameraConfig, factor: int) -> dict[str, Tensor]:
    """The same from recorded poses [B, F, 3 or 12] at latent rate, seen from the first of them: see `pose_of`."""
    moved = moves(pose_of(poses))
    return pack_camera(moved, integrate(moved), cfg, factor)


def hold_action(action: Tensor, start: int, stop: int, factor: int) -> Tensor:
    """Packed actions [1, stop - start, factor * A + 1] of latents start..stop-1 while `action` [A] is held.

    Latent 0 is the picture before anything was done: its actions are zero, as in recorded clips.
    """
    px = action.expand(1, 1 + factor * (stop - start), -1)
    packed = pack_actions(px, factor)[:, 1:]
    if start == 0:
        packed[:, 0, :-1] = 0.0
    return packed
