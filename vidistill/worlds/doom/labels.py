"""What a frame of a recorded walk shows, as classes that a probe learns to read back."""

import numpy as np
import torch
from torch import Tensor

from vidistill.data.clips import Clips
from vidistill.data.types import IGNORED
from vidistill.worlds.doom.maps import centre_texture

TURNS = ("left", "none", "right")
WALKS = ("backward", "none", "forward")


def action_labels(actions: Tensor) -> tuple[Tensor, Tensor]:
    """Turn and walk classes [...] of actions [..., 4] in the order of the recorder."""
    left, right, forward, backward = actions.unbind(-1)
    return (right - left).sign().long() + 1, (forward - backward).sign().long() + 1


def visible_walks(walk: Tensor, poses: Tensor, speed: float) -> Tensor:
    """Walk classes [N, T] with those ignored where a wall stopped the walker, since no picture can show them.

    poses [N, T, 3] in map units / 64; `speed` in map units a frame.
    """
    moved = torch.zeros_like(poses[..., 0])
    moved[..., 1:] = (poses[..., 1:, :2] - poses[..., :-1, :2]).norm(dim=-1) * 64
    return walk.masked_fill((walk != 1) & (moved < speed / 2), IGNORED)


def walk_labels(clips: Clips) -> dict[str, Tensor]:
    """Turn and walk of every frame."""
    turn, walk = action_labels(clips.tensors["actions"])
    return {"turn": turn, "walk": visible_walks(walk, clips.tensors["poses"], clips.meta["config"]["speed"])}


def doom_labels(clips: Clips) -> dict[str, Tensor]:
    """Turn, walk, texture (of the wall in the centre of view) and distance of every frame."""
    poses = clips.tensors["poses"]
    seen = np.array(
        [
            [centre_texture(d["walls"], pose) for pose in path]
            for d, path in zip(clips.meta["described"], poses.double().numpy(), strict=True)
        ]
    )
    texture = torch.from_numpy(seen[..., 0]).long()
    distance = torch.from_numpy(seen[..., 1]).float().nan_to_num(posinf=0.0).log1p()
    read = {"texture": texture.masked_fill(texture < 0, IGNORED), "distance": distance}
    return walk_labels(clips) | read
