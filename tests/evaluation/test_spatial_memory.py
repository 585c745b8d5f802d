"""The memory benchmark: paths come back, need memory, and are judged against the engine's own pictures."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import CODEC, DIT, SCHEDULE, random_dit
from tiny_relic import CAMERA, MEMORY, SITES

from vidistill import checkpoint
from vidistill.cli.main import main
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.camera import moves, planar
from vidistill.data.shards import frame_shards, write_shards
from vidistill.data.types import Episode
from vidistill.diffusion import LatentShape
from vidistill.evaluation import SUITES, suite
from vidistill.evaluation.clips import Data
from vidistill.evaluation.probes import load_probe
from vidistill.evaluation.report import table
from vidistill.evaluation.spatial_memory import (
    METRICS,
    SUITE,
    PoseReader,
    SpatialMemoryConfig,
    batch_of,
    contenders,
    repeat_last,
)
from vidistill.evaluation.suite import measure
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.worlds.doom.paths import (
    KINDS,
    LEFT,
    RIGHT,
    counted,
    full_turn,
    look_away,
    make_path,
    returns,
    walk_out,
)
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds

DOOM = DoomConfig(supersample=3)
CFG = SpatialMemoryConfig(seconds=(2.0,), paths=1, batch=2, seeds=1)


@pytest.mark.parametrize("frames", [35, 88, 175, 350])
def test_every_script_ends_where_it_began_to_turn(frames):
    look = look_away(frames, LEFT, DOOM, 1.0)
    assert look.shape == (frames, 4) and look[:, LEFT].sum() == look[:, RIGHT].sum() > 10
    turned = (look[:, LEFT] - look[:, RIGHT]).cumsum() * DOOM.turn_degrees
    assert 85 < turned[frames // 2] < 180
    round_ = full_turn(frames, RIGHT, DOOM, 1.0)
    out = walk_out(frames, LEFT, DOOM, 1.0)
    if frames < 64:
        assert round_ is None and out is None
    else:
        assert round_[:, RIGHT].sum() * DOOM.turn_degrees == 360
        assert out[:, LEFT].sum() * DOOM.turn_degrees == 360 and out[:, 2].sum() % 2 == 0
        assert set(np.unique(round_)) | set(np.unique(out)) == {0, 1}  # what the engine plays exactly


@pytest.mark.parametrize("kind", [*KINDS])
def test_paths_return_in_the_real_engine_and_the_floor_does_not(kind):
    pytest.importorskip("vizdoom")
    cfg, seconds = CFG, 2.0 if kind == "look" else 5.0
    paths = (make_path(cfg, DOOM, kind, seconds, seed, 12) for seed in range(1_000_097, 1_000_103))
    path = next(p for p in paths if p is not None)
    poses = path.walk.poses
    assert returns(poses, 0, path.judged[-1]) and not returns(poses, 0, path.away)
    assert (len(path.walk.frames) - 1) % 12 == 0
    probe = load_probe()
    batch = batch_of([path], 2.0, 1, 0)
    wanted = {key: metric for key, metric in METRICS.items() if key.startswith("revisit")}
    tallies = measure(wanted, {"floor": repeat_last}, Data([batch], DOOM.fps, probe))
    figures = {row: suite.figures(wanted, runs[0], runs[0]) for row, runs in tallies.items()}
    assert figures["real"]["revisit_psnr"]["2"] > 25 and figures["real"]["revisit_texture_acc"]["2"] == 1
    assert figures["floor"]["revisit_psnr"]["2"] < cfg.floor_psnr
    assert figures["floor"]["revisit_texture_acc"]["2"] == 0
    assert figures["real"]["revisit_feature_distance"]["2"] < figures["floor"]["revisit_feature_distance"]["2"]


def room(same=False):
    """A square room of four pictures; a walker in the middle looks east, then west."""
    walls = [[128, 128, 128, -128, 0], [-128, 128, 128, 128, 1], [-128, -128, -128, 128, 0 if same else 2]]
    frames = np.zeros((40, 8, 8, 3), np.uint8)
    frames[20:30] = 200
    poses = np.zeros((40, 3), np.float32)
    poses[20:30, 2] = np.pi
    return Episode(frames, np.zeros((40, 4), np.float32), poses, 0, {"walls": walls})


def test_a_path_counts_only_if_memory_is_needed():
    judged = range(34, 38)
    path = counted(CFG, "look", room(), judged, 25)
    assert path is not None and path.label == 0
    assert counted(CFG, "look", room(same=True), judged, 25) is None  # the same picture is there, too
    alike = room()
    alike.frames[20:30] = 20
    assert counted(CFG, "look", alike, judged, 25) is None  # the last view resembles the true one
    assert counted(replace(CFG, near=1.0), "look", room(), judged, 25) is None  # too far to tell


def student(folder, name, memory, codec):
    net = random_dit(replace(DIT, channels=4, sites=SITES))
    shape = LatentShape(22, 4, 16, 16)
    record = {
        "noise": {"shift": 2.0},
        "schedule": SCHEDULE,
        "codec": str(codec),
        "world": {"fps": 17.5, "actions": ["turn_left", "turn_right", "forward", "backward"], "camera": asdict(CAMERA)},
        "card": {"data": {"source": "doom"}},
    }
    checkpoint.export(folder / name, CausalStudent(net, StudentConfig(3, 1, memory), shape), record)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    pytest.importorskip("vizdoom")
    folder = tmp_path_factory.mktemp("revisit")
    torch.manual_seed(0)
    checkpoint.export(folder / "codec", TinyCodec(CODEC), {"card": {}})
    student(folder, "relic", replace(MEMORY, frames=6, history=16, pool="average"), folder / "codec")
    student(folder, "relic-window", MemoryConfig("window", frames=9), folder / "codec")
    walks = record_many(replace(DOOM, num_frames=80), seeds("held_out", 1))
    meta = {"source": "doom", "split": "held_out", "config": asdict(DOOM), "fps": 17.5}
    write_shards(folder / "data-heldout" / "frames", frame_shards(walks), meta)
    return folder


def test_the_suite_end_to_end_on_tiny_random_students(bench):
    cfg = replace(CFG, data=str(bench / "data-{split}"), out=str(bench / "out"))
    result = suite.evaluate(SUITE, str(bench / "relic"), cfg)
    assert result["full"] is None
    for row in ("student", "window", "repeat_last", "real"):
        for key in ("revisit_psnr", "revisit_texture_acc"):
            assert list(result[row][key]) == ["2"]
    assert result["real"]["revisit_psnr"]["2"] > 25 > result["student"]["revisit_psnr"]["2"]
    assert result["student"]["memory_tokens"] < result["student"]["memory_bytes"]
    assert result["rpe_trans"] > 0 and result["rpe_rot"] > 0
    assert result["real"]["rpe_rot"] < result["student"]["rpe_rot"]
    assert result["pose_error"]["told"] < 1e-4 and result["pose_error"]["seconds"] == pytest.approx(76 / 17.5)
    assert result["pose_error"]["keys"] > 0.001  # walls, and the engine's rounding of angles
    files = {p.name for p in (bench / "out" / "relic-memory").iterdir()}
    assert files >= {"result.json", "index.html", "clips.png", "revisit_psnr.png"}
    assert json.loads((bench / "out" / "relic-memory" / "result.json").read_text()) == result
    assert [c.header for c in table(METRICS, result).columns[1:]] == ["real", "student", "window", "repeat_last"]


def test_a_baseline_that_is_damaged_is_told_and_not_left_out(bench, tmp_path):
    for file in bench.glob("relic*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    student = checkpoint.load(tmp_path / "relic")
    assert contenders(student, {}).keys() == {"window"}
    (tmp_path / "relic-window.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        contenders(student, {})


def test_the_command_line_reaches_the_suite(bench, monkeypatch, capsys):
    own = replace(CFG, data=str(bench / "data-{split}"), out="")
    monkeypatch.setitem(SUITES, "memory", replace(SUITE, config=lambda paths: replace(own, paths=paths)))
    window = str(bench / "relic")
    assert main(["eval", str(bench / "relic"), "--suite", "memory", "--clips", "1", "--window", window, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["window"] == {**result["student"], "name": "relic"} and result["full"] is None
    assert result["protocol"]["paths"] == 1


def test_motion_read_from_pictures_of_another_walk_is_near_the_truth(tmp_path):
    from vidistill.data.clips import Clips

    walks = record_many(replace(DOOM, num_frames=80), seeds("validation", 4))
    meta = {"source": "doom", "split": "validation", "config": asdict(DOOM), "fps": 17.5}
    write_shards(tmp_path / "walks", frame_shards(walks), meta)
    clips = Clips(tmp_path / "walks")
    reader = PoseReader(load_probe(), clips, episodes=3)  # and judged on the fourth
    px = clips.tensors["frames"][3:].permute(0, 1, 4, 2, 3).float() / 255
    poses = clips.tensors["poses"][3:]
    gone, turned = reader.error(px, poses)
    lost, spun = reader.error(px[:, :1].expand_as(px), poses)
    wrong = reader.error(px.flip(-1), poses)[1]
    assert gone.mean() < 0.7 * lost.mean() and turned.mean() < 0.7 * min(spun.mean(), wrong.mean())
    assert float(moves(planar(poses)).abs().max()) > 0.05


@pytest.mark.parametrize("kw", [{"seconds": ()}, {"judged": 12}, {"paths": 0}])
def test_impossible_protocols_say_what_is_wrong(kw):
    with pytest.raises(ValueError, match="revisit"):
        SpatialMemoryConfig(**kw)
