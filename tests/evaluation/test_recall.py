"""What a clip shows again is found by planted cases: frames of known pictures along known poses."""

import math

import pytest
import torch

from vidistill import metrics
from vidistill.evaluation.recall import apart, false_recall, likeness, nearest, returns, snaps

PICTURES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)).round()
PICTURES = PICTURES[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)


def clip(*shown):
    return PICTURES[list(shown)][None]


def poses(*places):
    """Along a line, all in one direction."""
    return torch.tensor([[x, 0.0, 0.0] for x in places])[None]


def test_likeness_is_psnr_of_blocks():
    px = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    means = metrics.blocks(px, 4)
    expected = metrics.psnr(means[:, :, None], means[:, None])
    off = ~torch.eye(5, dtype=torch.bool)
    assert torch.allclose(likeness(px)[:, off], expected[:, off], atol=1e-3)
    assert (likeness(px)[:, ~off] > 60).all()


def test_poses_are_apart_by_place_or_by_direction():
    walk = torch.tensor([[[0.0, 0, 0], [0.9, 0, 0], [1.1, 0, 0], [0, 0, 0.7], [0, 0, 0.8], [0, 0, 2 * math.pi + 0.1]]])
    assert apart(walk)[0, 0].tolist() == [False, False, True, False, True, False]


def test_a_frame_returns_if_it_shows_again_what_it_had_left_from_elsewhere():
    true, walk = likeness(clip(0, 1, 2, 3, 4)), poses(0, 1.5, 3, 4.5, 6)
    assert returns(true, true, walk).tolist() == [[False] * 5]
    assert returns(likeness(clip(0, 1, 2, 0, 4)), true, walk).tolist() == [[False, False, False, True, False]]
    assert returns(likeness(clip(0, 1, 2, 1, 2)), true, walk).tolist() == [[False, False, False, True, True]]
    assert not returns(likeness(clip(0, 1, 1, 1, 1)), true, walk).any()  # stuck, which is another fault
    assert not returns(likeness(clip(0, 1, 2, 0, 4)), true, poses(0, 1.5, 3, 0, 6)).any()  # it is back
    assert not returns(*[likeness(clip(0, 1, 2, 0, 4))] * 2, walk).any()  # so it looks in real video


def test_a_snap_is_a_fall_back_to_the_first_picture_alone():
    true = likeness(clip(0, 1, 2, 3, 4))
    assert snaps(likeness(clip(0, 1, 2, 0, 0)), true).tolist() == [[False, False, False, True, True]]
    assert not snaps(likeness(clip(0, 1, 2, 1, 2)), true).any()
    assert not snaps(likeness(clip(0, 0, 0, 0, 0)), true).any()


def test_false_recall_counts_frames_from_elsewhere_that_show_the_start():
    true, walk = likeness(clip(0, 1, 2, 3, 4)), poses(0, 0.5, 3, 4.5, 6)
    assert false_recall(true, true, walk).tolist() == [0.0]
    assert false_recall(likeness(clip(0, 0, 0, 3, 4)), true, walk).tolist() == [pytest.approx(1 / 3)]
    assert false_recall(likeness(clip(0, 0, 0, 0, 0)), true, walk).tolist() == [1.0]
    assert false_recall(true, true, poses(0, 0, 0, 0, 0)).isnan().all()  # nobody went anywhere


def test_the_nearest_frame_is_by_place_and_heading_and_of_what_is_known():
    walk = torch.tensor([[[0.0, 0, 0], [0, 0, 1.6], [2, 0, 1.6], [2, 0, 0], [0.2, 0, 0.1], [2, 0, 0.2]]])
    assert nearest(walk, torch.tensor([3]))[0].tolist() == [0, 1, 2, 0, 0, 2]
    assert nearest(walk, torch.tensor([4]))[0].tolist() == [0, 1, 2, 3, 0, 3]
