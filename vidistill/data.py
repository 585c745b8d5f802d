"""Recorded clips on disk and in batches: frame shards, latent shards, an order that needs no state to resume."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidistill.conditioning import Condition, pack_actions
from vidistill.sources import Episode

META = "meta.json"


@dataclass(frozen=True)
class Batch:
    """A training batch: a clip `x` (latents [B, F, C, H, W], or pixels for a codec), its condition, and how many of
    its first frames are given clean."""

    x: Tensor
    cond: Condition = Condition()
    given: int = 0


def write_shards(folder: str | Path, shards: Iterable[tuple[dict[str, Tensor], list[dict]]], meta: Mapping) -> None:
    """Write (tensors, one description per episode) shards and `meta` as a folder that appears only when complete."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    described: list[dict] = []
    count = 0
    for count, (tensors, episodes) in enumerate(shards, 1):
        save_file(tensors, partial / f"shard-{count - 1:05d}.safetensors")
        described += episodes
    record = {**meta, "shards": count, "episodes": len(described), "described": described}
    (partial / META).write_text(json.dumps(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def frame_shards(episodes: Iterable[Episode], per_shard: int = 64) -> Iterator[tuple[dict[str, Tensor], list[dict]]]:
    """Shards of recorded episodes of one length: frames uint8 [N, T, H, W, 3], actions [N, T, A], poses [N, T, 3]."""
    held: list[Episode] = []
    for episode in episodes:
        held.append(episode)
        if len(held) == per_shard:
            yield stack_episodes(held)
            held = []
    if held:
        yield stack_episodes(held)


def stack_episodes(episodes: list[Episode]) -> tuple[dict[str, Tensor], list[dict]]:
    tensors = {
        name: torch.from_numpy(np.stack([getattr(e, name) for e in episodes])) for name in ("frames", "actions", "poses")
    }
    return tensors, [{"seed": e.seed, "walls": e.walls} for e in episodes]


def read_meta(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(f"no data in {folder} ({META} is missing): make it with `vidistill data`")
    return json.loads(path.read_text())


def read_shards(folder: str | Path, names: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """The tensors of every shard, in order; `names` picks some."""
    for i in range(read_meta(folder)["shards"]):
        with safe_open(Path(folder) / f"shard-{i:05d}.safetensors", framework="pt") as shard:
            yield {name: shard.get_tensor(name) for name in (names or shard.keys())}


class Clips:
    """Episodes in memory, drawn as random windows; batch number `step` depends on (seed, step) alone."""

    def __init__(self, folder: str | Path, names: Iterable[str] | None = None, episodes: int = 0) -> None:
        """`episodes`: how many to load, from the first (rounded up to whole shards); 0 loads all."""
        self.meta = read_meta(folder)
        parts, count = [], 0
        for part in read_shards(folder, names):
            parts.append(part)
            count += len(next(iter(part.values())))
            if episodes and count >= episodes:
                break
        self.tensors = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def windows(self, batch: int, length: int, seed: int, step: int, name: str, stride: int = 1) -> list[tuple[int, int]]:
        """(episode, first frame) of `batch` windows of `length` entries of tensor `name`, starts on `stride`."""
        total = self.tensors[name].shape[1]
        if length > total:
            raise ValueError(f"clips of {length} frames do not fit episodes of {total}; record longer ones")
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, (total - length) // stride + 1, size=batch) * stride
        return list(zip(rng.integers(0, len(self), size=batch).tolist(), starts.tolist(), strict=True))

    def frames(self, batch: int, length: int, seed: int, step: int) -> Tensor:
        """Pixels [B, length, 3, H, W] in [0, 1] of random windows of a frame dataset."""
        frames = self.tensors["frames"]
        picked = [frames[e, s : s + length] for e, s in self.windows(batch, length, seed, step, "frames")]
        return torch.stack(picked).permute(0, 1, 4, 2, 3).float() / 255

    def latents(self, batch: int, length: int, seed: int, step: int) -> Batch:
        """Windows of a latent dataset that start from a picture: latent 0 is the codec's latent of one frame."""
        return self.gather(self.windows(batch, length, seed, step, "latents"), length)

    def gather(self, windows: Iterable[tuple[int, int]], length: int) -> Batch:
        """The batch of (episode, first latent) windows of `length` latents."""
        latents, cond = [], []
        for e, s in windows:
            clip = self.tensors["latents"][e, s : s + length].float()
            clip[0] = self.tensors["images"][e, s].float()
            actions = self.tensors["actions"][e, s : s + length].clone()
            actions[0, :-1] = 0.0
            latents.append(clip)
            cond.append(actions)
        return Batch(torch.stack(latents), Condition(per_frame={"modulation": torch.stack(cond)}), given=1)


@torch.no_grad()
def latent_shard(shard: tuple[dict[str, Tensor], list[dict]], codec: Any) -> tuple[dict[str, Tensor], list[dict]]:
    """A latent shard of a frame shard: latents and images half [N, F, C, H, W], actions [N, F, A'], poses [N, F, 3].

    `latents` is the encoded stream; `images` holds, for the last pixel frame of every latent, the codec's latent of that
    picture alone, which is what a clip starts from.
    """
    tensors, described = shard
    factor = codec.temporal_factor
    latents, images = [], []
    for frames in tensors["frames"]:
        px = frames.permute(0, 3, 1, 2).float() / 255
        latents.append(codec.encode(px[None])[0].half())
        images.append(codec.encode(px[::factor, None])[:, 0].half())
    return {
        "latents": torch.stack(latents),
        "images": torch.stack(images),
        "actions": pack_actions(tensors["actions"], factor),
        "poses": tensors["poses"][:, ::factor].contiguous(),
    }, described
