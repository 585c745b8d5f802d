"""Actions and poses: they turn into each other exactly, at every rate, whatever the walls do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vidistill.conditioning.camera import (
    MOVES,
    PLANAR,
    RELIC,
    CameraConfig,
    Pose,
    euler,
    integrate,
    latent_rate,
    moves,
    numbers,
    origin,
    planar,
    pose_of,
    relative,
    rows_of,
    signed,
    walk_of,
    wanted,
)
from vidistill.conditioning.condition import walked
from vidistill.config import build

DOOM = CameraConfig(step=9.375 / 64, turn=np.radians(5.625))
FREE = replace(DOOM, actions=RELIC)


def random_moves(frames=60, batch=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, frames, 6, generator=rng, dtype=torch.float64) - 0.5) * FREE.units


def error(a: Pose, b: Pose):
    return max(float((a.position - b.position).abs().max()), float((a.rotation - b.rotation).abs().max()))


def test_actions_and_poses_turn_into_each_other():
    moved = random_moves()
    pose = integrate(moved)
    whole = Pose(torch.cat((origin(2).position, pose.position), 1), torch.cat((origin(2).rotation, pose.rotation), 1))
    assert (moves(whole)[:, 1:] - moved).abs().max() < 1e-9
    actions = relative(moved, FREE, 1)
    assert actions.shape == (2, 60, 13) and actions.min() >= 0
    assert error(integrate(signed(actions.double(), FREE, 1)), pose) < 1e-4  # float32 actions
    assert error(integrate(moves(whole)), whole) < 1e-9


def joined(start: Pose, pose: Pose):
    return Pose(*(torch.cat(parts, 1) for parts in zip(start, pose, strict=True)))


def test_recorded_rows_of_a_free_camera_give_their_poses_back_through_moves():
    first = integrate(random_moves(frames=1, seed=1))  # neither at the origin nor level
    rows = rows_of(joined(first, integrate(random_moves(), first)))
    pose = pose_of(rows)
    assert rows.shape == (2, 61, 12) and torch.equal(rows_of(pose), rows)
    assert error(integrate(moves(pose)[:, 1:], first), Pose(pose.position[:, 1:], pose.rotation[:, 1:])) < 1e-9
    assert torch.allclose(moves(pose_of(rows.float())), moves(pose), atol=1e-5)


@pytest.mark.parametrize(("up", "pitch", "names"), [(1, 1, ("up", "look_up")), (-1, -1, ("down", "look_down"))])
def test_a_clip_that_moves_up_or_down_and_pitches_is_told_so_and_nothing_else(up, pitch, names):
    moved = torch.zeros(1, 5, 6, dtype=torch.float64)
    moved[..., 2], moved[..., 4] = up * FREE.step, pitch * FREE.turn
    clip = rows_of(joined(origin(1), integrate(moved))).float()
    told = walked(clip, FREE, 1)["hidden"][0]
    want = torch.zeros(6, 13)
    want[1:, [RELIC.index(name) for name in names]] = 1
    want[0, RELIC.index("static")] = 1
    torch.testing.assert_close(told, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cfg", [DOOM, FREE], ids=["planar", "free"])
def test_a_walk_is_told_the_same_in_either_layout(cfg):
    cfg = replace(cfg, sites=("hidden", "qk", "view"))
    walk = torch.rand(2, 7, 3, dtype=torch.float64)
    flat, full = walked(walk, cfg, 4), walked(rows_of(planar(walk)), cfg, 4)
    assert flat.keys() == full.keys() == {"hidden", "qk", "view"}
    assert all(torch.equal(flat[site], full[site]) for site in flat)


@pytest.mark.parametrize("cfg", [DOOM, FREE], ids=["planar", "free"])
def test_random_poses_have_the_layout_of_their_camera(cfg):
    poses = cfg.wander(2, 9)
    assert poses.shape == (2, 9, 3 if cfg.planar else 12) and poses.dtype == torch.float32
    rotation = pose_of(poses).rotation
    eye = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    assert torch.allclose(rotation @ rotation.transpose(-1, -2), eye, atol=1e-5)
    assert (walked(poses, cfg, 1)["hidden"][..., :-1].amax((0, 1)) > 0).all()  # every move occurs


def test_rows_of_neither_layout_are_refused_with_both():
    with pytest.raises(ValueError, match=r"3 numbers .* or 12 .* got 7"):
        pose_of(torch.zeros(2, 4, 7))


@pytest.mark.parametrize("name", [*MOVES, "static"])
def test_each_direction_has_a_number_of_its_own(name):
    moved = torch.zeros(1, 6, dtype=torch.float64)
    if name in MOVES:
        axis, sign = MOVES[name]
        moved[0, axis] = sign * FREE.units[axis]
    actions = relative(moved, FREE, 1)[0]
    assert actions[RELIC.index(name)] == 1 and actions.sum() == 1
    assert torch.allclose(signed(actions[None].double(), FREE, 1), moved)


def test_forward_goes_where_the_camera_looks_and_left_turns_counter_clockwise():
    quarter = torch.tensor(
        [[0.0, 0, 0, np.pi / 2, 0, 0], [2.0, 0, 0, 0, 0, 0], [0.0, 1, 0, 0, 0, 0]], dtype=torch.float64
    )
    x, y, heading = walk_of(integrate(quarter)).unbind(-1)
    assert torch.allclose(
        torch.stack((x, y)), torch.tensor([[0.0, 0, -1], [0.0, 2, 2]], dtype=torch.float64), atol=1e-6
    )
    assert torch.allclose(heading, torch.full((3,), torch.pi / 2, dtype=torch.float64))
    up = integrate(torch.tensor([[0.0, 0, 0, 0, 0.3, 0], [1.0, 0, 0, 0, 0, 0]]))
    assert up.position[1, 2] > 0


def test_a_speed_gain_scales_the_path_and_leaves_the_turns():
    rng = torch.Generator().manual_seed(0)
    keys = torch.rand(1, 40, 4, generator=rng)
    names = ("turn_left", "turn_right", "forward", "backward")
    one, two = (integrate(wanted(keys, names, DOOM, gain)) for gain in (1.0, 2.0))
    assert torch.allclose(two.position, 2 * one.position) and torch.equal(two.rotation, one.rotation)


def test_keys_held_in_the_open_lead_where_the_engine_leads():
    """Five seconds of turning while walking, then of walking: what the keys ask for is where the walker gets."""
    pytest.importorskip("vizdoom")
    from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig, replay

    keys = np.zeros((41, 4), np.float32)
    keys[1:25, 0], keys[1:25, 2] = 1, 0.4
    walk = replay(DoomConfig(size=64, supersample=3), 3, keys)
    true = planar(torch.from_numpy(walk.poses))
    start = Pose(true.position[:1], true.rotation[:1])
    asked = wanted(torch.from_numpy(keys[1:]), ACTIONS, replace(DOOM, early=0.75))
    naive = wanted(torch.from_numpy(keys[1:]), ACTIONS, DOOM)
    got, off = (float((integrate(m, start).position[-1] - true.position[-1]).norm()) for m in (asked, naive))
    assert got < 0.02 and off > 2 * got


def test_latents_compose_the_motion_of_their_frames():
    moved = random_moves(frames=48)
    at_latents, pose = latent_rate(moved, 4)
    every = integrate(moved)
    assert torch.equal(pose.position, every.position[:, 3::4])
    assert error(integrate(at_latents), pose) < 1e-9
    summed = integrate(moved.unflatten(1, (12, 4)).sum(2))
    assert error(summed, pose) > 1e-3  # adding up displacements of a turning camera is not the same


def test_a_stream_that_goes_on_equals_one_that_is_integrated_at_once():
    moved, pose, parts = random_moves(frames=24), None, []
    for piece in moved.split(12, dim=1):
        step, path = latent_rate(piece, 4, pose)
        pose = Pose(path.position[:, -1:], path.rotation[:, -1:])
        parts.append(step)
    assert torch.allclose(torch.cat(parts, 1), latent_rate(moved, 4)[0], atol=1e-12)


def test_numbers_of_a_pose_tell_places_apart_and_say_the_same_again():
    poses = planar(torch.tensor([[0.0, 0, 0], [3.0, 1, 1], [0.2, 0, 0.1], [0.0, 0, 2 * torch.pi]]))
    told = numbers(poses, DOOM)
    assert told.shape == (4, DOOM.pose_dim) and (told[:, -1] == 1).all()
    near, far = (told[2] - told[0]).norm(), (told[1] - told[0]).norm()
    assert 0 < near < far and torch.allclose(told[3], told[0], atol=1e-5)
    assert numbers(integrate(random_moves()), FREE).shape == (2, 60, FREE.pose_dim)


def test_turning_by_euler_angles_is_turning_back():
    angles = torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64)
    r = euler(angles)
    assert torch.allclose(r @ r.transpose(-1, -2), torch.eye(3, dtype=torch.float64))


def test_a_walls_answer_is_in_the_action_that_was_realised():
    """Bumping: the wish goes on, the walker does not, and what was realised says so."""
    pytest.importorskip("vizdoom")
    from vidistill.worlds.doom.recorder import DoomConfig, replay

    forward = np.zeros((60, 4), np.float32)
    forward[1:, 2] = 1
    walk = replay(DoomConfig(size=64, supersample=3), 3, forward)
    pose = planar(torch.from_numpy(walk.poses))
    moved = moves(pose)
    start = Pose(pose.position[:1], pose.rotation[:1])
    assert error(integrate(moved[1:], start), Pose(pose.position[1:], pose.rotation[1:])) < 1e-6
    actions = relative(moved, DOOM, 1)
    free, blocked = actions[5], actions[-1]
    assert abs(float(free[0]) - 1) < 0.02 and float(blocked[0]) < 0.5
    asked = integrate(wanted(torch.from_numpy(forward), ("turn_left", "turn_right", "forward", "backward"), DOOM))
    went = (pose.position[-1] - pose.position[0]).norm()
    assert asked.position[-1].norm() > went + 1


@pytest.mark.parametrize(
    ("kw", "message"), [({"actions": ("jump",)}, "jump"), ({"step": 0.0}, "above 0"), ({"still": 1.0}, "still")]
)
def test_impossible_cameras_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        replace(DOOM, **kw)


def test_planar_worlds_use_a_subset_of_the_thirteen_numbers():
    assert set(PLANAR) < set(RELIC) and len(RELIC) == 13 and DOOM.planar and not FREE.planar
    assert build(CameraConfig, {"step": 1.0, "turn": 0.1, "actions": list(RELIC)}).actions == RELIC
