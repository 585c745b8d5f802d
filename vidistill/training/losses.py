"""Losses as functions: (roles, x0, batch, cfg, rng) -> Loss. Papers' words: generator, real score, fake score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import metrics
from vidistill.conditioning.condition import Condition, branches
from vidistill.diffusion import (
    AnyGenerator,
    Denoiser,
    NoiseSchedule,
    add_noise,
    draw,
    expand,
    randn_like,
    v_from,
    x0_from_v,
)
from vidistill.models.student import CausalStudent
from vidistill.sampling import guided
from vidistill.training.motion import DISTANCES, motion, motion_gradient, motion_pull, motion_weights

HISTORIES = ("clean", "noisy")


@dataclass(frozen=True)
class Roles:
    """The networks of a stage: what is trained, what it learns from, what scores its samples; a motion head."""

    student: Any
    teacher: Any = None
    critic: Any = None
    motion: Any = None


@dataclass(frozen=True)
class Loss:
    """A scalar to differentiate and what to log beside it."""

    value: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """All of it as numbers to log."""
        return {"loss": float(self.value.detach()), **{k: float(v) for k, v in self.logs.items()}}


@dataclass(frozen=True)
class LossConfig:
    """Settings of all losses; each reads its own, and the keys of a config are the same for every objective.

    `guidance` and `teacher_shift` belong to the scores of DMD and SiD: v = u + guidance (c - u), levels warped by the
    shift and clamped to [`sigma_min`, `sigma_max`]. `audio_guidance`: a scale of audio alone (0: as `guidance`, which
    is then that of text alone). `guidance_schedule` lists (step, guidance), straight lines between them. Levels below
    `guidance_floor` are not guided: high ones decide what is seen, low ones how sharp it is.
    """

    # flow, teacher and diffusion forcing
    noise: NoiseSchedule = NoiseSchedule()
    channel_weights: tuple[float, ...] = ()  # of latent channels in squared errors and DMD, see `codecs.visibility`
    drop: float = 0.1  # probability that a condition is dropped (flow)
    drop_audio: float = 0.0  # probability that audio alone is dropped (flow)
    context_noise: float = 0.0  # teacher forcing: noise on the clean history
    noisy_chunks: int = 0  # teacher and diffusion forcing: only so many chunks at the end are noisy; 0: all
    # regression
    levels: tuple[float, ...] = (1.0, 0.9375, 0.8333, 0.625)  # the student's noise levels
    history: str = "clean"  # what a chunk sees before it: the clean sample, or the noisy chunks of its own clip
    # codec
    latent_noise: float = 0.1  # noise on latents while training
    latent_penalty: float = 1e-3  # keeps raw latents near unit size
    gradient_weight: float = 1.0  # weight of the gradient term beside L1
    mse_weight: float = 0.0  # weight of the squared error beside L1
    temporal_weight: float = 0.0  # weight of the error's change between frames: what stands still should not flicker
    moving_weight: float = 0.0  # how much more errors count where pixels are far from their median over the clip
    # the scores of dmd and sid
    guidance: float = 1.0
    audio_guidance: float = 0.0
    guidance_schedule: tuple[tuple[int, float], ...] = ()
    guidance_floor: float = 0.0
    critic_guidance: float = 1.0
    score_noise: NoiseSchedule = NoiseSchedule(logit_normal=False)
    sigma_min: float = 0.02
    sigma_max: float = 0.98
    sid_alpha: float = 1.0
    # dmd and the terms beside it
    dmd: float = 1.0  # weight of distribution matching itself
    motion: float = 0.0  # weight of distribution matching on differences of neighbouring frames
    motion_growth: float = 1.2  # later transitions weigh more, by this factor each ...
    motion_dynamic: float = 0.7  # ... mixed with this share of the cumulated error so far
    motion_head: float = 0.0  # weight of regression of learned motion features to a teacher sample
    regression: float = 0.0  # weight of regression to a teacher sample
    distance: str = "mse"  # of that regression
    target_steps: int = 50  # sampler steps of the teacher sample
    forcing: float = 0.0  # weight of teacher forcing on the recorded clip, beside what the rollout teaches
    invalid_weight: float = 1.0  # weight of empty, frozen or flickering rollouts (1: as all others): `valid_rollouts`

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"loss.drop must lie in [0, 1), got {self.drop}")
        if self.channel_weights and min(self.channel_weights) <= 0:
            raise ValueError(f"loss.channel_weights must be positive, got {list(self.channel_weights)}")
        steps = [step for step, _ in self.guidance_schedule]
        if not 0 <= self.drop_audio < 1 or not 0 <= self.invalid_weight <= 1 or steps != sorted(set(steps)):
            raise ValueError(
                "loss.drop_audio lies in [0, 1), loss.invalid_weight in [0, 1], and steps of guidance_schedule rise; "
                f"got {self.drop_audio}, {self.invalid_weight} and {list(self.guidance_schedule)}"
            )
        if not 0 <= self.guidance_floor <= 1:
            raise ValueError(f"loss.guidance_floor is a noise level from 0 to 1, got {self.guidance_floor}")
        if not 0 < self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"loss needs 0 < sigma_min < sigma_max <= 1, got {self.sigma_min}, {self.sigma_max}")
        if self.moving_weight < 0:
            raise ValueError(f"loss.moving_weight must not be negative, got {self.moving_weight}")
        if self.noisy_chunks < 0:
            raise ValueError(f"loss.noisy_chunks must not be negative, got {self.noisy_chunks}")
        if self.history not in HISTORIES:
            raise ValueError(f"loss.history {self.history!r} is unknown; choose one of {HISTORIES}")
        if self.distance not in DISTANCES:
            raise ValueError(f"loss.distance {self.distance!r} is unknown; choose one of {sorted(DISTANCES)}")
        if (
            min(self.dmd, self.motion, self.motion_head, self.regression, self.forcing) < 0
            or not 0 <= self.motion_dynamic <= 1
        ):
            raise ValueError("loss weights must not be negative, and motion_dynamic lies in [0, 1]")
        if self.motion_growth <= 0 or self.target_steps < 1:
            raise ValueError("loss.motion_growth must be positive and loss.target_steps at least 1")

    def at(self, step: int) -> "LossConfig":
        """These settings with the guidance of a step."""
        if not self.guidance_schedule:
            return self
        steps, scales = zip(*self.guidance_schedule, strict=True)
        return replace(self, guidance=float(np.interp(step, steps, scales)))

    @property
    def needs_target(self) -> bool:
        """Whether student losses compare with a teacher sample, `Batch.target`."""
        return self.regression > 0 or self.motion_head > 0


LossFn = Callable[..., Loss]


def by_channel(x: Tensor, channels: tuple[float, ...]) -> Tensor:
    """`x` [B, F, C, H, W] with each channel times its weight; ValueError unless there is one for each."""
    if not channels:
        return x
    if len(channels) != x.shape[2]:
        raise ValueError(f"loss.channel_weights has {len(channels)} numbers, the latents have {x.shape[2]} channels")
    return x * torch.tensor(channels, dtype=x.dtype, device=x.device)[:, None, None]


def masked_mse(
    a: Tensor, b: Tensor, given: int, weight: Tensor | None = None, channels: tuple[float, ...] = ()
) -> Tensor:
    """Mean squared error [] over the frames that are not given; `weight` [B, F] weighs frames, `channels` channels."""
    error = by_channel((a[:, given:].float() - b[:, given:].float()).square(), channels)
    return error.mean() if weight is None else (error.mean(dim=(2, 3, 4)) * weight[:, given:]).mean()


def hold(sigma: Tensor, given: int) -> Tensor:
    """`sigma` [B, F] with 0 on the given frames: they are shown clean."""
    if given:
        sigma = sigma.clone()
        sigma[:, :given] = 0.0
    return sigma


def reconstruction(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """L1, gradients in space and changes in time of the error of reconstructed pixels `x0` [B, f, 3, H, W]."""
    out, raw = roles.student(x0, cfg.latent_noise, rng)
    error = out - x0
    weight = moving_weights(x0, cfg.moving_weight) if cfg.moving_weight else 1.0
    l1 = (weight * error.abs()).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    changes = changing(error)
    penalty = raw.square().mean()
    mse = error.square().mean()
    value = (
        l1
        + cfg.gradient_weight * edges
        + cfg.mse_weight * (weight * error.square()).mean()
        + cfg.temporal_weight * changes
        + cfg.latent_penalty * penalty
    )
    parts = {"l1": l1, "edges": edges, "changes": changes, "psnr": -10 * mse.log10(), "raw": penalty}
    return Loss(value, {name: part.detach() for name, part in parts.items()})


def moving_weights(px: Tensor, weight: float) -> Tensor:
    """Weights [B, f, 1, H, W], mean 1, that rise with the distance of pixels (or their neighbours) from the median.

    A ball of a pixel is nothing in a mean error, and everything in a game.
    """
    away = (px - px.median(1, keepdim=True).values).abs().amax(2)
    rising = 1 + weight * F.max_pool2d(away, 3, stride=1, padding=1)[:, :, None]
    return rising / rising.mean()


def changing(error: Tensor) -> Tensor:
    """Mean change [] of an error [B, f, 3, H, W] from frame to frame, of pixels and of blocks as `metrics.flicker` sees
    them; 0 for a single frame."""
    if error.shape[1] < 2:
        return error.new_zeros(())
    moved = error.diff(dim=1)
    return moved.abs().mean() + metrics.blocks(moved).abs().mean()


def flow(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Flow matching of a bidirectional network, one level per clip, with condition dropout. Source: 2210.02747."""
    b, f = x0.shape[:2]
    sigma = hold(cfg.noise.sample(b, 1, rng).expand(b, f).to(x0.device), batch.given)
    eps = randn_like(x0, rng)
    cond = batch.cond
    if cfg.drop:
        cond = cond.drop(draw(torch.rand, (b,), rng) >= cfg.drop)
    if cfg.drop_audio:
        cond = cond.mute(draw(torch.rand, (b,), rng) >= cfg.drop_audio)
    v = roles.student.velocity(add_noise(x0, eps, sigma), sigma, cond)
    return Loss(masked_mse(v, v_from(x0, eps), batch.given, channels=cfg.channel_weights))


def teacher_forcing(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Flow matching of every chunk given the true, clean history, in one masked forward. Source: 2412.07772.

    With `noisy_chunks` the chunks before the last so many are only history, compressed as the memory says.
    """
    student: CausalStudent = roles.student
    b, f = x0.shape[:2]
    first = clean_frames(student, f, cfg)
    sigma = hold(chunk_levels(student, cfg.noise, b, f, rng).to(x0.device), batch.given)
    eps = randn_like(x0, rng)
    v = forced(student, x0, add_noise(x0, eps, sigma), sigma, batch.cond, cfg.context_noise, rng, first)
    return Loss(masked_mse(v, v_from(x0, eps), max(batch.given, first), channels=cfg.channel_weights))


def diffusion_forcing(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Flow matching under the block-causal mask with an independent level per chunk. Source: 2407.01392.

    With `noisy_chunks` the chunks before the last so many are clean, and compressed as the memory says: what RELIC
    2512.04040 calls hybrid forcing.
    """
    student: CausalStudent = roles.student
    b, f = x0.shape[:2]
    clean = max(batch.given, clean_frames(student, f, cfg))
    sigma = hold(chunk_levels(student, cfg.noise, b, f, rng).to(x0.device), clean)
    eps = randn_like(x0, rng)
    v = student.block_causal(add_noise(x0, eps, sigma), sigma, batch.cond)
    return Loss(masked_mse(v, v_from(x0, eps), clean, channels=cfg.channel_weights))


def clean_frames(student: CausalStudent, frames: int, cfg: LossConfig) -> int:
    """Frames before the noisy chunks of a clip."""
    return student.first_frame(max(0, student.num_chunks(frames) - cfg.noisy_chunks)) if cfg.noisy_chunks else 0


def chunk_levels(student: CausalStudent, noise: NoiseSchedule, b: int, f: int, rng: AnyGenerator) -> Tensor:
    """Independent random levels per chunk, one per frame [b, f]."""
    chunk = student.chunk_of_frames(f)
    return noise.sample(b, int(chunk[-1]) + 1, rng)[:, chunk]


def forced(
    student: CausalStudent,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    cond: Condition,
    context: float,
    rng: Any,
    first: int = 0,
) -> Tensor:
    """Velocity [B, F, C, H, W] of noisy chunks, each given the chunks before it at level `context` (0 at level 0).

    Frames before `first` are only history; their velocity is zero.
    """
    history = torch.zeros_like(sigma)
    if context:
        history = torch.where(sigma > 0, torch.full_like(sigma, context), history)
        clean = add_noise(clean, randn_like(clean, rng), history)
    return student.teacher_forced(noisy, sigma, cond, clean, history, first)


def regression(
    roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator, index: Tensor | None = None
) -> Loss:
    """Regression of x0 from points of stored teacher trajectories, one level a chunk.

    `batch.x` [B, K + 1, F, C, H, W] holds the states at the K `levels` and, last, the sample. `index` [B, F] picks the
    state of each frame, K the sample itself, which is not scored; None draws it. Each chunk sees the clean sample
    before it, or (`history` noisy) the chunks before it as they are: half the tokens.
    Source: CausVid 2412.07772, section 4.3; noisy history as its code and Self Forcing's have it.
    """
    student: CausalStudent = roles.student
    target, (b, k, f) = batch.x[:, -1], batch.x.shape[:3]
    if index is None:
        chunk = student.chunk_of_frames(f)
        index = draw(torch.randint, (b, int(chunk[-1]) + 1), rng, k - 1)[:, chunk]
    index = index.to(target.device)
    noisy = torch.gather(batch.x, 1, index[:, None, :, None, None, None].expand(-1, 1, -1, *batch.x.shape[3:]))[:, 0]
    sigma = hold(torch.tensor((*cfg.levels, 0.0), device=target.device)[index], batch.given)
    noisy = torch.where(expand(sigma, noisy) > 0, noisy, target)
    if cfg.history == "noisy":
        v = student.block_causal(noisy, sigma, batch.cond)
    else:
        v = forced(student, target, noisy, sigma, batch.cond, cfg.context_noise, rng)
    error = by_channel((x0_from_v(noisy, v, sigma).float() - target.float()).square(), cfg.channel_weights)
    return Loss(error[sigma > 0].mean())


def noised_sample(student: CausalStudent, batch: Any, levels: tuple[float, ...], rng: AnyGenerator) -> Tensor:
    """The student's prediction [B, F, C, H, W] from real latents at an independent level a chunk, no rollout.

    What CausVid trains on instead of the student's own rollout. Source: 2412.07772, algorithm 1.
    """
    b, f = batch.x.shape[:2]
    chunk = student.chunk_of_frames(f)
    index = draw(torch.randint, (b, int(chunk[-1]) + 1), rng, len(levels))[:, chunk]
    sigma = hold(torch.tensor(levels)[index].to(batch.x.device), batch.given)
    noisy = add_noise(batch.x, randn_like(batch.x, rng), sigma)
    v = student.block_causal(noisy, sigma, batch.cond)
    return x0_from_v(noisy, v, sigma)


def score_level(x: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Tensor:
    """One random noise level per clip for the scores, as [B, F], 0 on given frames."""
    b, f = x.shape[:2]
    sigma = cfg.score_noise.sample(b, 1, rng).clamp(cfg.sigma_min, cfg.sigma_max)
    return hold(sigma.expand(b, f).to(x.device), batch.given)


def predict(
    net: Denoiser,
    x: Tensor,
    timestep: Tensor,
    sigma: Tensor,
    cond: Condition,
    guidance: float,
    audio: float = 0.0,
    floor: float = 0.0,
) -> Tensor:
    """Prediction x0 [B, F, C, H, W] of a score network, with guidance; `timestep` may differ from the noise `sigma`."""
    return x0_from_v(x, guided(net, x, timestep, cond, *branches(cond, guidance, audio), floor), sigma)


def both_scores(
    roles: Roles, x: Tensor, timestep: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise level [B, F] that is told as `timestep`, and what critic and teacher predict from `x` noised to it."""
    sigma = hold(cfg.score_noise.level(timestep), batch.given)
    noisy = add_noise(x, randn_like(x, rng), sigma)
    fake = predict(roles.critic, noisy, timestep, sigma, batch.cond, cfg.critic_guidance)
    real = predict(
        roles.teacher, noisy, timestep, sigma, batch.cond, cfg.guidance, cfg.audio_guidance, cfg.guidance_floor
    )
    return sigma, fake, real


@torch.no_grad()
def score_difference(
    roles: Roles, x: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator, timestep: Tensor | None = None
) -> dict[str, Tensor]:
    """What DMD is made of: the noise level, both predictions, and the normalised gradient (fake - real) on `x`.

    Source: DMD 2311.18828, eq. 7 and 8; normaliser of DMD2 2405.14867.
    """
    timestep = score_level(x, batch, cfg, rng) if timestep is None else timestep
    sigma, fake, real = both_scores(roles, x, timestep, batch, cfg, rng)
    g = batch.given
    scale = (x - real)[:, g:].abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    grad = (fake - real) / scale.clamp_min(1e-6)
    grad[:, :g] = 0.0
    return {"sigma": sigma, "fake": fake, "real": real, "grad": grad}


def pull(x: Tensor, grad: Tensor, given: int, mask: Tensor | None = None) -> Tensor:
    """A loss [] whose gradient on `x` is `grad` / (number of entries not given, and where `mask` is True)."""
    target = (x.double() - grad.double()).detach()
    error = (x.double() - target)[:, given:]
    return 0.5 * (error if mask is None else error[mask[:, given:]]).square().mean()


def dmd(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Distribution matching: pull the rollout `x0` along the difference of the scores. Source: 2311.18828, 2506.08009.

    Motion and regression terms are added where their weights are not zero. Source: Diagonal Distillation 2603.09488.
    So is teacher forcing on the recorded clip `batch.x`, whose history may be longer than what a rollout asks for.
    """
    score = score_difference(roles, x0.detach(), batch, cfg, rng)
    grad = score["grad"]
    logs = {"dmd_grad": grad[:, batch.given :].abs().mean()}
    trust: Tensor | float = 1.0  # in each clip
    if cfg.invalid_weight < 1:
        sound = valid_rollouts(x0.detach(), batch.x if batch.whole is None else batch.whole, batch.given)
        logs["invalid"] = 1 - sound.mean()
        trust = (cfg.invalid_weight + (1 - cfg.invalid_weight) * sound).view(-1, 1, 1, 1, 1)
    value = cfg.dmd * pull(x0, trust * by_channel(grad, cfg.channel_weights), batch.given).float()
    if cfg.motion:
        wanted = motion_gradient(x0.detach(), score["fake"], score["real"], batch.given)
        weight = motion_weights(wanted, cfg.motion_growth, cfg.motion_dynamic)
        wanted = trust * by_channel(wanted, cfg.channel_weights)
        value = value + cfg.motion * motion_pull(x0, wanted, weight, batch.given)
        logs["motion_grad"] = wanted.abs().mean()
    if cfg.regression:
        logs["regression"] = DISTANCES[cfg.distance](x0[:, batch.given :].float() - batch.target[:, batch.given :])
        value = value + cfg.regression * logs["regression"]
    if cfg.motion_head:
        logs["motion_head"] = roles.motion(motion(x0, batch.given), motion(batch.target, batch.given))
        value = value + cfg.motion_head * logs["motion_head"]
    if cfg.forcing:
        logs["forcing"] = teacher_forcing(roles, batch.x, batch, cfg, rng).value
        value = value + cfg.forcing * logs["forcing"]
    return Loss(value, {k: v.detach() for k, v in logs.items()})


EMPTY, FROZEN, FLICKER = 0.4, 0.2, 2.5  # of real clips' contrast, motion and change of motion


def valid_rollouts(x: Tensor, real: Tensor, given: int) -> Tensor:
    """1 for each clip [B] that is neither empty (black), frozen nor flickering beside the `real` ones, else 0.

    After KEPO: nothing is learnt from failed samples. The measures, in latent space, are ours.
    """

    def measured(clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = clip[:, given:].float()
        moved = motion(clip.float(), given)
        return (
            own.std(dim=(3, 4)).mean(dim=(1, 2)),
            moved.abs().mean(dim=(1, 2, 3, 4)),
            moved.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)),
        )

    (contrast, moves, changes), wanted = measured(x), [m.mean() for m in measured(real)]
    return ((contrast > EMPTY * wanted[0]) & (moves > FROZEN * wanted[1]) & (changes < FLICKER * wanted[2])).to(x)


def sid(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Score identity distillation, gradients through both scores. Source: 2404.04057, eq. 23; 2506.08009."""
    timestep = score_level(x0, batch, cfg, rng)
    _, fake, real = both_scores(roles, x0, timestep, batch, cfg, rng)
    g = batch.given
    scale = (x0 - real)[:, g:].abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach().clamp_min(1e-6)
    gap = real - fake
    value = gap * ((real - x0) - cfg.sid_alpha * gap) / scale
    return Loss(value[:, g:].mean(), {"sid_gap": gap[:, g:].abs().mean().detach()})


def critic_flow(roles: Roles, x0: Tensor, batch: Any, cfg: LossConfig, rng: AnyGenerator) -> Loss:
    """Flow matching of the critic on the student's samples `x0`, at the levels the scores are taken at."""
    timestep = score_level(x0, batch, cfg, rng)
    sigma = hold(cfg.score_noise.level(timestep), batch.given)
    eps = randn_like(x0, rng)
    v = roles.critic.velocity(add_noise(x0, eps, sigma), timestep, batch.cond)
    return Loss(masked_mse(v, v_from(x0, eps), batch.given, channels=cfg.channel_weights))


@dataclass(frozen=True)
class Objective:
    """Losses of a stage; `on_policy`: x0 is the student's own rollout, else data."""

    student: LossFn
    critic: LossFn | None = None
    on_policy: bool = False

    def loss_of(self, role: str) -> LossFn:
        """The loss of a role that this stage trains."""
        fn = self.critic if role == "critic" else self.student
        assert fn is not None
        return fn


OBJECTIVES = {
    "codec": Objective(reconstruction),
    "flow": Objective(flow),
    "teacher_forcing": Objective(teacher_forcing),
    "diffusion_forcing": Objective(diffusion_forcing),
    "regression": Objective(regression),
    "dmd": Objective(dmd, critic_flow, on_policy=True),
    "sid": Objective(sid, critic_flow, on_policy=True),
}
