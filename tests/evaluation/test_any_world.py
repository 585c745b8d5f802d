"""A world that is not bundled: clips of an environment and of videos, judged by what is learned from them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_cheats as cheats
import tiny_env  # noqa: F401  (registers the environment)
import torch
import torch.nn.functional as F
from conftest import CODEC, DIT, STUDENT, random_dit

from vidistill import checkpoint
from vidistill.checkpoint import Bundle
from vidistill.cli.main import main
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import pack_actions
from vidistill.data.importers.write import Clip, shard_of
from vidistill.data.shards import DataError, write_shards
from vidistill.diffusion import LatentShape
from vidistill.evaluation import SUITES, any_world, own_probe, suite
from vidistill.evaluation.any_world import METRICS, SUITE, AnyWorldConfig
from vidistill.evaluation.clips import Data, Tally
from vidistill.evaluation.footage import Footage, check_world, unpacked
from vidistill.evaluation.own_probe import ActionClasses, OwnProbeConfig
from vidistill.evaluation.probes import Probe, ProbeConfig
from vidistill.models.dit import extend
from vidistill.models.layers import SiteConfig
from vidistill.models.student import CausalStudent

ENV = "tiny_env:Tiny-v0"
FRAMES = 7  # latents of a clip: 25 px frames
SHAPE = LatentShape(FRAMES, 4, 4, 4)
OWN = OwnProbeConfig(steps=250, batch=32, lr=8e-3, size=16, widths=(24, 32), features=16)


def test_a_probe_sees_clips_of_any_size_in_its_own():
    probe = Probe(ProbeConfig(16, 2, (24, 32), 16, heads={"turn": 3})).eval()
    large = torch.rand(2, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = F.interpolate(large.flatten(0, 1), (16, 16), mode="bilinear", antialias=True).unflatten(0, (2, 9))
    with torch.no_grad():
        seen, want = Data([], 12.0, probe, fitted=True).read(large), Data([], 12.0, probe).read(small)
    assert torch.equal(seen.features, want.features)


def test_one_action_all_along_is_read_back_by_luck_as_well():
    data = Data([], 12.0, heads={"turn": 2})
    tally = Tally(data)
    tally.parts = {"read": [torch.zeros(4, 3, 1)], "asked": [torch.zeros(4, 3, 1)]}
    assert math.isnan(any_world.above_chance(tally, tally))


def test_files_from_another_place_are_told_of(caplog):
    def bundle(place):
        return Bundle("mine", "student", None, {"card": {"data": {"source": "videos", "from": place}}})

    held = SimpleNamespace(meta={"source": "videos", "from": "cats"})
    check_world(bundle("cats"), held)
    assert not caplog.records
    check_world(bundle("cars"), held)
    assert "mine learned from files of cars, judged are files of cats" in caplog.text


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Episodes of the environment, their latents, and tiny networks that learned from nothing."""
    root = tmp_path_factory.mktemp("gym")
    torch.manual_seed(0)
    codec = TinyCodec(CODEC)
    checkpoint.export(root / "codec", codec, {"card": {}})
    options = ["--episodes", "16", "--validation", "3", "--test", "9", "--frames", "61", "--workers", "1"]
    options += ["--resize", "crop"]  # stretched to 16 px, some steps would be too short to be seen
    assert main(["data", "gym", str(root / "data"), "--env", ENV, "--size", "16x16", *options]) == 0
    assert (
        main(["data", "latents", str(root / "latents"), "--from", str(root / "data"), "--codec", str(root / "codec")])
        == 0
    )
    dit = replace(DIT, sites={"modulation": SiteConfig(4 * 2 + 1)})
    record = {
        "noise": {"shift": 2.0},
        "schedule": {"levels": [1.0, 0.5], "given_chunks": 1},
        "codec": str(root / "codec"),
        "world": {"fps": 15.0, "actions": ["left", "right"], "px_size": 16, "temporal": 4},
        "card": {"data": {"source": "gym", "config": {"env": ENV}}},
    }
    checkpoint.export(root / "teacher", random_dit(dit), {**record, "shape": vars(SHAPE)})
    checkpoint.export(root / "student", CausalStudent(random_dit(dit, 1), STUDENT, SHAPE), record)
    return root


def protocol(world, **changes):
    made = {
        "clips": 18, "batch": 9, "streams": 2, "long_seconds": 6.0, "window": 1.0, "steps": 2, "seeds": 2, "draws": 20,
        "futures": 9, "data": str(world / "data"), "cache": "", "out": "", "precision": "fp32", "own_probe": OWN,
    }  # fmt: skip
    return AnyWorldConfig(**{**made, **changes})


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    cfg = protocol(world, out=str(out))
    return suite.evaluate(SUITE, str(world / "student"), cfg, teacher=str(world / "teacher")), out


def test_a_student_of_any_world_has_every_figure_with_its_interval(evaluated):
    result, out = evaluated
    assert json.loads(json.dumps(result, allow_nan=False)) == result and result["schema"] == 2
    student = result["student"]
    assert set(METRICS) - set(student) == {"pace"}
    for key in ("frechet_paired", "frechet_unpaired", "action_above_chance", "sharpness_ratio", "stuck_frames"):
        low, high = student[f"{key}_interval"]
        assert low <= student[key] <= high, key
    assert set(student["action_following_each"]) == {"left", "right"}
    assert set(student["psnr_above_repeat"]) == set(student["psnr_above_repeat_interval"]) == {"0.5", "1"}
    assert student["sharpness_drift"] > 0 and student["late"]["action_following"] > 0
    assert result["protocol"]["true_futures"] == 9 and result["protocol"]["clips"] == 18
    assert {p.name for p in (out / "student-teacher").iterdir()} >= {"result.json", "index.html", "clips.png"}


def test_actions_are_read_from_real_video_and_not_from_video_of_other_actions(evaluated, world):
    real = evaluated[0]["real"]
    assert real["action_above_chance"] > 0.5 > 0.2 > abs(evaluated[0]["repeat"]["action_above_chance"])
    footage, student = Footage.open(world / "data", "test"), checkpoint.load(world / "student")
    data = any_world.held_out(student, checkpoint.load_codec(student), footage, protocol(world))
    others = {"mirrored": lambda b: b.px.flip(-1), "elsewhere": lambda b: b.px.roll(1, 0)}
    tallies = suite.measure(METRICS, others, data)
    figures = {name: suite.run_figures(METRICS, own, tallies["real"][0]) for name, own in tallies.items()}
    assert all(figures[name]["action_above_chance"] < 0.3 for name in others), figures


CAUGHT = {
    "mirrored": (cheats.mirrored, "action_above_chance"),
    "another clip's video": (cheats.elsewhere, "action_above_chance"),
    "late": (cheats.late, "action_above_chance"),
    "backwards": (cheats.backwards, "action_above_chance"),
    "blurred": (cheats.blurred, "sharpness_ratio"),
    "over-sharpened": (cheats.sharpened, "sharpness_ratio"),
    "saturating": (cheats.saturated, "saturation_ratio"),
    "pasting the first frame": (cheats.paste_start, "motion_ratio"),
    "frozen": (cheats.frozen, "stuck_frames"),
    "one frame in eight repeated": (cheats.repeating, "stuck_frames"),
    "walls alone": (cheats.walls, "flat_frames"),
}


def test_cheats_in_a_world_of_ones_own_are_caught_by_the_figure_that_names_them(evaluated, world):
    """The honest student shows real video with a little noise of its own."""
    footage, student = Footage.open(world / "data", "test"), checkpoint.load(world / "student")
    data = any_world.held_out(student, checkpoint.load_codec(student), footage, protocol(world))

    def honest(batch):
        noise = torch.randn(batch.px.shape, generator=torch.Generator().manual_seed(batch.seed))
        return (batch.px + 0.003 * noise).clamp(0, 1)

    rows = {"student": honest} | {name: lambda b, do=do: do(b.px, b) for name, (do, _) in CAUGHT.items()}
    tallies = suite.measure(METRICS, rows, data, {"student": 3})
    result = {name: suite.run_figures(METRICS, own, tallies["real"][0]) for name, own in tallies.items()}
    mine = {name: result[name] for name in ("real", "student")}
    suite.add_certainty(METRICS, mine, {name: tallies[name] for name in mine}, {}, 100)
    assert not [name for name, (_, figure) in CAUGHT.items() if not cheats.flagged(result, name, figure)]


def test_the_network_is_trained_once_for_the_same_clips_and_settings(evaluated, world, monkeypatch):
    footage, codec = Footage.open(world / "data", "test"), checkpoint.load(world / "codec").net
    kept = own_probe.own_probe(footage, codec, OWN, lambda step: pytest.fail("trained again"))
    fresh = own_probe.own_probe(footage, codec, replace(OWN, seed=1), lambda step: None)
    assert kept.path.parent == world / "data" and fresh.path != kept.path
    fresh.path.with_suffix(".json").unlink()
    again = own_probe.own_probe(footage, codec, replace(OWN, seed=1), lambda step: None)
    for name, x in fresh.probe.state_dict().items():
        assert torch.equal(x, again.probe.state_dict()[name]), name
        assert x.numel() == 1 or "num_batches" in name or not torch.equal(x, kept.probe.state_dict()[name]), name
    clips = own_probe.fingerprint(world / "data" / "train", OWN)
    assert clips != own_probe.fingerprint(world / "data" / "validation", OWN)


def test_latents_are_judged_as_their_codec_shows_them(world):
    cfg = protocol(world, data=str(world / "latents" / "test"), long_seconds=6.0)
    result = suite.evaluate(SUITE, str(world / "student"), cfg, teacher=str(world / "teacher"))
    assert set(METRICS) - set(result["student"]) == {"pace"} and result["protocol"]["true_futures"] == 9
    footage, codec = Footage.open(world / "latents", "test"), checkpoint.load(world / "codec").net
    shown = codec.decode(footage.clips.gather([(2, 3)], 7).x)
    assert torch.equal(footage.px([(2, 3)], 7, codec), shown)
    told = footage.actions((2, 3), 7, 4)
    assert torch.equal(told[1:], Footage.open(world / "data", "test").clips.episode("actions", 2)[13:37])


def test_actions_come_back_from_what_was_packed():
    actions = torch.rand(9, 3)
    assert torch.equal(unpacked(pack_actions(actions[None], 4)[0], 4), actions)


def test_classes_of_actions_are_what_is_done_and_what_is_not():
    actions = torch.tensor([[0.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.2, 0.0], [1.0, 0.0, 0.0]])
    classes = ActionClasses.of(["press", "steer", "never"], actions)
    assert classes.edges == {"press": [0.5], "steer": [-0.5, 0.5]} and list(classes.heads.values()) == [2, 3]
    assert classes(actions).tolist() == [[0, 2], [1, 0], [0, 1], [1, 1]]


def squares(seed, length=40):
    """A square that falls ever faster over a floor of its own: what is played backwards can be seen."""
    rng = np.random.default_rng(seed)
    frames = np.full((length, 16, 16, 3), rng.integers(0, 120, 3), np.uint8)
    x, start = rng.integers(0, 12), rng.integers(0, 16)
    for t in range(length):
        y = int(start + 0.12 * (t % 16) ** 2) % 13
        frames[t, y : y + 4, x : x + 4] = (250, 210, 40)
    return Clip(frames, {"seed": seed})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for k, (split, count) in enumerate((("train", 24), ("test", 9))):
        meta = {"source": "videos", "split": split, "fps": 15.0, "given": 1, "px_size": 16}
        write_shards(root / split, [shard_of([squares(100 * k + i) for i in range(count)])], meta)
    return root


def test_without_actions_it_is_read_how_a_video_is_played(videos, world):
    codec = checkpoint.load(world / "codec")
    codec.record["card"] = {"data": {"source": "videos"}}
    cfg = protocol(videos, data=str(videos), own_probe=replace(OWN, steps=400))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(any_world, "CODEC_FRAMES", 7)
        data = any_world.held_out(codec, codec.net, Footage.open(videos, "test"), cfg)
    rows = {
        "backwards": lambda b: b.px.flip(1),
        "fast": lambda b: b.px[:, [min(2 * t, 24) for t in range(25)]],
        "blurred": lambda b: torch.nn.functional.avg_pool2d(b.px.flatten(0, 1), 3, 1, 1).view_as(b.px),
    }
    tallies = suite.measure(METRICS, rows, data)
    found = {name: suite.run_figures(METRICS, own, tallies["real"][0]) for name, own in tallies.items()}
    assert found["real"]["pace"] > 0.6 > 0.3 > found["backwards"]["pace"] and found["fast"]["pace"] < 0.5
    assert found["blurred"]["frechet_paired"] > 0.3
    assert "action_following" not in found["real"]


def changed(folder, to, **meta):
    """A copy of a data folder whose record says something else."""
    shutil.copytree(folder, to)
    path = to / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **meta}))
    return to


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"source": "videos"}, "source gym, .*source videos"),
        ({"config": {"env": "Pong"}}, "environment tiny_env:Tiny-v0, .* has environment Pong"),
        ({"fps": 30.0}, "15.0, .*30.0"),
        ({"actions": ["up", "down"]}, "left, right, .*up, down"),
        ({"split": "train"}, "split 'train'.*test"),
    ],
)
def test_clips_that_say_nothing_about_a_student_are_refused(world, tmp_path, meta, says):
    data = changed(world / "data" / "test", tmp_path / "test", **meta)
    with pytest.raises(ValueError, match=says):
        suite.evaluate(SUITE, str(world / "student"), protocol(world, data=str(data)), quick=True)


def test_clips_of_another_size_or_codec_are_refused(world, tmp_path):
    options = ["--episodes", "1", "--validation", "0", "--test", "9", "--frames", "30", "--workers", "1"]
    assert main(["data", "gym", str(tmp_path / "big"), "--env", ENV, "--size", "24x24", *options]) == 0
    with pytest.raises(ValueError, match=r"size 16x16, .* has size 24x24"):
        suite.evaluate(SUITE, str(world / "student"), protocol(world, data=str(tmp_path / "big")), quick=True)
    other = changed(world / "latents" / "test", tmp_path / "test", codec="another-codec")
    with pytest.raises(ValueError, match=r"codec codec, .* has codec another-codec"):
        suite.evaluate(SUITE, str(world / "student"), protocol(world, data=str(other)), quick=True)


def test_a_missing_split_too_few_episodes_and_missing_training_clips_are_said_before_any_work(world, tmp_path):
    student = str(world / "student")
    with pytest.raises(DataError, match=r"test split.*train"):
        shutil.copytree(world / "data" / "train", tmp_path / "some" / "train")
        suite.evaluate(SUITE, student, protocol(world, data=str(tmp_path / "some")), quick=True)
    with pytest.raises(DataError, match=r"3 episodes.*25 frames.*8"):
        suite.evaluate(SUITE, student, protocol(world), split="validation", quick=True)
    shutil.copytree(world / "data" / "test", tmp_path / "alone" / "test")
    with pytest.raises(DataError, match=r"features.*training clips"):
        suite.evaluate(SUITE, student, protocol(world, data=str(tmp_path / "alone")), quick=True)
    with pytest.raises(ValueError, match=r"eval.data"):
        suite.evaluate(SUITE, student, protocol(world, data=""), quick=True)


def test_the_command_judges_a_world_of_ones_own(world, evaluated, monkeypatch, capsys):
    own = replace(SUITE, config=lambda **how: protocol(world, **how), quick={"clips": 9, "long_seconds": 0.0})
    monkeypatch.setitem(SUITES, SUITE.name, own)
    assert main(["eval", str(world / "student"), "--data", str(world / "data"), "--quick", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["protocol"]["clips"] == 9 and "teacher" not in result
    assert main(["eval", str(world / "student"), "--data", str(world / "data"), "--suite", "memory"]) == 1
    assert "--data" in capsys.readouterr().err
    assert main(["eval", str(world / "student")]) == 1
    assert "(--data)" in capsys.readouterr().err


def test_other_actions_lead_to_their_own_true_future(world):
    footage = Footage.open(world / "data", "test")
    student = checkpoint.load(world / "student")
    judged = suite.judge(replace(SUITE, more=lambda judged: None), {"student": student}, protocol(world), "test")
    batch, ends = any_world.future_batch(judged)
    assert ends == {"0.5": 8, "1": 15} and batch.px.shape[1] == 25
    recorded = footage.clips.tensors["frames"][:9, :25].permute(0, 1, 4, 2, 3).float() / 255
    assert torch.equal(batch.px[:, 0], recorded[:, 0]) and not torch.equal(batch.px, recorded)
    told = batch.condition(student, judged.codec, None).per_frame["modulation"]
    others = footage.clips.tensors["actions"].roll(-1, 0)[:9, :25]
    assert torch.equal(told[:, 1:], pack_actions(others, 4)[:, 1:])
    assert Path(footage.training).name == "train"
    net = student.net.net
    shown = extend(net, replace(net.cfg, extra_channels=net.cfg.channels + 4))
    from_a_picture = replace(student, net=CausalStudent(shown, student.net.cfg, student.net.shape))
    with pytest.raises(DataError, match="student"):
        batch.condition(from_a_picture, judged.codec, None)
