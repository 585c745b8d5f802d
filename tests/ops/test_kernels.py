"""The Triton kernels: against their references in Triton's interpreter, on a GPU where there is one, built for two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidistill.ops import fused, quant, tuning
from vidistill.ops.attention import BACKENDS, chosen, use_backend

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(1800)  # half a minute on an idle core, much more beside a training run
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def parity() -> subprocess.CompletedProcess[str]:
    """What the script says on a CPU: Triton reads TRITON_INTERPRET when it is imported, so it needs its own process."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/verify_kernels.py"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kernel", [*tuning.TABLES["interpreter"], "traced"])
def test_a_kernel_equals_its_reference_in_the_interpreter(parity, kernel):
    lines = [line for line in parity.stdout.splitlines() if line.startswith(f"parity {kernel} ")]
    assert len(lines) == 1 and " ok " in lines[0], parity.stdout + parity.stderr[-2000:]


def test_every_operator_has_a_fake_and_traces_without_a_graph_break(parity):
    source = "".join(path.read_text() for path in (ROOT / "vidistill" / "ops" / "kernels").glob("*.py"))
    operators = re.findall(r'custom_op\("vidistill::(\w+)"', source)
    assert source.count("register_fake") == len(operators) and source.count("@triton.jit") > len(operators)
    traced = {line.rsplit(": ", 1)[1] for line in parity.stdout.splitlines() if line.startswith("traced without")}
    assert traced == {name.removesuffix("_backward") for name in operators}, parity.stdout + parity.stderr[-2000:]


def test_auto_takes_the_kernels_that_torch_lacks_and_no_others():
    with use_backend("auto"):
        assert quant.kernels("cuda") and not quant.kernels("cpu")
        assert not fused.kernels("cuda") and chosen("cuda") == "sdpa"


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"triton"}))
def test_a_backend_other_than_triton_runs_no_kernel(backend):
    with use_backend(backend):
        assert not fused.kernels("cuda") and not quant.kernels("cuda")


def test_the_script_says_that_times_need_a_gpu(parity):
    assert parity.returncode == 0, parity.stdout + parity.stderr[-2000:]
    assert "times need a GPU" in parity.stdout


def test_passes_through_the_kernels_equal_plain_ones():
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "triton_pass.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    errors = [float(line.rsplit(": ", 1)[1]) for line in done.stdout.splitlines()]
    assert len(errors) == 2 and max(errors) < 1e-4, done.stdout + done.stderr[-2000:]


def test_launch_tables_have_the_same_kernels_and_distinct_rows():
    kernels = set(tuning.TABLES["interpreter"])
    for table in tuning.TABLES.values():
        assert set(table) == kernels
        for rows in table.values():
            assert rows and len({tuple(row.items()) for row in rows}) == len(rows)


def test_a_gpu_without_a_table_of_its_own_takes_one_that_fits():
    assert [tuning.table_for(c) for c in ((9, 0), (8, 9), (8, 0), (8, 6), (10, 0), (12, 0))] == [
        "hopper",
        "ada",
        "ada",
        "ada",
        "hopper",
        "ada",
    ]


@pytest.mark.slow
def test_every_row_of_the_launch_tables_builds_and_fits_its_machine():
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "scripts/verify_kernels.py", "--build"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", list(tuning.TABLES["interpreter"]))
def test_a_kernel_equals_its_reference_on_the_gpu(kernel):
    from kernel_parity import cases

    config = tuning.config(kernel, "cuda", torch.cuda.current_device())
    failed = [c.name for c in cases("cuda") if c.kernel == kernel and not c.error(config, "cuda") <= c.tolerance]
    assert not failed
