"""Measures of pictures, clips and features: pure functions of tensors; pixels are float [..., 3, H, W] in [0, 1]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
MAX_FEATURES = 64  # beyond it a covariance of some thousand samples says little


def luma(px: Tensor) -> Tensor:
    """Brightness [..., H, W]."""
    return (px * px.new_tensor(LUMA)[:, None, None]).sum(-3)


def sharpness(px: Tensor) -> Tensor:
    """Mean gradient magnitude of the brightness [...], per pixel."""
    y = luma(px)
    across = y[..., :-1, 1:] - y[..., :-1, :-1]
    down = y[..., 1:, :-1] - y[..., :-1, :-1]
    return (across.square() + down.square()).sqrt().mean((-2, -1))


def saturation(px: Tensor) -> Tensor:
    """Mean chroma [...], the largest minus the smallest colour channel: 0 for grey."""
    return (px.amax(-3) - px.amin(-3)).mean((-2, -1))


def contrast(px: Tensor) -> Tensor:
    """Standard deviation of the brightness over the picture [...]."""
    return luma(px).flatten(-2).std(-1, unbiased=False)


def motion(px: Tensor) -> Tensor:
    """Mean absolute difference between successive frames of [..., T, 3, H, W]: [..., T - 1]."""
    return px.diff(dim=-4).abs().mean((-3, -2, -1))


def blocks(px: Tensor, block: int = 8) -> Tensor:
    """Means [..., 3, H // block, W // block] of blocks of px [..., 3, H, W], which are clipped to the picture."""
    height, width = px.shape[-2:]
    means = F.avg_pool2d(px.reshape(-1, 3, height, width), (min(block, height), min(block, width)))
    return means.unflatten(0, px.shape[:-3])


def flicker(px: Tensor, block: int = 8) -> Tensor:
    """Mean |x[t+1] - 2 x[t] + x[t-1]| of [..., T, 3, H, W] after averaging blocks of pixels: [..., T - 2].

    A steady change has none, and the blocks (clipped to the picture) are large enough that things which move by a few
    pixels a frame count little: what is left is brightness that comes and goes.
    """
    return blocks(px, block).diff(n=2, dim=-4).abs().mean((-3, -2, -1))


def mse(px: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error [...] of pictures."""
    return (px - reference).square().mean((-3, -2, -1))


def decibels(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors; at most 100."""
    return -10 * error.clamp_min(1e-10).log10()


def psnr(px: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [...] in dB of pictures against `reference`; at most 100."""
    return decibels(mse(px, reference))


def horizontal_flow(before: Tensor, after: Tensor) -> Tensor:
    """Pixels [...] by which the picture moved to the right from `before` to `after`, by phase correlation of its rows.

    Between -W/2 and W/2, to a fraction of a pixel; 0 for two equal pictures. A camera that turns left gives a positive
    value. Source: Kuglin & Hines 1975; the peak is refined by a parabola.
    """
    a, b = (luma(x).double() for x in (before, after))
    width = a.shape[-1]
    window = torch.hann_window(width, periodic=False, dtype=a.dtype, device=a.device)
    a, b = ((x - x.mean(-1, keepdim=True)) * window for x in (a, b))
    cross = (torch.fft.rfft(b) * torch.fft.rfft(a).conj()).sum(-2)  # all rows vote
    peaks = torch.fft.irfft(cross / cross.abs().clamp_min(1e-12), n=width)
    at = peaks.argmax(-1, keepdim=True)
    low, top, high = (peaks.gather(-1, (at + k) % width) for k in (-1, 0, 1))
    bend = (low - 2 * top + high).clamp_max(-1e-12)  # at a peak it is negative
    fine = (0.5 * (low - high) / bend).clamp(-0.5, 0.5)
    shift = at + fine
    return torch.where(shift > width / 2, shift - width, shift).squeeze(-1)


def frechet(a: Tensor, b: Tensor, most: int = MAX_FEATURES) -> float:
    """Frechet distance between Gaussians fitted to features [N, D] and [M, D]: |mean|^2 + tr(A + B - 2 (A B)^1/2).

    Float64; the root is taken of the symmetric A^1/2 B A^1/2, so rank-deficient covariances are no problem. D is at
    most `most`. Small samples bias it upwards: compare only equal sizes. Source: Heusel et al. 1706.08500, eq. 6.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] > most:
            raise ValueError(f"features {name} are {tuple(x.shape)}; needed is [at least 2, at most {most}]")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"features {name} are not finite")
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def sync(a: Tensor, b: Tensor, reach: int = 5) -> tuple[float, int]:
    """Correlation of curves [B, T], averaged over the clips, at the shift where it is best, and that shift in frames.

    A positive shift: `a` comes later than `b`. Curves that do not change count 0. Source: SyncNet's score and offset.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] < 3 * reach:
        raise ValueError(f"sync compares curves of one shape [B, T >= {3 * reach}], got {a.shape} and {b.shape}")
    n, found = a.shape[1], []
    for lag in range(-reach, reach + 1):
        pair = a[:, reach + lag : n - reach + lag].double(), b[:, reach : n - reach].double()
        x, y = (v - v.mean(1, keepdim=True) for v in pair)
        size = (x.square().sum(1) * y.square().sum(1)).sqrt()
        r = torch.where(size > 1e-9, (x * y).sum(1) / size.clamp_min(1e-9), torch.zeros_like(size))
        found.append((float(r.mean()), -abs(lag), lag))
    best = max(found)
    return best[0], best[2]


def pace(a: Tensor, b: Tensor) -> float:
    """Mean step from frame to frame of curves `a` [B, T], over that of `b`; nan where `b` stands still."""
    return ratio(float(a.diff(dim=1).abs().mean()), float(b.diff(dim=1).abs().mean()))


def balanced_accuracy(predicted: Tensor, true: Tensor, classes: int) -> float:
    """Mean over the classes that occur of the share recognised; labels below 0 do not count, nan if none is left."""
    shares = []
    for c in range(classes):
        own = true == c
        if bool(own.any()):
            shares.append(float((predicted[own] == c).double().mean()))
    return sum(shares) / len(shares) if shares else math.nan


def ratio(value: float, reference: float) -> float:
    """`value` over `reference`; nan where there is nothing to compare with."""
    return value / reference if reference else math.nan


def drift(values: Tensor, frames: int) -> float:
    """Mean of the last `frames` of a curve [..., T] over the mean of its first: 1 for a stream that keeps its level."""
    if not 1 <= frames <= values.shape[-1]:
        raise ValueError(f"drift compares the first and last {frames} frames of {values.shape[-1]}")
    return ratio(float(values[..., -frames:].double().mean()), float(values[..., :frames].double().mean()))


def curve(values: Tensor, frames: int) -> list[float]:
    """Means of [..., T] over successive windows of `frames`; a shorter rest is left out."""
    if not 1 <= frames <= values.shape[-1]:
        raise ValueError(f"windows of {frames} frames do not fit a curve of {values.shape[-1]}")
    count = values.shape[-1] // frames
    binned = values[..., : count * frames].double().unflatten(-1, (count, frames)).mean(-1)
    return [float(v) for v in binned.reshape(-1, count).mean(0)]
