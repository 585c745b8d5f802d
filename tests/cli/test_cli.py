"""The command line: exit codes, what is said on errors, and stages run from it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import DIT
from safetensors.torch import save_file
from tiny_talker import write_talker
from tiny_training import FRAMES, NUM_ACTIONS, write_latents, write_teacher

from vidistill import checkpoint
from vidistill.bench.random_weights import RandomConfig
from vidistill.cli.main import main
from vidistill.data.clips import Clips
from vidistill.evaluation import SUITES, suite_of
from vidistill.interop.keys import to_original
from vidistill.io import save_png


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
        (["generate", "x", "--seconds", "0"], "argument --seconds: must be above 0"),
        (["generate", "x", "--scale", "-1"], "argument --scale: must be from 1"),
        (["data", "doom", "d", "--episodes", "0"], "argument --episodes: must be at least 1"),
        (["data", "doom", "d", "--frames", "-3"], "argument --frames: must be at least 1"),
        (["data", "doom", "d", "--first", "-5"], "argument --first: must be at least 0"),
        (["data", "talker", "d", "--first", "-1"], "argument --first: must be at least 0"),
        (["data", "trajectories", "d"], "required: --teacher, --data"),
        (["generate", "x", "--seconds", "abc"], "argument --seconds: 'abc' is not a number"),
        (["generate", "x", "--scale", "2.5"], "argument --scale: '2.5' is not a whole number"),
        (["generate", "x", "--seed", "99999999999999999999"], "argument --seed: must be at least 0 and at most 2**53"),
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


@pytest.mark.parametrize(
    "args", [["train", "nowhere.yaml", "-v"], ["-v", "train", "nowhere.yaml"], ["info", "nobody", "--verbose"]]
)
def test_verbose_shows_the_traceback(args):
    with pytest.raises((FileNotFoundError, checkpoint.CheckpointError)):
        main(args)


@pytest.mark.parametrize("args", [["data", "-v", "prompts"], ["data", "prompts", "-v"]])
def test_verbose_is_taken_before_and_after_a_kind_of_data(tmp_path, args):
    with pytest.raises(FileNotFoundError):
        main([*args, str(tmp_path / "p"), "--file", str(tmp_path / "none.txt"), "--text", "nobody"])


def test_what_nobody_expected_asks_for_a_report_and_returns_one(capsys, monkeypatch):
    def broken(name):
        raise KeyError("world")

    monkeypatch.setattr(checkpoint, "summary", broken)
    code, _, err = call(capsys, "info", "doom")
    assert code == 1 and len(err.splitlines()) == 1
    assert "unexpected KeyError: 'world'" in err and "report" in err and "-v" in err
    with pytest.raises(KeyError):
        main(["info", "doom", "-v"])


def test_a_command_says_nothing_but_what_was_asked_for(tmp_path):
    """In a process of its own: what is logged once a process would be logged there."""
    command = [
        sys.executable,
        "-m",
        "vidistill",
        "generate",
        "shapes",
        "-o",
        str(tmp_path / "a.mp4"),
        "--seconds",
        "0.2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert "attention backend on cpu" in subprocess.run([*command, "-v"], capture_output=True, text=True).stderr


def test_an_interrupt_returns_130(stage, capsys, monkeypatch):
    from vidistill.training import trainer

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


def test_data_that_are_there_are_kept_only_if_they_are_what_is_asked_for(capsys, tmp_path):
    args = ["data", "shapes", tmp_path / "d", "--episodes", 2, "--frames", 5]
    assert [call(capsys, *args)[0] for _ in range(2)] == [0, 0]
    code, _, err = call(capsys, *args, "--codec", "shapes-codec")
    assert code == 1 and "codec None where 'shapes-codec' is asked for; remove it, or name another folder" in err
    code, _, err = call(capsys, *args[:4], 3, *args[5:])
    assert code == 1 and "episodes 2 where 3 is asked for" in err


@pytest.mark.parametrize("kind", ["doom", "talker"])
def test_data_of_other_seeds_are_not_what_is_asked_for(capsys, tmp_path, kind):
    pytest.importorskip({"doom": "vizdoom", "talker": "espeakng_loader"}[kind])
    args = ["data", kind, tmp_path / "d", "--episodes", 1, "--frames", 17, "--workers", 1]
    assert [call(capsys, *args)[0] for _ in range(2)] == [0, 0]
    code, _, err = call(capsys, *args, "--first", 5)
    assert code == 1 and "first 0 where 5 is asked for" in err
    code, _, err = call(capsys, *args, *{"doom": ("--palindromes", "5"), "talker": ("--faults", "nan")}[kind])
    assert code != 0 and "share from 0 to 1" in err


def test_data_are_never_written_over_what_is_not_data(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr("vidistill.worlds.shapes.draw", None)  # nothing is drawn in vain
    code, _, err = call(capsys, "data", "shapes", folder, "--episodes", 2, "--frames", 5)
    assert code == 1 and "holds no data of ours (meta.json is missing); name a new folder" in err
    assert (folder / "notes.txt").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["d"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert call(capsys, "data", "shapes", tmp_path / "empty", "--episodes", 2, "--frames", 5)[0] == 0


def test_the_folder_of_a_run_is_the_checkpoint_it_made(capsys, stage, tmp_path):
    code, said, _ = call(capsys, "train", stage)
    made = Path(said.strip()).with_suffix("")
    assert code == 0 and checkpoint.locate(made.parent) == made and not checkpoint.is_published(made.parent)
    assert checkpoint.load(made.parent).name == made.name
    code, _, err = call(capsys, "info", tmp_path / "runs" / "another")
    assert code == 1 and "train that stage first" in err


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


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path, tiny_image):
    """A start picture."""
    save_png(tmp_path / "start.png", tiny_image)
    return tmp_path / "start.png"


def test_a_student_that_listens_is_streamed_without_a_prompt(capsys, tmp_path, picture):
    film = ["-o", tmp_path / "s.mp4", "--seconds", "0.5", "--scale", "1"]
    code, out, err = call(capsys, "generate", "shapes", *film)
    assert code == 0 and "(6 frames)" in out, err
    write_talker(tmp_path)
    code, out, err = call(capsys, "generate", tmp_path / "student", *film, "--image", picture)
    assert code == 0 and "(8 frames)" in out, err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("walk.png", "walk.png is no video file: let its name end in .mp4, .mkv"),
        ("v1.0", "v1.0 is no video file"),
        ("walk", "walk is no video file"),
        ("none/walk.mp4", "there is no folder"),
        ("folder.mp4", "folder.mp4 is a folder"),
    ],
)
def test_a_film_that_cannot_be_written_is_refused_before_anything_is_loaded(
    capsys, tmp_path, monkeypatch, name, message
):
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr("vidistill.streaming.session.load_fast", None)  # calling it would fail
    code, _, err = call(capsys, "generate", "doom", "-o", tmp_path / name)
    assert code == 1 and message in err and "vidistill generate: --out" in err
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_bar_counts_the_frames_while_they_are_made(capsys, tmp_path, tiny_student_path, picture, monkeypatch):
    args = ["generate", tiny_student_path, "-o", tmp_path / "a.mp4", "--seconds", "1", "--image", picture]
    code, out, err = call(capsys, *args)
    assert code == 0 and "frames" not in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = call(capsys, *args)
    assert code == 0 and "18/18 frame" in err and "18/18" not in out


def test_a_prompt_after_the_end_of_the_video_is_refused(capsys, tmp_path):
    film = ["-o", tmp_path / "a.mp4", "--seconds", "2"]
    code, _, err = call(capsys, "generate", "shapes", *film, "--prompt", "3: a blue ring")
    assert code == 1 and "--prompt 'a blue ring'" in err and "--seconds" in err


def test_an_avatar_without_audio_says_how_it_is_made_to_speak(capsys, tmp_path, picture):
    write_talker(tmp_path)
    film = ["-o", tmp_path / "s.mp4", "--seconds", "0.5", "--scale", "1", "--image", picture]
    _, _, err = call(capsys, "generate", tmp_path / "student", *film)
    assert "no audio given" in err and "demos/avatar.py" in err


def test_a_picture_that_is_not_there_is_not_called_broken(capsys, tmp_path, tiny_student_path):
    code, _, err = call(capsys, "generate", tiny_student_path, "--image", tmp_path / "no.png", "-o", tmp_path / "a.mp4")
    assert code == 1 and "there is no picture" in err


def test_a_picture_for_a_student_that_takes_none_is_refused(capsys, tmp_path, picture):
    code, _, err = call(capsys, "generate", "shapes", "--image", picture, "-o", tmp_path / "a.mp4")
    assert code == 1 and "--image" in err and "shapes starts from noise" in err
    code, _, err = call(capsys, "serve", "shapes", "--starts", tmp_path)
    assert code == 1 and "--starts" in err and "shapes starts from noise" in err


# --- eval -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        ("doom", "quality"),
        ("shapes-codec", "prompt_adherence"),
        ("shapes-teacher", "prompt_adherence"),
        ("talker", "lip_sync"),
    ],
)
def test_a_checkpoint_is_judged_by_the_suite_of_the_world_it_learned_from(monkeypatch, name, judged):
    seen = []
    monkeypatch.setattr("vidistill.evaluation.suite.run", lambda suite, *_, **__: seen.append(suite) or {})
    assert main(["eval", name, "--clips", "2"]) == 0
    assert seen == [suite_of(name, checkpoint.read_record(checkpoint.locate(name)))] == [SUITES[judged]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--window", "x"], "--window and --full name baselines of --suite memory"),
        (["--full", "x"], "--window and --full name baselines of --suite memory"),
        (["--suite", "memory", "--glance"], "say nothing to --suite memory"),
        (["--suite", "memory", "--teacher", "x"], "say nothing to --suite memory"),
        (["--suite", "memory", "--metric", "lpips=x"], "say nothing to --suite memory"),
        (["--suite", "minutes", "--guidance", "2"], "say nothing to --suite minutes"),
        (["--glance", "--teacher", "x"], "--teacher says nothing to --glance"),
        (["--glance", "--out", "x"], "--out says nothing to --glance"),
    ],
)
def test_options_of_another_evaluation_are_refused(capsys, args, message):
    code, _, err = call(capsys, "eval", "doom", *args)
    assert code == 1 and message in err


def without_matplotlib(monkeypatch):
    """As if it were not installed, even if an earlier test has loaded it."""
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("args", [["doom"], ["doom-teacher"], ["doom-codec"], ["doom-relic", "--suite", "memory"]])
def test_a_report_that_cannot_be_drawn_is_said_before_the_work(capsys, tmp_path, monkeypatch, args):
    without_matplotlib(monkeypatch)
    monkeypatch.setattr("vidistill.evaluation.suite.judge", None)  # calling it would fail
    code, _, err = call(capsys, "eval", *args, "--out", tmp_path)
    assert code == 1 and 'plots need matplotlib: pip install "vidistill[eval]"' in err


def test_a_diagnosis_without_matplotlib_names_the_extra(capsys, tmp_path, monkeypatch):
    without_matplotlib(monkeypatch)
    table = np.eye(2).tolist()
    found = {"levels": [0.1, 0.9], "chunks": [1, 2], "norm": table, "gap": table, "cosine": table}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "diagnosis": found}) + "\n")
    code, _, err = call(capsys, "diagnose", tmp_path)
    assert code == 1 and 'pip install "vidistill[eval]"' in err
