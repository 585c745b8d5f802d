"""`vidistill data gym`: any environment in, episodes with named actions out, and their true futures."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_env import SPACES, TinyEnv

from vidistill.cli.main import main
from vidistill.data.clips import Clips
from vidistill.data.importers import gym
from vidistill.data.importers import write as writing
from vidistill.data.importers.actions import action_map
from vidistill.data.importers.gym import GymConfig, is_deterministic, record, replay, resized
from vidistill.worlds.futures import true_future

FEW = ("--episodes", "3", "--validation", "1", "--test", "1", "--frames", "24", "--workers", "1", "--size", "24x24")


def run(out, *options, env="tiny_env:Tiny-v0"):
    return main(["data", "gym", str(out), "--env", env, *FEW, *options])


def config(**changes):
    return GymConfig("tiny_env:Tiny-v0", **{"size": (24, 24), "num_frames": 24, **changes})


def test_episodes_are_recorded_by_their_seeds(tmp_path, capsys):
    assert run(tmp_path / "a") == 0 and run(tmp_path / "b", "--workers", "2") == 0
    said = capsys.readouterr().out
    assert "15 frames/s, 3 steps a frame; actions left, right" in said and "deterministic: a seed" in said
    a, b = Clips(tmp_path / "a" / "train"), Clips(tmp_path / "b" / "train")
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in ("frames", "actions"))
    assert a.tensors["frames"].shape == (3, 24, 24, 24, 3) and a.meta["actions"] == ["left", "right"]
    assert a.meta["keys"] == {"left": ["a"], "right": ["d"]} and a.meta["fps"] == 15 and a.meta["given"] == 1
    seeds = {
        clip["seed"] for s in ("train", "validation", "test") for clip in Clips(tmp_path / "a" / s).meta["described"]
    }
    assert seeds == {0, 1, 2, 1_000_000, 2_000_000}
    assert (tmp_path / "a" / "sheet.png").is_file()


def test_keys_of_an_action_are_those_that_its_player_holds_together():
    with contextlib.closing(gym.made(config(options={"kind": "ways"}))) as env:
        keys = gym.keys_of(env, gym.actions_of(env, config()))
    assert keys == {
        "up": ["w"],
        "right": ["ArrowRight"],
        "upright": ["w", "ArrowRight"],
        "fire": [" "],
        "uprightfire": [" ", "ArrowRight", "w"],
    }


def test_an_action_leads_to_the_frame_it_is_written_with():
    clip = record(config(repeat=2, num_frames=20, policy="tiny_env:to_the_right"), 3)
    moved = [np.abs(b.astype(int) - a).max() > 0 for a, b in zip(clip.frames, clip.frames[1:], strict=False)]
    assert clip.actions[1:, 1].astype(bool).tolist() == moved and not clip.actions[0].any()


def test_the_true_future_of_other_actions_is_had_on_demand():
    cfg = config(repeat=2)
    clip = record(cfg, 5)
    assert np.array_equal(replay(cfg, 5, clip.actions), clip.frames)
    other = clip.actions.copy()
    other[10:] = [1.0, 0.0]
    future = replay(cfg, 5, other)
    assert np.array_equal(future[:10], clip.frames[:10]) and not np.array_equal(future, clip.frames)
    with pytest.raises(ValueError, match="left, right"):
        replay(cfg, 5, other[:, :1])


def test_a_world_that_is_not_deterministic_is_said(tmp_path, capsys):
    assert run(tmp_path / "out", "--option", "noisy=true") == 0
    assert "not deterministic" in capsys.readouterr().out
    assert not Clips(tmp_path / "out" / "train").meta["deterministic"]
    assert not is_deterministic(config(options={"noisy": True})) and is_deterministic(config())


@pytest.mark.parametrize("kind", ["discrete", "choices", "switches", "box"])
def test_every_kind_of_action_goes_there_and_back(kind):
    space = SPACES[kind]
    named, rng = action_map(space), np.random.default_rng(0)
    space.seed(0)
    for _ in range(40):
        action = space.sample()
        numbers = named.of(action)
        assert numbers.shape == (len(named.names),) and numbers.min() >= 0 and numbers.max() <= 1
        assert np.allclose(named.to_env(numbers), action, atol=1e-6) and space.contains(named.to_env(numbers))
        drawn = named.random(rng)
        assert space.contains(named.to_env(drawn)) and np.allclose(named.of(named.to_env(drawn)), drawn)
    assert np.allclose(named.of(named.to_env(np.zeros(len(named.names), np.float32))), 0) or kind == "discrete"


def test_actions_have_the_names_that_are_asked_for():
    assert action_map(SPACES["box"], ["steer", "gas"]).names == ("steer_minus", "steer_plus", "gas")
    assert action_map(SPACES["discrete"], ["noop", "l", "r"]).names == ("l", "r")
    assert action_map(SPACES["discrete"]).names == ("action0", "action1", "action2")  # none that does nothing is known
    assert action_map(SPACES["choices"]).names == ("choice0_1", "choice0_2", "choice1_1")
    with pytest.raises(ValueError, match="--names must give 2"):
        action_map(SPACES["box"], ["steer"])


def test_rest_is_the_nearest_end_where_an_axis_has_no_zero():
    from gymnasium import spaces

    named = action_map(spaces.Box(np.array([0.5], np.float32), np.array([1.5], np.float32)))
    assert named.names == ("axis0",) and named.to_env(np.zeros(1, np.float32)) == pytest.approx([0.5])
    assert named.to_env(np.ones(1, np.float32)) == pytest.approx([1.5])


def test_pictures_are_cropped_fit_or_stretched_by_areas():
    px = np.zeros((8, 16, 3), np.uint8)
    px[:, 8:] = 200
    assert resized(px, (4, 4), "crop")[:, :, 0].tolist() == [[0, 0, 200, 200]] * 4
    assert resized(px, (4, 4), "stretch")[:, :, 0].tolist() == [[0, 0, 200, 200]] * 4
    assert resized(px, (4, 4), "fit")[:, :, 0].tolist() == [[0] * 4, [0, 0, 200, 200], [0, 0, 200, 200], [0] * 4]
    whole, cut = (
        record(config(size=(48, 72), num_frames=17), 0),
        record(config(size=(40, 64), crop=(8, 0, 8, 0), num_frames=17), 0),
    )
    assert np.array_equal(whole.frames[:, 8:, 8:], cut.frames)


def test_episodes_that_end_keep_what_there_was(tmp_path):
    assert run(tmp_path / "out", "--option", "ends=61") == 0
    clips = Clips(tmp_path / "out" / "train")
    assert clips.lengths("frames") == [22, 22, 22]


def test_sticky_actions_stay_longer_than_random_ones():
    def runs(policy):
        actions = record(config(policy=policy, num_frames=400), 0).actions[1:]
        return (np.abs(np.diff(actions, axis=0)).max(1) > 0).sum()

    assert 0 < runs("sticky") < runs("random") < 120


def test_a_clip_goes_on_with_another_episode_where_one_ends(tmp_path):
    """Each ends after 4 steps, two frames: then its successor's first picture, whatever is held."""
    cfg = config(restart=True, options={"ends": 4}, repeat=3)
    clip = record(cfg, 0)
    assert len(clip.frames) == 24 and np.array_equal(replay(cfg, 0, clip.actions), clip.frames)
    floors = [frame[:2].tobytes() for frame in clip.frames]  # an episode has a floor of its own, the square is below
    assert [floors.index(floor) for floor in floors] == [k - k % 3 for k in range(24)]
    assert record(replace(cfg, restart=False), 0).frames.tolist() == clip.frames[:3].tolist()
    few = ("--option", "ends=1", "--restart", "--min-frames", "24")
    assert run(tmp_path / "out", *few) == 0
    assert Clips(tmp_path / "out" / "train").meta["config"]["restart"] is True


def test_clips_are_encoded_while_they_are_recorded(tmp_path, tiny_codec_path):
    assert run(tmp_path / "out", "--codec", str(tiny_codec_path)) == 0
    clips = Clips(tmp_path / "out" / "train")
    assert clips.tensors["latents"].shape == (3, 6, 4, 6, 6) and clips.tensors["actions"].shape == (3, 6, 9)


def test_a_recording_resumes_and_is_not_mixed_with_another(tmp_path, capsys):
    assert run(tmp_path / "out") == 0 and run(tmp_path / "out") == 0
    assert run(tmp_path / "out", "--repeat", "1") == 1
    assert "config" in capsys.readouterr().err


def test_a_full_disk_costs_no_episode_that_was_written(tmp_path, monkeypatch, capsys):
    real, written = writing.write_shard, []

    def until_full(path, tensors):
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(path)
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", until_full)
        assert run(tmp_path / "out") == 1
    assert "No space left" in capsys.readouterr().err and len(written) == 1
    train = (tmp_path / "out" / "train" / "shard-00000.safetensors").stat().st_mtime_ns
    assert run(tmp_path / "out") == 0
    assert (tmp_path / "out" / "train" / "shard-00000.safetensors").stat().st_mtime_ns == train
    assert [len(Clips(tmp_path / "out" / split)) for split in ("train", "validation", "test")] == [3, 1, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--option", "ends=1"), "ended after 2 frames at most"),
        (("--option", "blank=true"), "renders no picture"),
        (("--option", "kind=endless"), "no bounds"),
        (("--option", "kind=dict"), "actions of kind Dict"),
        (("--option", "colour=red"), "cannot be made"),
        (("--crop", "0,48,0,0"), "--crop 0,48,0,0 leaves nothing"),
        (("--crop", "1,2"), "--crop is TOP,BOTTOM,LEFT,RIGHT"),
        (("--names", "a,b"), "--names must give 3"),
        (("--keys", "jump=Space"), "--keys 'jump=Space'"),
        (("--policy", "greedy"), "--policy 'greedy'"),
        (("--policy", "tiny_env:missing"), "--policy tiny_env:missing"),
        (("--min-frames", "25"), "--min-frames 25"),
    ],
)
def test_what_cannot_be_recorded_is_said(tmp_path, capsys, options, says):
    assert run(tmp_path / "out", *options) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "out" / "train").exists()


@pytest.mark.parametrize(("env", "says"), [("tiny_env:Deaf-v0", "rgb_array"), ("Nowhere-v0", "cannot be made")])
def test_worlds_without_a_picture_are_refused(tmp_path, capsys, env, says):
    assert run(tmp_path / "out", env=env) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "options", "names", "fps"),
    [
        ("CartPole-v1", ("--resize", "fit", "--repeat", "1", "--frames", "17"), ["action0", "action1"], 50),
        ("CarRacing-v3", ("--names", "steer,gas,brake", "--crop", "0,50,0,0", "--frames", "17"),
         ["steer_minus", "steer_plus", "gas", "brake"], 50 / 3),
        ("ale_py:ALE/Breakout-v5", ("--option", "frameskip=1"), ["fire", "right", "left"], 15),
    ],
)  # fmt: skip
def test_worlds_that_are_named_nowhere_are_recorded(tmp_path, env, options, names, fps):
    pytest.importorskip({"CarRacing-v3": "Box2D", "CartPole-v1": "pygame"}.get(env, "ale_py"))
    few = ("--episodes", "1", "--validation", "0", "--test", "0", "--min-frames", "9")
    assert run(tmp_path / "out", *options, *few, env=env) == 0
    clips = Clips(tmp_path / "out" / "train")
    assert clips.meta["actions"] == names and clips.meta["deterministic"] and clips.meta["fps"] == pytest.approx(fps)
    assert clips.episode("frames", 0).float().std() > 5 and (clips.episode("actions", 0)[1:] > 0).any()


def test_a_recorded_game_is_whole_to_its_edges(tmp_path):
    """The paddle of Breakout is at 189 of 210 rows: a square cut from the middle would lose it."""
    pytest.importorskip("ale_py")
    few = ("--size", "70x80", "--episodes", "1", "--validation", "0", "--test", "0")
    assert run(tmp_path / "out", *few, env="ale_py:ALE/Breakout-v5") == 0
    clips = Clips(tmp_path / "out" / "train")
    assert clips.meta["fps"] == 15 and clips.meta["config"]["repeat"] == 1  # 60 on the console, 4 a step
    first = clips.episode("frames", 0)[0].int()  # a third of the rows, half of the columns
    red = (first - torch.tensor([200, 72, 72])).abs().amax(-1) < 40
    assert 4 <= red[63].sum() <= 12 and red[63, 8:72].any()


def test_the_tiny_world_is_a_sound_environment():
    from gymnasium.utils.env_checker import check_env

    env = TinyEnv(render_mode="rgb_array")
    env.observation_space = type(env.observation_space)(0, 64, (2,), np.float64)
    check_env(env, skip_render_check=True)


def test_a_recorded_clip_can_be_asked_for_its_true_future(tmp_path):
    assert run(tmp_path / "out") == 0 and run(tmp_path / "noisy", "--option", "noisy=true") == 0
    clips = Clips(tmp_path / "out" / "test")
    found = true_future(clips.meta, clips.meta["described"][0], clips.episode("actions", 0).numpy())
    assert np.array_equal(found, clips.episode("frames", 0).numpy())
    with pytest.raises(ValueError, match="not deterministic"):
        true_future(Clips(tmp_path / "noisy" / "test").meta, {"seed": 0}, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="source 'videos'"):
        true_future({"source": "videos"}, {}, np.zeros((2, 2)))
