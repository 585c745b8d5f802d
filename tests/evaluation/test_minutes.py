"""What minutes of a stream show: figures at marks from planted curves, and the suite end to end on a tiny student."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import CODEC, DIT, SCHEDULE, random_dit
from tiny_relic import CAMERA, SITES

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodec
from vidistill.data.shards import frame_shards, write_shards
from vidistill.diffusion import LatentShape
from vidistill.evaluation import minutes, suite
from vidistill.evaluation.clips import Batch, Data, View
from vidistill.evaluation.minutes import METRICS, SUITE, MinutesConfig, Streams, at_marks, teacher_beside
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import measure, run_figures
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.worlds import WORLDS
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds

DOOM = DoomConfig(supersample=3)
CFG = MinutesConfig(streams=2, seeds=1, marks=(1.5, 3.0), span=1.0, batch=1, out="", draws=0, steps=2, cache="")


def view(px, windows):
    poses = torch.tensor([[3.0 * t, 0, 0] for t in range(px.shape[1])])[None]
    batch = Batch(torch.rand(px.shape, generator=torch.Generator().manual_seed(9)), None, 0, facts={"poses": poses})
    return View(px, batch, Data([batch], 1.0, windows=windows))


def test_a_figure_at_a_mark_is_of_the_frames_before_it():
    seen = view(torch.zeros(1, 8, 3, 8, 8), {"4": range(2, 4), "8": range(6, 8)})
    values = torch.tensor([[9.0, 9, 1, 3, 9, 9, 5, math.nan]])
    assert at_marks(seen, values).tolist() == [[2.0, 5.0]]
    assert at_marks(seen, values[:, 1:4], torch.arange(1, 4))[0, 0] == 2.0  # of the frames that they belong to


def test_flat_returning_and_stuck_frames_are_counted_where_they_are():
    rng = torch.Generator().manual_seed(0)
    px = torch.rand(1, 12, 3, 16, 16, generator=rng).round()
    px = px[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    windows = {"4": range(4), "8": range(4, 8), "12": range(8, 12)}
    px[:, 5] = 0.5
    px[:, 7] = px[:, 6]
    px[:, 10] = px[:, 1]
    seen = view(px, windows)
    parts = {
        name: part(seen)[0].tolist() for m in ("flat_frames", "returns") for name, part in METRICS[m].parts.items()
    }
    assert parts["flat"] == [0.0, 0.25, 0.0]
    assert parts["returned"] == [0.0, 0.0, 0.25]
    assert METRICS["stuck_frames"].parts["stood"](seen)[0].tolist() == [0.0, 0.25, 0.0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    pytest.importorskip("vizdoom")
    folder = tmp_path_factory.mktemp("minutes")
    torch.manual_seed(0)
    checkpoint.export(folder / "codec", TinyCodec(replace(CODEC, smooth=0.05)), {"card": {}})
    net = random_dit(replace(DIT, channels=4, sites=SITES))
    world = {"fps": 17.5, "actions": ["turn_left", "turn_right", "forward", "backward"], "camera": asdict(CAMERA)}
    record = {"noise": {"shift": 2.0}, "schedule": SCHEDULE, "codec": str(folder / "codec"), "world": world}
    record |= {"card": {"data": {"source": "doom"}}}
    student = CausalStudent(net, StudentConfig(3, 1, MemoryConfig("window", frames=9)), LatentShape(22, 4, 16, 16))
    checkpoint.export(folder / "student", student, record)
    for name, first, count in (("frames", 0, 1), ("minutes", minutes.FIRST_WALK, 2)):
        walks = record_many(replace(DOOM, num_frames=80), seeds("validation", first + count)[first:])
        meta = {"source": "doom", "split": "validation", "config": asdict(DOOM), "fps": 17.5}
        write_shards(folder / "data-heldout" / name, frame_shards(walks), meta)
    return folder


def test_the_suite_end_to_end_on_a_tiny_student(bench):
    cfg = replace(CFG, data=str(bench / "data-{split}"))
    result = suite.evaluate(SUITE, str(bench / "student"), cfg, "validation")
    assert result.keys() >= {"real", "student", "student_unfiltered", "repeat"} and "teacher" not in result
    for row in ("real", "student", "student_unfiltered", "repeat"):
        assert all(list(result[row][key]) == ["1.5", "3"] for key in METRICS)
    real, still = result["real"], result["repeat"]
    assert set(real["sharpness_ratio"].values()) == set(real["motion_ratio"].values()) == {1.0}
    assert set(still["motion_ratio"].values()) == {0.0} and set(still["stuck_frames"].values()) == {1.0}
    assert set(real["returns"].values()) == set(real["stuck_frames"].values()) == {0.0}
    assert real["rpe_rot"]["3"] < still["rpe_rot"]["3"] and real["action_following"]["3"] > 0.8
    assert result["student"]["sharpness_ratio"]["3"] < result["student_unfiltered"]["sharpness_ratio"]["3"]


def test_a_stream_without_the_filter_is_the_same_rollout(bench):
    bundle = checkpoint.load(bench / "student", "student")
    codec = checkpoint.load_codec(bundle)
    data = minutes.walks(bundle, codec, Rooms("doom", WORLDS["doom"]), replace(CFG, data=str(bench / "data-{split}")))
    batch = next(iter(data.batches))
    streams = Streams(bundle, codec, CFG)
    told, total = (batch.facts["actions"], batch.facts["poses"]), batch.px.shape[1]
    served = torch.cat(
        list(minutes.walk_along(bundle, codec, batch.px[:, :1], *told, total, batch.seed, CFG.precision)), dim=1
    )[:, :total]
    assert torch.allclose(streams(batch), served, atol=1e-5)
    assert not torch.allclose(streams.unfiltered(batch), served, atol=1e-3)


def test_every_seed_is_rolled_out_once_for_both_rows(bench, monkeypatch):
    cfg, seeds = replace(CFG, seeds=3, data=str(bench / "data-{split}")), []

    def walked(student, codec, px, actions, poses, total, seed, precision):
        seeds.append(seed)
        return [px.expand(-1, total, -1, -1, -1)]

    monkeypatch.setattr(minutes, "walk_along", walked)
    suite.evaluate(SUITE, str(bench / "student"), cfg, "validation")
    assert len(seeds) == len(set(seeds)) == 2 * 3
    assert MinutesConfig().seeds == 3


def test_a_teacher_goes_on_from_its_last_picture(bench, monkeypatch):
    bundle = checkpoint.load(bench / "student", "student")
    codec = checkpoint.load_codec(bundle)
    starts = []

    def sampled(net, noise, sigmas, cond, *, given, nulls, scales):
        starts.append(given)
        return given + torch.arange(noise.shape[1])[:, None, None, None]

    monkeypatch.setattr(minutes, "sample", sampled)
    data = minutes.walks(bundle, codec, Rooms("doom", WORLDS["doom"]), replace(CFG, data=str(bench / "data-{split}")))
    batch = next(iter(data.batches))
    teacher = replace(bundle, record={**bundle.record, "guidance": 1.0})
    monkeypatch.setattr(type(teacher), "shape", LatentShape(4, 4, 16, 16), raising=False)
    px = minutes.continued(teacher, codec, CFG)(batch)
    assert px.shape == batch.px.shape and len(starts) == math.ceil((px.shape[1] - 1) / 12)
    assert torch.equal(px[:, :1], batch.px[:, :1]) and torch.equal(starts[0], codec.encode(px[:, :1]))
    assert torch.equal(starts[1], codec.encode(px[:, 12:13])) and not torch.equal(*starts[:2])


def test_a_teacher_is_judged_only_if_it_is_named():
    assert teacher_beside(None, {"teacher": None}) == {}
    assert teacher_beside(None, {"teacher": "doom-teacher"})["teacher"].kind == "teacher"


@pytest.mark.parametrize("kw", [{"marks": ()}, {"marks": (5.0,)}, {"streams": 0}, {"precision": "half"}])
def test_impossible_protocols_say_what_is_wrong(kw):
    with pytest.raises(ValueError, match="minutes"):
        MinutesConfig(**kw)


def test_ratios_are_over_real_video_at_the_same_mark():
    px = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    poses = torch.zeros(2, 8, 3)
    batch = Batch(px, None, 0, facts={"poses": poses})
    data = Data([batch], 1.0, windows={"4": range(4), "8": range(4, 8)})
    wanted = {key: METRICS[key] for key in ("saturation_ratio", "motion_ratio")}

    def faded(batch):
        grey = batch.px.mean(2, keepdim=True)
        half = (torch.arange(8) >= 4)[:, None, None, None]
        return torch.where(half, grey + 0.5 * (batch.px - grey), batch.px)

    tallies = measure(wanted, {"faded": faded}, data)
    found = run_figures(wanted, tallies["faded"], tallies["real"][0])
    assert found["saturation_ratio"] == {"4": pytest.approx(1.0), "8": pytest.approx(0.5)}
    assert found["motion_ratio"]["4"] == pytest.approx(1.0) and found["motion_ratio"]["8"] < 1.0
