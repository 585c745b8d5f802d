"""Worlds for the Doom recorder: floor plans, wall pictures, the WAD the engine loads, ray casting against the walls.

Everything here is numpy and bytes; the engine itself lives in `sources.doom`. Lengths are map units, angles radians.
"""

import io
import struct
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from PIL import Image

UNITS_PER_POSE = 64.0  # poses are stored in map units / 64
ROOM_HEIGHT, DOOR_HEIGHT, VIEW_HEIGHT = 192, 136, 84
DOOR_WIDTH, FRAME_WIDTH, WALL_THICKNESS = 128, 16, 32
LONGEST_PIECE = 448  # a longer side is cut into pieces with a picture each
TEXTURE_WIDTH = 128
FORWARD_MOVE = 200  # multiplies the thrust, which a friction of 0 makes tiny
UNITS_PER_DELTA = FORWARD_MOVE / 2048  # map units walked in one tic for a MOVE_FORWARD_BACKWARD_DELTA of 1; measured

COLOURS = {
    "red": (214, 40, 40), "orange": (247, 140, 20), "yellow": (250, 220, 40), "green": (60, 176, 60),
    "cyan": (60, 205, 215), "blue": (45, 80, 215), "purple": (130, 50, 170), "pink": (245, 130, 190),
}  # fmt: skip
PATTERNS = ("panel", "stripes", "bars", "discs")
PALETTE_SIZE = len(COLOURS) * len(PATTERNS)
FRAME_TEXTURE = PALETTE_SIZE  # the index of the door frame, after the wall pictures
FRAME_COLOUR = (248, 248, 240)
FLOORS = ((92, 78, 66), (70, 84, 96), (104, 100, 92), (76, 92, 72))
CEILINGS = ((196, 204, 214), (214, 204, 186), (182, 196, 182), (206, 194, 206))
LAYOUTS = ("rooms", "ring", "plus", "hall")


@dataclass(frozen=True, eq=False)
class World:
    """A floor plan: rectangles (x0, y0, x1, y1), which of them are door ways, blocks in them, and every wall piece.

    walls: float64 [N, 4], x1 y1 x2 y2 with the open side on the right. textures: int [N]. offsets: float64 [N], where
    in its picture a piece begins. owners: int [N], the rectangle it belongs to.
    portals: (rectangle, rectangle, x1, y1, x2, y2), the open edges that two rectangles share.
    """

    layout: str
    rects: tuple[tuple[int, int, int, int], ...]
    doors: frozenset[int]
    blocks: tuple[tuple[int, int, int, int], ...]
    walls: np.ndarray
    textures: np.ndarray
    offsets: np.ndarray
    owners: np.ndarray
    portals: tuple[tuple[int, ...], ...]
    floor: int
    ceiling: int
    start: tuple[int, int, int]  # x, y, degrees


# Floor plans: (rects, doors, blocks)


def make_world(layouts, seed: int) -> World:
    """Returns the world of a seed: floor plan, openings, sizes, wall pictures, tones and start pose are all drawn."""
    rng = np.random.default_rng([seed, 0])
    layout = layouts[rng.integers(len(layouts))]
    rects, doors, blocks = PLANS[layout](rng)
    walls, textures, offsets, owners, portals = _walls(rects, doors, blocks, rng)
    world = World(
        layout, tuple(rects), frozenset(doors), tuple(blocks), walls, textures, offsets, owners, portals,
        int(rng.integers(len(FLOORS))), int(rng.integers(len(CEILINGS))), (0, 0, 0),
    )  # fmt: skip
    return _with_start(world, rng)


def _rooms(rng):
    """Returns a grid of rooms of different sizes, joined by door ways along a random tree and a few extra openings."""
    cols, rows = ((3, 3), (3, 2), (2, 3))[rng.choice(3, p=(0.6, 0.2, 0.2))]
    xs = np.concatenate([[0], np.cumsum(rng.integers(10, 16, cols) * 32 + WALL_THICKNESS)])
    ys = np.concatenate([[0], np.cumsum(rng.integers(10, 16, rows) * 32 + WALL_THICKNESS)])
    rects = []
    for r in range(rows):
        for c in range(cols):
            inset = rng.integers(0, 3, 4) * 16
            x0, y0 = xs[c] + inset[0], ys[r] + inset[1]
            x1, y1 = xs[c + 1] - WALL_THICKNESS - inset[2], ys[r + 1] - WALL_THICKNESS - inset[3]
            rects.append(tuple(map(int, (x0, y0, x1, y1))))
    pairs = [(i, i + 1) for i in range(cols * rows) if i % cols < cols - 1]
    pairs += [(i, i + cols) for i in range(cols * (rows - 1))]
    group, doors = list(range(cols * rows)), []
    for k in rng.permutation(len(pairs)):
        a, b = pairs[k]
        if group[a] == group[b] and rng.random() > 0.35:
            continue
        group = [group[a] if g == group[b] else g for g in group]
        doors.append(_door(rects[a], rects[b], b == a + 1, rng))
    return rects + doors, range(len(rects), len(rects) + len(doors)), []


def _door(a, b, beside: bool, rng):
    """Returns the door way between two neighbours; `beside`: b lies to the east of a, else to the north."""
    lo, hi = (max(a[1], b[1]), min(a[3], b[3])) if beside else (max(a[0], b[0]), min(a[2], b[2]))
    margin = FRAME_WIDTH + 32
    at = int(rng.integers((lo + margin) // 16 + 1, (hi - margin - DOOR_WIDTH) // 16 + 1)) * 16
    return (a[2], at, b[0], at + DOOR_WIDTH) if beside else (at, a[3], at + DOOR_WIDTH, b[1])


def _arch(side: str, rect, rng):
    """Returns (rect cut short on a side, the arch that fills the cut, DOOR_WIDTH wide)."""
    x0, y0, x1, y1 = rect
    t = WALL_THICKNESS
    mid = (y0 + y1 - DOOR_WIDTH) // 2 if side in "EW" else (x0 + x1 - DOOR_WIDTH) // 2
    return {
        "W": ((x0 + t, y0, x1, y1), (x0, mid, x0 + t, mid + DOOR_WIDTH)),
        "E": ((x0, y0, x1 - t, y1), (x1 - t, mid, x1, mid + DOOR_WIDTH)),
        "S": ((x0, y0 + t, x1, y1), (mid, y0, mid + DOOR_WIDTH, y0 + t)),
        "N": ((x0, y0, x1, y1 - t), (mid, y1 - t, mid + DOOR_WIDTH, y1)),
    }[side]


def _ring(rng):
    """Returns a corridor around a block: four corners and four straights, some entered through an arch."""
    w = int(rng.integers(16, 21)) * 16
    a, b = (int(v) * 32 for v in rng.integers(12, 19, 2))
    corners = [(0, 0, w, w), (w + a, 0, 2 * w + a, w), (0, w + b, w, 2 * w + b), (w + a, w + b, 2 * w + a, 2 * w + b)]
    straights = [(w, 0, w + a, w), (w, w + b, w + a, 2 * w + b), (0, w, w, w + b), (w + a, w, 2 * w + a, w + b)]
    rects, arches = list(corners), []
    for k, rect in enumerate(straights):
        for side in "WE" if k < 2 else "SN":
            if rng.random() < 0.5:
                rect, arch = _arch(side, rect, rng)
                arches.append(arch)
        rects.append(rect)
    return rects + arches, range(len(rects), len(rects) + len(arches)), []


def _plus(rng):
    """Returns a square with four arms of different lengths and widths, some entered through an arch."""
    s = int(rng.integers(12, 17)) * 32
    rects, arches = [(0, 0, s, s)], []
    for side in "WESN":
        length, width = int(rng.integers(9, 17)) * 32, int(rng.integers(8, 1 + s // 32)) * 32
        lo = int(rng.integers(0, (s - width) // 32 + 1)) * 32
        arm = {
            "W": (-length, lo, 0, lo + width), "E": (s, lo, s + length, lo + width),
            "S": (lo, -length, lo + width, 0), "N": (lo, s, lo + width, s + length),
        }[side]  # fmt: skip
        if rng.random() < 0.6:
            arm, arch = _arch({"W": "E", "E": "W", "S": "N", "N": "S"}[side], arm, rng)
            arches.append(arch)
        rects.append(arm)
    return rects + arches, range(len(rects), len(rects) + len(arches)), []


def _hall(rng):
    """Returns one big hall with three to six free-standing blocks."""
    width, depth = (int(v) * 32 for v in rng.integers(19, 28, 2))
    blocks: list[tuple[int, int, int, int]] = []
    wanted, gap = int(rng.integers(3, 7)), 144
    for _ in range(200):
        if len(blocks) == wanted:
            break
        w, h = (int(v) * 32 for v in rng.integers(2, 5, 2))
        x, y = (int(rng.integers(gap // 16, (room - gap) // 16)) * 16 for room in (width - w, depth - h))
        if all(x > b[2] + gap or x + w + gap < b[0] or y > b[3] + gap or y + h + gap < b[1] for b in blocks):
            blocks.append((x, y, x + w, y + h))
    return [(0, 0, width, depth)], [], blocks


PLANS = {"rooms": _rooms, "ring": _ring, "plus": _plus, "hall": _hall}


def _side(rect, side: int):
    """Returns (p, q) of a side, clockwise, so that the inside is on the right; sides are W, N, E, S."""
    x0, y0, x1, y1 = rect
    return (((x0, y0), (x0, y1)), ((x0, y1), (x1, y1)), ((x1, y1), (x1, y0)), ((x1, y0), (x0, y0)))[side]


def _walls(rects, doors, blocks, rng):
    """Returns (walls, textures, offsets, owners, portals); up to 8 pictures of one room have different colours."""
    rows, portals, doors = [], [], set(doors)
    for i, rect in enumerate(rects):
        pictures = _pictures(rng)
        for side in range(4):
            p, q = _side(rect, side)
            length, opened = abs(q[0] - p[0]) + abs(q[1] - p[1]), _opened(rects, i, side)
            portals += [(i, j, *_along(p, q, lo), *_along(p, q, hi)) for lo, hi, j in opened if i < j]
            for lo, hi, texture in _pieces(length, opened, i in doors, doors, pictures):
                rows.append((*_along(p, q, lo), *_along(p, q, hi), texture, lo % TEXTURE_WIDTH, i))
    for block in blocks:
        pictures = _pictures(rng)
        for side in range(4):
            q, p = _side(block, side)
            rows.append((*p, *q, next(pictures), 0, 0))
    table = np.array(rows, dtype=np.float64)
    return table[:, :4], table[:, 4].astype(int), table[:, 5], table[:, 6].astype(int), tuple(portals)


def _along(p, q, distance):
    """Returns the point at a distance from p towards q, on an axis-parallel line."""
    return tuple(int(a + np.sign(b - a) * distance) for a, b in zip(p, q))


def _opened(rects, index, side):
    """Returns the parts of a side shared with other rectangles, (from, to, neighbour), measured along the side."""
    p, q = _side(rects[index], side)
    axis = 1 - side % 2
    sign, length = np.sign(q[axis] - p[axis]), abs(q[axis] - p[axis])
    opened = []
    for j, other in enumerate(rects):
        a, b = _side(other, (side + 2) % 4)
        lo, hi = sorted(((a[axis] - p[axis]) * sign, (b[axis] - p[axis]) * sign))
        lo, hi = max(lo, 0), min(hi, length)
        if index != j and a[1 - axis] == p[1 - axis] and lo < hi:
            opened.append((lo, hi, j))
    return opened


def _pictures(rng):
    """Yields picture indices without end: all colours in random order, then again, each with a random pattern."""
    while True:
        for colour in rng.permutation(len(COLOURS)):
            yield int(colour) * len(PATTERNS) + int(rng.integers(len(PATTERNS)))


def _pieces(length, opened, is_door, doors, pictures):
    """Yields (from, to, texture) of the solid parts of a side; FRAME_WIDTH beside a door way is door frame."""
    picture = next(pictures)
    edges = [(0, 0, -1), *sorted(opened), (length, length, -1)]
    for (_, lo, before), (hi, _, after) in pairwise(edges):
        if is_door:
            picture = FRAME_TEXTURE
        elif before in doors and hi > lo:
            yield lo, lo + FRAME_WIDTH, FRAME_TEXTURE
            lo += FRAME_WIDTH
        if not is_door and after in doors and hi > lo:
            yield hi - FRAME_WIDTH, hi, FRAME_TEXTURE
            hi -= FRAME_WIDTH
        if hi <= lo:
            continue
        parts = -(-(hi - lo) // LONGEST_PIECE)
        cuts = [lo + (hi - lo) * k // parts // 16 * 16 for k in range(1, parts)]
        for a, b in zip([lo, *cuts], [*cuts, hi]):
            yield a, b, picture
            if parts > 1:
                picture = next(pictures)


def inside(world: World, xy: np.ndarray) -> np.ndarray:
    """Returns bool [...]: is a point [..., 2] in a rectangle and in no block."""

    def within(rects):
        hits = [(xy[..., 0] > r[0]) & (xy[..., 0] < r[2]) & (xy[..., 1] > r[1]) & (xy[..., 1] < r[3]) for r in rects]
        return np.any(hits, axis=0) if hits else np.zeros(xy.shape[:-1], dtype=bool)

    return within(world.rects) & ~within(world.blocks)


def clearance(world: World, xy: np.ndarray) -> np.ndarray:
    """Returns float [...]: distance of a point [..., 2] to the nearest wall."""
    a, d = world.walls[:, :2], world.walls[:, 2:] - world.walls[:, :2]
    r = xy[..., None, :] - a
    t = np.clip((r * d).sum(-1) / (d * d).sum(-1), 0, 1)
    return np.linalg.norm(r - t[..., None] * d, axis=-1).min(-1)


def _with_start(world: World, rng) -> World:
    """Returns the world with a start pose well away from walls, looking at open space."""
    rects = np.array([r for i, r in enumerate(world.rects) if i not in world.doors])
    best, score = None, -np.inf
    for _ in range(24):
        x0, y0, x1, y1 = rects[rng.integers(len(rects))]
        xy = np.round(rng.uniform((x0, y0), (x1, y1)))
        degrees = int(rng.integers(360))
        if not inside(world, xy):
            continue
        ahead = cast(world.walls, xy, float(np.radians(degrees)))[1]
        value = min(float(clearance(world, xy)), 110.0) + min(ahead, 260) / 4
        if value > score:
            best, score = (int(xy[0]), int(xy[1]), degrees), value
    assert best is not None
    return replace(world, start=best)


# Looking along a ray


def cast(walls: np.ndarray, xy, angle: float) -> tuple[int, float]:
    """Returns (wall index, distance) of the first wall hit from a point; (-1, inf) if there is none."""
    d = np.array([np.cos(angle), np.sin(angle)])
    a, e = walls[:, :2] - np.asarray(xy), walls[:, 2:4] - walls[:, :2]
    det = d[0] * e[:, 1] - d[1] * e[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (a[:, 0] * e[:, 1] - a[:, 1] * e[:, 0]) / det
        s = (a[:, 0] * d[1] - a[:, 1] * d[0]) / det
    t = np.where((np.abs(det) > 1e-9) & (t > 0) & (s >= -1e-9) & (s <= 1 + 1e-9), t, np.inf)
    k = int(t.argmin())
    return (k, float(t[k])) if np.isfinite(t[k]) else (-1, float("inf"))


def describe(world: World) -> dict:
    """Returns the world as JSON-able numbers: layout, tones, `walls` rows of x1 y1 x2 y2 texture (map units).

    Texture is colour * len(PATTERNS) + pattern for the PALETTE_SIZE wall pictures, FRAME_TEXTURE for door frames.
    """
    rows = [[*map(float, w), int(t)] for w, t in zip(world.walls, world.textures)]
    return {"layout": world.layout, "floor": world.floor, "ceiling": world.ceiling, "walls": rows}


def centre_texture(walls: dict, pose) -> tuple[int, float]:
    """Returns (texture index, distance in map units / 64) of the wall in the centre of view; (-1, inf) outside the map.

    walls: `Episode.walls`. pose: x, y in map units / 64 and heading in radians, a row of `Episode.poses`.
    """
    table = np.asarray(walls["walls"])
    k, distance = cast(table, np.asarray(pose[:2], dtype=np.float64) * UNITS_PER_POSE, float(pose[2]))
    return (int(table[k, 4]) if k >= 0 else -1), distance / UNITS_PER_POSE


# The WAD


def texture_tones(index: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the two colours (r, g, b) of a wall picture, main one first; the door frame has one."""
    if index == FRAME_TEXTURE:
        return FRAME_COLOUR, FRAME_COLOUR
    colour = np.array(list(COLOURS.values())[index // len(PATTERNS)])
    pattern = PATTERNS[index % len(PATTERNS)]
    dark, light = colour * 0.35, colour * 0.4 + 255 * 0.6
    second = {"panel": dark, "stripes": light, "bars": dark, "discs": light}[pattern]
    return tuple(int(v) for v in colour), tuple(int(v) for v in second)


def texture_mask(index: int) -> np.ndarray:
    """Returns bool [ROOM_HEIGHT, TEXTURE_WIDTH], True where a wall picture has its main colour."""
    y, x = np.mgrid[:ROOM_HEIGHT, :TEXTURE_WIDTH] + 0.5
    w, h = TEXTURE_WIDTH, ROOM_HEIGHT
    if index == FRAME_TEXTURE:
        return np.ones_like(x, dtype=bool)
    return {
        "panel": (np.abs(x - w / 2) < w / 2 - 12) & (np.abs(y - h / 2) < h / 2 - 22),
        "stripes": (x % w) < w / 2,
        "bars": (y % (h / 2)) < h / 4,
        "discs": np.hypot(x - w / 2, (y % (h / 2)) - h / 4) > 36,
    }[PATTERNS[index % len(PATTERNS)]]


def _game_palette() -> list[tuple[int, ...]]:
    """Returns 256 colours for the engine: black, every tone used here, then a grey ramp."""
    tones: list[tuple[int, ...]] = [(0, 0, 0)]
    for tone in [t for k in range(PALETTE_SIZE + 1) for t in texture_tones(k)] + [*FLOORS, *CEILINGS]:
        if tone not in tones:
            tones.append(tone)
    grey = [(v, v, v) for v in np.linspace(4, 255, 256 - len(tones)).astype(int).tolist()]
    return tones + grey


def _texture(index: int, palette) -> bytes:
    """Returns the PNG of a wall picture.

    256 rows, of which ROOM_HEIGHT are seen: the engine reads a row beyond the edge of a picture now and then, and only
    if the height is a power of two that row is one of the picture (else it is foreign memory, which no replay repeats).
    """
    main, second = (palette.index(t) for t in texture_tones(index))
    rows = np.where(texture_mask(index), main, second)
    spare = (256 - ROOM_HEIGHT) // 2
    return _png(np.concatenate([rows, rows[-1:].repeat(spare, 0), rows[:1].repeat(spare, 0)]), palette)


def _png(indices: np.ndarray, palette) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([v for tone in palette for v in tone])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _udmf(world: World) -> str:
    """Returns the TEXTMAP of a world (UDMF, namespace zdoom)."""
    vertices: dict[tuple[int, int], int] = {}

    def vertex(x, y):
        return vertices.setdefault((int(x), int(y)), len(vertices))

    lines: list[str] = []
    sides: list[str] = []
    # Sector_SetFriction (219) for all sectors, which need the friction bit (2048): the negative amount is clamped to a
    # friction of 0, so that no speed outlives a tic. Source: ZDoom P_SetSectorFriction, P_GetMoveFactor.
    special = " special = 219; arg0 = 1; arg1 = -900;"
    for (x1, y1, x2, y2), texture, offset, owner in zip(world.walls, world.textures, world.offsets, world.owners):
        ends = f"v1 = {vertex(x1, y1)}; v2 = {vertex(x2, y2)};"
        lines.append(f"linedef {{ {ends} sidefront = {len(sides)}; blocking = true;{special} }}")
        sides.append(f'sidedef {{ sector = {owner}; texturemiddle = "W{texture:02d}"; offsetx = {int(offset)}; }}')
        special = ""
    for i, j, x1, y1, x2, y2 in world.portals:
        lines.append(
            f"linedef {{ v1 = {vertex(x1, y1)}; v2 = {vertex(x2, y2)}; sidefront = {len(sides)}; "
            f"sideback = {len(sides) + 1}; twosided = true; }}"
        )
        sides += [f'sidedef {{ sector = {k}; texturetop = "W{FRAME_TEXTURE:02d}"; }}' for k in (i, j)]
    sectors = [
        f"sector {{ heightfloor = 0; heightceiling = {DOOR_HEIGHT if i in world.doors else ROOM_HEIGHT}; "
        f"id = 1; special = 2048; "
        f'texturefloor = "F{world.floor}"; textureceiling = "C{world.ceiling}"; lightlevel = 255; }}'
        for i in range(len(world.rects))
    ]
    x, y, degrees = world.start
    skills = " ".join(f"skill{k} = true;" for k in range(1, 6))
    thing = f"thing {{ x = {x}; y = {y}; angle = {degrees}; type = 1; single = true; {skills} }}"
    points = [f"vertex {{ x = {a}; y = {b}; }}" for a, b in vertices]
    return "\n".join(['namespace = "zdoom";', thing, *points, *lines, *sides, *sectors])


DECORATE = f"""
actor Walker : DoomPlayer
{{
  Radius 32
  Player.ViewHeight {VIEW_HEIGHT}
  Player.ForwardMove {FORWARD_MOVE}, {FORWARD_MOVE}
  Player.StartItem "Fist"
}}
"""
MAPINFO = 'gameinfo { playerclasses = "Walker" }\n'


def make_wad(worlds) -> bytes:
    """Returns a PWAD with one map a world (MAP01, MAP02, ...; at most 99), the wall pictures and the game palette."""
    assert 0 < len(worlds) < 100
    palette = _game_palette()
    lumps = [("PLAYPAL", bytes(v for tone in palette for v in tone) * 14)]
    maps = "".join(f'map MAP{k + 1:02d} "{k}" {{ evenlighting }}\n' for k in range(len(worlds)))
    lumps += [("DECORATE", DECORATE.encode()), ("MAPINFO", (MAPINFO + maps).encode())]
    for k, world in enumerate(worlds):
        lumps += [(f"MAP{k + 1:02d}", b""), ("TEXTMAP", _udmf(world).encode()), ("ENDMAP", b"")]
    lumps.append(("TX_START", b""))
    for index in range(PALETTE_SIZE + 1):
        lumps.append((f"W{index:02d}", _texture(index, palette)))
    for letter, tones in (("F", FLOORS), ("C", CEILINGS)):
        lumps += [(f"{letter}{k}", _png(np.full((64, 64), palette.index(t)), palette)) for k, t in enumerate(tones)]
    lumps.append(("TX_END", b""))
    return _pwad(lumps)


def _pwad(lumps) -> bytes:
    """Returns the bytes of a PWAD with these (name, data) lumps in order."""
    body, directory, at = b"".join(data for _, data in lumps), [], 12
    for name, data in lumps:
        directory.append(struct.pack("<ii8s", at, len(data), name.encode()))
        at += len(data)
    return struct.pack("<4sii", b"PWAD", len(lumps), at) + body + b"".join(directory)
