"""`vidistill data lerobot`: data sets written by LeRobot itself (scripts/golden_lerobot.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from vidistill.cli.main import main
from vidistill.data.clips import Clips
from vidistill.data.shards import read_meta

GOLDEN = Path(__file__).parents[1] / "goldens" / "lerobot"
LAYOUTS = ("v2.1", "v3.0")
SPLITS = ("train", "validation", "test")


def run(out, source, *options):
    common = ("--camera", "top", "--size", "48x64", "--min-frames", "5", "--split", "0.6,0.2,0.2")
    return main(["data", "lerobot", str(out), "--from", str(source), *common, *options])


def clips_in(out):
    """Every clip of every split: what is noted of it, its frames, its actions, and the meta of its split."""
    for split in SPLITS:
        if (out / split).is_dir():
            clips = Clips(out / split)
            for i, about in enumerate(clips.meta["described"]):
                yield about, clips.episode("frames", i).numpy(), clips.episode("actions", i).numpy(), clips.meta


def put_in(layout):
    """What LeRobot was given: per episode its task and rows (move, grip, place, grip, x of the block)."""
    told = json.loads((GOLDEN / layout / "put_in.json").read_text())["episodes"]
    return [(episode["task"], np.array(episode["rows"])) for episode in told]


def block_at(frame, red):
    """The first column of the block in a frame."""
    return int((np.abs(frame[24].astype(int) - (red, 220, 60)).sum(-1) < 150).argmax())


@pytest.mark.parametrize("camera, red", [("top", 200), ("observation.images.wrist", 60)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_episode_is_what_lerobot_was_given(tmp_path, layout, camera, red):
    assert run(tmp_path / "out", GOLDEN / layout, "--camera", camera, "--actions", "action,observation.state") == 0
    told, seen = put_in(layout), []
    every = np.concatenate([rows for _, rows in told])
    reach = dict(zip(("move", "grip", "place", "state_grip"), zip(every.min(0), every.max(0), strict=True)))
    for about, frames, actions, meta in clips_in(tmp_path / "out"):
        task, rows = told[about["episode"]]
        seen.append(about["episode"])
        assert about["caption"] == task
        assert meta["actions"] == [
            *("shoulder.pos_minus", "shoulder.pos_plus", "gripper.pos"),
            *("state.shoulder.pos", "state.gripper.pos"),
        ]
        wanted = np.stack(
            (
                np.maximum(rows[:-1, 0] / reach["move"][0], 0),
                np.maximum(rows[:-1, 0] / reach["move"][1], 0),
                (rows[:-1, 1] - reach["grip"][0]) / (reach["grip"][1] - reach["grip"][0]),
                (rows[1:, 2] - reach["place"][0]) / (reach["place"][1] - reach["place"][0]),
                (rows[1:, 3] - reach["state_grip"][0]) / (reach["state_grip"][1] - reach["state_grip"][0]),
            ),
            1,
        )
        assert not actions[0].any()
        assert actions[1:] == pytest.approx(wanted, abs=1e-5)
        assert len(frames) == len(rows)
        for frame, x in zip(frames, rows[:, 4], strict=True):  # the moment of every picture: where the block is
            assert block_at(frame, red) == pytest.approx(round(x * 48), abs=1)
    assert sorted(seen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_frames_a_second_hold_the_mean_of_what_was_done_between_them(tmp_path, layout):
    assert run(tmp_path / "out", GOLDEN / layout, "--fps", "10", "--windows", "slide", "--frames", "6") == 0
    told, count = put_in(layout), 0
    for about, frames, actions, meta in clips_in(tmp_path / "out"):
        _, rows = told[about["episode"]]
        low, high = meta["ranges"]["gripper.pos"]
        picked = about["first"] + 2 * np.arange(6)
        grip = (rows[:, 1] - low) / (high - low)
        assert actions[1:, 2] == pytest.approx((grip[picked[:-1]] + grip[picked[:-1] + 1]) / 2, abs=1e-5)
        assert meta["fps"] == 10
        for frame, x in zip(frames, rows[picked, 4], strict=True):
            assert block_at(frame, 200) == pytest.approx(round(x * 48), abs=1)
        count += 1
    assert count == sum((1 + (len(rows) - 1) // 2) // 6 for _, rows in told)


@pytest.fixture
def copy(tmp_path):
    """Copies a data set, to be damaged."""
    return lambda layout: Path(shutil.copytree(GOLDEN / layout, tmp_path / layout))


def change(root, **values):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_splits_of_a_data_set_are_kept_where_it_holds_some_out(tmp_path, copy):
    root = copy("v2.1")
    change(root, splits={"train": "0:3", "val": "3:4", "test": "4:5"})
    options = ["--camera", "top", "--size", "24x32", "--min-frames", "5"]
    assert main(["data", "lerobot", str(tmp_path / "out"), "--from", str(root), *options]) == 0
    found = [[c["episode"] for c in Clips(tmp_path / "out" / split).meta["described"]] for split in SPLITS]
    assert found == [[0, 1, 2], [3], [4]]
    assert run(tmp_path / "shares", root, "--split", "0.4,0.4,0.2") == 0  # asked for, shares come first
    assert len(Clips(tmp_path / "shares" / "train").meta["described"]) < 3


def test_one_part_of_the_work_after_the_other_gives_the_whole(tmp_path):
    assert run(tmp_path / "whole", GOLDEN / "v3.0") == 0
    for part in ("2/2", "1/2"):
        assert run(tmp_path / "parts", GOLDEN / "v3.0", "--part", part) == 0
    for split in SPLITS:
        one, other = (Clips(tmp_path / name / split) for name in ("whole", "parts"))
        assert one.meta == other.meta
        assert np.array_equal(one.episode("frames", 0), other.episode("frames", 0))


def emptied(path):
    return lambda root: (root / path).write_bytes(b"")


def without(path):
    return lambda root: (root / path).unlink()


DAMAGE = {
    "another layout": ("v3.0", lambda r: change(r, codebase_version="v1.6"), (), "layout v1.6"),
    "no info": ("v3.0", without("meta/info.json"), (), "no LeRobot data set"),
    "info in part": ("v2.1", lambda r: change(r, features={}), (), "--camera top"),
    "unknown camera": ("v3.0", lambda r: None, ("--camera", "left"), "observation.images.wrist"),
    "unknown action": ("v3.0", lambda r: None, ("--actions", "actoin"), "observation.state"),
    "faster than the data": ("v3.0", lambda r: None, ("--fps", "30"), "--fps 30"),
    "shares of two": ("v3.0", lambda r: None, ("--split", "0.5,0.5"), "--split"),
    "no episodes in meta": ("v2.1", emptied("meta/episodes.jsonl"), (), "no episodes"),
    "episodes that are no lines": (
        "v2.1",
        lambda r: (r / "meta/episodes.jsonl").write_text("{"),
        (),
        "episodes.jsonl is missing or damaged",
    ),
    "lengths of another data set": (
        "v2.1",
        lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 7, "tasks": []}'),
        (),
        "meta says 7",
    ),
    "rows missing": ("v2.1", without("data/chunk-000/episode_000002.parquet"), (), "episode_000002.parquet"),
    "rows empty": ("v3.0", emptied("data/chunk-000/file-000.parquet"), (), "file-000.parquet is missing or damaged"),
    "video missing": (
        "v2.1",
        without("videos/chunk-000/observation.images.top/episode_000001.mp4"),
        (),
        "episode_000001.mp4",
    ),
    "video empty": (
        "v3.0",
        emptied("videos/observation.images.top/chunk-000/file-000.mp4"),
        (),
        "the file is empty",
    ),
    "video of another episode": (
        "v2.1",
        lambda r: shutil.copy(
            r / "videos/chunk-000/observation.images.top/episode_000004.mp4",
            r / "videos/chunk-000/observation.images.top/episode_000001.mp4",
        ),
        (),
        "episode 1 shows 9 of 30",
    ),
    "split of an unknown name": ("v3.0", lambda r: change(r, splits={"holdout": "0:5"}), ("--split",), "holdout"),
}


@pytest.mark.parametrize("layout, damage, options, says", DAMAGE.values(), ids=DAMAGE)
def test_what_cannot_be_read_is_said(tmp_path, copy, capsys, layout, damage, options, says):
    root = copy(layout)
    damage(root)
    if options == ("--split",):  # the data set's own
        args = ["data", "lerobot", str(tmp_path / "out"), "--from", str(root), "--camera", "top"]
        assert main(args) == 1
    else:
        assert run(tmp_path / "out", root, *options) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "Traceback" not in said


ONE_OF_MANY = {name: DAMAGE[name] for name in ("rows missing", "video missing", "video of another episode")}


@pytest.mark.parametrize("damage", ONE_OF_MANY)
def test_damaged_episodes_are_left_out_where_asked_and_each_is_named(tmp_path, copy, capsys, damage):
    layout, damage, _, says = ONE_OF_MANY[damage]
    root = copy(layout)
    number = 2 if "episode_000002" in says else 1
    damage(root)
    assert run(tmp_path / "out", root, "--damaged", "skip") == 0
    said = capsys.readouterr().out
    assert "1 episodes are damaged" in said and f"episode {number} is left out" in said and says in said
    metas = [read_meta(path.parent) for path in (tmp_path / "out").glob("*/meta.json")]
    found = {clip["episode"] for meta in metas for clip in meta["described"]}
    assert found and number not in found


def test_a_data_set_without_a_whole_episode_is_refused(tmp_path, copy, capsys):
    root = copy("v3.0")
    emptied("videos/observation.images.top/chunk-000/file-000.mp4")(root)
    assert run(tmp_path / "out", root, "--damaged", "skip") == 1
    assert "no episode that is whole" in capsys.readouterr().err
