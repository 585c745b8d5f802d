"""Losses as functions: (roles, x0, batch, cfg, rng) -> Loss. Papers' words: generator, real score, fake score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidistill.conditioning import Condition
from vidistill.diffusion import Denoiser, NoiseSchedule, add_noise, expand, randn_like, v_from, x0_from_v
from vidistill.sampling import guided
from vidistill.student import CausalStudent


@dataclass(frozen=True)
class Roles:
    """The networks of a training stage: what is trained, what it learns from, and what scores its samples."""

    student: Any
    teacher: Any = None
    critic: Any = None


@dataclass(frozen=True)
class Loss:
    """A scalar to differentiate and what to log beside it."""

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LossConfig:
    """Settings of all losses; each reads its own.

    `guidance` and `teacher_shift` belong to the scores of DMD and SiD: v = u + guidance (c - u), levels warped by the
    shift and clamped to [`sigma_min`, `sigma_max`].
    """

    noise: NoiseSchedule = NoiseSchedule()
    drop: float = 0.1  # probability that a condition is dropped (flow)
    guidance: float = 1.0
    critic_guidance: float = 1.0
    score_noise: NoiseSchedule = NoiseSchedule(logit_normal=False)
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    sid_alpha: float = 1.0
    latent_noise: float = 0.1  # codec: noise on latents while training
    latent_penalty: float = 1e-3  # codec: keeps raw latents near unit size
    edge: float = 1.0  # codec: weight of the gradient term beside L1
    levels: tuple[float, ...] = (1.0, 0.9375, 0.8333, 0.625)  # regression: the student's noise levels
    context_noise: float = 0.0  # teacher forcing: noise on the clean history
    motion: float = 0.0  # weight of motion distribution matching beside DMD
    regression: float = 0.0  # weight of regression to a teacher sample beside DMD

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"loss.drop must lie in [0, 1), got {self.drop}")
        if not 0 < self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"loss needs 0 < sigma_min < sigma_max <= 1, got {self.sigma_min}, {self.sigma_max}")


LossFn = Callable[..., Loss]


def masked_mse(a: Tensor, b: Tensor, given: int, weight: Tensor | None = None) -> Tensor:
    """Mean squared error [] over the frames that are not given; `weight` [B, F] weighs frames."""
    error = (a[:, given:].float() - b[:, given:].float()).square()
    return error.mean() if weight is None else (error.mean(dim=(2, 3, 4)) * weight[:, given:]).mean()


def hold(sigma: Tensor, given: int) -> Tensor:
    """`sigma` [B, F] with 0 on the given frames: they are shown clean."""
    if given:
        sigma = sigma.clone()
        sigma[:, :given] = 0.0
    return sigma


def reconstruction(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """L1 and gradient error of a codec's reconstruction of pixels `x0` [B, f, 3, H, W]."""
    out, raw = roles.student(x0, cfg.latent_noise, rng)
    error = out - x0
    l1 = error.abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    penalty = raw.square().mean()
    mse = error.square().mean().detach()
    value = l1 + cfg.edge * edges + cfg.latent_penalty * penalty
    return Loss(value, {"l1": l1.detach(), "edges": edges.detach(), "psnr": -10 * mse.log10(), "raw": penalty.detach()})


def flow(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Flow matching of a bidirectional network, one level per clip, with condition dropout. Source: 2210.02747."""
    return flow_matching(roles.student, x0, batch, cfg.noise, cfg.drop, rng)


def flow_matching(
    net: Denoiser, x0: Tensor, batch: Any, noise: NoiseSchedule, drop: float, rng: torch.Generator
) -> Loss:
    b, f = x0.shape[:2]
    sigma = hold(noise.sample(b, 1, rng).expand(b, f).to(x0.device), batch.given)
    eps = randn_like(x0, rng)
    cond = batch.cond
    if drop:
        cond = cond.drop(torch.rand(b, generator=rng) >= drop)
    v = net.velocity(add_noise(x0, eps, sigma), sigma, cond)
    return Loss(masked_mse(v, v_from(x0, eps), batch.given))


def teacher_forcing(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Flow matching of every chunk given the true, clean history, in one masked forward. Source: 2412.07772, 2506.08009."""
    student: CausalStudent = roles.student
    b, f = x0.shape[:2]
    sigma = hold(chunk_levels(student, cfg.noise, b, f, rng).to(x0.device), batch.given)
    eps = randn_like(x0, rng)
    v = forced(student, x0, add_noise(x0, eps, sigma), sigma, batch.cond, cfg.context_noise, rng)
    return Loss(masked_mse(v, v_from(x0, eps), batch.given))


def diffusion_forcing(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Flow matching under the block-causal mask with an independent level per chunk. Source: 2407.01392."""
    student: CausalStudent = roles.student
    b, f = x0.shape[:2]
    sigma = hold(chunk_levels(student, cfg.noise, b, f, rng).to(x0.device), batch.given)
    eps = randn_like(x0, rng)
    v = student.net(add_noise(x0, eps, sigma), sigma, batch.cond, causal=student.causal_mask(f).to(x0.device))
    return Loss(masked_mse(v, v_from(x0, eps), batch.given))


def chunk_levels(student: CausalStudent, noise: NoiseSchedule, b: int, f: int, rng: torch.Generator) -> Tensor:
    """Independent random levels per chunk, one per frame [b, f]."""
    chunk = student.chunk_of_frames(f)
    return noise.sample(b, int(chunk[-1]) + 1, rng)[:, chunk]


def forced(
    student: CausalStudent, clean: Tensor, noisy: Tensor, sigma: Tensor, cond: Condition, context: float, rng: Any
) -> Tensor:
    """Velocity [B, F, C, H, W] of noisy chunks, each given the clean chunks before it."""
    f = clean.shape[1]
    history = torch.zeros_like(sigma)
    if context:
        history = hold(torch.full_like(sigma, context), 1)
        clean = add_noise(clean, randn_like(clean, rng), history)
    twice = Condition(
        cond.tokens,
        {site: torch.cat((x, x), dim=1) for site, x in cond.per_frame.items()},
        None if cond.channels is None else torch.cat((cond.channels, cond.channels), dim=1),
    )
    v = student.net(
        torch.cat((clean, noisy), dim=1),
        torch.cat((history, sigma), dim=1),
        twice,
        start=torch.arange(f).repeat(2),
        causal=student.teacher_forcing_mask(f).to(clean.device),
    )
    return v[:, f:]


def regression(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Regression of x0 from points of stored teacher trajectories, clean history before each chunk.

    `batch.x` [B, K + 1, F, C, H, W] holds the states at the K `levels` and, last, the sample. Source: CausVid 2412.07772.
    """
    student: CausalStudent = roles.student
    states, target = batch.x[:, :-1], batch.x[:, -1]
    b, k, f = states.shape[:3]
    chunk = student.chunk_of_frames(f)
    index = torch.randint(k, (b, int(chunk[-1]) + 1), generator=rng)[:, chunk].to(states.device)
    noisy = torch.gather(states, 1, index[:, None, :, None, None, None].expand(-1, 1, -1, *states.shape[3:]))[:, 0]
    sigma = hold(torch.tensor(cfg.levels, device=states.device)[index], batch.given)
    noisy = torch.where(expand(sigma, noisy) > 0, noisy, target)
    v = forced(student, target, noisy, sigma, batch.cond, cfg.context_noise, rng)
    return Loss(masked_mse(x0_from_v(noisy, v, sigma), target, batch.given))


def score_level(x: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Tensor:
    """One random noise level per clip for the scores, as [B, F], 0 on given frames."""
    b, f = x.shape[:2]
    sigma = cfg.score_noise.sample(b, 1, rng).clamp(cfg.sigma_min, cfg.sigma_max)
    return hold(sigma.expand(b, f).to(x.device), batch.given)


def predict(net: Denoiser, x: Tensor, told: Tensor, sigma: Tensor, cond: Condition, guidance: float) -> Tensor:
    """Prediction x0 [B, F, C, H, W] of a score network, with guidance; `told` may differ from the noise `sigma`."""
    return x0_from_v(x, guided(net, x, told, cond, [cond.null()], [guidance]), sigma)


@torch.no_grad()
def score_difference(roles: Roles, x: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> dict[str, Tensor]:
    """What DMD is made of: the noise level, both predictions, and the normalised gradient (fake - real) on `x`.

    Source: DMD 2311.18828, eq. 7 and 8; normaliser of DMD2 2405.14867.
    """
    told = score_level(x, batch, cfg, rng)
    sigma = hold(cfg.score_noise.level(told), batch.given)
    noisy = add_noise(x, randn_like(x, rng), sigma)
    fake = predict(roles.critic, noisy, told, sigma, batch.cond, cfg.critic_guidance)
    real = predict(roles.teacher, noisy, told, sigma, batch.cond, cfg.guidance)
    g = batch.given
    scale = (x - real)[:, g:].abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    grad = torch.nan_to_num((fake - real) / scale.clamp_min(1e-6))
    grad[:, :g] = 0.0
    return {"sigma": sigma, "fake": fake, "real": real, "grad": grad}


def pull(x: Tensor, grad: Tensor, given: int, mask: Tensor | None = None) -> Tensor:
    """A loss [] whose gradient on `x` is `grad` / (number of entries not given, and where `mask` is True)."""
    target = (x.double() - grad.double()).detach()
    error = (x.double() - target)[:, given:]
    return 0.5 * (error if mask is None else error[mask[:, given:]]).square().mean()


def dmd(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Distribution matching: pull the rollout `x0` along the difference of the scores. Source: 2311.18828, 2506.08009."""
    score = score_difference(roles, x0.detach(), batch, cfg, rng)
    grad = score["grad"]
    return Loss(pull(x0, grad, batch.given).float(), {"dmd_grad": grad[:, batch.given :].abs().mean()})


def sid(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Score identity distillation, gradients through both scores. Source: 2404.04057, eq. 23; Self Forcing 2506.08009."""
    told = score_level(x0, batch, cfg, rng)
    sigma = hold(cfg.score_noise.level(told), batch.given)
    noisy = add_noise(x0, randn_like(x0, rng), sigma)
    fake = predict(roles.critic, noisy, told, sigma, batch.cond, cfg.critic_guidance)
    real = predict(roles.teacher, noisy, told, sigma, batch.cond, cfg.guidance)
    g = batch.given
    scale = (x0 - real)[:, g:].abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach().clamp_min(1e-6)
    gap = real - fake
    value = gap * ((real - x0) - cfg.sid_alpha * gap) / scale
    return Loss(value[:, g:].mean(), {"sid_gap": gap[:, g:].abs().mean().detach()})


def critic_flow(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: torch.Generator) -> Loss:
    """Flow matching of the critic on the student's samples `x0`, at the levels the scores are taken at."""
    told = score_level(x0, batch, cfg, rng)
    sigma = hold(cfg.score_noise.level(told), batch.given)
    eps = randn_like(x0, rng)
    v = roles.critic.velocity(add_noise(x0, eps, sigma), told, batch.cond)
    return Loss(masked_mse(v, v_from(x0, eps), batch.given))


@dataclass(frozen=True)
class Objective:
    """Losses of a stage; `on_policy`: x0 is the student's own rollout, else data."""

    student: LossFn
    critic: LossFn | None = None
    on_policy: bool = False


OBJECTIVES = {
    "codec": Objective(reconstruction),
    "flow": Objective(flow),
    "teacher_forcing": Objective(teacher_forcing),
    "diffusion_forcing": Objective(diffusion_forcing),
    "regression": Objective(regression),
    "dmd": Objective(dmd, critic_flow, on_policy=True),
    "sid": Objective(sid, critic_flow, on_policy=True),
}
