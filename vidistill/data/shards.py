"""Recorded clips on disk: folders of safetensors shards that appear only when they are complete."""

import fcntl
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidistill.conditioning.audio import AudioConfig, clip_features, from_pcm16
from vidistill.conditioning.condition import Encode, pack_actions, pack_audio
from vidistill.data.meta import META, DataError, parse_meta
from vidistill.data.types import Captioned, Episode, Talk, count_episodes, pack_rows, unpack_rows
from vidistill.io import read_json, write_atomic, write_text
from vidistill.ops.device import accelerator

log = logging.getLogger("vidistill")

SETTINGS = "settings.json"
WRITING = ".writing-"  # begins the names of files that are locked while a part is written
PICTURE_PX = 2**23  # pixels of single pictures that are encoded at once: 20 of 480 x 832

Shard = tuple[dict[str, Tensor], list[dict]]  # tensors whose first axis is the episode, a description of each


def write_shards(folder: str | Path, shards: Iterable[Shard], meta: Mapping) -> None:
    """Write shards and `meta` as a folder that appears only when complete; DataError if other things lie there."""
    partial = partial_of(folder)
    partial.mkdir(parents=True, exist_ok=True)
    with alone(partial, "all") as lock:
        for leftover in partial.iterdir():
            if leftover != lock:
                remove(leftover)
        described: list[dict] = []
        count = 0
        for count, (tensors, episodes) in enumerate(shards, 1):
            write_shard(partial / f"shard-{count - 1:05d}.safetensors", tensors)
            described += episodes
        finish_shards(folder, count, described, meta)
        (Path(folder) / lock.name).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def alone(partial: Path, part: str) -> Iterator[Path]:
    """Inside, no other process of this machine writes the same part of `partial`; gives the file that says so.

    DataError where one does.
    """
    path = partial / f"{WRITING}{part}"
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{partial} is being written by another process: wait for it or stop it, or name another folder"
            ) from error
        except OSError as error:  # a file system without locks
            log.warning("%s cannot be locked (%s): let no other process write it", partial, error.strerror)
        _held.add(lock)
        try:
            yield path
        finally:
            _held.discard(lock)


_held: set[IO[bytes]] = set()  # locks of this process


def let_go() -> None:
    """In a forked child: its parent alone holds the locks, or they would outlive it in workers that wait for ever."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=let_go)


def partial_of(folder: str | Path) -> Path:
    """Where the shards of `folder` lie until all are there; DataError if it holds other things than data."""
    path = Path(folder)
    if path.exists() and not (path / META).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{folder} is there and holds no data of ours ({META} is missing); name a new folder")
    return path.with_name(path.name + ".partial")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one shard whole or not at all; OSError if the disk is full."""
    write_atomic(path, lambda p: save_file({name: x.contiguous() for name, x in tensors.items()}, p))


def finish_shards(folder: str | Path, shards: int, described: list[dict], meta: Mapping) -> None:
    """Turn the partial folder of `folder` into the folder itself."""
    if not described:
        raise DataError(f"{folder} would hold no episodes; record at least one")
    partial = partial_of(folder)
    record = {**meta, "shards": shards, "episodes": len(described), "described": described}
    text = json.dumps(record)
    parse_meta(json.loads(text), partial / META)
    write_text(partial / META, text)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def frame_shards(episodes: Iterable[Episode], per_shard: int = 64) -> Iterator[tuple[dict[str, Tensor], list[dict]]]:
    """Shards of episodes of one length: frames uint8 [N, T, H, W, 3], actions [N, T, A], poses [N, T, 3 or 12]."""
    episodes = iter(episodes)
    while held := list(itertools.islice(episodes, per_shard)):
        yield arrays(held), [{"seed": e.seed, "walls": e.walls} for e in held]


def arrays(clips: Sequence[Any]) -> dict[str, Tensor]:
    """The arrays of clips [N, ...] by the names of their fields; those of a world's own kind of clip come along."""
    named = [name for name, value in vars(clips[0]).items() if isinstance(value, np.ndarray)]
    return {name: torch.from_numpy(np.stack([vars(clip)[name] for clip in clips])) for name in named}


def captioned_shards(clips: Iterable[Captioned], encode: Encode, per_shard: int = 64) -> Iterator[Shard]:
    """Shards of captioned clips of one length: frames uint8 [N, T, H, W, 3], tokens half [N, L, D]."""
    clips = iter(clips)
    while held := list(itertools.islice(clips, per_shard)):
        tokens = encode([c.caption for c in held]).half()
        yield (
            {**arrays(held), "tokens": tokens},
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
        tensors = {**arrays(held), "audio": torch.from_numpy(np.stack(heard)).half()}
        tensors["tokens"] = encode([c.caption for c in held]).half()
        described = [{"seed": c.seed, "caption": c.caption, **c.labels, "measures": measure(c)} for c in held]
        yield tensors, described


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The meta of the data in `folder`, see `meta.Meta`; DataError names the field that is wrong.

    Asked for a field that it lacks it raises a DataError, too.
    """
    path = Path(folder) / META
    if not path.is_file():
        raise FileNotFoundError(
            f"no data in {folder} ({META} is missing): make it with `vidistill data KIND {folder}`; "
            "scripts/reproduce_*.sh say how for each world"
        )
    try:
        raw = read_json(path)
    except ValueError as error:
        raise DataError(f"{error}; make the data again") from error
    return parse_meta(raw, path)


def read_shards(folder: str | Path, names: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """The tensors of every shard, in order; `names` picks some."""
    for i in range(read_meta(folder)["shards"]):
        path = Path(folder) / f"shard-{i:05d}.safetensors"
        try:
            with safe_open(path, framework="pt") as shard:
                yield {name: shard.get_tensor(name) for name in (names or shard.keys())}
        except (SafetensorError, FileNotFoundError) as error:
            raise DataError(f"{path} is missing, damaged or lacks {names} ({error}); make the data again") from error


@torch.no_grad()
def latent_shard(shard: Shard, codec: Any) -> Shard:
    """A latent shard of a frame shard: latents and images half [N, F, C, H, W], actions [N, F, A'], poses
    [N, F, 3 or 12], tokens [N, L, D], what there is of them.

    `latents` is the encoded stream; `images` holds, for the last pixel frame of every latent, the codec's latent of
    that picture alone, which is what a clip starts from. Px frames at the end of an episode that fill no whole latent
    are left out. The codec is moved to the GPU, if there is one.
    """
    tensors, described = shard
    where = accelerator()
    codec.to(where)
    factor = codec.temporal_factor
    latents, images = [], []
    count = count_episodes(tensors)
    for k in range(count):
        frames = unpack_rows(tensors, "frames", k)
        px = whole_latents(frames, factor).permute(0, 3, 1, 2).float() / 255
        latents.append(codec.encode(px[None].to(where))[0].half().cpu())
        pictures = px[::factor, None].split(max(1, PICTURE_PX // (px.shape[-2] * px.shape[-1])))
        images.append(torch.cat([codec.encode(some.to(where))[:, 0].half().cpu() for some in pictures]))
    out = pack_rows("latents", latents) | pack_rows("images", images)
    for name in (n for n in tensors if n in LATENT_RATE):
        out |= pack_rows(name, [LATENT_RATE[name](unpack_rows(tensors, name, k), factor) for k in range(count)])
    return out, described


def whole_latents(rows: Tensor, factor: int) -> Tensor:
    """The rows of px frames [T, ...] that whole latents of `factor` px frames cover: a rest at the end is left out."""
    return rows[: 1 + (len(rows) - 1) // factor * factor]


# What becomes of a tensor of one episode, a row a px frame, where its latents hold `factor` px frames.
LATENT_RATE: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "actions": lambda rows, factor: pack_actions(whole_latents(rows, factor)[None], factor)[0],
    "poses": lambda rows, factor: whole_latents(rows, factor)[::factor].contiguous(),
    "audio": lambda rows, factor: pack_audio(whole_latents(rows, factor)[None], factor)[0],
    "mouth": lambda rows, factor: rows,  # at pixel rate, as it is judged
    "tokens": lambda rows, factor: rows,
}
