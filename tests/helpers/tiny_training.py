"""Tiny data folders and training stages: seconds, not minutes."""

from dataclasses import replace

import torch
from conftest import ACTIONS, DIT, SCHEDULE, SHAPE, STUDENT, random_dit

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodecConfig
from vidistill.data.shards import write_shards
from vidistill.schedules import ScheduleConfig
from vidistill.training.config import TrainConfig
from vidistill.training.losses import LossConfig
from vidistill.training.optim import OptimConfig

FRAMES = 7  # chunks of 1, 3, 3
NUM_ACTIONS = 4 * len(ACTIONS) + 1
OPTIM = OptimConfig(lr=1e-3, muon="blocks.*weight", warmup=2, decay=0.5)
CODEC = TinyCodecConfig(latent_channels=4, encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))


def write_latents(folder, *, episodes=6, length=16, channels=SHAPE.channels, dtype=torch.float16):
    """Random latent episodes of the tiny world."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(episodes, length, channels, SHAPE.height, SHAPE.width, generator=rng)
    actions = torch.rand(episodes, length, NUM_ACTIONS, generator=rng).round()
    actions[..., -1] = 1.0
    images = latents + 0.1 * torch.randn(latents.shape, generator=rng)
    tensors = {"latents": latents.to(dtype), "images": images.to(dtype), "actions": actions}
    meta = {"fps": 17.5, "actions": list(ACTIONS), "px_size": 16}
    write_shards(folder, [(tensors, [{"seed": k} for k in range(episodes)])], meta)
    return folder


def write_frames(folder, *, episodes=4, length=9, side=16):
    """Random pixel episodes."""
    rng = torch.Generator().manual_seed(3)
    frames = torch.randint(0, 256, (episodes, length, side, side, 3), generator=rng, dtype=torch.uint8)
    write_shards(folder, [({"frames": frames}, [{"seed": k} for k in range(episodes)])], {"fps": 17.5})
    return folder


def write_teacher(path, seed=0):
    """A tiny teacher with a head that is not zero."""
    shape = {"frames": FRAMES, "channels": SHAPE.channels, "height": SHAPE.height, "width": SHAPE.width}
    record = {"noise": {"shift": 2.0}, "shape": shape, "codec": None, "card": {}}
    checkpoint.export(path, random_dit(DIT, seed), record, torch.float32)
    return path


def flow_stage(root, **settings):
    """Flow matching of a tiny teacher; data is written on first use."""
    data = root / "latents"
    if not data.is_dir():
        write_latents(data)
    base = TrainConfig(
        "flow",
        "flow",
        str(data),
        steps=6,
        batch=2,
        frames=FRAMES,
        dit=DIT,
        optim=OPTIM,
        ema=0.9,
        out=str(root / "runs"),
    )
    return replace(base, **settings)


def codec_stage(root, **settings):
    """Reconstruction by a tiny codec."""
    data = root / "frames"
    if not data.is_dir():
        write_frames(data)
    optim = replace(OPTIM, muon="conv|encoder.*weight")
    base = TrainConfig(
        "codec",
        "codec",
        str(data),
        steps=6,
        batch=2,
        frames=5,
        codec_config=CODEC,
        optim=optim,
        ema=0.9,
        out=str(root / "runs"),
    )
    return replace(base, **settings)


def dmd_stage(root, **settings):
    """Distribution matching of a tiny student to a tiny teacher."""
    teacher = root / "teacher"
    if not checkpoint.with_extension(teacher, ".json").is_file():
        write_teacher(teacher)
    schedule = ScheduleConfig(levels=tuple(SCHEDULE["levels"]), given_chunks=1)
    base = flow_stage(
        root,
        name="dmd",
        objective="dmd",
        teacher=str(teacher),
        student=STUDENT,
        schedule=schedule,
        critic_steps=1,
        loss=LossConfig(guidance=2.0),  # else a fresh critic equals the teacher and nothing pulls
        critic_optim=replace(OPTIM, lr=2e-3),
    )
    return replace(base, **settings)


def rolled(trainer, batch=None, grad=False):
    """The rollout of the trainer's present step for its batch, or another one."""
    step = trainer.step_count
    turn = replace(trainer.cfg.turn(step, trainer.loss), role="student" if grad else "critic")
    return trainer.samplers[0].roll(trainer.batch(step) if batch is None else batch, turn.rng(), turn)


def backward(trainer, batch=None):
    """The loss of the student at the trainer's present step, its gradients left in the network."""
    turn, sampler = replace(trainer.cfg.turn(trainer.step_count, trainer.loss), role="student"), trainer.samplers[0]
    rng = turn.rng()
    sample = sampler(trainer.batch(turn.step) if batch is None else batch, rng, turn)
    loss = trainer.objective.student(trainer.roles, sample.x0, sample.batch, turn.loss, rng)
    sampler.backward(loss.value, sample)
    return loss
