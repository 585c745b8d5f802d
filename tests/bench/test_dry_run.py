"""Every stage of the configs runs in miniature, with its own settings, and says what it would take."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHAPE
from tiny_training import dmd_stage

from vidistill.bench import dry_run, plan
from vidistill.cli.main import main
from vidistill.config import load_config
from vidistill.data.clips import Clips
from vidistill.models.dit import VideoDiT
from vidistill.training.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = sorted(p for p in CONFIGS.glob("*/*.yaml") if p.stem not in ("frontier", "measured"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_runs_in_miniature_and_keeps_nothing(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(TrainConfig, path)
    if cfg.lora.rank or cfg.critic_lora.rank:
        pytest.importorskip("peft")
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    row = json.loads(out[-1])
    done = " ".join(row["done"])
    assert "state saved and resumed" in done and "exported and loaded" in done and not list(tmp_path.iterdir())
    assert ("critic step" in done) == (cfg.objective in ("dmd", "sid")) and "nan" not in done
    told = cfg.dit.image_dim > 0  # tokens of a picture, whose encoder has no miniature
    assert ("2 chunks streamed" in done) == (cfg.objective not in ("codec", "flow") and not told)
    assert ("not streamed" in done) == told
    assert row["config"]["optim"]["lr"] == cfg.optim.lr
    if path.parent.name == "wan" and cfg.reference:
        assert row["true_size"]["latents"] == [21, 16, 64, 64] and row["true_size"]["tokens_per_frame"] == 1024
    elif path.parent.name == "wan":
        height, width = cfg.latent_size
        assert row["true_size"]["latents"] == [cfg.frames, cfg.dit.channels, height, width]
        assert row["true_size"]["tokens_per_frame"] == height * width // 4
        assert any(
            size in line
            for line in out
            for size in ("1.419 B", "14.288 B", "14.394 B", "5.000 B", "16.395 B", "14.289 B")
        )


def test_published_values_of_self_forcing_are_in_its_config():
    cfg = load_config(TrainConfig, CONFIGS / "wan" / "selfforcing.yaml")
    assert (cfg.optim.lr, cfg.critic_optim.lr, cfg.optim.betas, cfg.optim.clip) == (2e-6, 4e-7, (0.0, 0.999), 10.0)
    assert (cfg.batch, cfg.student.chunk, cfg.loss.guidance, cfg.loss.score_noise.shift) == (64, 3, 4.0, 5.0)
    long = load_config(TrainConfig, CONFIGS / "wan" / "long.yaml")
    assert (long.student.memory.frames, long.student.memory.sinks, long.lora.rank, long.long_frames) == (
        12,
        3,
        256,
        240,
    )


def test_the_miniature_keeps_what_the_stage_is_about(tmp_path):
    cfg = load_config(TrainConfig, CONFIGS / "wan" / "long.yaml")
    small = dry_run.miniature(cfg, plan.roles_of(cfg), tmp_path)
    for name in (
        "objective",
        "schedule",
        "student",
        "lora",
        "critic_lora",
        "precision",
        "frames",
        "long_frames",
        "prompt_switch",
        "optim",
    ):
        assert getattr(small, name) == getattr(cfg, name), name
    assert small.dit.checkpoint and small.dit.width == dry_run.WIDTH and small.latent_size == (4, 4)


@pytest.mark.parametrize(("path", "size"), [("wan/relic-14b", 12), ("doom/relic", 3)])
def test_the_random_clips_of_a_rehearsal_move_as_the_camera_of_the_stage_can(path, size, tmp_path):
    cfg = load_config(TrainConfig, CONFIGS / f"{path}.yaml")
    dry_run.miniature(cfg, plan.roles_of(cfg), tmp_path)
    clips = Clips(tmp_path / "data", camera=cfg.camera)
    told = clips.latents(2, cfg.frames, 0, 0).cond.per_frame["hidden"]
    assert clips.width_of("poses") == size and (told[..., :-1].amax((0, 1)) > 0).all()


def test_a_setting_that_cannot_work_fails_in_the_dry_run_as_it_would_in_training(capsys):
    path = str(CONFIGS / "wan" / "selfforcing.yaml")
    assert main(["train", path, "schedule.given_chunks=1", "--dry-run"]) == 1
    assert "given_chunks must be 0" in capsys.readouterr().err
    assert main(["train", path, "frames=20", "--dry-run"]) == 1
    assert "whole chunks" in capsys.readouterr().err


def test_networks_that_are_here_are_counted_from_their_records(tmp_path):
    cfg = dmd_stage(tmp_path)
    row = dry_run.rehearse(cfg)
    own = sum(p.numel() for p in VideoDiT(plan.roles_of(cfg)["teacher"].dit).parameters())
    assert row["networks"]["teacher"]["parameters"] == own and row["networks"]["teacher"]["trained"] == 0
    assert row["networks"]["student"]["known"] == "read from its record" and row["data"] == cfg.data
    assert row["true_size"]["latents"][1:] == [SHAPE.channels, SHAPE.height, SHAPE.width]
    assert row["done"][-1] == "not streamed: it starts from a picture, and the stage names no codec"
    replayed = dry_run.rehearse(replace(cfg, replay=True))["true_size"]
    assert (replayed["passes_with_gradient_at_once"], row["true_size"]["passes_with_gradient_at_once"]) == (1, 2)


def test_a_clip_that_processes_share_costs_each_its_part(tmp_path):
    cfg = dmd_stage(tmp_path)
    roles = plan.roles_of(cfg)
    whole, half = (plan.true_size(replace(cfg, sequence=n), roles) for n in (1, 2))
    for name in ("activation_bytes_per_pass", "history_bytes", "memory_bytes"):
        assert whole[name] // 2 == half[name] // 1 > 0, name
    assert whole["tokens_per_pass"] == half["tokens_per_pass"]
    with pytest.raises(ValueError, match=r"sequence 3.*not divide"):
        plan.true_size(replace(cfg, sequence=3), roles)
    assert dry_run.rehearse(replace(cfg, sequence=2))["done"]  # in one process all the same
