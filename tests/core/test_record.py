"""Records and weights of checkpoints: what is nonsense is refused in one line, quickly, and nothing large is made."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import build_hf_headers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nonsense import NONSENSE, change
from safetensors import safe_open
from safetensors.torch import save_file

from vidistill import checkpoint
from vidistill.checkpoint import CheckpointError
from vidistill.conditioning.audio import clip_features
from vidistill.conditioning.controls import LiveConditions


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A bundled student under a name of its own, and its record."""
    folder = tmp_path_factory.mktemp("record")
    source = checkpoint.zoo_folder() / "doom-selfforcing"
    for end in (".json", ".safetensors"):
        shutil.copy(checkpoint.with_extension(source, end), folder / f"m{end}")
    return folder / "m", json.loads((folder / "m.json").read_text())


def use(path):
    """All that commands do with a record before they stream."""
    checkpoint.summary(path)
    bundle = checkpoint.load(path)
    checkpoint.takes_prompts(path), checkpoint.takes_audio(path), checkpoint.start_pictures(path)
    LiveConditions.of(bundle.spec, 4, "cpu", checkpoint.text_encoder(bundle.record))
    assert bundle.given_frames >= 0 and bundle.noise.shift > 0 and bundle.schedule.levels
    assert float(bundle.spec.played.fps) > 0


@pytest.mark.parametrize(("path", "value"), NONSENSE, ids=lambda x: str(x)[:40])
def test_a_field_of_nonsense_is_named(student, path, value):
    name, record = student
    name.with_name("bad.json").write_text(json.dumps(change(record, path, value)))
    if not name.with_name("bad.safetensors").exists():
        os.link(f"{name}.safetensors", name.with_name("bad.safetensors"))
    for call in (checkpoint.summary, checkpoint.load):
        with pytest.raises(CheckpointError) as caught:
            call(name.with_name("bad"))
        assert path.split(".")[-1] in str(caught.value) and "\n" not in str(caught.value)


def fields(value, path=""):
    """The dotted path of every field of a record but its card."""
    for key, inner in value.items():
        if path or key != "card":
            yield f"{path}{key}"
            if isinstance(inner, dict):
                yield from fields(inner, f"{path}{key}.")


BUNDLED = {
    name: json.loads((checkpoint.zoo_folder() / f"{name}.json").read_text())
    for name in ("doom-relic", "shapes-diagonal", "talker-selfforcing", "doom-codec", "doom-teacher")
}
PATHS = [(name, path) for name, record in BUNDLED.items() for path in fields(record)]
VALUES = st.one_of(
    st.sampled_from(
        [..., None, [], {}, "", "x", True, -1, 0, 1, 2, 7, 10**9, 10**400, -(10**12), 1e308, [[1]], {"x": 1}]
    ),
    st.sampled_from([float("nan"), float("inf"), [None], ["x"] * 5000, "9" * 5000, {"kind": 5}]),
    st.integers(-100, 10_000),
    st.floats(allow_nan=False),
)
FUZZ = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": [Phase.generate]}


OFTEN = [50, pytest.param(1000, marks=(pytest.mark.slow, pytest.mark.timeout(3600)))]


def fuzz_a_record(tmp, field, value):
    """Whether a record with one field changed is "read" or "refused": nothing else may happen."""
    name, path = field
    (tmp / "f.json").write_text(json.dumps(change(BUNDLED[name], path, value)))
    (tmp / "f.safetensors").unlink(missing_ok=True)
    os.symlink(checkpoint.zoo_folder() / f"{name}.safetensors", tmp / "f.safetensors")
    try:
        checkpoint.summary(tmp / "f")
        bundle = checkpoint.load(tmp / "f")
        if bundle.kind != "codec":
            LiveConditions.of(bundle.spec, 4, "cpu", checkpoint.text_encoder(bundle.record))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    return "read"


@pytest.mark.parametrize("examples", OFTEN)
def test_any_field_of_a_record_is_read_or_refused(tmp_path, examples):
    hits = Counter()

    @settings(max_examples=examples, **FUZZ)
    @given(st.sampled_from(PATHS), VALUES)
    def change_one(field, value):
        hits[field[1].split(".")[0], fuzz_a_record(tmp_path, field, value)] += 1

    change_one()
    print(dict(sorted(hits.items())))
    assert {said for _, said in hits} == {"read", "refused"}


# --- weights ----------------------------------------------------------------------------------------------------------


def spoilt(path, target, change):
    """A copy of a checkpoint's files whose tensors `change` spoils; its header stays."""
    with safe_open(f"{path}.safetensors", "pt") as file:
        tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    shutil.copy(f"{path}.json", f"{target}.json")
    save_file(change(tensors), f"{target}.safetensors", metadata=header)


def one(tensors, value):
    first = next(iter(sorted(tensors)))
    tensors[first].view(-1)[0] = value
    return tensors


def flip(tensors):
    first = next(iter(sorted(tensors)))
    tensors[first].view(torch.int16).view(-1)[0] ^= 1 << 14  # the top bit of a half's exponent
    return tensors


SPOILT = {
    "nan": lambda tensors: {k: torch.full_like(x, float("nan")) for k, x in tensors.items()},
    "inf": lambda tensors: {k: torch.full_like(x, float("inf")) for k, x in tensors.items()},
    "large": lambda tensors: {k: torch.full_like(x, 65504) for k, x in tensors.items()},
    "zero": lambda tensors: {k: torch.zeros_like(x) for k, x in tensors.items()},
    "one nan": lambda tensors: one(tensors, float("nan")),
    "one bit": flip,
    "bfloat16": lambda tensors: {k: x.view(torch.bfloat16) for k, x in tensors.items()},
    "int16": lambda tensors: {k: x.view(torch.int16) for k, x in tensors.items()},
}


HIDDEN = {"large", "one bit", "bfloat16"}  # finite weights of a fitting type: nothing but a checksum shows it
CHECKED = [(kind, True) for kind in SPOILT] + [(kind, False) for kind in SPOILT if kind not in HIDDEN]


@pytest.mark.parametrize(("kind", "checked"), CHECKED)
def test_spoilt_weights_never_load(tmp_path, tiny_student_path, kind, checked):
    source = tiny_student_path
    if not checked:  # as earlier versions wrote them
        with safe_open(f"{source}.safetensors", "pt") as file:
            tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        record = json.loads(Path(f"{source}.json").read_text())
        (tmp_path / "old.json").write_text(json.dumps(change(record, "sha256", ...)))
        save_file(tensors, tmp_path / "old.safetensors", metadata={"vidistill": header["vidistill"]})
        source = tmp_path / "old"
        checkpoint.load(source)
    spoilt(source, tmp_path / "m", SPOILT[kind])
    with pytest.raises(CheckpointError, match="checksum" if checked else r"m: "):
        checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("examples", OFTEN)
def test_any_bit_of_the_weights_counts(tmp_path, tiny_student_path, examples):
    whole, hits = Path(f"{tiny_student_path}.safetensors").read_bytes(), Counter()
    shutil.copy(f"{tiny_student_path}.json", tmp_path / "w.json")
    header = 8 + int.from_bytes(whole[:8], "little")

    @settings(max_examples=examples, **FUZZ)
    @given(st.sampled_from(["length", "header", "tensors"]), st.integers(0, 2**31), st.integers(0, 7))
    def flip_one(part, at, bit):
        first, stop = {"length": (0, 8), "header": (8, header), "tensors": (header, len(whole))}[part]
        data = bytearray(whole)
        data[first + at % (stop - first)] ^= 1 << bit
        (tmp_path / "w.safetensors").write_bytes(data)
        try:
            same = checkpoint.load(tmp_path / "w").net.state_dict()
        except CheckpointError as error:
            assert "\n" not in str(error)
            hits[part, "refused"] += 1
            return
        assert part == "header" and all(torch.equal(x, same[n]) for n, x in true.items())  # what no weight depends on
        hits[part, "read"] += 1

    true = checkpoint.load(tiny_student_path).net.state_dict()
    flip_one()
    print(dict(sorted(hits.items())))
    assert {part for part, _ in hits} == {"length", "header", "tensors"}


@pytest.mark.parametrize("name", sorted(set(checkpoint.zoo_names().values())))
def test_bundled_weights_have_the_checksum_of_their_record(name):
    path = checkpoint.locate(name)
    record = checkpoint.read_record(path)
    assert len(record["sha256"]) == 64
    checkpoint.read_tensors(checkpoint.with_extension(path, ".safetensors"), record["sha256"])
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.read_tensors(checkpoint.with_extension(path, ".safetensors"), "0" * 64)


def test_weights_saved_with_another_network_are_told_apart(tmp_path, tiny_student_path):
    for end in (".json", ".safetensors"):
        shutil.copy(f"{tiny_student_path}{end}", tmp_path / f"m{end}")
    record = json.loads((tmp_path / "m.json").read_text())
    (tmp_path / "m.json").write_text(json.dumps(change(record, "dit.heads", 1)))
    with pytest.raises(CheckpointError, match=r"dit\.heads is 1 there and 2.*weights"):
        checkpoint.load(tmp_path / "m")


@pytest.mark.parametrize("what", ["cut", "fifo", "folder", "pickle", "missing"])
def test_a_summary_looks_at_the_weights(tmp_path, tiny_student_path, what):
    shutil.copy(f"{tiny_student_path}.json", tmp_path / "m.json")
    weights = tmp_path / "m.safetensors"
    data = Path(f"{tiny_student_path}.safetensors").read_bytes()
    make = {
        "cut": lambda: weights.write_bytes(data[: len(data) // 2]),
        "fifo": lambda: os.mkfifo(weights),
        "folder": weights.mkdir,
        "pickle": lambda: torch.save({"a": torch.zeros(1)}, weights),
        "missing": lambda: None,
    }
    make[what]()
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        checkpoint.summary(tmp_path / "m")


def test_gigabytes_of_json_are_refused_unread(tmp_path):
    with open(tmp_path / "m.json", "wb") as file:
        file.truncate(3 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="bytes"):
        checkpoint.load(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_record_that_cannot_be_played_is_not_written(tmp_path, tiny_student_path):
    bundle = checkpoint.load(tiny_student_path)
    with pytest.raises(CheckpointError, match=r"not written: schedule\.given_chunks 50"):
        checkpoint.export(
            tmp_path / "m", bundle.net, {**bundle.record, "schedule": {"levels": [1.0], "given_chunks": 50}}
        )
    assert not list(tmp_path.iterdir())


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{}", "[]", "3", "no JSON", '{"name": "my notes"}'])
def test_a_file_of_the_folder_does_not_hide_a_bundled_name(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.json").write_text(text)
    assert checkpoint.locate("shapes").parent == checkpoint.zoo_folder()


def test_a_checkpoint_of_ours_in_the_folder_is_taken_before_a_bundled_one(tmp_path, monkeypatch, tiny_student_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(f"{tiny_student_path}.json", tmp_path / "shapes.json")
    assert checkpoint.locate("shapes").parent == Path(".")


@pytest.mark.parametrize("name", ["", ".", "/", "./"])
def test_a_name_of_nothing_is_refused(name):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.locate(name)


@pytest.mark.parametrize("name", ["base.safetensors", "base.pth"])
def test_foreign_weights_are_pointed_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    for call in (checkpoint.load_student, checkpoint.summary, checkpoint.load):
        with pytest.raises(CheckpointError, match="vidistill convert"):
            call(tmp_path / name)


# --- what a record may decide -----------------------------------------------------------------------------------------


def test_a_record_does_not_choose_where_files_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encode = checkpoint.text_encoder({"text": {"kind": "umt5", "source": "a/b", "folder": "elsewhere"}})
    assert encode.__self__.folder == tmp_path / "vidistill" / "text" and "elsewhere" in caplog.text


HUB_ID = "hf://nobody/none"


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Sockets that are told of; returns what was asked for."""
    asked = []

    def refused(*args, **_):
        asked.append(args)
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_hf_headers()  # asks who asks, once a process, whatever is to be read
    asked.clear()
    return asked


NAMED = {  # what a record may name -> what follows it
    "codec": lambda bundle: checkpoint.load_codec(bundle),
    "text": lambda bundle: checkpoint.text_encoder(bundle.record)(["a fox"]),
    "audio": lambda bundle: clip_features(np.zeros(16_000, np.float32), 4, bundle.spec.audio),
}
SAID = {
    "codec": HUB_ID,
    "text": {"kind": "umt5", "source": HUB_ID},
    "audio": {"kind": "wav2vec2", "source": HUB_ID, "fps": 16},
}


@pytest.mark.parametrize("field", NAMED)
def test_a_record_downloads_nothing_unless_it_is_allowed_to(student, tmp_path, monkeypatch, no_network, field):
    name, record = student
    bundle = replace(checkpoint.load(name), record={**record, field: SAID[field]})
    with pytest.raises((CheckpointError, OSError)) as caught:
        NAMED[field](bundle)
    said = str(caught.value)
    assert not no_network and "\n" not in said and "nobody/none" in said
    assert "offline" in said and "VIDISTILL_DOWNLOADS=1" in said and "hf download" in said


def test_a_record_that_may_download_says_when_it_is_offline(student, monkeypatch, no_network):
    name, record = student
    monkeypatch.setenv("VIDISTILL_DOWNLOADS", "1")
    asked = []

    def unreachable(*_, local_files_only, **__):
        asked.append(local_files_only)
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("diffusers.AutoencoderKLWan.from_pretrained", unreachable)
    with pytest.raises(CheckpointError, match=r"nobody/none.*offline.*hf download") as caught:
        checkpoint.load_codec(replace(checkpoint.load(name), record={**record, "codec": HUB_ID}))
    assert asked == [False] and "\n" not in str(caught.value)


PROVENANCE = """
import importlib.util, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from vidistill.checkpoint import git_commit
print(git_commit())
"""


def test_a_package_inside_a_foreign_repository_has_no_commit(tmp_path):
    def git(*words):
        said = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *said, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    skipped = shutil.ignore_patterns("zoo", "__pycache__")
    shutil.copytree(Path(checkpoint.__file__).parent, tmp_path / "lib" / "vidistill", ignore=skipped)

    def said():
        command = [sys.executable, "-c", PROVENANCE, tmp_path / "lib"]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(command, env=clean, check=True, capture_output=True, text=True).stdout.strip()

    assert said() == "None"
    git("add", "-A")
    git("commit", "-q", "-m", "y")
    assert said() == git("rev-parse", "--short", "HEAD").strip()
