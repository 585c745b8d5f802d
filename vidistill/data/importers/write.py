"""Clips of several lengths into data folders: a shard at a time, by one process or many, resumed where they stopped."""

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vidistill.conditioning.condition import Encode
from vidistill.data.meta import parse_meta
from vidistill.data.shards import (
    META,
    SETTINGS,
    WRITING,
    DataError,
    Shard,
    alone,
    finish_shards,
    latent_shard,
    partial_of,
    read_meta,
    write_shard,
)
from vidistill.data.types import pack_rows
from vidistill.distributed import rank, world_size
from vidistill.io import read_json, write_text

PER_SHARD = 32
LOCK = ".lock"


@dataclass(frozen=True)
class Clip:
    """An imported clip: frames uint8 [T, H, W, 3], where it is `about`, and what it shows in words.

    Per frame, where there are any: float32 actions [T, A] that led to it (the first are zero), poses [T, 12], audio
    features [T, D].
    """

    frames: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)
    caption: str | None = None
    actions: np.ndarray | None = None
    poses: np.ndarray | None = None
    audio: np.ndarray | None = None


def shard_of(clips: Sequence[Clip], encode: Encode | None = None) -> Shard:
    """A shard of clips; `encode` reads their captions, one that is missing as the empty one."""
    tensors = pack_rows("frames", [torch.from_numpy(c.frames) for c in clips])
    for name in ("actions", "poses", "audio"):
        rows = [getattr(c, name) for c in clips]
        if all(x is not None for x in rows):
            packed = pack_rows(name, [torch.from_numpy(x) for x in rows])
            tensors |= {key: x.half() if key == "audio" else x for key, x in packed.items()}
    if encode is not None:
        tensors["tokens"] = encode([c.caption or "" for c in clips]).half()
    captions = [{} if c.caption is None else {"caption": c.caption} for c in clips]
    return tensors, [{**c.about, **said} for c, said in zip(clips, captions, strict=True)]


@dataclass(frozen=True)
class Part:
    """Which share of the work this process does: number `index` of `count`, from 0."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, text: str) -> "Part":
        """The part that "2/4" spells, counted from 1, or torchrun's share of it; ValueError for another form."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
            raise ValueError(f"--part {text!r} is not NUMBER/COUNT, as in 1/4, 2/4, 3/4 and 4/4")
        processes = world_size()
        return cls((int(index) - 1) * processes + rank(), int(count) * processes)

    def share(self, total: int) -> range:
        """The numbers below `total` that this process sees to."""
        return range(self.index, total, self.count)


ALL = Part()


def meta_of(meta: Mapping[str, Any], codec: Any, posed: bool) -> dict[str, Any]:
    """`meta` of clips that `codec` (None: nothing) encodes: poses without actions need to know the px frames of a
    latent, which packed actions show."""
    told = codec is not None and posed and not meta.get("actions")
    return {**meta, "temporal": codec.temporal_factor} if told else dict(meta)


def write_split(
    folder: Path,
    shards: int,
    make: Callable[[int], Shard],
    meta: Mapping[str, Any],
    codec: Any = None,
    part: Part = ALL,
    done: Callable[[int], object] = lambda clips: None,
) -> bool:
    """Write this part of `shards` shards, those that are not there yet, and finish the folder once all are.

    `make(i)` gives shard i; `codec` turns its frames into latents; `done` is told how many clips a shard has. Returns
    whether the folder is complete. DataError where one of other settings was begun, and for a part
    that another process writes.
    """
    if (folder / META).is_file():
        check_same(folder, read_meta(folder), meta)
        return True
    partial = begun(folder, {**meta, "shards": shards})
    with alone(partial, f"{part.index + 1}-of-{part.count}"):
        return write_part(folder, partial, shards, make, meta, codec, part, done)


def write_part(
    folder: Path,
    partial: Path,
    shards: int,
    make: Callable[[int], Shard],
    meta: Mapping[str, Any],
    codec: Any,
    part: Part,
    done: Callable[[int], object],
) -> bool:
    """Write what is missing of a part into `partial`, and finish `folder` once all are there; see `write_split`."""
    for i in part.share(shards):
        if (folder / META).is_file():  # finished by another process, which had all parts to write
            break
        path = partial / f"shard-{i:05d}.safetensors"
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            tensors, described = make(i)
            if codec is not None:
                tensors, described = latent_shard((tensors, described), codec)
            write_text(path.with_suffix(".json"), json.dumps(described))
            write_shard(path, tensors)
        done(i)
    with (folder.parent / LOCK).open("ab") as lock:  # another process may finish at the same moment
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / META).is_file():
            shutil.rmtree(partial, ignore_errors=True)
            return True
        paths = [partial / f"shard-{i:05d}.safetensors" for i in range(shards)]
        if not all(path.is_file() for path in paths):
            return False
        notes = [path.with_suffix(".json") for path in paths]
        described = [clip for note in notes for clip in read_json(note)]
        finish_shards(folder, shards, described, meta)
        locks = (path.name for path in folder.glob(f"{WRITING}*"))
        for note in (*(path.name for path in notes), *locks, SETTINGS):
            (folder / note).unlink(missing_ok=True)
    return True


def append_clip(folder: Path, clip: Clip, meta: Mapping[str, Any]) -> None:
    """Add a clip to a data folder as a shard of its own; what was there stays complete, whatever happens.

    DataError where the folder holds clips of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = (folder / META).is_file()
        record = read_meta(folder) if there else {**json.loads(json.dumps(meta)), "shards": 0, "described": []}
        check_same(folder, record, meta)
        tensors, described = shard_of([clip])
        write_shard(folder / f"shard-{record['shards']:05d}.safetensors", tensors)
        record |= {"shards": record["shards"] + 1, "described": [*record["described"], *described]}
        text = json.dumps({**record, "episodes": len(record["described"])})
        parse_meta(json.loads(text), folder / META)
        write_text(folder / META, text)


def begun(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The partial folder of `folder`, new or begun with the same settings."""
    partial, asked = partial_of(folder), json.loads(json.dumps(settings))
    partial.mkdir(parents=True, exist_ok=True)
    note = partial / SETTINGS
    found = read_json(note) if note.is_file() else asked
    if not isinstance(found, dict):
        raise DataError(f"{note} is damaged: it must hold keys and values; remove {partial}")
    check_same(partial, found, asked)
    write_text(note, json.dumps(asked, sort_keys=True))
    return partial


def check_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """DataError where a folder is there, whole or in part, that was asked for in other words."""
    other = [key for key, value in json.loads(json.dumps(asked)).items() if found.get(key) != value]
    if other:
        key = other[0]
        raise DataError(
            f"{folder} is there with {key} {found.get(key)!r} where {asked[key]!r} is asked for; ask for the same to "
            "go on, remove it, or name another folder"
        )
