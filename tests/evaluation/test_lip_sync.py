"""The avatar's judge: what it measures of clips that are right, late, still, black, flickering or somebody else."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("espeakng_loader")

from tiny_talker import write_talker

from vidistill import metrics
from vidistill.checkpoint import load
from vidistill.cli.main import main
from vidistill.evaluation import lip_sync, report, suite
from vidistill.evaluation.clips import Batch, Data
from vidistill.evaluation.intervals import certain
from vidistill.evaluation.lip_sync import METRICS, SUITE, LipSyncConfig, identity, identity_drift
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import measure
from vidistill.evaluation.verifier import blinks, look_at
from vidistill.io import to_float
from vidistill.worlds import WORLDS
from vidistill.worlds.talker.recorder import TalkerConfig, record


@pytest.fixture(scope="module")
def clips():
    return [record(TalkerConfig(num_frames=65), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def real(clips):
    return torch.stack([to_float(c.frames) for c in clips])


@pytest.fixture(scope="module")
def truth(clips):
    return torch.stack([torch.from_numpy(c.mouth[:, 0]) for c in clips])


def figures(px, real, truth):
    """What a glance says of clips px beside real ones."""
    wanted = {name: metric for name, metric in METRICS.items() if metric.glance}
    data = Data([Batch(real, None, 0, facts={"mouth": truth, "episodes": torch.arange(len(real))})], 16.0)
    tallies = measure(wanted, {"row": lambda batch: px}, data)
    return suite.figures(wanted, tallies["row"][0], tallies["real"][0])


def test_real_video_is_in_sync_whole_and_moves_as_much_as_itself(real, truth):
    found = figures(real, real, truth)
    assert found["sync_corr"] > 0.95 and found["sync_offset_frames"] == 0
    assert found["black_frames"] == found["frozen_frames"] == 0
    assert found["flicker_ratio"] == found["mouth_motion_ratio"] == 1


def test_a_late_mouth_is_found_by_its_offset(real, truth):
    late = torch.cat((real[:, :1].expand(-1, 3, -1, -1, -1), real[:, :-3]), dim=1)
    found = figures(late, real, truth)
    assert found["sync_offset_frames"] == 3 and found["sync_corr"] > 0.9


def test_broken_video_is_found(real, truth):
    black, still, flickering = real.clone(), real.clone(), real.clone()
    black[:, 20:30] = 0.0
    still[:, 20:40] = still[:, 20:21]
    flickering[:, ::2] *= 0.8
    assert figures(black, real, truth)["black_frames"] == pytest.approx(10 / 65)
    assert figures(still, real, truth)["frozen_frames"] == pytest.approx(19 / 64)
    assert figures(flickering, real, truth)["flicker_ratio"] > 2
    shut = figures(real[:, :1].expand_as(real) + 1e-3 * torch.rand(real.shape), real, truth)
    assert shut["mouth_motion_ratio"] < 0.2 and shut["sync_corr"] < 0.5


def melted(px):
    """The eye on the left has run: its picture is the mean of each column."""
    out = px.clone()
    out[..., 22:32, 20:32] = px[..., 22:32, 20:32].mean(-2, keepdim=True)
    return out


def test_another_face_and_an_eye_that_melts_are_not_the_person(clips):
    many = [record(TalkerConfig(num_frames=33), seed) for seed in range(1_700_100, 1_700_106)]
    real = torch.stack([to_float(c.frames) for c in many])
    truth = torch.stack([torch.from_numpy(c.mouth[:, 0]) for c in many])
    codec = load("talker-codec").net
    own, coded = figures(real, real, truth), figures(codec.decode(codec.encode(real)), real, truth)
    assert own["identity"] > 0.9 and coded["identity"] > 0.9
    assert figures(real.roll(1, 0), real, truth)["identity"] < 0.15
    assert figures(melted(real), real, truth)["identity"] < 0.4
    half = torch.cat((real[:, :16], melted(real)[:, 16:]), 1)
    assert 0.4 < figures(half, real, truth)["identity"] < 0.8
    assert own["frechet_paired"] == pytest.approx(0, abs=1e-3)
    assert figures(melted(real), real, truth)["frechet_paired"] > 2 * coded["frechet_paired"] > 0


def test_eyes_that_never_close_are_found(real, truth):
    lids = look_at(lip_sync.verifier(), real, real[:, 0])[1]
    shut = blinks(lids)
    assert shut.sum() >= 2
    awake = real.clone()
    for clip, own in zip(awake, lids > 0.15):
        last = 0
        for t in range(1, 64):
            last = last if own[t - 1] else t
            clip[t] = clip[last]
    found = figures(awake, real, truth)
    assert found["blink_ratio"] < 0.5 and figures(real, real, truth)["blink_ratio"] == 1


def test_blinks_are_counted_where_lids_close():
    assert blinks(torch.tensor([[0.0, 0.9, 0.9, 0.1, 0.7, 0.0], [0.0, 0.4, 0.0, 0.0, 0.0, 0.0]])).tolist() == [2, 0]


def test_identity_is_lost_by_windows_of_a_stream():
    same = torch.cat((torch.full((16,), 0.9), torch.full((16,), 0.1)))
    assert identity(same, 16.0, 1.0) == [1.0, 0.0] and identity_drift([same], 16.0, 1.0) == (1.0, [1.0, 0.0])
    assert math.isnan(identity_drift([1 - same], 16.0, 1.0)[0])


def test_a_passage_is_frozen_from_four_still_steps_on():
    for still, share in ((3, 0.0), (4, 0.4), (10, 1.0)):
        motion = torch.ones(1, 10)
        motion[:, :still] = 0.0
        assert lip_sync.frozen(motion, 1.0) == pytest.approx(share)
    assert lip_sync.frozen(torch.zeros(1, 4), 1.0) == 1.0 and lip_sync.frozen(torch.zeros(1, 3), 1.0) == 0.0


def test_people_who_are_judged_are_none_of_those_a_checkpoint_was_chosen_on():
    cfg, rooms = LipSyncConfig(), {split: Rooms("talker", WORLDS["talker"], split) for split in ("validation", "test")}
    chosen = set(WORLDS["talker"].seeds("validation", 10_000))
    for split, own in rooms.items():
        clips = own.seeds(lip_sync.CLIP_ROOMS, cfg.clips)
        long = own.seeds(lip_sync.LONG_ROOMS, cfg.streams)
        assert len({*clips, *long}) == cfg.clips + cfg.streams
        assert (not chosen & {*clips, *long}) == (split == "test")
    recorded = Path("scripts/reproduce_talker.sh").read_text()
    few = [int(n) for n in re.findall(r"--split (?:held_out|validation) --episodes (\d+)", recorded)]
    assert few and max(few) <= lip_sync.CLIP_ROOMS, "a training is watched on the first rooms of validation"


def test_sync_is_the_best_mean_correlation_and_its_shift():
    rng = torch.Generator().manual_seed(0)
    b = torch.randn(3, 60, generator=rng)
    a = torch.cat((torch.zeros(3, 2), b[:, :-2]), dim=1)
    assert metrics.sync(a, b) == (pytest.approx(1.0), 2) and metrics.sync(b, b) == (pytest.approx(1.0), 0)
    assert metrics.sync(torch.zeros(3, 60), b)[0] == 0
    assert metrics.sync(b[:, :15], b[:, :15]) == (pytest.approx(1.0), 0)  # the fewest frames
    with pytest.raises(ValueError, match="sync compares"):
        metrics.sync(b[:, :10], b[:, :10])


def test_the_command_prints_exactly_the_promised_keys(tmp_path, capsys):
    folder = write_talker(tmp_path)
    cfg = LipSyncConfig(
        clips=2, batch=2, streams=2, long_seconds=3.0, window=1.0, steps=2, workers=1, out=str(tmp_path), cache=""
    )
    net = load(folder / "student")
    record_path = folder / "student.json"
    described = json.loads(record_path.read_text())
    described["shape"]["frames"] = 10
    record_path.write_text(json.dumps(described))
    result = suite.evaluate(SUITE, str(folder / "student"), cfg, teacher=str(folder / "teacher"))
    for row in ("student", "teacher", "real"):
        missing = {"frechet_paired"} if row == "real" else set()
        found = {key for key in result[row] if not key.endswith("_interval")}
        assert found - {"name"} == set(METRICS) - missing and net.kind == "student"
    assert result["student"]["identity_drift"] == result["streams"]["student"]["drift"]
    assert "sync_corr" in result["difference"]["student - teacher"]
    assert all("identity_drift" not in row for row in result["difference"].values())
    assert set(result["streams"]) == {"student", "window", "real"} and len(result["streams"]["student"]["curve"]) == 2
    assert {p.name for p in (tmp_path / "student-teacher").iterdir()} >= {"result.json", "streams.png", "clips.png"}
    short = LipSyncConfig(clips=2, streams=1, long_seconds=0.0, window=1.0, steps=2, workers=1, out="", cache="")
    alone = suite.evaluate(SUITE, str(folder / "student"), short, teacher=str(folder / "teacher"))
    assert "streams" not in alone
    assert "sync_corr" in list(report.table(METRICS, alone).columns[0].cells)


def test_a_talker_stands_beside_what_it_was_trained_from(tmp_path, caplog):
    folder = write_talker(tmp_path)
    for name in ("init", "trained"):
        for suffix in (".json", ".safetensors"):
            (folder / f"{name}{suffix}").write_bytes((folder / f"student{suffix}").read_bytes())
    path = folder / "trained.json"
    record = json.loads(path.read_text())
    record["card"] = {**record.get("card", {}), "parents": [str(folder / "init"), str(folder / "teacher")]}
    path.write_text(json.dumps(record))
    found = SUITE.others(load(folder / "trained"), {"teacher": None, "vs": None})
    assert {row: bundle.name for row, bundle in found.items()} == {"teacher": "teacher", "vs": "init"}
    named = {"teacher": str(folder / "teacher"), "vs": str(folder / "student")}
    assert SUITE.others(load(folder / "trained"), named)["vs"].name == "student"
    assert SUITE.others(load(folder / "student"), {**named, "vs": None}).keys() == {"teacher"} and not caplog.records
    record["card"]["parents"] = [str(folder / "teacher")]  # no student came before it, and none is missed
    path.write_text(json.dumps(record))
    assert lip_sync.init_of(load(folder / "trained")) is None and not caplog.records
    record["card"]["parents"] = [str(folder / "lost"), str(folder / "teacher")]
    path.write_text(json.dumps(record))
    assert lip_sync.init_of(load(folder / "trained")) is None and "lost, which is not here" in caplog.text


def test_the_drift_of_streams_lies_in_its_interval():
    same = torch.ones(8, 30)
    same[:4, 20:] = 0  # half of the streams end as somebody else
    found = certain(torch.arange(8), partial(lip_sync.stream_drift, same, 10.0, 1.0), 200)
    low, high = found["identity_drift_interval"]
    assert found["identity_drift"] == 0.5 and 0 < low < 0.5 < high < 1


def test_a_diagnosis_is_drawn_and_printed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = {"levels": [0.1, 0.9], "chunks": [1, 2], "norm": [[1.0, 2.0], [3.0, 4.0]], "gap": [[0.1, 0.2], [0.3, 0.4]]}
    found["cosine"] = [[0.5, -0.5], [0.25, 1.0]]
    rows = [{"step": 10, "student/loss": 1.0}, *({"step": s, "diagnosis": found} for s in (20, 40))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert main(["diagnose", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "cosine +0.50 -0.50" in out and (tmp_path / "diagnosis.png").stat().st_size > 5000
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert main(["diagnose", str(tmp_path)]) == 1 and "validation.diagnose_every" in capsys.readouterr().err


def test_targets_need_the_teacher_and_a_student_adds_its_own():
    real, teacher = {"sync_corr": 1.0}, {"sync_corr": 0.79}
    student = {"sync_corr": 0.76, "mouth_motion_ratio": 0.7, "identity_drift": None}
    assert SUITE.targets({"real": real}) == []
    assert [t.met for t in SUITE.targets({"real": real, "teacher": teacher})] == [False]
    found = SUITE.targets({"real": real, "teacher": teacher, "student": student})
    assert [t.met for t in found] == [False, True, False, False]
