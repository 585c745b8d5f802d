"""Text files: one encoding, whatever the machine prefers; files in others are named, with what to do."""

import ast
import re
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from vidistill import io
from vidistill.cli.main import main

ROOT = Path(__file__).parents[2]
FILES = sorted(path for part in ("vidistill", "scripts", "demos") for path in (ROOT / part).rglob("*.py"))
OPENERS = {"open": (1, "r"), "os.fdopen": (1, "r"), "tempfile.NamedTemporaryFile": (0, "wb")}  # argument, mode
MODE, PATHLIKE = re.compile("[rwaxbt+]+"), re.compile(r"(?:path|file|folder|note|lock|index|source|record|\))\.open$")


def opened(node):
    """The mode in which a call opens a file; empty for a call that opens none."""
    name = ast.unparse(node.func)
    at, mode = OPENERS.get(name, (0, "r" if PATHLIKE.search(name) else ""))
    said = [k.value for k in node.keywords if k.arg == "mode"] or node.args[at : at + 1]
    word = said[0].value if said and isinstance(said[0], ast.Constant) else None
    return word if isinstance(word, str) and MODE.fullmatch(word) else mode


def undecided(code):
    """Lines of `code` that read or write text in whatever encoding the machine prefers."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        text = name.endswith((".read_text", ".write_text")) and not name.startswith("io.")
        text |= name.startswith("subprocess.") and bool(given & {"text", "universal_newlines"})
        text |= (name in OPENERS or name.endswith(".open")) and name != "os.open" and "b" not in (opened(node) or "b")
        if text and "encoding" not in given:
            yield node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_read_and_written_in_one_encoding(path):
    assert not list(undecided(path.read_text(encoding="utf-8"))), 'say encoding="utf-8", or read and write bytes'


@pytest.mark.parametrize(
    "line",
    [
        *("open(p)", "open(p, 'w')", "open(p, mode='a')", "path.open()", "(folder / 'x').open('w')"),
        *("path.read_text()", "path.write_text(x)", "subprocess.run(x, text=True)", "note.open(newline='')"),
        *("os.fdopen(f, 'w')", "tempfile.NamedTemporaryFile('w')"),
    ],
)
def test_text_without_an_encoding_is_found(line):
    assert list(undecided(line))
    assert not list(undecided(f"{line[:-1]}, encoding='utf-8')".replace("(, ", "(")))


@pytest.mark.parametrize(
    "line", ["open(p, 'rb')", "path.open('ab')", "Image.open(path)", "session.open()", "io.write_text(p, x)"]
)
def test_bytes_and_other_doors_need_no_encoding(line):
    assert not list(undecided(line))


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["list.txt", "videos.csv", "videos.json", "videos.jsonl"])
def test_text_in_another_encoding_is_named_with_what_to_do(tmp_path, capsys, name, encoding):
    file = tmp_path / name
    file.write_text('[{"video": "café.mp4"}]\n', encoding=encoding)
    out = str(tmp_path / "out")
    read = ["prompts", out, "--file", str(file), "--text", "x"] if name == "list.txt" else ["videos", out]
    assert main(["data", *read, *(["--from", str(file)] if name != "list.txt" else [])]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert str(file) in said and "save it as UTF-8" in said


def test_a_mark_at_the_start_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffcafé\n".encode())
    assert io.read_text(tmp_path / "a.txt") == "café\n"


@pytest.mark.parametrize("printed", ["latin-1", "ascii"])
def test_a_name_that_the_terminal_cannot_show_does_not_fail_what_is_done(tmp_path, monkeypatch, printed):
    shown = [TextIOWrapper(BytesIO(), encoding=printed) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), shown, strict=True):
        monkeypatch.setattr(sys, name, stream)
    out = tmp_path / "wälk-🎬.mp4"
    done = main(["generate", "shapes", "-o", str(out), "--seconds", "0.1"])
    shown[0].flush()
    assert done == 0 and out.is_file() and b"lk-" in shown[0].buffer.getvalue()
