"""Camera motion: from where a camera was to what it did, and back; one integrator for training and streaming.

Axes: a camera looks along its first axis, its second points left, its third up. A rotation takes world to camera.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Where each move stands among the signed ones (forward, left, up, yaw, pitch, roll), and its sign.
MOVES: Mapping[str, tuple[int, int]] = {
    "forward": (0, 1),
    "backward": (0, -1),
    "left": (1, 1),
    "right": (1, -1),
    "up": (2, 1),
    "down": (2, -1),
    "turn_left": (3, 1),
    "turn_right": (3, -1),
    "look_up": (4, 1),
    "look_down": (4, -1),
    "roll_right": (5, 1),
    "roll_left": (5, -1),
}
STATIC = "static"
RELIC = (*MOVES, STATIC)  # the 13 numbers of RELIC 2512.04040; the order is ours
PLANAR = ("forward", "backward", "left", "right", "turn_left", "turn_right", STATIC)


class Pose(NamedTuple):
    """Positions [..., T, 3] in the world, and rotations [..., T, 3, 3] from world to camera."""

    position: Tensor
    rotation: Tensor


@dataclass(frozen=True)
class CameraConfig:
    """How a world's camera moves, and what a network is told of it.

    `actions`: names of the numbers of a relative action, of `RELIC`. `step`: how far a full action moves in one px
    frame, in units of positions; `turn`: radians it turns. `wavelengths`: positions are also told as sines and cosines
    of these lengths, so that near places can be told apart and far ones do not run away. `still`: a move below this
    share of a full action counts as standing still. `early`: the share of a frame's turn that comes before its walk.
    `sites`: at which sites a network is told: relative moves at `hidden`, poses at `qk`, the heading alone at `view`.
    """

    step: float
    turn: float
    actions: tuple[str, ...] = PLANAR
    wavelengths: tuple[float, ...] = (4.0, 8.0, 16.0, 32.0)
    still: float = 0.05
    early: float = 0.0
    sites: tuple[str, ...] = ("hidden", "qk")

    def __post_init__(self) -> None:
        if not self.sites or set(self.sites) - {"hidden", "qk", "view"}:
            raise ValueError(f"camera.sites lists some of hidden, qk and view, got {list(self.sites)}")
        if unknown := [name for name in self.actions if name not in RELIC]:
            raise ValueError(f"camera.actions has no {unknown[0]!r}; moves are {', '.join(RELIC)}")
        if self.step <= 0 or self.turn <= 0 or not 0 <= self.still < 1 or any(w <= 0 for w in self.wavelengths):
            raise ValueError(f"camera needs step, turn and wavelengths above 0 and still in [0, 1), got {self}")

    @property
    def planar(self) -> bool:
        """Whether the camera stays in its plane: two coordinates and a heading say all."""
        return not set(self.actions) - set(PLANAR)

    @property
    def dims(self) -> Mapping[str, int]:
        """How many numbers a network is told at each site."""
        every = {"hidden": self.action_dim, "qk": self.pose_dim, "view": 1}
        return {site: every[site] for site in self.sites}

    @property
    def moves(self) -> tuple[str, ...]:
        """What can be asked of it: its actions but `static`, which is what is left."""
        return tuple(name for name in self.actions if name != STATIC)

    @property
    def action_dim(self) -> int:
        return len(self.actions)

    @property
    def pose_dim(self) -> int:
        axes = 2 if self.planar else 3
        return axes * (1 + 2 * len(self.wavelengths)) + (4 if self.planar else 6) + 1

    @property
    def units(self) -> Tensor:
        """A full action in each of the six signed moves (float64)."""
        return torch.tensor([self.step] * 3 + [self.turn] * 3, dtype=torch.float64)

    def wander(self, clips: int, frames: int) -> Tensor:
        """Random poses (float32) as clips of this camera hold them: [clips, frames, 3] in a plane, else 12 numbers."""
        pose = integrate(torch.randn(clips, frames, 6) * self.units)
        return (walk_of(pose) if self.planar else rows_of(pose)).float()


def pose_of(rows: Tensor) -> Pose:
    """The poses (float64) of recorded clips, in either layout that clips may hold.

    [..., T, 3]: a walker's x, y and heading, as in `planar`. [..., T, 12]: positions, then the nine numbers of the
    rotations from world to camera, row by row. ValueError for another size.
    """
    size = rows.shape[-1]
    if size == 3:
        return planar(rows)
    if size == 12:
        rows = rows.double()
        return Pose(rows[..., :3], rows[..., 3:].unflatten(-1, (3, 3)))
    raise ValueError(
        f"poses of clips are 3 numbers a frame (x, y, heading) or 12 (position, then the rotation from world to camera "
        f"row by row), got {size}; write them in one of these layouts"
    )


def rows_of(pose: Pose) -> Tensor:
    """Poses as clips hold them [..., T, 12]: the inverse of `pose_of`."""
    return torch.cat((pose.position, pose.rotation.flatten(-2)), -1)


def planar(poses: Tensor) -> Pose:
    """Poses of a walker from [..., T, 3]: x, y and the heading in radians, counter-clockwise."""
    x, y, heading = poses.double().unbind(-1)
    return Pose(torch.stack((x, y, torch.zeros_like(x)), -1), euler(torch.stack((heading, 0 * x, 0 * x), -1)))


def euler(angles: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of `angles` [..., 3]: yaw to the left, then pitch up, then roll to the right."""
    (cy, cp, cr), (sy, sp, sr) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, -1).unflatten(-1, (3, 3))

    yaw = matrix(cy, sy, zero, -sy, cy, zero, zero, zero, one)
    pitch = matrix(cp, zero, sp, zero, one, zero, -sp, zero, cp)
    roll = matrix(one, zero, zero, zero, cr, sr, zero, -sr, cr)
    return roll @ pitch @ yaw


def angles_of(rotation: Tensor) -> Tensor:
    """Yaw, pitch and roll [..., 3] of rotations [..., 3, 3]; pitch within a quarter turn."""
    yaw = torch.atan2(rotation[..., 0, 1], rotation[..., 0, 0])
    pitch = rotation[..., 0, 2].clamp(-1, 1).asin()
    roll = torch.atan2(rotation[..., 1, 2], rotation[..., 2, 2])
    return torch.stack((yaw, pitch, roll), -1)


def moves(pose: Pose) -> Tensor:
    """Signed moves [..., T, 6] (float64) that led to each frame from the one before; zero for the first.

    The first three are the displacement in the camera before it turned, R_t (P_t+1 - P_t), the others the angles of
    R_t+1 R_t^T. Source: RELIC 2512.04040, section on actions.
    """
    position, rotation = pose.position.double(), pose.rotation.double()
    before = rotation[..., :-1, :, :]
    gone = (before @ position.diff(dim=-2)[..., None])[..., 0]
    turned = angles_of(rotation[..., 1:, :, :] @ before.transpose(-1, -2))
    step = torch.cat((gone, turned), -1)
    return torch.cat((torch.zeros_like(step[..., :1, :]), step), -2)


def origin(*batch: int) -> Pose:
    """The pose [*batch, 1] that every clip starts from."""
    eye = torch.eye(3, dtype=torch.float64).expand(*batch, 1, 3, 3)
    return Pose(torch.zeros(*batch, 1, 3, dtype=torch.float64), eye)


def integrate(moved: Tensor, start: Pose | None = None) -> Pose:
    """Poses [..., T] after signed moves [..., T, 6], from the pose `start` [..., 1] (default: the origin) on.

    P_t+1 = P_t + R_t^T dP_t and R_t+1 = dR_t R_t. The only integrator: training, streaming and the memory's map use it.
    """
    moved = moved.double()
    position, rotation = start or origin(*moved.shape[:-2])
    position, rotation = position[..., 0, :], rotation[..., 0, :, :]
    turned = euler(moved[..., 3:])
    positions, rotations = [], []
    for t in range(moved.shape[-2]):
        gone = rotation.transpose(-1, -2) @ moved[..., t, :3, None]
        position, rotation = position + gone[..., 0], turned[..., t, :, :] @ rotation
        positions.append(position)
        rotations.append(rotation)
    return Pose(torch.stack(positions, -2), torch.stack(rotations, -3))


def wanted(actions: Tensor, names: Sequence[str], cfg: CameraConfig, gain: float = 1.0) -> Tensor:
    """Signed moves [..., T, 6] that actions [..., T, A] in [0, 1], named `names`, ask for in one px frame each.

    `gain` scales how far it goes, not how far it turns. Names that are no moves count nothing.
    """
    out = _named(actions, names) * cfg.units.to(actions.device)
    angle = cfg.early * out[..., 3]
    forward, left = gain * out[..., 0], gain * out[..., 1]
    out[..., 0] = forward * angle.cos() - left * angle.sin()
    out[..., 1] = forward * angle.sin() + left * angle.cos()
    out[..., 2] *= gain
    return out


def _named(actions: Tensor, names: Sequence[str]) -> Tensor:
    """Signed sums [..., 6] (float64) of numbers [..., A] that stand for the moves `names`."""
    out = torch.zeros(*actions.shape[:-1], 6, dtype=torch.float64, device=actions.device)
    for i, name in enumerate(names):
        if name in MOVES:
            axis, sign = MOVES[name]
            out[..., axis] += sign * actions[..., i].double()
    return out


def relative(moved: Tensor, cfg: CameraConfig, px_frames: int) -> Tensor:
    """Relative actions [..., T, A] (float32) of signed moves over `px_frames` px frames each, never negative.

    1 is a full action held all the time; `static` is 1 where nothing moved.
    """
    share = moved.double() / (cfg.units.to(moved.device) * px_frames)
    columns = []
    for name in cfg.actions:
        if name == STATIC:
            columns.append((share.abs().amax(-1) < cfg.still).double())
        else:
            axis, sign = MOVES[name]
            columns.append((sign * share[..., axis]).clamp_min(0))
    return torch.stack(columns, -1).float()


def signed(actions: Tensor, cfg: CameraConfig, px_frames: int) -> Tensor:
    """The signed moves [..., T, 6] of relative actions [..., T, A]: the inverse of `relative`."""
    return _named(actions, cfg.actions) * cfg.units.to(actions.device) * px_frames


def numbers(pose: Pose, cfg: CameraConfig) -> Tensor:
    """What a network is told of absolute poses: [..., T, pose_dim] (float32), the last entry 1 (null poses are zero).

    Position over the longest wavelength, its sines and cosines, and the way the camera looks: its first two axes, or
    in a plane the heading once and doubled.
    """
    axes = 2 if cfg.planar else 3
    place = pose.position[..., :axes]
    waves = [2 * torch.pi * place / w for w in cfg.wavelengths]
    scale = max(cfg.wavelengths, default=1.0)
    if cfg.planar:
        c, s = pose.rotation[..., 0, 0], pose.rotation[..., 0, 1]
        looks = torch.stack((c, s, c * c - s * s, 2 * c * s), -1)
    else:
        looks = pose.rotation[..., :2, :].flatten(-2)
    parts = [place / scale, *(f(w) for w in waves for f in (torch.cos, torch.sin)), looks]
    return torch.cat((*parts, torch.ones_like(place[..., :1])), -1).float()


def place_of(numbers_: Tensor, cfg: CameraConfig) -> list[float]:
    """x, y and heading back from `numbers` [pose_dim]."""
    look = (2 if cfg.planar else 3) * (1 + 2 * len(cfg.wavelengths))
    x, y = (numbers_[:2] * max(cfg.wavelengths, default=1.0)).tolist()
    return [round(x, 3), round(y, 3), round(float(torch.atan2(numbers_[look + 1], numbers_[look])), 3)]


def opposite(names: Sequence[str], action: Sequence[float]) -> tuple[float, ...]:
    """The action that undoes `action`: each number goes to the name of the opposite move."""
    moved = {MOVES[name]: value for name, value in zip(names, action, strict=True) if name in MOVES}
    return tuple(moved.get((MOVES[n][0], -MOVES[n][1]), 0.0) if n in MOVES else 0.0 for n in names)


def move_keys(names: Sequence[str]) -> dict[str, list[str]]:
    """Keys of a camera's moves that the page has none for: beside those that walk and turn, theirs where none does."""
    sides = ("q", "e") if "turn_left" in names or "turn_right" in names else ("ArrowLeft", "ArrowRight")
    heights = ("t", "g") if "forward" in names or "backward" in names else ("ArrowUp", "ArrowDown")
    keys = dict(zip(("left", "right", "up", "down", "look_up", "look_down"), (*sides, *heights, "i", "k"), strict=True))
    return {name: [key] for name, key in keys.items() if name in names}


def latent_rate(moved: Tensor, factor: int, start: Pose | None = None) -> tuple[Tensor, Pose]:
    """Moves [..., F, 6] and poses [..., F] of latents of `factor` px frames from moves [..., factor * F, 6] of frames.

    Motions are composed, not summed: a latent's displacement is seen from where the latent before it ended.
    """
    first = start or origin(*moved.shape[:-2])
    every = integrate(moved, first)
    pose = Pose(every.position[..., factor - 1 :: factor, :], every.rotation[..., factor - 1 :: factor, :, :])
    joined = Pose(torch.cat((first.position, pose.position), -2), torch.cat((first.rotation, pose.rotation), -3))
    return moves(joined)[..., 1:, :], pose


def walk_of(pose: Pose) -> Tensor:
    """x, y and heading [..., T, 3] of poses, seen from above."""
    heading = torch.atan2(pose.rotation[..., 0, 1], pose.rotation[..., 0, 0])
    return torch.cat((pose.position[..., :2], heading[..., None]), -1)
