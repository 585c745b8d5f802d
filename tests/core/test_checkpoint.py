"""Checkpoints: rebuilt from their files, atomic, and clear about what is wrong with them."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import DIT, SHAPE, STUDENT, random_dit
from torch import nn

from vidistill import checkpoint, tensors
from vidistill.checkpoint import CheckpointError, export, load, read_tensors, save_tensors
from vidistill.conditioning.condition import Condition
from vidistill.models.student import CausalStudent

RECORD = {"noise": {"shift": 2.0}, "schedule": {"levels": [1.0, 0.5]}, "codec": "codec", "card": {"steps": 3}}


@pytest.fixture
def path(tmp_path):
    """An exported tiny student."""
    export(tmp_path / "student", CausalStudent(random_dit(DIT), STUDENT, SHAPE), RECORD, torch.float32)
    return tmp_path / "student"


def edit(path, **changes):
    file = checkpoint.with_extension(path, ".json")
    record = json.loads(file.read_text())
    record.update(changes)
    file.write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


def test_a_student_comes_back_as_it_went(path):
    bundle = load(path)
    net = CausalStudent(random_dit(DIT), STUDENT, SHAPE)
    x, sigma = torch.randn(1, 3, 4, 4, 4), torch.full((1, 3), 0.5)
    cond = Condition(per_frame={"modulation": torch.rand(1, 3, DIT.sites["modulation"].dim)})
    assert torch.equal(bundle.net.velocity(x, sigma, cond), net.velocity(x, sigma, cond))
    assert (bundle.kind, bundle.shape, bundle.net.cfg) == ("student", SHAPE, STUDENT)
    assert bundle.noise.shift == 2.0 and bundle.schedule.levels == (1.0, 0.5)
    assert not any(p.requires_grad for p in bundle.net.parameters()) and not bundle.net.training


def test_a_file_name_and_a_path_are_the_same_checkpoint(path):
    for name in (path, f"{path}.json", f"{path}.safetensors"):
        assert load(name).name == "student"


def test_a_dot_in_a_name_is_part_of_it(tmp_path):
    export(tmp_path / "v1.0", random_dit(DIT, 0), {}, torch.float32)
    export(tmp_path / "v1.5", random_dit(DIT, 1), {}, torch.float32)
    a, b = load(tmp_path / "v1.0").net, load(tmp_path / "v1.5").net
    assert not torch.equal(a.head.head.weight, b.head.head.weight)


def test_half_precision_is_stored_and_float_is_loaded(tmp_path):
    export(tmp_path / "t", random_dit(DIT), {})
    tensors, _ = read_tensors(tmp_path / "t.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert {p.dtype for p in load(tmp_path / "t").net.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_half_precision_cannot_hold_are_not_written(tmp_path, value):
    net = random_dit(DIT)
    export(tmp_path / "t", net, {})
    with torch.no_grad():
        net.head.head.weight[0, 0] = value
    with pytest.raises(CheckpointError, match=r"head\.head\.weight.*not finite"):
        export(tmp_path / "t", net, {})
    load(tmp_path / "t")


def test_an_unknown_name_suggests_a_known_one(monkeypatch):
    monkeypatch.setattr(checkpoint, "zoo_names", lambda: {"doom-teacher": "doom-teacher", "doom": "doom-selfforcing"})
    with pytest.raises(CheckpointError, match=r"'doom-techer'.*mean doom-teacher"):
        load("doom-techer")
    with pytest.raises(CheckpointError, match="bundled names: doom-teacher, doom"):
        load("qqqq")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(path, size):
    file = checkpoint.with_extension(path, ".safetensors")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"student\.safetensors.*damaged"):
        load(path)


def test_a_file_of_noise_is_named(path):
    checkpoint.with_extension(path, ".safetensors").write_bytes(os.urandom(5000))
    with pytest.raises(CheckpointError, match=r"student\.safetensors.*damaged"):
        load(path)


def test_missing_weights_are_an_error_of_the_checkpoint(path):
    checkpoint.with_extension(path, ".safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint.*student\.safetensors"):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "\x00\x01"])
def test_a_damaged_record_is_named(path, text):
    checkpoint.with_extension(path, ".json").write_text(text)
    with pytest.raises(CheckpointError, match=r"student\.json"):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"kind": "probe"}, "is a 'probe'"),
        ({"kind": ...}, "is a None"),
        ({"dit": ...}, "dit.*missing"),
        ({"dit": {"widht": 8}}, r"unknown key dit\.widht.*mean dit\.width"),
        ({"shape": {"frames": 0, "channels": 4, "height": 4, "width": 4}}, r"shape\.frames is 0"),
        ({"student": 3}, "student.*got 3"),
    ],
)
def test_a_record_that_cannot_be_built_is_named(path, changes, message):
    edit(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path)
    with pytest.raises(CheckpointError):
        checkpoint.summary(path)


def test_the_wrong_kind_is_refused(path):
    with pytest.raises(CheckpointError, match=r"student.*codec.*needed"):
        load(path, "codec")


def test_weights_that_do_not_fit_are_listed(path):
    file = checkpoint.with_extension(path, ".safetensors")
    tensors, info = read_tensors(file)
    name = "net.head.head.weight"
    edit(path, sha256=...)  # as earlier versions wrote it: nothing but names and shapes tell
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing weights: {name}"),
        ({**tensors, "net.extra": torch.zeros(1)}, "unexpected weights: net.extra"),
        ({**tensors, name: torch.zeros(3, 3)}, rf"mis-shaped weights: {name} \(3, 3\) instead of"),
        ({}, "missing weights: .* and [0-9]+ more"),
    ):
        save_tensors(file, broken, info)
        with pytest.raises(CheckpointError, match=message):
            load(path)


def test_a_foreign_file_is_pointed_to_convert(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="vidistill convert"):
        read_tensors(tmp_path / "w.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"w": torch.zeros(3)}, {"step": 1})

    def full(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match=r"x.safetensors: .*No space.*device.*untouched"):
        save_tensors(file, {"w": torch.ones(3)}, {"step": 2})
    assert read_tensors(file)[1] == {"step": 1} and os.listdir(tmp_path) == ["x.safetensors"]


def test_a_codec_lies_beside_its_student_or_has_a_full_path(path, tiny_codec_path):
    codec = load(tiny_codec_path).net
    with pytest.raises(CheckpointError, match="no checkpoint 'codec'"):
        checkpoint.load_codec(load(path))
    export(path.with_name("codec"), codec, {})
    assert checkpoint.load_codec(load(path)).cfg == codec.cfg
    edit(path, codec=str(tiny_codec_path))
    assert checkpoint.load_codec(load(path)).cfg == codec.cfg
    trained = path.parent / "runs" / "codec" / "codec"  # a run names it from the folder of its project
    export(trained, codec, {})
    student = path.parent / "runs" / "student" / "student"
    student.parent.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copyfile(checkpoint.with_extension(path, suffix), checkpoint.with_extension(student, suffix))
    edit(student, codec="runs/codec/codec")
    assert checkpoint.load_codec(load(student)).cfg == codec.cfg
    edit(path, codec=None)
    with pytest.raises(CheckpointError, match="no codec"):
        checkpoint.load_codec(load(path))


def test_a_summary_counts_without_loading_weights(path):
    row = checkpoint.summary(path)
    assert row["parameters"] == sum(p.numel() for p in random_dit(DIT).parameters())
    assert row["nfe_per_chunk"] == [3] * 7 and row["nfe_7_chunks"] == 21
    assert row["bytes"] == checkpoint.with_extension(path, ".safetensors").stat().st_size and row["card"] == {
        "steps": 3
    }


def test_a_summary_counts_half_the_evaluations_for_a_diagonal_schedule(path):
    four = {"levels": [1.0, 0.9, 0.75, 0.5], "given_chunks": 1}
    edit(path, schedule=four)
    before = checkpoint.summary(path)
    edit(path, schedule={**four, "pattern": "4-3-2-2-2-2-2", "context": "last_step"})
    after = checkpoint.summary(path)
    assert (before["nfe_7_chunks"], after["nfe_7_chunks"]) == (35, 17)
    assert after["nfe_per_chunk"] == [4, 3, 2, 2, 2, 2, 2]


def test_loading_keeps_the_precision_a_module_has():
    module = nn.Linear(2, 2).half()
    checkpoint.load_into(module, {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, "here")
    assert module.weight.dtype == torch.float16


def test_a_student_of_another_size_is_not_silently_accepted(path):
    edit(path, student={"chunk": 2}, shape={**vars(replace(SHAPE, frames=4))})
    assert load(path).net.cfg.chunk == 2
    edit(path, student={"chunk": 99})
    with pytest.raises(CheckpointError, match=r"cannot hold 0.*chunk"):
        load(path)


def test_start_pictures_lie_beside_a_checkpoint_its_family_or_in_the_zoo(tmp_path, path):
    record = json.loads(checkpoint.with_extension(path, ".json").read_text())
    for name in ("world-selfforcing", "world-tf", "shapes", "doom-mine", "mine"):
        codec = "doom-codec" if name == "mine" else None
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, "codec": codec}))
    (tmp_path / "world-starts").mkdir()
    (tmp_path / "world-starts" / "a.png").touch()
    assert [p.name for p in checkpoint.start_pictures(tmp_path / "world-selfforcing")] == ["a.png"]
    (tmp_path / "world-starts" / "b.JPG").touch()
    (tmp_path / "world-starts" / "notes.txt").touch()
    assert [p.name for p in checkpoint.start_pictures(tmp_path / "world-selfforcing")] == ["a.png", "b.JPG"]
    (tmp_path / "world-tf-starts").mkdir()
    assert not checkpoint.start_pictures(tmp_path / "world-tf") and not checkpoint.start_pictures(tmp_path / "shapes")
    for name in ("doom-mine", "mine"):
        assert checkpoint.start_pictures(tmp_path / name)[0].parent == checkpoint.zoo_folder() / "doom-starts"
