"""The memory benchmark as a folder: paths for any system to play, and its videos to judge. See MEMORY.md."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidistill import metrics
from vidistill.evaluation import report
from vidistill.evaluation.clips import Batch
from vidistill.evaluation.report import Pictures, Sheet
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.spatial_memory import METRICS, ROWS, SpatialMemoryConfig, batches_of, counted, judged_on
from vidistill.evaluation.suite import add_certainty, measure, run_figures
from vidistill.io import picture_files, read_image, read_json, read_video, save_png, to_float, write_json
from vidistill.worlds import WORLDS
from vidistill.worlds.doom.paths import KINDS, PathConfig
from vidistill.worlds.doom.recorder import ACTIONS

FORMAT = "vidistill-memory-2"
GRID = 12  # px frames: all paths are 1 + a multiple of it
START_DB = 20.0  # to the start picture: a codec keeps 30; medians: the next frame 16, other rooms 9
FPS_OFF = 0.01  # share by which the rate of a video may differ


def names_of(batch: Batch) -> list[str]:
    """What the paths of a batch are called."""
    assert batch.rooms is not None
    kinds, seconds = batch.facts["kind"].tolist(), batch.facts["seconds"].tolist()
    return [f"{list(KINDS)[k]}-{s:g}s-{seed}" for k, s, seed in zip(kinds, seconds, batch.rooms.tolist(), strict=True)]


def write_paths(folder: Path, cfg: SpatialMemoryConfig, split: str) -> dict[str, Any]:
    """Write `benchmark.json`, and for every path `paths/NAME.json` and its start picture `starts/NAME.png`.

    Returns what benchmark.json holds. ValueError for a folder that has anything in it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--write-paths {folder} is not empty; name a new folder, which its paths are to be alone in")
    rooms = Rooms("doom", WORLDS["doom"], split, cfg.first_seed)
    engine, paths = rooms.world.config(), []
    for batch in batches_of(rooms, cfg, GRID):
        actions, poses = (batch.facts[name].tolist() for name in ("actions", "poses"))
        starts = (255 * batch.px[:, 0]).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for k, name in enumerate(names_of(batch)):
            write_json(folder / "paths" / f"{name}.json", {"actions": actions[k], "poses": poses[k]})
            save_png(folder / "starts" / f"{name}.png", starts[k])
            paths.append({"name": name, "frames": len(actions[k]), "video": f"videos/{name}.mp4"})
    known = {"format": FORMAT, "split": split, "first_seed": cfg.first_seed, "fps": engine.fps, "size": engine.size}
    known |= {"actions": [*ACTIONS], "paths": paths}
    known["settings"] = {f.name: asdict(cfg)[f.name] for f in fields(PathConfig)}
    write_json(folder / "benchmark.json", known)
    return known


def read_paths(folder: Path, cfg: SpatialMemoryConfig) -> tuple[Rooms, SpatialMemoryConfig, dict[str, int]]:
    """The rooms and settings that the paths in a folder were made with, and the frames of each by name."""
    path = folder / "benchmark.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no benchmark.json; write the paths first: vidistill eval --write-paths {folder}"
        )
    found = read_json(path)
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT}; write the paths anew (--write-paths)")
    settings = {**found["settings"], "seconds": tuple(found["settings"]["seconds"])}
    rooms = Rooms("doom", WORLDS["doom"], found["split"], found["first_seed"])
    own = replace(cfg, **settings, first_seed=found["first_seed"])
    return rooms, own, {path["name"]: path["frames"] for path in found["paths"]}


def source_of(folder: Path, name: str) -> Path:
    """The video of a path, or the folder of its pictures."""
    file = folder / "videos" / f"{name}.mp4"
    return file if file.is_file() else folder / "videos" / name


def load(folder: Path, name: str, frames: int, size: int, fps: float) -> np.ndarray:
    """The first `frames` pictures [frames, size, size, 3] of a video; ValueError if it is not what was asked for."""
    source = source_of(folder, name)
    if source.is_dir():
        files, rate = picture_files(source)[:frames], fps
        shown = np.stack([read_image(file, (size, size)) for file in files]) if files else np.empty((0, size, size, 3))
        sizes = {Image.open(file).size for file in files}
    else:
        shown, rate = read_video(source)
        sizes = {(shown.shape[2], shown.shape[1])}
    if len(shown) < frames:
        raise ValueError(
            f"{source} has {len(shown)} frames, needed are {frames} with the start picture; make it longer"
        )
    if abs(rate / fps - 1) > FPS_OFF:
        raise ValueError(f"{source} has {rate:g} frames a second, the paths have {fps:g}; write it at that rate")
    if wrong := sizes - {(size, size)}:
        found = "{}x{}".format(*wrong.pop())
        raise ValueError(f"{source} shows {found} pixels, the benchmark has {size}x{size}; resize it yourself")
    return shown[:frames]


def check_videos(folder: Path, frames: Mapping[str, int], size: int, fps: float) -> None:
    """ValueError that names what is missing, before anything is judged."""
    missing = [name for name in frames if not source_of(folder, name).exists()]
    if missing:
        raise ValueError(
            f"{folder / 'videos'} lacks {len(missing)} of {len(frames)} videos, first of them {missing[0]}.mp4 (or a "
            f"folder {missing[0]} of its pictures); all paths must be played"
        )
    for name, count in frames.items():
        first = load(folder, name, count, size, fps)[0]
        start = read_image(folder / "starts" / f"{name}.png", (size, size))
        likeness = float(metrics.psnr(*(to_float(px[None])[None] for px in (first, start))))
        if likeness < START_DB:
            raise ValueError(
                f"{source_of(folder, name)} does not begin with starts/{name}.png ({likeness:.1f} dB to it, at least "
                f"{START_DB:g}): its first frame is that picture, and the actions lead to the frames behind it"
            )


def report_folder(folder: Path, out: str) -> Path:
    return Path(out) / f"{folder.resolve().name}-memory"


def judge_videos(folder: Path, cfg: SpatialMemoryConfig) -> dict[str, Any]:
    """Figures of the videos in a folder that `write_paths` began, beside real video and pasting baselines."""
    if cfg.out:
        report.check_plots()
    rooms, own, frames = read_paths(folder, cfg)
    engine = rooms.world.config()
    check_videos(folder, frames, engine.size, engine.fps)
    data = judged_on(batches_of(rooms, own, GRID), rooms, own)
    if [name for batch in data.batches for name in names_of(batch)] != [*frames]:
        raise ValueError(f"{folder / 'benchmark.json'} names other paths than its settings give; write them anew")

    def videos(batch: Batch) -> Tensor:
        total = batch.px.shape[1]
        return torch.stack([to_float(load(folder, n, total, engine.size, engine.fps)) for n in names_of(batch)])

    tallies = measure(METRICS, {"videos": videos, **ROWS}, data)
    result: dict[str, Any] = {row: run_figures(METRICS, runs, tallies["real"][0]) for row, runs in tallies.items()}
    add_certainty(METRICS, result, tallies, {}, own.draws)
    result["videos"] = {"name": folder.resolve().name, **result["videos"]}
    result |= {"schema": 2, "protocol": {**asdict(own), "split": rooms.split, "counted": counted(data, own)}}
    plain: dict[str, Any] = report.plain(result)
    if cfg.out:
        shown: Mapping[str, Sequence[np.ndarray]] = {row: runs[0].shown for row, runs in tallies.items()}
        sheet = Sheet.beside("clips", shown, "The first path of every kind.", "path", data.fps * data.every, data.names)
        report.write(report_folder(folder, cfg.out), METRICS, plain, Pictures(data.fps, [sheet]), [])
    return plain
