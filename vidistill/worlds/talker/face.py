"""Drawn talking faces, and the reader that finds the mouth in pictures of them again."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

SIDE = 64.0  # faces are laid out in units of a picture this wide
INSIDE = (52, 8, 20)  # colour of an open mouth, the same for everybody: what the reader looks for
SKINS = {
    "pale": (246, 214, 196),
    "rosy": (240, 188, 166),
    "olive": (214, 170, 124),
    "tan": (196, 140, 100),
    "brown": (160, 106, 76),
}
HAIRS = {
    "black": (30, 26, 30),
    "brown": (96, 60, 34),
    "blond": (228, 190, 96),
    "red": (178, 76, 36),
    "grey": (168, 168, 174),
    "blue": (60, 96, 190),
}
GROUNDS = {
    "teal": (60, 140, 140),
    "sand": (206, 186, 146),
    "grey": (126, 132, 140),
    "green": (96, 150, 84),
    "violet": (130, 104, 170),
    "sky": (140, 186, 226),
}
SHIRTS = {
    "white": (232, 232, 236),
    "navy": (36, 46, 92),
    "crimson": (176, 36, 56),
    "green": (44, 116, 70),
    "mustard": (212, 166, 52),
}
IDENTITY: dict[str, tuple[str, ...]] = {
    "skin": tuple(SKINS),
    "hair": tuple(HAIRS),
    "style": ("short", "long", "bun", "parted", "bald"),
    "shape": ("round", "square", "narrow"),
    "ground": tuple(GROUNDS),
    "shirt": tuple(SHIRTS),
}
# by mood: how far the corners of the mouth rise, how far the inner ends of the brows do, and the brows as a whole
MOODS = {
    "happy": (1.6, 0.3, 0.5),
    "calm": (0.0, 0.0, 0.0),
    "sad": (-1.3, 1.4, 0.2),
    "angry": (-0.6, -1.4, -0.7),
    "surprised": (0.2, 0.6, 2.0),
}
HEADS = {"round": (15.5, 18.5, 0.0), "square": (14.6, 18.3, 0.6), "narrow": (13.0, 19.5, 0.1)}  # radii, squareness
MOUTH_Y, MOUTH_HALF, MOUTH_WIDER, MOUTH_OPEN = 9.5, 4.2, 3.6, 5.2  # below the centre; half width, and what it may grow
ZOOM, CENTRE = 1.18, (32.0, 33.0)  # the picture shows the middle of the layout larger
BOX = (33, 56, 13, 51)  # rows and columns (of SIDE) of the picture in which every mouth lies
CHEEKS = (27, 33, 26, 38)  # the same for skin that nothing covers


@dataclass(frozen=True)
class Pose:
    """What moves, float32, one value a frame: head [T, 2] in units, tilt [T] in radians, lids [T] (0 open, 1 shut),
    mouth [T, 2] (opening and width)."""

    head: np.ndarray
    tilt: np.ndarray
    lids: np.ndarray
    mouth: np.ndarray


class Canvas:
    """Pictures [3, T, size, size] that soft-edged shapes are painted on, in units of the layout."""

    def __init__(self, frames: int, size: int) -> None:
        at = (np.arange(size, dtype=np.float32) + 0.5) * (SIDE / size)
        self.x, self.y = ((at - c) / ZOOM + c for c in CENTRE)
        self.x, self.y = self.x[None, None, :], self.y[None, :, None]
        self.px = np.zeros((3, frames, size, size), np.float32)  # colours apart: they are painted one by one
        self.soft = np.float32(size / SIDE * ZOOM)  # pixels a unit: edges are as soft as a pixel

    def part(self, rows: tuple[float, float], columns: tuple[float, float]) -> tuple["Canvas", tuple[slice, slice]]:
        """The piece of this canvas between layout rows and columns, and where it lies."""
        (high, wide) = (
            slice(*np.searchsorted(at.ravel(), span).tolist()) for at, span in ((self.y, rows), (self.x, columns))
        )
        piece = object.__new__(Canvas)
        piece.px, piece.soft = self.px[..., high, wide], self.soft
        piece.x, piece.y = self.x[:, :, wide], self.y[:, high]
        return piece, (high, wide)

    def fill(self, coverage: np.ndarray, colour: np.ndarray) -> None:
        """Paint `colour` [3] where `coverage` [T, H, W] says."""
        for layer, value in zip(self.px, np.asarray(colour, np.float32), strict=True):
            layer += coverage * (value - layer)

    def inside(self, distance: np.ndarray) -> np.ndarray:
        """Coverage of a shape by its signed distance in units."""
        return np.clip(np.float32(0.5) - distance * self.soft, 0, 1)


def ellipse(
    x: np.ndarray, y: np.ndarray, rx: np.ndarray | float, ry: np.ndarray | float, square: float = 0.0
) -> np.ndarray:
    """Distance, about, to an ellipse with radii `rx`, `ry`, negative inside; `square` makes it a superellipse."""
    u, v = x / rx, y / ry
    r = np.sqrt(u * u + v * v)
    if square:
        r = (1 - square) * r + square * np.sqrt(np.sqrt(u**4 + v**4))
    slope = np.sqrt((u / rx) ** 2 + (v / ry) ** 2) / np.maximum(r, 1e-3)
    return (r - 1) / np.maximum(slope, 1e-3)


def frame_values(x: np.ndarray) -> np.ndarray:
    """A value a frame [T] as [T, 1, 1]."""
    return np.asarray(x, np.float32)[:, None, None]


AT_ONCE = 8  # frames drawn together: their layers stay in the processor's cache


def draw(look: Mapping[str, str], mood: str, pose: Pose, seed: int, size: int = 64) -> np.ndarray:
    """Frames uint8 [T, size, size, 3] of a person; proportions beyond the words of `look` follow from `seed`."""
    parts = []
    for start in range(0, len(pose.tilt), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        now = Pose(pose.head[few], pose.tilt[few], pose.lids[few], pose.mouth[few])
        parts.append(draw_few(look, mood, now, seed, size))
    return np.concatenate(parts)


def draw_few(look: Mapping[str, str], mood: str, pose: Pose, seed: int, size: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 3])
    canvas = Canvas(len(pose.tilt), size)
    rx, ry, square = HEADS[look["shape"]]
    rx, ry = rx * rng.uniform(0.95, 1.06), ry * rng.uniform(0.97, 1.04)
    skin, hair = (np.array(c[look[k]], np.float32) for c, k in ((SKINS, "skin"), (HAIRS, "hair")))
    hx, hy = (frame_values(pose.head[:, i]) for i in (0, 1))
    cx, cy = 32 + hx, 29 + hy
    background(canvas, look, hx, skin)
    c, s = np.cos(frame_values(pose.tilt)), np.sin(frame_values(pose.tilt))
    x, y = canvas.x - cx, canvas.y - (cy + 14)  # the head turns about the neck
    x, y = c * x + s * y, c * y - s * x + 14
    jaw = 1.6 * frame_values(pose.mouth[:, 0]) * np.clip(y / 16, 0, 1)
    head = ellipse(x, y - jaw, rx, ry, square)
    hair_behind(canvas, look["style"], x, y, rx, ry, hair)
    for side in (-1, 1):
        canvas.fill(canvas.inside(ellipse(x - side * rx, y - 1, 2.4, 3.6)), 0.9 * skin)
    canvas.fill(canvas.inside(head), skin)
    canvas.fill(0.5 * canvas.inside(ellipse(x, y - 4.0, 1.5, 2.6)), 0.82 * skin)
    for paint, values, rows in ((eyes, pose.lids, (14, 36)), (lips, pose.mouth, (30, 54))):
        piece, (high, wide) = canvas.part(rows, (14, 50))
        paint(piece, x[:, high, wide], y[:, high, wide], values, mood, skin, rng)
    hair_above(canvas, look["style"], x, y, head, ry, hair)
    return np.round(np.clip(canvas.px, 0, 255)).astype(np.uint8).transpose(1, 2, 3, 0)


def background(canvas: Canvas, look: Mapping[str, str], hx: np.ndarray, skin: np.ndarray) -> None:
    """A wall lit from above, shoulders, a neck."""
    ground, shirt = np.array(GROUNDS[look["ground"]], np.float32), np.array(SHIRTS[look["shirt"]], np.float32)
    canvas.px[:] = np.clip(ground[:, None, None, None] * (1.12 - 0.3 * canvas.y / SIDE), 0, 255)
    lean = 0.35 * hx
    canvas.fill(canvas.inside(ellipse(canvas.x - 32 - lean, canvas.y - 66, 26, 13)), shirt)
    canvas.fill(canvas.inside(ellipse(canvas.x - 32 - 0.6 * hx, canvas.y - 51, 6.5, 9)), 0.86 * skin)


def hair_behind(
    canvas: Canvas, style: str, x: np.ndarray, y: np.ndarray, rx: float, ry: float, hair: np.ndarray
) -> None:
    """What of the hair lies behind the head."""
    if style == "long":
        locks = np.maximum(ellipse(x, y - 7, rx + 5, ry + 7.5, 0.4), np.minimum(11 - np.abs(x), y - 9))
        canvas.fill(canvas.inside(locks), 0.85 * hair)  # they part below the chin
    elif style == "bun":
        canvas.fill(canvas.inside(ellipse(x, y + ry + 2.5, 6.5, 5.5)), 0.9 * hair)
    if style != "bald":
        canvas.fill(canvas.inside(ellipse(x, y + 3.5, rx + 2, ry + 0.5)), hair)


def hair_above(
    canvas: Canvas, style: str, x: np.ndarray, y: np.ndarray, head: np.ndarray, ry: float, hair: np.ndarray
) -> None:
    """What of the hair lies on the forehead."""
    lines = {
        "short": y + 0.62 * ry - 0.008 * x**2,
        "long": y + 0.70 * ry - 0.035 * x**2,
        "bun": y + 0.68 * ry - 0.012 * x**2,
        "parted": y + 0.60 * ry - 0.32 * x,
    }
    if style in lines:
        canvas.fill(canvas.inside(np.maximum(head - 0.6, lines[style])), hair)


def eyes(
    canvas: Canvas,
    x: np.ndarray,
    y: np.ndarray,
    lids: np.ndarray,
    mood: str,
    skin: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Two eyes with brows."""
    apart, iris = rng.uniform(6.0, 7.0), np.array([(70, 46, 30), (60, 90, 140), (60, 100, 60)][rng.integers(3)])
    _, inner, raised = MOODS[mood]
    open_ = frame_values(1 - lids)
    high, shown = np.maximum(2.5 * open_, 0.4), np.clip(3 * open_, 0, 1)
    for side in (-1, 1):
        ex, ey = x - side * apart, y + 3
        white = ellipse(ex, ey, 3.3, high)
        canvas.fill(canvas.inside(white) * shown, np.array((250, 250, 250)))
        canvas.fill(canvas.inside(np.maximum(ellipse(ex, ey, 1.7, 1.7), white)) * shown, iris)
        lid = np.maximum(np.abs(ey - 0.3) - 0.45, np.abs(ex) - 3.0)
        canvas.fill(canvas.inside(lid) * frame_values(lids), 0.6 * skin)
        brow = np.abs(ey + 4.6 + raised - inner * side * ex / 3.4) - 0.7
        canvas.fill(canvas.inside(np.maximum(brow, np.abs(ex) - 3.6)), 0.45 * skin)


def lips(
    canvas: Canvas,
    x: np.ndarray,
    y: np.ndarray,
    mouth: np.ndarray,
    mood: str,
    skin: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """A mouth: lips around a dark inside, corners bent by the mood."""
    opening, width = frame_values(mouth[:, 0]), frame_values(mouth[:, 1])
    half, high = MOUTH_HALF + MOUTH_WIDER * width, 0.35 + MOUTH_OPEN * opening
    bend = MOODS[mood][0] * (x / half) ** 2
    my = y - MOUTH_Y - 0.45 * high + np.clip(bend, -3, 3)
    canvas.fill(canvas.inside(ellipse(x, my, half + 1.2, high + 1.3)), 0.5 * skin + 0.5 * np.array((176, 50, 60)))
    canvas.fill(canvas.inside(ellipse(x, my, half, high)), np.array(INSIDE))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_mouth(px: np.ndarray) -> np.ndarray:
    """Opening and width [..., 2], about 0 to 1, of the mouths in pictures float [..., H, W, 3] in [0, 1].

    Every pixel of the mouth's region is placed between the colour of skin (median of the cheeks) and that of an open
    mouth. Opening is the height of the tallest columns that are dark, width how far they reach from there. No face:
    nothing dark, opening is near 0.
    """
    scale = px.shape[-2] / SIDE
    region, cheeks, band = (crop(px, scale, box).astype(np.float32) for box in (BOX, CHEEKS, (*CHEEKS[:2], *BOX[2:])))
    skin = np.median(cheeks.reshape(*cheeks.shape[:-3], -1, 3), axis=-2)[..., None, None, :]
    face = (np.abs(band - skin).sum(-1) < 0.15).sum(-2) + 1e-3
    middle = (face * np.arange(face.shape[-1])).sum(-1) / face.sum(-1)
    axis = np.array(INSIDE, np.float32) / 255 - skin
    along = ((region - skin) * axis).sum(-1) / np.maximum((axis**2).sum(-1), 0.02)
    off = np.abs(region - skin - along[..., None] * axis).sum(-1)  # hair and clothes are dark, too, of other colours
    dark = np.clip((along - 0.45) / 0.45, 0, 1) * (off < 0.3)
    unit = scale * ZOOM
    columns = around_the_middle(dark.sum(-2) / unit, middle)
    tall = np.sort(columns, axis=-1)[..., -max(3, round(4 * scale)) :].mean(-1)
    wide = np.clip(columns / 0.7, 0, 1).sum(-1) / unit
    opening = (tall - 0.5) / (2 * MOUTH_OPEN)
    width = (wide / 2 - MOUTH_HALF) / MOUTH_WIDER
    return np.stack((opening, width), axis=-1)


def crop(px: np.ndarray, scale: float, box: tuple[int, int, int, int]) -> np.ndarray:
    top, bottom, left, right = (round(v * scale) for v in box)
    return px[..., top:bottom, left:right, :]


def around_the_middle(columns: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Heights [..., W] of the columns around the tallest one near column `middle` [...], up to the next bright ones."""
    n = columns.shape[-1]
    at = np.arange(n)
    near = np.abs(at - middle[..., None]) <= n / 6
    tallest = np.where(near, columns, -1.0).argmax(-1)[..., None]
    bright = columns < 0.25
    left = np.where(bright & (at < tallest), at, -1).max(-1, keepdims=True)
    right = np.where(bright & (at > tallest), at, n).min(-1, keepdims=True)
    return columns * ((at > left) & (at < right))
