"""Exports: bit-exact round trips of what was converted and of what was trained here, in every layout."""

import json
from dataclasses import asdict

import pytest
import torch
from published import HEADS, publish, same, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidistill import checkpoint, cli
from vidistill.cli.convert import convert
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.interop.export import LAYOUTS, export_as, read_ours, write_shards
from vidistill.interop.files import read_file
from vidistill.interop.formats import read_student
from vidistill.interop.keys import infer_config, to_ours
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.schedules import ScheduleConfig
from vidistill.teachers.load import read_teacher

WAN = DiTConfig(width=64, heads=4, layers=2, ffn=160, freq_dim=16, text_dim=12)


def trained(path, dtype=torch.float32, kind="student", cfg=WAN):
    """A checkpoint as training leaves it: no trace of a published file in its record."""
    torch.manual_seed(0)
    net = VideoDiT(cfg)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    shape = LatentShape(6, cfg.channels, 8, 8)
    record = {"noise": asdict(NoiseSchedule(shift=5.0)), "codec": "wan", "card": {"objective": "dmd", "parents": []}}
    if kind == "student":
        memory = MemoryConfig(policy="window", frames=5, sinks=1)
        net = CausalStudent(net, StudentConfig(chunk=2, memory=memory), shape)
        record["schedule"] = asdict(ScheduleConfig(levels=(1.0, 0.5), context="clean"))
    else:
        record["shape"] = asdict(shape)
    checkpoint.export(path, net, record, dtype)
    return path


def both(path):
    """What the two files of a checkpoint hold, bit for bit; the order of a header's entries is no one's."""
    weights = checkpoint.with_extension(path, ".safetensors")
    with safe_open(weights, framework="pt") as file:
        header = file.metadata()
    raw = {key: (str(x.dtype), bytes(x.flatten().view(torch.uint8))) for key, x in load_file(weights).items()}
    return header, raw, checkpoint.with_extension(path, ".json").read_bytes()


def tensors(path):
    return load_file(checkpoint.with_extension(path, ".safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_diffusers_folder_gives_the_same_checkpoint_again(tmp_path, dtype, kind):
    source = trained(tmp_path / "t", dtype, kind)
    folder = export_as(source, "diffusers", tmp_path / "d")
    convert(folder, None, tmp_path / "again")
    assert both(tmp_path / "again") == both(source)


def test_diffusers_loads_the_transformer_of_an_exported_student(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = export_as(trained(tmp_path / "t"), "diffusers", tmp_path / "d")
    net = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    assert same(to_ours(net.state_dict()), read_ours(tmp_path / "t").state)
    teacher = read_teacher(folder, dtype="float32")
    assert teacher.noise.shift == 5.0 and teacher.net.cfg == read_ours(tmp_path / "t").config
    assert diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler").config.flow_shift == 5.0


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_trained_here_is_read_as_self_forcing_again(tmp_path, suffix, dtype):
    source = trained(tmp_path / "t", dtype)
    path = export_as(source, "self-forcing", tmp_path / f"x{suffix}")
    content = read_file(path, allow_pickle=True)
    flat = content if suffix == ".safetensors" else content["generator_ema"]
    assert all(key.startswith("model.") for key in flat) and flat["model.patch_embedding.weight"].ndim == 5
    convert(path, "self-forcing", tmp_path / "o", size=(64, 64), allow_pickle=True, heads=4)
    assert same(tensors(tmp_path / "o"), tensors(source))


def test_a_converted_student_goes_back_to_its_own_file_by_either_command(tmp_path, caplog):
    source = publish(tmp_path / "in.pt", weights(), "generator")
    convert(source, "causvid", tmp_path / "o", size=(64, 64), allow_pickle=True, heads=HEADS)
    assert cli.main(["convert", str(tmp_path / "o"), str(tmp_path / "old.pt"), "--back"]) == 0
    assert "vidistill export" in caplog.text
    assert cli.main(["export", str(tmp_path / "o"), "--to", "self-forcing", "-o", str(tmp_path / "new.pt")]) == 0
    want = torch.load(source, weights_only=True)["generator"]
    for name in ("old.pt", "new.pt"):
        assert same(torch.load(tmp_path / name, weights_only=True)["generator"], want)


def test_a_converted_student_passes_through_diffusers_bit_for_bit(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {key: x.to(kinds[i % 3]) for i, (key, x) in enumerate(weights().items())}
    convert(
        publish(tmp_path / "in.pt", mixed), "longlive", tmp_path / "a", size=(64, 64), allow_pickle=True, heads=HEADS
    )
    convert(export_as(tmp_path / "a", "diffusers", tmp_path / "d"), None, tmp_path / "b")
    assert both(tmp_path / "a") == both(tmp_path / "b")
    assert read_student(tmp_path / "d", "longlive", heads=HEADS).config == infer_config(mixed, heads=HEADS)


def test_an_avatar_goes_back_to_its_own_names_and_not_to_diffusers(tmp_path):
    source = publish(tmp_path / "in.safetensors", weights("livetalk_rollout"))
    convert(source, "livetalk", tmp_path / "o", size=(64, 64), heads=2)
    assert same(load_file(export_as(tmp_path / "o", "self-forcing", tmp_path / "back.safetensors")), load_file(source))
    with pytest.raises(ValueError, match=r"dit\.sites"):
        export_as(tmp_path / "o", "diffusers", tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_ours_is_our_own_checkpoint_in_another_precision(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = trained(tmp_path / "t")
    assert cli.main(["export", str(source), "--to", "ours", "--dtype", name]) == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    got, want = tensors(tmp_path / "t-ours"), tensors(source)
    assert all(torch.equal(got[key], x.to(dtype)) for key, x in want.items())
    checkpoint.load_student(tmp_path / "t-ours")
    if name == "fp32":
        assert both(tmp_path / "t-ours") == both(source)


def test_a_network_that_a_layout_has_no_names_for_is_refused(tmp_path, checkpoints):
    student = next(p for p in checkpoints.glob("*.json") if json.loads(p.read_text())["kind"] == "student")
    for layout, out in (("self-forcing", "x.pt"), ("diffusers", "d")):
        with pytest.raises(ValueError, match=rf"{layout}.*--to ours"):
            export_as(student, layout, tmp_path / out)
    export_as(student, "ours", tmp_path / "copy")
    assert both(tmp_path / "copy") == both(student.with_suffix(""))
    codec = next(p for p in checkpoints.glob("*.json") if json.loads(p.read_text())["kind"] == "codec")
    with pytest.raises(ValueError, match="a codec"):
        export_as(codec, "ours", tmp_path / "c")
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob("d*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_place_that_is_taken_is_left_alone(tmp_path, layout):
    source = trained(tmp_path / "t")
    before = both(source)
    taken = {"self-forcing": "x.pt", "diffusers": "d", "ours": "t"}[layout]
    if layout == "diffusers":
        (tmp_path / "d").mkdir()
    elif layout == "self-forcing":
        (tmp_path / "x.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="--out"):
        export_as(source, layout, tmp_path / taken)
    assert (both(source) == before and layout != "self-forcing") or (tmp_path / "x.pt").read_bytes() == b"mine"


def test_an_unknown_layout_and_suffix_are_named(tmp_path):
    source = trained(tmp_path / "t")
    with pytest.raises(ValueError, match=r"'onnx'.*self-forcing"):
        export_as(source, "onnx", tmp_path / "x")
    with pytest.raises(ValueError, match=r"--out .*\.zip"):
        export_as(source, "self-forcing", tmp_path / "x.zip")


def test_large_networks_are_cut_into_shards_that_read_as_one(tmp_path):
    state = to_ours(weights())
    write_shards(tmp_path, "m", state, limit=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 200_000 for path in files)
    assert same(read_file(tmp_path), state)


def test_what_a_folder_says_itself_is_not_asked_for(tmp_path):
    folder = export_as(trained(tmp_path / "t"), "diffusers", tmp_path / "d")
    for option in ({"lora": tmp_path / "l.safetensors"}, {"given_chunks": 1}, {"entry": "generator"}):
        with pytest.raises(ValueError, match=f"--{next(iter(option)).removesuffix('_chunks')}"):
            convert(folder, None, tmp_path / "o", **option)
    assert not list(tmp_path.glob("o*"))


def test_a_damaged_folder_is_refused(tmp_path):
    folder = export_as(trained(tmp_path / "t"), "diffusers", tmp_path / "d")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({**state, "surprise": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="surprise"):
        convert(folder, None, tmp_path / "o")
    (folder / "vidistill.json").write_text("{}")
    with pytest.raises(ValueError, match="vidistill"):
        convert(folder, None, tmp_path / "o")
    assert not list(tmp_path.glob("o*"))
