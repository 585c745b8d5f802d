"""Recorded clips as files that people and other programs read: mp4, with captions, actions and poses beside them."""

import argparse
from pathlib import Path

import numpy as np

from vidistill.conditioning.camera import pose_of, rows_of
from vidistill.data.clips import Clips
from vidistill.data.importers.sidecars import opencv_poses
from vidistill.data.shards import DataError
from vidistill.io import write_text, write_video
from vidistill.progress import track


def write_files(folder: Path, name: str, clips: Clips, k: int) -> None:
    """Clip number `k` as NAME.mp4, and what `data videos` reads beside it: all but the pictures comes back exactly."""
    write_video(folder / f"{name}.mp4", clips.episode("frames", k).numpy(), clips.meta["fps"])
    if caption := clips.meta["described"][k].get("caption"):
        write_text(folder / f"{name}.txt", caption)
    if clips.width_of("actions"):
        rows = [",".join(repr(float(x)) for x in row) for row in clips.episode("actions", k)]
        write_text(folder / f"{name}.actions.csv", "\n".join([",".join(clips.meta["actions"]), *rows]))
    if clips.width_of("poses"):
        poses = rows_of(pose_of(clips.episode("poses", k))).float().numpy()
        np.save(folder / f"{name}.poses.npy", opencv_poses(poses))


def run(args: argparse.Namespace) -> str:
    """`vidistill data files`: write the clips of a data folder as files; says how many."""
    clips = Clips(args.source)
    clips.need("frames")
    height, width = clips.parts[0]["frames"].shape[-3:-1]
    if height % 2 or width % 2:
        raise DataError(f"{args.source} has frames of {height}x{width}: mp4 holds even sides alone")
    if args.out.exists() and any(args.out.iterdir()):
        raise DataError(f"{args.out} is there and not empty; name a new folder")
    args.out.mkdir(parents=True, exist_ok=True)
    for k in track(range(len(clips)), args.out.name, len(clips), "clip"):
        write_files(args.out, f"{k:06d}", clips, k)
    left = [name for name in ("audio", "pcm") if name in clips.parts[0]]
    return f"{args.out}: {len(clips)} clips" + f"; left out: {', '.join(left)}" * bool(left)


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data files`."""
    p.description = (
        "Write recorded clips as mp4 (H.264), with captions, actions and camera-to-world poses beside them as `data "
        "videos` reads them: bit for bit, but for the pictures. Give it --cut 0 --frozen keep to read clips that stand "
        "still, or jump, as they were."
    )
    p.epilog = "example: vidistill data files clips/ --from data/mine/train"
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--from", dest="source", type=Path, required=True, help="data folder of frames")
