import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vizdoom")

from vidistill.data.types import HELD_OUT_SEED, SPLITS, TEST_SEED
from vidistill.worlds.doom.maps import (
    FRAME_TEXTURE,
    LAYOUTS,
    PALETTE_SIZE,
    centre_texture,
    clearance,
    inside,
    make_world,
    texture_mask,
    texture_tones,
)
from vidistill.worlds.doom.recorder import DoomConfig, record, record_many, replay, seeds

CFG = DoomConfig(num_frames=80)
LEFT, RIGHT, FORWARD, BACKWARD = np.eye(4, dtype=np.float32)
IDLE = np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def episodes():
    """Six recorded episodes from one engine."""
    return list(record_many(CFG, range(6)))


def play(seed, *actions):
    return replay(CFG, seed, np.stack([IDLE, *actions]))


def test_episode_has_the_promised_shapes(episodes):
    e = episodes[0]
    assert e.frames.shape == (80, 64, 64, 3) and e.frames.dtype == np.uint8
    assert e.actions.shape == (80, 4) and e.actions.dtype == np.float32 and not e.actions[0].any()
    assert e.poses.shape == (80, 3) and e.poses.dtype == np.float32
    assert json.loads(json.dumps(e.walls)) == e.walls
    assert CFG.fps == 17.5


def test_same_seed_gives_same_bytes_alone_and_in_company(episodes):
    again = record(CFG, 3)
    for name in ("frames", "actions", "poses"):
        assert getattr(again, name).tobytes() == getattr(episodes[3], name).tobytes()
    assert again.walls == episodes[3].walls and again.seed == 3


def test_a_shorter_recording_is_a_prefix(episodes):
    short = record(CFG, 2, num_frames=20)
    assert np.array_equal(short.frames, episodes[2].frames[:20])


def test_different_seeds_differ(episodes):
    assert len({e.frames.tobytes() for e in episodes}) == len(episodes)
    assert len({json.dumps(e.walls) for e in episodes}) == len(episodes)


@pytest.mark.parametrize("seed", [1, 4, 5])
def test_replay_of_recorded_actions_is_bit_for_bit(episodes, seed):
    again = replay(CFG, seed, episodes[seed].actions)
    assert np.array_equal(again.frames, episodes[seed].frames)
    assert np.array_equal(again.poses, episodes[seed].poses)


def test_workers_keep_the_order_and_the_bytes(episodes):
    got = list(record_many(replace(CFG, num_frames=10), range(18), workers=2))
    assert [e.seed for e in got] == list(range(18))
    assert all(np.array_equal(a.frames, b.frames[:10]) for a, b in zip(got, episodes))


def test_standing_still_changes_nothing():
    e = play(0, *[IDLE] * 6)
    assert (e.frames == e.frames[0]).all() and (e.poses == e.poses[0]).all()


def test_left_turn_raises_the_heading_and_moves_the_picture_right():
    left, right = play(0, *[LEFT] * 8), play(0, *[RIGHT] * 8)
    step = np.radians(CFG.turn_degrees)
    assert np.allclose(np.diff(left.poses[:, 2]), step, atol=1e-3)
    assert np.allclose(np.diff(right.poses[:, 2]), -step, atol=1e-3)
    middle = left.frames[:, 32].astype(int)  # rows at eye height
    shift = round(64 * np.tan(step) / (2 * np.tan(np.radians(CFG.fov_degrees / 2))))
    error = {s: np.abs(middle[1, 24 + s : 40 + s] - middle[0, 24:40]).mean() for s in (shift, -shift)}
    assert error[shift] < error[-shift]


def test_forward_moves_along_the_heading_without_momentum():
    e = play(0, FORWARD, FORWARD, IDLE, BACKWARD, 0.5 * FORWARD)
    moves = np.diff(e.poses[:, :2], axis=0) * 64
    ahead = np.array([np.cos(e.poses[0, 2]), np.sin(e.poses[0, 2])])
    assert np.allclose(moves @ ahead, np.array([1, 1, 0, -1, 0.5]) * CFG.speed, atol=0.05)
    assert np.abs(moves @ [-ahead[1], ahead[0]]).max() < 0.05


def test_a_wall_stops_the_walker():
    e = play(0, *[FORWARD] * 150)
    moved = np.linalg.norm(np.diff(e.poses[:, :2], axis=0), axis=1) * 64
    assert moved[0] == pytest.approx(CFG.speed, abs=0.05) and moved[-5:].max() < 0.05
    assert clearance(make_world(CFG.layouts, 0), e.poses[:, :2] * 64).min() > 20


def test_full_turn_shows_the_first_picture_again():
    e = play(1, *[LEFT] * 64)
    assert e.poses[-1, 2] - e.poses[0, 2] == pytest.approx(2 * np.pi, abs=2e-3)
    assert np.abs(e.frames[-1].astype(int) - e.frames[0]).mean() < 2


def test_poses_are_continuous_and_actions_are_balanced(episodes):
    for e in episodes:
        moves = np.diff(e.poses, axis=0)
        assert np.abs(moves[:, :2]).max() * 64 < CFG.speed + 0.1
        assert np.abs(moves[:, 2]).max() < np.radians(CFG.turn_degrees) + 2e-3
    actions = np.concatenate([e.actions[1:] for e in episodes])
    assert ((actions == 0) | (actions == 1)).all()
    assert (actions.mean(0) > 0.005).all() and actions[:, 2].mean() > 0.25
    assert 0.5 < actions[:, 0].mean() / actions[:, 1].mean() < 2


def test_centre_texture_agrees_with_the_picture(episodes):
    right = total = 0
    for e in episodes:
        for t in range(0, 80, 4):
            index, distance = centre_texture(e.walls, e.poses[t])
            assert 0 <= index <= FRAME_TEXTURE and distance < 40
            tones = np.array(texture_tones(index))
            colours = e.frames[t, 30:34, 30:34].reshape(-1, 1, 3).astype(int)
            right += np.abs(colours - tones).sum(-1).min() < 24
            total += 1
    assert right / total > 0.9


def test_wall_pictures_are_distinguishable():
    pictures = []
    for index in range(PALETTE_SIZE + 1):
        main, second = texture_tones(index)
        pictures.append(np.where(texture_mask(index)[::8, ::8, None], main, second).astype(float))
    for a in range(len(pictures)):
        for b in range(a):
            assert np.abs(pictures[a] - pictures[b]).mean() > 12, (a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_closed_and_has_room_for_a_walker(layout):
    for seed in range(20):
        world = make_world((layout,), seed)
        start = np.array(world.start[:2], float)
        assert inside(world, start) and clearance(world, start) > 60
        ends = np.concatenate([world.walls[:, :2], world.walls[:, 2:]])
        _, counts = np.unique(ends, axis=0, return_counts=True)
        assert len(world.walls) >= 8 and counts.max() <= 4


def test_splits_are_disjoint_and_worlds_differ_between_them():
    train, validation, test = (seeds(split, 1000) for split in ("train", "validation", "test"))
    assert max(train) < min(validation) == HELD_OUT_SEED and max(validation) < min(test) == TEST_SEED
    assert seeds("held_out", 1000) == validation  # as older data calls it
    assert max(SPLITS["validation"]) < TEST_SEED
    with pytest.raises(ValueError, match="held_out"):
        seeds("games", 3)
    with pytest.raises(ValueError, match="seeds"):
        seeds("test", 1_000_000)


@pytest.mark.parametrize(
    "change, word", [({"layouts": ("maze",)}, "layouts"), ({"size": 50}, "size"), ({"speed": 99.0}, "speed")]
)
def test_impossible_configs_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        DoomConfig(**change)


def test_replay_refuses_bad_actions():
    with pytest.raises(ValueError, match="0 to 1"):
        replay(CFG, 0, np.full((3, 4), 2.0))
    with pytest.raises(ValueError, match="shape"):
        replay(CFG, 0, np.zeros((3, 2)))
