"""What every command says of a checkpoint that cannot be used: one line, at once, without a traceback."""

import argparse
import json
import shutil
import sys

import pytest
import yaml
from nonsense import NONSENSE, change
from tiny_training import FRAMES, write_latents

from vidistill import checkpoint
from vidistill.cli.main import main, parser

COMMANDS = {  # with a checkpoint {}
    "info": ["info", "{}"],
    "generate": ["generate", "{}", "--seconds", "0.1", "-o", "out.mp4"],
    "serve": ["serve", "{}", "--port", "1"],
    "bench": ["bench", "{}"],
    "eval": ["eval", "{}", "--quick", "--out", "report"],
    "export": ["export", "{}", "--to", "ours", "-o", "again"],
    "train": ["train", "stage.yaml", "init={}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student `m` under a name of its own, and a stage that could start from it."""
    folder = tmp_path_factory.mktemp("damaged")
    for end in (".json", ".safetensors"):
        shutil.copy(checkpoint.zoo_folder() / f"doom-selfforcing{end}", folder / f"m{end}")
    write_latents(folder / "latents")
    stage = {"name": "t", "objective": "teacher_forcing", "data": "latents", "steps": 1, "batch": 1, "frames": FRAMES}
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    return folder


def said(capsys, command, name):
    """The only line that a command prints when it is refused."""
    assert main([word.replace("{}", name) for word in COMMANDS[command]]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"vidistill {command}: "), lines
    assert "unexpected" not in lines[0] and "report it" not in lines[0]
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("path", "value"), NONSENSE, ids=lambda x: str(x)[:40])
def test_a_record_of_nonsense_is_refused_by_every_command(folder, monkeypatch, capsys, command, path, value):
    monkeypatch.chdir(folder)
    record = json.loads((folder / "m.json").read_text())
    (folder / "bad.json").write_text(json.dumps(change(record, path, value)))
    if not (folder / "bad.safetensors").exists():
        shutil.copy(folder / "m.safetensors", folder / "bad.safetensors")
    assert path.split(".")[-1] in said(capsys, command, "bad")


WHOLE = {
    "a list": b"[]",
    "a number": b"7",
    "nothing": b"",
    "cut": b'{"format": 1, "kind": "stu',
    "deep": b"[" * 100_000,
    "latin": '{"kind": "é"}'.encode("latin-1"),
    "twice": b'{"format": 1, "kind": "student", "kind": "codec"}',
    "zeros": bytes(64),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", WHOLE)
def test_a_file_that_is_no_record_is_named_by_every_command(folder, monkeypatch, capsys, command, what):
    monkeypatch.chdir(folder)
    (folder / "whole.json").write_bytes(WHOLE[what])
    assert "whole" in said(capsys, command, "whole")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["base.safetensors", "base.pth"])
def test_foreign_weights_are_pointed_to_convert_by_every_command(folder, monkeypatch, capsys, command, name):
    monkeypatch.chdir(folder)
    (folder / name).write_bytes(b"weights")
    assert "vidistill convert" in said(capsys, command, name)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"info", "bench", "train"}))
@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_name_of_nothing_is_refused_by_every_command(folder, monkeypatch, capsys, command, name):
    monkeypatch.chdir(folder)
    assert "checkpoint" in said(capsys, command, name)


def leaves(one, words=()):
    """Every command of a parser, kinds of data included."""
    inner = [a for a in one._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield words, one
    for action in inner:
        for name, sub in action.choices.items():
            yield from leaves(sub, (*words, name))


LEAVES = {" ".join(words): sub for words, sub in leaves(parser())}


@pytest.mark.parametrize("command", LEAVES)
def test_every_command_takes_verbose(command):
    assert "-v" in LEAVES[command]._option_string_actions and len(LEAVES) > 15


@pytest.mark.parametrize("command", LEAVES)
@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ZeroDivisionError("y"), AssertionError()])
def test_what_no_command_expects_is_one_line_that_asks_for_a_report(monkeypatch, capsys, command, error):
    def broken(args):
        raise error

    class Parsed:
        def parse_args(self, argv):
            return argparse.Namespace(command=command.split()[0], verbose="-v" in argv, run=broken)

    monkeypatch.setattr(sys.modules["vidistill.cli.main"], "parser", Parsed)
    assert main(command.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert type(error).__name__ in line and "report" in line and "-v" in line
    with pytest.raises(type(error)):
        main([*command.split(), "-v"])
