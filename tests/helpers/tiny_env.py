"""A little Gymnasium world: a square that its actions move over a floor; and worlds in which something is wrong."""

from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

SPACES = {
    "discrete": spaces.Discrete(3),
    "ways": spaces.Discrete(6),
    "choices": spaces.MultiDiscrete([3, 2]),
    "switches": spaces.MultiBinary(2),
    "box": spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32)),
    "endless": spaces.Box(-np.inf, np.inf, (2,)),
    "dict": spaces.Dict({"a": spaces.Discrete(2)}),
}


MEANINGS = {
    "discrete": ["NOOP", "LEFT", "RIGHT"],
    "ways": ["NOOP", "UP", "RIGHT", "UPRIGHT", "FIRE", "UPRIGHTFIRE"],
}
RIGHT = 1 << 30 | 79  # pygame.K_RIGHT
KEYS = {
    "discrete": {(): 0, ("a",): 1, (ord("d"),): 2, ("d", "x"): 2},
    "ways": {(): 0, ("w",): 1, (RIGHT,): 2, ("w", RIGHT): 3, (" ",): 4, (" ", RIGHT, "w"): 5, (1 << 30 | 58,): 1},
}


class TinyEnv(gymnasium.Env):
    """`kind` of actions; `ends` after so many steps; `noisy` draws without its seed; `blank` renders nothing."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 45}

    def __init__(self, render_mode=None, kind="discrete", ends=0, noisy=False, blank=False, meanings=True):
        self.render_mode, self.ends, self.noisy, self.blank = render_mode, ends, noisy, blank
        self.action_space, self.observation_space = SPACES[kind], spaces.Box(0, 64, (2,))
        self.kind, self.meanings = kind, meanings

    def get_action_meanings(self):
        return MEANINGS.get(self.kind, []) if self.meanings else []

    def get_keys_to_action(self):
        return KEYS.get(self.kind, {})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = np.random.default_rng() if self.noisy else self.np_random
        self.floor = rng.integers(0, 120, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        self.place, self.steps = rng.integers(8, 40, 2).astype(float), 0
        return self.place, {}

    def step(self, action):
        pushes = {"discrete": lambda: [0, (0, -1, 1)[action]], "choices": lambda: [action[1], (0, -1, 1)[action[0]]],
                  "switches": lambda: list(action), "box": lambda: list(action),
                  "ways": lambda: [(0, -1, 0, -1, 0, -1)[action], (0, 0, 1, 1, 0, 1)[action]]}  # fmt: skip
        self.place = np.clip(self.place + np.array(pushes[self.kind](), float), 0, [39, 63])
        self.steps += 1
        return self.place, 0.0, bool(self.ends) and self.steps >= self.ends, False, {}

    def render(self):
        picture = self.floor.copy()
        y, x = self.place.astype(int)
        picture[y : y + 9, x : x + 9] = (255, 200, 40)
        return None if self.blank else picture


class Deaf(TinyEnv):
    """Renders for people alone."""

    metadata: ClassVar = {"render_modes": ["human"], "render_fps": 10}


gymnasium.register("Tiny-v0", "tiny_env:TinyEnv")
gymnasium.register("Deaf-v0", "tiny_env:Deaf")


def to_the_right(env, rng):
    """A policy of MODULE:FUNCTION."""
    return lambda observation: 2 if observation[1] < 40 else 0


def without_a_function(env, rng):
    return 3
