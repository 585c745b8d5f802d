"""The memory benchmark: paths come back, need memory, and are judged against the engine's own pictures."""

import itertools
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
from vidistill.evaluation import spatial_memory as sm
from vidistill.evaluation.clips import Batch, Data, Tally
from vidistill.evaluation.probes import load_probe, read
from vidistill.evaluation.report import table
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.spatial_memory import METRICS, SUITE, PoseReader, SpatialMemoryConfig, batch_of, contenders
from vidistill.evaluation.suite import measure
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.worlds import WORLDS
from vidistill.worlds.doom import paths as pt
from vidistill.worlds.doom.paths import KINDS, LEFT, REVISITS, RIGHT, Plan, Script, counted, keys, paths_of, returns
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds

DOOM = DoomConfig(supersample=3)
CFG = SpatialMemoryConfig(seconds=(2.0,), paths=1, batch=8, seeds=1, cache="")


@pytest.mark.parametrize(("rooms", "enough"), [((1, 2, 3, 4, 5, 5), False), ((1, 2, 3, 4, 5, 6), True)])
def test_a_kind_of_path_is_drawn_anew_where_six_rooms_have_it(rooms, enough):
    kind, away = torch.zeros(7, dtype=torch.long), torch.tensor([2.0] * 6 + [5.0])
    own = Batch(torch.zeros(7, 1), None, 0, facts={"kind": kind, "seconds": away}, rooms=torch.tensor([*rooms, 9]))
    whole, drawn = (Tally(Data([own], 12.0)) for _ in range(2))
    whole.parts, drawn.parts = {"rooms": [own.rooms]}, {"rooms": [own.rooms.flip(0)]}
    first, other = list(KINDS)[:2]
    assert sm.has_figures(whole, [first], 5.0), "all paths together have figures however few they are"
    assert sm.has_figures(drawn, [first], 2.0) == enough
    assert not sm.has_figures(drawn, [first], 5.0) and not sm.has_figures(drawn, [other])


@pytest.mark.parametrize("frames", [35, 88, 175, 350])
@pytest.mark.parametrize("kind", [*KINDS])
def test_scripts_end_with_the_heading_that_they_say(kind, frames):
    for reach, side in itertools.product(pt.REACHES, (LEFT, RIGHT)):
        script = KINDS[kind](frames, side, DOOM, reach)
        if script is None:
            assert frames < 150 or reach < 1  # there is time, and reach, for every kind
            continue
        assert script.actions.shape == (frames, 4) and set(np.unique(script.actions)) <= {0, 1}  # played exactly
        heading = (script.actions[:, LEFT] - script.actions[:, RIGHT]).cumsum() * DOOM.turn_degrees
        first = heading[script.first] if script.first >= 0 else 0.0
        assert (heading[-1] - first) % 360 == 0
        if kind != "straight":
            assert abs((heading[script.between] - first + 180) % 360 - 180) > 60
        for again, seen, between in script.repeats:
            assert (heading[again] - heading[seen]) % 360 == 0 and (heading[between] - heading[seen]) % 360 == 180


@pytest.fixture(scope="module")
def played():
    """A path of every kind, by kind."""
    pytest.importorskip("vizdoom")
    found = paths_of(CFG, DOOM, 10.0, 12, seeds("validation", 160)[96:])
    return {path.kind: path for path in found}


def test_every_kind_is_played_in_the_real_engine_as_it_says(played):
    assert played.keys() == KINDS.keys()
    for kind, path in played.items():
        poses, end = path.walk.poses, path.judged[-1]
        assert (len(path.walk.frames) - 1) % 12 == 0 and end + 1 < len(path.walk.frames)
        assert returns(poses, 0, end) == (kind in REVISITS)
        moved = np.linalg.norm(poses[end, :2] - poses[0, :2])
        if kind == "straight":
            assert moved > 0.9 * pt.LEAST_STRAIGHT * DOOM.speed / 64
            continue
        for again, first, between in path.pairs:
            assert returns(poses, first, again) and not returns(poses, first, between)
        if kind == "elsewhere":
            assert moved > pt.ELSEWHERE and pt.same_heading(poses, 0, end)


def test_baselines_win_and_lose_where_they_should(played):
    wanted = {key: metric for key, metric in METRICS.items() if "pose" not in metric.parts}
    data = sm.Data([batch_of([*played.values()], 10.0, DOOM.speed, 0)], DOOM.fps, load_probe(), {}, stride=2)
    tallies = measure(wanted, sm.ROWS, data)
    found = {row: suite.figures(wanted, runs[0], tallies["real"][0]) for row, runs in tallies.items()}
    real, last, start, near = (found[row] for row in ("real", "repeat_last", "paste_start", "paste_nearest"))
    assert "revisit_psnr" not in real and real["revisit_texture_acc"]["10"] >= 0.8
    assert start["revisit_psnr"]["10"] > 25 > CFG.floor_psnr > last["revisit_psnr"]["10"]
    assert last["revisit_texture_acc"]["10"] == 0 < start["revisit_texture_acc"]["10"]
    assert start["revisit_feature_distance"]["10"] < last["revisit_feature_distance"]["10"]
    assert min(real["consistency_gain"].values()) > 20 and set(start["consistency_gain"].values()) == {0.0}
    assert min(near["consistency_gain"].values()) > 20 and real["consistency_texture"] == 1.0
    assert real["false_recall"] == {"elsewhere": 0.0, "straight": 0.0} == near["false_recall"]
    assert start["false_recall"] == {"elsewhere": 1.0, "straight": 1.0}
    assert real["returns"] == real["snap_back"] == 0.0
    assert real["action_following"] > 0.9 > near["action_following"] > start["action_following"]
    assert real["straight_following"] > 0.8 > near["straight_following"]


def test_kinds_of_few_rooms_have_figures_and_no_intervals(played):
    paths = [played["look"]] * 10 + [played["straight"]] * 2
    paths = [replace(p, walk=replace(p.walk, seed=k)) for k, p in enumerate(paths)]
    batch = batch_of(paths, 10.0, DOOM.speed, 0)
    data = sm.Data([batch], DOOM.fps, load_probe(), {}, stride=2)
    wanted = {key: METRICS[key] for key in ("revisit_texture_acc", "snap_back", "consistency_gain", "returns")}
    tallies = measure(wanted, {"start": sm.ROWS["paste_start"]}, data)
    result = {row: suite.run_figures(wanted, runs, tallies["real"][0]) for row, runs in tallies.items()}
    suite.add_certainty(wanted, result, tallies, {}, 20)
    found = result["start"]
    assert found["snap_back"] == 0.0 and found.get("snap_back_interval") is None
    assert found["consistency_gain_interval"].keys() == {"look"} and found["returns_interval"] is not None
    assert found["revisit_texture_acc_interval"].keys() == {"10"}


def room(same=False):
    """A square room of four pictures; a walker in the middle looks east, then west."""
    walls = [[128, 128, 128, -128, 0], [-128, 128, 128, 128, 1], [-128, -128, -128, 128, 0 if same else 2]]
    frames = np.zeros((50, 8, 8, 3), np.uint8)
    frames[20:30] = 200
    poses = np.zeros((50, 3), np.float32)
    poses[20:30, 2] = np.pi
    return Episode(frames, np.zeros((50, 4), np.float32), poses, 0, {"walls": walls})


def test_a_path_counts_only_if_memory_is_needed():
    plan = Plan("look", 0, Script(keys(30), between=17), 8, keys(50))
    path = counted(CFG, DOOM, plan, room())
    assert path is not None and path.label == 0 and path.away == 25 and [*path.judged] == [*range(43, 49)]
    assert path.pairs.tolist() == [[t, 7, 25] for t in path.judged]
    assert counted(CFG, DOOM, plan, room(same=True)) is None  # the same picture is there, too
    alike = room()
    alike.frames[20:30] = 20
    assert counted(CFG, DOOM, plan, alike) is None  # the last view resembles the true one
    assert counted(replace(CFG, near=1.0), DOOM, plan, room()) is None  # too far to tell
    astray = room()
    astray.poses[30:, 0] = 0.2
    assert counted(CFG, DOOM, plan, astray) is None  # the walker did not come back


def test_an_elsewhere_path_counts_only_from_another_place_that_looks_another_way():
    walk, plan = room(), Plan("elsewhere", 0, Script(keys(30), first=11, between=17), 8, keys(50))
    walk.poses[4:20, 1] = walk.poses[30:, 1] = -1.5
    walk.frames[4:20] = walk.frames[30:] = 100
    walls = [[128, 128, 128, 0, 1], [128, 0, 128, -128, 0], *walk.walls["walls"][1:]]
    assert counted(CFG, DOOM, plan, replace(walk, walls={"walls": walls})) is not None
    assert counted(CFG, DOOM, plan, walk) is None  # the wall picture of the start
    near = replace(walk, poses=walk.poses * np.float32([1, 0.1, 1]), walls={"walls": walls})
    assert counted(CFG, DOOM, plan, near) is None


def test_a_straight_path_counts_only_if_no_wall_stops_it():
    walk = room()
    plan = Plan("straight", 0, Script(keys(40, 2), between=20), 1, np.concatenate([keys(1), keys(40, 2), keys(9)]))
    walk.frames[20:] = 200
    walk.poses[:, 2] = 0
    walk.poses[:, 0] = np.minimum(np.arange(50), 40) * DOOM.speed / 64
    assert counted(CFG, DOOM, plan, walk) is not None
    walk.poses[30:, 0] = walk.poses[30, 0]
    assert counted(CFG, DOOM, plan, walk) is None


def test_paths_of_choice_and_of_test_are_of_rooms_that_never_meet(monkeypatch):
    class Asked(Exception):
        pass

    def ask(cfg, doom, seconds, chunked, rooms):
        raise Asked(rooms)

    monkeypatch.setattr(sm, "paths_of", ask)
    rooms = []
    for split in ("validation", "test"):
        with pytest.raises(Asked) as asked:
            sm.batches_of(Rooms("doom", WORLDS["doom"], split), CFG, 12)
        rooms.append(set(asked.value.args[0]))
    chosen, tested = rooms
    assert chosen and tested and not chosen & tested and min(tested) >= 1_700_000 > max(chosen)


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
    for row in ("student", "window", "repeat_last", "paste_start", "paste_nearest"):
        assert list(result[row]["revisit_psnr"]) == list(result[row]["revisit_texture_acc"]) == ["2"]
        assert list(result[row]["false_recall"]) == ["straight"]
    assert result["paste_start"]["revisit_psnr"]["2"] > 25 > result["student"]["revisit_psnr"]["2"]
    assert result["protocol"]["counted"]["2"] == dict.fromkeys(KINDS, 0) | {"look": 1, "straight": 1}
    assert result["student"]["memory_tokens"] < result["student"]["memory_bytes"]
    assert result["rpe_trans"] > 0 and result["rpe_rot"] > 0
    assert result["real"]["rpe_rot"] < result["student"]["rpe_rot"]
    assert result["pose_error"]["told"] < 1e-4 and result["pose_error"]["seconds"] == pytest.approx(76 / 17.5)
    assert result["pose_error"]["keys"] > 0.001  # walls, and the engine's rounding of angles
    files = {p.name for p in (bench / "out" / "relic-memory").iterdir()}
    assert files >= {"result.json", "index.html", "clips.png", "revisit_psnr.png"}
    assert json.loads((bench / "out" / "relic-memory" / "result.json").read_text()) == result
    rows = ["real", "student", "window", "repeat_last", "paste_start", "paste_nearest"]
    assert [c.header for c in table(METRICS, result).columns[1:]] == rows


def test_a_baseline_that_is_damaged_is_told_and_not_left_out(bench, tmp_path, caplog):
    for file in bench.glob("relic*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    student = checkpoint.load(tmp_path / "relic")
    assert contenders(student, {}).keys() == {"window"}
    assert [record.message for record in caplog.records if "no baseline" in record.message] == [
        f"relic has no baseline {tmp_path / 'relic-full'}; name a student that has that memory (--full)"
    ]
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
    shown = (px, px[:, :1].expand_as(px), px.flip(-1))
    true, still, mirrored = (reader.error(read(reader.probe, x, 4), poses) for x in shown)
    (gone, turned), (lost, spun), wrong = true.unbind(-1), still.unbind(-1), mirrored[..., 1]
    assert gone.mean() < 0.7 * lost.mean() and turned.mean() < 0.7 * min(spun.mean(), wrong.mean())
    assert float(moves(planar(poses)).abs().max()) > 0.05


def test_judged_frames_are_those_of_the_revisit_and_what_the_probe_needs_around_them():
    px = torch.arange(20.0).view(1, 20, 1, 1, 1)
    view = sm.View(px, sm.Batch(px, None, 0, facts={"judged": torch.tensor([[8, 12]])}), None)
    assert sm.judged_frames(view, px).flatten().tolist() == [8, 9, 10, 11]
    assert sm.judged_frames(view, px, 1).flatten().tolist() == [6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("kw", [{"seconds": ()}, {"judged": 12}, {"paths": 0}])
def test_impossible_protocols_say_what_is_wrong(kw):
    with pytest.raises(ValueError, match="revisit"):
        SpatialMemoryConfig(**kw)
