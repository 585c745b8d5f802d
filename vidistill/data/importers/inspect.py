"""What a video shows, from one pass over it: cuts, black and frozen scenes, and a fingerprint of its content."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from av.video.reformatter import Interpolation

from vidistill.data.importers.decode import Facts, Frame, MediaError, facts_of, frames_of
from vidistill.data.importers.listing import Item
from vidistill.data.importers.sidecars import SidecarError, Sidecars, read_sidecars

SIDE = 32  # pixels along a side of the grey thumbnails that everything here is read from
BLACK = 20.0  # grey levels: a frame that is nowhere brighter is black
STILL = 4.0  # grey levels by which some part of a thumbnail must change before anything has moved
AROUND = 8  # frames on either side that a cut must stand out from
STANDS_OUT = 5.0  # times the usual change around it
KEPT = 512  # thumbnails kept of a video, however long
TIMES, CELLS, BITS = 16, 8, 192  # of a fingerprint: moments, cells along a side, bits


@dataclass(frozen=True)
class Scene:
    """A part of a video without a cut: first frame and time, last ones, and whether anything is to be seen in it."""

    first: int
    start: float
    last: int
    end: float
    black: bool
    frozen: bool


@dataclass(frozen=True)
class Inspection:
    """What is known of a video after it was decoded once. `error`: why nothing, or nothing more, could be read."""

    name: str
    bytes: int = 0
    frames: int = 0
    seconds: float = 0.0
    fps: float = 0.0
    uneven: bool = False  # frames last for times of their own
    facts: dict[str, Any] = field(default_factory=dict)
    scenes: tuple[Scene, ...] = ()
    fingerprint: str = ""  # bits of what moves, near for near videos
    content: str = ""  # hash of the thumbnails, equal for equal pictures
    error: str = ""
    actions: dict[str, float] = field(default_factory=dict)  # the lowest value of each action beside it
    poses: bool = False
    focal: float = 0.0  # horizontal focal length in pixels; 0: not known
    fault: str = ""  # what is wrong with what lies beside it

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """Looks at thumbnails one after the other and keeps numbers of all of them and a bounded number of pictures."""

    def __init__(self) -> None:
        self.changes, self.bright, self.moved = list[float](), list[bool](), list[bool]()
        self.times = list[float]()
        self.kept, self.every = list[tuple[float, np.ndarray]](), 1
        self.digest = hashlib.blake2b(digest_size=16)
        self.before: np.ndarray | None = None
        self.held: np.ndarray | None = None  # the thumbnail that the next one must differ from to have moved

    def see(self, time: float, thumbnail: np.ndarray) -> None:
        """Take in the next frame, uint8 [SIDE, SIDE]."""
        x = thumbnail.astype(np.float32)
        self.changes.append(0.0 if self.before is None else float(np.abs(x - self.before).mean()))
        moved = self.held is not None and float(np.abs(x - self.held).max()) >= STILL
        if self.held is None or moved:
            self.held = x
        self.moved.append(moved)
        self.bright.append(float(x.max()) > BLACK)
        if len(self.times) % self.every == 0:
            self.kept.append((time, thumbnail))
            if len(self.kept) > KEPT:
                self.kept, self.every = self.kept[::2], 2 * self.every
        self.times.append(time)
        self.digest.update(thumbnail.tobytes())
        self.before = x

    def cuts(self, share: float) -> list[int]:
        """Frames that begin another scene: they change by `share` of full range, and far more than those around."""
        changes = np.array(self.changes)
        found = []
        for k in np.flatnonzero(changes > 255 * share) if share else ():
            around = np.concatenate((changes[max(1, k - AROUND) : k], changes[k + 1 : k + AROUND + 1]))
            if not len(around) or changes[k] > STANDS_OUT * np.median(around):
                found.append(int(k))
        return found

    def scenes(self, share: float) -> tuple[Scene, ...]:
        """The scenes between cuts."""
        edges = [0, *self.cuts(share), len(self.times)]
        return tuple(
            Scene(
                first=a,
                start=self.times[a],
                last=b - 1,
                end=self.times[b - 1],
                black=not any(self.bright[a:b]),
                frozen=not any(self.moved[a + 1 : b]),
            )
            for a, b in pairwise(edges)
        )

    def fingerprint(self) -> str:
        """Bits of how the picture departs from its mean over time, at moments spread over the video.

        What stands still counts nothing, so that two recordings of one place differ, and one video in two encodings
        does not. Where nothing moves, how the picture departs from its mean over its area.
        """
        times, pictures = np.array([t for t, _ in self.kept]), np.stack([x for _, x in self.kept])
        asked = times[0] + (np.arange(TIMES) + 0.5) / TIMES * (times[-1] - times[0])
        at = np.abs(times[:, None] - asked).argmin(0)
        step = SIDE // CELLS
        cells = pictures[at].astype(np.float32).reshape(TIMES, CELLS, step, CELLS, step).mean((2, 4))
        departs = (cells - (cells.mean(0) if any(self.moved[1:]) else cells.mean())).ravel()
        return np.packbits(departs @ planes() > 0).tobytes().hex()


@lru_cache(maxsize=1)
def planes() -> np.ndarray:
    """Random directions [TIMES * CELLS * CELLS, BITS]; the side of each that a vector lies on is a bit of it."""
    return np.random.default_rng(0).standard_normal((TIMES * CELLS * CELLS, BITS)).astype(np.float32)


def inspect(item: Item, cut: float = 0.12, fps: float = 0.0) -> Inspection:
    """Decode a video once, in bounded memory, and read what lies beside it; `fps`: of a folder of pictures.

    What cannot be read is said in `error` and `fault`.
    """
    name, path = item.name, item.path
    watch, facts, error = Watch(), None, ""
    try:
        if not path.exists():
            raise MediaError("there is no such file")
        for frame in frames_of(path, fps):
            facts = facts or facts_of(path, frame.raw, fps)
            watch.see(frame.time, thumbnail(frame))
    except MediaError as damage:
        error = str(damage)
    if facts is None:
        return Inspection(name, size_of(path), error=error or "there are no frames in it")
    steps = np.diff(watch.times)
    seconds = watch.times[-1]
    rate = rate_of(facts, len(watch.times), seconds)
    beside, fault = Sidecars(), ""
    try:
        beside = read_sidecars(item, len(watch.times))
    except SidecarError as wrong:
        fault = str(wrong)
    return Inspection(
        name=name,
        bytes=size_of(path),
        frames=len(watch.times),
        seconds=round(seconds + 1 / rate, 3) if rate else 0.0,
        fps=rate,
        uneven=len(steps) > 1 and float(np.abs(steps - steps.mean()).max()) > 0.5 / max(rate, 1e-6),
        facts=asdict(facts),
        scenes=watch.scenes(cut),
        fingerprint=watch.fingerprint(),
        content=watch.digest.hexdigest(),
        error=error,
        actions=beside.lowest(),
        poses=beside.poses is not None,
        focal=beside.focal,
        fault=fault,
    )


def rate_of(facts: Facts, frames: int, seconds: float) -> float:
    """Frames a second: what the file says, where its frames agree, else what they show."""
    if frames < 2 or seconds <= 0:
        return facts.fps
    shown = (frames - 1) / seconds
    return facts.fps if abs(shown - facts.fps) < 0.02 * shown else round(shown, 3)


def thumbnail(frame: Frame) -> np.ndarray:
    """A frame as grey uint8 [SIDE, SIDE], its shape not kept."""
    options = {"width": SIDE, "height": SIDE, "interpolation": Interpolation.AREA}
    return frame.raw.reformat(format="gray", **options).to_ndarray()


def size_of(path: Path) -> int:
    """Bytes of a file, or of the pictures of a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.iterdir() if p.is_file())
    return path.stat().st_size if path.is_file() else 0


def distance(a: str, b: str) -> int:
    """Bits in which two fingerprints differ."""
    return (int(a, 16) ^ int(b, 16)).bit_count()


def bands(fingerprint: str, bits: int) -> Iterator[tuple[int, int]]:
    """Pieces of a fingerprint, `bits` long, with their places; near ones share at least one of them almost surely."""
    value = int(fingerprint, 16)
    for k in range(BITS // bits):
        yield k, (value >> (k * bits)) & ((1 << bits) - 1)
