"""Captioned moving shapes: one coloured shape that moves over a plain ground for ever, and the sentence that says so.

The picture is a torus: what leaves on one side comes back on the other, so that a caption stays true however long a
stream runs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vidistill.data import types
from vidistill.data.clips import Clips
from vidistill.data.types import HELD_OUT_SEED, Captioned, split_seeds
from vidistill.worlds.spec import WorldSpec

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
}
GROUNDS = {"black": (20, 20, 24), "white": (235, 235, 235), "grey": (128, 128, 128), "brown": (100, 65, 40)}
MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0), "nowhere": (0.0, 0.0)}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "motion": tuple(MOTIONS),
    "ground": tuple(GROUNDS),
}
CAPTIONS = (
    "a {colour} {shape} moves {motion} on a {ground} background",
    "a {colour} {shape} drifts {motion} in front of {ground}",
    "{ground} background, a {colour} {shape} going {motion}",
)
JUDGE_SEED = 2_000_000  # seeds from here on are for the judge: all combinations, else it learns which ones never occur
HELD_OUT_EVERY = 8  # one combination of attributes in so many is never trained on


SPLITS = {**types.SPLITS, "judge": range(JUDGE_SEED, 3_000_000)}


@dataclass(frozen=True)
class ShapesConfig:
    """How a clip is drawn: `size` and `radius` in pixels, `speed` in pixels a frame (lowest, highest)."""

    size: int = 32
    fps: float = 12.0
    num_frames: int = 129
    speed: tuple[float, float] = (0.5, 0.5)
    radius: tuple[float, float] = (5.5, 7.5)

    def __post_init__(self) -> None:
        if self.size < 8 or self.num_frames < 1 or self.fps <= 0:
            raise ValueError(
                f"shapes need size >= 8, num_frames >= 1, fps > 0; got {self.size}, {self.num_frames}, {self.fps}"
            )
        for name, (low, high) in (("speed", self.speed), ("radius", self.radius)):
            if not 0 < low <= high <= self.size / 2:
                raise ValueError(f"shapes.{name} must rise from above 0 to at most size / 2, got {low} to {high}")


def seeds(split: str, num: int) -> range:
    """The first seeds of a split: "train", "validation", "test" or "judge" (what a probe is trained on).

    They never meet, nor do the captions of training with those of validation and test.
    """
    return split_seeds(split, num, SPLITS)


def is_held_out(labels: dict[str, str]) -> bool:
    """Whether a combination of attributes belongs to the held-out split."""
    return sum(words.index(labels[name]) for name, words in ATTRIBUTES.items()) % HELD_OUT_EVERY == 0


def describe(seed: int) -> tuple[dict[str, str], str]:
    """The attributes of a seed and their caption; held-out combinations belong to held-out seeds, never to training."""
    rng = np.random.default_rng([seed, 0])
    while True:
        labels = {name: words[rng.integers(len(words))] for name, words in ATTRIBUTES.items()}
        if seed >= JUDGE_SEED or is_held_out(labels) == (seed >= HELD_OUT_SEED):
            return labels, caption(labels, int(rng.integers(len(CAPTIONS))))


def caption(labels: dict[str, str], form: int = 0) -> str:
    """A sentence for attributes."""
    return CAPTIONS[form].format(**labels)


def draw(cfg: ShapesConfig, labels: dict[str, str], seed: int) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of a scene; place, size and speed follow from `seed`."""
    rng = np.random.default_rng([seed, 1])
    centre, radius = rng.uniform(0, cfg.size, 2), rng.uniform(*cfg.radius)
    step = np.array(MOTIONS[labels["motion"]]) * rng.uniform(*cfg.speed)
    at = centre + step * np.arange(cfg.num_frames)[:, None]
    pixel = np.arange(cfg.size) + 0.5
    x, y = (wrapped(pixel - at[:, i : i + 1], cfg.size) for i in (0, 1))  # [T, W] and [T, H]
    outside = DISTANCES[labels["shape"]](x[:, None, :], y[:, :, None], radius)
    inside = np.clip(0.5 - outside, 0, 1)[..., None]  # edges as soft as a pixel
    ground, colour = np.array(GROUNDS[labels["ground"]]), np.array(COLOURS[labels["colour"]])
    return np.round(ground + inside * (colour - ground)).astype(np.uint8)


def wrapped(distance: np.ndarray, size: int) -> np.ndarray:
    """Signed distance on a circle of `size`, between -size / 2 and size / 2."""
    return (distance + size / 2) % size - size / 2


def triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    slope = np.sqrt(0.8)
    return np.maximum(y - 0.8 * r, (np.abs(x) * 1.0 - (y + r) * 0.55) * slope)


def cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    x, y = np.broadcast_arrays(np.abs(x), np.abs(y))
    bar = 0.36 * r
    return np.minimum(np.maximum(x - r, y - bar), np.maximum(x - bar, y - r))


# signed distances in pixels from the edge of a shape of radius r, negative inside
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - 0.86 * r,
    "triangle": triangle,
    "cross": cross,
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.75 * r) - 0.28 * r,
}


def record_many(cfg: ShapesConfig, seeds: Iterable[int]) -> Iterator[Captioned]:
    """The clip of every seed, in order; the same seed gives the same bytes."""
    for seed in seeds:
        labels, words = describe(seed)
        yield Captioned(draw(cfg, labels, seed), words, labels, seed)


def shape_labels(clips: Clips) -> dict[str, torch.Tensor]:
    """Colour, shape, motion and ground of every frame: the words of its caption as class indices."""
    frames, described = clips.tensors["frames"].shape[1], clips.meta["described"][: len(clips)]
    return {
        name: torch.tensor([words.index(d[name]) for d in described])[:, None].expand(-1, frames)
        for name, words in ATTRIBUTES.items()
    }


WORLD = WorldSpec(
    ("prompt_adherence",),
    ShapesConfig,
    record_many,
    seeds,
    heads=ATTRIBUTES,
    labels=shape_labels,
    mirrored={"motion": (1, 0, 2, 3, 4)},
    probe="probes/shapes-probe",
)
