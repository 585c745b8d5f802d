"""The recorded numbers of the original implementations, through the same script that checks unseen folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import parity  # noqa: E402

GOLDENS = sorted(path.parent for path in (Path(__file__).parent / "goldens").glob("*/config.json"))
NAMES = {path.name for path in GOLDENS}
OVERSIZED = {
    "diagdistill_infinity": "diag_local7_sink4",
    "diagdistill_rollout": "local7_sink4",
    "longlive_switch_rollout": "single_local7_sink4",
}


@pytest.mark.parametrize("folder", GOLDENS, ids=lambda path: path.name)
def test_every_recorded_output_is_reproduced_or_declined_by_name(folder):
    if folder.name in ("scheduler", "wan_vae"):
        pytest.importorskip("diffusers")
    golden = parity.check(folder)
    result = parity.summary(golden)
    wrong = {name: row for name, row in golden.results.items() if row[0] == "differs"}
    assert result["ok"] and not wrong, wrong
    assert result["max_abs"] < 2e-5
    for name in result["declined"]:
        assert "grad_upstream" in name or name.startswith(OVERSIZED.get(folder.name, "-")), name


def test_the_goldens_cover_every_case_the_script_knows():
    assert {json.loads((path / "config.json").read_text())["case"] for path in GOLDENS} == set(parity.cases())


def test_an_output_that_nobody_computed_counts_as_different(tmp_path):
    golden = parity.Golden(GOLDENS[0])
    golden.io["out.made_up"] = torch.zeros(2)
    golden.compare("made_up", torch.zeros(3))
    assert golden.results["made_up"][0] == "differs"
    golden.results.clear()
    golden.finish()
    assert golden.results["made_up"][0] == "differs" and not parity.summary(golden)["ok"]


def test_the_script_ends_with_a_json_line_and_an_exit_code(tmp_path):
    good = Path(__file__).parent / "goldens" / "self_forcing_causal_train_mask_iff"
    command = [sys.executable, str(ROOT / "scripts" / "parity.py")]
    run = subprocess.run([*command, str(good)], capture_output=True, text=True, check=False)
    last = json.loads(run.stdout.strip().splitlines()[-1])
    assert run.returncode == 0 and last["ok"] and last["case"] == good.name and last["declined"] == []


def test_a_changed_number_makes_the_script_fail(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    good = Path(__file__).parent / "goldens" / "self_forcing_causal_train_mask_iff"
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    io = load_file(good / "io.safetensors")
    io["out.first1_block3.flow"][0, 0, 0, 0, 0] += 1e-3
    save_file(io, tmp_path / "io.safetensors")
    assert parity.main([str(tmp_path), "--quiet"]) == 1
    assert "differs" in capsys.readouterr().out


def test_an_unknown_case_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"case": "sora"}')
    (tmp_path / "io.safetensors").write_bytes((GOLDENS[0] / "io.safetensors").read_bytes())
    assert parity.main([str(tmp_path)]) == 2
    assert "sora" in capsys.readouterr().err
