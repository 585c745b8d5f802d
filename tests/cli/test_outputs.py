"""Every command that writes looks at its outputs before it works, and overwrites nothing but files of ours."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from vidistill import checkpoint
from vidistill.cli.main import COMMANDS, main, parser
from vidistill.evaluation import suite_of
from vidistill.evaluation.report import folder_of

WORK = "the work began before the outputs were looked at"


def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(path)


def text(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def report_of(name, out):
    """Where `vidistill eval --quick` writes the report of a bundled student."""
    path = checkpoint.locate(name)
    suite = suite_of(name, checkpoint.read_record(path))
    return folder_of({"student": {"name": path.name}}, suite.name, str(out))


def weights(path):
    shutil.copy(checkpoint.zoo_folder() / "shapes-codec.safetensors", path)


# Command -> its words with an output {}, and an output that may not be written: what is put there, and as what.
STUDENT = ["shapes", "--seconds", "0.1"]
TABLE = {
    "generate": ["generate", *STUDENT, "-o", "{}.mp4"],
    "eval": ["eval", "shapes", "--quick", "--clips", "2", "--out", "{}"],
    "frontier": ["eval", "--frontier", "frontier.yaml"],
    "diagnose": ["diagnose", "run", "-o", "{}.png"],
    "convert": ["convert", "other.safetensors", "{}", "--family", "self-forcing"],
    "export": ["export", "shapes", "--to", "ours", "-o", "{}"],
    "export file": ["export", "shapes", "--to", "self-forcing", "-o", "{}.pt"],
    "export folder": ["export", "shapes", "--to", "diffusers", "-o", "{}"],
    "train": ["train", "stage.yaml", "out={}"],
    "new": ["new", "{}", "--data", "frames"],
    "data doom": ["data", "doom", "{}"],
    "data shapes": ["data", "shapes", "{}"],
    "data talker": ["data", "talker", "{}"],
    "data prompts": ["data", "prompts", "{}", "--file", "prompts.txt", "--text", "nobody"],
    "data trajectories": ["data", "trajectories", "{}", "--teacher", "shapes-teacher", "--data", "frames"],
    "data videos": ["data", "videos", "{}", "--from", "clips"],
    "data gym": ["data", "gym", "{}", "--env", "nobody/None-v0"],
    "data latents": ["data", "latents", "{}", "--from", "frames", "--codec", "shapes-codec"],
    "data lerobot": ["data", "lerobot", "{}", "--from", "frames"],
    "data minari": ["data", "minari", "{}", "--from", "nobody/none-v0"],
    "data files": ["data", "files", "{}", "--from", "frames"],
    "data pictures": ["data", "pictures", "{}", "--file", "prompts.txt", "--model", "nobody"],
    "serve": ["serve", "--env", "nobody/None-v0", "--record", "{}"],
}
TAKEN = {  # what lies there already, foreign to us: what is made under the output's name
    "generate": [lambda out: text(out.with_suffix(".mp4")), lambda out: png(out.with_suffix(".png"))],
    "eval": [lambda out: text(report_of("shapes", out) / "index.html"), text],
    "diagnose": [lambda out: png(out.with_suffix(".png")), lambda out: out.with_suffix(".png").mkdir()],
    "convert": [lambda out: text(out.with_suffix(".json")), lambda out: text(out.with_suffix(".safetensors"))],
    "export": [lambda out: text(out.with_suffix(".json")), lambda out: weights(out.with_suffix(".safetensors"))],
    "export file": [lambda out: text(out.with_suffix(".pt"))],
    "export folder": [text, lambda out: out.mkdir()],
    "new": [text, lambda out: text(out / "notes.txt")],
    **{f"data {kind}": [text, lambda out: text(out / "notes.txt")] for kind in ("doom", "shapes", "talker", "prompts")},
    **{f"data {kind}": [text, lambda out: text(out / "notes.txt")] for kind in ("trajectories", "videos", "gym")},
    **{f"data {kind}": [text, lambda out: text(out / "notes.txt")] for kind in ("latents", "lerobot", "minari")},
    **{f"data {kind}": [text, lambda out: text(out / "notes.txt")] for kind in ("files", "pictures")},
    "serve": [text, lambda out: text(out / "notes.txt")],
}
ELSEWHERE = {"bench", "info", "publish"}  # they write nothing that the user names


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with what commands read, where work of any kind is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "diagnosis": {"levels": [], "cosine": []}}))
    (tmp_path / "prompts.txt").write_text("a fox")
    (tmp_path / "clips").mkdir()
    (tmp_path / "frames").mkdir()
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump({"name": "t", "objective": "flow", "data": "frames"}))

    def worked(*_, **__):
        raise AssertionError(WORK)

    for place in (
        "vidistill.training.trainer.train",
        "vidistill.data.shards.write_shards",
        "vidistill.data.ode_pairs.trajectories",
        "vidistill.data.prompts.prompts",
        "vidistill.evaluation.suite.judge",
        "vidistill.evaluation.report.draw_diagnosis",
        "vidistill.interop.export.read_ours",
        "vidistill.cli.convert.read_student",
        "vidistill.cli.planning.plan",
        "vidistill.streaming.runtime.load_fast",
        "vidistill.data.importers.videos.run",
        "vidistill.data.importers.gym.run",
        "vidistill.data.importers.latents.run",
        "vidistill.data.importers.lerobot.run",
        "vidistill.data.importers.minari.run",
        "vidistill.data.importers.files.run",
        "vidistill.data.pictures.pictures",
        "vidistill.serve.environment.Real.of",
        "vidistill.serve.app.run",
        "vidistill.evaluation.ablation.tuned",
    ):
        monkeypatch.setattr(place, worked)
    return tmp_path


def refused(capsys, command, out):
    words = [word.replace("{}", str(out)) for word in TABLE[command]]
    assert main(words) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vidistill ")]
    assert WORK not in said and "unexpected" not in said and (out.name in said or out.parent.name in said)
    return said


@pytest.mark.parametrize("command", sorted(set(TABLE) - {"frontier"}))
def test_a_folder_that_cannot_be_written_is_told_before_the_work(here, capsys, command):
    text(here / "file")
    refused(capsys, command, here / "file" / "out")
    assert (here / "file").read_text() == "mine"


@pytest.mark.parametrize(("command", "k"), [(command, k) for command in TAKEN for k in range(len(TAKEN[command]))])
def test_what_is_not_ours_is_not_overwritten(here, capsys, command, k):
    TAKEN[command][k](here / "out")
    before = {path: path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()}
    refused(capsys, command, here / "out")
    assert {path: path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(("command", "suffix"), [("generate", ".webm"), ("diagnose", ".txt"), ("export file", ".zip")])
def test_a_suffix_that_cannot_be_written_is_refused(here, capsys, command, suffix):
    out = here / f"out{suffix}"
    words = [word.replace("{}", str(here / "out")) for word in TABLE[command]]
    assert main([*words[:-1], str(out)]) == 1
    said = capsys.readouterr().err
    assert WORK not in said and suffix in said and not out.exists()


def test_a_frontier_looks_at_its_folder_first(here, capsys):
    text(here / "frontier" / "notes.txt")
    cells = {"stage": "stage.yaml", "out": str(here / "frontier"), "steps": 1, "cells": {"a": {}}}
    (here / "frontier.yaml").write_text(yaml.safe_dump(cells))
    stage = {"name": "t", "init": "shapes", "data": "frames", "objective": "teacher_forcing", "steps": 1}
    (here / "stage.yaml").write_text(yaml.safe_dump(stage))
    assert main(["eval", "--frontier", "frontier.yaml"]) == 1
    said = capsys.readouterr().err
    assert WORK not in said and "frontier is there" in said


@pytest.mark.parametrize("source", ["walk.png", "walk.mp4"])
def test_a_file_that_is_read_is_not_overwritten(here, capsys, source):
    png(here / "walk.png")
    assert main(["generate", "doom", "--image", source, "-o", "walk.mp4", "--seconds", "0.1"]) == 1
    assert WORK not in capsys.readouterr().err


def test_the_table_knows_every_command(capsys):
    names = {add.__name__.removeprefix("add_") for add in COMMANDS}
    assert names == {command.split()[0] for command in TABLE if command != "frontier"} | ELSEWHERE
    assert parser().prog == "vidistill"
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    kinds = set(re.findall(r"^ {4}(\w+)\b", capsys.readouterr().out, re.MULTILINE))
    assert kinds == {command.split()[1] for command in TABLE if command.startswith("data ")}
