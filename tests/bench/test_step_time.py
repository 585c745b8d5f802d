"""Seconds of a step: operations of its passes, as written out here, over a stated share of the peak."""

from dataclasses import replace
from pathlib import Path

import pytest

from vidistill.bench import plan, step_time
from vidistill.bench.cost import NETWORKS, pass_flops
from vidistill.config import load_config
from vidistill.diffusion import LatentShape
from vidistill.training.config import TrainConfig

WAN = Path(__file__).resolve().parents[2] / "configs" / "wan"
SIZE = (60, 104)


def hours(cfg, gpus=1):
    roles = plan.roles_of(cfg)
    dits = {name: role.dit for name, role in roles.items()}
    return step_time.estimate(cfg, dits, SIZE, plan.seen_frames(cfg), gpus)["hours"]


def test_a_stage_on_recorded_clips_is_forward_backward_and_recomputed_passes():
    dit = NETWORKS["wan-1.3b"]
    cfg = TrainConfig("a", "flow", "nowhere", dit=dit, steps=10, batch=6, frames=21)
    shape = LatentShape(21, 16, *SIZE, dit.patch)
    one = sum(pass_flops(dit, shape, 21, 21 * 30 * 52).values())
    wanted = 3 * one * 6 * 10 / (989e12 * 0.4) / 3600
    assert hours(cfg) == pytest.approx(wanted)
    assert hours(cfg, gpus=8) == pytest.approx(wanted / 8)
    assert hours(replace(cfg, dit=replace(dit, checkpoint=True))) == pytest.approx(wanted * 4 / 3)


def test_self_forcing_takes_about_what_was_published():
    cfg = load_config(TrainConfig, WAN / "selfforcing.yaml")
    assert 0.5 < hours(cfg, gpus=64) < 2  # "less than 2 hours on 64 H100", README of Self Forcing


def test_turns_of_the_critic_and_shared_rollouts_count():
    cfg = load_config(TrainConfig, WAN / "selfforcing.yaml")
    assert hours(replace(cfg, critic_reuse=5)) < hours(cfg)
    assert hours(replace(cfg, replay=True)) > hours(cfg)
    longer = replace(cfg, loss=replace(cfg.loss, regression=1.0, target_steps=50))
    assert hours(longer) > 2 * hours(cfg)  # fifty guided steps of a teacher of 14B for every clip


def test_gradient_through_both_scores_costs_more():
    cfg = load_config(TrainConfig, WAN / "sid.yaml")
    assert hours(cfg) > hours(replace(cfg, objective="dmd"))
