"""`vidistill serve --env`: a real environment behind the page, and what is kept of what people play."""

import itertools
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_env
from fake_world import served, wait_until, watching
from websockets.sync.client import connect

from vidistill.cli.main import main
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.data.importers.gym import GymConfig, replay
from vidistill.serve.environment import ORDER, Real
from vidistill.worlds.futures import true_future

ENV = ("--env", "tiny_env:Tiny-v0", "--size", "24x24", "--repeat", "2")


@pytest.fixture
def real(tmp_path):
    """Opens a tiny world as the command line does."""
    from vidistill.cli.main import parser

    def opened(*options, out=tmp_path / "out"):
        args = parser().parse_args(["serve", *ENV, *options])
        args.policy = "random"
        return Real.of(args, out)

    return opened


def played(session, *script):
    """The frames of a session while (action, frames) are held one after the other."""
    out, frames = [], session.frames()
    for action, count in script:
        session.set(action=action)
        out += [frame.px for frame in itertools.islice(frames, count)]
    return np.stack(out)


def test_what_was_played_comes_back_from_its_seed_and_actions(real, tmp_path):
    world = real()
    session = world.world().open(0, None)
    first = played(session, ({}, 4), ({"right": 1}, 20), ({"left": 1}, 8))
    session.reset(seed=5)
    second = played(session, ({"left": 1}, 18))
    session.close()
    clips = Clips(tmp_path / "out" / "train")
    assert [clip["seed"] for clip in clips.meta["described"]] == [0, 5]
    for i, seen in enumerate((first, second)):
        actions, kept = clips.episode("actions", i).numpy(), clips.episode("frames", i).numpy()
        assert np.array_equal(kept, seen)
        assert np.array_equal(replay(build(GymConfig, clips.meta["config"]), (0, 5)[i], actions), seen)
        assert np.array_equal(true_future(clips.meta, clips.meta["described"][i], actions), seen)
    assert not np.array_equal(first[4], first[23])  # it went somewhere
    assert world.finish() == [f"{tmp_path / 'out'}: 2 episodes"]


def test_an_episode_that_ends_is_kept_and_the_next_one_begins(real, tmp_path):
    session = real("--option", "ends=40").world().open(0, None)
    frames = list(itertools.islice(session.frames(), 21 * 4 + 3))
    session.close()
    assert [frame.index for frame in frames] == list(range(len(frames)))
    kept = [(split, Clips(tmp_path / "out" / split)) for split in ("train", "validation", "test")]
    assert [(s, len(c), [d["seed"] for d in c.meta["described"]]) for s, c in kept] == [
        ("train", 2, [0, 1]),
        ("validation", 1, [2]),
        ("test", 1, [3]),
    ]  # three frames of a fifth are too few
    assert all(len(c.episode("frames", 0)) == 21 for _, c in kept)
    assert set(ORDER) == {"train", "validation", "test"}


def test_nothing_is_kept_where_nothing_is_asked_for_and_a_limit_ends_an_episode(real, tmp_path):
    session = real(out=None).world().open(0, None)
    played(session, ({"right": 1}, 20))
    session.close()
    assert not (tmp_path / "out").exists()
    session = real("--frames", "20").world().open(0, None)
    played(session, ({"right": 1}, 45))
    session.close()
    assert Clips(tmp_path / "out" / "train").lengths("frames") == [20, 20]


def test_more_is_added_later_but_not_of_other_settings(real, tmp_path):
    for _ in range(2):
        session = real().world().open(0, None)
        played(session, ({"right": 1}, 20))
        session.close()
    assert [d["seed"] for d in Clips(tmp_path / "out" / "train").meta["described"]] == [0, 1]
    with pytest.raises(ValueError, match=r"config|px_size"):
        real("--size", "32x32")


def test_a_full_disk_ends_the_stream_and_keeps_what_was_there(real, tmp_path, monkeypatch):
    session = real().world().open(0, None)
    played(session, ({"right": 1}, 20))
    session.reset(seed=1)
    played(session, ({"right": 1}, 20))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidistill.data.importers.write.write_shard", full)
    with pytest.raises(OSError, match="No space"):
        session.close()
    assert len(Clips(tmp_path / "out" / "train")) == 1


def test_values_that_no_key_gives_are_refused(real):
    session = real(out=None).world().open(0, None)
    for wrong in ({"up": 1}, {"left": 2}, None, [1]):
        with pytest.raises(ValueError, match="action"):
            session.set(action=wrong)
    session.close()


def test_the_page_is_told_what_it_shows_and_drives_it(real, tmp_path):
    world = real()
    with served(SimpleNamespace(world=world.world())) as app, watching(app) as browser:
        browser.side = 24
        hello = browser.note("hello")
        assert "tiny_env:Tiny-v0 itself" in hello["about"]
        assert hello["takes"]["action"] == {
            "kind": "hold",
            "names": ["left", "right"],
            "keys": {"left": ["a"], "right": ["d"]},
        }
        assert hello["starts"] is None
        browser.set(1, action={"right": 1})
        first, _ = browser.frame(lambda header: header["input_id"] == 1)
        browser.frame(lambda header: header["index"] == first["index"] + 20)
    wait_until(lambda: not world.open)
    actions = Clips(tmp_path / "out" / "train").episode("actions", 0)
    assert actions[first["index"] + 1 :].tolist() == [[0, 1]] * (len(actions) - first["index"] - 1)


def test_the_command_stores_what_was_played_when_it_is_stopped(tmp_path):
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from vidistill.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    args = ["serve", *ENV, "--port", "0", "--record", str(tmp_path / "out")]
    helpers = Path(tiny_env.__file__).parent  # where an environment of one's own lies
    with subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=helpers, stdout=subprocess.PIPE, text=True
    ) as server:
        address = next(word for word in server.stdout.readline().split() if word.startswith("http"))
        assert urllib.request.urlopen(address).status == 200
        with connect(address.replace("http", "ws") + "stream") as socket:
            for k, message in enumerate(m for m in socket if isinstance(m, bytes)):
                socket.send(f'{{"type": "seen", "sequence": {int.from_bytes(message[4:8], "little")}}}')
                if k == 20:
                    break
            server.send_signal(signal.SIGINT)
            said, _ = server.communicate(timeout=60)
    assert "1 episodes" in said
    assert Clips(tmp_path / "out" / "train").lengths("frames")[0] >= 17


@pytest.mark.parametrize(
    "args, says",
    [
        ((), "name a student"),
        (("doom", *ENV), "name a student"),
        (("doom", "--record", "out"), "--env"),
        (("--env", "tiny_env:Deaf-v0"), "rgb_array"),
        (("--env", "Nowhere-v9"), "--env Nowhere-v9"),
    ],
)
def test_what_cannot_be_served_is_said(args, says, capsys):
    assert main(["serve", *args]) == 1
    assert says in capsys.readouterr().err
