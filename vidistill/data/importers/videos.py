"""Folders and lists of videos as training data: inspected, cut, encoded, split by what they show."""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vidistill import checkpoint
from vidistill.conditioning.audio import AudioConfig, clip_features
from vidistill.conditioning.condition import Encode
from vidistill.config import build, settings
from vidistill.data.importers.decode import Frame, frames_of, nearest, rgb, sound_of
from vidistill.data.importers.inspect import Inspection, inspect
from vidistill.data.importers.listing import SIDECARS, Item, list_videos
from vidistill.data.importers.plan import (
    SPLITS,
    WINDOWS,
    PlanConfig,
    Verdict,
    Window,
    WindowConfig,
    common_rate,
    decide,
    in_split,
)
from vidistill.data.importers.report import PAGE, summary, write_report
from vidistill.data.importers.sidecars import Sidecars, fov_of, read_sidecars
from vidistill.data.importers.write import PER_SHARD, Clip, Part, meta_of, shard_of, write_split
from vidistill.data.shards import DataError, Shard
from vidistill.progress import Bar, track

INSPECTED = "inspected"  # folder of what each part found
INSPECTION = 2  # raised where a video would be found to be something else than before
FOV = 2.0  # degrees by which the field of view of videos may differ


@dataclass(frozen=True)
class Asked:
    """What is asked of an import beside its plan. `size`: height and width in pixels."""

    size: tuple[int, int] = (64, 64)
    resize: str = "crop"
    fps: float = 0.0  # 0: what most of the videos have
    still_fps: float = 12.0  # of folders of pictures
    cut: float = 0.12
    given: int | None = None
    codec: str | None = None
    text: Mapping[str, Any] | None = None
    audio: AudioConfig | None = None


@dataclass(frozen=True)
class Import:
    """An import that is decided: what there is, what becomes of it, and what all of it has in common."""

    items: Sequence[Item]
    inspected: Sequence[Inspection]
    verdicts: Sequence[Verdict]
    asked: Asked
    fps: float
    names: tuple[str, ...]  # of actions
    signed: frozenset[str]
    poses: bool
    fov: float

    @property
    def captioned(self) -> bool:
        return any(item.caption for item in self.items)

    def meta(self, split: str, source: str) -> dict[str, Any]:
        """What is noted of a split."""
        asked, size = self.asked, self.asked.size
        given = int(bool(self.names) or not self.captioned) if asked.given is None else asked.given
        out: dict[str, Any] = {"source": "videos", "from": source, "split": split, "fps": self.fps, "given": given}
        out |= {"px_size": size[0] if size[0] == size[1] else list(size), "codec": asked.codec}
        if self.names:
            out["actions"] = list(self.names)
        if self.captioned and asked.text:
            out["text"] = dict(asked.text)
        if asked.audio is not None:
            out["audio"] = asdict(asked.audio)
        if self.fov:
            out["fov"] = round(self.fov, 3)
        return out


# --- inspection -------------------------------------------------------------------------------------------------------


def inspect_all(out: Path, items: Sequence[Item], asked: Asked, part: Part) -> list[Inspection]:
    """What every video shows; this part's first, then those that no other part has looked at yet. Resumes."""
    folder = out / INSPECTED
    folder.mkdir(parents=True, exist_ok=True)
    found = known(folder, asked)
    own = list(part.share(len(items)))
    rest = [k for k in range(len(items)) if k % part.count != part.index]
    with (folder / f"{part.index + 1}-of-{part.count}.jsonl").open("a", encoding="utf-8") as file:
        for k in track(own + rest, "inspect", len(own + rest), "video"):
            item, stamp = items[k], stamp_of(items[k], asked)
            if k in rest and item.name not in found:  # another part may have found it by now
                found |= known(folder, asked)
            if item.name in found and found[item.name][0] == stamp:
                continue
            record = inspect(item, asked.cut, asked.still_fps)
            found[item.name] = stamp, record
            file.write(json.dumps({"stamp": stamp, **record.record()}, ensure_ascii=False) + "\n")
            file.flush()
    return [found[item.name][1] for item in items]


def stamp_of(item: Item, asked: Asked) -> list[Any]:
    """What must be as it was for an inspection to hold."""
    changed = item.path.stat().st_mtime_ns if item.path.exists() else 0
    beside = [p.stat().st_mtime_ns for s in SIDECARS if (p := item.beside([s]))]
    return [changed, beside, asked.cut, asked.still_fps, INSPECTION]


def known(folder: Path, asked: Asked) -> dict[str, tuple[list[Any], Inspection]]:
    """What was found before, by any part. A line that is damaged, or that a stop cut short, is passed over."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = dict(json.loads(line))
                stamp = list(record.pop("stamp"))
                found[str(record["name"])] = stamp, build(Inspection, record)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return found


# --- what all videos must have in common ------------------------------------------------------------------------------


def settle(items: Sequence[Item], inspected: Sequence[Inspection], asked: Asked, plan: PlanConfig) -> Import:
    """Decide what becomes of every video; those that lack what most of them have are left out, with the reason."""
    good = [found for found in inspected if found.scenes and not found.fault]
    names = most(tuple(found.actions) for found in good if found.actions) or ()
    low = {name for found in good for name, value in found.actions.items() if value < 0}
    poses = any(found.poses for found in good)
    fovs = {k: fov_shown(found, asked) for k, found in enumerate(inspected) if found.focal and found.facts}
    common = most(round(fov) for fov in fovs.values()) or 0
    fov = next((fov for fov in fovs.values() if round(fov) == common), 0.0)
    faults = dict[int, str]()
    for k, found in enumerate(inspected):
        if found.fault:
            faults[k] = found.fault
        elif names and not found.actions:
            faults[k] = "no actions: others have them beside the video"
        elif names and tuple(found.actions) != names:
            faults[k] = f"other actions: {', '.join(found.actions)}, most videos have {', '.join(names)}"
        elif poses and not found.poses:
            faults[k] = "no poses: others have them beside the video"
        elif fov and abs(fovs.get(k, 0.0) - fov) > FOV:
            faults[k] = f"other intrinsics: {fovs.get(k, 0.0):.0f} degrees across, most videos {fov:.0f}"
        elif asked.audio is not None and found.facts and not found.facts["sound"]:
            faults[k] = "no sound, which --audio asks for"
    verdicts = decide(inspected, faults, plan)
    if any(item.caption for item in items):
        verdicts = [
            verdict if item.caption or verdict.dropped else noted(verdict, "no caption: learned without words")
            for item, verdict in zip(items, verdicts, strict=True)
        ]
    both = [pair for name in names for pair in ((f"{name}_minus", f"{name}_plus") if name in low else (name,))]
    return Import(items, inspected, verdicts, asked, plan.fps, tuple(both), frozenset(low), poses, fov)


def most(values: Iterable[Any]) -> Any:
    """The value that comes most often, the first of those that do; None for none."""
    counts = Counter(values)
    return max(counts, key=counts.__getitem__) if counts else None


def noted(verdict: Verdict, note: str) -> Verdict:
    return replace(verdict, odd=(*verdict.odd, note))


def fov_shown(found: Inspection, asked: Asked) -> float:
    """Degrees across the part of a video that is kept."""
    sides = found.facts["height"], found.facts["width"]
    pick = max if asked.resize == "crop" else min
    scale = pick(asked.size[0] / sides[0], asked.size[1] / sides[1])
    return fov_of(found.focal, sides[1], asked.size[1] / scale / sides[1])


# --- clips ------------------------------------------------------------------------------------------------------------


def clips_of(job: Import, windows: Iterable[Window]) -> Iterator[Clip]:
    """The clips of windows, in order."""
    for number, group in groupby(windows, key=lambda w: w.item):
        item, found = job.items[number], job.inspected[number]
        beside = read_sidecars(item, found.frames, job.signed) if found.actions or found.poses else Sidecars()
        for window in group:
            yield clip_of(job, window, item, found, beside)


def clip_of(job: Import, window: Window, item: Item, found: Inspection, beside: Sidecars) -> Clip:
    """One clip, decoded from its file. DataError where the file is no longer what was inspected."""
    asked, counted = job.asked, found.uneven and (beside.actions is not None or beside.poses is not None)
    start = 0.0 if counted else window.start
    pictures, numbers, times = [], [], []
    frames = frames_of(item.path, asked.still_fps, start)
    for frame in nearest(frames, window.start, job.fps, window.frames):
        pictures.append(rgb(frame.raw, asked.size, asked.resize, found.facts["aspect"]))
        numbers.append(number_of(frame, start, found))
        times.append(frame.time)
    if len(pictures) != window.frames:
        raise DataError(
            f"{item.path} gave {len(pictures)} of {window.frames} frames from {window.start:.2f} s on: it has changed "
            f"since it was inspected; run the same command with another folder"
        )
    about: dict[str, Any] = {"video": item.name, "start": round(window.start, 4), "scene": window.scene}
    return Clip(
        np.stack(pictures),
        about,
        item.caption,
        None if beside.actions is None else beside.actions_at(numbers, times),
        None if beside.poses is None else beside.poses_at(numbers),
        None if asked.audio is None else features_of(item.path, window, asked.audio),
    )


def number_of(frame: Frame, start: float, found: Inspection) -> int:
    """The number of a frame in its file; after a seek it is known from its time."""
    number = frame.index if start == 0 or found.facts["fps"] == 0 else round(frame.time * found.fps)
    return min(number, found.frames - 1)


def features_of(path: Path, window: Window, audio: AudioConfig) -> np.ndarray:
    """Audio features [frames, D] of a window."""
    seconds = (window.frames + audio.wait) / audio.fps
    return clip_features(sound_of(path, window.start, seconds, audio.rate), window.frames, audio)


# --- the command ------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> str:
    """`vidistill data videos`: inspect, report and, unless it is a dry run, write the splits; says what was done."""
    out: Path = args.out
    if out.exists() and not (out / INSPECTED).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there and holds no videos imported before; name a new folder")
    listing, part = list_videos(args.source), Part.of(args.part)
    windows = WindowConfig(args.windows, args.frames, args.stride, args.per_scene, args.min_frames)
    text = None if args.text == ["none"] else settings(args.text)
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    if codec is not None:
        codec.latent_shape(1, *args.size)  # ValueError where sides are no whole latents
    asked = Asked(args.size, args.resize, args.fps, args.still_fps, args.cut, args.given, args.codec, text)
    inspected = inspect_all(out, listing.items, asked, part)
    fps = asked.fps or common_rate(inspected)
    if args.audio:
        asked = replace(asked, audio=build(AudioConfig, {**settings(args.audio), "fps": fps}))
    job = settle(listing.items, inspected, asked, PlanConfig(fps, windows, args.split, args.duplicates, args.frozen))
    report = summary(inspected, job.verdicts, listing.strays, fps)
    write_report(out, job.items, inspected, report, asked.still_fps)
    said = told(out, report)
    if not report["used"]:
        raise DataError(f"{said}\nno video can be used: see {out / PAGE}")
    if args.dry_run:
        return f"{said}\nnothing written yet: run it again without --dry-run"
    captions = {"text": text if job.captioned else None}
    encode = checkpoint.text_encoder(captions, (text or {}).get("folder"), offline=False)
    wanted = [split for split, share in zip(SPLITS, args.split, strict=True) if share]
    states = [write_one(out, split, job, str(args.source), encode, codec, part) for split in wanted]
    return "\n".join([said, *states])


def write_one(out: Path, split: str, job: Import, source: str, encode: Encode | None, codec: Any, part: Part) -> str:
    """Write this part of a split; returns what to say of it."""
    windows = list(in_split(job.verdicts, split))
    if not windows:
        return f"{out / split}: no clips, too few videos"
    shards = -(-len(windows) // PER_SHARD)

    def make(i: int) -> Shard:
        return shard_of(list(clips_of(job, windows[i * PER_SHARD : (i + 1) * PER_SHARD])), encode)

    with Bar(len(part.share(shards)), split, "shard") as bar:
        meta = meta_of(job.meta(split, source), codec, job.poses)
        whole = write_split(out / split, shards, make, meta, codec, part, lambda _: bar.update())
    return f"{out / split}: {len(windows)} clips" if whole else f"{out / split}: part {part.index + 1} is written"


def told(out: Path, report: Mapping[str, Any]) -> str:
    """What people read of a report on a terminal."""
    lines = [
        f"{report['used']} of {report['videos']} videos used, {report['hours']:.2f} h at {report['fps']:g} frames/s"
    ]
    lines += [f"  dropped {count}: {reason}" for reason, count in report["dropped"].items()]
    if report["strays"]:
        lines.append(f"  {len(report['strays'])} files belong to no video")
    return "\n".join([*lines, f"report: {out / PAGE}"])


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data videos`."""
    p.description = (
        "Cut, resize, encode and split videos. What lies beside NAME.mp4 is read too: its caption NAME.txt, a row of "
        "actions a frame NAME.actions.csv (or .jsonl), camera-to-world poses NAME.poses.npy [F, 4, 4] in OpenCV's axes "
        "with NAME.intrinsics.npy. Resumes after a stop."
    )
    p.epilog = "example: vidistill data videos data/mine --from clips/ --size 64x64 --fps 16 --dry-run"
    p.add_argument("out", type=Path, help="folder to write: train, validation, test and the report")
    p.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="folder of videos, or a list: .csv, .jsonl, videos2caption.json",
    )
    p.add_argument("--dry-run", action="store_true", help="inspect and report, write no clips")
    p.add_argument("--size", type="size", default=(64, 64), help="pixels of a frame (default: 64x64)")
    p.add_argument(
        "--resize", choices=("crop", "fit"), default="crop", help="cut off what is over, or add black (default: crop)"
    )
    p.add_argument("--fps", type="rate", default=0.0, help="frames a second (default: what most of the video has)")
    p.add_argument("--still-fps", type="rate", default=12.0, help="of folders of pictures (default: 12)")
    p.add_argument(
        "--windows",
        choices=WINDOWS,
        default="whole",
        help="whole: pieces of up to --frames; head: the first; slide: every --stride; uniform: --per-scene of them "
        "(default: whole)",
    )
    p.add_argument("--frames", type="count", default=321, help="frames of a clip at most (default: 321)")
    p.add_argument("--min-frames", type="count", default=17, help="frames of a clip at least, for whole (default: 17)")
    p.add_argument(
        "--stride", type="number", default=0, help="frames from window to window, for slide (default: --frames)"
    )
    p.add_argument("--per-scene", type="count", default=4, help="windows of a scene, for uniform (default: 4)")
    p.add_argument(
        "--cut", type="fraction", default=0.12, help="change of picture that is a cut, 0 for none (default: 0.12)"
    )
    p.add_argument(
        "--split", type="numbers", default=(0.9, 0.05, 0.05), help="train,validation,test (default: 0.9,0.05,0.05)"
    )
    p.add_argument(
        "--duplicates", choices=("keep", "drop"), default="keep", help="other encodings of a video (default: keep)"
    )
    p.add_argument(
        "--frozen", choices=("drop", "keep"), default="drop", help="videos in which nothing moves (default: drop)"
    )
    p.add_argument(
        "--given", type=int, choices=(0, 1), help="latents a clip starts from (default: 0 for captions alone)"
    )
    p.add_argument(
        "--codec", help="write latents of this codec instead of pixels: a bundled name, a path, a Wan folder"
    )
    p.add_argument(
        "--text", nargs="+", default=["kind=ngrams"], metavar="key=value", help="text encoder of captions, or none"
    )
    p.add_argument("--audio", nargs="+", default=[], metavar="key=value", help="audio features, e.g. kind=mel")
    p.add_argument("--part", default="1/1", help="share of the work that this process does, e.g. 2/4 (default: all)")
