"""Scripted walks that memory is judged on: they leave a view and return, go where it must not be seen, or go straight.

They are played in the real engine, so the true pictures exist. Paths that need no memory do not count.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from vidistill import metrics
from vidistill.data.types import Episode
from vidistill.io import to_float
from vidistill.progress import Bar
from vidistill.worlds.doom.maps import FRAME_TEXTURE, World, centre_texture, clearance, make_world
from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig, replay_many

FIRST_ROOM = 96  # of a split, after those of clips and long walks
FARTHEST = 40  # px frames of walking out: about 6 map units / 64, more than most rooms have
STRAIGHT = 56  # px frames of a straight walk: 8 map units / 64, which one room in four has
LEAST_STRAIGHT = 32  # by then the start picture has left the memory of a window
STAY = 6  # px frames at a view that is to be seen again
RADIUS = 32  # map units from the walker's middle to his side
ELSEWHERE = 1.0  # map units / 64 from where the same heading is another view
LEFT, RIGHT, FORWARD = (ACTIONS.index(name) for name in ("turn_left", "turn_right", "forward"))


@dataclass(frozen=True)
class PathConfig:
    """`seconds` away from a view, `paths` of each kind that count for each time; frames stand still for `lead` before
    leaving and `hold` after coming back, of which the last `judged` are compared.

    A path counts if the walker really gets where the kind says, the wall in the centre of the view is within `near`
    (map units / 64) and has a picture, and the view away from it neither shows the same picture nor resembles it by
    `floor_psnr` dB. For each path that counts `tries` worlds are tried, at most.
    """

    seconds: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    paths: int = 6
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


@dataclass(frozen=True)
class Script:
    """Actions [frames, A], the frame `first` whose view the end shows again (-1: the one before the script), a frame
    `between` that sees none of it, and triples (again, first, between) of views on the way."""

    actions: np.ndarray
    first: int = -1
    between: int = 0
    repeats: tuple[tuple[int, int, int], ...] = ()


def keys(frames: int, *held: int) -> np.ndarray:
    """Actions [frames, A] of keys that are held."""
    out = np.zeros((max(0, frames), len(ACTIONS)), np.float32)
    out[:, list(held)] = 1
    return out


def degrees(doom: DoomConfig, angle: float) -> int:
    """Frames of a turn."""
    return round(angle / doom.turn_degrees)


def other(side: int) -> int:
    return LEFT + RIGHT - side


def looking_away(frames: int, side: int, doom: DoomConfig) -> np.ndarray:
    """Actions: turn away by up to 145 degrees, look around there, turn back."""
    turn = min(degrees(doom, 145), (frames - 1) // 2)
    out = np.concatenate([keys(turn, side), keys(frames - 2 * turn), keys(turn, other(side))])
    for start in range(turn + 4, frames - turn - 12, 16):  # a little to one side and to the other, net nothing
        out[start : start + 4, other(side)], out[start + 6 : start + 10, side] = 1, 1
    return out


def look(frames: int, side: int, doom: DoomConfig, reach: float) -> Script:
    """Look away and back."""
    return Script(looking_away(frames, side, doom), between=frames // 2)


def turned(frames: int, side: int, doom: DoomConfig, rounds: int) -> np.ndarray | None:
    """Actions of turns all the way around, in eight parts each with rests between; None where there is too little time.

    Slower turns would not do: the engine rounds angles, and the walker would not come back.
    """
    part = degrees(doom, 45)
    if frames < 8 * rounds * part:
        return None
    out = keys(frames)
    for k in range(8 * rounds):
        start = k * frames // (8 * rounds)
        out[start : start + part, side] = 1
    return out


def turn(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """One turn all the way around."""
    actions = turned(frames, side, doom, 1)
    return None if actions is None else Script(actions, between=frames // 2)


def turns(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """Two turns; the second sees again what the first made up."""
    actions = turned(frames, side, doom, 2)
    rests = [(k + 1) * frames // 16 - 1 for k in range(16)]
    repeats = tuple((rests[k + 8], rests[k], rests[k + 4]) for k in range(7))
    return None if actions is None else Script(actions, between=rests[3], repeats=repeats)


def walk(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """Turn around, walk off for `reach` of the time left (at most FARTHEST frames), turn and walk back."""
    half = degrees(doom, 180)
    steps = int(reach * min(FARTHEST, (frames - 2 * half) / 2))
    if steps < 4:
        return None
    around, ahead = keys(half, side), keys(steps, FORWARD)
    return Script(centred(frames, around, ahead, around, ahead), between=frames // 2)


def loop(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """A square, walked around once."""
    quarter = degrees(doom, 90)
    steps = int(reach * min(12, frames // 4 - quarter))
    if steps < 3:
        return None
    return Script(centred(frames, *[keys(steps, FORWARD), keys(quarter, side)] * 4), between=frames // 2)


def centred(frames: int, *parts: np.ndarray) -> np.ndarray:
    """The parts one after the other, rests before and after them."""
    out = np.concatenate(parts)
    before = (frames - len(out)) // 2
    return np.concatenate([keys(before), out, keys(frames - len(out) - before)])


def generated(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """Turn to where nothing was given and take steps, then look away from there and back."""
    out = np.concatenate([keys(degrees(doom, 100), side), keys(8, FORWARD), keys(STAY)])
    rest = frames - len(out)
    if rest < 2 * degrees(doom, 100):
        return None
    away = looking_away(rest, side, doom)
    return Script(np.concatenate([out, away]), len(out) - 1, len(out) + rest // 2)


def elsewhere(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """Step aside, so that the heading is that of the start and the place is not; look away from there and back."""
    quarter = degrees(doom, 90)
    back = degrees(doom, 160)  # frames to look away and back in, at least
    steps = int(reach * min(24, frames - 2 * quarter - STAY - back))
    if steps * doom.speed < 64 * ELSEWHERE:
        return None
    out = np.concatenate([keys(quarter, side), keys(steps, FORWARD), keys(quarter, other(side)), keys(STAY)])
    rest = frames - len(out)
    return Script(np.concatenate([out, looking_away(rest, side, doom)]), len(out) - 1, len(out) + rest // 2)


def straight(frames: int, side: int, doom: DoomConfig, reach: float) -> Script | None:
    """Walk ahead; where there is time, look away and back before."""
    steps = int(reach * min(STRAIGHT, frames))
    if steps < LEAST_STRAIGHT:
        return None
    ahead = keys(steps, FORWARD)
    if frames < steps + degrees(doom, 160):
        return Script(np.concatenate([ahead, keys(frames - steps)]), between=steps // 2)
    return Script(np.concatenate([looking_away(frames - steps, side, doom), ahead]), between=frames - steps // 2)


KINDS: Mapping[str, Callable[[int, int, DoomConfig, float], Script | None]] = {
    f.__name__: f for f in (look, turn, turns, walk, loop, generated, elsewhere, straight)
}
REVISITS = ("look", "turn", "turns", "walk", "loop")  # that end at the view of the start
REACHES = (1.0, 0.7, 0.5, 0.25)  # of what a script would walk, where rooms are small


@dataclass(frozen=True)
class Path:
    """A path that counts: its kind, what the engine showed, the true wall picture at the start, the frames that are
    compared with it, a frame away from it, and triples [n, 3] of frames (again, first, between) of the same view."""

    kind: str
    walk: Episode
    label: int
    away: int
    judged: range
    pairs: np.ndarray


@lru_cache(maxsize=1024)
def world_of(layouts: tuple[str, ...], seed: int) -> World:
    return make_world(layouts, seed)


def is_free(world: World, doom: DoomConfig, actions: np.ndarray) -> bool:
    """Whether a walker who takes the actions from the start of a world touches no wall, as far as a plan shows."""
    x, y, start = world.start
    heading = np.radians(start + np.cumsum(actions[:, LEFT] - actions[:, RIGHT]) * doom.turn_degrees)
    ahead = actions[:, FORWARD] * doom.speed
    xy = np.array([x, y]) + np.cumsum(ahead[:, None] * np.stack([np.cos(heading), np.sin(heading)], -1), 0)
    walked = xy[actions[:, FORWARD] > 0]
    return not len(walked) or float(clearance(world, walked).min()) >= RADIUS


def returns(poses: np.ndarray, first: int, last: int) -> bool:
    """Whether frame `last` is seen from where frame `first` was."""
    gone = np.linalg.norm(poses[last, :2] - poses[first, :2])
    return bool(gone < 0.05 and same_heading(poses, first, last))


def same_heading(poses: np.ndarray, first: int, last: int) -> bool:
    angle = (poses[last, 2] - poses[first, 2] + np.pi) % (2 * np.pi) - np.pi
    return bool(abs(angle) < math.radians(1.0))


def frames_of(cfg: PathConfig, seconds: float, doom: DoomConfig, chunked: int) -> tuple[int, int]:
    """(frames on the way, frames in all): whole multiples of `chunked` after the first."""
    away = round(seconds * doom.fps)
    least = cfg.lead + away + cfg.hold
    return away, 1 + -(-(least - 1) // chunked) * chunked


@dataclass(frozen=True)
class Plan:
    """A script in the world of a seed, between standing still: actions [T, A] from frame 0 on."""

    kind: str
    seed: int
    script: Script
    lead: int
    actions: np.ndarray


def planned(cfg: PathConfig, doom: DoomConfig, kind: str, away: int, total: int, seed: int) -> Plan | None:
    """The longest script of a kind that the world of a seed has room for, or None."""
    lead = 1 if kind == "straight" else cfg.lead
    side = (LEFT, RIGHT)[int(np.random.default_rng([cfg.seed, seed]).integers(2))]
    for reach in REACHES:
        script = KINDS[kind](away, side, doom, reach)
        if script is None:
            return None
        actions = np.concatenate([keys(lead), script.actions, keys(total - lead - away)])
        if kind == "generated" or is_free(world_of(doom.layouts, seed), doom, actions):  # a wall may stop its few steps
            return Plan(kind, seed, script, lead, actions)
    return None


def arrived(plan: Plan, poses: np.ndarray, end: int, doom: DoomConfig) -> bool:
    """Whether the walker got where the kind of a plan says by frame `end`."""
    gone = float(np.linalg.norm(poses[end, :2] - poses[0, :2]))
    if plan.kind == "straight":
        return gone * 64 > 0.95 * doom.speed * float(plan.actions[:, FORWARD].sum())
    aside = plan.kind != "elsewhere" or (gone > ELSEWHERE and same_heading(poses, 0, end))
    return aside and returns(poses, 0 if plan.kind in REVISITS else plan.lead + plan.script.first, end)


def counted(cfg: PathConfig, doom: DoomConfig, plan: Plan, walk: Episode) -> Path | None:
    """The path that the engine made of a plan, if it came out as planned and only memory can say what it shows."""
    script, end = plan.script, plan.lead + len(plan.script.actions)
    first, between = plan.lead + script.first, plan.lead + script.between
    view = 0 if plan.kind in REVISITS else end
    label, distance = centre_texture(walk.walls, walk.poses[view])
    apart = [0] if plan.kind == "straight" else [between] + [0] * (plan.kind == "elsewhere")
    seen = to_float(walk.frames[[view, *apart]])
    alike = float(metrics.psnr(seen[1:], seen[:1]).max()) >= cfg.floor_psnr
    others = {centre_texture(walk.walls, walk.poses[t])[0] for t in apart}
    plain = label in (-1, FRAME_TEXTURE) or label in others or distance > cfg.near
    if alike or (plain and plan.kind != "straight") or not arrived(plan, walk.poses, end, doom):
        return None
    judged = range(end + cfg.hold - cfg.judged - 1, end + cfg.hold - 1)
    found = [tuple(plan.lead + t for t in triple) for triple in script.repeats] or [(t, first, between) for t in judged]
    return Path(plan.kind, walk, label, between, judged, np.resize(found, (cfg.judged, 3)))


def paths_of(cfg: PathConfig, doom: DoomConfig, seconds: float, chunked: int, worlds: Sequence[int]) -> list[Path]:
    """Up to `cfg.paths` paths of each kind that count, kinds in turn, each in a world of its own, of the seeds
    `worlds`."""
    away, total = frames_of(cfg, seconds, doom, chunked)
    kinds = [k for k in KINDS if KINDS[k](away, LEFT, doom, 1.0) is not None]

    def plans(kind: str) -> Iterator[Plan]:
        for seed in worlds[kinds.index(kind) :: len(kinds)]:
            if plan := planned(cfg, doom, kind, away, total, seed):
                yield plan

    left, found = {kind: plans(kind) for kind in kinds}, {kind: list[Path]() for kind in kinds}
    with Bar(cfg.paths * len(kinds), f"paths of {seconds:g} s", unit="path") as bar:
        while wanted := [p for kind in kinds for p in islice(left[kind], cfg.paths - len(found[kind]))]:
            for plan, played in zip(wanted, replay_many(doom, [(p.seed, p.actions) for p in wanted]), strict=True):
                if path := counted(cfg, doom, plan, played):
                    found[plan.kind].append(path)
                    bar.update()
    out = [found[kind][k] for k in range(cfg.paths) for kind in kinds if k < len(found[kind])]
    if not out:
        raise ValueError(f"no path of {seconds:g} s counts in {len(worlds)} worlds; raise revisit.tries")
    return out
