"""What would really have happened: the true future of any actions, in the worlds that can be asked."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vidistill.config import build

Future = Callable[[Mapping[str, Any], Mapping[str, Any], np.ndarray], np.ndarray]


def true_future(meta: Mapping[str, Any], clip: Mapping[str, Any], actions: np.ndarray) -> np.ndarray:
    """The frames uint8 [T, H, W, 3] that actions [T, A] lead to from the start of a recorded clip.

    `meta` of the data and `clip`, its entry in `described`, say which world and from where; actions[0] is not played. T
    is smaller where the world ends before. ValueError for data that were filmed, not played.
    """
    source = str(meta.get("source"))
    if source not in FUTURES:
        raise ValueError(
            f"data of source {source!r} have no true future: worlds that can be asked are {', '.join(FUTURES)}"
        )
    return FUTURES[source](meta, clip, actions)


def of_doom(meta: Mapping[str, Any], clip: Mapping[str, Any], actions: np.ndarray) -> np.ndarray:
    from vidistill.worlds.doom import recorder

    return recorder.replay(build(recorder.DoomConfig, meta["config"]), clip["seed"], actions).frames


def of_gym(meta: Mapping[str, Any], clip: Mapping[str, Any], actions: np.ndarray) -> np.ndarray:
    from vidistill.data.importers import gym

    if not meta.get("deterministic"):
        raise ValueError(f"{meta['config']['env']} is not deterministic: it has no true future to compare with")
    return gym.replay(build(gym.GymConfig, meta["config"]), clip["seed"], actions)


FUTURES: Mapping[str, Future] = {"doom": of_doom, "gym": of_gym}
