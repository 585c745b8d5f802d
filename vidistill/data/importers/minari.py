"""Minari data sets whose observations are pictures: frames, and the actions between them."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidistill import checkpoint
from vidistill.data.importers.actions import ActionMap, action_map
from vidistill.data.importers.gym import resized
from vidistill.data.importers.plan import SPLITS, check_shares, splits
from vidistill.data.importers.write import PER_SHARD, Clip, Part, shard_of, write_split
from vidistill.data.shards import DataError, Shard


@dataclass(frozen=True)
class MinariConfig:
    """What is read of a Minari data set: `observation`, the key of the picture in observations that are dictionaries;
    frames a second; `size` (height, width), reached as `resize` says; names of the actions, as of `data gym`."""

    source: str
    observation: str = ""
    fps: float = 15.0
    size: tuple[int, int] = (64, 64)
    resize: str = "stretch"
    names: tuple[str, ...] = ()
    least: int = 17


def opened(source: str) -> Any:
    """A local Minari data set, by its id or its folder. ImportError without Minari, DataError where it is not there."""
    try:
        import minari
    except ImportError as error:
        raise ImportError("Minari data sets need Minari: pip install 'vidistill[minari]'") from error
    try:
        return minari.MinariDataset(Path(source) / "data") if Path(source).is_dir() else minari.load_dataset(source)
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(
            f"--from {source} is no Minari data set here ({error}); download it with `minari download`"
        ) from error


def pictures(observations: Any, cfg: MinariConfig) -> np.ndarray:
    """The pictures uint8 [T, H, W, 3] of an episode's observations; DataError where they are none."""
    if isinstance(observations, dict):
        if cfg.observation not in observations:
            raise DataError(
                f"--observation {cfg.observation!r} is not there; observations are {', '.join(observations)}"
            )
        observations = observations[cfg.observation]
    found = np.asarray(observations)
    if found.dtype != np.uint8 or found.ndim != 4 or found.shape[-1] != 3:
        raise DataError(
            f"{cfg.source} observes {found.dtype} {list(found.shape[1:])}, no pictures uint8 [H, W, 3]; record its "
            "environment with `vidistill data gym`"
        )
    return np.stack([resized(picture, cfg.size, cfg.resize) for picture in found])


def clips_of(data: Any, cfg: MinariConfig, named: ActionMap, episodes: Sequence[int]) -> Iterator[Clip]:
    """The episodes of these numbers, in order."""
    for episode in data.iterate_episodes(list(episodes)):
        frames = pictures(episode.observations, cfg)
        done = np.stack([np.zeros(len(named.names), np.float32), *(named.of(action) for action in episode.actions)])
        yield Clip(frames, {"episode": int(episode.id)}, actions=done[: len(frames)])


def splits_of(data: Any, cfg: MinariConfig, shares: Sequence[float]) -> dict[str, list[int]]:
    """Numbers of the long enough episodes of each split, by a hash of what they show: equal ones stay together."""
    check_shares(shares)
    seen = dict[int, str]()
    for episode in data.iterate_episodes():
        if len(episode.actions) + 1 >= cfg.least:
            seen[int(episode.id)] = hashlib.blake2b(pictures(episode.observations, cfg).tobytes()).hexdigest()
    if not seen:
        raise DataError(f"{cfg.source} has no episode of {cfg.least} frames or more; lower --min-frames")
    of = splits(seen.values(), shares)
    return {name: [k for k, content in seen.items() if of[content] == name] for name in SPLITS}


def run(args: argparse.Namespace) -> str:
    """`vidistill data minari`: write the splits; says what was written."""
    data = opened(args.source)
    names = tuple(filter(None, (args.names or "").split(",")))
    cfg = MinariConfig(args.source, args.observation, args.fps, args.size, args.resize, names, args.min_frames)
    named = action_map(data.action_space, cfg.names)
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    meta = {"source": "minari", "from": args.source, "fps": cfg.fps, "actions": list(named.names), "given": 1}
    meta |= {"px_size": cfg.size[0] if cfg.size[0] == cfg.size[1] else list(cfg.size), "codec": args.codec}
    meta |= {"resize": cfg.resize} if cfg.resize != "crop" else {}  # which data that say nothing are
    part = Part.of(args.part)
    return "\n".join(
        write_one(args.out / name, data, cfg, named, episodes, {**meta, "split": name}, codec, part)
        for name, episodes in splits_of(data, cfg, args.split).items()
        if episodes
    )


def write_one(
    out: Path, data: Any, cfg: MinariConfig, named: ActionMap, episodes: list[int], meta: Any, codec: Any, part: Part
) -> str:
    """Write this part of a split; returns what to say of it."""

    def make(i: int) -> Shard:
        return shard_of(list(clips_of(data, cfg, named, episodes[i * PER_SHARD : (i + 1) * PER_SHARD])))

    whole = write_split(out, -(-len(episodes) // PER_SHARD), make, meta, codec, part)
    return f"{out}: {len(episodes)} episodes" if whole else f"{out}: part {part.index + 1} is written"


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data minari`."""
    p.description = "Read a local Minari data set whose observations are pictures. Resumes after a stop."
    p.epilog = "example: vidistill data minari data/mine --from my/dataset-v0 --fps 15"
    p.add_argument("out", type=Path, help="folder to write: train, validation, test")
    p.add_argument("--from", dest="source", required=True, help="id of a data set that is downloaded, or its folder")
    p.add_argument("--observation", default="", help="key of the picture, where observations are dictionaries")
    p.add_argument("--fps", type="rate", default=15.0, help="frames a second (default: 15)")
    p.add_argument("--size", type="size", default=(64, 64), help="pixels of a frame (default: 64x64)")
    ways = ("crop", "fit", "stretch")
    p.add_argument("--resize", choices=ways, default="stretch", help="into the size (default: stretch)")
    p.add_argument("--names", help="of actions, with commas, as of `data gym`")
    p.add_argument("--min-frames", type="count", default=17, help="frames of an episode at least (default: 17)")
    p.add_argument("--split", type="numbers", default=(0.9, 0.05, 0.05), help="shares of train,validation,test")
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument("--part", default="1/1", help="share of the work that this process does, e.g. 2/4 (default: all)")
