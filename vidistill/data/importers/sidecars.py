"""What lies beside a video and speaks of its frames: named actions, camera poses, intrinsics."""

import csv
import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vidistill.data.importers.listing import ACTIONS, INTRINSICS, POSES, Item

TIME = "time"  # a column of actions: seconds from which a row holds, where rows are not frames
VARIES = 0.01  # share by which intrinsics may vary over a clip
FORBIDDEN = set(" :,+")  # of names: scripts of actions are written with them


class SidecarError(ValueError):
    """What lies beside a video cannot be used with it; the message says why and what to do."""


@dataclass(frozen=True)
class Sidecars:
    """Per frame of a video file: actions [F, A] under `names`, poses [F, 12]; what is not there is None."""

    names: tuple[str, ...] = ()
    actions: np.ndarray | None = None
    times: np.ndarray | None = None  # seconds from which each row of actions holds; None: a row a frame
    poses: np.ndarray | None = None
    focal: float = 0.0  # horizontal focal length in pixels of the file; 0: not known

    def actions_at(self, frames: Sequence[int], times: Sequence[float]) -> np.ndarray:
        """Actions [T, A] that led to each of the frames picked from the file: the mean over what lies between two.

        The first row is zero: nothing was done before a clip.
        """
        assert self.actions is not None
        out = np.zeros((len(frames), self.actions.shape[1]), np.float32)
        for k in range(1, len(frames)):
            if self.times is None:
                rows = self.actions[frames[k - 1] + 1 : frames[k] + 1]
                out[k] = rows.mean(0) if len(rows) != 1 else rows[0]
            else:
                out[k] = held(self.actions, self.times, times[k - 1], times[k])
        return out

    def lowest(self) -> dict[str, float]:
        """The lowest value of every action."""
        if self.actions is None:
            return {}
        return {name: float(self.actions[:, k].min()) for k, name in enumerate(self.names)}

    def poses_at(self, frames: Sequence[int]) -> np.ndarray:
        assert self.poses is not None
        return self.poses[np.asarray(frames)]


def held(actions: np.ndarray, times: np.ndarray, start: float, stop: float) -> np.ndarray:
    """The mean of rows that hold from `times` on, over the seconds from `start` to `stop`."""
    inside = times[(times > start) & (times < stop)]
    edges = np.concatenate(([start], inside, [stop]))
    rows = np.searchsorted(times, edges[:-1], side="right") - 1
    picked = np.where(rows[:, None] >= 0, actions[np.maximum(rows, 0)], 0.0)
    return (picked * np.diff(edges)[:, None]).sum(0) / max(stop - start, 1e-9)


def read_sidecars(item: Item, frames: int, signed: Set[str] = frozenset()) -> Sidecars:
    """What lies beside a video of `frames` frames; SidecarError where it does not belong to it.

    `signed`: actions that fall below 0 in some video of the data, which become two in all of them.
    """
    found = Sidecars()
    if path := item.beside(ACTIONS):
        names, rows, times = read_actions(path)
        if times is None and len(rows) != frames:
            raise SidecarError(
                f"{path.name} has {len(rows)} rows for {frames} frames; write one a frame, or a column {TIME!r} with "
                "the second from which each row holds"
            )
        names, rows = signed_pairs(names, rows, signed)
        found = Sidecars(names, rows, times)
    if path := item.beside([POSES]):
        found = replace(found, poses=read_poses(path, frames))
    if path := item.beside([INTRINSICS]):
        found = replace(found, focal=read_focal(path, frames))
    return found


def read_actions(path: Path) -> tuple[tuple[str, ...], np.ndarray, np.ndarray | None]:
    """Names, rows float32 [R, A] and their times, from a CSV with a header or a JSON object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows: list[Mapping[str, Any]] = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else list(csv.DictReader(text.splitlines()))
        )
    except (ValueError, csv.Error) as error:
        raise SidecarError(
            f"{path.name} cannot be read ({error}); write a CSV with a header, or a JSON object a line"
        ) from error
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise SidecarError(f"{path.name} has no rows of named actions; write a header and a row a frame")
    names = tuple(dict.fromkeys(str(name) for row in rows for name in row if name is not None))
    if bad := [name for name in names if not name or FORBIDDEN & set(name)]:
        raise SidecarError(
            f"{path.name}: a column is called {bad[0]!r}; names of actions have no space, ':', ',' or '+'"
        )
    try:
        values = np.array([[float(row.get(name) or 0) for name in names] for row in rows], np.float64)
    except (TypeError, ValueError) as error:
        raise SidecarError(
            f"{path.name} holds what is no number ({error}); actions are numbers from -1 to 1"
        ) from error
    if not np.isfinite(values).all():
        raise SidecarError(f"{path.name} holds numbers that are not finite; actions are numbers from -1 to 1")
    times = values[:, names.index(TIME)] if TIME in names else None
    if times is not None and (np.diff(times) < 0).any():
        raise SidecarError(f"{path.name}: the column {TIME!r} must rise; sort its rows")
    kept = [k for k, name in enumerate(names) if name != TIME]
    if (far := np.abs(values[:, kept]).max(initial=0)) > 1:
        raise SidecarError(f"{path.name}: an action reaches {far:g}; scale actions to -1 to 1, where 1 is a full one")
    if not kept:
        raise SidecarError(f"{path.name} names no actions beside {TIME!r}; give each a column")
    return tuple(names[k] for k in kept), values[:, kept].astype(np.float32), times


def signed_pairs(names: Sequence[str], rows: np.ndarray, signed: Set[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Actions from 0 to 1: each of the `signed` ones becomes two, NAME_minus and NAME_plus."""
    out: dict[str, np.ndarray] = {}
    for k, name in enumerate(names):
        if name in signed:
            out[f"{name}_minus"], out[f"{name}_plus"] = np.maximum(-rows[:, k], 0), np.maximum(rows[:, k], 0)
        else:
            out[name] = rows[:, k]
    return tuple(out), np.stack(list(out.values()), 1)


def loaded(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise SidecarError(f"{path.name} is no plain NumPy array ({error}); save it with numpy.save") from error


def read_poses(path: Path, frames: int) -> np.ndarray:
    """Poses float32 [F, 12] as clips hold them (`conditioning.camera.pose_of`), from camera-to-world [F, 4, 4].

    The file's axes are those of OpenCV: a camera's x points right, its y down, it looks along z. Ours look along the
    first axis, left is the second, up the third; the numbers are moved and negated, never rounded.
    """
    poses = loaded(path)
    if poses.shape[1:] != (4, 4) or not np.issubdtype(poses.dtype, np.floating):
        raise SidecarError(
            f"{path.name} is {poses.dtype} {list(poses.shape)}; poses are camera-to-world floats [F, 4, 4]"
        )
    if len(poses) != frames:
        raise SidecarError(f"{path.name} has {len(poses)} poses for {frames} frames; write one a frame")
    turn = poses[:, :3, :3].astype(np.float64)
    if not np.isfinite(poses).all() or np.abs(turn @ turn.transpose(0, 2, 1) - np.eye(3)).max() > 1e-2:
        raise SidecarError(
            f"{path.name} holds matrices that are no rotations; poses are camera-to-world, without scale"
        )
    position = axes(poses[:, :3, 3].T).T
    rotation = axes(np.stack([axes(poses[:, :3, column].T).T for column in range(3)]))
    return np.concatenate((position, rotation.transpose(1, 0, 2).reshape(len(poses), 9)), 1).astype(np.float32)


def axes(x: np.ndarray) -> np.ndarray:
    """(right, down, ahead) along the first axis as (ahead, left, up)."""
    return np.stack((x[2], -x[0], -x[1]))


def opencv_poses(rows: np.ndarray) -> np.ndarray:
    """Camera-to-world [F, 4, 4] in OpenCV's axes from poses [F, 12] of clips: the inverse of what `read_poses` does."""
    back = [(1, -1), (2, -1), (0, 1)]  # right is minus left, down minus up
    out = np.tile(np.eye(4, dtype=rows.dtype), (len(rows), 1, 1))
    ours = rows[:, 3:].reshape(-1, 3, 3)  # [F, axis of the camera, axis of the world]
    for i, (world, sign) in enumerate(back):
        out[:, i, 3] = sign * rows[:, world]
        for j, (camera, other) in enumerate(back):
            out[:, i, j] = sign * other * ours[:, camera, world]
    return out


def read_focal(path: Path, frames: int) -> float:
    """The horizontal focal length in pixels; SidecarError where it varies over the clip.

    Intrinsics are matrices [3, 3], or numbers fx, fy, cx, cy: one for all frames, or one a frame.
    """
    given = loaded(path)
    if given.shape[-2:] == (3, 3):
        focal = given[..., 0, 0]
    elif given.shape[-1:] == (4,):
        focal = given[..., 0]
    else:
        raise SidecarError(
            f"{path.name} is {list(given.shape)}; intrinsics are [3, 3] or fx, fy, cx, cy, one or one a frame"
        )
    focal = np.atleast_1d(focal).astype(np.float64)
    if len(focal) not in (1, frames):
        raise SidecarError(f"{path.name} has {len(focal)} intrinsics for {frames} frames; write one, or one a frame")
    if not np.isfinite(focal).all() or focal.min() <= 0 or focal.max() > (1 + VARIES) * focal.min():
        raise SidecarError(
            f"{path.name}: the focal length varies from {focal.min():g} to {focal.max():g}; cut where it zooms"
        )
    return float(focal[0])


def fov_of(focal: float, width: int, shown: float) -> float:
    """Degrees across a picture of which the share `shown` of `width` pixels is kept."""
    return math.degrees(2 * math.atan(width * shown / 2 / focal))
