"""The recorded numbers of the original implementations, through the same script that checks unseen folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import parity  # noqa: E402
from reference_wan import Net, Roll, write_folder  # noqa: E402

GOLDENS = sorted(path.parent for path in (Path(__file__).parents[1] / "goldens").glob("*/config.json"))
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
    assert {json.loads((path / "config.json").read_text())["case"] for path in GOLDENS} == set(parity.CASES)


# --- folders it has never seen ----------------------------------------------------------------------------------------

ARCH = {
    "patch_size": [1, 2, 2],
    "text_len": 7,
    "text_dim": 12,
    "freq_dim": 16,
    "in_dim": 8,
    "out_dim": 8,
    "dim": 60,
    "ffn_dim": 40,
    "num_heads": 5,
    "num_layers": 3,
    "eps": 1e-6,
}


def variant(chunk, local, sinks, steps=(1000, 500), *, warp=True, context=0, **more):
    return {
        "num_frame_per_block": chunk,
        "local_attn_size": local,
        "sink_size": sinks,
        "denoising_step_list": list(steps),
        "warp_denoising_step": warp,
        "context_noise": context,
        **more,
    }


UNSEEN = {  # case -> settings of its folder, variants, frames of each, given frames
    "rollout": (
        {"timestep_shift": 3.0, "latent_hw": [4, 6]},
        {
            "chunk2_sink3": variant(2, 7, 3, (1000, 900, 400), context=100),
            "first_frame": variant(4, -1, 0, (1000, 757, 522), warp=False, independent_first_frame=True),
            "sink9_given": variant(3, 13, 9, (1000, 100)),
            "ends_in_0": variant(1, 3, 1, (1000, 500, 0)),
        },
        {"chunk2_sink3": 10, "first_frame": 9, "sink9_given": 15, "ends_in_0": 5},
        {"sink9_given": 3},
    ),
    "longlive_rollout": (
        {"timestep_shift": 8.0, "latent_hw": [2, 10]},
        {
            "reset": variant(2, 5, 1, global_sink=False, pipeline="interactive", switch_frame_indices=[5]),
            "twice": variant(
                2, 6, 2, context=40, global_sink=True, pipeline="interactive", switch_frame_indices=[2, 9]
            ),
            "all": variant(3, -1, 0, global_sink=False, pipeline="interactive", switch_frame_indices=[4]),
        },
        {"reset": 12, "twice": 12, "all": 9},
        {},
    ),
    "diagonal_rollout": (
        {"timestep_shift": 3.0, "latent_hw": [6, 4]},
        {
            "chunk1": variant(1, 4, 1, (1000, 100), use_diagonal_denoising=True),
            "unwarped": variant(2, -1, 0, (1000, 800, 200), warp=False, use_diagonal_denoising=True),
        },
        {"chunk1": 6, "unwarped": 6},
        {},
    ),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_folders_of_other_shapes_are_reproduced(tmp_path, case):
    settings, variants, frames, given = UNSEEN[case]
    config = {"case": case, "transformer": ARCH, "variants": variants, **settings}
    golden = parity.check(write_folder(tmp_path / case, config, frames, given=given, batch=2))
    wrong = {name: row for name, row in golden.results.items() if row[0] != "ok"}
    assert not wrong and len(golden.results) == 8 * len(variants), wrong
    assert parity.summary(golden)["max_abs"] < 1e-5


def test_positions_relative_to_the_window_are_reproduced_in_other_shapes(tmp_path):
    variants = {"roll": variant(2, 5, 2, global_sink=True, pipeline="single_prompt", switch_frame_indices=None)}
    config = {"case": "longlive_rollout", "transformer": ARCH, "variants": variants, "use_infinite_attention": True}
    config |= {"timestep_shift": 5.0, "latent_hw": [4, 6]}
    result = parity.summary(parity.check(write_folder(tmp_path / "relative", config, {"roll": 10})))
    assert result["ok"] and result["declined"] == [] and result["max_abs"] < 1e-5


@pytest.mark.parametrize("sinks", [3, 4])
def test_sinks_larger_than_a_chunk_are_declined_for_longlive_alone(tmp_path, sinks):
    settings = {"transformer": ARCH, "timestep_shift": 5.0, "latent_hw": [4, 4]}
    listed = variant(2, 7, sinks, (1000, 100), use_diagonal_denoising=True)
    config = {"case": "diagonal_rollout", "variants": {"v": listed}, **settings}
    result = parity.summary(parity.check(write_folder(tmp_path / "diagonal", config, {"v": 8})))
    assert result["ok"] and result["declined"] == ["v.kv0_final.k", "v.kv0_final.v", "v.latents"]
    wrong = json.loads((tmp_path / "diagonal" / "config.json").read_text())
    wrong["variants"]["v"]["use_diagonal_denoising"] = False
    (tmp_path / "diagonal" / "config.json").write_text(json.dumps(wrong))
    assert not parity.summary(parity.check(tmp_path / "diagonal"))["ok"], "what a cache cannot change is not declined"
    config |= {"case": "rollout", "variants": {"v": variant(2, 7, sinks, (1000, 100))}}
    result = parity.summary(parity.check(write_folder(tmp_path / "self_forcing", config, {"v": 8})))
    assert result["ok"] and result["declined"] == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("self_forcing_rollout", "local7_sink2"),
        ("self_forcing_rollout_first_frame", "iff_extend_init4"),
        ("longlive_switch_rollout", "switch_twice_reset_offgrid"),
        ("longlive_infinity_rollout", "switch_global_sink"),
        ("diagdistill_rollout", "local6_sink1"),
    ],
)
def test_the_reference_behind_these_folders_reproduces_the_originals(folder, name):
    golden = parity.Golden(Path(__file__).parents[1] / "goldens" / folder)
    config, given = golden.config, golden.io.get(f"in.{name}.initial_latent")
    v = {"warp_denoising_step": config.get("warp_denoising_step"), **config["variants"][name]}
    prompts, draws = golden.given("prompt_embeds"), golden.draws(f"{name}.renoise")
    text = (lambda row: prompts[row : row + 1]) if config["case"] == "longlive_rollout" else (lambda _: prompts[:1])
    net = Net(golden.weights, config["transformer"])
    roll = Roll(net, config, v, golden.given(f"{name}.noise"), text, lambda x: draws(x).double(), given)
    for output, x in roll.outputs.items():
        golden.compare(f"{name}.{output}", x)
    assert golden.results and all(row[0] == "ok" for row in golden.results.values()), golden.results


def test_a_shared_exit_step_is_the_first_one_listed(tmp_path):
    folder = Path(__file__).parents[1] / "goldens" / "self_forcing_training"
    config = json.loads((folder / "config.json").read_text())
    config["variants"] = {"i2v_block4": config["variants"]["i2v_block4"]}
    config["variants"]["i2v_block4"]["exit_flags"][1:] = [0, 3, 1, 0]
    golden = copied(folder, tmp_path, config)
    assert all(row[0] != "differs" for name, row in golden.results.items() if name.startswith("i2v_block4."))


def copied(folder, to, config):
    """The folder checked under another config."""
    for name in ("io.safetensors", "weights.safetensors"):
        (to / name).write_bytes((folder / name).read_bytes())
    (to / "config.json").write_text(json.dumps(config))
    return parity.check(to)


def test_a_variant_that_fails_hides_no_other_and_has_no_number(tmp_path, capsys):
    folder = Path(__file__).parents[1] / "goldens" / "self_forcing_causal_train_mask_iff"
    config = json.loads((folder / "config.json").read_text())
    del config["variants"]["first1_block3"]["num_frame_per_block"]
    golden = copied(folder, tmp_path, config)
    other = {name: row for name, row in golden.results.items() if name.startswith("first1_block3_local4.")}
    assert other and all(row[0] == "ok" for row in other.values())
    assert golden.results["first1_block3.flow"][::2] == ("differs", "KeyError: 'num_frame_per_block'")
    assert parity.main([str(tmp_path), "--quiet"]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert last["max_abs"] is None and not last["ok"]


def test_a_folder_that_records_nothing_is_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"case": "rollout", "variants": {}}')
    save_file({"in.x": torch.zeros(1)}, tmp_path / "io.safetensors")
    assert parity.main([str(tmp_path)]) == 2
    assert "records no output" in capsys.readouterr().err


def test_an_output_that_nobody_computed_counts_as_different(tmp_path):
    golden = parity.Golden(GOLDENS[0])
    golden.io["out.made_up"] = torch.zeros(2)
    golden.compare("made_up", torch.zeros(3))
    assert golden.results["made_up"][0] == "differs"
    golden.results.clear()
    golden.finish()
    assert golden.results["made_up"][0] == "differs" and not parity.summary(golden)["ok"]


def test_the_script_ends_with_a_json_line_and_an_exit_code(tmp_path):
    good = Path(__file__).parents[1] / "goldens" / "self_forcing_causal_train_mask_iff"
    command = [sys.executable, str(ROOT / "scripts" / "parity.py")]
    run = subprocess.run([*command, str(good)], capture_output=True, text=True, check=False)
    last = json.loads(run.stdout.strip().splitlines()[-1])
    assert run.returncode == 0 and last["ok"] and last["case"] == good.name and last["declined"] == []


def test_a_changed_number_makes_the_script_fail(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    good = Path(__file__).parents[1] / "goldens" / "self_forcing_causal_train_mask_iff"
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
