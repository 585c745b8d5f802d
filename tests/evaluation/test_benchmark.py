"""The page of the public benchmark is followed word by word, and videos that are not what it asks for are named."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import vidistill.evaluation
from vidistill.cli.main import main
from vidistill.data.shards import frame_shards, write_shards
from vidistill.evaluation import SUITES, benchmark
from vidistill.evaluation.spatial_memory import SUITE, SpatialMemoryConfig
from vidistill.io import read_image, read_json, save_png, write_json, write_video
from vidistill.worlds import WORLDS
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds

PAGE = Path(vidistill.evaluation.__file__).parent / "MEMORY.md"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of two paths of 2 s, and walks that motion is read from."""
    pytest.importorskip("vizdoom")
    folder = tmp_path_factory.mktemp("walks")
    engine = DoomConfig(supersample=3, num_frames=80)
    meta = {"source": "doom", "split": "validation", "config": asdict(engine), "fps": 17.5}
    write_shards(folder / "data-heldout" / "frames", frame_shards(record_many(engine, seeds("validation", 1))), meta)
    return SpatialMemoryConfig(seconds=(2.0,), paths=1, data=str(folder / "data-{split}"), out="", draws=0)


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "bench"
    benchmark.write_paths(folder, small, "validation")
    return folder


def test_the_page_works_as_it_stands(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "memory", replace(SUITE, config=lambda **kw: replace(small, **kw)))
    kinds = []
    for kind, code in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        kinds.append(kind)
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), {})
        else:
            command = code.split("#")[0].split()
            assert command[:2] == ["vidistill", "eval"] and main(command[1:]) == 0
    assert kinds == ["bash", "python", "bash"]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    frozen, start = result["videos"], result["paste_start"]
    assert frozen.pop("name") == "bench" and frozen == start  # the videos of the page are those of that baseline
    assert frozen["false_recall"]["straight"] == 1.0 > result["real"]["false_recall"]["straight"]
    assert result["protocol"]["split"] == "test"


def test_paths_say_all_that_another_system_needs(written, small):
    told = read_json(written / "benchmark.json")
    assert told["fps"] == 17.5 and told["size"] == 64 and len(told["actions"]) == 4 and len(told["paths"]) == 2
    for path in told["paths"]:
        own = read_json(written / "paths" / f"{path['name']}.json")
        assert np.shape(own["actions"]) == (path["frames"], 4) and np.shape(own["poses"]) == (path["frames"], 3)
        assert not any(own["actions"][0]) and any(map(any, own["actions"]))
        assert (written / "starts" / f"{path['name']}.png").is_file()
    with pytest.raises(ValueError, match="write-paths"):
        benchmark.write_paths(written, small, "validation")


def play(folder, written, frames=0, size=64, fps=17.5, pictures=False):
    """A copy of the paths with videos of noise behind the start picture."""
    shutil.copytree(written, folder)
    for path in read_json(folder / "benchmark.json")["paths"]:
        px = np.random.default_rng(0).integers(0, 255, (path["frames"] + frames, size, size, 3)).astype(np.uint8)
        px[0] = read_image(folder / "starts" / f"{path['name']}.png", (size, size))
        target = folder / "videos" / path["name"]
        if pictures:
            for t, frame in enumerate(px):
                save_png(target / f"{t:04d}.png", frame)
        else:
            write_video(target.with_suffix(".mp4"), px, fps)
    return folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"frames": -3}, "frames, needed"),
        ({"fps": 24.0}, "24 frames"),
        ({"size": 32}, "shows 32x32 pixels"),
        ({"size": 32, "pictures": True}, "shows 32x32 pixels"),
        ({"frames": -3, "pictures": True}, "frames, needed"),
    ],
)
def test_a_video_of_another_kind_is_named(tmp_path, written, small, wrong, said):
    folder = play(tmp_path / "bench", written, **wrong)
    with pytest.raises(ValueError, match=said) as error:
        benchmark.judge_videos(folder, small)
    assert read_json(folder / "benchmark.json")["paths"][0]["name"] in str(error.value)


def test_a_video_of_another_path_or_one_frame_late_is_named(tmp_path, written, small):
    folder = play(tmp_path / "swapped", written, pictures=True)
    one, other = (folder / "videos" / path["name"] for path in read_json(folder / "benchmark.json")["paths"])
    (one / "0000.png").rename(folder / "a.png")
    (other / "0000.png").rename(one / "0000.png")
    (folder / "a.png").rename(other / "0000.png")
    with pytest.raises(ValueError, match=r"starts/.*\.png") as error:
        benchmark.judge_videos(folder, small)
    assert str(one) in str(error.value)
    folder = play(tmp_path / "late", written, frames=1, pictures=True)
    for path in read_json(folder / "benchmark.json")["paths"]:
        (folder / "videos" / path["name"] / "0000.png").unlink()
    with pytest.raises(ValueError, match=r"starts/.*\.png"):
        benchmark.judge_videos(folder, small)


def test_pictures_are_read_in_the_order_of_their_numbers(tmp_path):
    for t in range(12):
        save_png(tmp_path / "videos" / "walk" / f"{t}.png", np.full((8, 8, 3), 20 * t, np.uint8))
    for more in ("12²3.png", "._1.png"):  # behind the others, and hidden
        save_png(tmp_path / "videos" / "walk" / more, np.zeros((8, 8, 3), np.uint8))
    shown = benchmark.load(tmp_path, "walk", 12, 8, 17.5)
    assert shown[:, 0, 0, 0].tolist() == [20 * t for t in range(12)]


def test_what_is_missing_or_foreign_is_named(tmp_path, written, small):
    with pytest.raises(ValueError, match=r"benchmark\.json"):
        benchmark.judge_videos(tmp_path, small)
    folder = play(tmp_path / "bench", written, frames=2)
    known = read_json(folder / "benchmark.json")
    (folder / known["paths"][1]["video"]).unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 videos") as error:
        benchmark.judge_videos(folder, small)
    assert known["paths"][1]["name"] in str(error.value)
    write_json(folder / "benchmark.json", known | {"format": "other"})
    with pytest.raises(ValueError, match="format"):
        benchmark.judge_videos(folder, small)
    write_json(folder / "benchmark.json", known | {"first_seed": 3, "paths": known["paths"][:1]})
    with pytest.raises(ValueError, match="other paths"):
        benchmark.judge_videos(folder, small)


def test_the_engines_own_video_is_as_good_as_the_engine(tmp_path, written, small):
    folder = tmp_path / "bench"
    shutil.copytree(written, folder)
    rooms = benchmark.Rooms("doom", WORLDS["doom"], "validation")
    for batch in benchmark.batches_of(rooms, small, benchmark.GRID):
        for name, px in zip(benchmark.names_of(batch), batch.px, strict=True):
            for t, frame in enumerate((255 * px).round().byte().permute(0, 2, 3, 1).numpy()):
                save_png(folder / "videos" / name / f"{t:04d}.png", frame)
    result = benchmark.judge_videos(folder, small)
    own = {key: value for key, value in result["videos"].items() if key not in ("name", "revisit_psnr")}
    assert own == result["real"] and result["videos"]["revisit_psnr"] == {"2": 100.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--videos", "x", "--clips", "3"], "--clips say nothing to --videos"),
        (["--videos", "x", "--split", "validation"], "--split"),
        (["doom", "--write-paths", "x"], "NAME say nothing to --write-paths"),
    ],
)
def test_options_that_the_benchmark_does_not_know_are_refused(given, said, capsys):
    assert main(["eval", "--suite", "memory", *given]) != 0
    assert said in capsys.readouterr().err
    assert main(["eval", "--videos", "x"]) != 0
    assert "--suite memory" in capsys.readouterr().err
