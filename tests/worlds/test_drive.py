"""The car on its track: what the keys do, who drives, and what is drawn."""

import numpy as np
import pytest

from vidistill.data.importers.gym import GymConfig, is_deterministic, record
from vidistill.worlds.drive import driver, env
from vidistill.worlds.drive.env import KEYS, TOP, make_drive

CFG = GymConfig("vidistill.worlds.drive.env:Drive-v0", policy="vidistill.worlds.drive.driver:drive", num_frames=40)
X, Y, ANGLE, SPEED, YAW, ON_ROAD = range(6)


@pytest.fixture(scope="module")
def drive():
    made = make_drive("rgb_array")
    yield made
    made.close()


def hold(drive, *keys, frames=30, seed=0):
    """What is observed, from the start of a seed, while keys are held."""
    first, _ = drive.reset(seed=seed)
    pressed = np.array([name in keys for name in KEYS], np.int8)
    return np.stack([first, *(drive.step(pressed)[0] for _ in range(frames))])


def test_steering_turns_the_car_to_its_side_at_once(drive):
    straight = hold(drive, "gas")
    left, right = (hold(drive, "gas", side) for side in ("steer_left", "steer_right"))
    assert abs(straight[-1, ANGLE] - straight[0, ANGLE]) < 0.05
    for seen, sign in ((left, 1), (right, -1)):
        turned = sign * (seen[:, ANGLE] - seen[0, ANGLE])
        assert turned[4] > 0.05 and (np.diff(turned)[4:] > 0).all()
    both = hold(drive, "gas", "steer_left", "steer_right")
    assert np.allclose(both, straight)


def test_gas_has_an_end_and_without_it_the_car_comes_to_rest(drive):
    fast = hold(drive, "gas", frames=120)[:, SPEED]
    assert 0.9 * TOP < fast[-1] < TOP + 1 and fast.max() < TOP + 1
    rolling, braked = hold(drive, frames=120, seed=3)[:, SPEED], hold(drive, "brake", seed=3)[:, SPEED]
    assert rolling[0] > 5 and (np.diff(rolling) < 0.05).all() and abs(rolling[-1]) < 0.5
    assert abs(braked[15]) < 0.5 and rolling[15] > 3


def test_cars_start_all_along_the_road_and_at_many_speeds(drive):
    starts = np.stack([drive.reset(seed=seed)[0] for seed in range(12)])
    assert len(np.unique(starts[:, X].round(2))) == 12 and starts[:, SPEED].max() > 15 and starts[:, SPEED].min() < 5


def test_a_seed_brings_its_drive_back_and_the_actions_have_names(drive):
    assert is_deterministic(CFG)
    assert drive.get_action_meanings() == list(KEYS) and len(drive.get_keys_to_action()) == len(KEYS)
    clip = record(CFG, 7)
    assert clip.frames.shape == (40, 64, 64, 3) and clip.actions.shape == (40, 4)


def test_what_is_not_drawn_is_out_of_the_picture(drive, monkeypatch):
    for seed in range(3):
        hold(drive, "gas", "steer_left", frames=10, seed=seed)
        near = drive.render()
        with monkeypatch.context() as patch:
            patch.setattr(env, "SEEN", 300.0)
            assert np.array_equal(drive.render(), near)
        assert near.shape == (128, 128, 3) and near.std() > 10


def driven(drive, seed, frames=100):
    """Keys held [T, 4] and what was observed [T, 6] in an episode of the driver."""
    observation, _ = drive.reset(seed=seed)
    choose, keys, seen = driver.drive(drive, np.random.default_rng([seed, 1])), [], []
    for _ in range(frames):
        keys.append(choose(observation))
        observation, *_ = drive.step(keys[-1])
        seen.append(observation)
    return np.stack(keys), np.stack(seen)


def test_the_driver_keeps_to_the_road_and_does_everything_a_hand_can(drive):
    keys, seen = zip(*(driven(drive, seed) for seed in range(16)), strict=True)
    on_road = [s[:, ON_ROAD].mean() for s in seen]
    assert 0.6 < np.mean(on_road) < 0.97 and min(on_road) < 0.6
    runs = [np.diff(np.flatnonzero(np.r_[True, np.any(k[1:] != k[:-1], 1), True])) for k in keys]
    lengths = np.concatenate(runs)
    assert (lengths <= 2).any() and (lengths >= 24).any()
    held = {tuple(row) for k in keys for row in k}
    assert len(held) >= 8 and (0, 0, 0, 0) in held
