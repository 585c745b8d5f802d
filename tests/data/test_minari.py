"""`vidistill data minari`: data sets written by Minari itself."""

import gymnasium
import minari
import numpy as np
import pytest
import tiny_env  # noqa: F401 - registers the world
from gymnasium import spaces

from vidistill.cli.main import main
from vidistill.data.clips import Clips
from vidistill.data.importers.gym import resized


class Seen(gymnasium.ObservationWrapper):
    """Observes the picture, beside what the world observes if `both`."""

    def __init__(self, env, both=False):
        super().__init__(env)
        picture = spaces.Box(0, 255, (48, 72, 3), np.uint8)
        self.both = both
        self.observation_space = spaces.Dict({"place": env.observation_space, "camera": picture}) if both else picture

    def observation(self, observation):
        return (
            {"place": observation.astype(np.float32), "camera": self.env.render()} if self.both else self.env.render()
        )


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Records episodes of the tiny world with Minari; returns their actions."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def record(name, episodes=4, steps=20, both=False, seen=True):
        env = gymnasium.make("tiny_env:Tiny-v0", render_mode="rgb_array")
        collector = minari.DataCollector(Seen(env, both) if seen else env)
        rng, actions = np.random.default_rng(0), []
        for k in range(episodes):
            collector.reset(seed=k)
            drawn = rng.integers(0, 3, steps)
            actions.append(drawn)
            for action in drawn:
                collector.step(int(action))
        collector.create_dataset(dataset_id=name)
        collector.close()
        return actions

    return record


def run(out, source, *options):
    return main(["data", "minari", str(out), "--from", source, "--size", "24x24", "--split", "0.5,0.25,0.25", *options])


@pytest.mark.parametrize("both", [False, True])
def test_pictures_and_actions_are_those_that_minari_holds(tmp_path, recorded, both):
    actions = recorded("tiny/seen-v0", both=both)
    assert (
        run(tmp_path / "out", "tiny/seen-v0", *(["--observation", "camera"] if both else []), "--names", "noop,l,r")
        == 0
    )
    seen = set()
    for split in ("train", "validation", "test"):
        clips = Clips(tmp_path / "out" / split)
        assert clips.meta["actions"] == ["l", "r"]
        for i, clip in enumerate(clips.meta["described"]):
            k = clip["episode"]
            seen.add(k)
            assert (
                clips.episode("actions", i)[1:].argmax(-1).add(1).mul(clips.episode("actions", i)[1:].amax(-1)).tolist()
                == actions[k].tolist()
            )
            episode = next(iter(minari.load_dataset("tiny/seen-v0").iterate_episodes([k])))
            px = episode.observations["camera"] if both else episode.observations
            assert np.array_equal(
                clips.episode("frames", i).numpy(), np.stack([resized(x, (24, 24), "stretch") for x in px])
            )
    assert seen == {0, 1, 2, 3}


def test_what_cannot_be_read_is_said(tmp_path, recorded, capsys):
    recorded("tiny/blind-v0", episodes=1, seen=False)
    recorded("tiny/both-v0", episodes=1, both=True)
    cases = (
        ("nowhere-v0", (), "no Minari data set here"),
        ("tiny/blind-v0", (), "no pictures uint8"),
        ("tiny/both-v0", (), "--observation"),
        ("tiny/both-v0", ("--min-frames", "99"), "no episode of 99 frames"),
        ("tiny/both-v0", ("--split", "1,1,1"), "--split"),
    )
    for k, (source, options, says) in enumerate(cases):
        assert run(tmp_path / f"out{k}", source, *options) == 1
        assert says in capsys.readouterr().err
