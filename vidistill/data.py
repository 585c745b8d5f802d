"""Recorded clips on disk and in batches: frame shards, latent shards, an order that needs no state to resume."""

import bisect
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidistill.audio import AudioConfig, clip_features, from_pcm16
from vidistill.conditioning import (
    ACTION_SITE,
    AUDIO_SITE,
    Condition,
    Encode,
    pack_actions,
    pack_audio,
    reference_channels,
    walked,
)
from vidistill.curation import Ranges, curated
from vidistill.poses import CameraConfig
from vidistill.sources import Captioned, Episode, Talk

META = "meta.json"
SETTINGS = "settings.json"


class DataError(ValueError):
    """A data folder that cannot be used; the message names the file or the setting."""


@dataclass(frozen=True)
class Batch:
    """A training batch: a clip `x` (latents [B, F, C, H, W], or pixels for a codec), its condition, how many of its
    first frames are given clean, and, where a loss asks for it, a teacher's sample `target` for the same noise. A part
    of a batch that is split has the latents of all its clips as `whole`. `poses` [B, F, 3 or 12] are as recorded."""

    x: Tensor
    cond: Condition = Condition()
    given: int = 0
    target: Tensor | None = None
    whole: Tensor | None = None
    poses: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The clips and their condition on a device."""
        return replace(self, x=self.x.to(device), cond=self.cond.to(device))


Shard = tuple[dict[str, Tensor], list[dict]]  # tensors whose first axis is the episode, a description of each


def write_shards(folder: str | Path, shards: Iterable[Shard], meta: Mapping) -> None:
    """Write shards and `meta` as a folder that appears only when complete; DataError if other things lie there."""
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    described: list[dict] = []
    count = 0
    for count, (tensors, episodes) in enumerate(shards, 1):
        write_shard(partial / f"shard-{count - 1:05d}.safetensors", tensors)
        described += episodes
    finish_shards(folder, count, described, meta)


def partial_of(folder: str | Path) -> Path:
    """Where the shards of `folder` lie until all are there; DataError if it holds other things than data."""
    path = Path(folder)
    if path.exists() and not (path / META).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{folder} is there and holds no data of ours ({META} is missing); name a new folder")
    return path.with_name(path.name + ".partial")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard whole or not at all; OSError if the disk is full."""
    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error
    os.replace(temporary, path)


def finish_shards(folder: str | Path, shards: int, described: list[dict], meta: Mapping) -> None:
    """Turn the partial folder of `folder` into the folder itself."""
    if not described:
        raise DataError(f"{folder} would hold no episodes; record at least one")
    partial = partial_of(folder)
    record = {**meta, "shards": shards, "episodes": len(described), "described": described}
    (partial / META).write_text(json.dumps(record))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def frame_shards(episodes: Iterable[Episode], per_shard: int = 64) -> Iterator[tuple[dict[str, Tensor], list[dict]]]:
    """Shards of episodes of one length: frames uint8 [N, T, H, W, 3], actions [N, T, A], poses [N, T, 3 or 12]."""
    episodes = iter(episodes)
    while held := list(itertools.islice(episodes, per_shard)):
        yield stacked(held, "frames", "actions", "poses"), [{"seed": e.seed, "walls": e.walls} for e in held]


def stacked(clips: Sequence[Any], *names: str) -> dict[str, Tensor]:
    """The arrays of clips under these names, [N, ...]."""
    return {name: torch.from_numpy(np.stack([getattr(clip, name) for clip in clips])) for name in names}


def captioned_shards(clips: Iterable[Captioned], encode: Encode, per_shard: int = 64) -> Iterator[Shard]:
    """Shards of captioned clips of one length: frames uint8 [N, T, H, W, 3], tokens half [N, L, D]."""
    clips = iter(clips)
    while held := list(itertools.islice(clips, per_shard)):
        tokens = encode([c.caption for c in held]).half()
        yield (
            {**stacked(held, "frames"), "tokens": tokens},
            [{"seed": c.seed, "caption": c.caption, **c.labels} for c in held],
        )


def talk_shards(
    clips: Iterable[Talk],
    encode: Encode,
    audio: AudioConfig,
    measure: Callable[[Talk], dict[str, float]],
    per_shard: int = 32,
) -> Iterator[Shard]:
    """As captioned ones, with audio features half [N, T, D], pcm int16 [N, S], mouth [N, T, 2], and `measures`."""
    clips = iter(clips)
    while held := list(itertools.islice(clips, per_shard)):
        heard = [clip_features(from_pcm16(c.pcm), len(c.frames), audio) for c in held]
        tensors = {**stacked(held, "frames", "pcm", "mouth"), "audio": torch.from_numpy(np.stack(heard)).half()}
        tensors["tokens"] = encode([c.caption for c in held]).half()
        told = [{"seed": c.seed, "caption": c.caption, **c.labels, "measures": measure(c)} for c in held]
        yield tensors, told


def read_meta(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(
            f"no data in {folder} ({META} is missing): make it with `vidistill data KIND {folder}`; "
            "scripts/reproduce_*.sh say how for each world"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); make the data again") from error


def read_shards(folder: str | Path, names: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """The tensors of every shard, in order; `names` picks some."""
    for i in range(read_meta(folder)["shards"]):
        path = Path(folder) / f"shard-{i:05d}.safetensors"
        try:
            with safe_open(path, framework="pt") as shard:
                yield {name: shard.get_tensor(name) for name in (names or shard.keys())}
        except (SafetensorError, FileNotFoundError) as error:
            raise DataError(f"{path} is missing, damaged or lacks {names} ({error}); make the data again") from error


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
    folder: str | Path, prompts: Sequence[str], negative: str, cache: Any, meta: Mapping, bar: Any = None
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
    partial = Path(folder) / f"{META}.tmp"
    partial.write_text(json.dumps(record))
    os.replace(partial, Path(folder) / META)


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

    def batch(self, batch: int, frames: int, size: tuple[int, int, int], seed: int, step: int) -> Batch:
        """Clips [B, frames, *size] of zeros under random prompts; batch number `step` depends on (seed, step) alone."""
        picked = np.random.default_rng((seed, step)).integers(0, len(self), size=batch)
        tokens = torch.stack([self.tokens(self.names[k]) for k in picked])
        negative = self.tokens(self.meta["negative_name"])[None].expand_as(tokens)
        return Batch(torch.zeros(()).expand(batch, frames, *size), Condition(tokens, negative=negative))


class Clips:
    """Episodes on disk, drawn as random windows; batch number `step` depends on (seed, step) alone.

    Shards are mapped, not read: only what is drawn comes into memory. Beside frames, latents or states an episode may
    have `actions` (one a latent) and `tokens` [L, D] of its prompt.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Iterable[str] | None = None,
        episodes: int = 0,
        camera: CameraConfig | None = None,
        reference: bool = False,
        curate: Ranges | None = None,
    ) -> None:
        """`episodes`: how many to use, from the first (rounded up to whole shards); 0 uses all.

        `camera`: latents also come with what this camera did, from the recorded poses (of either layout of
        `poses.pose_of`). `reference`: with their first picture as channels. `curate`: only clips whose measures lie in
        these ranges are drawn, see `dropped`.
        """
        self.camera, self.reference = camera, reference
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.parts: list[dict[str, Tensor]] = []
        self.ends: list[int] = []  # episodes up to and with each part
        for part in read_shards(folder, names):
            self.parts.append(part)
            self.ends.append(len(next(iter(part.values()))) + (self.ends[-1] if self.ends else 0))
            if episodes and self.ends[-1] >= episodes:
                break
        described = self.meta["described"][: len(self)]
        self.kept, self.dropped = curated(described, curate or {}, str(folder))  # episodes drawn; others by reason

    def __len__(self) -> int:
        return self.ends[-1]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in memory, shards joined."""
        return {name: torch.cat([p[name] for p in self.parts]) for name in self.parts[0]}

    def episode(self, name: str, k: int) -> Tensor:
        """Tensor `name` of episode `k`, mapped."""
        i = bisect.bisect_right(self.ends, k)
        return self.parts[i][name][k - (self.ends[i - 1] if i else 0)]

    @property
    def given(self) -> int:
        """Latents at the start of a clip that are known: 1, the picture it starts from, unless the data says so."""
        return self.meta.get("given", 1)

    @property
    def factor(self) -> int:
        """Px frames of a latent: what the data says, or what its packed actions show."""
        return self.meta.get("temporal") or (self.width_of("actions") - 1) // len(self.meta["actions"])

    @property
    def kind(self) -> str:
        """What an episode is: `frames` (pixels), `latents`, or `trajectories` of a teacher."""
        if "states" in self.parts[0]:
            return "trajectories"
        return "latents" if "latents" in self.parts[0] else "frames"

    def need(self, kind: str) -> None:
        """Raise DataError unless the episodes are of this kind."""
        if self.kind != kind:
            raise DataError(f"{self.folder} holds {self.kind}, {kind} are needed here: `vidistill data --help`")

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        if self.kind == "frames":
            self.need("latents")
        channels, height, width = self.parts[0]["states" if self.kind == "trajectories" else "latents"].shape[-3:]
        return channels, height, width

    def width_of(self, name: str) -> int:
        """Numbers in a row of `actions` or `tokens`; 0 if episodes have none."""
        return self.parts[0][name].shape[-1] if name in self.parts[0] else 0

    def condition(self, windows: Iterable[tuple[int, int]], length: int) -> Condition:
        """What (episode, first latent) windows of `length` latents are told."""
        picked, tokens, per_frame = list(windows), None, {}
        if self.width_of("actions"):
            rows = [self.episode("actions", e)[s : s + length] for e, s in picked]
            per_frame[ACTION_SITE] = torch.stack(rows).float()
        if self.camera is not None:
            poses = self.poses(picked, length)
            if poses is None:
                raise DataError(f"{self.folder} has no poses, which a camera is told from; record it again")
            per_frame |= walked(poses, self.camera, self.factor)
        if self.width_of("audio"):
            per_frame[AUDIO_SITE] = torch.stack([self.episode("audio", e)[s : s + length] for e, s in picked]).float()
        if self.width_of("tokens"):
            tokens = torch.stack([self.episode("tokens", e) for e, _ in picked]).float()
        return Condition(tokens, per_frame)

    def poses(self, windows: Iterable[tuple[int, int]], length: int) -> Tensor | None:
        """Recorded poses [B, length, 3 or 12] of windows; None where episodes have none."""
        if not self.width_of("poses"):
            return None
        return torch.stack([self.episode("poses", e)[s : s + length] for e, s in windows])

    def windows(
        self, batch: int, length: int, seed: int, step: int, name: str, stride: int = 1
    ) -> list[tuple[int, int]]:
        """(episode, first frame) of `batch` windows of `length` entries of tensor `name`, starts on `stride`."""
        total = self.parts[0][name].shape[1]
        if length > total:
            raise DataError(f"clips of {length} frames do not fit episodes of {total}; record longer ones")
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, (total - length) // stride + 1, size=batch) * stride
        drawn = [self.kept[k] for k in rng.integers(0, len(self.kept), size=batch)]
        return list(zip(drawn, starts.tolist(), strict=True))

    def begun(self, cond: Condition, x: Tensor) -> Condition:
        """`cond` of clips [B, F, C, H, W], told their first picture where a reference is asked for."""
        return replace(cond, channels=reference_channels(x[:, :1], 0, x.shape[1])) if self.reference else cond

    def frames(self, batch: int, length: int, seed: int, step: int) -> Tensor:
        """Pixels [B, length, 3, H, W] in [0, 1] of random windows of a frame dataset."""
        self.need("frames")
        windows = self.windows(batch, length, seed, step, "frames")
        picked = [self.episode("frames", e)[s : s + length] for e, s in windows]
        return torch.stack(picked).permute(0, 1, 4, 2, 3).float() / 255

    def latents(self, batch: int, length: int, seed: int, step: int) -> Batch:
        """Windows of a latent dataset that start from a picture: latent 0 is the codec's latent of one frame.

        Where the data are trajectories the teacher's samples are the clips.
        """
        if self.kind == "trajectories":
            whole = self.trajectories(batch, seed, step)
            if whole.x.shape[2] != length:
                raise DataError(f"{self.folder} holds clips of {whole.x.shape[2]} latents, not {length}")
            return replace(whole, x=whole.x[:, -1])
        self.need("latents")
        return self.gather(self.windows(batch, length, seed, step, "latents"), length)

    def trajectories(self, batch: int, seed: int, step: int) -> Batch:
        """Teacher trajectories: x [B, K + 1, F, C, H, W] holds the states at K levels, falling, then the sample."""
        self.need("trajectories")
        picked = [self.kept[k] for k in np.random.default_rng((seed, step)).integers(0, len(self.kept), size=batch)]
        states = torch.stack([self.episode("states", k) for k in picked]).float()
        cond = self.condition(((k, 0) for k in picked), states.shape[2])
        return Batch(states, self.begun(cond, states[:, -1]), self.given)

    def gather(self, windows: Iterable[tuple[int, int]], length: int) -> Batch:
        """The batch of (episode, first latent) windows of `length` latents."""
        latents, picked = [], list(windows)
        for e, s in picked:
            clip = self.episode("latents", e)[s : s + length]
            latents.append(torch.cat((self.episode("images", e)[s : s + 1].float(), clip[1:].float())))
        x = torch.stack(latents)
        return Batch(x, self.begun(start_of_clip(self.condition(picked, length)), x), self.given)


def start_of_clip(cond: Condition) -> Condition:
    """`cond` whose first frame is the picture before anything was done: its actions are zero, not null."""
    per_frame = {site: x.clone() for site, x in cond.per_frame.items()}
    if ACTION_SITE in per_frame:
        per_frame[ACTION_SITE][:, 0, :-1] = 0.0
    return Condition(cond.tokens, per_frame, cond.channels, cond.negative)


@torch.no_grad()
def latent_shard(shard: Shard, codec: Any) -> Shard:
    """A latent shard of a frame shard: latents and images half [N, F, C, H, W], actions [N, F, A'], poses
    [N, F, 3 or 12], tokens [N, L, D], what there is of them.

    `latents` is the encoded stream; `images` holds, for the last pixel frame of every latent, the codec's latent of
    that picture alone, which is what a clip starts from.
    """
    tensors, described = shard
    factor = codec.temporal_factor
    latents, images = [], []
    for frames in tensors["frames"]:
        px = frames.permute(0, 3, 1, 2).float() / 255
        latents.append(codec.encode(px[None])[0].half())
        images.append(codec.encode(px[::factor, None])[:, 0].half())
    out = {"latents": torch.stack(latents), "images": torch.stack(images)}
    out |= {name: LATENT_RATE[name](x, factor) for name, x in tensors.items() if name in LATENT_RATE}
    return out, described


LATENT_RATE: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "actions": pack_actions,
    "poses": lambda poses, factor: poses[:, ::factor].contiguous(),
    "audio": pack_audio,
    "mouth": lambda mouth, factor: mouth,  # at pixel rate, as it is judged
    "tokens": lambda tokens, factor: tokens,
}


LEVEL_TOLERANCE = 2e-3  # levels are written with few digits
