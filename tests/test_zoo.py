"""What is bundled: every name loads, fits its codec and says where it comes from; the whole stays small."""

import json
from pathlib import Path

import pytest

from vidistill import checkpoint
from vidistill.checkpoint import CheckpointError
from vidistill.cli.main import main
from vidistill.config import build, load_config, read_yaml
from vidistill.training.config import TrainConfig, recipe

NAMES = checkpoint.zoo_names()
PROMISED = {
    "doom", "doom-codec", "doom-teacher", "doom-tf", "doom-selfforcing", "doom-diagonal",
    "doom-relic", "doom-relic-teacher", "doom-relic-window", "doom-relic-full",
    "drive", "shapes", "talker", "talker-teacher", "talker-init", "talker-selfforcing",
    "talker-improved",
}  # fmt: skip
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CARD = {"objective", "steps", "seed", "data", "commit", "hours", "train"}
SOURCES = {"drive": "gym"}  # of worlds whose clips an importer recorded
SUFFIXES = {".json", ".safetensors", ".png", ".py", ".md", ""}  # nothing that is unpickled; NOTICE


def size(*names: str) -> int:
    """Bytes of the files of some checkpoints."""
    paths = [checkpoint.locate(name) for name in names]
    return sum(
        checkpoint.with_extension(path, end).stat().st_size for path in paths for end in (".json", ".safetensors")
    )


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_bundled_name_loads_and_names_a_bundled_codec(name):
    bundle = checkpoint.load(name)
    assert bundle.name == NAMES[name] and all(p.isfinite().all() for p in bundle.net.parameters())
    if bundle.kind == "codec":
        return
    assert bundle.record["codec"] in NAMES
    assert checkpoint.load_codec(bundle).latent_channels == bundle.shape.channels


@pytest.mark.parametrize("name", sorted(set(NAMES.values())))
def test_every_card_says_what_was_trained_and_from_what(name):
    card = checkpoint.read_record(checkpoint.locate(name))["card"]
    assert card.keys() >= CARD and card["commit"] and card["hours"] > 0 and card["steps"] > 0
    world = name.split("-")[0]
    assert name in full_names(world, card["train"]["name"]) and card["train"]["objective"] == card["objective"]
    assert card["data"]["source"] == SOURCES.get(world, world) and card["data"]["split"] == "train"


@pytest.mark.parametrize("name", sorted(set(NAMES.values())))
def test_a_card_that_names_a_recipe_comes_from_a_committed_one(name):
    """Cards without a hash are of trainings with settings replaced by hand, which they list."""
    told = checkpoint.read_record(checkpoint.locate(name))["card"]
    if told.get("recipe"):
        known = {
            recipe(load_config(TrainConfig, path)): path
            for path in CONFIGS.glob("*/*.yaml")
            if name in full_names(path.parent.name, (read_yaml(path) or {}).get("name"))
        }
        assert told["recipe"] in known, f"none of {sorted(known.values())}"
        assert told["recipe"] == recipe(build(TrainConfig, told["train"]))


def full_names(world, name):
    """What a stage of a world is bundled as: by its name, or by the world's and the stage's where `vidistill new` wrote
    the config."""
    return {name, f"{world}-{name}"}


@pytest.mark.parametrize("name", sorted(set(NAMES.values())))
def test_figures_on_a_card_say_how_they_were_measured(name):
    figures = checkpoint.read_record(checkpoint.locate(name))["card"].get("figures", {})
    measured = [part for part in figures.values() if isinstance(part, dict) and "command" in part]
    if set(figures) - {key for key, part in figures.items() if part in measured}:
        measured.append(figures)  # what stands beside them is of a run of its own
    assert all(run["command"].startswith("vidistill ") and run["commit"] and run["machine"] for run in measured)


def test_the_promised_names_are_there():
    assert NAMES.keys() >= PROMISED
    assert NAMES["doom"] == "doom-selfforcing" and NAMES["shapes"] == "shapes-selfforcing"


def test_diagonal_students_carry_the_published_figures_beside_their_own_evaluations():
    for name in ("doom-diagonal", "shapes-diagonal"):
        row = checkpoint.summary(name)
        published = row["card"]["published"]
        assert published["source"] == "arXiv 2603.09488" and published["nfe_7_chunks_teacher_schedule"] == 35
        assert row["nfe_7_chunks"] == published["nfe_7_chunks"] == 17


def test_nothing_bundled_is_a_pickle():
    files = [p for p in checkpoint.zoo_folder().rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.suffix for p in files} <= SUFFIXES


def test_what_a_world_needs_and_the_whole_zoo_stay_small():
    assert size("doom-codec", "doom-teacher", "doom-selfforcing") < 25 * 10**6
    assert sum(p.stat().st_size for p in checkpoint.zoo_folder().rglob("*") if p.is_file()) < 130 * 2**20


def test_info_without_a_name_lists_all_and_says_what_is_an_alias(capsys):
    assert main(["info", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows.keys() == NAMES.keys()
    aliases = {name: row["alias_of"] for name, row in rows.items() if "alias_of" in row}
    assert aliases == {name: stem for name, stem in NAMES.items() if name != stem}
    assert {**rows["doom-selfforcing"], "alias_of": "doom-selfforcing"} == rows["doom"]


def test_a_file_of_ones_own_that_is_called_like_an_alias_is_none(tmp_path, monkeypatch, checkpoints):
    for end in (".json", ".safetensors"):
        (tmp_path / f"doom{end}").write_bytes(checkpoint.with_extension(checkpoints / "student", end).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert "alias_of" not in checkpoint.summary("doom") and "alias_of" not in checkpoint.summary("doom.json")
    assert checkpoint.summary("shapes")["alias_of"] == "shapes-selfforcing"


def test_what_installed_packages_leave_out_says_where_it_is(monkeypatch, tmp_path):
    controls = json.loads((checkpoint.zoo_folder() / "clone_only.json").read_text())
    excluded = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert all(excluded.count(f"vidistill/zoo/{name}.*") == 2 for name in controls)  # wheel and sdist
    (tmp_path / "clone_only.json").write_text(json.dumps(controls))
    monkeypatch.setattr(checkpoint, "zoo_folder", lambda: tmp_path)
    for name in controls:
        with pytest.raises(CheckpointError, match=f"{name} .*clone"):
            checkpoint.locate(name)
