"""Step tables as published training code uses them: training weights, conversions, and levels rounded to a table."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import Denoiser, add_noise, expand, v_from_x0, x0_from_v
from vidistill.interop.tables import GRID, TableSchedule
from vidistill.schedules import Pass


@dataclass(frozen=True)
class Table(TableSchedule):
    """A `TableSchedule` of any range and number of `entries`, with what training and samplers compute from it.

    `lowest`, `highest`, `strength`: range of u; `drop_end`: the table stops one step before `lowest`. Networks that
    convert with another table than the noise was drawn with get a Table each.
    """

    entries: int = GRID
    lowest: float = 0.0
    highest: float = 1.0
    strength: float = 1.0
    drop_end: bool = True

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [entries] (float32), falling."""
        first = self.lowest + (self.highest - self.lowest) * self.strength
        u = torch.linspace(first, self.lowest, self.entries + self.drop_end)[: self.entries]
        return self.shift * u / (1 + (self.shift - 1) * u)

    @property
    def weights(self) -> Tensor:
        """Bell-shaped training weight of each entry, mean 1 (as published: the number of entries is 1000)."""
        y = torch.exp(-2 * ((self.timesteps - GRID / 2) / GRID) ** 2)
        y = y - y.min()
        return y * (GRID / y.sum())

    def level(self, timesteps: Tensor) -> Tensor:
        """Noise of the entry nearest to a timestep in 0..1."""
        return self.sigma(timesteps * GRID).to(timesteps)

    def weight(self, timesteps: Tensor) -> Tensor:
        """Training weight of the entry nearest to a timestep in 0..1."""
        return self.weights[self.index(timesteps * GRID)].to(timesteps)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return add_noise(x0, eps, self.sigma(t))

    def x0(self, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Clean latents that `v` points to, in float64."""
        return x0_from_v(x, v, self.sigma(t))

    def v(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Velocity from `x` to `x0`, in float64."""
        return v_from_x0(x.double(), x0.double(), self.sigma(t)).to(x.dtype)

    def after(self, t: Tensor) -> Tensor:
        """Noise level of the entry after that of `t`; 0 for every sample as soon as one sits on the last entry."""
        index = self.index(t)
        if bool((index + 1 >= self.entries).any()):
            return torch.zeros(t.shape, dtype=torch.float64)
        return self.sigmas.double()[index + 1]


@dataclass(frozen=True)
class TableScore:
    """A score network that turns velocity into x0 with its `own` table although the noise came from the table `noise`.

    Its velocity is rescaled so that x - sigma v, with the noise's sigma, is the prediction of its own table. (Published
    DMD and SiD build both scores without a shift: they convert with the default table of shift 8.)
    """

    net: Denoiser
    own: Table
    noise: Table

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Velocity [B, F, C, H, W] of `x` at timesteps `sigma` [B, F] in 0..1."""
        ratio = self.own.level(sigma.double()) / self.noise.level(sigma.double())
        return (self.net.velocity(x, sigma, cond).double() * expand(ratio, x.double())).to(x.dtype)


def warp_timestep(t: Tensor, shift: float, lo: float = 20.0, hi: float = 980.0) -> Tensor:
    """Score timesteps of distribution matching: shifted after drawing, then kept inside [lo, hi]."""
    if shift > 1:
        t = shift * (t / GRID) / (1 + (shift - 1) * (t / GRID)) * GRID
    return t.clamp(lo, hi)


def on_table(passes: Iterable[Pass], table: TableSchedule, *, noise_context: bool = False) -> Iterator[Pass]:
    """The passes with their timesteps as they are and the noise rounded to `table`.

    `noise_context`: context passes noise the chunk to the entry nearest to their timestep, as published training code
    does even at 0; given chunks stay clean.
    """

    def near(level: float) -> float:
        return float(table.sigma(level * GRID))

    for p in passes:
        timesteps = p.timesteps or p.sigma
        if p.next_sigma is not None:
            after = tuple(near(s) if s else 0.0 for s in p.next_sigma)
            yield replace(p, sigma=tuple(map(near, timesteps)), timesteps=timesteps, next_sigma=after)
        elif noise_context and not p.emit:
            yield replace(p, sigma=tuple(map(near, timesteps)), timesteps=timesteps)
        else:
            yield replace(p, sigma=tuple(0.0 for _ in timesteps), timesteps=timesteps)
