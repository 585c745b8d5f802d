"""What becomes of every inspected video: kept or dropped and why, its split, and the windows that are cut from it."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vidistill.data.importers.inspect import Inspection, Scene, bands, distance

SPLITS = ("train", "validation", "test")
NEAR_BITS = 40  # of 192: fingerprints that differ in no more are of one video; those of two differ in about half
NEAR_SECONDS = 0.03  # share by which the lengths of one video in two encodings may differ
JITTER = 0.05  # of a frame, by which a container may round its times
SLOW = 0.8  # a video of fewer frames a second than this share of what is asked for would show them twice
WINDOWS = ("whole", "head", "slide", "uniform")


@dataclass(frozen=True)
class WindowConfig:
    """How clips are cut from scenes, in px frames at the rate of the data.

    `mode`: `whole` (pieces of `frames` one after the other, and the rest), `head` (the first `frames`), `slide`
    (`frames` every `stride`; 0: as many), `uniform` (`count` windows of `frames`, spread evenly). Scenes and rests
    shorter than `least` frames are left out.
    """

    mode: str = "whole"
    frames: int = 321
    stride: int = 0
    count: int = 4
    least: int = 17

    def __post_init__(self) -> None:
        if self.mode not in WINDOWS:
            raise ValueError(f"--windows {self.mode!r} is unknown; choose one of {', '.join(WINDOWS)}")
        if min(self.frames, self.count, self.least) < 1 or self.stride < 0:
            raise ValueError(
                f"--frames, --per-scene and --min-frames must be at least 1, --stride at least 0; got {self}"
            )
        if self.least > self.frames:
            raise ValueError(f"--min-frames {self.least} is more than --frames {self.frames}; ask for fewer")

    def cut(self, total: int) -> list[tuple[int, int]]:
        """(first frame, frames) of the windows of a scene of `total` frames."""
        size, last = self.frames, total - self.frames
        if self.mode == "whole":
            return [(k, min(size, total - k)) for k in range(0, total, size) if min(size, total - k) >= self.least]
        if last < 0:
            return []
        if self.mode == "head":
            return [(0, size)]
        if self.mode == "slide":
            return [(k, size) for k in range(0, last + 1, self.stride or size)]
        spread = {round(last * k / max(1, self.count - 1)) for k in range(self.count)}
        return [(k, size) for k in sorted(spread)]


@dataclass(frozen=True)
class Window:
    """A clip to be cut: from item number `item`, `frames` frames from `start` seconds on (its frame `first`)."""

    item: int
    scene: int
    first: int
    start: float
    frames: int


@dataclass(frozen=True)
class Verdict:
    """What becomes of a video. `dropped`: why nothing of it is used; `odd`: what a person may want to know."""

    name: str
    dropped: str = ""
    odd: tuple[str, ...] = ()
    split: str = ""
    same_as: str = ""  # name of the video of which this is another encoding
    windows: tuple[Window, ...] = ()


@dataclass(frozen=True)
class PlanConfig:
    """What is asked of the videos of a data set. `split`: shares of train, validation and test; `duplicates` (other
    encodings) and `frozen` (nothing moves): keep or drop."""

    fps: float
    windows: WindowConfig = WindowConfig()
    split: tuple[float, ...] = (0.9, 0.05, 0.05)
    duplicates: str = "keep"
    frozen: str = "drop"

    def __post_init__(self) -> None:
        check_shares(self.split)
        for name in ("duplicates", "frozen"):
            if getattr(self, name) not in ("keep", "drop"):
                raise ValueError(f"--{name} is keep or drop, got {getattr(self, name)!r}")

    def shows(self, scene: Scene) -> bool:
        """Whether a scene is worth a clip."""
        return not scene.black and (not scene.frozen or self.frozen == "keep")


def check_shares(shares: Sequence[float]) -> None:
    """ValueError unless there is a share of every split, together 1."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"--split lists the shares of {', '.join(SPLITS)}, together 1; got {list(shares)}")


def common_rate(inspected: Sequence[Inspection]) -> float:
    """The frames a second that most seconds of video have; 0 where there are none."""
    seconds = defaultdict[float, float](float)
    for found in inspected:
        if found.scenes and found.fps > 0:
            seconds[round(found.fps, 2)] += found.seconds
    return max(seconds, key=lambda fps: (seconds[fps], fps), default=0.0)


def decide(inspected: Sequence[Inspection], faults: Mapping[int, str], cfg: PlanConfig) -> list[Verdict]:
    """What becomes of every video, in their order; `faults`: what is wrong with what lies beside some of them."""
    of = clusters(inspected, cfg)
    split = splits((inspected[of[k]].fingerprint for k, found in enumerate(inspected) if found.scenes), cfg.split)
    out = []
    for k, found in enumerate(inspected):
        head = inspected[of[k]]
        first = head.name if of[k] != k else ""
        if reason := refused(found, cfg.fps) or faults.get(k, ""):
            out.append(Verdict(found.name, dropped=reason, odd=oddities(found, cfg.fps), same_as=first))
            continue
        if first and (cfg.duplicates == "drop" or found.content == head.content):
            out.append(Verdict(found.name, dropped=f"duplicate of {first}", same_as=first))
            continue
        windows, lost = windows_of(k, found, cfg)
        odd = (*oddities(found, cfg.fps), *([f"another encoding of {first}"] if first else []), *lost)
        reason = "" if windows else "; ".join(lost) or "no window fits it"
        if not windows:
            out.append(Verdict(found.name, reason, same_as=first))
            continue
        if any(scene.frozen and cfg.shows(scene) for scene in found.scenes):
            odd = (*odd, "frozen")
        out.append(Verdict(found.name, "", odd, split[head.fingerprint], first, windows))
    return out


def refused(found: Inspection, fps: float) -> str:
    """Why a video cannot be used at all, or nothing."""
    if not found.scenes:
        return f"corrupt: {found.error}" if found.error else "corrupt: there are no frames in it"
    if found.facts["transfer"]:
        return f"HDR ({found.facts['transfer']}): its colours need tone mapping first, e.g. ffmpeg's zscale and tonemap"
    if found.facts["rotation"] % 90:
        return f"rotated by {found.facts['rotation']} degrees: only quarter turns are read; turn it with ffmpeg first"
    if found.fps < SLOW * fps:
        return f"wrong fps: {found.fps:g} where {fps:g} are asked for, frames would repeat; lower --fps"
    return ""


def oddities(found: Inspection, fps: float) -> tuple[str, ...]:
    """What is unusual about a video that can be used."""
    facts, odd = found.facts, []
    if found.error and found.seconds:
        odd.append(f"corrupt: {found.error}; the {found.seconds:.1f} s before are used")
    if facts and facts["rotation"]:
        odd.append(f"rotated by {facts['rotation']} degrees, as the file asks")
    if facts and facts["alpha"]:
        odd.append("transparent pixels, laid over black")
    if facts and facts["depth"] > 8:
        odd.append(f"{facts['depth']} bits a colour, rounded to 8")
    if found.uneven:
        odd.append(f"variable frame rate, resampled to {fps:g}")
    elif found.scenes and abs(found.fps - fps) > 0.01 * fps:
        odd.append(f"{found.fps:g} fps, resampled to {fps:g}")
    if len(found.scenes) > 1:
        odd.append(f"{len(found.scenes) - 1} cuts, scenes kept apart")
    return tuple(odd)


def windows_of(item: int, found: Inspection, cfg: PlanConfig) -> tuple[tuple[Window, ...], list[str]]:
    """The windows of a video, and why scenes of it have none."""
    windows, lost = list[Window](), Counter[str]()
    for number, scene in enumerate(found.scenes):
        total = frames_in(scene, cfg.fps)
        if not cfg.shows(scene):
            lost["black" if scene.black else "frozen"] += 1
        elif not (cut := cfg.windows.cut(total)):
            wanted = cfg.windows.least if cfg.windows.mode == "whole" else cfg.windows.frames
            lost[f"too short (under {wanted} frames)"] += 1
        else:
            windows += [Window(item, number, k, scene.start + k / cfg.fps, size) for k, size in cut]
    if len(found.scenes) == 1:
        return tuple(windows), list(lost)
    return tuple(windows), [f"{count} scenes {reason}" for reason, count in sorted(lost.items())]


def frames_in(scene: Scene, fps: float) -> int:
    """Frames of a scene at a rate."""
    return int((scene.end - scene.start) * fps + JITTER) + 1


def clusters(inspected: Sequence[Inspection], cfg: PlanConfig) -> list[int]:
    """For every video the number of the first that shows the same, its own where none before it does."""
    of, heads = list(range(len(inspected))), defaultdict[tuple[int, int], list[int]](list)
    bits = max(8, len(inspected).bit_length() - 4)  # longer pieces among more videos: as many to compare with
    for k, found in enumerate(inspected):
        if not any(cfg.shows(scene) for scene in found.scenes):
            continue
        pieces = list(bands(found.fingerprint, bits))
        seen = {j for piece in pieces for j in heads[piece]}
        same = [j for j in sorted(seen) if near(found, inspected[j])]
        if same:
            of[k] = same[0]
            continue
        for piece in pieces:
            heads[piece].append(k)
    return of


def near(a: Inspection, b: Inspection) -> bool:
    """Whether two videos are encodings of one; of a still, however long."""
    still = all(scene.frozen for scene in (*a.scenes, *b.scenes))
    alike = abs(a.seconds - b.seconds) <= max(0.2, NEAR_SECONDS * max(a.seconds, b.seconds))
    return (alike or still) and distance(a.fingerprint, b.fingerprint) <= NEAR_BITS


def splits(contents: Iterable[str], shares: Sequence[float]) -> dict[str, str]:
    """The split of every content, by its hash.

    Another one changes nothing for those that are there, but where a split of a share would be empty: the content whose
    hash is nearest goes there.
    """
    place = {content: hashed(content) for content in contents}
    edges = [float(sum(shares[: i + 1])) for i in range(len(shares))]
    of = {k: SPLITS[next((i for i, edge in enumerate(edges) if at < edge), 2)] for k, at in place.items()}
    for i, name in reversed(list(enumerate(SPLITS))):
        counts = Counter(of.values())
        if shares[i] and not counts[name]:
            free = [k for k in place if counts[of[k]] > 1]
            if free:
                of[min(free, key=lambda k: (abs(place[k] - (edges[i] - shares[i] / 2)), k))] = name
    return of


def hashed(text: str) -> float:
    """A number in [0, 1) that `text` alone decides."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def in_split(verdicts: Sequence[Verdict], split: str) -> Iterator[Window]:
    """The windows of a split, in order."""
    for verdict in verdicts:
        if verdict.split == split:
            yield from verdict.windows
