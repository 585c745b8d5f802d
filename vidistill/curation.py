"""Which recorded clips are worth learning from, by what was measured of them, and why the others are not."""

from collections.abc import Mapping, Sequence
from typing import Any

Ranges = Mapping[str, tuple[float, float]]  # measure of a clip -> what it may be


def curated(described: Sequence[Mapping[str, Any]], ranges: Ranges, where: str) -> tuple[list[int], dict[str, int]]:
    """Numbers of the clips whose `measures` lie in all ranges, and how many others there are by their first reason.

    `where` the clips are from, for messages. ValueError for a measure that clips lack, and where none is left.
    Source: LiveTalk 2512.23576, condition curation; its filters look at other things.
    """
    kept, dropped = [], dict.fromkeys((f"{name} {side}" for name in ranges for side in ("below", "above")), 0)
    for k, clip in enumerate(described):
        measures = clip.get("measures", {})
        if missing := sorted(set(ranges) - set(measures)):
            known = ", ".join(measures) or "none"
            raise ValueError(f"clips of {where} have no measure {missing[0]!r} to curate by; they have {known}")
        faults = [
            f"{name} {'below' if measures[name] < low else 'above'}"
            for name, (low, high) in ranges.items()
            if not low <= measures[name] <= high
        ]
        if faults:
            dropped[faults[0]] += 1
        else:
            kept.append(k)
    if not kept:
        raise ValueError(f"curation leaves no clip of {where}: {dropped}; widen the ranges")
    return kept, {reason: count for reason, count in dropped.items() if count}
