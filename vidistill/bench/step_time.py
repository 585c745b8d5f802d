"""How long a step of a stage takes on so many GPUs, from the operations of its passes and a stated utilisation."""

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

import torch

from vidistill.bench.cost import pass_flops
from vidistill.conditioning.condition import Condition, branches
from vidistill.diffusion import LatentShape
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.models.student import CausalStudent
from vidistill.schedules import training
from vidistill.training.config import TrainConfig
from vidistill.training.losses import OBJECTIVES

PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 or H200, NVIDIA's data sheet
UTILISATION = 0.4  # of it, that large transformers are trained at
BACKWARD = 2.0  # of a forward pass; recomputed blocks are another one
EXITS = 64  # rollouts whose random exits are averaged


def clip_flops(cfg: TrainConfig, dits: Mapping[str, DiTConfig], student: CausalStudent, seen: int) -> dict[str, float]:
    """FLOPs of one clip in a turn of each role. `student`: of the stage's shape, for its chunks; `seen`: latent frames
    of a pass over a recorded clip. What a mask hides is counted in full."""
    shape, guided = student.shape, len(branches(Condition(), cfg.loss.guidance, cfg.loss.audio_guidance)[0])
    with_grad = 1 + BACKWARD + cfg.dit.checkpoint

    def whole(role: str, frames: int) -> float:
        of = LatentShape(frames, shape.channels, shape.height, shape.width, shape.patch)
        return sum(pass_flops(dits[role], of, frames, frames * shape.tokens_per_frame).values())

    objective = OBJECTIVES[cfg.objective]
    if objective.critic is None:
        return {"student": with_grad * whole("student", seen)}
    clip = {role: whole(role, cfg.frames) for role in dits}
    scores = (1 + guided) * clip["teacher"] + clip["critic"]
    if cfg.objective == "sid":  # gradient runs through both scores, whose weights are frozen
        scores += BACKWARD / 2 * ((1 + guided) * clip["teacher"] + clip["critic"])
    if cfg.rolls:
        rolled, learned = rollout_flops(cfg, dits["student"], student)
    else:
        rolled, learned = clip["student"], clip["student"]
    critic = rolled / cfg.critic_reuse + with_grad * clip["critic"]
    extra = with_grad * whole("student", 2 * cfg.frames) if cfg.loss.forcing else 0.0
    if cfg.loss.needs_target:
        extra += cfg.loss.target_steps * (1 + guided) * clip["teacher"]
    again = 1 if cfg.replay else 0  # passes that carry gradient run once more
    return {"student": rolled + (with_grad - 1 + again) * learned + scores + extra, "critic": critic}


def rollout_flops(cfg: TrainConfig, dit: DiTConfig, student: CausalStudent) -> tuple[float, float]:
    """FLOPs of all passes of a rollout, and of those that carry gradient, over random exits."""
    shape, chunk = student.shape, cfg.student.chunk
    one = pass_flops(dit, shape, chunk, chunk * shape.tokens_per_frame)
    own, grid = one.pop("self_attention"), shape.grid
    everything, graded = 0.0, 0.0
    for seed in range(EXITS):
        for p in training(cfg.schedule, student.num_chunks(cfg.frames), Random(seed)):
            stop = student.first_frame(p.chunk) + chunk
            tokens = min(stop * shape.tokens_per_frame, cfg.student.memory.tokens(grid))
            flops = len(p.sigma) * (sum(one.values()) + own * tokens / (chunk * shape.tokens_per_frame))
            everything, graded = everything + flops, graded + flops * p.grad
    return everything / EXITS, graded / EXITS


def estimate(
    cfg: TrainConfig, dits: Mapping[str, DiTConfig], size: tuple[int, int], seen: int, gpus: int
) -> dict[str, Any]:
    """Seconds of a step, the mean over the turns of all roles, and hours of the stage on so many GPUs.

    An estimate: operations over PEAK x UTILISATION; reading, encoding and communication are left out.
    """
    shape = LatentShape(cfg.frames, dits["student"].channels, *size, dits["student"].patch)
    with torch.device("meta"):
        student = CausalStudent(VideoDiT(replace(dits["student"], layers=1)), cfg.student, shape)
    flops = clip_flops(cfg, dits, student, seen)
    of_student = sum(cfg.is_student_turn(step) for step in range(cfg.steps))
    turns = {"student": of_student, "critic": cfg.steps - of_student}
    total = sum(turns[role] * cfg.batch * of_clip for role, of_clip in flops.items())
    hours = total / (gpus * PEAK * UTILISATION) / 3600
    return {"seconds_per_step": 3600 * hours / cfg.steps, "hours": hours, "utilisation": UTILISATION}
