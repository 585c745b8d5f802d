"""Prompts with their embeddings on disk, for students that learn without recorded video."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import Condition
from vidistill.data.clips import EVERY, Clips, Ranges
from vidistill.data.shards import META, DataError, read_meta
from vidistill.data.types import Batch
from vidistill.io import read_text, write_text
from vidistill.ops.device import accelerator
from vidistill.progress import Bar
from vidistill.teachers.text_encoder import TextCache
from vidistill.teachers.wan import WORLD


def open_data(
    folder: str | Path,
    episodes: int = 0,
    prompts: bool = True,
    camera: CameraConfig | None = None,
    reference: bool = False,
    curate: Ranges | None = None,
) -> "Clips | Prompts":
    """The data in a folder: recorded clips or, where `prompts` alone will do, those; else they are a DataError.

    `camera`, `reference` and `curate` are those of `Clips`.
    """
    if PROMPTS not in read_meta(folder):
        return Clips(folder, episodes=episodes, camera=camera, reference=reference, curate=curate)
    if camera is not None or reference or curate:
        raise DataError(f"{folder} holds prompts alone; a camera, a reference and curation need recorded clips")
    if not prompts:
        raise DataError(f"{folder} holds prompts alone, clips are needed here: `vidistill data --help`")
    return Prompts(folder, episodes)


PROMPTS = "prompts"  # of meta: the prompts, and in NAMES the file of each under TOKENS
NAMES, TOKENS = "names", "tokens"


def write_prompts(
    folder: str | Path, prompts: Sequence[str], negative: str, cache: Any, meta: Mapping, bar: Bar | None = None
) -> None:
    """Write a folder of prompts whose embeddings `cache` (a `teachers.text.TextCache` on FOLDER/tokens) makes.

    Stopped and started again it goes on after the last embedding. `negative`: what guidance is taken against.
    """
    if not prompts:
        raise DataError(f"{folder} would hold no prompts; give at least one")
    cache.encode([negative])
    for prompt in prompts:
        cache.encode([prompt])
        if bar is not None:
            bar.update()
    names = [cache.path(prompt).name for prompt in (negative, *prompts)]
    record = {**meta, PROMPTS: list(prompts), "negative": negative, NAMES: names[1:], "negative_name": names[0]}
    record |= {"text": {"kind": "umt5", "source": cache.source, "length": cache.length}, "episodes": len(prompts)}
    write_text(Path(folder) / META, json.dumps(record))


class Prompts:
    """Prompts with their embeddings on disk, for students that learn without recorded video."""

    kind, given, dropped = PROMPTS, 0, dict[str, int]()  # curation drops recorded clips only

    def __init__(self, folder: str | Path, episodes: int = 0) -> None:
        """`episodes`: how many prompts to use, from the first; 0 uses all."""
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.names = self.meta[NAMES][: episodes or None]

    def __len__(self) -> int:
        return len(self.names)

    def width_of(self, name: str) -> int:
        """Numbers in a row of `tokens`; prompts come with nothing else."""
        return self.tokens(self.names[0]).shape[-1] if name == "tokens" else 0

    def tokens(self, name: str) -> Tensor:
        """Embedding [L, D] of a file, zero after the prompt's end."""
        path = self.folder / TOKENS / name
        try:
            with safe_open(path, framework="pt") as file:
                tokens = file.get_tensor("tokens").float()
        except (SafetensorError, FileNotFoundError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); run `vidistill data prompts` again") from error
        return torch.nn.functional.pad(tokens, (0, 0, 0, self.meta["text"]["length"] - len(tokens)))

    def batch(
        self, batch: int, frames: int, size: tuple[int, int, int], seed: int, step: int, rows: slice = EVERY
    ) -> Batch:
        """Clips [B, frames, *size] of zeros under random prompts; batch number `step` depends on (seed, step) alone.

        Only `rows` of it are read.
        """
        picked = np.random.default_rng((seed, step)).integers(0, len(self), size=batch)[rows]
        tokens = torch.stack([self.tokens(self.names[k]) for k in picked])
        negative = self.tokens(self.meta["negative_name"])[None].expand_as(tokens)
        return Batch(torch.zeros(()).expand(len(picked), frames, *size), Condition(tokens, negative=negative))


def prompts(out: Path, file: Path, text: str, negative: str = "", tokens: int = 512, fps: float = WORLD["fps"]) -> str:
    """Encode the prompts in `file`, one a line, into folder `out`; says what is there. `fps`: of what they describe."""
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    cache = TextCache(text, out / TOKENS, length=tokens, device=str(accelerator()))
    with Bar(len(lines), "prompts", "prompt") as bar:
        write_prompts(out, lines, negative, cache, {"source": "prompts", **WORLD, "fps": fps}, bar=bar)
    return f"{out}: {len(lines)} prompts of {tokens} tokens"
