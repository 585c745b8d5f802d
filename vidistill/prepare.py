"""What `vidistill data` makes with models: embeddings of prompts, trajectories of a teacher."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vidistill import checkpoint
from vidistill.data import (
    TOKENS,
    Batch,
    DataError,
    Prompts,
    open_data,
    sampler_levels,
    write_prompts,
    write_trajectories,
)
from vidistill.diffusion import NoiseSchedule
from vidistill.teachers.text import TextCache

WORLD = {"fps": 16.0, "temporal": 4}  # of Wan 2.1: pixel frames a second, and of one latent
SIDES = {16: 8, 48: 16}  # Wan's latent channels -> pixels a side of a latent


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prompts(out: Path, file: Path, text: str, negative: str = "", tokens: int = 512) -> str:
    """Encode the prompts in `file`, one a line, into folder `out`; says what is there."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    cache = TextCache(text, out / TOKENS, length=tokens, device=str(device()))
    with tqdm(total=len(lines), desc="prompts", disable=None) as bar:
        write_prompts(out, lines, negative, cache, {"source": "prompts", **WORLD}, bar=bar)
    return f"{out}: {len(lines)} prompts of {tokens} tokens"


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
    half: bool = False,
) -> str:
    """Sample `clips` clips with a teacher under the conditions of `data` into folder `out`; says what is there.

    ValueError if teacher and data do not belong together, or no sampler of the teacher has all `levels`.
    """
    master = checkpoint.load(teacher, "teacher", torch.bfloat16 if half else torch.float32)
    where, net = device(), master.net.to(device())
    talks = "dit" in master.record and master.net.cfg.extra_channels > 0
    source = open_data(data, reference=talks)
    frames = frames or master.record["shape"]["frames"]
    noise = master.noise if "noise" in master.record else NoiseSchedule()
    steps, kept = sampler_levels(noise, steps, levels or tuple(noise.warp(u) for u in (1.0, 0.75, 0.5, 0.25)))
    draw, found = clips_of(source, master, frames, seed, size)
    meta: dict[str, Any] = {
        **{k: source.meta[k] for k in KEPT if k in source.meta},
        **found,
        "teacher": teacher,
        "clips": clips,
        "frames": frames,
        "given": source.given,
        "seed": seed,
        "sigmas": list(noise.steps(steps)),
        "levels": list(kept),
        "guidance": master.record.get("guidance", 1.0) if guidance is None else guidance,
        "audio_guidance": master.record.get("audio_guidance", 0.0) if guidance is None else 0.0,
    }

    def batch_of(count: int, i: int) -> Batch:
        batch = draw(count, i)
        return replace(batch, x=batch.x.to(where), cond=batch.cond.to(where))

    with (
        tqdm(total=clips, desc="trajectories", disable=None) as bar,
        torch.autocast(where.type, torch.bfloat16, enabled=half),
    ):
        write_trajectories(out, net, batch_of, meta, at_once, bar)
    shown = ",".join(f"{level:.4f}" for level in kept)
    return f"{out}: {clips} trajectories of {steps} steps, levels {shown}"


KEPT = ("source", "split", "fps", "actions", "px_size", "temporal", "codec", "text", "negative", "audio")


def clips_of(
    source: Any, teacher: checkpoint.Bundle, frames: int, seed: int, size: tuple[int, int]
) -> tuple[Callable[[int, int], Batch], dict[str, Any]]:
    """What draws (number of clips, number of the draw) -> clips that `teacher` takes, and what to note of them."""
    takes = teacher.record["shape"]["channels"] if "shape" in teacher.record else teacher.net.cfg.channels
    text = teacher.net.cfg.text_dim if "dit" in teacher.record else 0
    if text and text != source.width_of("tokens"):
        raise DataError(f"{teacher.name} listens to text; {source.folder} has none of {text} numbers a token")
    if not isinstance(source, Prompts):
        source.need("latents")
        if takes != source.latent_size[0]:
            raise DataError(
                f"{teacher.name} takes latents of {takes} channels, {source.folder} has {source.latent_size[0]}"
            )
        return (lambda count, i: source.latents(count, frames, seed, i)), {}
    side = SIDES.get(takes, 8)
    if size[0] % side or size[1] % side:
        raise DataError(f"size {size[0]}x{size[1]} must be whole latents of {side} pixels")
    latent = (takes, size[0] // side, size[1] // side)
    return (lambda count, i: source.batch(count, frames, latent, seed, i)), {"codec": teacher.record.get("codec")}
