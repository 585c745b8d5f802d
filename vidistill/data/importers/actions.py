"""Actions of an environment as named numbers from 0 to 1, which is how clips hold them, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IDLE = ("noop", "none", "still", "nothing", "idle")  # what environments call doing nothing


@dataclass(frozen=True)
class ActionMap:
    """The actions of a space by `names`, one number each.

    `to_env` gives the environment's action for numbers [A]; `of` the numbers of an action; `random` draws numbers that
    a player could hold.
    """

    names: tuple[str, ...]
    to_env: Callable[[np.ndarray], Any]
    of: Callable[[Any], np.ndarray]
    random: Callable[[np.random.Generator], np.ndarray]


def one_hot(index: int, size: int) -> np.ndarray:
    """Numbers [size] of which one is 1; none for an index below 0."""
    out = np.zeros(size, np.float32)
    if index >= 0:
        out[index] = 1.0
    return out


def named(given: Sequence[str], needed: int, what: str) -> tuple[str, ...]:
    """`given` names; ValueError unless there are as many as needed, all of them different."""
    if len(given) != needed or len(set(given)) != needed:
        raise ValueError(f"--names must give {needed} different names, {what}; got {', '.join(given)}")
    return tuple(given)


def of_discrete(space: Any, names: Sequence[str], meanings: Sequence[str]) -> ActionMap:
    """One of n actions: a number each, but for the one that does nothing, which is no number at all."""
    size, first = int(space.n), int(space.start)
    every = named(names, size, "one an action") if names else tuple(meanings or [f"action{k}" for k in range(size)])
    idle = next((k for k, name in enumerate(every) if name.lower() in IDLE), -1)
    shown = [k for k in range(size) if k != idle]

    def to_env(x: np.ndarray) -> int:
        if not x.any():
            return first + max(idle, 0)
        return first + shown[int(x.argmax())]

    def of(action: Any) -> np.ndarray:
        k = int(action) - first
        return one_hot(-1 if k == idle else shown.index(k), len(shown))

    return ActionMap(tuple(every[k] for k in shown), to_env, of, lambda rng: of(first + int(rng.integers(size))))


def of_multi_discrete(space: Any, names: Sequence[str], _: Sequence[str]) -> ActionMap:
    """Several choices at once: a number for every value but the first of each, which counts as doing nothing."""
    sizes, start = np.asarray(space.nvec).ravel(), np.asarray(space.start).ravel()
    pairs = [(k, v) for k, n in enumerate(sizes) for v in range(1, int(n))]
    default = [f"choice{k}_{v}" for k, v in pairs]
    shown = named(names, len(pairs), "one for every value but the first of each choice") if names else tuple(default)

    def to_env(x: np.ndarray) -> np.ndarray:
        out = np.zeros(len(sizes), np.int64)
        for k in range(len(sizes)):
            held = [(x[i], v) for i, (choice, v) in enumerate(pairs) if choice == k]
            value, v = max(held, default=(0.0, 0))
            out[k] = v if value > 0 else 0
        return (out + start).reshape(np.shape(space.nvec))

    def of(action: Any) -> np.ndarray:
        values = np.asarray(action).ravel() - start
        return np.array([values[k] == v for k, v in pairs], np.float32)

    def random(rng: np.random.Generator) -> np.ndarray:
        return of(rng.integers(0, sizes) * (rng.random(len(sizes)) < 0.5) + start)

    return ActionMap(shown, to_env, of, random)


def of_multi_binary(space: Any, names: Sequence[str], meanings: Sequence[str]) -> ActionMap:
    """Switches that may be held together."""
    size = int(np.prod(space.shape))
    default = meanings if len(meanings) == size else [f"switch{k}" for k in range(size)]
    shown = named(names, size, "one a switch") if names else tuple(default)
    return ActionMap(
        shown,
        lambda x: (x > 0.5).astype(np.int8).reshape(space.shape),
        lambda action: np.asarray(action, np.float32).ravel(),
        lambda rng: (rng.random(size) < 0.3).astype(np.float32),
    )


def of_box(space: Any, names: Sequence[str], _: Sequence[str]) -> ActionMap:
    """Continuous axes: a number from 0 to 1 for each way an axis can go from rest, NAME_minus and NAME_plus for both.

    Rest is 0, or where an axis does not reach it the end that is nearest.
    """
    low, high = np.asarray(space.low, np.float64).ravel(), np.asarray(space.high, np.float64).ravel()
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise ValueError(
            "actions of this environment have no bounds, so none of them is a full one: wrap it in one that has"
        )
    rest = np.clip(0.0, low, high)
    axes = named(names, len(low), "one an axis") if names else tuple(f"axis{k}" for k in range(len(low)))
    ways = [
        (k, sign)
        for k in range(len(low))
        for sign in (-1, 1)
        if (rest[k] - low[k] if sign < 0 else high[k] - rest[k]) > 0
    ]
    both = {k for k, sign in ways if sign < 0} & {k for k, sign in ways if sign > 0}
    shown = tuple(axes[k] + ({-1: "_minus", 1: "_plus"}[sign] if k in both else "") for k, sign in ways)
    reach = np.array([high[k] - rest[k] if sign > 0 else rest[k] - low[k] for k, sign in ways])
    of_axis = np.array([k for k, _ in ways])
    signs = np.array([sign for _, sign in ways])

    def to_env(x: np.ndarray) -> np.ndarray:
        out = rest.copy()
        np.add.at(out, of_axis, signs * reach * x.astype(np.float64))
        return np.clip(out, low, high).reshape(space.shape).astype(space.dtype)

    def of(action: Any) -> np.ndarray:
        away = np.asarray(action, np.float64).ravel()[of_axis] - rest[of_axis]
        return np.clip(signs * away / reach, 0, 1).astype(np.float32)

    def random(rng: np.random.Generator) -> np.ndarray:
        return of((rest + rng.integers(-1, 2, len(low)) * np.maximum(high - rest, rest - low)).clip(low, high))

    return ActionMap(shown, to_env, of, random)


SPACES: Mapping[str, Callable[[Any, Sequence[str], Sequence[str]], ActionMap]] = {
    "Discrete": of_discrete,
    "MultiDiscrete": of_multi_discrete,
    "MultiBinary": of_multi_binary,
    "Box": of_box,
}


def action_map(space: Any, names: Sequence[str] = (), meanings: Sequence[str] = ()) -> ActionMap:
    """The named actions of a Gymnasium space: `names` as asked for, else `meanings`; ValueError for other spaces."""
    kind = type(space).__name__
    if kind not in SPACES:
        raise ValueError(
            f"actions of kind {kind} cannot be read; what can are {', '.join(SPACES)}: wrap the environment"
        )
    return SPACES[kind](space, names, meanings)
