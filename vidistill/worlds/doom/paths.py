"""Scripted walks that look away or walk off and come back: what memory is judged on.

They are played in the real engine, so the true pictures of the revisit exist. Paths that need no memory do not count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vidistill import metrics
from vidistill.data.types import Episode
from vidistill.io import to_float
from vidistill.progress import Bar
from vidistill.worlds.doom.maps import FRAME_TEXTURE, centre_texture
from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig, replay

FIRST_ROOM = 96  # of a split, after those of clips and long walks
FARTHEST = 40  # px frames of walking out: about 6 map units / 64, more than most rooms have
LEFT, RIGHT, FORWARD = (ACTIONS.index(name) for name in ("turn_left", "turn_right", "forward"))


@dataclass(frozen=True)
class PathConfig:
    """`seconds` away from the start view, `paths` that count for each; frames stand still for `lead` before leaving and
    `hold` after coming back, of which the last `judged` are compared.

    A path counts if the walker really comes back, the wall in the centre is within `near` (map units / 64) and has a
    picture, and the last view away from it neither shows the same picture nor resembles it by `floor_psnr` dB. For each
    path that counts `tries` worlds are tried, at most.
    """

    seconds: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    paths: int = 24
    lead: int = 8
    hold: int = 12
    judged: int = 6
    near: float = 6.0
    floor_psnr: float = 18.0
    seed: int = 0
    tries: int = 8

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) <= 0 or min(self.paths, self.judged, self.tries) < 1:
            raise ValueError("revisit needs seconds, paths, judged and tries above 0")
        if self.judged + 2 > self.hold or self.lead < 1:
            raise ValueError(f"revisit.hold {self.hold} must be judged {self.judged} + 2 or more, and lead at least 1")


def look_away(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray:
    """Actions [frames, 4]: turn away by up to 145 degrees, look around there, turn back."""
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    turn = min(round(145 / doom.turn_degrees), (frames - 1) // 2)
    back = LEFT + RIGHT - side
    out[:turn, side] = out[frames - turn :, back] = 1
    for start in range(turn + 4, frames - turn - 12, 16):  # a little to one side and to the other, net nothing
        out[start : start + 4, back], out[start + 6 : start + 10, side] = 1, 1
    return out


def full_turn(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray | None:
    """Actions of one turn all the way around, in eight parts with rests between; None where there is too little time.

    Slower turns would not do: the engine rounds angles, and the walker would not come back.
    """
    part = round(360 / doom.turn_degrees / 8)
    if frames < 8 * part:
        return None
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    for k in range(8):
        start = k * frames // 8
        out[start : start + part, side] = 1
    return out


def walk_out(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray | None:
    """Actions that turn around, walk off for `reach` of the time left (at most FARTHEST frames), turn and walk back."""
    half = round(180 / doom.turn_degrees)
    steps = int(reach * min(FARTHEST, (frames - 2 * half) / 2))
    if steps < 4:
        return None
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    out[:half, side] = out[half + steps : 2 * half + steps, side] = 1
    out[half : half + steps, FORWARD] = out[2 * half + steps : 2 * (half + steps), FORWARD] = 1
    return np.roll(out, (frames - 2 * (half + steps)) // 2, axis=0)


KINDS = {"look": look_away, "turn": full_turn, "walk": walk_out}


@dataclass(frozen=True)
class Revisit:
    """A path that counts: its kind, what the engine showed, the true wall picture, and the frames that are compared."""

    kind: str
    walk: Episode
    label: int
    away: int  # frame of the last view that is not the revisited one
    judged: range


def returns(poses: np.ndarray, first: int, last: int) -> bool:
    """Whether frame `last` is seen from where frame `first` was."""
    gone = np.linalg.norm(poses[last, :2] - poses[first, :2])
    turned = (poses[last, 2] - poses[first, 2] + np.pi) % (2 * np.pi) - np.pi
    return bool(gone < 0.05 and abs(turned) < math.radians(1.0))


def frames_of(cfg: PathConfig, seconds: float, doom: DoomConfig, chunked: int) -> tuple[int, int]:
    """(frames on the way, frames in all): whole multiples of `chunked` after the first."""
    away = round(seconds * doom.fps)
    least = cfg.lead + away + cfg.hold
    return away, 1 + -(-(least - 1) // chunked) * chunked


def make_path(cfg: PathConfig, doom: DoomConfig, kind: str, seconds: float, seed: int, chunked: int) -> Revisit | None:
    """The path of a kind in the world of a seed, or None if it does not count there."""
    away, total = frames_of(cfg, seconds, doom, chunked)
    rng = np.random.default_rng([cfg.seed, seed])
    side = (LEFT, RIGHT)[int(rng.integers(2))]
    for reach in (1.0, 0.5, 0.25):
        script = KINDS[kind](away, side, doom, reach)
        if script is None:
            return None
        actions = np.zeros((total, len(ACTIONS)), np.float32)
        actions[cfg.lead : cfg.lead + away] = script
        walk = replay(doom, seed, actions)
        end = cfg.lead + away
        if returns(walk.poses, 0, end):
            break
        if kind != "walk":
            return None
    else:
        return None
    judged = range(end + cfg.hold - cfg.judged - 1, end + cfg.hold - 1)
    return counted(cfg, kind, walk, judged, cfg.lead + away // 2)


def counted(cfg: PathConfig, kind: str, walk: Episode, judged: range, away: int) -> Revisit | None:
    """The path, if only memory can say what its revisit shows."""
    label, distance = centre_texture(walk.walls, walk.poses[0])
    other, _ = centre_texture(walk.walls, walk.poses[away])
    if label in (-1, FRAME_TEXTURE, other) or distance > cfg.near:
        return None
    still, back = (to_float(walk.frames[t]) for t in (away, judged[0]))
    if float(metrics.psnr(still, back)) >= cfg.floor_psnr:
        return None
    return Revisit(kind, walk, label, away, judged)


def paths_of(cfg: PathConfig, doom: DoomConfig, seconds: float, chunked: int, worlds: Sequence[int]) -> list[Revisit]:
    """`cfg.paths` paths that count, kinds in turn, each in a world of its own, of the seeds `worlds`."""
    found: list[Revisit] = []
    kinds = [k for k in KINDS if KINDS[k](round(seconds * doom.fps), LEFT, doom, 1.0) is not None]
    with Bar(cfg.paths, f"paths of {seconds:g} s", unit="path") as bar:
        for seed in worlds:
            path = make_path(cfg, doom, kinds[len(found) % len(kinds)], seconds, seed, chunked)
            if path is not None:
                found.append(path)
                bar.update()
            if len(found) == cfg.paths:
                return found
    if not found:
        raise ValueError(f"no path of {seconds:g} s counts in {len(worlds)} worlds; raise revisit.tries")
    return found
