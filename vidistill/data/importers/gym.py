"""Gymnasium environments as worlds: episodes recorded by their seeds, and the true future of any actions."""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import EnumMeta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidistill import checkpoint
from vidistill.config import settings
from vidistill.data.importers.actions import ActionMap, action_map
from vidistill.data.importers.options import add_world_options
from vidistill.data.importers.write import PER_SHARD, Clip, Part, shard_of, write_split
from vidistill.data.shards import DataError, Shard
from vidistill.data.types import HELD_OUT_SEED, in_order
from vidistill.io import contact_sheet, save_png
from vidistill.progress import Bar

SPLITS = {"train": 0, "validation": HELD_OUT_SEED, "test": 2 * HELD_OUT_SEED}  # split -> its first seed
TRIES, ANOTHER = 20, 10 * HELD_OUT_SEED  # episodes tried for one that is long enough; from the seed of one to the next
ATARI = 60.0  # frames a second
HELD = (2, 8)  # frames that a random action is held, at least and at most
STAYS = 0.9  # how likely a sticky action is to stay for another frame
RATES = (12.0, 18.0)  # frames a second that suit a small world
ARROWS = {1 << 30 | 79 + k: f"Arrow{way}" for k, way in enumerate(("Right", "Left", "Down", "Up"))}  # SDL's key codes
CHECKED = 48  # frames on which an environment is found to be deterministic

SAID = {
    True: "deterministic: a seed and its actions bring an episode back",
    False: "not deterministic: a seed and its actions gave other frames, so there are no true futures to compare with",
}

Choose = Callable[[Any], np.ndarray]  # an observation -> the numbers of the next action


@dataclass(frozen=True)
class GymConfig:
    """How episodes of environment `env` are recorded. `repeat`: steps a frame; `start`: idle steps before the first.

    `crop`: pixels cut off at top, bottom, left and right; then the picture is made `size` (height, width) as `resize`
    says; stretched, because what matters may stand at its edges (the paddle of Breakout). `policy`: random, sticky or
    MODULE:FUNCTION, which is called with (environment, generator) for every episode and returns a function from an
    observation to an action of the environment. `least`: frames of the shortest clip. `restart`: a clip goes on with
    another episode where one ends.
    """

    env: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (64, 64)
    resize: str = "stretch"
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    repeat: int = 1
    start: int = 0
    num_frames: int = 321
    least: int = 17
    policy: str = "random"
    names: tuple[str, ...] = ()
    restart: bool = False

    def __post_init__(self) -> None:
        if min(self.repeat, self.num_frames, self.least, *self.size) < 1 or min(self.start, *self.crop) < 0:
            raise ValueError(
                f"--repeat, --frames, --min-frames and --size must be at least 1, --start and --crop 0; got {self}"
            )
        if self.least > self.num_frames:
            raise ValueError(f"--min-frames {self.least} is more than --frames {self.num_frames}; ask for fewer")
        if self.policy not in POLICIES and ":" not in self.policy:
            raise ValueError(f"--policy {self.policy!r} is {', '.join(POLICIES)} or MODULE:FUNCTION")


# --- the environment --------------------------------------------------------------------------------------------------


def look_here() -> None:
    """Find modules where the command is run, as `python -m` does: there lie environments and policies of one's own."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def made(cfg: GymConfig) -> Any:
    """The environment, ready to be reset. ImportError without Gymnasium, ValueError for one that shows no picture."""
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError("recording environments needs Gymnasium: pip install 'vidistill[gym]'") from error
    look_here()
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory: no window, no display to look for
    try:
        env = gymnasium.make(cfg.env, render_mode="rgb_array", **cfg.options)
    except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
        hint = "name the package that brings it, as in ale_py:ALE/Breakout-v5, if it is not one of Gymnasium's own"
        raise ValueError(f"--env {cfg.env} cannot be made ({error}); {hint}") from error
    if "rgb_array" not in (modes := env.metadata.get("render_modes") or []):
        raise ValueError(
            f"--env {cfg.env} has no render mode rgb_array, only {', '.join(modes) or 'none'}; record another one"
        )
    return env


def shot(env: Any, cfg: GymConfig) -> np.ndarray:
    """What an environment shows, uint8 [H, W, 3] of the asked size; ValueError where it shows nothing."""
    picture = env.render()
    if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[2] < 3:
        raise ValueError(
            f"--env {cfg.env} renders no picture [H, W, 3] but {type(picture).__name__}; wrap it in one that does"
        )
    top, bottom, left, right = cfg.crop
    picture = picture[top : picture.shape[0] - bottom, left : picture.shape[1] - right, :3]
    if 0 in picture.shape:
        raise ValueError(f"--crop {','.join(map(str, cfg.crop))} leaves nothing of the picture; cut off less")
    return resized(np.ascontiguousarray(picture.astype(np.uint8)), cfg.size, cfg.resize)


def resized(picture: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """A picture of another size by averages over areas: cropped around its centre, fit with black, or stretched."""
    (height, width), (rows, columns) = size, picture.shape[:2]
    image, resample = Image.fromarray(picture), Image.Resampling.BOX
    if resize == "stretch":
        return np.array(image.resize((width, height), resample))
    if resize == "crop":
        scale = min(rows / height, columns / width)
        left, top = (columns - width * scale) / 2, (rows - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        return np.array(image.resize((width, height), resample, box=box))
    scale = max(rows / height, columns / width)
    inner = max(1, round(rows / scale)), max(1, round(columns / scale))
    out = np.zeros((height, width, 3), np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    out[top : top + inner[0], left : left + inner[1]] = np.array(image.resize(inner[::-1], resample))
    return out


def actions_of(env: Any, cfg: GymConfig) -> ActionMap:
    """The named actions of an environment."""
    return action_map(env.action_space, cfg.names, meanings_of(env.unwrapped))


def meanings_of(inner: Any) -> list[str]:
    """What an environment calls its actions, where it says: ALE's meanings, MiniGrid's enumeration; else nothing."""
    if callable(found := getattr(inner, "get_action_meanings", None)):
        return [str(name).lower() for name in found()]
    listed = getattr(inner, "actions", None)
    return [name.lower() for name in listed.__members__] if isinstance(listed, EnumMeta) else []


def keys_of(env: Any, named: ActionMap) -> dict[str, list[str]]:
    """The keys that the environment's own player holds together for each action; nothing where it has none."""
    found = getattr(env.unwrapped, "get_keys_to_action", None)
    keys: dict[str, list[str]] = {}
    for held, action in (found() if callable(found) else {}).items():
        numbers = named.of(action)
        if numbers.sum() == 1:
            name = named.names[int(numbers.argmax())]
            pressed = [key_name(key) for key in held]
            if all(pressed) and (name not in keys or len(pressed) < len(keys[name])):
                keys[name] = pressed
    return keys


def key_name(key: Any) -> str:
    """A key as the page calls it: a character, or an arrow by its code; "" for others that pygame has numbers for."""
    if isinstance(key, str):
        return key
    return ARROWS.get(int(key)) or (chr(int(key)) if 0 < int(key) < sys.maxunicode else "")


def rate_of(env: Any) -> float:
    """Steps a second that an environment is made for, as it says; 0 where it says nothing.

    Atari's say 30 whatever they skip: the console shows ATARI frames (ALE's `frameskip`, a number or a range).
    """
    skip = vars(env.unwrapped).get("_frameskip")
    if "ale" in vars(env.unwrapped) and isinstance(skip, int | tuple):
        return ATARI / (skip if isinstance(skip, int) else (skip[0] + skip[1] - 1) / 2)
    return float(env.metadata.get("render_fps") or 0)


def repeat_for(rate: float) -> int:
    """Steps a frame that bring a rate into RATES; 1 for what is slow already, or plays in turns."""
    return 1 if rate <= RATES[1] else max(1, round(rate / (sum(RATES) / 2)))


# --- policies ---------------------------------------------------------------------------------------------------------


def random_policy(env: Any, named: ActionMap, rng: np.random.Generator) -> Choose:
    """Random actions, each held for some frames as a finger does."""
    held, left = np.zeros(len(named.names), np.float32), 0

    def choose(_: Any) -> np.ndarray:
        nonlocal held, left
        if not left:
            held, left = named.random(rng), int(rng.integers(HELD[0], HELD[1] + 1))
        left -= 1
        return held

    return choose


def sticky_policy(env: Any, named: ActionMap, rng: np.random.Generator) -> Choose:
    """Random actions, each of which stays for another frame by the same chance."""
    held: np.ndarray | None = None

    def choose(_: Any) -> np.ndarray:
        nonlocal held
        if held is None or rng.random() >= STAYS:
            held = named.random(rng)
        return held

    return choose


POLICIES: Mapping[str, Callable[[Any, ActionMap, np.random.Generator], Choose]] = {
    "random": random_policy,
    "sticky": sticky_policy,
}


def policy_of(cfg: GymConfig, env: Any, named: ActionMap, rng: np.random.Generator) -> Choose:
    """What plays an episode."""
    if cfg.policy in POLICIES:
        return POLICIES[cfg.policy](env, named, rng)
    module, _, function = cfg.policy.partition(":")
    look_here()
    try:
        act = getattr(importlib.import_module(module), function)(env, rng)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--policy {cfg.policy} is not there ({error}); name a MODULE:FUNCTION of this folder"
        ) from error
    return lambda observation: named.of(act(observation))


def policies_of(cfg: GymConfig, env: Any, named: ActionMap, seed: int, stream: int = 1) -> Callable[[int], Choose]:
    """What plays each episode of a clip, by its number."""
    return lambda number: policy_of(cfg, env, named, np.random.default_rng([seed, stream, number]))


def played_again(actions: np.ndarray) -> Callable[[int], Choose]:
    """What plays the actions [T, A] of a clip again; those of first frames count nothing."""
    rows = iter(actions)

    def policy(_: int) -> Choose:
        next(rows)
        return lambda _: next(rows)

    return policy


# --- recording --------------------------------------------------------------------------------------------------------


def begin(env: Any, cfg: GymConfig, named: ActionMap, seed: int, number: int = 0) -> tuple[Any, bool]:
    """Start episode `number` of the clip of a seed: what is observed at its first frame, and whether it is over."""
    if number:
        seed = int(np.random.default_rng([seed, number]).integers(2**31))
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    if not cfg.start:
        return observation, False
    return advance(env, named, np.zeros(len(named.names), np.float32), cfg.start)


def advance(env: Any, named: ActionMap, numbers: np.ndarray, steps: int) -> tuple[Any, bool]:
    """Hold the numbers of actions for some steps, or until the episode is over: what is observed then, and whether."""
    for _ in range(steps):
        observation, _, terminated, truncated, _ = env.step(named.to_env(numbers))
        if terminated or truncated:
            return observation, True
    return observation, False


def play(env: Any, cfg: GymConfig, named: ActionMap, seed: int, num: int, policy: Callable[[int], Choose]) -> Clip:
    """The clip of a seed, of `num` frames or as many as there are; `policy(n)` plays its episode n.

    A later episode begins as the first does: nothing is held at its first frame.
    """
    number, still = 0, np.zeros(len(named.names), np.float32)
    choose = policy(number)
    observation, over = begin(env, cfg, named, seed)
    frames, actions = [shot(env, cfg)], [still]
    while len(frames) < num and (cfg.restart or not over):
        numbers = still
        if over:
            number += 1
            choose = policy(number)
            observation, over = begin(env, cfg, named, seed, number)
        else:
            numbers = choose(observation)
            observation, over = advance(env, named, numbers, cfg.repeat)
        frames.append(shot(env, cfg))
        actions.append(numbers)
    return Clip(np.stack(frames), {"seed": seed}, actions=np.stack(actions))


def record(cfg: GymConfig, seed: int, num: int | None = None) -> Clip:
    """The episode of a seed, by the policy; the same seed gives the same frames where the environment does."""
    with contextlib.closing(made(cfg)) as env:
        named = actions_of(env, cfg)
        return play(env, cfg, named, seed, num or cfg.num_frames, policies_of(cfg, env, named, seed))


def record_long(cfg: GymConfig, seed: int) -> Clip:
    """The episode of the first seed of a row that lasts long enough; DataError where none does."""
    longest = 0
    for k in range(TRIES):
        clip = record(cfg, seed + k * ANOTHER)
        if len(clip.frames) >= cfg.least:
            return clip
        longest = max(longest, len(clip.frames))
    raise DataError(
        f"--env {cfg.env} ended after {longest} frames at most in {TRIES} episodes, {cfg.least} are asked for; add "
        "--restart, lower --min-frames or --repeat, or give a --policy that lasts longer"
    )


def replay(cfg: GymConfig, seed: int, actions: np.ndarray) -> np.ndarray:
    """The true frames uint8 [T, H, W, 3] that actions [T, A] lead to from the start of a seed; the first is not played.

    T is smaller where the clip ends before. Only as true as the environment is deterministic (`is_deterministic`).
    """
    actions = np.asarray(actions, np.float32)
    with contextlib.closing(made(cfg)) as env:
        named = actions_of(env, cfg)
        if actions.ndim != 2 or actions.shape[1] != len(named.names) or not len(actions):
            raise ValueError(
                f"actions are {list(actions.shape)}; needed is [T, {len(named.names)}]: {', '.join(named.names)}"
            )
        return play(env, cfg, named, seed, len(actions), played_again(actions)).frames


def is_deterministic(cfg: GymConfig, seed: int = 0) -> bool:
    """Whether an episode comes back from its seed and actions: in another environment, and after another episode."""
    first = record(cfg, seed, CHECKED)
    assert first.actions is not None
    if not np.array_equal(replay(cfg, seed, first.actions), first.frames):
        return False
    with contextlib.closing(made(cfg)) as env:
        named = actions_of(env, cfg)
        play(env, cfg, named, seed + 1, CHECKED, policies_of(cfg, env, named, seed, 2))
        again = play(env, cfg, named, seed, len(first.frames), played_again(first.actions))
    return np.array_equal(again.frames, first.frames)


def clips_of(cfg: GymConfig, seeds: range, pool: ProcessPoolExecutor | None) -> Iterator[Clip]:
    """The episodes of seeds, in order; the processes of a pool record them."""
    jobs = (partial(record_long, cfg, seed) for seed in seeds)
    yield from (job() for job in jobs) if pool is None else in_order(pool, jobs, 2 * multiprocessing.cpu_count())


# --- the command ------------------------------------------------------------------------------------------------------


def asked(args: argparse.Namespace) -> tuple[GymConfig, float, ActionMap, dict[str, list[str]]]:
    """The config, frames a second, actions and keys that a command line asks for."""
    options = {"env": args.env, "options": settings(args.option), "size": args.size, "resize": args.resize}
    options |= {"crop": tuple(int(n) for n in args.crop), "start": args.start, "num_frames": args.frames}
    options |= {"least": args.min_frames, "policy": args.policy, "restart": args.restart}
    options["names"] = tuple(filter(None, (args.names or "").split(",")))
    if len(options["crop"]) != 4:
        raise ValueError(f"--crop is TOP,BOTTOM,LEFT,RIGHT in pixels, got {len(options['crop'])} numbers")
    with contextlib.closing(made(GymConfig(**options))) as env:
        rate = args.rate or rate_of(env)
        repeat = args.repeat or repeat_for(rate)
        cfg = GymConfig(**options, repeat=repeat)
        named = actions_of(env, cfg)
        keys = keys_of(env, named)
        env.reset(seed=0)
        shot(env, cfg)
    for pair in args.keys:
        name, _, key = pair.partition("=")
        if name not in named.names or not key:
            raise ValueError(
                f"--keys {pair!r} is not ACTION=KEY, as in {named.names[0]}=ArrowLeft; actions are "
                f"{', '.join(named.names)}"
            )
        keys[name] = key.split("+")
    return cfg, (rate or RATES[0] * repeat) / repeat, named, keys


def noted(
    cfg: GymConfig, fps: float, named: ActionMap, keys: Mapping[str, list[str]], true: bool, codec: str | None = None
) -> dict[str, Any]:
    """What is noted of recorded episodes."""
    config = {name: value for name, value in asdict(cfg).items() if name != "restart" or value}  # older data lack it
    meta = {"source": "gym", "config": config, "fps": fps, "actions": list(named.names), "keys": keys, "given": 1}
    meta |= {"px_size": cfg.size[0] if cfg.size[0] == cfg.size[1] else list(cfg.size), "codec": codec}
    return meta | {"deterministic": true}


def run(args: argparse.Namespace) -> str:
    """`vidistill data gym`: record the splits; says what was recorded and whether seeds bring it back."""
    cfg, fps, named, keys = asked(args)
    out, part = args.out, Part.of(args.part)
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    if codec is not None:
        codec.latent_shape(1, *cfg.size)
    true = is_deterministic(cfg)
    meta = noted(cfg, fps, named, keys, true, args.codec)
    save_png(
        out / "sheet.png", contact_sheet([record(cfg, s, min(cfg.num_frames, 97)).frames for s in range(4)], every=12)
    )
    said = [f"{cfg.env}: {fps:g} frames/s, {cfg.repeat} steps a frame; actions {', '.join(named.names)}", SAID[true]]
    counts = {"train": args.episodes, "validation": args.validation, "test": args.test}
    with contextlib.ExitStack() as stack:
        pool = None
        if args.workers > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(args.workers, mp_context=context))
        for split, count in counts.items():
            if count:
                said.append(write_one(out, split, count, cfg, meta, codec, part, pool))
    return "\n".join([*said, f"look at {out / 'sheet.png'} first"])


def write_one(
    out: Path, split: str, count: int, cfg: GymConfig, meta: dict[str, Any], codec: Any, part: Part, pool: Any
) -> str:
    """Record this part of a split; returns what to say of it."""
    shards, first = -(-count // PER_SHARD), SPLITS[split]

    def make(i: int) -> Shard:
        seeds = range(first + i * PER_SHARD, first + min((i + 1) * PER_SHARD, count))
        return shard_of(list(clips_of(cfg, seeds, pool)))

    with Bar(len(part.share(shards)), split, "shard") as bar:
        whole = write_split(out / split, shards, make, {**meta, "split": split}, codec, part, lambda _: bar.update())
    return f"{out / split}: {count} episodes" if whole else f"{out / split}: part {part.index + 1} is recorded"


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of `vidistill data gym`."""
    p.description = (
        "Record episodes of any Gymnasium environment that renders rgb_array: frames, and what was held between them. "
        "Resumes after a stop."
    )
    p.epilog = (
        "example: vidistill data gym data/drive --env CarRacing-v3 --names steer,gas,brake --crop 0,50,0,0 --start 50"
    )
    p.add_argument("out", type=Path, help="folder to write: train, validation, test and sheet.png")
    add_world_options(p, required=True)
    p.add_argument("--episodes", type="count", default=256, help="to train on (default: 256)")
    p.add_argument("--validation", type="number", default=16, help="episodes held out while training (default: 16)")
    p.add_argument("--test", type="number", default=32, help="episodes held out for evaluation (default: 32)")
    p.add_argument("--policy", default="random", help="random, sticky, or MODULE:FUNCTION called with (env, generator)")
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument("--workers", type="count", default=2, help="processes that record (default: 2)")
    p.add_argument("--part", default="1/1", help="share of the work that this process does, e.g. 2/4 (default: all)")
