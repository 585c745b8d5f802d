"""Who gets what in a training: whose samples a loss is taken on, and whose weights, live or averaged, are used."""

from dataclasses import replace

import pytest
import torch
from tiny_training import codec_stage, dmd_stage, flow_stage
from torch import nn

from vidistill import checkpoint
from vidistill.diffusion import expand
from vidistill.training import samples, validation
from vidistill.training.losses import LossConfig
from vidistill.training.optim import OptimConfig, TrainState
from vidistill.training.trackers import read_rows
from vidistill.training.trainer import METRICS, Trainer
from vidistill.training.validation import ValidationConfig


@pytest.fixture
def root(tmp_path):
    return tmp_path


# --- samples ----------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """The exact denoiser of data N(mean, 1), whose mean is to be learned."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def velocity(self, x, sigma, cond):
        s = expand(sigma, x)
        gain = (1 - s) / ((1 - s) ** 2 + s**2)
        x0 = self.mean + gain * (x - (1 - s) * self.mean)
        return torch.where(s > 0, (x - x0) / s.clamp_min(1e-3), torch.zeros_like(x))


def listening(trainer, role):
    """What the loss of a role gets, (x0, batch) of every call from now on."""
    heard, loss = [], getattr(trainer.objective, role)

    def listen(roles, x0, batch, *rest):
        heard.append((x0, batch))
        return loss(roles, x0, batch, *rest)

    trainer.objective = replace(trainer.objective, **{role: listen})
    return heard


@pytest.mark.parametrize("settings", [{}, {"long_frames": 13, "save_every": 5}, {"replay": True}], ids=str)
def test_student_and_critic_learn_from_the_students_own_rollouts(root, settings):
    trainer, own = Trainer(dmd_stage(root, steps=20, **settings)), Trainer(dmd_stage(root, steps=20, **settings))
    heard = {role: listening(trainer, role) for role in ("student", "critic")}
    for step, role in ((0, "student"), (1, "critic")):
        recorded = trainer.batch(step)
        with torch.no_grad():  # the student that rolls out has moved since
            for mine, theirs in zip(own.student_state.params, trainer.student_state.params, strict=True):
                mine.copy_(theirs)
        turn = replace(own.cfg.turn(step, own.loss), rows=(0, own.cfg.batch))
        assert turn.role == role
        want = own.samplers[0].roll(recorded, turn.rng(), turn)
        trainer.step()
        (x0, batch), *more = heard[role]
        assert not more and torch.equal(x0, want.x0) and torch.equal(batch.x, want.batch.x)
        assert not torch.allclose(x0[:, 1:], recorded.x[:, 1:], atol=0.1)
        assert x0.requires_grad == (role == "student")


def test_a_critic_moves_to_the_mean_of_the_rollouts_and_not_of_the_data(root):
    """Recorded latents are N(0, 1); the student is pushed away from them."""
    cfg = dmd_stage(root, steps=100, critic_warmup=100, loss=LossConfig(drop=0.0), precision="fp32")
    trainer = Trainer(cfg)
    with torch.no_grad():
        trainer.roles.student.net.head.head.bias.fill_(-3.0)
    critic = Mean(0.0)
    trainer.roles = replace(trainer.roles, critic=critic)
    trainer.critic = TrainState(critic, OptimConfig(lr=0.2, muon="", warmup=0, decay=0.5), 60)
    heard = listening(trainer, "critic")
    for _ in range(60):
        trainer.step()
    rollouts = torch.stack([x0[:, 1:].mean() for x0, _ in heard]).mean()
    assert abs(rollouts.item()) > 1.5
    assert critic.mean.item() == pytest.approx(rollouts.item(), abs=0.5)


def test_off_policy_losses_are_taken_on_recorded_clips(root):
    for stage, role in ((flow_stage(root), "student"), (codec_stage(root), "student")):
        trainer = Trainer(stage)
        heard = listening(trainer, role)
        want = trainer.batch(0)
        trainer.step()
        ((x0, batch),) = heard
        assert torch.equal(x0, want.x) and torch.equal(batch.x, want.x)


# --- weights ----------------------------------------------------------------------------------------------------------


def copied(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def watched(root, monkeypatch, tiny_codec_path):
    """(trainer after some steps, its averaged weights, its live ones, what judge and diagnosis see)."""
    look = ValidationConfig(str(root / "latents"), clips=2, every=3, diagnose_every=3)
    settings = {
        "validation": look,
        "save_every": 3,
        "export_every": 3,
        "sample_every": 3,
        "codec": str(tiny_codec_path),
        "export_dtype": "fp32",
        "log_every": 3,
    }
    trainer = Trainer(dmd_stage(root, steps=3, **settings))
    for _ in range(3):
        trainer.step()
    live = copied(trainer.roles.student)
    average = dict(zip(live, (a.clone() for a in trainer.student_state.average), strict=True))
    assert not any(torch.equal(live[name], average[name]) for name in live if live[name].abs().sum())
    trainer.folder.mkdir(parents=True)
    seen = {}

    def judged(student, *rest):
        seen["judge"] = copied(student)
        return 1.0

    def diagnosed(roles, *rest):
        seen["diagnose"] = copied(roles.student)
        return {}

    monkeypatch.setattr(validation, "judge", judged)
    monkeypatch.setattr(validation, "diagnose", diagnosed)
    return trainer, average, live, seen


def exported(path):
    return copied(checkpoint.load(path).net)


def test_what_is_judged_and_kept_as_the_best_is_the_average(watched):
    trainer, average, live, seen = watched
    trainer.validate()
    assert same(seen["judge"], average) and same(seen["diagnose"], live)
    assert same(exported(trainer.folder / "best"), average)
    assert same(copied(trainer.roles.student), live)
    assert read_rows(trainer.folder / METRICS) == [
        {"step": 3, "diagnosis": {}},
        {"step": 3, "error": 1.0, "best_step": 3},
    ]


def test_what_a_run_ends_with_is_the_average_and_live_weights_stay(watched):
    trainer, average, live, _ = watched
    assert same(exported(trainer.finish()), average)
    assert same(copied(trainer.roles.student), live)


def test_what_is_shown_on_the_way_is_the_average(watched, monkeypatch):
    trainer, average, live, seen = watched

    def sampled(student, *rest):
        seen["show"] = copied(student)
        return torch.zeros(1)

    monkeypatch.setattr(samples, "sample_clips", sampled)
    monkeypatch.setattr(samples, "write_samples", lambda *rest: ("", 0))
    monkeypatch.setattr(trainer.metrics_log, "show", lambda *rest: None)
    trainer.show()
    assert same(seen["show"], average)
    assert same(exported(trainer.folder / f"{trainer.cfg.name}-3"), average)
    assert same(copied(trainer.roles.student), live)


def test_a_saved_state_holds_live_and_averaged_weights_as_they_are(watched):
    trainer, average, live, _ = watched
    trainer.save()
    other = Trainer(trainer.cfg)
    other.resume()
    assert same(copied(other.roles.student), live)
    assert all(torch.equal(a, b) for a, b in zip(other.student_state.average, average.values(), strict=True))
