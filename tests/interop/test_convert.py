"""`vidistill convert`: families, bounds on what is asked for, and files whose every tensor is used or named."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import HEADS, publish, same, weights
from safetensors.torch import load_file, save_file

from vidistill import checkpoint, cli
from vidistill.cli.convert import convert
from vidistill.diffusion import LatentShape
from vidistill.interop.export import export_as
from vidistill.interop.families import FAMILIES, LAYOUT, RECORDED, REFUSED, family
from vidistill.interop.formats import read_student
from vidistill.interop.keys import bare, to_diffusers_key, to_original, to_ours
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig

KW = {"allow_pickle": True, "heads": HEADS, "size": (64, 64)}


def run(capsys, *args):
    code = cli.main(["convert", *map(str, args)])
    return code, capsys.readouterr()


# --- families and layouts ---------------------------------------------------------------------------------------------


def random_network(**cfg):
    """Original names and random values of a small Wan network."""
    torch.manual_seed(0)
    sizes = {"width": 64, "heads": 4, "layers": 2, "ffn": 160, "freq_dim": 16, "text_dim": 12}
    net = VideoDiT(DiTConfig(**{**sizes, **cfg}))
    state = {key: torch.randn_like(x) * 0.05 for key, x in net.state_dict().items()}
    return to_original(state, net.cfg)


def test_rcm_keeps_a_flat_patch_under_net_there_and_back(tmp_path):
    flat = weights()
    flat["patch_embedding.weight"] = flat["patch_embedding.weight"].flatten(1)
    source = tmp_path / "TurboWan.pth"
    torch.save({"net." + key: x for key, x in flat.items()}, source)
    card = convert(source, "rcm", tmp_path / "o", **KW)
    bundle = checkpoint.load_student(tmp_path / "o")
    assert card["checked"] == LAYOUT and bundle.net.cfg.chunk == bundle.shape.frames == 21
    assert torch.equal(bundle.net.net.state_dict()["patch_embedding.weight"], flat["patch_embedding.weight"])
    assert len(bundle.schedule.lists[0]) == 4
    export_as(tmp_path / "o", "self-forcing", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True), torch.load(source, weights_only=True))


def test_longlive_2_streams_48_channels_at_24_frames_a_second(tmp_path):
    source = publish(tmp_path / "model_bf16.pt", random_network(channels=48), "generator")
    convert(source, "longlive2", tmp_path / "o", **{**KW, "size": (64, 96)})
    bundle = checkpoint.load_student(tmp_path / "o")
    assert bundle.record["world"] == {"fps": 24.0, "temporal": 4} and bundle.record["card"]["checked"] == LAYOUT
    assert bundle.shape == LatentShape(32, 48, 4, 6)
    assert (bundle.net.cfg.chunk, bundle.net.cfg.memory.frames, bundle.net.cfg.memory.sinks) == (8, 32, 8)


def test_krea_is_flat_self_forcing_names_with_a_window_of_its_own(tmp_path):
    source = publish(tmp_path / "krea-realtime-video-14b.safetensors", random_network())
    convert(source, "krea", tmp_path / "o", **KW)
    memory = checkpoint.load_student(tmp_path / "o").net.cfg.memory
    assert (memory.policy, memory.frames, memory.sinks) == ("window", 6, 0)


def test_cards_say_what_was_compared_with_recordings(tmp_path):
    assert {name for name, kind in FAMILIES.items() if kind.checked == RECORDED} == {
        "self-forcing",
        "longlive",
        "longlive-infinity",
        "diagonal",
        "livetalk",
    }
    source = publish(tmp_path / "x.safetensors", weights())
    assert convert(source, "self-forcing", tmp_path / "a", **KW)["checked"] == RECORDED
    assert convert(source, "causvid", tmp_path / "b", **KW)["checked"] == LAYOUT


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_memory_is_missing_are_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.*{REFUSED[name][:20]}"):
        convert(publish(tmp_path / "x.safetensors", weights()), name, tmp_path / "o", **KW)


STRANGERS = {
    "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": "TurboWan",
    "blocks.0.to_gate_compress.weight": "FastWan",
    "blocks.0.action_model.mouse_mlp.0.weight": "Matrix-Game",
    "vace_blocks.0.after_proj.weight": "VACE",
    "motion_encoder.enc.weight": "Wan-Animate",
    "control_adapter.conv.weight": "Wan Fun",
}


@pytest.mark.parametrize("key", STRANGERS)
def test_networks_with_parts_that_are_not_read_are_refused_by_name(tmp_path, key):
    source = publish(tmp_path / "x.safetensors", {**weights(), key: torch.zeros(3)})
    with pytest.raises(ValueError, match=STRANGERS[key]) as error:
        convert(source, "self-forcing", tmp_path / "o", **KW)
    assert key in str(error.value) and not (tmp_path / "o.json").exists()


def test_what_no_family_knows_is_said_on_the_command_line(tmp_path, capsys):
    source = publish(tmp_path / "own.safetensors", weights())
    common = [source, tmp_path / "o", "--heads", HEADS, "--size", "64x64"]
    settings = ["--chunk", 2, "--window", 8, "--sinks", 2, "--steps", "1000,500", "--shift", 3]
    code, said = run(capsys, *common, *settings)
    assert code == 0, said.err
    bundle, card = checkpoint.load_student(tmp_path / "o"), json.loads(said.out)
    assert (bundle.net.cfg.chunk, bundle.net.cfg.memory.frames, bundle.net.cfg.memory.sinks) == (2, 8, 2)
    assert bundle.schedule.lists == ((1.0, pytest.approx(0.75, abs=1e-3)),) and bundle.noise.shift == 3
    assert card["checked"] == LAYOUT and "not stated" in card["licence"] and "chunk 2" in card["notes"]
    code, said = run(capsys, *common, "--family", "longlive", "--window", 9)
    assert code == 0 and checkpoint.load_student(tmp_path / "o").net.cfg.memory.frames == 9
    assert json.loads(said.out)["checked"] == LAYOUT, "another window than the recorded one"
    code, said = run(capsys, *common, "--window", 9)
    assert code == 1 and "--chunk" in said.err


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--given", 50, "at most 6"),
        ("--given", 7, "at most 6"),
        ("--given", -1, "--given"),
        ("--size", "8000000000x8000000000", "pixels a side"),
        ("--size", "64x72", "multiples of 16 pixels"),
        ("--size", "0x64", "pixels a side"),
        ("--heads", -4, "--heads"),
        ("--heads", 5, "--heads 5 does not divide width 64"),
        ("--heads", 10**12, "--heads"),
        ("--steps", "1000,1000", "--steps"),
        ("--steps", "750", "--steps"),
        ("--chunk", 10**9, "chunk"),
        ("--window", 2, "memory.frames"),
        ("--lora-alpha", "nan", "--lora-alpha"),
    ],
)
def test_numbers_are_bounded_before_anything_is_written(tmp_path, capsys, option, value, said):
    source = publish(tmp_path / "x.safetensors", weights())
    common = {"--family": "self-forcing", "--heads": HEADS, "--size": "64x64"} | {option: value}
    try:
        code, output = run(capsys, source, tmp_path / "o", *(part for pair in common.items() for part in pair))
    except SystemExit as error:
        code, output = error.code, capsys.readouterr()
    assert code and said in output.err, output.err
    assert "Traceback" not in output.err and not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("cfg", [{"extra_channels": 20}, {"extra_channels": 20, "image_dim": 12}])
def test_image_to_video_networks_are_refused_by_name(tmp_path, cfg):
    source = publish(tmp_path / "x.safetensors", random_network(**cfg))
    with pytest.raises(ValueError, match=r"20 condition channels.*image-to-video"):
        convert(source, "self-forcing", tmp_path / "o", **KW)


def causal_folder(folder, **said):
    """A causal student in diffusers' layout, as FastVideo and others publish theirs."""
    named = {to_diffusers_key(key): x for key, x in weights().items()}
    (folder / "transformer").mkdir(parents=True)
    save_file(named, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "CausalWanTransformer3DModel", "num_attention_heads": HEADS, "eps": 1e-5, **said}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_causal_student_in_a_diffusers_folder_is_read_with_its_config(tmp_path):
    folder = causal_folder(tmp_path / "d", num_frames_per_block=3)
    convert(folder, "self-forcing", tmp_path / "o", size=(64, 64))
    bundle = checkpoint.load_student(tmp_path / "o")
    assert (bundle.net.net.cfg.heads, bundle.net.net.cfg.eps, bundle.net.cfg.chunk) == (HEADS, 1e-5, 3)
    assert same(read_student(folder, "self-forcing").state, to_ours(weights()))


@pytest.mark.parametrize(("key", "option"), [("num_frames_per_block", "--chunk"), ("local_attn_size", "--window")])
def test_a_config_that_contradicts_the_family_is_refused(tmp_path, key, option):
    folder = causal_folder(tmp_path / "d", **{key: 7})
    with pytest.raises(ValueError, match=f"{key} 7.*{option} 7"):
        convert(folder, "self-forcing", tmp_path / "o", size=(64, 64))
    for wrong in ({"num_attention_heads": "4"}, {"eps": "small", "num_attention_heads": HEADS}):
        (folder / "transformer" / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=next(iter(wrong))):
            convert(folder, "self-forcing", tmp_path / "o", size=(64, 64), heads=0)
    (folder / "transformer" / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        convert(folder, "self-forcing", tmp_path / "o", size=(64, 64))


def test_other_latent_channels_are_named(tmp_path):
    source = publish(tmp_path / "x.safetensors", random_network(channels=4))
    with pytest.raises(ValueError, match=r"4 latent channels.*16 or 48"):
        convert(source, "self-forcing", tmp_path / "o", **KW)


def test_a_block_of_a_huge_number_is_refused_at_once(tmp_path):
    source = publish(tmp_path / "x.safetensors", {**weights(), "blocks.9999.modulation": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"blocks\.9999"):
        convert(source, "self-forcing", tmp_path / "o", **KW)


def test_no_file_is_replaced_that_is_read_or_was_written_by_others(tmp_path):
    source = publish(tmp_path / "base.safetensors", weights())
    before = source.read_bytes()
    for out in (tmp_path / "base", source):
        with pytest.raises(ValueError, match=r"base\.safetensors.*another place"):
            convert(source, "self-forcing", out, **KW)
    save_file(weights(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no checkpoint"):
        convert(source, "self-forcing", tmp_path / "other", **KW)
    assert source.read_bytes() == before
    convert(source, "self-forcing", tmp_path / "new.safetensors", **KW)
    assert (tmp_path / "new.safetensors").is_file() and (tmp_path / "new.json").is_file()
    convert(source, "longlive", tmp_path / "new", **KW)  # our own is written again


# --- any change of a valid file ---------------------------------------------------------------------------------------

PREFIXES = ("", "model.", "net.", "transformer.", "x.", "blocks.1.", "lora_unet_", "decoder.")
ENDINGS = (".weight", ".bias", ".scale_weight", ".input_scale", ".lora_A.weight", ".alpha", "")
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn)


def examined(data, folder):
    """A valid file with one tensor changed is refused with its name, or read with that tensor in its place."""
    state = {"model." + key: x for key, x in weights().items()}
    key = data.draw(st.sampled_from(sorted(state)), label="key")
    change = data.draw(st.sampled_from(["drop", "rename", "double", "shape", "value", "dtype"]), label="change")
    x, named = state[key], key.removeprefix("model.")
    if change == "drop":
        del state[key]
    elif change in ("rename", "double"):
        stem = named.removesuffix(".weight").removesuffix(".bias")
        new = data.draw(st.sampled_from(PREFIXES)) + stem + data.draw(st.sampled_from(ENDINGS))
        if change == "rename":
            del state[key]
        state[new], named = x.clone(), new
    elif change == "shape":
        state[key] = torch.ones(data.draw(st.lists(st.integers(0, 5), max_size=6), label="shape"))
    elif change == "value":
        state[key] = x + 1
    else:
        state[key] = x.to(data.draw(st.sampled_from(DTYPES), label="dtype"))
    path = folder / "x.safetensors"
    save_file(state, path)
    try:
        got = read_student(path, "self-forcing", heads=HEADS).state
    except ValueError as error:
        said = str(error)
        assert str(path) in said and any(bare(name) in said for name in (named, key)), said
        return change, "named"
    changed = load_file(path)
    want = to_ours({name: t for name, t in changed.items() if not name.endswith((".input_scale",))})
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].double(), tensor.double()), name
    return change, "used"


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_key_of_a_changed_file_is_used_or_named(tmp_path, examples):
    hits = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def change(data):
        hits[examined(data, tmp_path)] += 1

    change()
    for (changed, outcome), number in sorted(hits.items()):
        print(f"{number:6d} {changed} {outcome}")
    assert {outcome for _, outcome in hits} == {"used", "named"}


def test_every_family_has_a_schedule_and_a_memory_that_fit():
    for name in FAMILIES:
        kind = family(name)
        kind.memory().check_chunks(kind.chunk, kind.first_chunk)
        assert kind.schedule().lists[0][0] == 1.0
