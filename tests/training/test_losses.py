"""Losses against closed forms, and what each of them may and may not send a gradient to."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from conftest import DIT, SHAPE, STUDENT, random_dit

from vidistill.conditioning.condition import Condition
from vidistill.data.types import Batch
from vidistill.diffusion import NoiseSchedule, add_noise, expand, randn_like, x0_from_v
from vidistill.models.student import CausalStudent
from vidistill.rollout import chunk_noise, rollout
from vidistill.sampling import guided
from vidistill.schedules import ScheduleConfig, training
from vidistill.training.losses import (
    EMPTY,
    FLICKER,
    FROZEN,
    LossConfig,
    Roles,
    changing,
    chunk_levels,
    clean_frames,
    critic_flow,
    diffusion_forcing,
    dmd,
    flow,
    forced,
    moving_weights,
    noised_sample,
    pull,
    reconstruction,
    regression,
    score_difference,
    sid,
    teacher_forcing,
    valid_rollouts,
)
from vidistill.training.motion import DISTANCES, MotionHead, motion, motion_gradient, motion_pull, motion_weights

B, F = 2, 7
CFG = LossConfig(drop=0.0)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def clip(seed=0, given=1):
    x = randn(B, F, SHAPE.channels, SHAPE.height, SHAPE.width, seed=seed)
    actions = torch.rand(B, F, DIT.sites["modulation"].dim, generator=rng(seed + 1))
    return Batch(x, Condition(per_frame={"modulation": actions}), given)


@pytest.fixture(scope="module")
def student():
    return CausalStudent(random_dit(DIT), STUDENT, SHAPE)


class Gaussian:
    """The exact denoiser of data N(mean, std^2)."""

    def __init__(self, mean, std=1.0):
        self.mean, self.std = mean, std

    def gain(self, sigma):
        return (1 - sigma) * self.std**2 / ((1 - sigma) ** 2 * self.std**2 + sigma**2)

    def velocity(self, x, sigma, cond):
        s = expand(sigma, x)
        x0 = self.mean + self.gain(s) * (x - (1 - s) * self.mean)
        return torch.where(s > 0, (x - x0) / s.clamp_min(1e-6), torch.zeros_like(x))


class Fixed:
    """A denoiser that always predicts the clip `x0`."""

    def __init__(self, x0):
        self.x0 = x0

    def velocity(self, x, sigma, cond):
        s = expand(sigma, x)
        return torch.where(s > 0, (x - self.x0) / s.clamp_min(1e-6), torch.zeros_like(x))


# --- distribution matching --------------------------------------------------------------------------------------------


def test_dmd_between_gaussians_is_the_closed_form():
    batch = clip()
    x = batch.x.double().requires_grad_()
    real, fake = Gaussian(0.5), Gaussian(-1.0)
    batch = replace(batch, x=x)
    roles = Roles(None, real, fake)
    score = score_difference(roles, x.detach(), batch, CFG, rng(3))
    s = expand(score["sigma"], x)[:, 1:]
    gap = (-1.0 - 0.5) * (1 - real.gain(s) * (1 - s))
    scale = (x - score["real"])[:, 1:].abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    want = (gap / scale).expand(-1, -1, *x.shape[2:])
    torch.testing.assert_close(score["grad"][:, 1:], want.detach(), rtol=1e-6, atol=1e-9)
    got = torch.autograd.grad(dmd(roles, x, batch, CFG, rng(3)).value, x)[0]
    torch.testing.assert_close(got[:, 1:], want.detach() / want.numel(), rtol=1e-5, atol=1e-12)
    assert not got[:, 0].any()


def test_dmd_pulls_nowhere_when_both_scores_agree():
    batch = clip()
    x = batch.x.clone().requires_grad_()
    loss = dmd(Roles(None, Gaussian(0.3), Gaussian(0.3)), x, batch, replace(CFG, motion=1.0), rng())
    assert not torch.autograd.grad(loss.value, x)[0].any()


def test_dmd_gradient_does_not_depend_on_the_unit_of_latents():
    batch = clip()
    fake, real = randn(*batch.x.shape, seed=7), randn(*batch.x.shape, seed=8)
    grads = []
    for unit in (1.0, 10.0):
        roles = Roles(None, Fixed(unit * real), Fixed(unit * fake))
        grads.append(score_difference(roles, unit * batch.x, batch, CFG, rng())["grad"])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_score_levels_are_clamped_and_zero_on_given_frames():
    batch, seen = clip(given=2), []

    class Spy(Gaussian):
        def velocity(self, x, sigma, cond):
            seen.append((x, sigma))
            return super().velocity(x, sigma, cond)

    cfg = replace(CFG, sigma_min=0.4, sigma_max=0.6, score_noise=NoiseSchedule(5.0, logit_normal=False))
    for seed in range(20):
        score_difference(Roles(None, Spy(0.0), Spy(1.0)), batch.x, batch, cfg, rng(seed))
    for x, sigma in seen:
        assert torch.equal(x[:, :2], batch.x[:, :2]) and not sigma[:, :2].any()
        assert sigma[:, 2:].min() >= 0.4 and sigma[:, 2:].max() <= 0.6 + 1e-6
        assert (sigma[:, 2:] == sigma[:, 2:3]).all()


def test_pull_weighs_only_masked_entries():
    x, grad = randn(B, F, 2, 3, 3).requires_grad_(), randn(B, F, 2, 3, 3, seed=1)
    mask = torch.rand(x.shape, generator=rng(2)) > 0.5
    got = torch.autograd.grad(pull(x, grad, 1, mask), x)[0]
    want = torch.where(mask, grad, torch.zeros_like(grad)) / mask[:, 1:].sum()
    want[:, 0] = 0
    torch.testing.assert_close(got, want)


def test_sid_between_gaussians_is_the_closed_form():
    batch = clip()
    x = batch.x.double().requires_grad_()
    real, fake = Gaussian(0.5), Gaussian(-1.0)
    roles = Roles(None, real, fake)
    score = score_difference(roles, x.detach(), replace(batch, x=x), CFG, rng(3))
    got = torch.autograd.grad(sid(roles, x, batch, CFG, rng(3)).value, x)[0]
    s = expand(score["sigma"], x)[:, 1:]
    contraction = 1 - real.gain(s) * (1 - s)
    scale = (x - score["real"])[:, 1:].abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    want = ((fake.mean - real.mean) * contraction**2 / scale).expand(-1, -1, *x.shape[2:])
    torch.testing.assert_close(got[:, 1:], want / want.numel(), rtol=1e-5, atol=1e-12)
    assert not got[:, 0].any()


def test_sid_reaches_the_student_through_both_scores(student):
    batch = clip()
    teacher, critic = random_dit(DIT, 1), random_dit(DIT, 2)
    x = batch.x.clone().requires_grad_()
    whole = torch.autograd.grad(sid(Roles(student, teacher, critic), x, batch, CFG, rng()).value, x)[0]
    through = x.detach().requires_grad_()
    score = score_difference(Roles(student, teacher, critic), through, batch, CFG, rng())
    gap = score["real"] - score["fake"]
    scale = (through - score["real"])[:, 1:].abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    frozen = (gap * ((score["real"] - through) - gap) / scale)[:, 1:].mean()
    direct = torch.autograd.grad(frozen, through)[0]
    assert (whole - direct)[:, 1:].norm() > 0.1 * direct.norm()


def test_the_best_critic_is_the_least_squares_fit():
    batch = clip()

    class Constant:
        def __init__(self):
            self.w = torch.zeros((), requires_grad=True)

        def velocity(self, x, sigma, cond):
            return self.w.expand(x.shape)

    critic = Constant()
    loss = critic_flow(Roles(None, None, critic), batch.x, batch, CFG, rng(5)).value
    slope = torch.autograd.grad(loss, critic.w)[0]
    draws = rng(5)
    CFG.score_noise.sample(B, 1, draws)
    best = (randn_like(batch.x, draws) - batch.x)[:, 1:].mean()
    assert slope.item() == pytest.approx(-2 * best.item(), rel=1e-5)
    with torch.no_grad():
        critic.w.fill_(best.item())
    loss = critic_flow(Roles(None, None, critic), batch.x, batch, CFG, rng(5)).value
    assert torch.autograd.grad(loss, critic.w)[0].abs() < 1e-6


class Trainable(Gaussian):
    """A critic with its mean to learn."""

    def __init__(self, mean):
        super().__init__(torch.tensor(mean, requires_grad=True))


@pytest.mark.parametrize("fn", [dmd, sid])
def test_alternating_updates_move_the_students_mean_to_the_teachers(fn):
    student, critic, teacher = torch.tensor(2.0, requires_grad=True), Trainable(2.0), Gaussian(-0.5)
    roles = Roles(None, teacher, critic)
    rates = {dmd: 1.0, sid: 2.0}
    for step in range(240):
        draws = rng(step)
        x = student + torch.randn(8, 2, 1, 4, 4, generator=draws)
        if step % 6:
            slope = torch.autograd.grad(
                critic_flow(roles, x.detach(), Batch(x.detach()), CFG, draws).value, critic.mean
            )
            critic.mean.data -= 0.1 * slope[0]
        else:
            slope = torch.autograd.grad(fn(roles, x, Batch(x.detach()), CFG, draws).value, student)
            student.data -= 0.2 * rates[fn] * slope[0]
    assert abs(student.item() + 0.5) < 0.3 and abs(critic.mean.item() + 0.5) < 0.4


def test_guidance_counts_from_the_unconditional_prediction():
    """Published "guidance 3" of DMD, c + 3 (c - u), is 4 here."""
    net, batch = random_dit(DIT), clip()
    sigma = torch.full((B, F), 0.5)
    c = net.velocity(batch.x, sigma, batch.cond)
    u = net.velocity(batch.x, sigma, batch.cond.null())
    assert (c - u).abs().max() > 1e-3
    got = guided(net, batch.x, sigma, batch.cond, [batch.cond.null()], [4.0])
    torch.testing.assert_close(got, u + 4 * (c - u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, c + 3 * (c - u), rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(net, batch.x, sigma, batch.cond, [batch.cond.null()], [1.0]), c)


# --- motion -----------------------------------------------------------------------------------------------------------


def transpose_difference(y):
    """The adjoint of the difference along frames."""
    zero = torch.zeros_like(y[:, :1])
    return torch.cat((zero, y), dim=1) - torch.cat((y, zero), dim=1)


def test_the_motion_gradient_is_the_adjoint_difference_of_the_weighted_score():
    x, fake, real = (randn(B, F, 2, 3, 3, seed=k).double() for k in range(3))
    wanted = motion_gradient(x, fake, real, 0)
    weight = motion_weights(wanted, 1.2, 0.7)
    x.requires_grad_()
    got = torch.autograd.grad(motion_pull(x.float(), wanted, weight, 0), x)[0]
    want = transpose_difference(2 * weight * wanted) / wanted.numel()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)
    assert got.abs().max() > 0


def test_motion_matching_between_gaussians_is_the_closed_form():
    """The gradient of the loss that trains, on every frame: the adjoint of what the scores ask of each transition."""
    x = clip().x.double().requires_grad_()
    batch, cfg = replace(clip(), x=x), replace(CFG, dmd=0.0, motion=0.7)
    fake, real = Gaussian(-1.0, 0.5), Gaussian(0.5, 1.5)
    score = score_difference(Roles(None, real, fake), x.detach(), batch, CFG, rng(3))
    level = expand(score["sigma"], x)
    noisy = (score["fake"] - fake.mean) / fake.gain(level) + (1 - level) * fake.mean  # what both saw
    shown = [net.mean + net.gain(level) * (noisy - (1 - level) * net.mean) for net in (fake, real)]
    moves = [torch.cat((x.detach()[:, :1], clean[:, 1:]), dim=1).diff(dim=1) for clean in (*shown, x.detach())]
    grad = (moves[0] - moves[1]) / (moves[2] - moves[1]).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    weight = motion_weights(grad, cfg.motion_growth, cfg.motion_dynamic)
    want = 0.7 * transpose_difference(2 * weight * grad) / grad.numel()
    got = torch.autograd.grad(dmd(Roles(None, real, fake), x, batch, cfg, rng(3)).value, x)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)
    assert got[:, 1:].abs().max() > 1e-4


@pytest.mark.parametrize("term", ["regression", "motion_head"])
def test_terms_towards_a_teacher_sample_pull_the_rollout(term):
    batch = replace(clip(), target=randn(*clip().x.shape, seed=5))
    x = batch.x.clone().requires_grad_()
    roles = Roles(None, Gaussian(0.5), Gaussian(-1.0, 0.5), MotionHead(SHAPE.channels))
    got = torch.autograd.grad(dmd(roles, x, batch, replace(CFG, dmd=0.0, **{term: 0.5}), rng()).value, x)[0]
    apart = batch.x - batch.target
    if term == "motion_head":  # starts as the identity: squared differences of motion
        apart = transpose_difference(apart.diff(dim=1))
    torch.testing.assert_close(got[:, 1:], 0.5 * 2 * apart[:, 1:] / batch.x[:, 1:].numel(), rtol=1e-4, atol=1e-8)


def test_motion_terms_ignore_a_constant_offset_in_time_and_the_unit():
    x, fake, real = (randn(B, F, 2, 3, 3, seed=k).double() for k in range(3))
    offset = randn(B, 1, 2, 3, 3, seed=9).double()
    plain = motion_gradient(x, fake, real, 0)
    torch.testing.assert_close(motion_gradient(x + offset, fake + offset, real + offset, 0), plain)
    torch.testing.assert_close(motion_gradient(10 * x, 10 * fake, 10 * real, 0), plain)


def test_motion_weights_follow_their_formula():
    grad = randn(B, 4, 2, 3, 3).double()
    e = grad.numpy() ** 2
    e = e.mean(axis=(2, 3, 4)).cumsum(axis=1)
    powers = 1.3 ** np.arange(4)
    want = 0.6 * (1 + e / e[:, -1:]) + 0.4 * powers / powers.mean()
    got = motion_weights(grad, 1.3, 0.6)
    assert got.shape == (B, 4, 1, 1, 1)
    np.testing.assert_allclose(got[..., 0, 0, 0].numpy(), want)


def test_motion_between_given_frames_is_left_out():
    x = randn(B, F, 2, 3, 3)
    assert torch.equal(motion(x, 0), motion(x, 1))
    assert motion(x, 3).shape[1] == F - 3


def test_dmd_adds_its_terms_with_their_weights():
    batch = clip()
    batch = replace(batch, target=randn(*batch.x.shape, seed=5))
    head = MotionHead(SHAPE.channels)
    roles = Roles(None, Gaussian(0.5), Gaussian(-1.0, 0.5), head)

    def value(**weights):
        return dmd(roles, batch.x, batch, replace(CFG, **weights), rng(3))

    parts = [value(), value(dmd=0.0, motion=2.0), value(dmd=0.0, regression=3.0), value(dmd=0.0, motion_head=0.5)]
    total = value(motion=2.0, regression=3.0, motion_head=0.5)
    assert total.value.item() == pytest.approx(sum(p.value.item() for p in parts), rel=1e-5)
    assert all(p.value > 0 for p in parts)
    assert set(total.logs) == {"dmd_grad", "motion_grad", "regression", "motion_head"}
    mse = (batch.x - batch.target)[:, 1:].square().mean().item()
    assert parts[2].value.item() == pytest.approx(3 * mse, rel=1e-5)
    steps = (batch.x - batch.target).diff(dim=1).square().mean().item()
    assert parts[3].value.item() == pytest.approx(0.5 * steps, rel=1e-4), "the head starts as the identity"


def test_edges_count_in_both_directions_of_a_picture():
    px, off = torch.zeros(1, 2, 3, 4, 6), torch.zeros(1, 2, 3, 4, 6)
    off[..., 1:] = 1.0  # one step along each row,
    off[..., 2:, :] += 2.0  # and a larger one down each column
    roles = Roles(student=lambda x, noise, rng: (x + off, torch.zeros(1)))
    found = reconstruction(roles, px, None, LossConfig(), rng()).logs["edges"]
    assert found.item() == pytest.approx(1 / 5 + 2 / 3)


@pytest.mark.parametrize(("noisy", "clean"), [(0, 0), (1, 4), (2, 1), (3, 0), (9, 0)])
def test_noisy_chunks_are_the_last_ones_and_at_most_all(student, noisy, clean):
    assert clean_frames(student, F, LossConfig(noisy_chunks=noisy)) == clean  # chunks of 1, 3 and 3 frames


def test_the_motion_head_learns_and_its_copy_follows():
    head = MotionHead(4)
    assert not head.net[-1](randn(1, 64, 3, 3)).any(), "it starts as the identity"
    x, y = randn(2, 3, 4, 5, 5), randn(2, 3, 4, 5, 5, seed=1)
    head(x, y).backward()
    assert head.net[-1].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in head.target.parameters())
    with torch.no_grad():
        head.net[-1].weight.fill_(1.0)
    for _ in range(3):
        head.follow()
    torch.testing.assert_close(head.target[-1].weight, torch.full_like(head.target[-1].weight, 1 - 0.95**3))


@pytest.mark.parametrize(("name", "want"), [("mse", 0.25), ("charbonnier", 0.500001), ("cauchy", np.log1p(2500))])
def test_distances_follow_their_formula(name, want):
    assert DISTANCES[name](torch.full((2, 2), 0.5)).item() == pytest.approx(want, rel=1e-5)


# --- what may see what ------------------------------------------------------------------------------------------------


def sees(v, x, chunk):
    """[chunks, chunks]: whether v of a chunk depends on x of another."""
    chunks = int(chunk[-1]) + 1
    rows = []
    for b in range(chunks):
        grad = torch.autograd.grad(v[:, chunk == b].sum(), x, retain_graph=True, allow_unused=True)[0]
        grad = torch.zeros_like(x) if grad is None else grad
        rows.append([bool(grad[:, chunk == c].any()) for c in range(chunks)])
    return torch.tensor(rows)


def test_a_teacher_forced_chunk_sees_clean_history_and_itself_only(student):
    batch, chunk = clip(), student.chunk_of_frames(F)
    clean, noisy = batch.x.clone().requires_grad_(), randn(*batch.x.shape, seed=4).requires_grad_()
    v = forced(student, clean, noisy, torch.full((B, F), 0.7), batch.cond, 0.0, rng())
    n = int(chunk[-1]) + 1
    assert torch.equal(sees(v, noisy, chunk), torch.eye(n, dtype=torch.bool))
    assert torch.equal(sees(v, clean, chunk), torch.ones(n, n, dtype=torch.bool).tril(-1))


def test_a_diffusion_forced_chunk_sees_noisy_history_and_itself(student):
    batch, chunk = clip(), student.chunk_of_frames(F)
    x = batch.x.clone().requires_grad_()
    v = student.net(x, torch.full((B, F), 0.7), batch.cond, causal=student.causal_mask(F))
    n = int(chunk[-1]) + 1
    assert torch.equal(sees(v, x, chunk), torch.ones(n, n, dtype=torch.bool).tril())


def test_the_last_chunk_sends_no_gradient_to_earlier_ones(student):
    """History is frozen: memory is detached, and a chunk is renoised from a detached prediction."""
    passes = training(ScheduleConfig(levels=(1.0,), given_chunks=1), student.num_chunks(F), Random(0))
    batch = clip()
    noise, held = chunk_noise(student, B, 0, batch.x[:, :1]), {}

    def leaf(chunk):
        held[chunk] = noise(chunk).clone().requires_grad_()
        return held[chunk]

    memory = student.new_memory(B)
    chunks = list(rollout(student, passes, noise=leaf, cond=batch.cond.frames, memory=memory, rng=rng()))
    grads = torch.autograd.grad(chunks[-1].sum(), list(held.values()), retain_graph=True, allow_unused=True)
    assert grads[-1].abs().max() > 0
    assert all(g is None or not g.any() for g in grads[:-1])
    grads = torch.autograd.grad(chunks[-1].sum(), chunks[1], allow_unused=True)
    assert grads == (None,)


@pytest.mark.parametrize("exit_", ["shared", "per_chunk"])
def test_every_step_is_an_exit_equally_often(exit_):
    cfg = ScheduleConfig(levels=(1.0, 0.9, 0.8, 0.6), pattern="42", exit=exit_, given_chunks=1)
    draw, counts, differ = Random(0), {1: np.zeros(4), 2: np.zeros(2)}, 0
    for _ in range(2000):
        by_chunk, walked = {}, Counter()
        for p in training(cfg, 3, draw):
            if p.next_sigma is not None:
                assert p.grad == p.emit and not (p.grad and p.chunk in by_chunk), "one exit a chunk"
                if p.grad:
                    by_chunk[p.chunk] = walked[p.chunk]
                walked[p.chunk] += 1
            else:
                assert not p.grad and p.commit
        assert exit_ == "shared" or walked == {1: 4, 2: 2}, "a chunk of its own exit is denoised to its end"
        for c, step in by_chunk.items():
            counts[c][step] += 1
        differ += by_chunk[1] // 2 != by_chunk[2]
    for observed, limit in ((counts[1], 11.34), (counts[2], 6.63)):  # chi-square, p = 0.01
        expected = 2000 / len(observed)
        assert ((observed - expected) ** 2 / expected).sum() < limit, observed
    assert (differ == 0) == (exit_ == "shared")


# --- objectives on data -----------------------------------------------------------------------------------------------


class Watched(torch.nn.Module):
    """A network that remembers its last input and output."""

    def __init__(self, net):
        super().__init__()
        self.net, self.cfg = net, net.cfg

    def forward(self, x, sigma, cond, **kw):
        self.x, self.sigma, self.cond = x, sigma, cond
        self.out = self.net(x, sigma, cond, **kw)
        self.out.retain_grad()
        return self.out

    velocity = forward


@pytest.mark.parametrize("fn", [flow, teacher_forcing, diffusion_forcing])
def test_given_frames_are_shown_clean_and_never_trained(student, fn):
    batch = clip(given=2)
    net = Watched(student.net)
    trained = net if fn is flow else CausalStudent(net, STUDENT, SHAPE)
    fn(Roles(trained), batch.x, batch, CFG, rng()).value.backward()
    x, sigma, grad = (t[:, -F:] for t in (net.x, net.sigma, net.out.grad))
    assert torch.equal(x[:, :2], batch.x[:, :2]) and not sigma[:, :2].any()
    assert not grad[:, :2].any() and grad[:, 2:].abs().min() > 0
    assert sigma[:, 2:].min() > 0


def test_channel_weights_and_soundness_weigh_motion_as_they_weigh_scores(monkeypatch):
    batch, weights = clip(), tuple(0.5 + c for c in range(SHAPE.channels))
    monkeypatch.setattr(
        "vidistill.training.losses.valid_rollouts", lambda x, real, given: torch.tensor([1.0] + [0.0] * (B - 1))
    )
    grads = []
    for cfg in (CFG, replace(CFG, channel_weights=weights, invalid_weight=0.25)):
        x = batch.x.clone().requires_grad_()
        roles = Roles(None, Gaussian(0.5), Gaussian(-1.0, 0.5))
        grads.append(torch.autograd.grad(dmd(roles, x, batch, replace(cfg, dmd=0.0, motion=1.0), rng()).value, x)[0])
    trust = torch.tensor([1.0] + [0.25] * (B - 1)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(grads[1], trust * grads[0] * torch.tensor(weights)[:, None, None])


def test_dmd_logs_its_gradient_where_it_teaches_and_the_share_of_broken_clips(monkeypatch):
    batch, roles = clip(given=2), Roles(None, Gaussian(0.5), Gaussian(-1.0, 0.5))
    monkeypatch.setattr("vidistill.training.losses.valid_rollouts", lambda *_: torch.tensor([1.0] + [0.0] * (B - 1)))
    logs = dmd(roles, batch.x, batch, replace(CFG, invalid_weight=0.25), rng()).logs
    grad = score_difference(roles, batch.x, batch, CFG, rng())["grad"]
    assert logs["dmd_grad"].item() == pytest.approx(grad[:, 2:].abs().mean().item())
    assert logs["invalid"].item() == pytest.approx(1 - 1 / B)


@pytest.mark.parametrize("off", [0.9, 1.1])
def test_clips_are_broken_below_a_share_of_real_contrast_and_motion_or_above_one_of_its_change(off):
    real = randn(4, 9, 3, 8, 8)
    contrast, moves = real[:, 1:].std(dim=(3, 4)).mean(), motion(real, 1).abs().mean()
    picture, changing = real[:1, :1], real[:1]
    steady = 0.5 * moves * torch.arange(9.0).view(1, -1, 1, 1, 1)  # it moves and does not change how
    flat = off * EMPTY * contrast / picture.std(dim=(3, 4)).mean() * picture + steady
    still = picture + off * FROZEN * moves / motion(changing, 1).abs().mean() * changing
    changes = motion(real, 1).diff(dim=1).abs().mean() / motion(changing, 1).diff(dim=1).abs().mean()
    flickering = off * FLICKER * changes * changing
    found = [valid_rollouts(x, real, 1).item() for x in (flat, still, flickering)]
    assert found == ([0.0, 0.0, 1.0] if off < 1 else [1.0, 1.0, 0.0])


@pytest.mark.parametrize("fn", [flow, teacher_forcing, diffusion_forcing, dmd])
def test_channel_weights_scale_what_each_channel_teaches(student, fn):
    batch, weights = clip(), tuple(0.5 + c for c in range(SHAPE.channels))
    grads = []
    for cfg in (CFG, replace(CFG, channel_weights=weights)):
        if fn is dmd:
            x = batch.x.clone().requires_grad_()
            roles = Roles(None, Gaussian(0.5), Gaussian(-1.0))
            grads.append(torch.autograd.grad(fn(roles, x, batch, cfg, rng()).value, x)[0])
            continue
        net = Watched(student.net)
        trained = net if fn is flow else CausalStudent(net, STUDENT, SHAPE)
        fn(Roles(trained), batch.x, batch, cfg, rng()).value.backward()
        grads.append(net.out.grad)
    torch.testing.assert_close(grads[1], grads[0] * torch.tensor(weights)[:, None, None])


def test_channel_weights_are_one_a_channel(student):
    with pytest.raises(ValueError, match=f"latents have {SHAPE.channels} channels"):
        flow(Roles(student.net), clip().x, clip(), replace(CFG, channel_weights=(1.0,)), rng())


def test_a_dropped_condition_is_the_null_condition(student):
    batch, net = clip(), Watched(student.net)
    kept = []
    for seed in range(20):
        flow(Roles(net), batch.x, batch, replace(CFG, drop=0.5), rng(seed))
        kept += net.cond.per_frame["modulation"].flatten(1).any(dim=1).tolist()
    assert 10 <= sum(kept) <= 30


def test_levels_are_one_a_chunk_and_independent(student):
    sigma = chunk_levels(student, NoiseSchedule(), 64, F, rng())
    chunk = student.chunk_of_frames(F)
    for c in range(int(chunk[-1]) + 1):
        assert (sigma[:, chunk == c] == sigma[:, chunk == c][:, :1]).all()
    assert torch.corrcoef(sigma[:, [0, 1, 4]].T).triu(1).abs().max() < 0.4


def test_context_noise_is_told_and_spares_what_is_given(student):
    batch, net = clip(), Watched(student.net)
    teacher_forcing(Roles(CausalStudent(net, STUDENT, SHAPE)), batch.x, batch, replace(CFG, context_noise=0.2), rng())
    assert not net.sigma[:, 0].any() and torch.allclose(net.sigma[:, 1:F], torch.tensor(0.2))
    assert torch.equal(net.x[:, 0], batch.x[:, 0]) and not torch.equal(net.x[:, 1:F], batch.x[:, 1:])


def test_regression_meets_the_sample_from_every_state_of_its_path(student):
    batch = clip()
    cfg = replace(CFG, levels=(1.0, 0.5))
    states = torch.stack([add_noise(batch.x, randn(*batch.x.shape, seed=k), s) for k, s in enumerate((1.0, 0.5))], 1)
    paths = replace(batch, x=torch.cat((states, batch.x[:, None]), dim=1))
    net, chunk, seen = Watched(student.net), student.chunk_of_frames(F), set()
    for seed in range(8):
        loss = regression(Roles(CausalStudent(net, STUDENT, SHAPE)), None, paths, cfg, rng(seed)).value
        noisy, sigma = net.x[:, F:], net.sigma[:, F:]
        assert torch.equal(net.x[:, :F], batch.x) and torch.equal(noisy[:, 0], batch.x[:, 0])
        for b in range(B):
            for c in (1, 2):
                level = sigma[b, chunk == c].unique().item()
                assert torch.equal(noisy[b, chunk == c], states[b, cfg.levels.index(level), chunk == c])
                seen.add((c, level))
        want = (x0_from_v(noisy, net.out[:, F:], sigma) - batch.x)[:, 1:].square().mean()
        torch.testing.assert_close(loss, want)
    assert len(seen) == 4


def test_regression_on_a_noisy_history_runs_the_clip_once_and_scores_no_clean_frame(student):
    batch = clip()
    cfg = replace(CFG, levels=(1.0, 0.5), history="noisy", context_noise=0.3)
    states = torch.stack([add_noise(batch.x, randn(*batch.x.shape, seed=k), s) for k, s in enumerate((1.0, 0.5))], 1)
    paths = replace(batch, x=torch.cat((states, batch.x[:, None]), dim=1), given=0)
    net, chunk = Watched(student.net), student.chunk_of_frames(F)
    index = torch.tensor([2, 0, 1])[chunk].expand(B, F)
    loss = regression(Roles(CausalStudent(net, STUDENT, SHAPE)), None, paths, cfg, rng(), index).value
    assert net.x.shape[1] == F
    for c, (state, level) in enumerate(((batch.x, 0.0), (states[:, 0], 1.0), (states[:, 1], 0.5))):
        assert torch.equal(net.x[:, chunk == c], state[:, chunk == c]) and (net.sigma[:, chunk == c] == level).all()
    scored = chunk > 0
    want = (x0_from_v(net.x, net.out, net.sigma) - batch.x)[:, scored].square().mean()
    torch.testing.assert_close(loss, want)
    with pytest.raises(ValueError, match=r"loss\.history"):
        replace(CFG, history="none")


def test_a_noised_sample_keeps_given_frames_and_carries_gradient(student):
    batch = clip()
    x0 = noised_sample(student, batch, (1.0, 0.5), rng())
    assert torch.equal(x0[:, 0], batch.x[:, 0]) and x0[:, 1:].requires_grad


@pytest.mark.parametrize(
    "settings",
    [
        {"drop": 1.0},
        {"sigma_min": 0.0},
        {"sigma_max": 1.5},
        {"motion": -1.0},
        {"distance": "l3"},
        {"target_steps": 0},
        {"channel_weights": (1.0, 0.0)},
    ],
)
def test_impossible_losses_are_refused(settings):
    with pytest.raises(ValueError):
        LossConfig(**settings)


# --- codec -----------------------------------------------------------------------------------------------------------


def test_the_change_of_an_error_counts_and_the_error_that_stays_does_not():
    still = randn(B, 1, 3, 16, 16).expand(-1, F, -1, -1, -1)
    assert changing(still).item() == 0 == changing(still[:, :1]).item()
    blink = torch.zeros(B, F, 3, 16, 16)
    blink[:, 1::2] = 0.25  # every pixel, so blocks as much as pixels
    assert changing(blink).item() == pytest.approx(0.5)
    checks = 0.25 * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))  # pixels change, no block does
    assert changing(blink.sign() * checks).item() == pytest.approx(0.25)
    assert changing(blink[..., :3, :5]).item() == pytest.approx(0.5), "pictures smaller than a block"


def test_a_codec_is_told_of_flicker_as_strongly_as_asked():
    px, off = randn(B, 5, 3, 16, 16), torch.zeros(B, 5, 3, 16, 16)
    off[:, 2] = 0.25
    roles = Roles(student=lambda x, noise, rng: (x + off.requires_grad_(), torch.zeros(1)))
    quiet, loud = (reconstruction(roles, px, None, LossConfig(temporal_weight=w), rng()) for w in (0.0, 2.0))
    assert (loud.value - quiet.value).item() == pytest.approx(2 * 0.25)  # two of four changes, in pixels and in blocks
    assert loud.logs["changes"].item() == pytest.approx(0.25)
    grads = [torch.autograd.grad(each.value, off)[0] for each in (quiet, loud)]
    assert grads[1][:, 2].mean() > 2 * grads[0][:, 2].mean()


def test_what_moves_weighs_more_in_a_reconstruction():
    px = torch.full((2, 5, 3, 12, 12), 0.5)
    for t in range(5):
        px[:, t, :, 4, 2 * t] = 1.0
    weights = moving_weights(px, 30.0)
    assert weights.mean() == pytest.approx(1.0) and torch.equal(moving_weights(px, 0.0), torch.ones_like(weights))
    assert weights[0, 2, 0, 3:6, 3:6].min() > 10 * weights[0, 2, 0, 8:, :].max()  # the neighbours of a pixel, too
    l1 = {}
    for row in (4, 10):  # an error where something moves, and where nothing does
        off = torch.zeros_like(px)
        off[:, 2, :, row, 4] = 0.5
        roles = Roles(student=lambda x, noise, rng, off=off: (x + off, torch.zeros(1)))
        l1[row] = [
            float(reconstruction(roles, px, None, LossConfig(moving_weight=w), rng()).logs["l1"]) for w in (0, 30)
        ]
    assert l1[4][0] == pytest.approx(l1[10][0]) and l1[4][1] > 10 * l1[10][1]
    with pytest.raises(ValueError, match="moving_weight"):
        LossConfig(moving_weight=-1.0)
