"""LeRobot data sets, layouts v2.0, v2.1 and v3.0: frames of one camera, actions and states, tasks as captions."""

import argparse
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidistill import checkpoint
from vidistill.config import settings
from vidistill.data.importers.decode import MediaError, frames_of, rgb
from vidistill.data.importers.gym import repeat_for, resized
from vidistill.data.importers.plan import SPLITS, WINDOWS, WindowConfig, check_shares, splits
from vidistill.data.importers.sidecars import FORBIDDEN
from vidistill.data.importers.write import PER_SHARD, Clip, Part, shard_of, write_split
from vidistill.data.shards import DataError, Shard
from vidistill.io import read_json

LAYOUTS = ("v2.0", "v2.1", "v3.0")
HELD_OUT = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}  # theirs -> ours
SHARES = (0.9, 0.05, 0.05)
STATE = "observation."  # what a name of it begins with is measured at a frame; others are done after it
Table = Mapping[str, Any]  # columns of a parquet file: arrays [rows, ...] of numbers, lists of anything else


@dataclass(frozen=True)
class Episode:
    """An episode: where its rows are, and its video with the second at which it begins there (None: in the rows)."""

    number: int
    length: int
    rows: Path
    video: Path | None
    start: float
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """A number of an action or a state: its feature, its place there, its name, and how far it goes in the data."""

    feature: str
    place: int
    name: str
    low: float = 0.0
    high: float = 0.0

    @property
    def ways(self) -> list[tuple[str, float, float]]:
        """(name, value that is 0, value that is 1) of the actions that it becomes: two, where it goes both ways from 0;
        one, from its lowest value to its highest, where it does not; none where it never changes."""
        if self.low < 0 < self.high:
            return [(f"{self.name}_minus", 0.0, self.low), (f"{self.name}_plus", 0.0, self.high)]
        return [(self.name, self.low, self.high)] if self.low < self.high else []


@dataclass(frozen=True)
class DataSet:
    """A LeRobot data set on this disk, seen through one `camera`, told the numbers of `axes`."""

    root: Path
    info: Mapping[str, Any]
    camera: str
    episodes: tuple[Episode, ...] = ()
    tasks: Mapping[int, str] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()

    @property
    def fps(self) -> float:
        return float(self.info["fps"])

    @property
    def features(self) -> list[str]:
        return list(dict.fromkeys(axis.feature for axis in self.axes))


# --- what there is ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def table(path: Path, columns: tuple[str, ...] | None = None) -> Table:
    """Columns of a parquet file, those of them that it has; DataError where it cannot be read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("LeRobot data sets need PyArrow: pip install 'vidistill[lerobot]'") from error
    try:
        known = pq.read_schema(path).names
        wanted = [n for n in known if not n.startswith("stats/")] if columns is None else list(columns)
        found = pq.read_table(path, columns=[name for name in wanted if name in known])
        return {name: column(found[name]) for name in found.column_names}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is missing or damaged ({error}); download the data set again") from error


def column(values: Any) -> np.ndarray | list[Any]:
    """A column as an array, where it holds numbers or lists of them of one length."""
    import pyarrow as pa

    flat = pa.concat_arrays(values.chunks) if values.num_chunks else values.combine_chunks()
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type) or pa.types.is_fixed_size_list(flat.type):
        flat = flat.flatten()
    if not (pa.types.is_integer(flat.type) or pa.types.is_floating(flat.type) or pa.types.is_boolean(flat.type)):
        return values.to_pylist()
    numbers = flat.to_numpy(zero_copy_only=False)
    return numbers if flat.type == values.type else numbers.reshape(len(values), -1)


def lines(path: Path) -> list[Any]:
    """The JSON objects of a file, one a line; DataError where it is missing or damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged ({error}); download the data set again") from error


def opened(root: Path, camera: str, actions: Sequence[str]) -> DataSet:
    """The data set in a folder; DataError where there is none, or another camera or feature is asked for."""
    if not (root / "meta" / "info.json").is_file():
        raise DataError(f"--from {root} is no LeRobot data set (meta/info.json is missing); name the folder of one")
    info = read_json(root / "meta" / "info.json")
    if (layout := str(info.get("codebase_version"))) not in LAYOUTS:
        raise DataError(f"{root} has layout {layout}; what is read are {', '.join(LAYOUTS)}: convert it with LeRobot")
    try:
        camera = camera_of(info["features"], camera)
        axes = tuple(axis for name in actions for axis in axes_of(info["features"], name, actions[0]))
        found = DataSet(root, info, camera, axes=axes)
        episodes, tasks = (episodes_3 if layout == "v3.0" else episodes_2)(found)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{root / 'meta'} lacks {error}; download the data set again") from error
    if not episodes:
        raise DataError(f"{root} has no episodes; name a data set with some")
    if len({axis.name for axis in axes}) < len(axes):
        raise DataError(f"{root} names actions twice: {', '.join(a.name for a in axes)}; ask for fewer with --actions")
    return DataSet(root, info, camera, tuple(sorted(episodes, key=lambda e: e.number)), tasks, axes)


def camera_of(features: Mapping[str, Any], asked: str) -> str:
    """The feature that is the camera asked for, by its name or the last part of it; the only one for none."""
    cameras = [
        name
        for name, about in features.items()
        if about["dtype"] in ("video", "image") and not about.get("info", {}).get("video.is_depth_map")
    ]
    fits = [name for name in cameras if asked in ("", name, name.rpartition(".")[2])]
    if len(fits) != 1:
        raise DataError(f"--camera {asked or 'is missing'}: choose one of {', '.join(cameras) or 'none, it has none'}")
    return fits[0]


def axes_of(features: Mapping[str, Any], name: str, first: str) -> Iterator[Axis]:
    """The numbers of a feature by their names in it; those of another one than the `first` say whose they are."""
    if name not in features or not features[name]["dtype"].startswith(("float", "int", "bool")):
        known = [key for key, about in features.items() if about["dtype"].startswith("float") and key != "timestamp"]
        raise DataError(f"--actions {name} is no feature of numbers; what there is are {', '.join(known)}")
    size, own = math.prod(features[name]["shape"]), features[name].get("names")
    while isinstance(own, Mapping):  # {"motors": [...]} and the like
        own = [part for value in own.values() for part in (value if isinstance(value, list) else [value])]
    short = name.rpartition(".")[2]
    own = own if own and len(own) == size else [f"{short}{k}" for k in range(size)]
    for k, part in enumerate(own):
        clean = "".join("_" if letter in FORBIDDEN else letter for letter in str(part))
        yield Axis(name, k, clean if name == first else f"{short}.{clean}")


def episodes_2(data: DataSet) -> tuple[list[Episode], dict[int, str]]:
    """Episodes and tasks of the layouts v2.0 and v2.1: a file an episode."""
    root, info = data.root, data.info
    video = info["features"][data.camera]["dtype"] == "video"
    out = []
    for line in lines(root / "meta" / "episodes.jsonl"):
        number = int(line["episode_index"])
        place = {"episode_chunk": number // info["chunks_size"], "episode_index": number, "video_key": data.camera}
        path = root / info["video_path"].format(**place) if video else None
        told = tuple(map(str, line.get("tasks", ())))
        out.append(Episode(number, int(line["length"]), root / info["data_path"].format(**place), path, 0.0, told))
    return out, {int(line["task_index"]): str(line["task"]) for line in lines(root / "meta" / "tasks.jsonl")}


def episodes_3(data: DataSet) -> tuple[list[Episode], dict[int, str]]:
    """Episodes and tasks of the layout v3.0: many episodes a file."""
    root, info, key = data.root, data.info, f"videos/{data.camera}"
    video, out = info["features"][data.camera]["dtype"] == "video", []
    for path in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        found = table(path)
        for k, number in enumerate(found["episode_index"]):
            rows = {"chunk_index": found["data/chunk_index"][k], "file_index": found["data/file_index"][k]}
            film, start = None, 0.0
            if video:
                film_at = {"chunk_index": found[f"{key}/chunk_index"][k], "file_index": found[f"{key}/file_index"][k]}
                film = root / info["video_path"].format(video_key=data.camera, **film_at)
                start = float(found[f"{key}/from_timestamp"][k])
            told = tuple(map(str, found["tasks"][k] if "tasks" in found else ()))
            where = root / info["data_path"].format(**rows)
            out.append(Episode(int(number), int(found["length"][k]), where, film, start, told))
    tasks = table(root / "meta" / "tasks.parquet")
    words = next(name for name in tasks if name != "task_index")
    return out, dict(zip(map(int, tasks["task_index"]), map(str, tasks[words]), strict=True))


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(data: DataSet, episode: Episode, *more: str) -> Table:
    """The rows of an episode in order: its features, its tasks, columns `more`; DataError where some are missing."""
    found = table(episode.rows, (*data.features, "episode_index", "frame_index", "task_index", *more))
    if missing := [name for name in (*data.features, "episode_index", "frame_index", *more) if name not in found]:
        raise DataError(f"{episode.rows} has no column {missing[0]}; download the data set again")
    own = np.flatnonzero(found["episode_index"] == episode.number)
    own = own[np.argsort(found["frame_index"][own], kind="stable")]
    if len(own) != episode.length:
        raise DataError(
            f"{episode.rows} has {len(own)} rows of episode {episode.number}, meta says {episode.length}; download the "
            "data set again"
        )
    return {n: x[own] if isinstance(x, np.ndarray) else [x[k] for k in own] for n, x in found.items()}


def numbers_of(data: DataSet, episode: Episode, rows: Table) -> np.ndarray:
    """The numbers float64 [T, axes] of an episode; DataError for what is none."""
    try:
        flat = {name: np.asarray(rows[name], np.float64).reshape(episode.length, -1) for name in data.features}
        out = np.stack([flat[axis.feature][:, axis.place] for axis in data.axes], 1)
    except (ValueError, TypeError, IndexError) as error:
        raise DataError(f"{episode.rows}: episode {episode.number} holds what is no number ({error})") from error
    if not np.isfinite(out).all():
        raise DataError(f"{episode.rows}: episode {episode.number} holds numbers that are not finite; leave it out")
    return out


def surveyed(data: DataSet) -> tuple[DataSet, list[str]]:
    """The data set with the reach of its axes, and for every episode a hash of what was done in it."""
    low, high = np.full(len(data.axes), np.inf), np.full(len(data.axes), -np.inf)
    contents = []
    for episode in data.episodes:
        found = numbers_of(data, episode, rows_of(data, episode))
        low, high = np.minimum(low, found.min(0, initial=np.inf)), np.maximum(high, found.max(0, initial=-np.inf))
        told = hashlib.blake2b(found.tobytes())
        told.update("\n".join(episode.tasks).encode())
        contents.append(told.hexdigest())
    axes = (Axis(a.feature, a.place, a.name, float(low[k]), float(high[k])) for k, a in enumerate(data.axes))
    return DataSet(data.root, data.info, data.camera, data.episodes, data.tasks, tuple(axes)), contents


def actions_at(data: DataSet, numbers: np.ndarray, picked: Sequence[int]) -> np.ndarray:
    """Actions float32 [T, A] from 0 to 1 of the `picked` frames: what was done since the one before, and what is
    measured at a frame there. The first row is zero: nothing was done before a clip."""
    out = []
    for k, axis in enumerate(data.axes):
        rows = np.zeros(len(picked))
        for i in range(1, len(picked)):
            at = picked[i]
            rows[i] = numbers[at, k] if axis.feature.startswith(STATE) else numbers[picked[i - 1] : at, k].mean()
        for _, zero, one in axis.ways:
            share = np.clip((rows - zero) / (one - zero), 0, 1)
            share[0] = 0
            out.append(share)
    return np.stack(out, 1).astype(np.float32)


# --- clips ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What is asked of the pictures: frames a second, (height, width) and how it is reached."""

    fps: float
    size: tuple[int, int]
    resize: str


@dataclass(frozen=True)
class Window:
    """A clip to be cut: the numbers of its frames in an episode."""

    episode: Episode
    frames: tuple[int, ...]


def windows_of(data: DataSet, episode: Episode, fps: float, cut: WindowConfig) -> list[Window]:
    """The windows of an episode at a rate, each of the frames that are nearest."""
    step = data.fps / fps
    total = math.floor((episode.length - 1) / step + 1e-9) + 1
    return [
        Window(episode, tuple(math.ceil(k * step - 0.5) for k in range(first, first + count)))
        for first, count in cut.cut(total)
    ]


def clips_of(data: DataSet, asked: Asked, windows: Iterable[Window]) -> Iterator[Clip]:
    """The clips of windows, in order."""
    for window in windows:
        episode, picked = window.episode, window.frames
        rows = rows_of(data, episode, *(() if episode.video else (data.camera,)))
        frames = list((filmed if episode.video else kept)(data, asked, window, rows))
        check_shown(window, len(frames))
        about = {"episode": episode.number, "first": picked[0]}
        actions = actions_at(data, numbers_of(data, episode, rows), picked)
        yield Clip(np.stack(frames), about, task_of(data, episode, rows, picked[0]), actions)


def task_of(data: DataSet, episode: Episode, rows: Table, at: int) -> str | None:
    """What the task is at a row of an episode, in words."""
    said = data.tasks.get(int(rows["task_index"][at])) if "task_index" in rows else None
    return said or next(iter(episode.tasks), None)


def filmed(data: DataSet, asked: Asked, window: Window, _: Table) -> Iterator[np.ndarray]:
    """The pictures of a window from its video."""
    episode, wanted = window.episode, set(window.frames)
    assert episode.video is not None
    try:
        for frame in frames_of(episode.video, start=episode.start + window.frames[0] / data.fps):
            number = round((frame.time - episode.start) * data.fps)
            if number in wanted:
                wanted.remove(number)
                yield rgb(frame.raw, asked.size, asked.resize)
            if not wanted:
                return
    except MediaError as error:
        raise DataError(f"{episode.video}: episode {episode.number}: {error}; download the data set again") from error


def kept(data: DataSet, asked: Asked, window: Window, rows: Table) -> Iterator[np.ndarray]:
    """The pictures of a window from its rows, which hold their files."""
    for k in window.frames:
        held = rows[data.camera][k]
        try:
            file = io.BytesIO(held["bytes"]) if held["bytes"] else data.root / held["path"]
            with Image.open(file) as picture:
                yield resized(np.asarray(picture.convert("RGB")), asked.size, asked.resize)
        except Exception as error:  # a damaged file is whatever the decoder makes of it
            raise DataError(f"{window.episode.rows}: row {k} holds no picture ({error})") from error


def whole(data: DataSet) -> tuple[DataSet, list[str]]:
    """The data set without its damaged episodes, and what is wrong with each: all rows and pictures are read once.

    DataError where none is left.
    """
    good, faults = list[Episode](), list[str]()
    asked = Asked(data.fps, (2, 2), "crop")
    for episode in data.episodes:
        try:
            rows = rows_of(data, episode, *(() if episode.video else (data.camera,)))
            numbers_of(data, episode, rows)
            window = Window(episode, tuple(range(episode.length)))
            shown = sum(1 for _ in (filmed if episode.video else kept)(data, asked, window, rows))
            check_shown(window, shown)
            good.append(episode)
        except DataError as error:
            faults.append(f"episode {episode.number} is left out: {error}")
    if not good:
        raise DataError(f"{data.root} has no episode that is whole; {faults[0]}")
    return replace(data, episodes=tuple(good)), faults


def check_shown(window: Window, shown: int) -> None:
    """DataError unless a window has as many pictures as frames."""
    episode, picked = window.episode, window.frames
    if shown != len(picked):
        raise DataError(
            f"{episode.video or episode.rows}: episode {episode.number} shows {shown} of {len(picked)} frames from "
            f"{picked[0]} on; download the data set again"
        )


def split_up(data: DataSet, contents: Sequence[str], shares: Sequence[float] | None) -> dict[str, list[Episode]]:
    """The episodes of each split: the data set's own where it holds some out and no shares are asked for, else by what
    was done in them, so that copies of an episode stay together."""
    own = data.info.get("splits") or {}
    if shares is None and set(own) - {"train"}:
        if unknown := sorted(set(own) - set(HELD_OUT)):
            raise DataError(f"{data.root} has a split {unknown[0]!r}, known are {', '.join(HELD_OUT)}; say --split")
        out: dict[str, list[Episode]] = {name: [] for name in SPLITS}
        for theirs, span in own.items():
            first, _, stop = str(span).partition(":")
            out[HELD_OUT[theirs]] += [e for e in data.episodes if int(first) <= e.number < int(stop)]
        return out
    of = splits(contents, SHARES if shares is None else shares)
    return {n: [e for e, said in zip(data.episodes, contents, strict=True) if of[said] == n] for n in SPLITS}


# --- the command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    """`vidistill data lerobot`: write the splits; says what was written."""
    if args.split is not None:
        check_shares(args.split)
    cut = WindowConfig(args.windows, args.frames, args.stride, args.per_scene, args.min_frames)
    data, faults = opened(args.source, args.camera, tuple(args.actions.split(","))), list[str]()
    if args.damaged == "skip":
        data, faults = whole(data)
    data, contents = surveyed(data)
    asked = Asked(args.fps or data.fps / repeat_for(data.fps), args.size, args.resize)
    if asked.fps > data.fps:
        raise ValueError(
            f"--fps {asked.fps:g} is more than the {data.fps:g} of the data: frames would repeat; lower it"
        )
    text = None if args.text == ["none"] or len(set(data.tasks.values())) < 2 else settings(args.text)
    encode = checkpoint.text_encoder({"text": text}) if text else None
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    ways = [way for axis in data.axes for way in axis.ways]
    if not ways:
        raise DataError(f"{args.source}: {args.actions} never changes; choose other --actions")
    meta: dict[str, Any] = {"source": "lerobot", "from": str(args.source), "camera": data.camera, "fps": asked.fps}
    meta |= {
        "actions": [name for name, _, _ in ways],
        "given": 1,
        "codec": args.codec,
        **({"text": text} if text else {}),
    }
    meta |= {"ranges": {name: [zero, one] for name, zero, one in ways}}
    meta |= {"px_size": args.size[0] if args.size[0] == args.size[1] else list(args.size)}
    said = [f"{len(data.episodes)} episodes at {asked.fps:g} frames/s; actions {', '.join(meta['actions'])}"]
    said += [f"  {len(faults)} episodes are damaged", *(f"  {fault}" for fault in faults)] if faults else []
    said += [f"  {axis.name} never changes, and is left out" for axis in data.axes if not axis.ways]
    for split, episodes in split_up(data, contents, args.split).items():
        windows = {e.number: windows_of(data, e, asked.fps, cut) for e in episodes}
        short = sum(1 for found in windows.values() if not found)
        said += [f"  {split}: {short} episodes are too short for a clip, and left out"] * bool(short)
        every = [window for found in windows.values() for window in found]
        if every:
            said.append(write_one(args, {**meta, "split": split}, data, asked, every, encode, codec))
    return "\n".join(said)


def write_one(
    args: argparse.Namespace, meta: Any, data: DataSet, asked: Asked, windows: list[Window], encode: Any, codec: Any
) -> str:
    """Write this part of a split; returns what to say of it."""

    def make(i: int) -> Shard:
        return shard_of(list(clips_of(data, asked, windows[i * PER_SHARD : (i + 1) * PER_SHARD])), encode)

    out, part = args.out / meta["split"], Part.of(args.part)
    whole = write_split(out, -(-len(windows) // PER_SHARD), make, meta, codec, part)
    return f"{out}: {len(windows)} clips" if whole else f"{out}: part {part.index + 1} is written"


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data lerobot`."""
    p.description = (
        "Read a LeRobot data set on this disk (layouts v2.0, v2.1, v3.0). Actions go from 0 to 1 over their range in "
        "the data, NAME_minus and NAME_plus where they go both ways from 0. Resumes after a stop."
    )
    p.epilog = "example: vidistill data lerobot data/blocks --from blocks/ --camera top"
    p.add_argument("out", type=Path, help="folder to write: train, validation, test")
    p.add_argument("--from", dest="source", type=Path, required=True, help="folder of the data set")
    p.add_argument("--camera", default="", help="feature of the pictures, or the last part of its name")
    p.add_argument("--actions", default="action", help="features, e.g. action,observation.state (default: action)")
    p.add_argument("--size", type="size", default=(64, 64), help="pixels of a frame (default: 64x64)")
    p.add_argument("--resize", choices=("crop", "fit"), default="crop", help="into the size (default: crop)")
    p.add_argument("--fps", type="rate", help="frames a second (default: the data's, or a part of them near 15)")
    p.add_argument("--windows", choices=WINDOWS, default="whole", help="as of `data videos` (default: whole)")
    p.add_argument("--frames", type="count", default=321, help="frames of a clip at most (default: 321)")
    p.add_argument("--min-frames", type="count", default=17, help="frames of a clip at least (default: 17)")
    p.add_argument("--stride", type="number", default=0, help="frames from window to window, for slide")
    p.add_argument("--per-scene", type="count", default=4, help="windows of an episode, for uniform (default: 4)")
    p.add_argument(
        "--split", type="numbers", help="train,validation,test (default: the data's own, else 0.9,0.05,0.05)"
    )
    p.add_argument("--text", nargs="+", default=["kind=ngrams"], metavar="key=value", help="encoder of tasks, or none")
    p.add_argument(
        "--damaged",
        choices=("stop", "skip"),
        default="stop",
        help="episodes that cannot be read: say the first, or leave them all out (reads everything twice)",
    )
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument("--part", default="1/1", help="share of the work that this process does, e.g. 2/4 (default: all)")
