"""The rules that mutants.py draws by, and a small sample of what it draws."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import named
from mutation_rules import NAMED, sites

CODE = '''
SCALE = 2.0


class Config:
    """A setting is no mutant."""

    frames: int = 3


def mean(x: int, total: int, first=1) -> float:
    """Nor is a text."""
    if x > total and not first:
        raise ValueError(f"{x + 1} is too many")
    assert total + 1
    return other(x[first:], max(total, first)) / (total - 1)
'''
CHANGES = {
    ("constant", "SCALE = 4.0"),
    ("constant", "def mean(x: int, total: int, first=2) -> float:"),
    ("condition", "if (x > total or not first):"),
    ("condition", "if x > total and (first):"),
    ("comparison", "if (x >= total) and not first:"),
    ("statement", "pass"),
    ("operator", "return (other(x[first:], max(total, first)) * (total - 1))"),
    ("operator", "return other(x[first:], max(total, first)) / ((total + 1))"),
    ("constant", "return other(x[first:], max(total, first)) / (total - 2)"),
    ("arguments", "return other(max(total, first), x[first:]) / (total - 1)"),
    ("off by one", "return other(x[first + 1:], max(total, first)) / (total - 1)"),
}


def test_every_rule_changes_one_line_and_no_text_type_or_setting():
    found = list(sites(CODE))
    assert {(site.kind, site.after) for site in found} == CHANGES
    for site in found:
        changed = site.apply(CODE)
        ast.parse(changed)
        differ = [a != b for a, b in zip(CODE.splitlines(), changed.splitlines(), strict=True)]
        assert sum(differ) == 1 and differ.index(True) == site.line - 1
        assert site.scope == ("" if "SCALE" in site.before or "def" in site.before else "mean")


def test_every_named_mutant_changes_its_file():
    found = list(named())  # exits where a text does not stand in its file once
    assert len(found) == len(NAMED)
    for mutant in found:
        assert mutant.content != Path(mutant.file).read_bytes(), mutant.key


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sample_of_mutants_is_killed(tmp_path):
    command = [sys.executable, "scripts/mutants.py", "--room", "schedules", "--count", "6"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "mutants.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 tried" in done.stdout
