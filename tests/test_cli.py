"""The command line: exit codes, what is said on errors, and stages run from it."""

import json

import pytest
import yaml
from conftest import DIT
from safetensors.torch import save_file
from tiny_training import FRAMES, NUM_ACTIONS, write_latents, write_teacher

from vidistill import checkpoint
from vidistill.bench import RandomConfig
from vidistill.cli import main
from vidistill.data import Clips
from vidistill.interop.keys import to_original


def call(capsys, *args):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in args])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def stage(tmp_path):
    """A YAML of a tiny teacher stage."""
    write_latents(tmp_path / "latents")
    dit = {"channels": 4, "width": 24, "layers": 2, "heads": 2, "ffn": 48, "freq_dim": 32}
    dit["sites"] = {"modulation": {"dim": NUM_ACTIONS}}
    cfg = {"name": "teacher", "objective": "flow", "data": str(tmp_path / "latents"), "steps": 2, "batch": 2}
    cfg |= {"frames": FRAMES, "dit": dit, "out": str(tmp_path / "runs"), "loss": {"noise": {"shift": 2.0}}}
    path = tmp_path / "teacher.yaml"
    path.write_text(yaml.safe_dump(cfg))
    return path


def test_train_runs_a_stage_prints_where_it_is_and_resumes(stage, capsys, tmp_path):
    want = tmp_path / "runs" / "teacher" / "teacher.safetensors"
    code, out, err = call(capsys, "train", stage)
    assert (code, out.strip()) == (0, str(want)) and want.is_file()
    assert "\r" not in err, "no progress bar where nobody watches"
    code, out, _ = call(capsys, "train", stage, "steps=3")
    assert code == 0
    _, info = checkpoint.read_tensors(want.with_name("state.safetensors"))
    assert info["step"] == 3
    code, out, _ = call(capsys, "info", want, "--json")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and row["kind"] == "teacher" and row["card"]["steps"] == 3


def test_a_dry_run_ends_with_the_whole_config_and_keeps_nothing(stage, capsys, tmp_path):
    code, out, _ = call(capsys, "train", stage, "optim.lr=3e-4", "--dry-run")
    cfg = json.loads(out.splitlines()[-1])["config"]
    assert code == 0 and cfg["optim"]["lr"] == 3e-4 and cfg["dit"]["width"] == DIT.width
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["optim.lrr=1"], "vidistill train: unknown key optim.lrr; did you mean optim.lr?"),
        (["steps=0"], "steps must be at least 1, got 0"),
        (["steps"], "overrides are written key=value, got 'steps'"),
        (["data=nowhere"], "no data in nowhere"),
        (["init=nobody"], "no checkpoint 'nobody'"),
        (["frames=99"], "do not fit episodes of 16"),
    ],
)
def test_a_stage_that_cannot_run_says_why_in_one_line_and_returns_one(stage, capsys, args, message):
    code, out, err = call(capsys, "train", stage, *args)
    assert code == 1 and message in err and "Traceback" not in err and out == ""
    assert len([line for line in err.splitlines() if line.startswith("vidistill train:")]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: COMMAND"),
        (["generate", "x", "--seconds", "0"], "argument --seconds: must be above 0, got 0"),
        (["generate", "x", "--scale", "-1"], "argument --scale: must be at least 1, got -1"),
        (["data", "doom", "d", "--episodes", "0"], "argument --episodes: must be at least 1, got 0"),
        (["data", "doom", "d", "--frames", "-3"], "argument --frames: must be at least 1"),
        (["data", "trajectories", "d"], "required: --teacher, --data"),
        (["eval", "x", "--clips", "0"], "argument --clips"),
        (["serve", "x", "--max-viewers", "0"], "argument --max-viewers"),
    ],
)
def test_wrong_usage_returns_two_and_names_the_argument(capsys, args, message):
    code, _, err = call(capsys, *args)
    assert code == 2 and message in err


@pytest.mark.parametrize("args", [["generate", "nobody"], ["info", "nobody"]])
def test_an_unknown_name_returns_one(capsys, args):
    code, _, err = call(capsys, *args)
    assert code == 1 and "no checkpoint 'nobody'" in err


def test_verbose_shows_the_traceback(stage):
    with pytest.raises(FileNotFoundError):
        main(["train", str(stage), "data=nowhere", "-v"])


def test_an_interrupt_returns_130(stage, capsys, monkeypatch):
    from vidistill import trainer

    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupted)
    code, _, err = call(capsys, "train", stage)
    assert code == 130 and "interrupted" in err


@pytest.mark.parametrize("command", ["train", "generate", "serve", "bench", "eval", "data", "info"])
def test_every_command_explains_itself(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and "usage: vidistill" in out and len(out.splitlines()) > 5


SHAPE = ("dim=24", "layers=2", "heads=2", "ffn=32", "text=5x8", "latent=4x4x6", "chunk=2", "chunks=2", "steps=1")


def test_a_bench_of_given_weights_runs_the_faster_network_beside_the_plain_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vidistill.bench.machine.MATMUL_SIZES", (64,))
    net = RandomConfig.parse(SHAPE).bundle().net.net
    save_file(to_original(net.state_dict(), net.cfg), tmp_path / "student.safetensors")
    shape = [*SHAPE, "rounds=1", "--weights", tmp_path / "student.safetensors", "--linears", "packed", "--json"]
    code, out, err = call(capsys, "bench", "--random-weights", *shape)
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])
    assert row["name"] == "given weights (packed)" and row["vs"]["name"] == "given weights"
    assert row["vs"]["latents_difference"] < 1e-3
    code, _, err = call(capsys, "bench", "--random-weights", *SHAPE, "--linears", "int4")
    assert code == 1 and "linears 'int4' is unknown" in err


def test_trajectories_are_written_from_a_teacher_and_trained_on(stage, capsys, tmp_path):
    teacher, out = write_teacher(tmp_path / "t"), tmp_path / "paths"
    args = ["data", "trajectories", out, "--teacher", teacher, "--data", tmp_path / "latents", "--clips", 3]
    code, said, err = call(capsys, *args, "--steps", 6, "--levels", "1,0.6667")
    assert code == 0 and "3 trajectories of 6 steps, levels 1.0000,0.6667" in said and "\r" not in err
    clips = Clips(out)
    assert clips.meta["levels"] == pytest.approx([1.0, 2 / 3]) and clips.tensors["states"].shape[:3] == (3, 3, FRAMES)
    settings = [f"data={out}", "objective=regression", f"init={teacher}", "name=ode", "loss.levels=[1,0.667]"]
    code, said, _ = call(capsys, "train", stage, *settings, "student.first_chunk=1")
    assert code == 0 and checkpoint.load_student(said.strip()).net.cfg.first_chunk == 1
    code, said, _ = call(capsys, *args)
    assert code == 0 and "is there already" in said
    code, _, err = call(capsys, *args[:2], tmp_path / "b", *args[3:], "--steps", 2, "--levels", "1,0.61")
    assert code == 1 and "lie on no sampler" in err
