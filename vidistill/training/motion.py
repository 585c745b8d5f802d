"""The motion terms of Diagonal Distillation: how frames change, as a distribution and as learned features.

Source: 2603.09488.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

DISTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda d: d.square().mean(),
    "charbonnier": lambda d: (d.square() + 1e-6).sqrt().mean(),
    "cauchy": lambda d: torch.log1p((d / 1e-2).square()).mean(),
}


def motion(x: Tensor, given: int) -> Tensor:
    """Differences [B, T, C, H, W] of neighbouring frames, those between given frames left out."""
    return x[:, max(given - 1, 0) :].diff(dim=1)


def motion_gradient(x: Tensor, fake: Tensor, real: Tensor, given: int) -> Tensor:
    """Normalised score difference of motion [B, T, C, H, W]. Source: Diagonal Distillation 2603.09488, flow DMD."""
    moved, wanted = motion(x, given), motion(real, given)
    scale = (moved - wanted).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (motion(fake, given) - wanted) / scale.clamp_min(1e-6)


def motion_weights(grad: Tensor, growth: float, dynamic: float) -> Tensor:
    """Weight [B, T, 1, 1, 1] of each transition: cumulated error so far, mixed with an exponential of mean 1.

    Source: authors' code of 2603.09488; the error is that of motion, `grad` squared; theirs compares with latents.
    """
    error = grad.square().mean(dim=(2, 3, 4)).cumsum(dim=1)
    rising = 1 + error / error[:, -1:].clamp_min(1e-6)
    powers = growth ** torch.arange(grad.shape[1], dtype=grad.dtype, device=grad.device)
    return (dynamic * rising + (1 - dynamic) * powers / powers.mean())[..., None, None, None]


def motion_pull(x: Tensor, grad: Tensor, weight: Tensor, given: int) -> Tensor:
    """A loss [] whose gradient on the motion of `x` is 2 `weight` `grad` / numel, so that it reaches every frame."""
    moved = motion(x, given).float()
    return (weight * (moved - (moved - grad).detach()).square()).mean()


class MotionHead(nn.Module):
    """Learned features of motion; starts as the identity. `target` follows `net` and sees the teacher sample.

    Source: Diagonal Distillation 2603.09488, authors' code (there the head is not in the optimiser; here it is).
    """

    def __init__(self, channels: int, width: int = 64, groups: int = 32, decay: float = 0.95) -> None:
        super().__init__()
        self.decay = decay
        self.net, self.target = (
            nn.Sequential(
                nn.SiLU(),
                nn.Conv2d(channels, width, 1),
                nn.GroupNorm(groups, width),
                nn.SiLU(),
                nn.Conv2d(width, channels, 1),
            )
            for _ in range(2)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)
        self.target.load_state_dict(self.net.state_dict())
        self.target.requires_grad_(False)

    def forward(self, moved: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared distance [] of the features of two motions [B, T, C, H, W]."""
        y, z = moved.flatten(0, 1).float(), wanted.detach().flatten(0, 1).float()
        with torch.no_grad():
            aim = z + self.target(z)
        return (y + self.net(y) - aim).square().mean()

    @torch.no_grad()
    def follow(self) -> None:
        """Move the teacher copy towards the trained one; call after each of its updates."""
        for slow, fast in zip(self.target.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.decay)
