"""The frame arithmetic every codec shares: latent 0 is one px frame, every later latent `temporal_factor` px frames."""

from torch import Tensor


def to_px_frames(frames: int, temporal_factor: int) -> int:
    """Px frames that `frames` latents of a fresh stream decode to."""
    return 1 + temporal_factor * (frames - 1)


def to_latent_frames(px_frames: int, temporal_factor: int) -> int:
    """Latents of a whole clip; ValueError for a length no whole number of latents covers."""
    t = temporal_factor
    if px_frames < 1 or (px_frames - 1) % t:
        raise ValueError(f"px has {px_frames} frames; a clip needs 1 + {t} * k of them (1, {1 + t}, {1 + 2 * t}, ...)")
    return 1 + (px_frames - 1) // t


def check_px(px: Tensor, spatial_factor: int, temporal_factor: int, *, fresh: bool) -> None:
    """ValueError unless px [B, f, 3, H, W] can be encoded as a fresh stream (or whole clip) or as a later chunk."""
    if px.ndim != 5 or px.shape[2] != 3:
        raise ValueError(f"px is {tuple(px.shape)}; expected [B, f, 3, H, W]")
    check_sides(px.shape[3], px.shape[4], spatial_factor)
    if fresh:
        to_latent_frames(px.shape[1], temporal_factor)
    elif px.shape[1] < 1 or px.shape[1] % temporal_factor:
        t = temporal_factor
        raise ValueError(
            f"px has {px.shape[1]} frames; a later chunk of a stream needs {t} * k of them ({t}, {2 * t}, ...)"
        )


def check_sides(height: int, width: int, spatial_factor: int) -> None:
    if height < 1 or width < 1 or height % spatial_factor or width % spatial_factor:
        raise ValueError(f"px frames are {height}x{width}; both sides must be multiples of {spatial_factor}")


def check_latents(latents: Tensor, latent_channels: int) -> None:
    """ValueError unless latents are [B, F >= 1, C, h, w]."""
    if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != latent_channels:
        raise ValueError(f"latents are {tuple(latents.shape)}; expected [B, F >= 1, {latent_channels}, h, w]")
