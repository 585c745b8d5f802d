"""Prompts with their embeddings on disk, for students that learn without recorded video."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import MASKS, Condition, before_text, shown_channels
from vidistill.data.clips import EVERY, Clips, Ranges
from vidistill.data.importers.write import ALL, Part, write_split
from vidistill.data.meta import PROMPTS, DataError
from vidistill.data.shards import Shard, read_meta, read_shards
from vidistill.data.types import Batch, pack_rows, unpack_rows
from vidistill.distributed import rank
from vidistill.io import read_text
from vidistill.models.layers import DiTConfig
from vidistill.ops.device import accelerator
from vidistill.progress import Bar
from vidistill.teachers.text_encoder import TextCache, cache_folder
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
    return (Pictures if SHOWN in read_meta(folder) else Prompts)(folder, episodes)


def check_shown(name: str, dit: DiTConfig, source: "Clips | Prompts") -> None:
    """DataError unless `source` comes with the condition channels and the image tokens that a network takes."""
    image = source.meta.get(IMAGE) or {"tokens": 0, "width": 0}
    if dit.extra_channels != source.channels:
        raise DataError(
            f"{name} takes {dit.extra_channels} condition channels, {source.folder} gives {source.channels}: a "
            f"reference picture (reference=true) is {dit.channels + 1} of them, `vidistill data pictures` makes "
            f"{dit.channels + MASKS}"
        )
    if dit.image_dim and (image["tokens"], image["width"]) != (dit.image_tokens, dit.image_dim):
        raise DataError(
            f"{name} is told {dit.image_tokens} image tokens of {dit.image_dim} numbers, {source.folder} has "
            f"{image['tokens']} of {image['width']}: make it with `vidistill data pictures --image-encoder FOLDER`"
        )
    if image["width"] and not dit.image_dim:
        raise DataError(f"{name} is told no image tokens, {source.folder} has them: leave out --image-encoder there")


# Of data that image-to-video networks learn from, in meta and shards: latents that are shown, tokens of a picture.
SHOWN, IMAGE = "shown", "image"
NAMES, TOKENS = "names", "tokens"  # of folders of earlier versions: the file of each prompt under TOKENS
PER_SHARD = 256


class Encoder(Protocol):
    """What makes embeddings of prompts: a `teachers.text_encoder.TextCache`."""

    source: str
    length: int

    def embed(self, prompts: Sequence[str]) -> list[Tensor]: ...


Show = Callable[[range], Mapping[str, Tensor]]


def write_prompts(
    folder: str | Path,
    prompts: Sequence[str],
    negative: str,
    encoder: Encoder,
    meta: Mapping[str, Any],
    at_once: int = 16,
    part: Part = ALL,
    bar: Bar | None = None,
    per_shard: int = PER_SHARD,
    show: Show | None = None,
) -> bool:
    """Write this part of a folder of prompts, whose embeddings `encoder` makes; returns whether all parts are there.

    `at_once` prompts are encoded together, `per_shard` are held in memory. Stopped and started again it goes on after
    the last whole shard. `negative`: what guidance is taken against, in the first shard. `show`: what goes with the
    prompts of these numbers.
    """
    if not prompts:
        raise DataError(f"{folder} would hold no prompts; give at least one")

    def make(i: int) -> Shard:
        own = prompts[i * per_shard : (i + 1) * per_shard]
        shown = show(range(i * per_shard, i * per_shard + len(own))) if show else {}
        rows: list[Tensor] = []
        for first in range(0, len(own), at_once):
            some = own[first : first + at_once]
            rows += encoder.embed(some)
            if bar is not None:
                bar.update(len(some))
        beside = {} if i else {"negative": encoder.embed([negative])[0]}
        return {**pack_rows("tokens", rows), **beside, **shown}, [{"caption": prompt} for prompt in own]

    text = {"kind": "umt5", "source": encoder.source, "length": encoder.length}
    told = {PROMPTS: len(prompts), "negative": negative, "text": text, "digest": digest(prompts)}
    record = {**meta, **told, "per_shard": per_shard, "at_once": at_once}
    return write_split(Path(folder), -(-len(prompts) // per_shard), make, record, None, part)


class Prompts:
    """Prompts with their embeddings on disk, for students that learn without recorded video.

    Shards are mapped, not read: only what is drawn comes into memory.
    """

    kind, given, dropped = PROMPTS, 0, dict[str, int]()  # curation drops recorded clips only

    def __init__(self, folder: str | Path, episodes: int = 0) -> None:
        """`episodes`: how many prompts to use, from the first; 0 uses all."""
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.count = min(episodes or self.meta["episodes"], self.meta["episodes"])
        self.parts = [] if NAMES in self.meta else list(read_shards(folder))

    def __len__(self) -> int:
        return self.count

    def width_of(self, name: str) -> int:
        """Numbers in a row of `tokens`; prompts come with nothing else."""
        return self.tokens(0).shape[-1] if name == "tokens" else 0

    @property
    def channels(self) -> int:
        """Condition channels that come with a clip."""
        return 0

    def tokens(self, k: int) -> Tensor:
        """Embedding [L, D] of prompt `k`, zero after the prompt's end."""
        if not self.parts:
            return self.padded(self.read(self.meta[NAMES][k]))
        shard, row = divmod(k, self.meta["per_shard"])
        return self.padded(unpack_rows(self.parts[shard], "tokens", row))

    @property
    def negative(self) -> Tensor:
        """Embedding [L, D] of what guidance is taken against."""
        return self.padded(self.parts[0]["negative"] if self.parts else self.read(self.meta["negative_name"]))

    def padded(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.pad(tokens.float(), (0, 0, 0, self.meta["text"]["length"] - len(tokens)))

    def read(self, name: str) -> Tensor:
        """The embedding in a file of an earlier version's folder."""
        path = self.folder / TOKENS / name
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor("tokens")
        except (SafetensorError, FileNotFoundError) as error:
            raise DataError(f"{path} is missing or damaged ({error}); run `vidistill data prompts` again") from error

    def batch(
        self, batch: int, frames: int, size: tuple[int, int, int], seed: int, step: int, rows: slice = EVERY
    ) -> Batch:
        """Clips [B, frames, *size] of zeros under random prompts; batch number `step` depends on (seed, step) alone.

        Only `rows` of it are read.
        """
        picked = np.random.default_rng((seed, step)).integers(0, len(self), size=batch)[rows]
        x = torch.zeros(()).expand(len(picked), frames, *size)
        return Batch(x, self.told([int(k) for k in picked], x.shape))

    def told(self, picked: Sequence[int], shape: torch.Size) -> Condition:
        """What clips of `shape` under the prompts of these numbers are told."""
        tokens = torch.stack([self.tokens(k) for k in picked])
        return Condition(tokens, negative=self.negative[None].expand_as(tokens))


class Pictures(Prompts):
    """Prompts that each come with the picture a clip starts from, as image-to-video networks are shown it."""

    @property
    def channels(self) -> int:
        return MASKS + int(self.parts[0][SHOWN].shape[2])

    def rows(self, name: str, picked: Sequence[int]) -> Tensor:
        """Rows of tensor `name`."""
        places = [divmod(k, self.meta["per_shard"]) for k in picked]
        return torch.stack([unpack_rows(self.parts[shard], name, row) for shard, row in places]).float()

    def width_of(self, name: str) -> int:
        image = self.meta.get(IMAGE) or {"width": 0}
        return max(super().width_of(name), image["width"]) if name == "tokens" else 0

    def told(self, picked: Sequence[int], shape: torch.Size) -> Condition:
        """What such clips are told; DataError where they are longer than what is shown, or of another size."""
        text, shown = super().told(picked, shape), self.rows(SHOWN, picked)
        if shown.shape[1] < shape[1] or shown.shape[2:] != shape[2:]:
            raise DataError(
                f"{self.folder} shows clips of {list(shown.shape[1:])}, frames x channels x height x width in latents; "
                f"{list(shape[1:])} are asked for: set frames and latent_size, or make it anew with --frames and --size"
            )
        channels = shown_channels(shown, 0, shape[1])
        if IMAGE not in self.parts[0]:
            return replace(text, channels=channels)
        image = self.rows(IMAGE, picked)
        assert text.tokens is not None and text.negative is not None
        return Condition(before_text(image, text.tokens), channels=channels, negative=before_text(image, text.negative))


def read_lines(file: Path) -> list[str]:
    """The prompts in a file, one a line."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def digest(lines: Sequence[str]) -> str:
    """What tells a list of prompts, or of names, from another."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def prompts(
    out: Path,
    file: Path,
    text: str,
    negative: str = "",
    tokens: int = 512,
    fps: float = WORLD["fps"],
    at_once: int = 16,
    part: str = "1/1",
) -> str:
    """Encode the prompts in `file`, one a line, into folder `out`; says what is there. `fps`: of what they describe.

    `part`: the share that this process encodes, see `write.Part`; the folder is complete with the last one.
    """
    lines = read_lines(file)
    encoder = TextCache(text, cache_folder(), length=tokens, device=str(accelerator()))
    own, meta = Part.of(part), {"source": "prompts", **WORLD, "fps": fps}
    share = sum(len(lines[i * PER_SHARD : (i + 1) * PER_SHARD]) for i in own.share(-(-len(lines) // PER_SHARD)))
    with Bar(share, "prompts", "prompt", shown=rank() == 0) as bar:
        whole = write_prompts(out, lines, negative, encoder, meta, at_once, own, bar, PER_SHARD)
    return f"{out}: {len(lines)} prompts of {tokens} tokens" if whole else f"{out}: part {own.index + 1} is written"
