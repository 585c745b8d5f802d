"""The avatar's judge: what it measures of clips that are right, late, still, black, flickering or somebody else."""

import json
import math
import re
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
from vidistill.evaluation.lip_sync import METRICS, SUITE, LipSyncConfig, apart, identity, identity_drift, reader
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import measure
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
    data = Data([Batch(real, None, 0, facts={"mouth": truth})], 16.0)
    tallies = measure(wanted, {"row": lambda batch: px}, data)
    return suite.figures(wanted, tallies["row"][0], tallies["real"][0])


def looks(px):
    return reader("looks", px[None])[0]


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


def test_somebody_else_is_not_the_same_person(real):
    others = apart(reader("looks", real))
    same = identity(looks(real[0]), 16.0, 1.0, others)
    swapped = torch.cat((real[0, :32], real[1, :33]))
    changed = identity(looks(swapped), 16.0, 1.0, others)
    assert min(same) > 0.5 and changed[0] > 0.5 and changed[-1] < 0.5 * min(same)
    assert (
        identity_drift([looks(swapped)], 16.0, 1.0, others)[0]
        > 0.5
        > abs(identity_drift([looks(real[0])], 16.0, 1.0, others)[0])
    )


def test_a_stream_that_never_looked_like_its_picture_has_no_drift_that_could_count_as_kept(real):
    others = apart(reader("looks", real))
    strangers = torch.cat((real[0, :1], real[1, :32], 1 - real[1, :32]))
    drift, curve = identity_drift([looks(strangers)], 16.0, 1.0, others / 10)
    assert curve[0] < 0 and math.isnan(drift)


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
    with pytest.raises(ValueError, match="sync compares"):
        metrics.sync(b[:, :10], b[:, :10])


def test_the_command_prints_exactly_the_promised_keys(tmp_path, capsys):
    folder = write_talker(tmp_path)
    cfg = LipSyncConfig(
        clips=2, batch=2, streams=1, long_seconds=4.0, window=1.0, steps=2, workers=1, out=str(tmp_path), cache=""
    )
    net = load(folder / "student")
    record_path = folder / "student.json"
    described = json.loads(record_path.read_text())
    described["shape"]["frames"] = 10
    record_path.write_text(json.dumps(described))
    result = suite.evaluate(SUITE, str(folder / "student"), cfg, teacher=str(folder / "teacher"))
    for row in ("student", "teacher", "real"):
        assert set(result[row]) - {"name"} == set(METRICS) and net.kind == "student"
    assert set(result["streams"]) == {"student", "window", "real"} and len(result["streams"]["student"]["curve"]) == 4
    assert {p.name for p in (tmp_path / "student-teacher").iterdir()} >= {"result.json", "streams.png", "clips.png"}
    short = LipSyncConfig(clips=2, streams=1, long_seconds=0.0, window=1.0, steps=2, workers=1, out="", cache="")
    alone = suite.evaluate(SUITE, str(folder / "student"), short, teacher=str(folder / "teacher"))
    assert "streams" not in alone
    assert "sync_corr" in list(report.table(METRICS, alone).columns[0].cells)


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
