"""The public names: there in a fresh process, loaded when they are asked for, and what the README shows."""

import subprocess
import sys

import pytest

import vidistill


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_torch():
    assert run("import sys, vidistill; print('torch' in sys.modules, vidistill.__version__)").split()[0] == "False"


def test_every_public_name_is_there_and_nothing_else():
    assert set(vidistill.__all__) == set(vidistill.PUBLIC) <= set(dir(vidistill))
    assert all(callable(getattr(vidistill, name)) for name in vidistill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'stream'"):
        _ = vidistill.stream


@pytest.mark.parametrize("first", ["", "import vidistill.rollout\n"])
def test_the_loop_is_the_public_name_whatever_was_imported_first(first):
    code = "from vidistill import rollout\ntry:\n    rollout()\nexcept TypeError as error:\n    print(error)"
    assert "rollout() missing" in run(first + code)
