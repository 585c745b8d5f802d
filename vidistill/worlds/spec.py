"""How a world presents itself to those who judge what was learned from it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from vidistill.data.clips import Clips


@dataclass(frozen=True)
class WorldSpec:
    """A world: one such line in `worlds.WORLDS` is all that evaluation and probes need.

    suites: of evaluation, that judge its students, the first unless another is asked for. config, record, seeds: how
    clips of given seeds are made. heads: what a probe can be asked, and the words for its answers. labels: of every
    frame of recorded clips, [N, T] by head; asked: the same of the actions alone, "none" in the middle. mirrored: the
    class of a mirrored picture; balanced: heads whose rare classes count as much as common ones. probe: the bundled
    one. readers: other measures of frames [T, H, W, 3] that evaluation takes by name.
    """

    suites: tuple[str, ...]
    config: Callable[..., Any]
    record: Callable[..., Iterator[Any]]
    seeds: Callable[[str, int], Iterable[int]]
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    labels: Callable[[Clips], dict[str, Tensor]] | None = None
    asked: Callable[[Clips], dict[str, Tensor]] | None = None
    mirrored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    balanced: tuple[str, ...] = ()
    probe: str = ""
    readers: Mapping[str, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
