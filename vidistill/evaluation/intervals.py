"""How sure figures are: rooms and rollout noise are drawn again and again, and figures measured anew (bootstrap)."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.evaluation.report import Metric

log = logging.getLogger("vidistill")

LEAST_ROOMS = 8  # for an interval
LEVEL = (0.025, 0.975)
Draw = Mapping[str, float]  # figures of one draw by path, "student/psnr_by_horizon/0.5"


def flat(value: Any, path: str = "") -> dict[str, float]:
    """Numbers in nested figures, by path."""
    if isinstance(value, Mapping):
        return {name: x for key, part in value.items() for name, x in flat(part, f"{path}/{key}").items()}
    return {path.lstrip("/"): float(value)} if isinstance(value, int | float) else {}


def mean_of(values: Sequence[Any]) -> Any:
    """The mean of nested figures, part by part."""
    if len(values) == 1:
        return values[0]
    if isinstance(values[0], Mapping):
        return {key: mean_of([value[key] for value in values]) for key in values[0]}
    return sum(values) / len(values)


def bootstrap(
    rooms: Tensor, compute: Callable[[Tensor, np.random.Generator], Mapping[str, Any]], count: int
) -> list[Draw]:
    """Figures of `count` draws of as many rooms as there are, with replacement: `compute(index of items, generator)`.

    rooms [N]: of every item; items of a room are drawn together, since they are alike. Empty where rooms are too few.
    """
    members = [(rooms == room).nonzero()[:, 0] for room in rooms.unique()]
    if count and len(members) < LEAST_ROOMS:
        log.warning("%d rooms are too few for an interval; needed are at least %d", len(members), LEAST_ROOMS)
        return []
    rng = np.random.default_rng(0)
    picks = (torch.cat([members[k] for k in rng.integers(len(members), size=len(members))]) for _ in range(count))
    return [flat(compute(index, rng)) for index in picks]


def interval(point: float, values: Sequence[float]) -> list[float] | None:
    """Between which values a figure lies with 95 %; None where too few draws had one.

    The spread of the draws about their own mean, moved to the figure: a draw has fewer different rooms than there are,
    which alone moves distances.
    """
    held = np.array([value for value in values if math.isfinite(value)])
    if not math.isfinite(point) or len(held) <= len(values) // 2:
        return None
    return [point + float(edge) for edge in np.quantile(held - held.mean(), LEVEL)]


def ranged(point: float, values: Sequence[float]) -> list[float] | None:
    """The interval of a figure, clipped at 0 for figures that are never negative, and at 1 for those that reach 1 and
    never exceed it, as shares do."""
    edges, drawn = interval(point, values), [point, *values]
    if edges is None:
        return None
    low, high = (0.0 if min(drawn) >= 0 else -math.inf), (1.0 if math.isclose(max(drawn), 1.0) else math.inf)
    return [min(max(edge, low), high) for edge in edges]


def add_intervals(row: dict[str, Any], draws: Sequence[Draw], path: str) -> None:
    """KEY_interval beside every figure of a row that was drawn under `path`, part by part."""
    if not draws:
        return
    for key, value in list(row.items()):
        parts = {name: [draw[name] for draw in draws if name in draw] for name in flat(value, f"{path}/{key}")}
        found = {name: ranged(x, parts[name]) for name, x in flat(value, f"{path}/{key}").items() if parts[name]}
        if isinstance(value, Mapping) and found:
            row[f"{key}_interval"] = {name.removeprefix(f"{path}/{key}/"): edges for name, edges in found.items()}
        elif found:
            row[f"{key}_interval"] = found[f"{path}/{key}"]


def certain(rooms: Tensor, compute: Callable[[Tensor], Mapping[str, Any]], count: int) -> dict[str, Any]:
    """Figures `compute(index of items)` of all items, with their intervals over rooms [N]."""
    found = dict(compute(torch.arange(len(rooms))))
    add_intervals(found, bootstrap(rooms, lambda index, rng: {"own": compute(index)}, count), "own")
    return found


def badness(best: str, value: float) -> float:
    """How far a figure is from what it should be, lower is better."""
    return {"low": value, "high": -value, "one": abs(value - 1)}[best]


def compare(
    numbers: Mapping[str, Metric], result: Mapping[str, Any], draws: Sequence[Draw], one: str, other: str
) -> dict[str, Any]:
    """How figures of row `one` differ from those of `other`: value, interval and verdict by key.

    Both rows are measured on the same rooms of every draw, so the difference is paired. It is better or worse only
    where the interval of the difference excludes zero.
    """
    out: dict[str, Any] = {}
    for key, metric in numbers.items():
        own, beside = flat(result[one].get(key), key), flat(result[other].get(key), key)
        for path in own.keys() & beside.keys():
            pairs = [(draw.get(f"{one}/{path}", math.nan), draw.get(f"{other}/{path}", math.nan)) for draw in draws]
            point = own[path] - beside[path]
            out[path] = {"value": point, "interval": interval(point, [a - b for a, b in pairs])}
            if metric.best and out[path]["interval"] is not None:
                sides = [(own[path], beside[path]), *pairs]
                lost, *spread = [badness(metric.best, a) - badness(metric.best, b) for a, b in sides]
                edges = interval(lost, spread)
                clear = edges is not None and edges[0] * edges[1] > 0
                out[path]["verdict"] = ("better" if lost < 0 else "worse") if clear else "not distinguishable"
    return {key: out[key] for key in sorted(out)}
