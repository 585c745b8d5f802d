import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_text import write_world

from vidistill import checkpoint, cli
from vidistill.conditioning.text import Ngrams
from vidistill.data.shards import captioned_shards, write_shards
from vidistill.evaluation import SUITES, probes, prompt_adherence, report, suite
from vidistill.evaluation.clips import Data, Tally
from vidistill.evaluation.probes import Reading
from vidistill.evaluation.prompt_adherence import METRICS, SUITE, AdherenceConfig, accuracy, right_of
from vidistill.evaluation.rooms import Rooms
from vidistill.streaming.prompt_switch import SWITCHES
from vidistill.worlds import WORLDS, shapes
from vidistill.worlds.shapes import ATTRIBUTES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("text"))


def protocol(world, tmp_path):
    return AdherenceConfig(
        clips=3, batch=2, first_seed=3, before=1.0, after=1.5, window=0.7, streams=2, long_seconds=2.0,
        steps=2, stride=1, probe=str(world / "probe"), out=str(tmp_path), cache=str(tmp_path / "cache"),
    )  # fmt: skip


def test_student_teacher_and_real_come_out_of_one_run(world, tmp_path):
    result = suite.evaluate(SUITE, str(world / "student"), protocol(world, tmp_path))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result["switch"]) == {"keep", "recache", "cut"}
    for row in (result["teacher"], *result["switch"].values()):
        assert all(0 <= row[part][name] <= 1 for part in ("before", "after") for name in (*ATTRIBUTES, "asked"))
    assert result["real"]["motion_ratio"] == 1 and "frechet_paired" not in result["real"]
    assert set(result["codec"]["confusion"]) == set(ATTRIBUTES) == set(result["student"]["confusion"])
    kept = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert result["protocol"]["teacher_samples_bytes"] == kept > 0
    assert result["student"]["sharpness_drift"] > 0 and result["student"]["frechet_paired"] > 0
    assert {p.name for p in (tmp_path / "student-teacher").iterdir()} >= {"result.json", "switches.png", "index.html"}
    table = report.table(METRICS, result)
    assert [c.header for c in table.columns[1:]] == [
        "real",
        "codec",
        "teacher",
        "student",
        *(f"switch: {p}" for p in SWITCHES),
    ]
    assert table.row_count > 20


def reading(asked, frames, wrong_until=0):
    """What a perfect probe would say of clips that show what is asked [B, 1, heads] from frame `wrong_until` on."""
    times = torch.arange(2, frames, 2)
    labels = {}
    for i, (name, words) in enumerate(ATTRIBUTES.items()):
        own = asked[..., i].repeat(1, len(times))
        own[:, times < wrong_until] = (own[:, times < wrong_until] + 1) % len(words)
        labels[name] = own
    return Reading(torch.zeros(len(asked), len(times), 1), labels, times)


def test_time_to_adherence_is_when_everything_asked_for_is_shown_and_stays():
    heads = list(ATTRIBUTES)
    asked = prompt_adherence.asked_of(WORLDS["shapes"], prompt_adherence.scenes(Rooms("shapes", WORLDS["shapes"]), 3))

    def took(found, asked):
        right = right_of(found, asked, heads)
        return prompt_adherence.time_to_adherence(right, found.times, heads, 40, 12.0)

    assert took(reading(asked, 100, 56), asked) == {"median_s": pytest.approx(16 / 12), "reached": 1.0}
    early = reading(asked[:2], 100, 56)
    for name, own in early.labels.items():
        own[1, early.times < 80] = (own[1, early.times < 80] + 1) % len(ATTRIBUTES[name])
    assert took(early, asked[:2])["median_s"] == pytest.approx((16 + 40) / 2 / 12)
    never = took(reading(asked, 100, 100), asked)
    assert math.isnan(never["median_s"]) and never["reached"] == 0
    half = accuracy(right_of(reading(asked, 100, 51), asked, heads), heads)
    assert half["asked"] == pytest.approx(0.5, abs=0.02)


def test_a_trained_probe_reads_what_held_out_captions_say(tmp_path):
    cfg = shapes.ShapesConfig(num_frames=8, speed=(1.0, 1.6))  # what moves faster is learnt faster
    folders = {}
    for split, num in (("judge", 96), ("held_out", 24)):
        folders[split] = tmp_path / split
        shards = captioned_shards(shapes.record_many(cfg, shapes.seeds(split, num)), Ngrams().encode)
        write_shards(folders[split], shards, {"source": "shapes", "fps": 12.0})
    small = replace(probes.SHAPES_PROBE, unshuffle=2, widths=(32, 32))
    probe = probes.train_probes(folders["judge"], steps=150, batch=48, lr=8e-3, cfg=small)
    found = probes.probe_figures(probe, folders["held_out"], stride=1)
    assert found["colour"] > 0.6 and found["ground"] > 0.7 and found["motion"] > 0.4, found
    probes.save_probe(tmp_path / "probe", probe, {})
    assert probes.load_probe(tmp_path / "probe").cfg == small


def test_the_command_line_knows_a_student_that_listens(world, monkeypatch, capsys, tmp_path):
    assert checkpoint.takes_prompts(world / "student") and not checkpoint.takes_prompts(world / "teacher")
    own = replace(SUITE, config=lambda clips: protocol(world, tmp_path))
    monkeypatch.setitem(SUITES, SUITE.name, own)
    assert cli.main(["eval", str(world / "student"), "--glance", "--clips", "3", "--json"]) == 0
    assert "asked" in json.loads(capsys.readouterr().out.splitlines()[-1])
    story = ["generate", str(world / "student"), "-o", str(tmp_path / "a.mp4"), "--seconds", "3", "--scale", "1"]
    assert cli.main([*story, "--prompt", "a red ring", "--prompt", "1 cut: a blue ring"]) == 0
    assert (tmp_path / "a.mp4").stat().st_size > 1000


def test_a_confusion_says_what_is_taken_for_what_scene_by_scene():
    heads = {"shape": ("ring", "cross", "square"), "ground": ("white", "black")}
    asked = torch.tensor([[[0, 1]], [[0, 1]], [[1, 0]], [[1, 0]]])
    read = torch.tensor([[[0, 1]], [[2, 1]], [[2, 0]], [[2, 1]]])
    found = prompt_adherence.confusion(read, asked, heads)
    assert found["shape"] == {
        "ring": {"ring": 0.5, "cross": 0.0, "square": 0.5},
        "cross": {"ring": 0.0, "cross": 0.0, "square": 1.0},
    }
    assert found["ground"] == {"white": {"white": 0.5, "black": 0.5}, "black": {"white": 0.0, "black": 1.0}}


def test_clips_of_one_combination_of_attributes_are_one_scene():
    clips = prompt_adherence.scenes(Rooms("shapes", WORLDS["shapes"]), 256)
    numbers = prompt_adherence.scene_numbers(WORLDS["shapes"], clips)
    labels = [tuple(clip.labels.values()) for clip in clips]
    assert len(set(numbers.tolist())) == len(set(labels)) < 80
    assert all((numbers == n).sum() == labels.count(label) for n, label in zip(numbers.tolist(), labels))
    share = prompt_adherence.halves(numbers.unique()).double().mean()
    assert 0.35 < share < 0.65 and AdherenceConfig().clips == 256


def test_a_switch_is_judged_by_the_last_window_before_it_and_that_at_the_end():
    asked = [torch.full((2, 1, len(ATTRIBUTES)), k) for k in range(2)]
    seen, scene = [], torch.arange(2)

    class Watching:
        fps, heads = 10.0, ATTRIBUTES

        def read(self, px):
            seen.append((px[0, 0].item(), px.shape[1]))
            times = torch.arange(px.shape[1])
            return Reading(torch.zeros(2, len(times), 1), dict.fromkeys(ATTRIBUTES, (px >= 20).long()), times)

    px = torch.arange(60.0).expand(2, -1)  # frames that are their number; the switch comes at frame 20
    cfg = AdherenceConfig(before=2.0, after=4.0, window=1.0, draws=20)
    found = prompt_adherence.judge_switch(px, *asked, scene, Watching(), cfg)
    assert sorted(seen) == [(0.0, 60), (10.0, 10), (50.0, 10)]
    assert found["before"]["asked"] == found["after"]["asked"] == 1.0


def test_targets_are_nine_tenths_of_the_teacher_for_the_best_policy():
    shown = {"keep": (0.5, 0.6), "recache": (0.8, 0.9)}
    rows = {p: {"before": {"asked": a}, "after": {"asked": b}} for p, (a, b) in shown.items()}
    teacher = {"before": {"asked": 0.8}, "after": {"asked": 1.0}}
    found = SUITE.targets({"switch": rows, "teacher": teacher})
    assert [(t.value, t.low, t.met) for t in found] == [
        (0.8, pytest.approx(0.72), True),
        (0.9, pytest.approx(0.9), True),
    ]
    assert "before a switch" in found[0].text and SUITE.targets({"switch": rows}) == []


def test_intervals_of_confusions_and_switches_are_over_scenes():
    scene = torch.arange(12)
    shown, asked = (torch.zeros(12, 1, 1, dtype=torch.long) for _ in range(2))
    shown[:3] = 1
    tally = Tally(Data([], 12.0))
    tally.parts = {"read": [shown], "asked": [asked], "rooms": [scene]}
    found = prompt_adherence.confused([tally], {"shape": ("ring", "cross")}, 200)
    low, high = found["confusion_interval"]["shape/ring/cross"]
    assert found["confusion"]["shape"]["ring"]["cross"] == 0.25 and 0 <= low < 0.1 and 0.35 < high < 0.6
    (title, lines), *_ = report.confusions({"student": found})
    assert title == "student: shape asked for, and read" and lines[0] == ["", "ring", "cross"]
    assert lines[1][2].startswith("0.250 (")


def test_impossible_protocols_are_named():
    with pytest.raises(ValueError, match=r"eval\.window"):
        AdherenceConfig(before=2.0)
    with pytest.raises(ValueError, match=r"eval\.clips"):
        AdherenceConfig(clips=0)
