"""Trajectories of a teacher on disk: its states at a few noise levels, from noise to sample."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import ACTION_SITE, AUDIO_SITE, branches, check_pictured
from vidistill.config import build
from vidistill.data.importers.write import ALL, Part, write_split
from vidistill.data.prompts import IMAGE, SHOWN, Prompts, check_shown, open_data
from vidistill.data.shards import META, DataError, Shard
from vidistill.data.types import Batch
from vidistill.diffusion import Denoiser, NoiseSchedule, derived_seed
from vidistill.distributed import rank
from vidistill.ops.device import accelerator
from vidistill.ops.precision import autocast, working_dtype
from vidistill.progress import Bar
from vidistill.sampling import trajectory
from vidistill.teachers.wan import VAE_FACTORS, architecture_of

LEVEL_TOLERANCE = 2e-3  # levels are written with few digits


def trajectories(
    out: Path,
    teacher: str,
    data: Path,
    clips: int = 1024,
    frames: int | None = None,
    steps: int = 48,
    levels: tuple[float, ...] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    size: tuple[int, int] = (480, 832),
    at_once: int = 64,
    precision: str = "fp32",
    part: str = "1/1",
) -> str:
    """Sample `clips` clips with a teacher under the conditions of `data` into folder `out`; says what is there.

    `part`: the share that this process samples, see `write.Part`; the folder is complete with the last one.
    ValueError if teacher and data do not belong together, or no sampler of the teacher has all `levels`.
    """
    where = accelerator()
    loaded = checkpoint.load(teacher, "teacher", working_dtype(precision, where))
    net = loaded.net.to(where)
    camera = loaded.record.get("world", {}).get("camera")
    source = open_data(data, camera=camera and build(CameraConfig, camera), reference=is_told_reference(teacher, net))
    frames = frames or loaded.record["shape"]["frames"]
    noise = loaded.noise if "noise" in loaded.record else NoiseSchedule()
    steps, kept = sampler_levels(noise, steps, levels or tuple(noise.warp(u) for u in (1.0, 0.75, 0.5, 0.25)))
    draw, found = clips_of(source, loaded, frames, seed, size)
    meta: dict[str, Any] = {
        **{k: source.meta[k] for k in KEPT if k in source.meta},
        **found,
        "teacher": teacher,
        "data": digest(data),
        "clips": clips,
        "frames": frames,
        "given": source.given,
        "seed": seed,
        "sigmas": list(noise.steps(steps)),
        "levels": list(kept),
        "guidance": loaded.record.get("guidance", 1.0) if guidance is None else guidance,
        "audio_guidance": loaded.record.get("audio_guidance", 0.0) if guidance is None else 0.0,
    }

    def batch_of(count: int, i: int) -> Batch:
        return draw(count, i).to(where)

    own = Part.of(part)
    share = sum(min(at_once, clips - i * at_once) for i in own.share(-(-clips // at_once)))
    with Bar(share, "trajectories", "clip", shown=rank() == 0) as bar, autocast(precision, where):
        whole = write_trajectories(out, net, batch_of, meta, at_once, bar, own)
    if not whole:
        return f"{out}: part {own.index + 1} is written"
    shown = ",".join(f"{level:.4f}" for level in kept)
    return f"{out}: {clips} trajectories of {steps} steps, levels {shown}"


def is_told_reference(name: str, net: Any) -> bool:
    """Whether a network is told a reference picture; ValueError for one of other channels than are known."""
    if (dit := architecture_of(net)) is None:
        return False
    check_pictured(name, dit.channels, dit.extra_channels, dit.image_dim)
    return dit.extra_channels == dit.channels + 1


def digest(data: str | Path) -> str:
    """What tells the conditions in a data folder from those in another one."""
    return hashlib.sha256((Path(data) / META).read_bytes()).hexdigest()


KEPT = ("source", "split", "fps", "actions", "px_size", "temporal", "codec", "text", "negative", "audio", IMAGE, SHOWN)


def clips_of(
    source: Any, teacher: checkpoint.Bundle, frames: int, seed: int, size: tuple[int, int]
) -> tuple[Callable[[int, int], Batch], dict[str, Any]]:
    """What draws (number of clips, number of the draw) -> clips that `teacher` takes, and what to note of them."""
    takes = teacher.record["shape"]["channels"] if "shape" in teacher.record else teacher.net.cfg.channels
    if dit := architecture_of(teacher.net):
        text = dit.told_width
        if text and text != source.width_of("tokens"):
            raise DataError(f"{teacher.name} listens to text; {source.folder} has none of {text} numbers a token")
        check_shown(teacher.name, dit, source)
    if not isinstance(source, Prompts):
        source.need("latents")
        if takes != source.latent_size[0]:
            raise DataError(
                f"{teacher.name} takes latents of {takes} channels, {source.folder} has {source.latent_size[0]}"
            )

        def draw(count: int, i: int) -> Batch:
            picked = source.windows(count, frames, seed, i, "latents")
            return replace(source.gather(picked, frames), poses=source.poses(picked, frames))

        return draw, {}
    side, _ = VAE_FACTORS.get(takes, VAE_FACTORS[16])
    if size[0] % side or size[1] % side:
        raise DataError(f"size {size[0]}x{size[1]} must be whole latents of {side} pixels")
    latent = (takes, size[0] // side, size[1] // side)
    return (lambda count, i: source.batch(count, frames, latent, seed, i)), {"codec": teacher.record.get("codec")}


def sampler_levels(noise: NoiseSchedule, steps: int, levels: Iterable[float]) -> tuple[int, tuple[float, ...]]:
    """The fewest sampler steps, at least `steps`, whose list holds all `levels`, and the levels as they are on it."""
    wanted = tuple(levels)
    if not wanted or wanted[0] != 1.0 or sorted(wanted, reverse=True) != list(wanted) or wanted[-1] <= 0:
        raise DataError(f"levels fall from 1.0 and stay above 0, got {list(wanted)}")
    for n in range(steps, 4 * steps + 1):
        listed = noise.steps(n)
        exact = tuple(min(listed, key=lambda s: abs(s - level)) for level in wanted)
        if len(set(exact)) == len(wanted) and all(
            abs(e - level) < LEVEL_TOLERANCE for e, level in zip(exact, wanted, strict=True)
        ):
            return n, exact
    near = [min(noise.steps(steps), key=lambda s: abs(s - level)) for level in wanted]
    raise DataError(
        f"levels {list(wanted)} lie on no sampler of {steps} to {4 * steps} steps with shift {noise.shift}; the "
        f"nearest of {steps} steps are {[round(s, 4) for s in near]}"
    )


@torch.no_grad()
def trajectory_states(
    net: Denoiser,
    batch: Batch,
    sigmas: Iterable[float],
    levels: Iterable[float],
    rng: torch.Generator,
    scale: float,
    audio_scale: float = 0.0,
) -> Tensor:
    """States [B, K + 1, F, C, H, W] (half) of a teacher's trajectories from fresh noise, at `levels` and at 0."""
    noise = torch.randn(batch.x.shape, generator=rng).to(batch.x.device)
    given, kept = batch.x[:, : batch.given], {*levels, 0.0}
    nulls, scales = branches(batch.cond, scale, audio_scale)
    path = trajectory(net, noise, tuple(sigmas), batch.cond, given=given, nulls=nulls, scales=scales)
    states = [x.float().cpu() for sigma, x in path if sigma in kept]  # a CPU's autocast cannot join halves
    return torch.stack(states, dim=1).half()


def write_trajectories(
    folder: str | Path,
    net: Denoiser,
    batch_of: Callable[[int, int], Batch],
    meta: Mapping[str, Any],
    per_shard: int = 64,
    bar: Bar | None = None,
    part: Part = ALL,
) -> bool:
    """Write this part of `meta["clips"]` teacher trajectories; returns whether all parts are there.

    Stopped and started again it goes on after the last whole shard. `batch_of(size, i)` makes the clips of shard i,
    which are sampled together; their `given` must be `meta["given"]`. `meta` also holds `seed`, `sigmas`, `levels` and
    `guidance`. Source: CausVid 2412.07772, section 4.3.
    """
    total = meta["clips"]

    def make(i: int) -> Shard:
        first, last = i * per_shard, min((i + 1) * per_shard, total)
        batch = batch_of(last - first, i)
        rng = torch.Generator().manual_seed(derived_seed(meta["seed"], i))
        scales = meta["guidance"], meta.get("audio_guidance", 0.0)
        states = trajectory_states(net, batch, meta["sigmas"], meta["levels"], rng, *scales)
        conditions = {
            "actions": batch.cond.per_frame.get(ACTION_SITE),
            "tokens": batch.cond.tokens,
            "poses": batch.poses,
        }
        if SHOWN in meta:
            conditions["channels"] = batch.cond.channels
        conditions["audio"] = batch.cond.per_frame.get(AUDIO_SITE) if "audio" in meta else None
        kept = {name: x.cpu() for name, x in conditions.items() if x is not None}
        if "tokens" in kept:
            kept["tokens"] = kept["tokens"].bfloat16()  # as text encoders give them
        if "channels" in kept:
            kept["channels"] = kept["channels"].half()
        return {"states": states, **kept}, [{"clip": k} for k in range(first, last)]

    def done(i: int) -> None:
        if bar is not None:
            bar.update(min(per_shard, total - i * per_shard))

    shards = -(-total // per_shard)
    return write_split(Path(folder), shards, make, {**meta, "at_once": per_shard}, None, part, done)
