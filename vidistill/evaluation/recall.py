"""What a clip shows again: of pictures alone, or although the camera has gone elsewhere."""

import math

import torch
from torch import Tensor

from vidistill import metrics

BLOCK = 4  # px; what is alike up to details and a shift of a pixel is the same picture
ELSEWHERE = 1.0  # map units / 64 between two places
HALF_VIEW = math.radians(42)  # between two headings that have half a picture in common
RECALL_DB = 6.0  # by which a frame is nearer to an earlier one than in real video, and than before
ALIKE_DB = 20.0  # of two pictures that show the same


def likeness(px: Tensor) -> Tensor:
    """PSNR [B, T, T] in dB of every frame of clips px [B, T, 3, H, W] with every other, of means of blocks."""
    x = metrics.blocks(px, BLOCK).flatten(2)
    size = x.square().sum(-1)
    return metrics.decibels((size[:, :, None] + size[:, None] - 2 * x @ x.mT).clamp_min(0) / x.shape[-1])


def apart(poses: Tensor) -> Tensor:
    """Whether [B, T, T] two frames of walks, poses [B, T, 3], are seen from two places or in two directions."""
    angle = (poses[:, :, None, 2] - poses[:, None, :, 2] + math.pi) % (2 * math.pi) - math.pi
    return (torch.cdist(poses[..., :2], poses[..., :2]) > ELSEWHERE) | (angle.abs() > HALF_VIEW)


def recalled(own: Tensor, true: Tensor) -> Tensor:
    """Whether frames are alike that are not in real video, by likeness of both."""
    return (own > ALIKE_DB) & (own - true > RECALL_DB)


def returns(own: Tensor, true: Tensor, poses: Tensor) -> Tensor:
    """Whether frames [B, T] show again a picture of before that they had left, although the pose is another one.

    own, true: likeness [B, T, T] of the frames of a clip, and of real video along the same poses [B, T, 3].
    """
    earlier = torch.ones_like(own[0], dtype=torch.bool).tril(-1)
    left = own.masked_fill(~earlier, math.inf).cummin(1).values  # how unlike a frame the clip has become since
    return (recalled(own, true) & apart(poses) & earlier & (own - left > RECALL_DB)).any(-1)


def snaps(own: Tensor, true: Tensor) -> Tensor:
    """Whether frames [B, T] fall back to the start picture that they had left, where real video does not."""
    own, true = own[:, :, 0], true[:, :, 0]
    left = own.masked_fill(torch.arange(own.shape[1]) == 0, math.inf).cummin(1).values
    return recalled(own, true) & (own - left > RECALL_DB)


def false_recall(own: Tensor, true: Tensor, poses: Tensor) -> Tensor:
    """Share [B] of the frames seen from elsewhere that show the start picture; nan where the walker stays."""
    gone = apart(poses)[:, :, 0] & (true[:, :, 0] < ALIKE_DB)
    return (recalled(own, true)[:, :, 0] & gone).sum(1) / gone.sum(1).double().masked_fill(~gone.any(1), math.nan)


def nearest(poses: Tensor, known: Tensor) -> Tensor:
    """For every frame [B, T] of walks, poses [B, T, 3], the one of its first `known` [B] that was seen from nearest.

    A half view counts as much as the least distance between two places.
    """
    angle = (poses[:, :, None, 2] - poses[:, None, :, 2] + math.pi) % (2 * math.pi) - math.pi
    far = torch.cdist(poses[..., :2], poses[..., :2]) / ELSEWHERE + angle.abs() / HALF_VIEW
    later = torch.arange(poses.shape[1]) >= known[:, None]
    return far.masked_fill(later[:, None], math.inf).argmin(-1)
