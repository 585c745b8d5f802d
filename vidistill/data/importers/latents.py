"""Frames that are there already as latents of a codec."""

import argparse
from pathlib import Path
from typing import Any

from vidistill import checkpoint
from vidistill.data.clips import Clips
from vidistill.data.importers.write import Part, meta_of, write_split
from vidistill.data.shards import META, DataError, Shard
from vidistill.data.types import count_episodes
from vidistill.progress import Bar

NOT_KEPT = ("shards", "episodes", "described")  # of meta, which are those of the folder that is written


def run(args: argparse.Namespace) -> str:
    """`vidistill data latents`: encode a data folder, or every one in a folder of splits; says what was written."""
    folders = {args.out: args.source}
    if not (args.source / META).is_file():
        inside = sorted(p.parent for p in args.source.glob(f"*/{META}"))
        folders = {args.out / p.name: p for p in inside}
    if not folders:
        raise FileNotFoundError(f"--from {args.source}: there are no frames in it; record some, or name another folder")
    codec = checkpoint.load(args.codec, "codec").net
    return "\n".join(encoded(out, source, args.codec, codec, Part.of(args.part)) for out, source in folders.items())


def encoded(out: Path, source: Path, name: str, codec: Any, part: Part) -> str:
    """Encode this part of the frames in `source`; returns what to say of it."""
    clips = Clips(source)
    clips.need("frames")
    height, width = clips.parts[0]["frames"].shape[-3:-1]
    try:
        codec.latent_shape(1, height, width)
    except ValueError as error:
        raise DataError(f"{source} does not suit codec {name}: {error}") from error
    starts = [0, *clips.ends]

    def make(i: int) -> Shard:
        tensors = clips.parts[i]
        return dict(tensors), clips.meta["described"][starts[i] : starts[i] + count_episodes(tensors)]

    meta = {key: value for key, value in clips.meta.items() if key not in NOT_KEPT} | {"codec": name}
    meta, total = meta_of(meta, codec, clips.width_of("poses") > 0), len(clips.parts)
    with Bar(len(part.share(total)), out.name, "shard") as bar:
        whole = write_split(out, total, make, meta, codec, part, lambda _: bar.update())
    return f"{out}: {len(clips)} episodes" if whole else f"{out}: part {part.index + 1} is written"


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data latents`."""
    p.description = "Encode recorded frames once a codec is trained: one data folder, or all splits of one. Resumes."
    p.epilog = "example: vidistill data latents data/mine-latents --from data/mine --codec runs/mine-codec/mine-codec"
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument(
        "--from", dest="source", type=Path, required=True, help="folder of frames, or of splits that hold them"
    )
    p.add_argument("--codec", required=True, help="a bundled name, the path of a codec, or a Wan folder")
    p.add_argument("--part", default="1/1", help="share of the work that this process does, e.g. 2/4 (default: all)")
