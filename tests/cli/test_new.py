"""`vidistill new`: a project sized for its world, that runs from clips to a student."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shell import commands_of, run_all
from tiny_wan import LENGTH, TEXT, write_wan

from vidistill import checkpoint
from vidistill.cli import planning, recipe, timing
from vidistill.cli.main import main
from vidistill.cli.world import camera_of, look
from vidistill.conditioning.camera import integrate, rows_of
from vidistill.config import load_config
from vidistill.data.shards import write_shards
from vidistill.training.config import TrainConfig

KINDS = {  # what clips tell beside pictures: actions, numbers of a token, numbers of a frame's sound
    "actions": (2, 0, 0),
    "text": (0, 96, 0),
    "both": (2, 96, 0),
    "neither": (0, 0, 0),
    "sound": (0, 0, 64),
    "all": (2, 96, 64),
    "camera": (0, 0, 0),
    "camera and text": (0, 96, 0),
}


def write_world(folder, kind="actions", episodes=4, frames=33, side=16, held=3, fps=15.0, splits=("train", "test")):
    """Random clips of a world of this kind."""
    actions, text, audio = KINDS[kind]
    rng = torch.Generator().manual_seed(0)
    for split in splits:
        px = torch.randint(0, 256, (episodes, frames, side, side, 3), dtype=torch.uint8, generator=rng)
        tensors = {"frames": px}
        if actions:
            keys = torch.rand(episodes, -(-frames // held), actions, generator=rng).round()
            tensors["actions"] = keys.repeat_interleave(held, 1)[:, :frames].contiguous()
        if text:
            tensors["tokens"] = torch.randn(episodes, 16, text, generator=rng).half()
        if audio:
            tensors["audio"] = torch.randn(episodes, frames, audio, generator=rng).half()
        if "camera" in kind:  # it walks ahead or to the right, and turns either way
            ahead, right, turned = torch.rand(3, episodes, -(-frames // held), generator=rng).double()
            moved = torch.stack((0.2 * ahead, -0.2 * right, 0 * ahead, 0.2 * turned - 0.1, 0 * ahead, 0 * ahead), -1)
            tensors["poses"] = rows_of(integrate(moved.repeat_interleave(held, 1)[:, :frames])).float()
        meta = {"source": "mine", "fps": fps, "px_size": side, "given": int(bool(actions) or not text)}
        meta |= {"actions": ["left", "right"]} if actions else {}
        meta |= {"text": {"kind": "ngrams"}} if text else {}
        meta |= {"audio": {"rate": int(1000 * fps), "fps": fps}} if audio else {}
        write_shards(folder / split, [(tensors, [{}] * episodes)], meta)
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Steps take no time to measure, and need no networks to be measured with."""
    monkeypatch.setattr(timing, "write_stand_ins", lambda *rest: None)
    monkeypatch.setattr(timing, "took_by_step", lambda cfg: timing.Took(0.05 * cfg.frames, 0.05 * cfg.frames))
    monkeypatch.setattr(timing, "encoding", lambda *rest: timing.Took(10.0, 10.0))
    monkeypatch.setattr(timing, "threads", lambda: 1)


def new(folder, data, *options):
    return main(["new", str(folder), "--data", str(data), *options])


@pytest.mark.parametrize("kind", KINDS)
def test_every_world_gets_configs_that_load(tmp_path, quick, kind, monkeypatch):
    write_world(tmp_path / "data", kind)
    assert new(tmp_path / "mine", tmp_path / "data", "--budget", "1h") == 0
    monkeypatch.chdir(tmp_path / "mine")
    stages = {name: load_config(TrainConfig, f"{name}.yaml") for name in recipe.STAGES}
    actions, text, audio = KINDS[kind]
    dit, loss = stages["diagonal"].dit, stages["teacher"].loss
    assert ("modulation" in dit.sites) == bool(actions) and dit.text_dim == text
    if actions:
        assert dit.sites["modulation"].dim == 4 * actions + 1
    camera = stages["diagonal"].camera
    assert (camera is not None) == ("camera" in kind)
    if camera:
        walk = ("forward", "right", "turn_left", "turn_right", "static")
        assert camera.actions == walk and camera.sites == ("hidden",) and dit.sites["hidden"].dim == len(walk)
        assert camera.step == pytest.approx(0.19, abs=0.02) and camera.turn == pytest.approx(0.095, abs=0.01)
        script = (tmp_path / "mine" / "run.sh").read_text()
        assert "--action forward:24,right:24,turn_left:24,turn_right:24,still:12" in script
    else:
        assert dit.sites["hidden"].dim == 4 * audio if audio else "hidden" not in dit.sites
    assert (loss.audio_guidance > 0) == (loss.drop_audio > 0) == bool(text and audio)
    assert stages["diagonal"].objective == "dmd" and stages["diagonal"].teacher == "runs/teacher/teacher"
    assert stages["tf"].schedule.given_chunks == (0 if kind in ("text", "camera and text") else 1)
    assert stages["codec"].data == "../data/train" and stages["teacher"].data == "latents/train"
    for name in recipe.STAGES:
        lines = (tmp_path / "mine" / f"{name}.yaml").read_text().splitlines()
        assert any(line.startswith("steps: ") and "# " in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_takes_a_step_on_data_of_its_world(tmp_path, kind):
    world = look(write_world(tmp_path / "data", kind))
    choice = recipe.choose(world, warm=False)
    small = {"width": 32, "layers": 2, "ffn": 64}
    stages = recipe.stages_of(world, choice, str(tmp_path / "data" / "train"), str(tmp_path / "s" / "latents"))
    dit = {**stages["teacher"].values["dit"], **small, "patch": [1, 1, 1], "grid": [4, 4]}
    stages["teacher"] = stages["teacher"].with_values(dit=dit, batch=2)
    stages["codec"] = stages["codec"].with_values(
        batch=2, codec_config={"latent_channels": 16, "encoder_widths": [6, 8, 8], "decoder_widths": [8, 8, 6]}
    )
    timing.write_stand_ins(tmp_path / "s", world, choice, stages)
    for name in recipe.STAGES:
        cfg = recipe.config(
            stages,
            name,
            out=str(tmp_path / "runs"),
            steps=40,
            batch=1,
            **timing.paths_in(tmp_path / "s", stages, name),
        )
        assert timing.took_by_step(cfg).quiet > 0


def test_the_plan_stays_inside_the_budget(tmp_path, quick, capsys):
    write_world(tmp_path / "data")
    world = look(tmp_path / "data")
    for budget in (1200.0, 3600.0, 4 * 3600.0):
        plan = planning.plan(tmp_path / "data", budget)
        total = 3600 * sum(plan.hours(name) for name in recipe.STAGES) + plan.encode
        assert 0.5 * budget < total <= budget or min(plan.steps.values()) > 900
        assert all(plan.steps[name] <= planning.ENOUGH[name] for name in recipe.STAGES)
    with pytest.raises(ValueError, match="--budget"):
        planning.plan(tmp_path / "data", 60.0)
    assert world.factor == 4 and world.spatial == 4


@pytest.mark.parametrize("load", [1.0, 3.0, 20.0])
def test_other_programs_take_no_steps_from_a_plan(tmp_path, quick, monkeypatch, load):
    write_world(tmp_path / "data")
    alone = planning.plan(tmp_path / "data", 3600.0)
    monkeypatch.setattr(timing, "took_by_step", lambda cfg: timing.Took(load * 0.05 * cfg.frames, 0.05 * cfg.frames))
    beside = planning.plan(tmp_path / "data", 3600.0)
    for name in recipe.STAGES:
        assert alone.steps[name] / timing.CPU_FACTOR <= beside.steps[name] + 1 <= alone.steps[name] + 1
    assert ("kept this machine busy" in beside.report()) == (load > 1)


def test_threads_share_cpu_time(monkeypatch):
    monkeypatch.setattr(timing, "threads", lambda: 4)
    assert timing.Took(wall=9.0, cpu=4.0).quiet == timing.CPU_FACTOR
    assert timing.Took(wall=1.1, cpu=4.0).quiet == 1.1  # a quiet machine: what passed


def test_a_disturbance_is_not_measured(monkeypatch):
    walls, cpus = iter([0.0, 9.0, 9.0, 10.0]), iter([0.0, 1.0, 1.0, 1.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(walls))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(cpus))
    assert timing.took(lambda: None, 2) == timing.Took(1.0, 0.5)


def test_a_hopeless_budget_is_refused_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    write_world(tmp_path / "data")
    monkeypatch.setattr(timing, "best_flops_per_s", lambda: 1e9)
    monkeypatch.setattr(planning, "timed", lambda *rest: pytest.fail("it was timed"))
    assert new(tmp_path / "mine", tmp_path / "data", "--budget", "1m") == 1
    assert "operations alone" in capsys.readouterr().err


def test_the_least_time_of_a_plan_grows_with_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "best_flops_per_s", lambda: 1e11)  # measured twice, it differs
    world = look(write_world(tmp_path / "data", "both"))
    choice = recipe.choose(world, warm=False)
    stages = planning.scratch_stages(world, choice, tmp_path)
    least = timing.least_seconds(world, choice, stages, planning.FEWEST)
    twice = timing.least_seconds(world, choice, stages, {name: 2 * n for name, n in planning.FEWEST.items()})
    assert 0 < least < 600 and 1.2 * least < twice


def test_the_size_follows_from_the_steps_of_a_teacher(tmp_path, quick):
    write_world(tmp_path / "data")
    sizes = [planning.plan(tmp_path / "data", hours * 3600, warm=False).choice.size for hours in (0.15, 0.5, 12)]
    assert sizes == ["small", "base", "large"]


def test_what_one_stage_does_not_need_goes_to_the_others():
    even = dict.fromkeys(recipe.STAGES, 1.0)
    some = planning.share_out(1000.0, even, recipe.Choice())
    assert sum(some.values()) <= 1000 and some["teacher"] == 450
    cheap = planning.share_out(1000.0, {**even, "codec": 1e-6}, recipe.Choice())
    assert cheap["codec"] == planning.ENOUGH["codec"] and cheap["teacher"] > some["teacher"]


@pytest.mark.parametrize(("held", "fps", "chunk"), [(3, 15.0, 1), (14, 15.0, 3)])
def test_quick_worlds_are_made_a_latent_at_a_time(tmp_path, held, fps, chunk):
    world = look(write_world(tmp_path / "data", held=held, fps=fps, frames=85))
    choice = recipe.choose(world)
    assert (choice.chunk, choice.clips) == (chunk, 22) and "held for" in choice.why_chunk
    assert recipe.choose(look(write_world(tmp_path / "text", "text"))).chunk == 3


def test_a_camera_is_told_by_the_moves_that_are_seen():
    """Turns in 4 of 100 frames of 16 of 80 clips count; a pan alone walks nowhere; one that stands is none."""

    def seen(*paths):
        poses = [rows_of(integrate(path)).float() for path in paths]
        return camera_of(Recorded(poses))

    still, ahead = torch.zeros(100, 6).double(), torch.zeros(100, 6).double()
    ahead[:, 0], turning = 0.5, still.clone()
    turning[:20, 3] = -0.3
    found = seen(*[ahead] * 64, *[turning] * 16)
    assert found.actions == ("forward", "turn_right", "static")
    assert (found.step, found.turn) == (pytest.approx(0.5, rel=1e-2), pytest.approx(0.3, rel=1e-2))
    assert seen(*[still] * 64, *[turning] * 16).actions == ("turn_right", "static")
    assert seen(still, still) is None


class Recorded:
    """Clips of poses alone."""

    def __init__(self, poses):
        self.poses = poses

    def __len__(self):
        return len(self.poses)

    def width_of(self, name):
        return 12

    def episode(self, name, k):
        return self.poses[k]


def test_a_game_that_begins_the_same_every_time_has_one_start_picture(tmp_path):
    write_world(tmp_path / "data", episodes=3)
    (shard,) = (tmp_path / "data" / "test").glob("*.safetensors")
    same = load_file(shard)
    same["frames"][1, 0] = same["frames"][0, 0]
    save_file(same, shard)
    recipe.write_starts(tmp_path / "starts", look(tmp_path / "data"))
    found = [np.array(Image.open(path)) for path in sorted((tmp_path / "starts").iterdir())]
    assert len(found) == 2 and all(np.array_equal(found[i], same["frames"][k, 0]) for i, k in ((0, 0), (1, 2)))


def test_bundled_weights_are_taken_where_they_fit(tmp_path, quick):
    write_world(tmp_path / "data", side=64, frames=85)
    assert new(tmp_path / "mine", tmp_path / "data", "--budget", "1h") == 0
    codec = checkpoint.load(str(tmp_path / "mine" / "init" / "codec"), "codec").net
    assert codec.cfg.smooth == 0 and codec.cfg.encoder_widths == (64, 64, 96)
    teacher = checkpoint.load(str(tmp_path / "mine" / "init" / "teacher"), "teacher").net
    old = checkpoint.load("doom-teacher", "teacher").net
    assert teacher.cfg.fov == 0 and teacher.cfg.sites["modulation"].dim == 9
    name = next(n for n in old.state_dict() if n.startswith("blocks.0") and n.endswith("q.weight"))
    assert torch.equal(teacher.state_dict()[name], old.state_dict()[name])
    assert "renormalise: true" in (tmp_path / "mine" / "codec.yaml").read_text()
    assert new(tmp_path / "cold", tmp_path / "data", "--budget", "1h", "--cold") == 0
    assert not (tmp_path / "cold" / "init").exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "actions"])
def test_every_world_is_rehearsed(tmp_path, quick, kind, monkeypatch):
    monkeypatch.setitem(recipe.SIZES, "small", (144, 1, 64))
    monkeypatch.setattr(planning, "LESS_SIZE", 10**9)
    write_world(tmp_path / "data", kind, episodes=1)
    assert new(tmp_path / "mine", tmp_path / "data", "--budget", "1h", "--cold") == 0
    run_all(commands_of(tmp_path / "mine" / "run.sh", tmp_path, STEPS="1")[:-1], monkeypatch)
    path = str(tmp_path / "mine" / "rehearsal" / "runs" / "diagonal" / "diagonal")
    student = checkpoint.load(path)
    moves = ["forward", "right", "turn_left", "turn_right"] if "camera" in kind else []
    assert checkpoint.summary(path)["actions"] == (moves or ["left", "right"] * bool(KINDS[kind][0]))
    assert (student.record["audio"] is not None) == bool(KINDS[kind][2]) and (
        tmp_path / "mine/rehearsal/out.mp4"
    ).is_file()


def test_a_project_runs_from_clips_to_a_student(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setitem(recipe.SIZES, "small", (144, 1, 64))
    monkeypatch.setattr(planning, "LESS_SIZE", 10**9)  # the smallest there is
    write_world(tmp_path / "data")
    assert new(tmp_path / "mine", tmp_path / "data", "--budget", "1h", "--cold") == 0
    commands = commands_of(tmp_path / "mine" / "run.sh", tmp_path, STEPS="1")
    assert [words[1] for words in commands] == [
        *("train", "new", "data", "train", "new", *["train"] * 3),
        *("generate", "export", "eval"),
    ]
    run_all(commands[:-1], monkeypatch)
    judged = commands[-1][2:]
    assert judged == ["runs/diagonal/diagonal", "--data", "../../data", "--split", "test", "--quick", "--out", "report"]
    said, made = capsys.readouterr().out, tmp_path / "mine" / "rehearsal"
    assert "codec: psnr" in said and "teacher: teacher_sharpness" in said and (made / "out.mp4").stat().st_size
    assert checkpoint.load(str(made / "runs" / "diagonal" / "diagonal")).kind == "student"
    weights = load_config(TrainConfig, made / "teacher.yaml").loss.channel_weights
    assert len(weights) == 16 and max(weights) > 1
    given = (made / "student").rename(tmp_path / "given")  # it is whole, and needs nothing of the project
    shutil.rmtree(tmp_path / "mine")
    assert main(["generate", str(given / "student"), "-o", str(tmp_path / "given.mp4"), "--seconds", "1"]) == 0


def test_a_check_stops_what_is_bad(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(json.dumps({"gates": planning.GATES}))
    monkeypatch.setattr(planning, "check_codec", lambda *rest: {"psnr": 30.0, "sharpness": 1.0, "moving": 0.1})
    with pytest.raises(ValueError, match=r"codec.*moving"):
        planning.check(tmp_path, "codec", lenient=False)
    assert "moving would stop a real run" in planning.check(tmp_path, "codec", lenient=True)
    with pytest.raises(FileNotFoundError, match="no project"):
        planning.check(tmp_path / "none", "codec", lenient=False)


def test_a_ball_that_is_lost_is_seen():
    px = torch.full((1, 9, 3, 32, 32), 0.5)
    for t in range(9):
        px[:, t, :, 5, 2 * t : 2 * t + 2] = 1.0
    gone = torch.full_like(px, 0.5)
    assert planning.moving_kept(px, px, 0.001) == 1 and planning.moving_kept(gone, px, 0.001) < 0.05


def test_still_pixels_do_not_count_as_moving():
    still = torch.full((1, 9, 3, 64, 64), 0.5)
    px, noise = still.clone(), 0.01 * torch.randn(still.shape, generator=torch.Generator().manual_seed(0))
    for t in range(9):
        px[:, t, :, 5, 2 * t] = 1.0  # one pixel of 4096
    assert planning.moving_kept(px + noise, px) > 0.9 and planning.moving_kept(still + noise, px) < 0.1
    assert planning.moving_kept(still + noise, still) == 1


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (lambda p: None, (), "no clips there"),
        (lambda p: write_world(p, frames=9), (), "no episode longer than 9 frames"),
        (lambda p: write_world(p, side=18), (), "multiples of 4"),
        (lambda p: write_world(p), ("--budget", "1m"), "--budget"),
    ],
)
def test_what_makes_no_project_is_said(tmp_path, quick, capsys, make, options, says):
    make(tmp_path / "data")
    assert new(tmp_path / "mine", tmp_path / "data", *options) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_a_folder_with_things_in_it_is_left_alone(tmp_path, quick, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert new(tmp_path / "mine", write_world(tmp_path / "data")) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["soon", "3", "3 days", ""])
def test_budgets_are_times(text, capsys):
    with pytest.raises(SystemExit):
        main(["new", "x", "--data", "y", "--budget", text])
    assert "is no time" in capsys.readouterr().err


# --- from a Wan network -----------------------------------------------------------------------------------------------


def write_captioned(folder, wan, kind="text", side=32, fps=16.0):
    """Clips of a world whose captions a Wan network reads, or of another kind."""
    write_world(folder, kind, side=side, fps=fps)
    for split in ("train", "test"):
        meta = json.loads((folder / split / "meta.json").read_text())
        meta |= {"text": {"kind": "umt5", "source": str(wan), "length": LENGTH}}
        (folder / split / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def wan(tmp_path, monkeypatch):
    """A tiny Wan folder, and worlds whose tokens are as wide as its."""
    monkeypatch.setitem(KINDS, "text", (0, TEXT, 0))
    monkeypatch.setitem(KINDS, "both", (2, TEXT, 0))
    monkeypatch.setitem(KINDS, "talk", (0, TEXT, 64))
    monkeypatch.setitem(KINDS, "camera and text", (0, TEXT, 0))
    return write_wan(tmp_path / "wan")


@pytest.mark.parametrize("kind", ["text", "both", "talk", "camera and text"])
def test_a_project_from_wan_passes_its_dry_run(tmp_path, wan, kind, monkeypatch, capsys):
    data = write_captioned(tmp_path / "data", wan, kind)
    assert new(tmp_path / "mine", data, "--init", str(wan), "--gpus", "2", "--gpu-memory", "0.0001") == 0
    said = capsys.readouterr().out
    assert ("whole weights" in said) == (kind != "text") and "shards: teacher, tf, selfforcing, diagonal" in said
    monkeypatch.chdir(tmp_path / "mine")
    for name in recipe.STAGES[1:]:
        cfg = load_config(TrainConfig, f"{name}.yaml")
        assert (cfg.loss.audio_guidance > 0) == (cfg.loss.drop_audio > 0) == (kind == "talk")
        assert (cfg.lora.rank > 0) == (kind == "text") and cfg.parallel == "shard" and cfg.latent_size == (4, 4)
        assert main(["train", f"{name}.yaml", "--dry-run"]) == 0
        assert "exported and loaded" in capsys.readouterr().out
    assert cfg.lora.rank == 0 or cfg.critic_lora.rank


@pytest.mark.parametrize("kind", ["text", "both"])
def test_a_project_from_wan_runs_from_clips_to_a_student(tmp_path, wan, kind, monkeypatch):
    data = write_captioned(tmp_path / "my data", wan, kind)
    assert new(tmp_path / "mine", data, "--init", str(wan)) == 0
    commands = commands_of(tmp_path / "mine" / "run.sh", tmp_path, STEPS="1")
    assert [words[1] for words in commands] == ["data", *["train"] * 4, "generate"]
    run_all(commands, monkeypatch)
    student = checkpoint.load(str(tmp_path / "mine" / "rehearsal" / "runs" / "diagonal" / "diagonal"))
    assert student.record["codec"] == str(wan) and student.record["dit"]["text_dim"] == TEXT
    assert (tmp_path / "mine" / "rehearsal" / "out.mp4").stat().st_size
    assert bool(checkpoint.start_pictures(tmp_path / "mine" / "rehearsal" / "runs" / "diagonal" / "diagonal")) == (
        kind == "both"
    )


def test_a_wan_folder_that_no_recipe_can_use_is_refused(tmp_path, wan, capsys):
    data = write_captioned(tmp_path / "data", wan)
    shutil.copytree(wan, tmp_path / "two")
    shutil.copytree(wan / "transformer", tmp_path / "two" / "transformer_2")
    shutil.copytree(wan / "transformer", tmp_path / "part" / "transformer")
    for folder, says in (("two", "2 experts"), ("part", "vae/config.json")):
        assert new(tmp_path / "mine", data, "--init", str(tmp_path / folder)) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({"kind": "neither"}, (), "--text kind=umt5"),
        ({"side": 24}, (), "multiples of 16"),
        ({"fps": 4.0}, (), "--fps"),
        ({}, ("--budget", "3h"), "--budget"),
        ({}, ("--cold",), "--cold"),
    ],
)
def test_what_wan_does_not_take_is_said(tmp_path, wan, capsys, changes, options, says):
    data = write_captioned(tmp_path / "data", wan, **changes)
    assert new(tmp_path / "mine", data, "--init", str(wan), *options) == 1
    assert says in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_what_is_no_wan_is_said(tmp_path, capsys):
    data = write_world(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    for options, says in (
        (("--init", str(tmp_path / "empty")), "safetensors"),
        (("--init", "shapes-teacher"), "--init"),
        (("--gpus", "2"), "--init"),
    ):
        assert new(tmp_path / "mine", data, *options) == 1
        assert says in capsys.readouterr().err and not (tmp_path / "mine").exists()
