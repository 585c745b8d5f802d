"""The public names: there in a fresh process, loaded when they are asked for, and what the README shows."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

import vidistill
from vidistill.ops.attention import constant_in_graphs

ZOO_TABLE = Path(__file__).parents[2] / "scripts" / "zoo_table.py"


def video_size(path):
    """Frames, height and width of a video file."""
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    return len(frames), *frames[0].shape[:2]


def run(code, cwd=None):
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_torch():
    assert run("import sys, vidistill; print('torch' in sys.modules, vidistill.__version__)").split()[0] == "False"


def test_a_command_starts_without_the_compiler():
    assert run("import sys, vidistill.cli.main; print('torch._dynamo' in sys.modules)").split() == ["False"]


def test_what_a_graph_takes_as_constant_is_marked_as_torch_marks_it():
    def decide():
        return True

    def other():
        return True

    assert vars(constant_in_graphs(decide)) == vars(torch.compiler.assume_constant_result(other)) != {}


def test_every_public_name_is_there_and_nothing_else():
    assert set(vidistill.__all__) == set(vidistill.PUBLIC) <= set(dir(vidistill))
    assert all(callable(getattr(vidistill, name)) for name in vidistill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'stream'"):
        _ = vidistill.stream


@pytest.mark.parametrize("first", ["", "import vidistill.rollout\n"])
def test_the_loop_is_the_public_name_whatever_was_imported_first(first):
    code = "from vidistill import rollout\ntry:\n    rollout()\nexcept TypeError as error:\n    print(error)"
    assert "rollout() missing" in run(first + code)


def test_the_snippet_of_the_readme_writes_a_video(tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert code.startswith("from itertools") and len(code.splitlines()) <= 16
    run(code, cwd=tmp_path)
    assert video_size(tmp_path / "walk.mp4") == (70, 64, 64)


def test_the_figures_of_the_pages_are_those_of_the_cards():
    done = subprocess.run([sys.executable, ZOO_TABLE, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}: run python scripts/zoo_table.py"


@pytest.mark.parametrize(
    ("interval", "trainings", "asked", "said"),
    [
        ([1.1, 2.0], 2, {"least": 1.0}, "held"),
        ([0.1, 0.9], 2, {"least": 1.0}, "not held"),
        ([0.9, 1.1], 2, {"least": 1.0}, "undecided"),
        ([0.1, 0.9], 0, {"most": 1.0}, "held"),
        ([1.1, 2.0], 0, {"most": 1.0}, "not held"),
        ([1.1, 2.0], 1, {"least": 1.0}, "undecided, one training"),
    ],
)
def test_a_claim_is_decided_by_a_whole_interval_and_never_by_one_training(interval, trainings, asked, said):
    verdict = runpy.run_path(str(ZOO_TABLE))["verdict"]
    assert verdict({"interval": interval, "trainings": trainings, **asked}) == said


def test_no_module_takes_a_public_function_for_the_module_of_its_name():
    package = Path(vidistill.__file__).parent
    modules = {name for name, module in vidistill.PUBLIC.items() if name == module}
    pattern = re.compile(rf"^from vidistill import .*\b({'|'.join(modules)})\b", re.MULTILINE)
    assert modules == {"rollout"}
    assert not [path for path in package.rglob("*.py") if pattern.search(path.read_text(encoding="utf-8"))]
