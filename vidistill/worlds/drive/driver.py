"""Who drives while a world is recorded: holds the road, and now and then does what people at a keyboard do."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from vidistill.worlds.drive.env import KEYS, LOCK, TOP

LENGTH = 3.24  # units between the axles
AHEAD = (3, 7)  # tiles of the road that a driver looks ahead, at rest and at full speed
SIDE = 3.5  # units beside the middle of the road that a driver may want to be
FIRM = 0.35  # share of the lock from which a wanted angle is worth a key
HANDS = (  # keys that a burst holds, and how often
    (("steer_left",), 3),
    (("steer_right",), 3),
    (("steer_left", "gas"), 3),
    (("steer_right", "gas"), 3),
    (("gas",), 4),
    (("brake",), 2),
    (("steer_left", "brake"), 1),
    (("steer_right", "brake"), 1),
    ((), 2),
)
TAP, LONG = (1, 6), (8, 48)  # frames of a burst
TAPS = 0.65  # of all bursts
ROAD = (4, 40)  # frames on the road from one burst to the next
WILD = 0.12  # of all episodes: bursts alone


def drive(env: Any, rng: np.random.Generator) -> Callable[[Any], np.ndarray]:
    """A driver for an episode of `env`: bursts of keys, and between them pure pursuit of the road by held keys."""
    inner, hands = env.unwrapped, np.array([weight for _, weight in HANDS], np.float64)
    wild = rng.random() < WILD
    speed, beside = rng.uniform(10, 1.15 * TOP), rng.uniform(-SIDE, SIDE)
    keys, left, burst = np.zeros(len(KEYS), np.int8), 0, False
    road = 0 if wild else int(rng.integers(*ROAD))  # frames left on it

    def choose(observation: Any) -> np.ndarray:
        nonlocal keys, left, burst, speed, beside, road
        if burst and left == 0 and not wild:
            burst, road = False, int(rng.integers(*ROAD))
            speed, beside = rng.uniform(10, 1.15 * TOP), rng.uniform(-SIDE, SIDE)
        elif not burst and road <= 0:
            burst, left = True, 0
        if left == 0:
            if burst:
                held, _ = HANDS[rng.choice(len(HANDS), p=hands / hands.sum())]
                left = int(rng.integers(*(TAP if rng.random() < TAPS else LONG), endpoint=True))
                keys = np.array([name in held for name in KEYS], np.int8)
            else:
                keys, left = pursue(inner.track, observation, speed, beside), int(rng.integers(1, 5))
        left -= 1
        road -= not burst
        return keys

    return choose


def pursue(track: np.ndarray, observation: np.ndarray, wanted: float, beside: float) -> np.ndarray:
    """The keys that bring a car back to, and along, a road [N, 3] (angle, x, y), whichever way it faces.

    `wanted`: its speed; bends are taken more slowly. `beside`: units to the right of the middle.
    """
    x, y, angle, speed, yaw, on_road = observation
    heading = np.array([-math.sin(angle), math.cos(angle)])
    near = int(np.hypot(track[:, 1] - x, track[:, 2] - y).argmin())
    way = 1 if math.cos(track[near, 0] - angle) >= 0 else -1
    look = round(np.interp(speed, (0, TOP), AHEAD))
    target = track[(near + way * look) % len(track)]
    to = target[1:] + way * beside * np.array([math.cos(target[0]), math.sin(target[0])]) - (x, y)
    aside = heading[1] * to[0] - heading[0] * to[1]  # to the right
    steer = math.atan2(2 * LENGTH * aside, float(to @ to))
    if heading @ to < 0:
        steer = math.copysign(LOCK, aside)
    steer += 0.03 * (yaw + speed * math.tan(steer) / LENGTH)  # what the car already turns, and more, is taken back
    bend = abs(math.remainder(track[(near + way * 2 * look) % len(track), 0] - track[near, 0], math.tau))
    goal = min(wanted, TOP / (1 + 1.2 * bend)) if on_road else min(wanted, 14.0)
    keys = {"steer_left": steer < -FIRM * LOCK, "steer_right": steer > FIRM * LOCK}
    keys |= {"gas": speed < goal, "brake": speed > goal + 6}
    return np.array([keys[name] for name in KEYS], np.int8)
