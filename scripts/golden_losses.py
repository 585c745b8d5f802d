"""Goldens of training: the rollout with exit steps and its gradients, distribution matching, and the other losses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from golden import Draws, Golden
from golden_networks import grad_norms, grad_of, network, text
from golden_rollouts import Run, live, variant_memory
from torch import Tensor
from wan_tables import Table, TableScore, on_table, warp_timestep

from vidistill.conditioning.condition import Condition
from vidistill.data.types import Batch
from vidistill.diffusion import LatentShape, v_from
from vidistill.interop.tables import GRID
from vidistill.models.dit import VideoDiT
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.rollout import rollout
from vidistill.schedules import Pass, ScheduleConfig, chunk_passes, context_pass, exit_at
from vidistill.training.losses import (
    LossConfig,
    Roles,
    critic_flow,
    dmd,
    masked_mse,
    pull,
    regression,
    score_difference,
    sid,
)

LEAK = "gradient of later chunks leaks into earlier ones through the cache; our history is frozen (grad_detached)"


def training_rollout(golden: Golden) -> None:
    golden.each_variant(train)


def exit_passes(run: Run, chunks: int, given_chunks: int, exits: list[int], total: int) -> Iterator[Pass]:
    """Passes of a training rollout: each chunk stops at its exit step; only the last frames carry gradient."""
    cfg = ScheduleConfig(context="clean", context_sigma=run.variant["context_noise"] / GRID, given_chunks=given_chunks)
    reach = total - run.golden.config.get("last_gradient_frames", total)
    for chunk in range(chunks):
        if chunk < given_chunks:
            yield context_pass(chunk, cfg)
            continue
        levels = [t / GRID for t in run.steps(chunk - given_chunks)]
        passes = on_table(chunk_passes(chunk, levels, cfg), run.table, noise_context=True)
        for p in exit_at(list(passes), exits[chunk - given_chunks], complete=False):
            yield replace(p, grad=p.grad and run.student.first_frame(chunk) >= reach)


def from_to(run: Run, exits: list[int]) -> list[int]:
    """Un-warped labels of the interval a shared exit step lies in; -1 where chunks exit differently."""
    if run.variant.get("same_step_across_blocks") is False:
        return [-1, -1]
    levels = run.steps(0)
    labels = [GRID - int(run.table.index(t)) for t in levels]
    return [labels[exits[0]], labels[exits[0] + 1] if exits[0] + 1 < len(labels) else 0]


def start_training(
    golden: Golden, name: str, variant: dict[str, Any], frames: int, batch: int, prefix: str, arch: dict[str, Any]
) -> Run:
    """A student with the variant's chunks and table; its window, as in training there, has no sinks."""
    cfg = golden.config
    net = network(golden.weights, arch, prefix)
    table = Table(shift=cfg.get("timestep_shift", cfg.get("generator_scheduler_shift")))
    given = golden.io.get(f"in.{name}.initial_latent")
    hw = golden.given(f"{name}.noise").shape[-3:] if f"in.{name}.noise" in golden.io else variant["chw"]
    student = CausalStudent(
        net,
        StudentConfig(
            chunk=variant["num_frame_per_block"],
            first_chunk=1 if variant["independent_first_frame"] or given is not None else 0,  # one frame is given there
            memory=variant_memory({**variant, "sink_size": 0}, frames, infinite=False),
        ),
        LatentShape(frames, *hw, patch=net.cfg.patch),
    )
    steps = [s for s in variant["denoising_step_list"] if s]
    levels = table.warp_steps(steps) if cfg["warp_denoising_step"] else tuple(map(float, steps))
    cond = text(golden, slice(0, batch), arch)
    run = Run(golden, name, variant, student, student.new_memory(batch), table, [cond], [levels], [False])
    run.watch()
    return run


def train(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    """One training rollout, its loss against a target, and the loss's gradients."""
    noise = golden.given(f"{name}.noise").requires_grad_()
    given = golden.io.get(f"in.{name}.initial_latent")
    clip = noise if given is None else torch.cat((given, noise), dim=1)
    total = clip.shape[1]
    run = start_training(golden, name, variant, total, clip.shape[0], "", golden.config["transformer"])
    student = run.student
    given_chunks = 0 if given is None else student.num_chunks(given.shape[1])
    chunks, exits = student.num_chunks(total), variant["exit_flags"]
    if variant.get("same_step_across_blocks", True):
        exits = exits[:1] * (chunks - given_chunks)
    passes = live(run, exit_passes(run, chunks, given_chunks, exits, total), given_chunks)
    latents = torch.cat(
        list(
            rollout(
                student,
                passes,
                noise=lambda c: clip[:, student.first_frame(c) : student.first_frame(c + 1)],
                cond=run.cond,
                memory=run.memory,
                rng=golden.draws(f"{name}.draw"),
            )
        ),
        dim=1,
    )
    loss = F.mse_loss(latents, golden.given(f"{name}.target"))
    loss.backward()
    golden.compare(f"{name}.latents", latents)
    golden.compare(f"{name}.loss", loss)
    golden.compare(f"{name}.denoised_timestep_from_to", from_to(run, exits))
    run.compare_calls()
    detached = f"{name}.grad_detached."
    golden.compare(f"{detached}norms", grad_norms(student.net, golden.config["parameter_order_of_grad_norms"]))
    golden.compare(f"{detached}noise", noise.grad if noise.grad is not None else torch.zeros_like(noise))
    for full in golden.wanted(detached):
        part = full.removeprefix(detached)
        if part not in ("norms", "noise"):
            golden.compare(full, grad_of(student.net, part, golden.want(full).shape))
    for leak in golden.wanted(f"{name}.grad_upstream"):
        golden.decline(leak, LEAK)


# --- distribution matching --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded(Table):
    """The generator's table, whose random draws are the recorded timesteps."""

    drawn: tuple[float, ...] = ()

    def sample(self, b: int, f: int, rng: Any, lo: float = 0.0, hi: float = 1.0) -> Tensor:
        return torch.tensor(self.drawn, dtype=torch.float64)[:, None].expand(b, f) / GRID


@dataclass
class Scores:
    """Both scores, what they were asked, and the settings of a variant's loss."""

    golden: Golden
    real: VideoDiT
    fake: VideoDiT
    roles: Roles
    cfg: LossConfig
    timesteps: Tensor
    seen: dict[str, list[tuple[Tensor, Tensor]]]  # network -> (input, velocity) of each branch, in call order

    @torch.no_grad()
    def ask_unguided(self, cond: Condition) -> None:
        """The original asks the real score without a prompt even where guidance gives that no weight; ours does not."""
        if len(self.seen["real"]) == 1:
            x = self.seen["real"][0][0]
            told = self.timesteps[:, None].expand(x.shape[:2]) / GRID
            self.real.velocity(x, told, replace(cond, tokens=cond.negative, negative=None))

    def compare(self, prefix: str, shape: torch.Size) -> None:
        """The networks' inputs and outputs; 0 fake cond, 1 fake uncond, 2 real cond, 3 real uncond."""
        golden, names = self.golden, ("fake_cond", "fake_uncond", "real_cond", "real_uncond")
        own = Table(shift=score_shift(golden.config))
        order = []
        for net, first in (("fake", 0), ("real", 2)):
            for i, (x, v) in enumerate(self.seen[net]):
                order.append(first + i)
                told = self.timesteps[:, None].expand(x.shape[:2])
                golden.compare(f"{prefix}.{names[first + i]}.flow", v)
                golden.compare(f"{prefix}.{names[first + i]}.x0", own.x0(x, v, told))
                golden.compare(f"{prefix}.noisy", x)
        golden.compare(f"{prefix}.timestep", self.timesteps[:, None].expand(shape[:2]))
        golden.compare(f"{prefix}.call_order", order)


def score_shift(cfg: dict[str, Any]) -> float:
    return cfg.get("score_scheduler_shift", cfg.get("real_and_fake_score_timestep_shift"))


def scores(golden: Golden, archs: dict[str, Any], raw: list[int], shift: float, **settings: float) -> Scores:
    """Score networks on their own table, noise on the generator's, at the recorded timesteps."""
    cfg = golden.config
    real, fake = (network(golden.weights, archs[f"{net}_score"], f"{net}_score.") for net in ("real", "fake"))
    timesteps = warp_timestep(torch.tensor(raw), shift, cfg["min_step"], cfg["max_step"])
    timesteps = timesteps.float().double()
    table = Recorded(
        shift=cfg.get("generator_scheduler_shift", cfg.get("generator_timestep_shift")),
        drawn=tuple(timesteps.tolist()),
    )
    own = Table(shift=score_shift(cfg))
    roles = Roles(student=None, teacher=TableScore(real, own, table), critic=TableScore(fake, own, table))
    loss = LossConfig(score_noise=table, sigma_min=cfg["min_step"] / GRID, sigma_max=cfg["max_step"] / GRID, **settings)
    seen: dict[str, list] = {"real": [], "fake": []}
    for name, net in (("real", real), ("fake", fake)):

        def hook(_net: Any, args: tuple, out: Tensor, name: str = name) -> None:
            b = len(raw)
            pairs = zip(args[0].detach().split(b), out.detach().split(b), strict=True)
            seen[name].extend(pairs)

        net.register_forward_hook(hook)
    return Scores(golden, real, fake, roles, loss, timesteps, seen)


def prompts(golden: Golden, arch: dict[str, Any], batch: int) -> Condition:
    """Conditional prompts whose unconditional counterpart is the recorded negative one."""
    cond = text(golden, slice(0, batch), arch)
    negative = text(golden, slice(0, 1), arch, "negative_embeds").tokens
    assert negative is not None
    return replace(cond, negative=negative.expand(batch, -1, -1))


def distribution_matching(golden: Golden) -> None:
    golden.each_variant(match_student)
    golden.each_variant(match_critic)


def rolled_out(golden: Golden, name: str, variant: dict[str, Any], turn: str, draws: Draws) -> tuple[Tensor, Any]:
    """The samples a loss is taken on: recorded latents, or the student's own rollout (with its student)."""
    if not variant["end_to_end"]:
        return golden.given(f"{name}.latents").clone().requires_grad_(), None
    frames = variant["num_frames"]
    full = {
        **variant,
        "denoising_step_list": golden.config["denoising_step_list"],
        "independent_first_frame": variant.get("independent_first_frame", False),
        "local_attn_size": -1,
        "context_noise": golden.config.get("context_noise", 0),
        "chw": (golden.config["transformers"]["generator"]["in_dim"], *variant["latent_hw"]),
    }
    arch = golden.config["transformers"]["generator"]
    run = start_training(golden, name, full, frames, variant["batch"], "generator.", arch)
    exit_step = variant[f"exit_step_{'generator' if turn == 'gen' else 'critic'}"]
    chunks = run.student.num_chunks(frames)
    noise = draws(torch.empty(variant["batch"], frames, *full["chw"]))
    passes = exit_passes(run, chunks, 0, [exit_step] * chunks, frames)
    first = run.student.first_frame
    parts = rollout(
        run.student,
        passes,
        noise=lambda c: noise[:, first(c) : first(c + 1)],
        cond=run.cond,
        memory=run.memory,
        rng=draws,
    )
    x = torch.cat(list(parts), dim=1)
    golden.compare(f"{name}.{turn}.latents", x)
    golden.compare(f"{name}.{turn}.denoised_timestep_from_to", from_to(run, [exit_step] * chunks))
    return x, run.student.net


def variant_scores(golden: Golden, variant: dict[str, Any], turn: str) -> Scores:
    raw = variant[f"raw_randint_t_{'generator' if turn == 'gen' else 'critic'}"]
    return scores(
        golden,
        golden.config["transformers"],
        raw,
        variant["timestep_shift_of_random_t"],
        guidance=1 + variant["guidance_scale_real"],  # the original counts from the conditional prediction
        critic_guidance=1 + variant["guidance_scale_fake"],
    )


def match_student(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    """The generator loss of DMD and its gradient."""
    draws = golden.draws(f"{name}.gen.draw")
    x, net = rolled_out(golden, name, variant, "gen", draws)
    parts = variant_scores(golden, variant, "gen")
    batch = Batch(x, prompts(golden, golden.config["transformers"]["fake_score"], x.shape[0]))
    if variant["gradient_mask"]:
        grad = score_difference(parts.roles, x.detach(), batch, parts.cfg, draws)["grad"]
        loss = pull(x, grad, 0, golden.given(f"{name}.gradient_mask").bool())
        logged = grad.abs().mean()
    else:
        result = dmd(parts.roles, x, batch, parts.cfg, draws)
        loss, logged = result.value, result.logs["dmd_grad"]
    loss.backward()
    prefix = f"{name}.gen"
    parts.ask_unguided(batch.cond)
    parts.compare(prefix, x.shape)
    golden.compare(f"{prefix}.loss", loss)
    golden.compare(f"{prefix}.dmdtrain_gradient_norm", logged)
    if net is None:
        golden.compare(f"{prefix}.grad_latents", x.grad)
        return
    detached = f"{prefix}.grad_detached."
    order = golden.config["parameter_order_of_generator_grad_norms"]
    golden.compare(f"{detached}generator_norms", grad_norms(net, order))
    for full in golden.wanted(detached):
        if not full.endswith("generator_norms"):
            key = full.removeprefix(detached).removeprefix("generator.")
            golden.compare(full, grad_of(net, key, golden.want(full).shape))
    for leak in golden.wanted(f"{prefix}.grad_upstream"):
        golden.decline(leak, LEAK)


def match_critic(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    """The critic's loss on its own rollout, and its gradient."""
    draws = golden.draws(f"{name}.critic.draw")
    with torch.no_grad():
        x, _ = rolled_out(golden, name, variant, "critic", draws)
    parts = variant_scores(golden, variant, "critic")
    batch = Batch(x.detach(), prompts(golden, golden.config["transformers"]["fake_score"], x.shape[0]))
    loss = critic_flow(parts.roles, x.detach(), batch, parts.cfg, draws).value
    loss.backward()
    prefix = f"{name}.critic"
    parts.compare(prefix, x.shape)
    golden.compare(f"{prefix}.loss", loss)
    order = golden.config["parameter_order_of_fake_grad_norms"]
    golden.compare(f"{prefix}.grad_fake_norms", grad_norms(parts.fake, order))
    for full in golden.wanted(f"{prefix}.grad_fake."):
        golden.compare(full, grad_of(parts.fake, full.removeprefix(f"{prefix}.grad_fake."), golden.want(full).shape))


# --- SiD, regression, diffusion and teacher forcing -------------------------------------------------------------------


def losses(golden: Golden) -> None:
    for tag, alpha in golden.config["sid_alpha"].items():
        with golden.guarded(f"{tag}."):
            score_identity(golden, tag, alpha)
    with golden.guarded("ode."):
        regress(golden)
    for tag in ("diffusion_forcing", "teacher_forcing", *golden.config.get("noise_augmentation_max_timestep", {})):
        with golden.guarded(f"{tag}."):
            if golden.wanted(f"{tag}."):
                force(golden, tag)


def order_of(golden: Golden, net: str) -> list[str]:
    order = golden.config["parameter_order_of_grad_norms"]
    return order[net] if isinstance(order, dict) else order


def score_identity(golden: Golden, tag: str, alpha: float) -> None:
    cfg = golden.config
    raws = cfg["raw_integer_timesteps"]
    raw = raws.get(tag, raws.get("sid"))  # one for all samples, or one each
    archs = {"real_score": cfg["transformer"], "fake_score": cfg["transformer"]}
    x = golden.given("latents").clone().requires_grad_()
    parts = scores(
        golden,
        archs,
        raw if isinstance(raw, list) else [raw] * x.shape[0],
        cfg["loss_timestep_shift"],
        guidance=1 + cfg["guidance_scale"],
        sid_alpha=alpha,
    )
    batch = Batch(x, prompts(golden, cfg["transformer"], x.shape[0]))
    loss = sid(parts.roles, x, batch, parts.cfg, golden.draws(f"{tag}.draw")).value
    loss.backward()
    golden.compare(f"{tag}.loss", loss)
    golden.compare(f"{tag}.grad_latents", x.grad)
    golden.compare(f"{tag}.fake_grad_norms", grad_norms(parts.fake, order_of(golden, "fake_score")))
    parts.ask_unguided(batch.cond)
    parts.compare(tag, x.shape)


def student_for(golden: Golden, x: Tensor) -> tuple[CausalStudent, Table]:
    cfg = golden.config
    net = network(golden.weights, cfg["transformer"], "generator.")
    memory = variant_memory({"local_attn_size": -1}, x.shape[1], infinite=False)
    shape = LatentShape(x.shape[1], *x.shape[2:], patch=net.cfg.patch)
    student = CausalStudent(net, StudentConfig(chunk=cfg["num_frame_per_block"], memory=memory), shape)
    return student, Table(shift=cfg["generator_timestep_shift"])


class TableStudent:
    """A student whose velocities are read with a table of noise levels, although its timesteps lie between entries."""

    def __init__(self, student: CausalStudent, table: Table) -> None:
        self.student, self.table = student, table
        self.velocities: list[Tensor] = []

    def block_causal(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        v = self.student.block_causal(x, sigma, cond)
        self.velocities.append(v)
        ratio = torch.where(sigma > 0, self.table.sigma(sigma * GRID) / sigma.double(), 1.0)
        return (v.double() * ratio[..., None, None, None]).to(v.dtype)


def regress(golden: Golden) -> None:
    """Regression of x0 from points of stored trajectories, one level a chunk; level 0 is not counted."""
    cfg, states, index = golden.config, golden.given("ode.trajectory"), golden.given("ode.index")
    student, table = student_for(golden, states[:, 0])
    steps = [s for s in cfg["denoising_step_list"] if s]
    levels = table.warp_steps(steps) if cfg["warp_denoising_step"] else tuple(map(float, steps))
    cond = text(golden, slice(0, states.shape[0]), cfg["transformer"], "ode.prompt_embeds")
    told = TableStudent(student, table)
    settings = LossConfig(levels=tuple(t / GRID for t in levels), history="noisy")
    loss = regression(Roles(told), states, Batch(states, cond), settings, torch.Generator(), index).value
    loss.backward()
    t = torch.tensor([*levels, 0.0], dtype=torch.float64)[index]
    x = torch.gather(states, 1, index[:, None, :, None, None, None].expand(-1, 1, -1, *states.shape[3:]))[:, 0]
    x0 = table.x0(x, told.velocities[0].detach(), t)
    golden.compare("ode.input", x)
    golden.compare("ode.output", x0)
    golden.compare("ode.timestep_per_frame", t)
    golden.compare("ode.loss", loss)
    golden.compare("ode.unnormalized", (x0 - states[:, -1]).square().mean(dim=(1, 2, 3, 4)))
    golden.compare("ode.grad_norms", grad_norms(student.net, order_of(golden, "generator")))


def force(golden: Golden, tag: str) -> None:
    """Flow matching on data under the block-causal or the teacher-forcing mask, with the table's training weights."""
    cfg, clean = golden.config, golden.given("ode.trajectory")[:, -1]
    student, table = student_for(golden, clean)
    t = table.timesteps[golden.given("df.index")]
    eps = golden.draws(f"{tag}.draw")(clean)
    noisy = table.add_noise(clean, eps, t)
    cond = text(golden, slice(0, clean.shape[0]), cfg["transformer"], "ode.prompt_embeds")
    if tag == "diffusion_forcing":
        v = student.net(noisy, t.double() / GRID, cond, causal=student.causal_mask(clean.shape[1]))
    else:
        augmented = tag in cfg.get("noise_augmentation_max_timestep", {})
        context = table.timesteps[golden.given("df.aug_index")] if augmented else torch.zeros_like(t)
        history = table.add_noise(clean, eps, context) if augmented else clean
        v = student.teacher_forced(noisy, t.double() / GRID, cond, history, context.double() / GRID)
    loss = masked_mse(v, v_from(clean, eps), 0, table.weight(t / GRID))
    loss.backward()
    golden.compare(f"{tag}.loss", loss)
    golden.compare(f"{tag}.x0_pred", table.x0(noisy, v, t))
    golden.compare(f"{tag}.grad_norms", grad_norms(student.net, order_of(golden, "generator")))
