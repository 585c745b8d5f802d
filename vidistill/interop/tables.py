"""Published step tables: 1000 rounded noise levels, looked up by nearest neighbour. The core itself is continuous."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.diffusion import NoiseSchedule

GRID = 1000  # timesteps of a published training table


@dataclass(frozen=True)
class TableSchedule(NoiseSchedule):
    """A table of 1000 levels sigma = s u / (1 + (s - 1) u), as Wan's flow-matching scheduler keeps it in float32.

    A timestep t in 0..1000 means the entry whose timestep is nearest, so t = 0 is not noise-free: it is the last entry.
    Source: Self Forcing, `utils/scheduler.py` (behaviour).
    """

    logit_normal: bool = False

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [entries] (float32), falling."""
        u = torch.linspace(1, 0, GRID + 1)[:GRID]
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def timesteps(self) -> Tensor:
        """1000 sigma (float32)."""
        return self.sigmas * GRID

    def index(self, t: Tensor | float) -> Tensor:
        """Index of the entry nearest to timestep `t`; the first of two equally near ones."""
        t = torch.as_tensor(t, dtype=torch.float32)
        return (self.timesteps - t[..., None]).abs().argmin(-1)

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level of timestep `t` (float64, exactly the float32 entry)."""
        return self.sigmas.double()[self.index(t)]

    def warp_steps(self, steps: Sequence[int]) -> tuple[float, ...]:
        """Timesteps of a published step list with `warp_denoising_step`: step k is entry 1000 - k (0 stays 0)."""
        padded = torch.cat((self.timesteps, torch.zeros(1)))
        return tuple(padded[GRID - torch.tensor(list(steps))].tolist())


def diagonal_steps(levels: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Timesteps of chunk 0, 1 and all later ones in Diagonal Distillation's released inference.

    The middle levels 933 and 733 are literals there, whatever the shift, and the ends are cut to integers.
    Source: Sphere-AI-Lab/diagdistill `pipeline/causal_inference.py` (behaviour).
    """
    first, last = float(int(levels[0])), float(int(levels[-1]))
    return (first, 933.0, 733.0, last), (first, 933.0, last), tuple(levels)
