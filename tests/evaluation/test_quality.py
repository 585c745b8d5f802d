import json
import math
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CODEC
from tiny_walks import walk, write_walks

from vidistill import checkpoint, evaluation
from vidistill.cli.main import main
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import Condition, walked
from vidistill.data.clips import Clips
from vidistill.data.shards import frame_shards, write_shards
from vidistill.data.types import split_seeds
from vidistill.evaluation import clips as clips_module
from vidistill.evaluation import probes, quality, report, suite
from vidistill.evaluation.clips import Batch, Data, Tally, repeat_row, student_row, teacher_row
from vidistill.evaluation.quality import METRICS, SUITE, EvalConfig, HeldOut
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.streams import StreamTally, curve_drifts, student_chunks
from vidistill.evaluation.suite import run_figures
from vidistill.io import read_video
from vidistill.worlds import WORLDS
from vidistill.worlds.doom.labels import action_labels

DOOM = WORLDS["doom"]
SPLIT_FOLDERS = [("validation", "heldout", 1_000_005), ("test", "test", 1_700_005)]
FRAMES = 7  # latents of a clip: 25 px frames, chunks of 1, 3 and 3
KEYS = ("frechet_unpaired", "action_following", "sharpness_ratio", "saturation_ratio", "motion_ratio", "flicker_ratio")
DRIFTS = ("sharpness_drift", "saturation_drift", "motion_drift")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with walks of validation and test, long walks, and a probe trained on others."""
    root = tmp_path_factory.mktemp("world")
    for split, folder in (("validation", "data-heldout"), ("test", "data-test")):
        write_walks(root / folder / "frames", num=4, length=60, split=split)
        write_walks(root / folder / "long", num=2, length=45, split=split, first=quality.LONG_EPISODES_FROM)
    train = write_walks(root / "train", num=6, length=80, split="train", first=100)
    cfg = probes.ProbeConfig(size=16, widths=(24, 32), features=16, textures=5)
    probes.save_probe(root / "probe", probes.train_probes(train, steps=200, batch=48, lr=8e-3, cfg=cfg), {})
    return root


def held_out(world, cfg):
    """Clips of the held-out walks, as the suite sees them."""
    clips, heads = Clips(world / "data-test" / "frames"), {"turn": 3, "walk": 3}
    probe = probes.load_probe(world / "probe")
    return Data(HeldOut(clips, DOOM, cfg, 25), 17.5, probe, heads, cfg.stride, round(17.5 * cfg.seconds))


def protocol(world, out):
    return EvalConfig(
        clips=6, batch=4, seconds=0.8, streams=2, long_seconds=2.4, frames=FRAMES, steps=2, episodes=4,
        seeds=2, draws=0, data=str(world / "data-{split}"), cache=str(out / "cache"), out=str(out / "out"),
        probe=str(world / "probe"), precision="fp32",
    )  # fmt: skip


@pytest.fixture
def cfg(world, tmp_path):
    return protocol(world, tmp_path)


@pytest.fixture(scope="module")
def rows(world):
    """Figures of rows whose faults are known."""
    cfg = EvalConfig(clips=12, batch=5, seconds=1.0, frames=FRAMES, episodes=4, stride=1)
    held = held_out(world, cfg)
    sources = {
        "same": lambda b: b.px,
        "blurred": lambda b: torch.nn.functional.avg_pool2d(b.px.flatten(0, 1), 3, 1, 1).view_as(b.px),
        "grey": lambda b: b.px.mean(2, keepdim=True).expand_as(b.px),
        "repeat": repeat_row,
        "mirrored": lambda b: b.px.flip(-1),
        "wall": lambda b: torch.full_like(b.px, 0.5),
        "snapping": lambda b: torch.cat((b.px[:, :21], b.px[:, :1].expand(-1, 4, -1, -1, -1)), 1),
        "shimmering": lambda b: b.px + 0.2 * (torch.arange(25) % 2 - 0.5)[:, None, None, None],
    }
    wanted = {name: metric for name, metric in METRICS.items() if metric.figure}
    tallies = suite.measure(wanted, sources, held)
    return {name: run_figures(wanted, runs, tallies["real"][0]) for name, runs in tallies.items()}


def test_the_same_video_has_no_distance_and_ratios_of_one(rows):
    same = rows["same"]
    assert same["frechet_paired"] == pytest.approx(0, abs=1e-4) and same["psnr"] == pytest.approx(100)
    for name in ("sharpness", "saturation", "contrast", "motion", "flicker"):
        assert same[f"{name}_ratio"] == pytest.approx(1), name
    assert same["action_following"] == rows["real"]["action_following"] > 0.85
    assert 0 < rows["real"]["frechet_unpaired"] == pytest.approx(same["frechet_unpaired"], rel=1e-4)
    assert "frechet_paired" not in rows["real"]


def test_every_fault_shows_in_its_own_measure(rows):
    assert rows["blurred"]["sharpness_ratio"] < 0.8
    assert rows["grey"]["saturation_ratio"] == pytest.approx(0, abs=1e-5)
    assert rows["repeat"]["motion_ratio"] == 0 and rows["repeat"]["idle_motion"] == 0
    assert rows["shimmering"]["flicker_ratio"] > 1.2 and rows["shimmering"]["idle_motion"] > 0.1
    assert rows["real"]["idle_motion"] == 0
    assert all(rows[name]["frechet_paired"] > 0.5 for name in ("blurred", "grey", "repeat", "mirrored"))


def test_the_other_half_is_that_of_the_other_episodes():
    """Even and odd episodes of either row lie around means of their own; each is held against the other's."""
    rng = torch.Generator().manual_seed(0)
    episodes = torch.arange(40) % 2

    def row(even, odd):
        middle = torch.where(episodes == 0, even, odd)[:, None, None]
        return {"episodes": episodes, "features": middle + torch.randn(40, 50, 2, generator=rng)}

    real = row(5.0, 4.0)
    assert quality.other_half(real, real) == pytest.approx(2 * 1.0, rel=0.1)
    assert quality.other_half(row(0.0, 3.0), real) == pytest.approx(2 * (4.0**2 + 2.0**2) / 2, rel=0.1)
    assert quality.frechet(row(5.0, 4.0), real) == pytest.approx(0, abs=0.02)


def test_targets_stand_where_the_protocol_says():
    real, codec = {"action_following": 0.8}, {"psnr": 31.0, "sharpness_ratio": 0.9, "frechet_unpaired": 1.5}
    ahead = {"psnr_by_horizon": {"0.5": 20.0}}
    teacher = {"action_following": 0.8, "sharpness_ratio": 1.0, "frechet_unpaired": 4.0, "frechet_paired": 2.0, **ahead}
    student = {"frechet_paired": 2.4, "action_following": 0.73, "sharpness_ratio": 1.1, "motion_ratio": 0.7}
    rows = {"real": real, "codec": codec, "teacher": teacher, "student": student, "repeat": ahead}
    found = [(t.low, t.high, t.met) for t in quality.targets(rows)]
    want = [
        (30, math.inf, True),
        (0.85, math.inf, True),
        (pytest.approx(0.95 * 0.8), math.inf, True),
        (0.85, 1.15, True),
        (-math.inf, pytest.approx(4.5), True),
        (20.0, math.inf, True),
        (-math.inf, pytest.approx(2.5), True),
        (pytest.approx(0.9 * 0.8), math.inf, True),
        (0.8, 1.2, True),
        (0.8, 1.2, False),
    ]
    assert found == want


def test_pictures_that_cannot_be_drawn_are_known_before_the_work(cfg, tiny_codec_path, monkeypatch):
    def missing():
        raise ImportError("no matplotlib")

    monkeypatch.setattr(report, "check_plots", missing)
    monkeypatch.setattr(suite, "judge", lambda *rest: pytest.fail("judged first"))
    with pytest.raises(ImportError, match="matplotlib"):
        suite.evaluate(SUITE, str(tiny_codec_path), cfg)


def test_flat_stuck_and_returning_frames_are_counted(rows):
    for name in ("flat_frames", "stuck_frames", "returns"):
        assert rows["real"][name] == rows["same"][name] == 0, name
    assert rows["repeat"]["stuck_frames"] == 1 and rows["repeat"]["returns"] == 0  # it never left
    assert rows["wall"]["flat_frames"] == 1 and rows["snapping"]["returns"] == pytest.approx(4 / 24, abs=0.05)


def test_a_video_that_turns_the_wrong_way_does_not_follow_its_actions(rows):
    assert rows["mirrored"]["turn_following"] < 0.5 < 0.85 < rows["real"]["turn_following"]
    assert rows["real"]["turn_flow_agrees"] > 0.7 > 0.3 > rows["mirrored"]["turn_flow_agrees"]
    assert rows["real"]["action_chance"] < 0.6 < rows["real"]["action_following"]


def test_error_against_the_true_future_grows_with_the_horizon(rows):
    error = rows["repeat"]["psnr_by_horizon"]
    assert list(error) == ["0.25", "0.5", "1"] and error["0.25"] > error["1"]


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory, tiny_student_path, tiny_teacher_path):
    """(result, folder of the report) of a whole evaluation."""
    out = tmp_path_factory.mktemp("out")
    cfg = replace(protocol(world, out), precision="bf16")
    return suite.evaluate(
        SUITE, str(tiny_student_path), cfg, teacher=str(tiny_teacher_path)
    ), out / "out" / "student-teacher"


def test_student_teacher_and_real_come_out_of_one_run_with_the_promised_keys(evaluated):
    result, _ = evaluated
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for row in ("student", "teacher", "real"):
        assert all(key in result[row] for key in (*KEYS, *DRIFTS)), row
        assert all(isinstance(result[row][key], float) for key in KEYS), row
    assert all(result["teacher"][key] is None for key in DRIFTS)
    assert all(result["student"][key] > 0 and result["real"][key] > 0 for key in DRIFTS)
    assert result["real"]["sharpness_ratio"] == 1 and result["real"]["late"]["motion_ratio"] == 1
    assert {"0.25", "0.5", "1"} == set(result["repeat"]["psnr_by_horizon"])
    assert result["student"]["name"] == "student" and result["teacher"]["name"] == "teacher"


def test_the_report_holds_every_file_that_its_page_links(evaluated):
    result, folder = evaluated
    page = (folder / "index.html").read_text()
    linked = re.findall(r'<img src="([^"]+)"', page)
    assert set(linked) == {"clips.png", "streams.png", "psnr_by_horizon.png", "motion.png", "drift.png"}
    assert all((folder / name).stat().st_size > 500 for name in linked)
    assert json.loads((folder / "result.json").read_text()) == result
    frames, fps = read_video(folder / "clips.mp4")
    assert re.findall(r'<video src="([^"]+)"', page) == ["clips.mp4"] and fps == pytest.approx(17.5, rel=0.01)
    assert frames.shape == (25, 4 * 32, 4 * 32, 3)  # four clips below each other, four kinds of video beside each other
    assert "Frechet" in page and "http" not in page
    table = report.table(METRICS, result)
    assert [c.header for c in table.columns] == ["measure", "real", "codec", "teacher", "student", "repeat"]


def test_the_same_run_twice_gives_the_same_figures_and_samples_the_teacher_once(cfg, tiny_teacher_path, monkeypatch):
    first = suite.evaluate(SUITE, str(tiny_teacher_path), cfg)
    monkeypatch.setattr(clips_module, "sample", None)  # calling it again would fail
    second = suite.evaluate(SUITE, str(tiny_teacher_path), cfg)
    for row in ("teacher", "real", "codec"):
        assert first[row] == second[row]
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 1.0}):
        with pytest.raises(TypeError):
            suite.evaluate(SUITE, str(tiny_teacher_path), replace(cfg, **change))


def test_a_teacher_and_a_codec_can_be_judged_alone(cfg, tiny_teacher_path, tiny_codec_path):
    alone = suite.evaluate(SUITE, str(tiny_teacher_path), cfg)
    assert {"real", "codec", "teacher", "repeat"} <= set(alone) and "student" not in alone
    assert len(SUITE.targets(alone)) == 6
    codec = suite.evaluate(SUITE, str(tiny_codec_path), cfg)
    assert codec["codec"]["psnr"] > 0 and not any(t.met for t in SUITE.targets(codec))  # it is untrained


def test_a_checkpoint_is_judged_by_the_world_it_learned_from_alone(cfg, tiny_student_path, tiny_codec_path):
    student, codec = checkpoint.load(tiny_student_path), checkpoint.load(tiny_codec_path)
    assert evaluation.suite_of("student", student.record) is SUITE
    assert evaluation.suite_of("codec", codec.record) is SUITE  # trained by somebody else: its card names no data
    for record in (student.record, codec.record):
        record["card"] = {"data": {"source": "cats"}}
        with pytest.raises(ValueError, match=r"cats \(card.data.source\)"):
            evaluation.suite_of("somebody", record)
    with pytest.raises(ValueError, match="cats"):
        suite.glance(SUITE, student, cfg)
    student.record["card"] = {}
    with pytest.raises(ValueError, match=r"card.*not name"):
        evaluation.suite_of("student", student.record)
    student.record["card"] = {"data": {"source": "shapes"}}
    with pytest.raises(ValueError, match="suite quality"):
        suite.glance(SUITE, student, cfg)


def test_a_teacher_of_another_world_is_refused(cfg, tiny_student_path, tiny_teacher_path):
    student, teacher = checkpoint.load(tiny_student_path), checkpoint.load(tiny_teacher_path)
    teacher.record["card"] = {"data": {"source": "shapes"}}
    with pytest.raises(ValueError, match=r"teacher.*not learn"):
        suite.judge(SUITE, {"student": student, "teacher": teacher}, cfg, "test")


def test_run_judges_a_checkpoint_and_shows_people_a_table(cfg, tiny_codec_path, capsys):
    own = replace(SUITE, config=lambda clips: replace(cfg, clips=clips))
    result = suite.run(own, str(tiny_codec_path), {}, "test", False, clips=4)
    shown = capsys.readouterr()
    assert result["protocol"]["clips"] == 4 and {"real", "codec"} <= set(result) and "student" not in result
    assert "sharpness_ratio" in shown.err and "missed: codec PSNR" in shown.err and not shown.out


def test_a_quick_look_is_at_the_student_alone_and_says_how_sure_it_is(world, tmp_path, tiny_student_path, capsys):
    walks = str(tmp_path / "walks-{split}")
    write_walks(tmp_path / "walks-test" / "frames", num=10, length=30, split="test")
    cfg = replace(protocol(world, tmp_path), episodes=10, data=walks)
    own = replace(
        SUITE, config=lambda **how: replace(cfg, **how), quick={"clips": 10, "long_seconds": 0.0, "draws": 20}
    )
    result = suite.run(own, str(tiny_student_path), {}, "test", True)
    assert "teacher" not in result and result["protocol"]["clips"] == 10 and result["schema"] == 2
    low, high = result["student"]["sharpness_ratio_interval"]
    assert low < result["student"]["sharpness_ratio"] < high
    assert set(result["student"]["psnr_by_horizon_interval"]) == set(result["student"]["psnr_by_horizon"])
    assert " to " in capsys.readouterr().err


def test_teacher_and_student_see_start_image_and_actions(
    world, cfg, tiny_teacher_path, tiny_student_path, tiny_codec_path
):
    codec = checkpoint.load(tiny_codec_path).net
    batch = next(iter(held_out(world, cfg).batches))
    makers = {tiny_teacher_path: teacher_row, tiny_student_path: student_row}
    for name, maker in makers.items():
        row = maker(checkpoint.load(name), codec, cfg)
        plain = row(batch)
        assert plain.shape == batch.px.shape and torch.equal(plain, row(batch)), name
        assert torch.allclose(plain[:, 0], codec.decode(codec.encode(batch.px[:, :1]))[:, 0], atol=2e-3), name
        actions, poses = batch.condition.args

        def told(actions, batch=batch, poses=poses):
            return replace(batch, condition=partial(quality.walk_condition, actions, poses))

        assert not torch.equal(plain, row(told(actions.flip(-1)))), name
        later = actions.clone()
        later[:, 0] = 1.0  # what led to the start image is nobody's business
        assert torch.equal(plain, row(told(later))), name


def test_a_student_with_a_camera_hears_where_the_walk_really_went(tiny_student_path, tiny_codec_path):
    codec = checkpoint.load(tiny_codec_path).net
    bundle, camera = checkpoint.load(tiny_student_path), CameraConfig(step=0.15, turn=0.1)
    actions, poses = torch.ones(1, 13, 4), torch.rand(1, 13, 3)
    plain = quality.walk_condition(actions, poses, bundle, codec)
    assert set(plain.per_frame) == {"modulation"} and not plain.per_frame["modulation"][:, 0, :-1].any()
    bundle.record["world"]["camera"] = asdict(camera)
    heard = quality.walk_condition(actions, poses, bundle, codec).per_frame
    for site, wanted in walked(poses[:, ::4], camera, 4).items():
        assert torch.equal(heard[site], wanted), site
    assert torch.equal(heard["modulation"], plain.per_frame["modulation"])


def test_half_precision_of_the_rollout_does_not_leak_to_whoever_takes_the_chunks(tiny_student_path, tiny_codec_path):
    student, codec = checkpoint.load(tiny_student_path), checkpoint.load(tiny_codec_path).net
    cond = quality.walk_condition(torch.zeros(1, 13, 4), torch.zeros(1, 13, 3), student, codec)
    for chunk in student_chunks(student, torch.zeros(1, 1, 4, 4, 4), cond, 2, 0, "bf16"):
        assert chunk.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_a_glance_judges_a_student_without_its_teacher(cfg, tiny_student_path):
    seen = suite.glance(SUITE, str(tiny_student_path), cfg)
    assert seen["frechet_paired"] > 0 and not (Path(cfg.out)).exists()


def test_windows_spread_over_all_episodes_before_they_repeat_one():
    assert quality.windows(3, 100, 40, 3) == [(0, 30), (1, 30), (2, 30)]
    assert quality.windows(2, 100, 40, 5) == [(0, 0), (1, 0), (0, 30), (1, 30), (0, 60)]
    with pytest.raises(ValueError, match="100"):
        quality.windows(2, 100, 101, 2)


@pytest.mark.parametrize(("split", "folder", "seed"), SPLIT_FOLDERS)
def test_missing_episodes_are_recorded_with_seeds_of_their_split(tmp_path, split, folder, seed):
    asked = []

    def record(cfg, seeds):
        asked.extend(seeds)
        return (walk(s, cfg.num_frames) for s in seeds)

    rooms, data = Rooms("doom", replace(DOOM, record=record), split), str(tmp_path / "new-{split}")
    clips = rooms.episodes(data, "frames", (3, 30), (2, 25), offset=5)
    assert asked == [seed, seed + 1, seed + 2] and clips.tensors["frames"].shape[:2] == (3, 30)
    assert (tmp_path / f"new-{folder}" / "frames").is_dir()
    rooms.episodes(data, "frames", (3, 30), (2, 25), offset=5)
    assert len(asked) == 3
    with pytest.raises(ValueError, match="needed are 4 of 25"):
        rooms.episodes(data, "frames", (4, 30), (4, 25), offset=5)
    with pytest.raises(ValueError, match=f"begins.*room {seed}"):
        rooms.episodes(data, "frames", (3, 30), (2, 25))
    replace(rooms, first=40).episodes(data, "frames", (2, 30), (2, 25))
    assert asked[3:] == [seed + 35, seed + 36]


def test_episodes_of_another_split_are_no_measure(tmp_path):
    for split in ("train", "validation"):
        write_walks(tmp_path / split / "frames", num=2, length=30, split=split)
        with pytest.raises(ValueError, match=f"split '{split}'"):
            Rooms("doom", DOOM, "test").episodes(str(tmp_path / split), "frames", (2, 30), (2, 30))
    with pytest.raises(ValueError, match="train"):
        Rooms("doom", DOOM, "train")


def test_choosing_never_opens_a_room_of_the_test(cfg, tiny_student_path, monkeypatch):
    opened = []
    monkeypatch.setattr(Rooms, "seeds", lambda self, offset, count: opened.append(self.split) or [1_000_000])
    suite.glance(SUITE, str(tiny_student_path), cfg)
    assert set(opened) == {"validation"}


def test_a_stream_measured_in_pieces_equals_the_whole():
    px = torch.rand(2, 31, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, pieces = StreamTally(29, 8), StreamTally(29, 8)
    whole.add(px)
    for piece in px.split([1, 12, 12, 6], dim=1):
        pieces.add(piece)
    for name in ("sharpness", "saturation", "contrast", "motion"):
        assert whole.curve(name).shape == (2, 28) and torch.equal(whole.curve(name), pieces.curve(name)), name
    assert torch.equal(torch.cat(pieces.pictures, 1), torch.cat(whole.pictures, 1))
    assert torch.equal(torch.cat(whole.pictures, 1), (px[:, [0, 8, 16, 24]] * 255).round().byte().movedim(2, -1))
    assert torch.equal(whole.tail, pieces.tail) and torch.equal(whole.tail, px[:, 19:29])


def test_drift_shows_a_stream_that_loses_its_colour_and_not_one_that_keeps_it(world):
    data = replace(held_out(world, EvalConfig(stride=1)), batches=())
    episode = Clips(world / "data-test" / "long")
    px = episode.tensors["frames"].permute(0, 1, 4, 2, 3).float() / 255
    fading = torch.lerp(px, px.mean(2, keepdim=True).expand_as(px), torch.linspace(0, 1, 45)[:, None, None, None])
    asked = torch.stack(action_labels(episode.tensors["actions"]), -1)
    tallies = [StreamTally(45, 10), StreamTally(45, 10)]
    for tally, clip in zip(tallies, (px, fading)):
        tally.add(clip)
    real, lost = (curve_drifts(t, tallies[0]) for t in tallies)
    quality.add_late_following(real, tallies[0], asked, data, 0)
    assert real["late"]["saturation_ratio"] == 1 and real["late"]["action_following"] > 0.8
    assert "late_interval" not in real  # of two streams
    many, eight = StreamTally(45, 10), px.repeat(4, 1, 1, 1, 1)
    eight[:2, -10:] = 0.5  # two of eight show nothing at the end
    many.add(eight)
    row = {"late": {}}
    quality.add_late_following(row, many, asked.repeat(4, 1, 1), data, 50)
    low, high = row["late_interval"]["action_following"]
    assert low < row["late"]["action_following"] < high < 1 and row["late"]["action_following"] < 0.95
    assert lost["saturation_drift"] < 0.3 * real["saturation_drift"] and lost["late"]["saturation_ratio"] < 0.3


def test_a_tally_keeps_a_few_clips_to_look_at(world, cfg):
    data = held_out(world, cfg)
    tally = Tally(data)
    for batch in data.batches:
        tally.add({"episodes": lambda v: v.batch.facts["episodes"]}, batch.px, batch)
    shown = np.stack(tally.shown)
    assert shown.shape == (4, 25, 16, 16, 3) and shown.dtype == np.uint8
    assert tally["episodes"].tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"clips": 0}, "clips"), ({"long_seconds": 5.0}, "long_seconds"), ({"precision": "fp8"}, "precision")],
)
def test_impossible_protocols_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        EvalConfig(**change)


def test_a_student_that_cannot_start_from_a_picture_is_refused(cfg, tiny_student_path, tiny_codec_path):
    student = checkpoint.load(tiny_student_path)
    student.record["schedule"]["given_chunks"] = 0
    with pytest.raises(ValueError, match="start image"):
        quality.held_out(student, checkpoint.load(tiny_codec_path).net, Rooms("doom", DOOM), cfg)


def test_the_teacher_is_found_through_the_card_or_asked_for(tiny_student_path, tiny_teacher_path):
    student = checkpoint.load(tiny_student_path)
    student.record["card"] = {"parents": [str(tiny_teacher_path)]}
    assert suite.teacher_of(student).name == "teacher"
    student.record["card"] = {}
    with pytest.raises(checkpoint.CheckpointError, match="no teacher"):
        suite.teacher_of(student)


def test_plain_numbers_fit_json():
    assert report.plain({"a": math.nan, "b": [math.inf, 1 / 3], 3: "x"}) == {"a": None, "b": [None, 0.333333], "3": "x"}


@pytest.mark.parametrize(("value", "met"), [(0.79, False), (0.8, True), (1.2, True), (1.21, False), (None, False)])
def test_a_target_says_whether_it_is_met(value, met):
    target = report.Target("motion", value, 0.8, 1.2)
    assert target.met is met and ("met" if met else "missed") in str(target) and "0.8 to 1.2" in str(target)


def stopped(path, cfg, monkeypatch):
    """Half an evaluation; returns a list that gets what is measured from now on."""
    made, plain = [], suite.add_row

    def stopping(*told):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(told)
        plain(*told)

    monkeypatch.setattr(suite, "add_row", stopping)
    with pytest.raises(KeyboardInterrupt):
        suite.evaluate(SUITE, str(path), cfg, quick=True)
    made.clear()
    monkeypatch.setattr(suite, "add_row", lambda *told: (made.append(told), plain(*told)))
    return made


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(cfg, tiny_student_path, monkeypatch):
    whole = suite.evaluate(SUITE, str(tiny_student_path), replace(cfg, cache=""), quick=True)
    made, kept = stopped(tiny_student_path, cfg, monkeypatch), Path(cfg.cache) / "unfinished"
    assert len(list(kept.iterdir())) == 5
    result = suite.evaluate(SUITE, str(tiny_student_path), cfg, quick=True)
    assert len(made) == 2 * 5 - 5 and not list(kept.iterdir())
    assert {row: result[row] for row in ("real", "student", "codec")} == {
        row: whole[row] for row in ("real", "student", "codec")
    }
    made.clear()
    suite.evaluate(SUITE, str(tiny_student_path), cfg, quick=True)
    assert len(made) == 10


def test_the_filter_of_the_decoder_is_told_by_ratios_without_it(cfg, tmp_path, tiny_student_path, tiny_teacher_path):
    codec = TinyCodec(replace(CODEC, smooth=0.3))
    codec.load_state_dict(checkpoint.load_codec(checkpoint.load(tiny_student_path)).state_dict())
    checkpoint.export(tmp_path / "codec", codec, {"card": {}})
    student = checkpoint.load(tiny_student_path)
    record = {**student.record, "codec": str(tmp_path / "codec")}
    checkpoint.export(tmp_path / "student", student.net, record)
    teacher = checkpoint.load(tiny_teacher_path)
    checkpoint.export(tmp_path / "teacher", teacher.net, {**teacher.record, "codec": str(tmp_path / "codec")})
    result = suite.evaluate(SUITE, str(tmp_path / "student"), cfg, teacher=str(tmp_path / "teacher"))
    plain = suite.evaluate(SUITE, str(tiny_student_path), cfg, quick=True)
    bare = result["codec"]["unfiltered"]
    assert bare["sharpness_ratio"] == pytest.approx(plain["codec"]["sharpness_ratio"], rel=1e-4)
    assert result["codec"]["sharpness_ratio"] < 0.98 * bare["sharpness_ratio"]
    assert {"unfiltered"} <= set(result["student"]) & set(result["teacher"]) and "unfiltered" not in plain["codec"]


def test_guidance_is_chosen_on_validation_and_the_reasons_are_written(
    world, cfg, tiny_teacher_path, monkeypatch, tmp_path, capsys
):
    own = replace(SUITE, config=lambda **how: replace(cfg, **how))
    monkeypatch.setitem(evaluation.SUITES, SUITE.name, own)
    opened = []
    monkeypatch.setattr(Rooms, "episodes", record_split(opened, Rooms.episodes))
    command = ["eval", str(tiny_teacher_path), "--choose-guidance", "1,3", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0 and set(opened) == {"validation"}
    found = json.loads((tmp_path / "out" / "teacher-guidance.json").read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    figures = {float(scale): row["frechet_paired"] for scale, row in found["scales"].items()}
    assert set(figures) == {1.0, 3.0} and found["guidance"] == min(figures, key=figures.get)
    assert "on validation" in found["why"] and found["split"] == "validation" and len(found["lost"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--choose-guidance", "1,2", "--suite", "minutes"], "--suite say nothing to --choose-guidance"),
        (["--choose-guidance", "1,2", "--split", "test", "--guidance", "3"], "--split test, --guidance say nothing"),
        (["--choose-guidance", "1,2", "--quick", "--vs", "doom-tf"], "--vs, --quick say nothing"),
        (["--choose-guidance", "1,2", "--glance"], "--glance say nothing"),
        (["--glance", "--split", "test"], "validation clips; leave out --split test"),
    ],
)
def test_options_that_change_nothing_are_refused(tiny_teacher_path, capsys, given, said):
    assert main(["eval", str(tiny_teacher_path), *given]) == 1
    assert said in capsys.readouterr().err


def test_guidance_is_chosen_on_the_rooms_and_by_the_metrics_that_are_asked_for(tiny_teacher_path, monkeypatch):
    asked = []

    def choose(suite, name, scales, cfg):
        asked.append((cfg.first_seed, cfg.clips, cfg.metrics, scales))
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "choose_guidance", choose)
    more = ["--first-seed", "500", "--clips", "8", "--metric", "lpips=a", "--metric", "fvd=b"]
    assert main(["eval", str(tiny_teacher_path), "--choose-guidance", "1,2", *more]) == 130
    assert asked == [(500, 8, {"lpips": "a", "fvd": "b"}, (1.0, 2.0))]


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_scale_of_the_text_leaves_that_of_the_sound(tiny_teacher_path, monkeypatch, guidance):
    teacher = checkpoint.load(tiny_teacher_path)
    own = replace(teacher, record={**teacher.record, "guidance": 1.5, "audio_guidance": 2.0})
    scales = []
    monkeypatch.setattr(clips_module, "branches", lambda cond, *told: scales.append(told) or ([], []))
    monkeypatch.setattr(clips_module, "start", lambda *_: (None, Condition(), (1, FRAMES)))
    monkeypatch.setattr(clips_module, "sample", lambda net, noise, *_, **__: noise)
    batch = Batch(torch.zeros(1, 25, 3, 16, 16), None, 0)
    teacher_row(own, checkpoint.load_codec(own), EvalConfig(cache="", guidance=guidance))(batch)
    assert scales == [(guidance or 1.5, 2.0)]


def test_samples_of_other_settings_are_told_of_once(cfg, tiny_teacher_path, caplog):
    cache = Path(cfg.cache)
    cache.mkdir(parents=True)
    told = "keeps samples of other settings"
    for expected in (0, 1, 0):  # an empty folder, one with other samples, and one with these
        caplog.clear()
        with caplog.at_level("INFO", logger="vidistill"):
            suite.evaluate(SUITE, str(tiny_teacher_path), replace(cfg, steps=2 + expected))
        assert sum(told in record.message for record in caplog.records) == expected


def test_broken_clips_are_not_judged(cfg, tiny_student_path, monkeypatch):
    plain = suite.Suite.__dataclass_fields__["student"].default

    def broken(*told):
        row = plain(*told)
        return lambda batch: row(batch).index_fill(1, torch.tensor([5]), torch.nan)

    with pytest.raises(ValueError, match=r"student .*finite"):
        suite.evaluate(replace(SUITE, student=broken), str(tiny_student_path), cfg, quick=True)
    stream = StreamTally(10, 2)
    stream.add(torch.rand(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"streams .*finite"):
        stream.add(torch.full((1, 4, 3, 8, 8), torch.inf))


@pytest.mark.parametrize(
    ("change", "said"),
    [({"fps": 5.0}, "fps 5.0"), ({"source": "nonsense"}, "source 'nonsense'"), ({"turn": True}, "turn")],
)
def test_episodes_of_another_engine_are_refused(tmp_path, change, said):
    engine = asdict(DOOM.config(supersample=3, num_frames=60))
    meta = {"source": "doom", "split": "test", "fps": 17.5, "config": engine}
    if "turn" in change:
        key = next(name for name in engine if "turn" in name)
        meta["config"], said = {**engine, key: 11.25}, f"{key} 11.25"
    else:
        meta |= change
    episodes = (walk(seed, 60) for seed in split_seeds("test", 4))
    write_shards(tmp_path / "test" / "frames", frame_shards(episodes), meta)
    with pytest.raises(ValueError, match=re.escape(f"recorded with {said}")):
        Rooms("doom", DOOM, "test").episodes(str(tmp_path / "{split}"), "frames", (4, 60), (4, 60))


def test_half_of_a_judgement_is_not_taken_from_another_judge(cfg, tiny_student_path, world, monkeypatch, tmp_path):
    for file in world.glob("probe.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = replace(cfg, probe=str(tmp_path / "probe"))
    made = stopped(tiny_student_path, own, monkeypatch)
    probe = probes.load_probe(tmp_path / "probe")
    next(probe.parameters()).data.mul_(1.5)
    for file in tmp_path.glob("probe.*"):
        file.unlink()
    probes.save_probe(tmp_path / "probe", probe, {})
    suite.evaluate(SUITE, str(tiny_student_path), own, quick=True)
    assert len(made) == 10


def test_a_metric_without_weights_does_not_depend_on_the_files_around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Data([], 12.0)
    cfg = EvalConfig(metrics={"vbench.temporal_flickering": "", "lpips": "lpips"})
    before = suite.fingerprint({}, None, cfg, {}, data)
    (tmp_path / "another").write_text("x")
    assert suite.fingerprint({}, None, cfg, {}, data) == before
    (tmp_path / "lpips").write_text("weights")
    assert suite.fingerprint({}, None, cfg, {}, data) != before


def record_split(opened, plain):
    def episodes(self, *args):
        opened.append(self.split)
        return plain(self, *args)

    return episodes
