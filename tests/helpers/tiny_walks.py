"""Recorded walks of 16x16 pictures in a square room, drawn here, not by an engine: enough for probes and evaluation.

Four walls of their own colour with stripes; a turn moves the picture by 2 px, a step moves the stripes of the floor.
"""

import numpy as np

from vidistill.data.shards import frame_shards, write_shards
from vidistill.data.types import Episode, split_seeds

SIZE, ROUND = 16, 64  # px, columns of a full turn
FAR = 2000  # map units from the middle to a wall: nobody gets near one
WALLS = [[FAR, FAR, FAR, -FAR, 0], [-FAR, FAR, FAR, FAR, 1], [-FAR, -FAR, -FAR, FAR, 2], [FAR, -FAR, -FAR, -FAR, 3]]
COLOURS = np.array([[200, 40, 40], [40, 180, 60], [50, 70, 220], [230, 200, 40]])
SPEED = 0.64  # map units a frame


def walk(seed, length):
    rng = np.random.default_rng(seed)
    turns, steps = (np.repeat(rng.integers(-1, 2, length), rng.integers(2, 6, length))[:length] for _ in range(2))
    turns[0] = steps[0] = 0
    actions = np.stack([turns > 0, turns < 0, steps > 0, steps < 0], axis=1).astype(np.float32)
    column, floor = rng.integers(ROUND) + 2 * np.cumsum(turns), np.cumsum(steps)
    heading = 2 * np.pi * column / ROUND
    moved = np.cumsum(steps[:, None] * np.stack([np.cos(heading), np.sin(heading)], 1) * SPEED / 64, axis=0)
    frames = np.stack([picture(c, f) for c, f in zip(column, floor)])
    poses = np.concatenate([0.001 * rng.standard_normal((1, 2)) + moved, heading[:, None]], axis=1).astype(np.float32)
    return Episode(frames, actions, poses, seed, {"walls": WALLS})


def picture(column, floor):
    across = column + SIZE // 2 - np.arange(SIZE)  # left of the picture is a larger angle
    wall = ((across + ROUND // 8) // (ROUND // 4)) % 4
    stripes = np.where(across % 5 == 0, 0.5, 1.0)
    frame = np.repeat((COLOURS[wall] * stripes[:, None])[None], SIZE, axis=0)
    rows = np.arange(10, SIZE)
    frame[rows] = np.where((rows - floor) % 4 < 2, 160, 60)[:, None, None]
    return frame.astype(np.uint8)


def write_walks(folder, *, num, length, split="validation", first=0):
    meta = {"source": "doom", "split": split, "config": {"speed": SPEED}, "fps": 17.5}
    write_shards(folder, frame_shards(walk(s, length) for s in split_seeds(split, first + num)[first:]), meta)
    return folder
