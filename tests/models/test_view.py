"""Tokens placed by the direction they look in: geometry, what data and streams tell of the heading, long streams."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ACTIONS, DIT

from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import Condition, walked
from vidistill.conditioning.controls import LiveConditions, WorldConfig
from vidistill.models.layers import SiteConfig
from vidistill.ops.rope import Panorama, axis_split, rope_table, rotate, view_table
from vidistill.record import Record
from vidistill.training.on_policy import LongRollout

CAMERA = CameraConfig(step=0.15, turn=0.1, sites=("view",))
WIDE = Panorama(84.0, 8)
HEAD = 56


def turned(x, column, heading):
    """`x` [d] of a token in `column` of a frame whose camera looks to `heading`."""
    at = rope_table(torch.tensor([[0.0, 0.0, column]]), HEAD, panorama=WIDE)
    return rotate(rotate(x[None, None, None], view_table(torch.tensor([[heading]]), 1, HEAD, WIDE)), at)[0, 0, 0]


def test_what_stays_in_place_keeps_its_angle_when_the_camera_turns():
    x = torch.randn(HEAD, generator=torch.Generator().manual_seed(0))
    right = float(WIDE.direction(torch.tensor(5.0)))  # seen in column 5 by a camera that looks ahead
    assert right == pytest.approx(math.atan(0.375 * math.tan(math.radians(42))))
    torch.testing.assert_close(turned(x, 5.0, 0.0), turned(x, 3.5, -right))  # in the middle after a turn to the right
    assert (turned(x, 5.0, 0.0) - turned(x, 5.0, 0.3)).abs().max() > 0.1


def test_frequencies_are_rising_whole_turns_up_to_half_a_turn_a_column():
    found = WIDE.frequencies(axis_split(HEAD)[2] // 2)
    assert found[0] == 1 and (found.diff() > 0).all() and torch.equal(found, found.round())
    assert float(found[-1]) == pytest.approx(math.pi / (2 * math.tan(math.radians(42)) / 8), abs=1)


def test_a_heading_turns_columns_alone():
    table = view_table(torch.tensor([[0.7]]), 3, HEAD, WIDE)
    assert table.shape == (2, 1, 3, 1, HEAD // 2)
    still = HEAD // 2 - axis_split(HEAD)[2] // 2
    assert (table[0, ..., :still] == 1).all() and not table[1, ..., :still].any() and table[1, ..., still:].all()


def test_a_camera_tells_what_it_is_asked_to_tell():
    poses = torch.tensor([[[1.0, 2.0, 0.5], [1.5, 2.0, 0.9], [1.5, 2.0, 0.9 + 2 * math.pi]]])
    told = walked(poses, CAMERA, 4)
    assert set(told) == {"view"} and CAMERA.dims == {"view": 1}
    torch.testing.assert_close(told["view"][0, :, 0], torch.tensor([0.0, 0.4, 0.4]))
    with pytest.raises(ValueError, match=r"camera\.sites"):
        CameraConfig(step=1.0, turn=1.0, sites=("elsewhere",))


def turning():
    """What a network that is told its heading gets while a key turns it to the left."""
    dit = replace(DIT, grid=(2, 2), fov=84.0, sites={"modulation": SiteConfig(17), "view": SiteConfig(1)})
    world = WorldConfig(actions=ACTIONS, camera=CAMERA)
    inputs = LiveConditions.of(Record("student", dit=dit, world=world), 4, "cpu")
    inputs.set({"action": {"turn_left": 1.0}})
    return inputs


def test_a_stream_tells_the_heading_that_its_keys_ask_for():
    inputs = turning()
    parts = [inputs.condition(inputs.control, lo, hi).per_frame["view"][0, :, 0] for lo, hi in ((0, 1), (1, 4))]
    torch.testing.assert_close(torch.cat(parts), torch.tensor([0.0, 0.4, 0.8, 1.2]))


def test_a_camera_stays_where_it_is_while_time_passes_unseen():
    inputs = turning()
    before = [inputs.condition(inputs.control, lo, hi).per_frame["view"] for lo, hi in ((0, 1), (1, 4))]
    inputs.skip(300)
    after = inputs.condition(inputs.control, 304, 307).per_frame["view"]
    torch.testing.assert_close(after, before[1] + 1.2)


def test_a_null_condition_keeps_the_heading():
    cond = Condition(per_frame={"view": torch.ones(2, 3, 1), "modulation": torch.ones(2, 3, 17)})
    for null in (cond.null(), cond.drop(torch.tensor([False, False]))):
        assert null.per_frame["view"].all() and not null.per_frame["modulation"].any()


def test_a_continued_stream_goes_on_from_its_heading():
    heading = torch.tensor([0.0, 0.1, 0.2, 0.3])[None, :, None]
    stream = LongRollout.__new__(LongRollout)
    stream.cond = Condition(per_frame={"view": heading + 2.0})
    told = stream.next_condition(Condition(per_frame={"view": heading}), 2).per_frame["view"]
    torch.testing.assert_close(told[0, :, 0], torch.tensor([2.4, 2.5]))
