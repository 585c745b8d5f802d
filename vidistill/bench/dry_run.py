"""A training stage rehearsed on tiny random networks and data, and what it would cost at its true size.

Schedule, memory, objective, precision, adapters, recomputation and accumulation are the stage's own; widths, layers,
latents, clips a batch and sampler steps are not. Nothing is downloaded, read at full size, compiled or kept.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidistill import checkpoint, distributed
from vidistill.bench import plan
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.conditioning.condition import ACTION_SITE, AUDIO_SITE, is_shown
from vidistill.data import prompts as prompts_module
from vidistill.data import shards
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import NO_GRID, DiTConfig
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.training.config import TrainConfig
from vidistill.training.trainer import Trainer
from vidistill.training.validation import ValidationConfig

WIDTH, LAYERS, TEXT, TOKENS, CLIPS, IMAGE_TOKENS, SAMPLER_STEPS, STREAMED = 24, 2, 16, 8, 2, 3, 4, 2
CODEC = TinyCodecConfig(encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))
FACTOR = 4  # pixel frames of a latent of CODEC


def rehearse(cfg: TrainConfig, gpus: int = 0, gpu_memory: float = 80.0) -> dict[str, Any]:
    """Run the stage `cfg` once in miniature; returns what was done and what the real one would take, ready for JSON.

    With `gpus`, first of all plan what each of so many of `gpu_memory` GB would hold. Raises what the stage itself
    would raise, and ValueError where they cannot hold it: an impossible combination of settings is found here.
    """
    roles = {} if cfg.objective == "codec" else plan.roles_of(cfg)
    planned = {"plan": plan.checked(cfg, roles, gpus, gpu_memory)} if gpus else {}
    with tempfile.TemporaryDirectory(prefix="vidistill-") as folder:
        done = run(miniature(cfg, roles, Path(folder)))
    return {
        "stage": cfg.name,
        "objective": cfg.objective,
        "networks": {name: plan.network_cost(cfg, name, role) for name, role in roles.items()},
        "true_size": plan.true_size(cfg, roles) if roles else {},
        "data": cfg.data if (Path(cfg.data) / shards.META).is_file() else f"{cfg.data}: not here, random data",
        **planned,
        "done": done,
        "config": asdict(cfg),
    }


def shrink(dit: DiTConfig, grid: tuple[int, int]) -> DiTConfig:
    """The same kind of network, tiny."""
    sites = {
        name: replace(site, layers=tuple(k for k in site.layers if k < LAYERS), hidden=min(site.hidden, WIDTH))
        for name, site in dit.sites.items()
    }
    return replace(
        dit,
        width=WIDTH,
        layers=LAYERS,
        heads=2,
        ffn=2 * WIDTH,
        freq_dim=32,
        text_dim=min(dit.text_dim, TEXT),
        image_dim=min(dit.image_dim, TEXT),
        image_tokens=min(dit.image_tokens, IMAGE_TOKENS),
        sites=sites,
        grid=grid if dit.grid != NO_GRID else NO_GRID,
        checkpoint=False,  # a setting of the stage, which the trainer applies
    )


# --- the miniature ----------------------------------------------------------------------------------------------------


def miniature(cfg: TrainConfig, roles: dict[str, plan.Role], folder: Path) -> TrainConfig:
    """The stage on tiny networks and data, all of it under `folder`."""
    accumulate = min(cfg.accumulate, 2)
    small = replace(
        cfg,
        name="rehearsal",
        data=str(folder / "data"),
        episodes=0,
        batch=distributed.world_size() * accumulate,
        accumulate=accumulate,
        sequence=1,
        loss=replace(cfg.loss, target_steps=SAMPLER_STEPS),
        init_plateau=0.0,  # nothing has converged here
        validation=watched(cfg.validation, folder),
        compile=False,
        out=str(folder / "runs"),
    )
    if cfg.objective == "codec":
        write_pixels(folder / "data", cfg)
        return replace(small, init=None)
    size = (2 * cfg.dit.patch[1], 2 * cfg.dit.patch[2])
    tiny = {name: shrink(r.dit, (2, 2)) for name, r in roles.items()}
    names: dict[str, str | None] = {}
    for name, dit in tiny.items():
        names[name] = str(folder / name)
        write_network(folder / name, dit, cfg, size)
    codec = TinyCodec(replace(CODEC, latent_channels=tiny["student"].channels))
    checkpoint.export(folder / "codec", codec, {"card": {}})
    trained = tiny["student"].extend(shrink(cfg.dit, (2, 2)))
    write_latents(folder / "data", cfg, trained, size)
    return replace(
        small,
        latent_size=size,
        dit=replace(trained, checkpoint=cfg.dit.checkpoint),
        init=names["student"] if cfg.init else None,
        teacher=names.get("teacher", names["student"]) if cfg.teacher else None,
        critic_init=names.get("critic") if cfg.critic_init else None,
        codec=str(folder / "codec") if cfg.codec else None,
    )


def watched(cfg: ValidationConfig, folder: Path) -> ValidationConfig:
    """Looks at every step, where the stage looks at all."""
    if not cfg.every and not cfg.diagnose_every:
        return cfg
    judge, diagnose = min(cfg.every, 1), min(cfg.diagnose_every, 1)
    return replace(cfg, data=str(folder / "data"), clips=CLIPS, every=judge, diagnose_every=diagnose)


def write_network(path: Path, dit: DiTConfig, cfg: TrainConfig, size: tuple[int, int]) -> None:
    """A random network whose head is not zero, as a checkpoint."""
    net = VideoDiT(dit)
    nn.init.normal_(net.head.head.weight, std=0.1)
    shape = {"frames": cfg.frames, "channels": dit.channels, "height": size[0], "width": size[1], "patch": dit.patch}
    record = {"shape": shape, "noise": asdict(cfg.loss.noise), "codec": None, "card": {}}
    checkpoint.export(path, net, record, torch.float32)


def kind_of(cfg: TrainConfig, dit: DiTConfig) -> str:
    """The kind of data the stage is for: what its folder holds, or what the objective takes."""
    if (Path(cfg.data) / shards.META).is_file():
        return prompts_module.open_data(cfg.data).kind
    if cfg.objective == "regression":
        return "trajectories"
    from_noise = not cfg.schedule.given_chunks
    return prompts_module.PROMPTS if cfg.rolls and dit.text_dim and from_noise and not recorded(cfg, dit) else "latents"


def recorded(cfg: TrainConfig, dit: DiTConfig) -> bool:
    """Whether only recorded clips have what the stage tells: actions, sound, a camera's way, a reference picture."""
    return ACTION_SITE in dit.sites or takes_audio(cfg, dit) or cfg.camera is not None or cfg.reference


def takes_audio(cfg: TrainConfig, dit: DiTConfig) -> bool:
    """Whether the site of sound is told sound, and not the moves of a camera."""
    return AUDIO_SITE in dit.sites and (cfg.camera is None or AUDIO_SITE not in cfg.camera.sites)


class RandomText:
    """Stands where a `TextCache` stands."""

    source, length = "random", TOKENS

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        return [torch.randn(TOKENS, self.dim) for _ in prompts]


def shown(cfg: TrainConfig, dit: DiTConfig, size: tuple[int, int], numbers: range) -> dict[str, Tensor]:
    """What an image-to-video network is shown of so many pictures."""
    found = {prompts_module.SHOWN: torch.randn(len(numbers), cfg.frames, dit.channels, *size)}
    if dit.image_dim:
        found[prompts_module.IMAGE] = torch.randn(len(numbers), dit.image_tokens, dit.image_dim)
    return found


def write_latents(folder: Path, cfg: TrainConfig, dit: DiTConfig, size: tuple[int, int]) -> None:
    """Random data of the kind the stage takes."""
    kind = kind_of(cfg, dit)
    actions = dit.sites[ACTION_SITE].dim if ACTION_SITE in dit.sites else 0
    meta: dict[str, Any] = {"fps": 16.0, "temporal": FACTOR, "frames": cfg.frames, "levels": list(cfg.loss.levels)}
    meta["actions"] = [f"action {k}" for k in range((actions - 1) // FACTOR)]
    show = partial(shown, cfg, dit, size) if is_shown(dit.channels, dit.extra_channels) else None
    meta |= {prompts_module.SHOWN: {"frames": cfg.frames, "size": size}} if show else {}
    if show and dit.image_dim:
        meta[prompts_module.IMAGE] = {"source": "random", "tokens": dit.image_tokens, "width": dit.image_dim}
    if kind == prompts_module.PROMPTS:
        prompts_module.write_prompts(folder, ("one", "two"), "", RandomText(dit.text_dim), meta, show=show)
        return
    meta["given"] = 1 if recorded(cfg, dit) or not dit.text_dim else 0
    if cfg.camera is not None and dit.text_dim and not actions:  # clips with captions and poses begin either way
        meta["given"] = min(1, cfg.schedule.given_chunks)
    clip = (CLIPS, cfg.frames, dit.channels, *size)
    tensors: dict[str, Tensor] = {}
    if actions:
        tensors["actions"] = torch.rand(CLIPS, cfg.frames, actions)
    if cfg.camera is not None:
        tensors["poses"] = cfg.camera.wander(CLIPS, cfg.frames)
    if dit.text_dim:
        tokens = TOKENS + (dit.image_tokens if dit.image_dim else 0)
        tensors["tokens"] = torch.randn(CLIPS, tokens, dit.told_width)
    if show is not None:
        tensors["channels"] = torch.randn(CLIPS, cfg.frames, dit.extra_channels, *size)
    if takes_audio(cfg, dit):
        tensors["audio"] = torch.randn(CLIPS, cfg.frames, dit.sites[AUDIO_SITE].dim)
        if cfg.reference:
            tensors["mouth"] = torch.rand(CLIPS, FACTOR * (cfg.frames - 1) + 1, 2)
    if kind == "trajectories" or (dit.text_dim and not recorded(cfg, dit) and cfg.objective != "flow"):
        tensors["states"] = torch.randn(CLIPS, len(cfg.loss.levels) + 1, *clip[1:])
    else:
        tensors |= {"latents": torch.randn(clip), "images": torch.randn(clip)}
    measures = {name: (low + high) / 2 for name, (low, high) in cfg.curate.items()}
    shards.write_shards(folder, [(tensors, [{"measures": measures}] * CLIPS)], meta)


def write_pixels(folder: Path, cfg: TrainConfig) -> None:
    side = 4 * TinyCodec(cfg.codec_config).spatial_factor
    frames = torch.randint(0, 256, (CLIPS, cfg.frames, side, side, 3), dtype=torch.uint8)
    shards.write_shards(folder, [({"frames": frames}, [{}] * CLIPS)], {"fps": 16.0})


def run(cfg: TrainConfig) -> list[str]:
    """Every part of a run: a turn of each network, a saved state, the export; a student then streams."""
    trainer, done = Trainer(cfg), []
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer.step_count = cfg.critic_warmup
    for _ in range(2):
        turn = "student" if cfg.is_student_turn(trainer.step_count) else "critic"
        logs = trainer.step()
        trainer.validate()
        done.append(f"{turn} step: " + ", ".join(f"{k.split('/')[1]} {v:.3g}" for k, v in logs.items()))
    trainer.save()
    again = Trainer(cfg)
    again.resume()
    assert again.step_count == trainer.step_count, "a saved state resumes where it was saved"
    done.append("state saved and resumed")
    path = again.finish()
    if distributed.rank() == 0:
        bundle = checkpoint.load(path)
        done.append(f"{bundle.kind} exported and loaded")
        if bundle.kind == "student":
            done.append(stream(bundle))
    return done


def stream(bundle: checkpoint.Bundle) -> str:
    """Stream some chunks of what was exported."""
    codec, image = None, None
    if bundle.spec.image:
        return "not streamed: it is told tokens of a picture, and there is no encoder in miniature"
    if given := bundle.picture_frames:
        if not bundle.record["codec"]:
            return "not streamed: it starts from a picture, and the stage names no codec"
        codec = checkpoint.load_codec(bundle)
        side = codec.spatial_factor
        size = (codec.px_frames(given), side * bundle.shape.height, side * bundle.shape.width, 3)
        image = np.zeros(size, dtype=np.uint8)
    with StreamSession(bundle, codec, StreamConfig(pipelined=False), image=image) as session:
        shapes = [tuple(x.shape) for _, x in zip(range(STREAMED), session.latents(), strict=False)]
    return f"{len(shapes)} chunks streamed"


# --- the report -------------------------------------------------------------------------------------------------------


def report(row: dict[str, Any]) -> str:
    """What people read of a rehearsal."""
    lines = [
        f"{row['stage']}: {row['objective']}, rehearsed in miniature; nothing was kept",
        f"data      {row['data']}",
    ]
    for name, net in row["networks"].items():
        lines.append(
            f"{name:9s} {net['source'] or 'new'} ({net['known']}): {net['parameters'] / 1e9:.3f} B parameters, "
            f"{net['trained'] / 1e9:.3f} B trained; weights {gb(net['weight_bytes'])}, gradients, optimiser, average "
            f"{gb(net['training_bytes'])}"
        )
    if true := row["true_size"]:
        note = "blocks recomputed" if true["recomputed_blocks"] else "all of them"
        lines.append(
            f"a pass    {true['tokens_per_pass']} tokens ({true['tokens_per_frame']} a latent frame), "
            f"{true['flops_per_pass'] / 1e12:.2f} TFLOP, activations {gb(true['activation_bytes_per_pass'])} ({note})"
        )
        if "passes_per_rollout" in true:
            lines.append(
                f"a rollout {true['passes_per_rollout']} passes, {true['passes_with_gradient_at_once']} of them with "
                f"gradient at once (history {gb(true['history_bytes'])}), memory {gb(true['memory_bytes'])} a clip"
            )
    lines += plan.report(row["plan"], row["config"]["accumulate"]) if "plan" in row else []
    return "\n".join([*lines, *(f"done      {step}" for step in row["done"])])


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
