"""Doom as a source of clips: a person walks through rooms of the real engine, every frame with its action and pose.

`pip install 'vidistill[doom]'` brings the engine (ViZDoom); worlds and wall pictures are our own (`doom_world`).
"""

import contextlib
import itertools
import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from vidistill.data.types import HELD_OUT_SEED, Episode, in_order, split_seeds
from vidistill.worlds.doom.maps import (
    LAYOUTS,
    UNITS_PER_DELTA,
    UNITS_PER_POSE,
    World,
    cast,
    centre_texture,
    clearance,
    describe,
    inside,
    make_wad,
    make_world,
)

__all__ = [
    "ACTIONS",
    "HELD_OUT_SEED",
    "DoomConfig",
    "centre_texture",
    "record",
    "record_many",
    "replay",
    "replay_many",
    "seeds",
]

ACTIONS = ("turn_left", "turn_right", "forward", "backward")
TICS_PER_SECOND = 35
SETTLE_TICS = 14  # the engine ignores input in the first tics of a map
SEEDS_PER_ENGINE = 16  # episodes one engine process serves before it is replaced
CELL = 32  # map units, grid on which ways are planned


def seeds(split: str, num: int) -> range:
    """Returns the first seeds of a split; two splits never meet."""
    return split_seeds(split, num)


@dataclass(frozen=True)
class DoomConfig:
    """How an episode is recorded. Sizes in pixels, `turn_degrees` and `speed` (map units) a frame at full action."""

    size: int = 64
    supersample: int = 6  # pixels rendered along each axis for one of the frame: 3 (256x192) or 6 (512x384) at size 64
    fov_degrees: float = 84.0  # horizontal, of the final square
    tics_per_frame: int = 2
    turn_degrees: float = 5.625  # 64 frames are a full turn
    speed: float = 9.375
    num_frames: int = 321
    layouts: tuple[str, ...] = LAYOUTS

    def __post_init__(self):
        if not self.layouts or set(self.layouts) - set(LAYOUTS):
            raise ValueError(f"layouts is {self.layouts}; allowed are one or more of {LAYOUTS}")
        if self.size * self.supersample not in RENDER_SIZES:
            raise ValueError(
                f"size * supersample is {self.size * self.supersample}; the engine renders {sorted(RENDER_SIZES)} rows"
            )
        if self.num_frames < 1 or self.tics_per_frame < 1:
            raise ValueError(
                f"num_frames is {self.num_frames}, tics_per_frame {self.tics_per_frame}; both must be positive"
            )
        if not 0 < self.speed / self.tics_per_frame <= 50 * UNITS_PER_DELTA:
            raise ValueError(f"speed is {self.speed}; allowed is up to {50 * UNITS_PER_DELTA * self.tics_per_frame}")

    @property
    def fps(self) -> float:
        """Returns frames per second of game time."""
        return TICS_PER_SECOND / self.tics_per_frame


RENDER_SIZES = {192: 256, 240: 320, 288: 384, 384: 512, 480: 640, 576: 768, 768: 1024}  # rows: columns, all 4:3


# The engine


class _Engine:
    """One ViZDoom process with a map for each world; a context manager that leaves no files behind."""

    def __init__(self, cfg: DoomConfig, worlds: list[World]):
        try:
            import vizdoom
        except ImportError as error:
            raise ImportError("recording Doom needs ViZDoom: pip install 'vidistill[doom]'") from error
        self.cfg = cfg
        self.folder = tempfile.TemporaryDirectory(prefix="vidistill-doom-")
        wad = os.path.join(self.folder.name, "world.wad")
        with open(wad, "wb") as file:
            file.write(make_wad(worlds))
        self.game = vizdoom.DoomGame()
        _configure(vizdoom, self.game, cfg)
        self.game.set_doom_scenario_path(wad)
        self.game.set_doom_config_path(os.path.join(self.folder.name, "engine.ini"))
        with contextlib.chdir(self.folder.name):  # it makes a folder where it starts, one for each of them
            self.game.init()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.game.close()
        self.folder.cleanup()

    def start(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (frame, pose) at the start of a map; pose is x, y in map units and the heading in degrees."""
        self.game.set_doom_map(f"MAP{index + 1:02d}")
        self.game.new_episode()
        self.game.send_game_command(f"fov {self._engine_fov():.4f}")
        self.game.make_action([0.0, 0.0], 2)  # the new field of view is seen
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plays one action for `tics_per_frame` tics and returns (frame, pose)."""
        left, right, forward, backward = (float(v) for v in action)
        tics = self.cfg.tics_per_frame
        turn = (right - left) * self.cfg.turn_degrees / tics
        walk = (forward - backward) * self.cfg.speed / tics / UNITS_PER_DELTA
        self.game.make_action([turn, walk], tics)
        return self._observe()

    def _engine_fov(self) -> float:
        # The engine's angle spans a 4:3 picture, of which the central square (3/4 of the width) is kept.
        return float(np.degrees(2 * np.arctan(np.tan(np.radians(self.cfg.fov_degrees / 2)) * 4 / 3)))

    def _observe(self) -> tuple[np.ndarray, np.ndarray]:
        state = self.game.get_state()
        k, size = self.cfg.supersample, self.cfg.size
        picture = state.screen_buffer
        left = (picture.shape[1] - k * size) // 2
        square = picture[:, left : left + k * size].reshape(size, k, k * size * 3)
        rows = square[:, 0].astype(np.uint16)
        for i in range(1, k):
            rows += square[:, i]
        columns = rows.reshape(size, size, k, 3)
        total = columns[:, :, 0] + np.uint16(k * k // 2)
        for i in range(1, k):
            total += columns[:, :, i]
        return (total // np.uint16(k * k)).astype(np.uint8), np.array(state.game_variables)


def _configure(vizdoom, game, cfg: DoomConfig) -> None:
    """Sets screen, buttons and variables, and switches off everything that is not walls, floor and ceiling."""
    rows = cfg.size * cfg.supersample
    game.set_screen_resolution(vizdoom.ScreenResolution.__members__[f"RES_{RENDER_SIZES[rows]}X{rows}"])
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    for switch in ("hud", "weapon", "crosshair", "decals", "particles", "effects_sprites", "messages", "corpses"):
        getattr(game, f"set_render_{switch}")(False)
    game.set_render_screen_flashes(False)
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD_BACKWARD_DELTA])
    variables = vizdoom.GameVariable
    game.set_available_game_variables([variables.POSITION_X, variables.POSITION_Y, variables.ANGLE])
    game.set_episode_timeout(0)
    game.set_episode_start_time(SETTLE_TICS)
    game.set_doom_map("MAP01")
    game.add_game_args("+movebob 0")


# The walker


class _Walker:
    """Chooses actions: walks to places drawn from the map, looks around, backs up, pauses, and bumps now and then."""

    def __init__(self, cfg: DoomConfig, world: World, rng: np.random.Generator):
        self.cfg, self.world, self.rng = cfg, world, rng
        bounds = np.array(world.rects)
        self.origin = bounds[:, :2].min(0)
        shape = -(-(bounds[:, 2:].max(0) - self.origin) // CELL)
        index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
        self.centres = self.origin + (index + 0.5) * CELL
        self.room = np.where(inside(world, self.centres), clearance(world, self.centres), 0.0)
        self.way: np.ndarray | None = None
        self.plan: deque[tuple[tuple[float, float, float, float], bool]] = deque()  # (action, stop before walls)
        self.side = 1.0

    def act(self, pose: np.ndarray) -> np.ndarray:
        """Returns the action float32 [4] for the next frame, given x, y, heading in degrees."""
        if not self.plan:
            self._decide(pose)
        action, careful = self.plan.popleft()
        if careful and self._ahead(pose) < 88:
            self.plan.clear()
            self._decide(pose)
            action, _ = self.plan.popleft()
        return np.array(action, dtype=np.float32)

    def _ahead(self, pose, degrees: float = 0.0) -> float:
        """Returns the free distance of a walker-wide beam in a direction relative to the heading."""
        angle = np.radians(pose[2] + degrees)
        aside = 24 * np.array([-np.sin(angle), np.cos(angle)])
        return min(cast(self.world.walls, pose[:2] + k * aside, angle)[1] for k in (-1, 0, 1))

    def _hold(self, num: int, *, turn: float = 0.0, walk: float = 0.0, careful: bool = False) -> None:
        action = (max(turn, 0.0), max(-turn, 0.0), max(walk, 0.0), max(-walk, 0.0))
        self.plan.extend([(action, careful)] * num)

    def _decide(self, pose) -> None:
        """Fills the plan with one or more held actions."""
        rng, kind = self.rng, self.rng.random()
        if kind < 0.10:
            self._hold(int(rng.integers(4, 13)))
        elif kind < 0.145:
            self._look_around()
        elif kind < 0.19 and self._ahead(pose, 180) > 110:
            self._hold(int(rng.integers(4, 12)), walk=-1.0, turn=self._swap() if rng.random() < 0.25 else 0.0)
        elif kind < 0.24 and self._ahead(pose) < 200:
            self._hold(int(rng.integers(9, 15)), walk=1.0)  # wherever that leads: often into the wall
        elif kind < 0.27 and self._ahead(pose) > 160:
            self._hold(int(rng.integers(5, 13)), walk=1.0, turn=self._swap(), careful=True)
        else:
            self._steer(pose)

    def _swap(self) -> float:
        """Returns a side to turn to, 1.0 left or -1.0 right, more often the other one than last time."""
        self.side = -self.side if self.rng.random() < 0.7 else self.side
        return self.side

    def _look_around(self) -> None:
        rng, side, full = self.rng, self._swap(), round(360 / self.cfg.turn_degrees)
        kind = rng.random()
        if kind < 0.12:
            self._hold(full, turn=side)
        elif kind < 0.30:
            self._hold(full // 2, turn=side)
        else:
            num = int(rng.integers(5, 15))
            self._hold(num, turn=side)
            if rng.random() < 0.5:
                self._hold(int(rng.integers(3, 7)))
                self._hold(num, turn=-side)

    def _steer(self, pose) -> None:
        """One held action towards the current goal: turn, turn while walking, or walk."""
        error = self._error(pose) + self.rng.normal(0, 5)
        num = round(abs(error) / self.cfg.turn_degrees)
        side = float(np.sign(error))
        if abs(error) > 75 or (num > 1 and self._ahead(pose) < (170 if abs(error) > 25 else 100)):
            self.side = side
            self._hold(int(np.clip(num, 3, 14)), turn=side)
        elif num > 1:
            self._hold(min(num, 8), turn=side, walk=1.0, careful=True)
        elif self._ahead(pose) < 88:
            self._hold(int(self.rng.integers(6, 15)), turn=self._swap())
            self.way = None
        else:
            self._hold(int(self.rng.integers(4, 13)), walk=1.0, careful=True)

    def _error(self, pose) -> float:
        """Returns how many degrees the way to the goal lies to the left of the heading; draws a new goal on arrival."""
        here = tuple(np.clip((pose[:2] - self.origin) // CELL, 0, np.array(self.room.shape) - 1).astype(int))
        if self.way is None or self.way[here] < 3 or not np.isfinite(self.way[here]):
            self.way = self._ways(pose)
        for _ in range(4):
            here = min(_around(here, self.room.shape), key=self.way.__getitem__)
        there = self.centres[here] - pose[:2]
        return float((np.degrees(np.arctan2(there[1], there[0])) - pose[2] + 180) % 360 - 180)

    def _ways(self, pose) -> np.ndarray:
        """Returns the cost from every cell to a random roomy cell in the farther half.

        Cells close to walls cost more, walls are infinite.
        """
        goals = np.argwhere(self.room > min(100.0, 0.8 * self.room.max()))
        cost = np.where(self.room > 34, 1 + 4 * np.clip(1 - self.room / 112, 0, 1) ** 2, np.inf)
        far = np.abs(self.centres[tuple(goals.T)] - pose[:2]).max(1)
        goals = goals[far >= np.quantile(far, 0.5)]
        way = np.full(self.room.shape, np.inf)
        way[tuple(goals[self.rng.integers(len(goals))])] = 0.0
        while True:
            padded = np.pad(way, 1, constant_values=np.inf)
            straight = np.minimum.reduce([padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]])
            slant = np.minimum.reduce([padded[2:, 2:], padded[:-2, :-2], padded[:-2, 2:], padded[2:, :-2]])
            new = np.minimum(way, np.minimum(straight + cost, slant + 1.414 * cost))
            if np.array_equal(new, way):
                return way
            way = new


def _around(cell, shape):
    """Returns the cell itself and its neighbours inside a grid."""
    steps = [(cell[0] + i, cell[1] + j) for i in (0, -1, 1) for j in (0, -1, 1)]
    return [(i, j) for i, j in steps if 0 <= i < shape[0] and 0 <= j < shape[1]]


# Recording


def record(cfg: DoomConfig, seed: int, num_frames: int | None = None) -> Episode:
    """Returns the episode of a seed; the same seed gives the same bytes. `num_frames` defaults to the config's."""
    return next(_record_some(cfg, [seed], num_frames))


def replay(cfg: DoomConfig, seed: int, actions: np.ndarray, num_frames: int | None = None) -> Episode:
    """Returns the episode that other actions [T, 4] give from the world and start of a seed; actions[0] is not played.

    Recorded actions give back the recorded frames and poses bit for bit. `num_frames` defaults to T and may be smaller.
    """
    actions = np.asarray(actions, dtype=np.float32)
    num = len(actions) if num_frames is None else num_frames
    if actions.ndim != 2 or actions.shape[1] != len(ACTIONS) or not 1 <= num <= len(actions):
        raise ValueError(
            f"actions has shape {actions.shape} for {num} frames; needed is [{num} or more, {len(ACTIONS)}]"
        )
    if actions.min() < 0 or actions.max() > 1:
        raise ValueError(f"actions reach from {actions.min()} to {actions.max()}; allowed is 0 to 1")
    return next(_replay_some(cfg, [(seed, actions[:num])]))


def replay_many(cfg: DoomConfig, walks: Sequence[tuple[int, np.ndarray]]) -> Iterator[Episode]:
    """Yields `replay` of every (seed, actions), some of them from one engine."""
    for i in range(0, len(walks), SEEDS_PER_ENGINE):
        yield from _replay_some(cfg, walks[i : i + SEEDS_PER_ENGINE])


def _replay_some(cfg: DoomConfig, walks: Sequence[tuple[int, np.ndarray]]) -> Iterator[Episode]:
    worlds = [make_world(cfg.layouts, seed) for seed, _ in walks]
    with _Engine(cfg, worlds) as engine:
        for k, (seed, actions) in enumerate(walks):
            yield _play(engine, k, worlds[k], seed, len(actions), lambda t, pose, actions=actions: actions[t])


def palindrome(cfg: DoomConfig, episode: Episode, pivot: int) -> Episode:
    """Returns the walk up to frame `pivot` and back the same way, as long as before.

    Pictures and poses are mirrored in time; an action on the way back undoes what the one before it really did, so a
    step into a wall is undone by standing still. Source: RELIC 2512.04040, palindrome augmentation.
    """
    total = len(episode.frames)
    if not (total - 1) / 2 <= pivot < total:
        raise ValueError(f"pivot is {pivot}; allowed are {total // 2} to {total - 1} for {total} frames")
    back = np.arange(pivot - 1, 2 * pivot - total, -1)
    order = np.concatenate([np.arange(pivot + 1), back])
    undone = episode.actions[back + 1][:, [1, 0, 3, 2]]
    gone = np.linalg.norm(episode.poses[back + 1, :2] - episode.poses[back, :2], axis=1) * UNITS_PER_POSE
    undone[gone < cfg.speed / 2, 2:] = 0
    actions = np.concatenate([episode.actions[: pivot + 1], undone])
    return Episode(episode.frames[order], actions, episode.poses[order], episode.seed, episode.walls)


def with_palindromes(cfg: DoomConfig, episodes: Iterable[Episode], share: float) -> Iterator[Episode]:
    """Yields the episodes, about `share` of them turned into palindromes whose pivot lies in the second half."""
    for episode in episodes:
        rng, total = np.random.default_rng([episode.seed, 2]), len(episode.frames)
        yield palindrome(cfg, episode, int(rng.integers(total // 2, total))) if rng.random() < share else episode


def record_many(
    cfg: DoomConfig, seeds: Iterable[int], workers: int = 1, num_frames: int | None = None
) -> Iterator[Episode]:
    """Yields the episode of every seed, in order; `num_frames` defaults to the config's.

    Two or more workers are spawned processes: the calling script needs its `if __name__ == "__main__"`.
    """
    seeds = list(seeds)
    parts = [seeds[i : i + SEEDS_PER_ENGINE] for i in range(0, len(seeds), SEEDS_PER_ENGINE)]
    if workers <= 1:
        for part in parts:
            yield from _record_some(cfg, part, num_frames)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = (partial(_record_list, cfg, part, num_frames) for part in parts)
        yield from itertools.chain.from_iterable(in_order(pool, jobs, workers))


def _record_list(cfg, seeds, num_frames) -> list[Episode]:
    return list(_record_some(cfg, seeds, num_frames))


def _record_some(cfg: DoomConfig, seeds: list[int], num_frames: int | None) -> Iterator[Episode]:
    """Yields the episodes of up to SEEDS_PER_ENGINE seeds from one engine."""
    worlds = [make_world(cfg.layouts, seed) for seed in seeds]
    num = cfg.num_frames if num_frames is None else num_frames
    with _Engine(cfg, worlds) as engine:
        for k, (seed, world) in enumerate(zip(seeds, worlds)):
            walker = _Walker(cfg, world, np.random.default_rng([seed, 1]))
            yield _play(engine, k, world, seed, num, lambda t, pose, walker=walker: walker.act(pose))


def _play(engine: _Engine, index: int, world: World, seed: int, num: int, choose) -> Episode:
    """Returns the episode that `choose(t, pose) -> action` gives on a map of the engine."""
    frame, pose = engine.start(index)
    frames = np.empty((num, *frame.shape), np.uint8)
    actions = np.zeros((num, len(ACTIONS)), np.float32)
    poses = np.empty((num, 3))
    frames[0], poses[0] = frame, pose
    for t in range(1, num):
        actions[t] = choose(t, poses[t - 1])
        frames[t], poses[t] = engine.step(actions[t])
    poses[:, 2] = np.unwrap(np.radians(poses[:, 2]))
    poses[:, :2] /= UNITS_PER_POSE
    return Episode(frames, actions, poses.astype(np.float32), seed, describe(world))
