"""What data folders say of themselves: it is read, or refused in one line that names file and field."""

import copy
import json
from collections import Counter
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from nonsense import change
from tiny_training import flow_stage, write_latents

from vidistill import cli
from vidistill.data.clips import Clips
from vidistill.data.meta import META, DataError, Meta, parse_meta
from vidistill.data.prompts import Prompts, open_data
from vidistill.data.shards import read_meta, write_shards
from vidistill.training.trainer import Trainer

CLIPS = {
    "source": "gym",
    "split": "train",
    "config": {"env": "CarRacing-v3", "speed": 0.64, "size": [48, 64]},
    "fps": 16.0,
    "px_size": [48, 64],
    "temporal": 4,
    "given": 1,
    "codec": None,
    "actions": ["left", "right"],
    "keys": {"left": ["ArrowLeft"], "right": ["ArrowRight"]},
    "deterministic": True,
    "fov": 90.0,
    "text": {"kind": "ngrams", "dim": 8, "length": 6},
    "audio": {"kind": "mel", "rate": 16000},
    "shards": 1,
    "episodes": 2,
    "described": [{"seed": 1, "caption": "a", "measures": {"brightness": 0.5}}, {"seed": 2, "walls": {}}],
}
PATHS = {
    "fps": 16.0,
    "teacher": "shapes-teacher",
    "clips": 1,
    "frames": 7,
    "given": 1,
    "seed": 5,
    "sigmas": [1.0, 0.5],
    "levels": [1.0, 0.5],
    "guidance": 2.0,
    "audio_guidance": 0.0,
    "shards": 1,
    "episodes": 1,
    "described": [{"clip": 0}],
}
TEXT = {
    "source": "prompts",
    "fps": 16.0,
    "temporal": 4,
    "prompts": ["a", "b"],
    "negative": "",
    "names": ["1.safetensors", "2.safetensors"],
    "negative_name": "0.safetensors",
    "text": {"kind": "umt5", "source": "there", "length": 12},
    "episodes": 2,
}
NEW_TEXT = {
    "source": "prompts",
    "fps": 16.0,
    "prompts": 2,
    "per_shard": 256,
    "negative": "",
    "text": {"kind": "umt5", "source": "there", "length": 12},
    "shards": 1,
    "episodes": 2,
    "described": [{"caption": "a"}, {"caption": "b"}],
}
PICTURES = {
    **NEW_TEXT,
    "shown": {"frames": 21, "size": [480, 832]},
    "image": {"source": "there", "tokens": 257, "width": 1280},
}
VALID = {"clips": CLIPS, "paths": PATHS, "earlier prompts": TEXT, "prompts": NEW_TEXT, "pictures": PICTURES}


@pytest.mark.parametrize("kind", VALID)
def test_what_recorders_note_is_kept_as_it_is(tmp_path, kind):
    (tmp_path / META).write_text(json.dumps({**VALID[kind], "camera": "top", "ranges": {"x": [0, 1]}}))
    assert read_meta(tmp_path) == {**VALID[kind], "camera": "top", "ranges": {"x": [0, 1]}}


NONSENSE = [
    ("clips", "fps", ...),
    ("clips", "fps", "x"),
    ("clips", "fps", 0),
    ("clips", "fps", float("inf")),
    ("clips", "fps", 10**400),
    ("clips", "shards", ...),
    ("clips", "shards", "1"),
    ("clips", "shards", 10**12),
    ("clips", "described", ...),
    ("clips", "described", {}),
    ("clips", "described", [{}]),
    ("clips", "described", [5, 6]),
    ("clips", "described", [{"seed": "x"}, {}]),
    ("clips", "described", [{"measures": {"brightness": "x"}}, {}]),
    ("clips", "described", [{"measures": []}, {}]),
    ("clips", "described", [{"caption": 5}, {}]),
    ("clips", "episodes", 3),
    ("clips", "given", -1),
    ("clips", "given", "x"),
    ("clips", "temporal", 0),
    ("clips", "px_size", []),
    ("clips", "px_size", 10**9),
    ("clips", "codec", ["a"]),
    ("clips", "split", ["train"]),
    ("clips", "actions", 5),
    ("clips", "actions", ["a", "a"]),
    ("clips", "actions", [1.5, {}]),
    ("clips", "config", [1]),
    ("clips", "keys", {"left": 3}),
    ("clips", "text", ["a"]),
    ("clips", "text.kind", "umt6"),
    ("clips", "audio", {"rate": -1}),
    ("paths", "levels", [2.0]),
    ("paths", "levels", "x"),
    ("paths", "frames", -5),
    ("paths", "seed", 2**60),
    ("earlier prompts", "names", ["../a", "b"]),
    ("earlier prompts", "names", ["a", ""]),
    ("earlier prompts", "names", ["a"]),
    ("earlier prompts", "negative_name", "/etc/passwd"),
    ("earlier prompts", "negative_name", ...),
    ("prompts", "per_shard", ...),
    ("prompts", "per_shard", 0),
    ("pictures", "shown.frames", 0),
    ("pictures", "shown.size", [1]),
    ("pictures", "image", 5),
    ("pictures", "image.width", "x"),
    ("prompts", "prompts", 3),
    ("prompts", "text.length", ...),
    ("prompts", "text.length", 10**9),
]


@pytest.mark.parametrize(("kind", "path", "value"), NONSENSE, ids=lambda x: str(x)[:40])
def test_a_field_of_nonsense_is_named_with_its_file(tmp_path, kind, path, value):
    (tmp_path / META).write_text(json.dumps(change(VALID[kind], path, value)))
    with pytest.raises(DataError) as caught:
        read_meta(tmp_path)
    said = str(caught.value)
    assert str(tmp_path / META) in said and path.split(".")[-1] in said and "\n" not in said


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "[" * 100_000, "{", "", "\0"])
def test_meta_that_is_no_mapping_is_one_line_on_the_command_line(tmp_path, capsys, text):
    folder = write_latents(tmp_path / "d")
    (folder / META).write_text(text)
    assert cli.main(["data", "latents", str(tmp_path / "o"), "--from", str(folder), "--codec", "doom-codec"]) == 1
    said = capsys.readouterr().err.strip()
    assert META in said and "\n" not in said and "unexpected" not in said


def test_what_is_asked_for_and_not_there_is_named(tmp_path):
    meta = parse_meta(copy.deepcopy(CLIPS), tmp_path / META)
    assert meta.get("levels") is None and meta["described"][0]["seed"] == 1
    for ask in (lambda: meta["levels"], lambda: meta["described"][1]["caption"]):
        with pytest.raises(DataError, match=rf"{META}.* lacks (levels|caption)"):
            ask()


def test_data_of_other_episodes_than_its_meta_says_is_refused(tmp_path):
    folder = write_latents(tmp_path / "d", episodes=6)
    meta = json.loads((folder / META).read_text())
    for episodes in (5, 7):
        described = (meta["described"] * 2)[:episodes]
        (folder / META).write_text(json.dumps({**meta, "episodes": episodes, "described": described}))
        with pytest.raises(DataError, match=f"6 episodes.*{META} says {episodes}"):
            Clips(folder)


def test_latents_that_do_not_say_how_many_frames_they_hold_are_refused(tmp_path):
    folder = write_latents(tmp_path / "d")
    assert Clips(folder).factor == 4
    meta = json.loads((folder / META).read_text())
    for actions in ([], [str(k) for k in range(99)]):
        (folder / META).write_text(json.dumps({**meta, "actions": actions}))
        with pytest.raises(DataError, match="temporal"):
            _ = Clips(folder).factor


def test_clips_of_which_all_is_given_teach_nothing_and_are_refused(tmp_path):
    folder = write_latents(tmp_path / "d", length=16)
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "given": 7}))
    Clips(folder).latents(2, 8, 0, 0)
    with pytest.raises(DataError, match="given 7"):
        Clips(folder).latents(2, 7, 0, 0)


def test_nonsense_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(DataError, match="fps"):
        write_shards(tmp_path / "d", [({"frames": torch.zeros(1)}, [{}])], {"fps": -1})
    assert not (tmp_path / "d").exists()


def places(value, path=""):
    """The dotted path of every field, but of what is a world's own."""
    for key, inner in value.items():
        yield f"{path}{key}"
        if isinstance(inner, dict) and key != "config":
            yield from places(inner, f"{path}{key}.")


PLACES = [(kind, path) for kind, meta in VALID.items() for path in places(meta)]
VALUES = st.one_of(
    st.sampled_from([..., None, [], {}, "", "x", True, -1, 0, 1, 2, 10**9, 10**400, 1e308, [[1]], {"x": 1}]),
    st.sampled_from([float("nan"), float("inf"), [None], ["x"] * 5000, "9" * 5000, {"kind": 5}, ["../x", "y"]]),
    st.integers(-100, 10_000),
    st.floats(allow_nan=False),
    st.lists(st.dictionaries(st.sampled_from(["seed", "measures", "caption"]), st.none() | st.integers()), max_size=2),
)


def use(folder, root):
    """All that is done with meta before training."""
    data = open_data(folder)
    if not isinstance(data, Prompts):
        assert data.given >= 0 and data.factor >= 1 and len(data.kept) == len(data)
        Trainer(flow_stage(root, data=str(folder))).step()


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=(pytest.mark.slow, pytest.mark.timeout(1800)))])
def test_any_field_of_meta_is_read_or_refused(tmp_path, examples):
    hits = Counter()
    folder = write_latents(tmp_path / "latents", episodes=2)
    said = json.loads((folder / META).read_text())
    valid = {**VALID, "clips": {**CLIPS, **said, "text": CLIPS["text"]}}

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.sampled_from(PLACES), VALUES)
    def fuzz(place, value):
        kind, path = place
        try:
            (folder / META).write_text(json.dumps(change(valid[kind], path, value)))
            meta = read_meta(folder)
            if kind == "clips":
                use(folder, tmp_path)
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            hits[kind, path, "refused"] += 1
            return
        assert meta["fps"] > 0 and meta["episodes"] >= 1
        hits[kind, path, "read"] += 1

    fuzz()
    for (kind, path, outcome), number in sorted(hits.items()):
        print(f"{number:6d} {kind} {path} {outcome}")
    assert {kind for kind, _, _ in hits} == set(VALID) and {outcome for *_, outcome in hits} == {"read", "refused"}


def test_the_examples_hold_every_field():
    assert {f.name for f in fields(Meta)} == set().union(*VALID.values())
