"""Weight files as they come: every kind is read, or refused as what it is."""

import argparse
import collections
import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published import HEADS, publish, same, weights
from safetensors.torch import save_file

from vidistill.interop import files
from vidistill.interop.files import read_file
from vidistill.interop.formats import read_student
from vidistill.interop.keys import to_ours

KW = {"allow_pickle": True, "heads": HEADS}


def read(path, **kw):
    return read_student(path, "self-forcing", **{**KW, **kw}).state


def reads_whole(path, **kw):
    return same(read(path, **kw), to_ours(weights()))


# --- handled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["net.", "transformer.", "module.", "model.diffusion_model.", "pipe.dit.", "model."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_trainers_prefix_is_read(tmp_path, prefix, suffix):
    assert reads_whole(publish(tmp_path / f"x{suffix}", weights(), "generator", prefix))


def test_what_torch_wrote_before_zip_files_is_read(tmp_path):
    torch.save({"generator": weights()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert reads_whole(tmp_path / "old.pt")


def test_settings_in_an_argparse_namespace_lie_beside_the_weights_that_are_read(tmp_path):
    torch.save({"generator": weights(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "args.pt")
    assert reads_whole(tmp_path / "args.pt")


@pytest.mark.parametrize(("content", "name"), [("zip", "a.safetensors"), ("safetensors", "a.pt"), ("zip", "weights")])
def test_a_file_is_what_its_bytes_say_whatever_its_name(tmp_path, content, name):
    if content == "zip":
        torch.save(weights(), tmp_path / name)
    else:
        save_file(weights(), tmp_path / name)
    assert reads_whole(tmp_path / name)


def shards(folder: Path, suffix: str, index: str | None = None, count: int = 2) -> Path:
    """The weights in `count` files, half the keys each, with an index of this name or without one."""
    folder.mkdir()
    state, table = weights(), {}
    for i in range(count):
        name = f"part-{i + 1:05d}-of-{count:05d}{suffix}"
        own = {key: state[key] for key in list(state)[i::count]}
        torch.save(own, folder / name) if suffix == ".bin" else save_file(own, folder / name)
        table |= dict.fromkeys(own, name)
    if index:
        (folder / index).write_text(json.dumps({"weight_map": table}))
    return folder


@pytest.mark.parametrize(
    ("suffix", "index"),
    [(".bin", "m.bin.index.json"), (".safetensors", "m.safetensors.index.json"), (".safetensors", None)],
)
def test_shards_are_read_by_their_index_or_all_of_them(tmp_path, suffix, index):
    folder = shards(tmp_path / "s", suffix, index)
    assert reads_whole(folder) and (index is None or reads_whole(folder / index))


def test_the_transformer_of_a_diffusers_folder_is_read(tmp_path):
    (tmp_path / "d").mkdir()
    shards(tmp_path / "d" / "transformer", ".safetensors", "diffusion_pytorch_model.safetensors.index.json")
    (tmp_path / "d" / "model_index.json").write_text("{}")
    assert reads_whole(tmp_path / "d")
    (tmp_path / "d" / "transformer_2").mkdir()
    with pytest.raises(ValueError, match="transformer_2"):
        read(tmp_path / "d")


def test_the_only_pickle_of_a_folder_is_read(tmp_path):
    (tmp_path / "f").mkdir()
    publish(tmp_path / "f" / "model.pt", weights())
    assert reads_whole(tmp_path / "f")
    publish(tmp_path / "f" / "other.pt", weights())
    with pytest.raises(ValueError, match=r"several files, model\.pt, other\.pt"):
        read(tmp_path / "f")


# --- refused by its name ----------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5676070424\n"
FOREIGN = {
    "empty": (b"", "is empty"),
    "pointer": (LFS, "git-lfs"),
    "page": (b"\n<!DOCTYPE html><html></html>", "web page"),
    "json": (b'{"error": "gated"}', "JSON"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "numpy": (b"\x93NUMPY\x01\0", "numpy"),
    "noise": (bytes(range(200, 250)), "neither a safetensors file nor"),
    "cut": (b"\x10\0\0\0\0\0\0\0{", "damaged or cut short"),
    "cut zip": (b"PK\x03\x04" + b"\0" * 40, "damaged or cut short"),
    "cut pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "damaged or cut short"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ""])
def test_what_is_no_weight_file_is_called_what_it_is(tmp_path, kind, suffix):
    content, said = FOREIGN[kind]
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read(tmp_path / f"x{suffix}")


LAST = "head.head.bias"


def pickled(tmp_path, value, **kw):
    torch.save(value, tmp_path / "x.pt", **kw)
    return tmp_path / "x.pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, zipped):
    path = pickled(tmp_path, {"w": collections.UserDict()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"collections\.UserDict") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({1: torch.zeros(3)}, "the key 1, .*optimiser"),
        (torch.zeros(3), "holds a Tensor"),
        ({"generator": {}}, "no tensors.*'generator'"),
        ({"generator": {"model": weights()}}, "no tensors.*'generator'; it holds 'model'"),
        ({"generator": b"x"}, "it holds 'generator'"),
        ({**weights(), LAST: weights()[LAST].to("meta")}, r"head\.head\.bias \(.*meta device"),
        ({**weights(), LAST: weights()[LAST].to_sparse()}, r"head\.head\.bias \(sparse"),
        ({**weights(), "freqs": torch.ones(4, dtype=torch.complex64)}, r"freqs \(complex64"),
        ({**weights(), LAST: torch.zeros(1).expand(10**12)}, r"x\.\w+ .*repeats 4 of"),
        ({**weights(), "step": 3}, r"no tensor.*\(int\)"),
        ({"optimizer": {"state": {}}}, "optimizer"),
    ],
)
def test_what_a_pickle_holds_instead_of_weights_is_named(tmp_path, value, said):
    with pytest.raises(ValueError, match=said):
        read(pickled(tmp_path, value))


def test_one_shard_of_several_is_told_from_a_whole_file(tmp_path):
    folder = shards(tmp_path / "s", ".safetensors")
    with pytest.raises(ValueError, match="shard 1 of 2"):
        read(folder / "part-00001-of-00002.safetensors")
    (folder / "part-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks part-00002-of-00002\.safetensors.*incomplete"):
        read(folder)


def test_training_states_of_others_say_how_one_file_is_made_of_them(tmp_path):
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"")
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match="dcp_to_torch"):
        read(tmp_path / "dcp")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="DeepSpeed"):
        read(tmp_path / "zero")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="lacks safetensors"):
        read(tmp_path / "none")


def test_our_own_checkpoint_is_used_as_it_is(checkpoints):
    with pytest.raises(ValueError, match=r"codec\.safetensors.*our own"):
        read(next(checkpoints.glob("*.safetensors")))


def test_two_keys_of_one_parameter_are_an_error(tmp_path):
    state = {**weights(), "model.head.head.bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"head\.head\.bias and model\.head\.head\.bias.*parameter"):
        read(publish(tmp_path / "x.safetensors", state, prefix=""))
    theirs = {**weights(), "blocks.0.attn1.to_q.bias": torch.zeros(64)}
    with pytest.raises(ValueError, match=r"attn1\.to_q\.bias and .*self_attn\.q\.bias.*same"):
        read(publish(tmp_path / "y.safetensors", theirs, prefix=""))


# --- indexes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../base.safetensors", "/base.safetensors", "sub/base.safetensors", "..", "a\\b", ""])
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    folder = shards(tmp_path / "s", ".safetensors", "m.safetensors.index.json")
    save_file(weights(), tmp_path / "base.safetensors")
    (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="outside its"):
        read(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(tmp_path, text):
    folder = shards(tmp_path / "s", ".safetensors", "m.safetensors.index.json")
    (folder / "m.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="weight_map"):
        read(folder)


def test_an_index_and_its_files_hold_the_same_tensors(tmp_path):
    folder = shards(tmp_path / "s", ".safetensors", "m.safetensors.index.json")
    path = folder / "m.safetensors.index.json"
    whole = json.loads(path.read_text())["weight_map"]
    first, last = next(iter(whole)), list(whole)[-1]
    for table, said in (
        ({k: v for k, v in whole.items() if k != last}, last),
        ({**whole, "more.weight": whole[last]}, "more.weight"),
        ({**whole, first: whole[last], last: whole[first]}, first),
    ):
        path.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(ValueError, match=said):
            read(folder)


def test_a_tensor_in_two_shards_is_an_error(tmp_path):
    folder = shards(tmp_path / "s", ".safetensors")
    save_file({"head.head.bias": torch.zeros(64)}, folder / "extra.safetensors")
    with pytest.raises(ValueError, match=r"head\.head\.bias"):
        read(folder)


def test_two_indexes_ask_for_one(tmp_path):
    folder = shards(tmp_path / "s", ".safetensors", "m.safetensors.index.json")
    (folder / "m.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several indexes"):
        read(folder)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_refused_before_it_is_unfolded(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(64):
            file.write(b"N" * 2**20)
    assert (tmp_path / "bomb.pt").stat().st_size < 2**20
    with pytest.raises(ValueError, match="compressed"):
        read(tmp_path / "bomb.pt")


def test_a_dictionary_without_end_is_refused(tmp_path, monkeypatch):
    path = publish(tmp_path / "x.pt", weights())
    assert reads_whole(path)
    monkeypatch.setattr(files, "LONGEST_PICKLE", 1000)
    with pytest.raises(ValueError, match="at most 1,000"):
        read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_repeats_a_few_bytes_is_refused_before_it_is_copied(tmp_path, zipped):
    state = {**weights(), "head.head.bias": torch.zeros(1).expand(10**12)}
    torch.save({"generator": [state]}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "x.pt").stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"x\.pt .*4,000,000,000,000 bytes"):
        read_file(tmp_path / "x.pt", allow_pickle=True)


def test_a_dictionary_that_holds_itself_is_walked_once():
    state = {"w": torch.zeros(3), "rows": [torch.zeros(2)]}
    state["again"] = state
    assert sorted(len(x) for x in files.tensors_in(state)) == [2, 3]


def test_an_old_file_beyond_the_memory_of_the_machine_is_refused_unread(tmp_path):
    torch.save({"generator": weights()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with open(tmp_path / "old.pt", "r+b") as file:
        file.truncate(2**42)  # sparse
    with pytest.raises(ValueError, match=r"old\.pt .*before 1\.6.*machine"):
        read(tmp_path / "old.pt")


INDEXED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["../x", "/x", "m", "nul\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_an_index_says_it_is_read_whole_or_refused(tmp_path, examples):
    folder, hits = shards(tmp_path / "s", ".safetensors", "m.safetensors.index.json"), collections.Counter()
    path = folder / "m.safetensors.index.json"
    whole = json.loads(path.read_text())
    keys = sorted(whole["weight_map"])

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.sampled_from(["all", "weight_map", "name", "missing", "more", "bytes"]), INDEXED, st.integers(0, 10**6))
    def change_one(part, value, at):
        table = dict(whole["weight_map"])
        if part == "name":
            table[keys[at % len(keys)]] = value
        elif part == "missing":
            del table[keys[at % len(keys)]]
        elif part == "more":
            table[str(value)] = table[keys[0]]
        text = json.dumps({"all": value, "weight_map": {**whole, "weight_map": value}}.get(part, {"weight_map": table}))
        data = bytearray(text.encode())
        if part == "bytes":
            data[at % len(data)] ^= 1 << at % 8
        path.write_bytes(data)
        try:
            state = files.read_folder(folder)
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
            hits[part, "refused"] += 1
            return
        hits[part, "read"] += 1
        assert same(state, base)

    path.write_text(json.dumps(whole))
    base = files.read_folder(folder)
    change_one()
    print(dict(sorted(hits.items())))
    assert {part for part, _ in hits} == {"all", "weight_map", "name", "missing", "more", "bytes"}


def test_a_zip_of_something_else_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("photo.txt", "x")
    with pytest.raises(ValueError, match=r"zip archive.*photo\.txt"):
        read(tmp_path / "x.zip")


# --- weights of 8 bits ------------------------------------------------------------------------------------------------

LAYER = "blocks.0.ffn.0.weight"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_is_read_up_exactly(tmp_path, dtype):
    state = {key: x.to(dtype) for key, x in weights().items()}
    got = read(publish(tmp_path / "x.safetensors", state))
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    assert torch.equal(got[LAYER].float(), state[LAYER].float())


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_fp8_is_read_with_its_scales(tmp_path, name, rows):
    state = weights()
    scale = torch.linspace(0.5, 2.0, state[LAYER].shape[0])[:, None] if rows else torch.tensor(0.25)
    state[LAYER] = (weights()[LAYER] / scale).to(torch.float8_e4m3fn)
    state[LAYER.replace("weight", name)] = scale
    state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    got = read(publish(tmp_path / "x.safetensors", state))[LAYER].float()
    torch.testing.assert_close(got, state[LAYER].float() * scale, rtol=2**-8, atol=0)
    assert (got - weights()[LAYER]).abs().max() < 0.1 * weights()[LAYER].abs().max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({LAYER: torch.zeros(160, 64, dtype=torch.int8)}, "int8 tensors.*ffn"),
        ({LAYER: torch.zeros(160, 32, dtype=torch.uint8)}, "uint8"),
        ({LAYER.replace("weight", "scale_weight"): torch.ones(1)}, "not fp8.*scale_weight"),
        ({"head.head.scale_weight": torch.ones(1)}, "not fp8"),
    ],
)
def test_integers_and_lost_scales_are_refused_by_name(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        read(publish(tmp_path / "x.safetensors", {**weights(), **change}))


def test_a_file_of_scales_lacks_none_and_fits_its_weights(tmp_path):
    small = {k: weights()[k].to(torch.float8_e4m3fn) for k in (LAYER, "blocks.1.ffn.0.weight")}
    scale = {LAYER.replace("weight", "scale_weight"): torch.ones(1)}
    with pytest.raises(ValueError, match=r"none for model\.blocks\.1\.ffn\.0\.weight"):
        read(publish(tmp_path / "x.safetensors", {**weights(), **small, **scale}))
    with pytest.raises(ValueError, match=r"scale_weight is \[3\]"):
        wrong = {LAYER: small[LAYER], LAYER.replace("weight", "scale_weight"): torch.ones(3)}
        read(publish(tmp_path / "y.safetensors", {**weights(), **wrong}))


def test_a_note_on_the_format_of_a_weight_is_read(tmp_path):
    def noted(said):
        note = torch.tensor(list(json.dumps({"format": said}).encode()), dtype=torch.uint8)
        small = {LAYER: weights()[LAYER].to(torch.float8_e4m3fn), LAYER.replace("weight", "comfy_quant"): note}
        scale = {LAYER.replace("weight", "weight_scale"): torch.tensor(2.0)}
        return publish(tmp_path / "x.safetensors", {**weights(), **small, **scale})

    got = read(noted("float8_e4m3fn"))[LAYER]
    assert torch.equal(got.float(), 2 * weights()[LAYER].to(torch.float8_e4m3fn).float())
    with pytest.raises(ValueError, match="nvfp4"):
        read(noted("nvfp4"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint.*gone\.pt"):
        read_file(tmp_path / "gone.pt")
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match="numpy"):
        read_file(tmp_path / "x.npy")
