"""The networks of a stage: made or loaded, checked against its data, adapted, sharded; and whole again for export."""

from typing import Any

import torch
from torch import nn

from vidistill import checkpoint, distributed
from vidistill.codecs.tiny import TinyCodec
from vidistill.data.prompts import Prompts
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.models.dit import VideoDiT, extend, recomputing
from vidistill.models.lora import LoraConfig, add_lora, merge_lora
from vidistill.models.student import CausalStudent, core
from vidistill.ops.precision import DTYPES, working_dtype
from vidistill.teachers.wan import architecture_of
from vidistill.training.config import TrainConfig, check_network
from vidistill.training.losses import OBJECTIVES, Roles
from vidistill.training.motion import MotionHead


def is_split(cfg: TrainConfig) -> bool:
    """Whether every process holds its shards of the networks alone."""
    return cfg.parallel == "shard" and distributed.world_size() > 1


def load_network(cfg: TrainConfig, name: str, kind: str | None = None) -> Any:
    """The network of a checkpoint, or that of its student; it recomputes its blocks if this stage does.

    Networks that are split wait in their file, in its precision: see `prepare`.
    """
    net = core(checkpoint.load(name, kind, None if is_split(cfg) else torch.float32).net)
    return recomputing(net) if cfg.dit.checkpoint and isinstance(net, VideoDiT) else net


def latent_size(cfg: TrainConfig, data: Any, channels: int) -> tuple[int, int, int]:
    """Channels, height and width of a latent frame: those of the data, those of the stage where it has none."""
    if not isinstance(data, Prompts):
        size: tuple[int, int, int] = data.latent_size
        return size
    if not all(cfg.latent_size):
        raise ValueError(f"{cfg.data} holds prompts alone: set latent_size=[HEIGHT, WIDTH], in latents")
    return (channels, *cfg.latent_size)


def make_roles(cfg: TrainConfig, data: Any) -> tuple[Roles, LatentShape | None, NoiseSchedule]:
    """The networks of a stage, the shape of its latents, and the noise schedule its teacher samples with."""
    if cfg.objective == "codec":
        codec = checkpoint.load(cfg.init, "codec").net if cfg.init else TinyCodec(cfg.codec_config)
        return Roles(codec.requires_grad_(True).train()), None, cfg.loss.noise
    name = cfg.init or cfg.teacher
    net = load_network(cfg, name) if name else VideoDiT(cfg.dit)
    if not isinstance(net, VideoDiT):
        raise checkpoint.CheckpointError(f"{name} is a {type(net).__name__}; one network is needed to start from")
    net = extend(net, cfg.dit).requires_grad_(True).train()
    size = latent_size(cfg, data, net.cfg.channels)
    check_network(cfg, data, size, name or "dit", net.cfg)
    shape = LatentShape(cfg.frames, *size, net.cfg.patch)
    if cfg.objective == "flow":
        return Roles(net), shape, cfg.loss.noise
    student = CausalStudent(net, cfg.student, shape).train()
    if not OBJECTIVES[cfg.objective].critic:
        return Roles(student), shape, cfg.loss.noise
    assert cfg.teacher
    critic_name = cfg.critic_init or cfg.teacher
    teacher = checkpoint.load(cfg.teacher, "teacher", None if is_split(cfg) else working_dtype(cfg.teacher_precision))
    critic = load_network(cfg, critic_name, "teacher").requires_grad_(True).train()
    if not isinstance(critic, VideoDiT):
        raise ValueError(f"{critic_name} is no single network: name one in critic_init for the critic")
    for scorer_name, scorer in ((cfg.teacher, teacher.net), (critic_name, critic)):
        if dit := architecture_of(scorer):
            check_network(cfg, data, latent_size(cfg, data, dit.channels), scorer_name, dit)
    noise = teacher.noise if "noise" in teacher.record else NoiseSchedule()
    motion = MotionHead(shape.channels) if cfg.loss.motion_head else None
    return Roles(student, teacher.net, critic, motion), shape, noise


def prepare(cfg: TrainConfig, roles: Roles, device: torch.device) -> None:
    """Add LoRA where it is asked for, move networks to `device`, split their work and weights among processes."""
    group = distributed.sequence_group(cfg.sequence)
    for net, lora in ((roles.student, cfg.lora), (roles.critic, cfg.critic_lora), (roles.teacher, LoraConfig())):
        if net is None:
            continue
        inner: VideoDiT = core(net)
        dtype = working_dtype(cfg.teacher_precision) if net is roles.teacher else torch.float32
        aside = distributed.SetAside(inner, dtype) if is_split(cfg) else None
        if aside is None:
            net.to(device)
        add_lora(inner, lora)
        for part in inner.modules():  # a teacher may be several, or a foreign one: each process then runs all of it
            if group is not None and isinstance(part, VideoDiT):
                part.split_sequence(group)
        if cfg.parallel == "shard":
            distributed.shard(inner, inner.units, DTYPES[cfg.gather], cfg.shard_group, aside)
        if cfg.compile and not (net is roles.student and cfg.rolls):  # every memory a new shape
            inner.compile_regions()
    if roles.motion is not None:
        roles.motion.to(device)


def whole_weights(net: nn.Module, lora: LoraConfig, name: str) -> nn.Module:
    """A trained network in whole, plain weights on rank 0: shards gathered, LoRA merged. Every rank must ask."""
    if not lora.rank and not any(distributed.is_sharded(p) for p in net.parameters()):
        return net
    state = distributed.whole_state(net)
    plain = checkpoint.rebuild(checkpoint.describe(net))
    add_lora(core(plain), lora)
    if distributed.rank() == 0:
        checkpoint.load_into(plain, state, name)
    merge_lora(core(plain))
    return plain
