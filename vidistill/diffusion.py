"""Rectified flow: x = (1 - sigma) x0 + sigma eps, velocity v = eps - x0, sigma in [0, 1]. No chunks here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Continuous noise levels, warped towards noise by `shift`: sigma = s u / (1 + (s - 1) u).

    Source: Esser et al. 2403.03206, eq. 23 (resolution-dependent shift).
    """

    shift: float = 1.0
    logit_normal: bool = True

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"NoiseSchedule.shift must be positive, got {self.shift}")

    def warp(self, u: float) -> float:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def steps(self, n: int) -> tuple[float, ...]:
        """`n` levels from 1.0 downwards, 0.0 excluded."""
        if n < 1:
            raise ValueError(f"a sampler needs at least one step, got {n}")
        return tuple(self.warp(1 - i / n) for i in range(n))

    def level(self, timestep: Tensor) -> Tensor:
        """Noise behind a level that is told to a network: itself here; published tables round it."""
        return timestep

    def sample(self, b: int, f: int, rng: "AnyGenerator", lo: float = 0.0, hi: float = 1.0) -> Tensor:
        """Random training levels [b, f] between `warp(lo)` and `warp(hi)`; logit-normal or uniform before the warp."""
        z = draw(torch.randn, (b, f), rng).sigmoid() if self.logit_normal else draw(torch.rand, (b, f), rng)
        u = lo + (hi - lo) * z
        return self.shift * u / (1 + (self.shift - 1) * u)


class Denoiser(Protocol):
    """Teacher, critic and student alike."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """Velocity [B, F, C, H, W] of `x` [B, F, C, H, W] at noise `sigma` [B, F]."""
        ...


Draws = Callable[[Tensor], Tensor]


def derived_seed(seed: int, index: int) -> int:
    """A seed of its own for the `index`-th thing (a batch, a chunk, a step) drawn under `seed`."""
    return (seed * 1_000_003 + index) % 2**63  # what a generator takes


class RowGenerator:
    """Random numbers for rows of a batch: those of a row depend on `generator` and its number in the whole batch alone.

    So a batch trains the same however it is split, and each process draws its own rows only, noise where it is used.
    `first`: number of the first of the `count` rows here.
    """

    def __init__(self, generator: torch.Generator, first: int, count: int) -> None:
        self.generator, self.first, self.count = generator, first, count

    def of(self, generator: torch.Generator) -> "RowGenerator":
        """Other random numbers for the same rows."""
        return RowGenerator(generator, self.first, self.count)

    def draw(self, func: Any, size: Sequence[int], *args: Any, device: torch.device | None = None) -> Tensor:
        """`func(*args, size)` [B, ...], B a multiple of the rows; ValueError for other sizes."""
        if device is not None and device.type == "meta":  # nothing can be drawn there
            return self.draw(func, size, *args).to(device)
        each, rest = divmod(size[0], self.count)
        if rest:
            raise ValueError(f"a draw of {tuple(size)} is not for {self.count} rows")
        key, own = decide(2**62, self.generator), torch.Generator(device or "cpu")
        seeds = (derived_seed(key, row) for row in range(self.first, self.first + self.count))
        rows = [func(*args, (each, *size[1:]), generator=own.manual_seed(s), device=own.device) for s in seeds]
        return torch.cat(rows)

    def __call__(self, x: Tensor) -> Tensor:
        """Standard normal noise like `x`."""
        return self.draw(torch.randn, x.shape, device=x.device).to(x.dtype)


AnyGenerator = torch.Generator | RowGenerator


def draw(func: Any, size: Sequence[int], rng: AnyGenerator, *args: Any) -> Tensor:
    """`func(*args, size)` of random numbers from `rng`, on the CPU."""
    return rng.draw(func, size, *args) if isinstance(rng, RowGenerator) else func(*args, tuple(size), generator=rng)


def decide(high: int, rng: AnyGenerator) -> int:
    """A whole number below `high`, the same for all rows."""
    return int(torch.randint(high, (1,), generator=rng.generator if isinstance(rng, RowGenerator) else rng))


def randn_like(x: Tensor, rng: torch.Generator | Draws) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `x`, drawn from `rng` (a generator lives on the CPU).

    `rng` may also be a RowGenerator, or recorded draws: a function that hands out the next one for `x`.
    """
    if not isinstance(rng, torch.Generator):
        return rng(x)
    return torch.randn(x.shape, generator=rng, dtype=torch.float32).to(device=x.device, dtype=x.dtype)


def expand(sigma: Tensor | Sequence[float] | float, x: Tensor) -> Tensor:
    """`sigma` (a number, one per frame, or [B, F]) as a tensor that broadcasts over `x` [B, F, C, H, W]."""
    s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if s.ndim == 0:
        s = s.expand(x.shape[0], x.shape[1])
    if s.ndim == 1:
        s = s.expand(x.shape[0], -1)
    return s[..., None, None, None]


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor | Sequence[float] | float) -> Tensor:
    """`x0` at noise level `sigma`; exactly `x0` where sigma is 0."""
    s = expand(sigma, x0)
    return torch.lerp(x0, eps, s)


def x0_from_v(x: Tensor, v: Tensor, sigma: Tensor | Sequence[float] | float) -> Tensor:
    """The clean latents that `v` points to; computed in float64, as all published Wan students do."""
    return (x.double() - expand(sigma, x.double()) * v.double()).to(x.dtype)


def v_from(x0: Tensor, eps: Tensor) -> Tensor:
    return eps - x0


def v_from_x0(x: Tensor, x0: Tensor, sigma: Tensor | Sequence[float] | float, floor: float = 1e-4) -> Tensor:
    """Velocity that leads from `x` to `x0`; sigma is floored so that nothing is divided by 0."""
    return (x - x0) / expand(sigma, x).clamp_min(floor)


def v_from_blend(x: Tensor, x0: Tensor, sigma: Tensor | Sequence[float] | float, error: float) -> Tensor:
    """Velocity towards the mean of two estimates of the clip, weighed by their variances; finite at every sigma.

    One is `x0`, as good as `error`, the other `x` itself, x / (1 - sigma), as good as (sigma / (1 - sigma))^2: near the
    end of a path a network need not say again what it was shown. Source: preconditioning of EDM 2206.00364, eq. 7,
    whose skip it is with `error` in place of the data's variance.
    """
    s = expand(sigma, x)
    return ((s - error * (1 - s)) * x - s * x0) / (error * (1 - s) ** 2 + s**2)


Randomness = torch.Generator | Draws


def euler(x: Tensor, x0: Tensor, v: Tensor, sigma: Tensor, next_sigma: Tensor, rng: Randomness | None) -> Tensor:
    """Deterministic step along the flow from `sigma` to `next_sigma` (both [B, F])."""
    return x + (expand(next_sigma, x) - expand(sigma, x)) * v


def renoise(x: Tensor, x0: Tensor, v: Tensor, sigma: Tensor, next_sigma: Tensor, rng: Randomness | None) -> Tensor:
    """Consistency step: the prediction `x0` with fresh noise at `next_sigma`, or as it is without `rng`.

    Source: 2303.01469, alg. 1.
    """
    return x0 if rng is None else add_noise(x0, randn_like(x0, rng), next_sigma)


@dataclass(frozen=True)
class LatentShape:
    """Size of a latent clip and of the patches a network cuts it into."""

    frames: int
    channels: int
    height: int
    width: int
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        for name in ("frames", "channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatentShape.{name} must be at least 1, got {getattr(self, name)}")
        t, h, w = self.patch
        if t != 1:
            raise ValueError(f"LatentShape.patch[0] must be 1 (causal chunks are whole latent frames), got {t}")
        if self.height % h or self.width % w:
            raise ValueError(
                f"LatentShape height x width {self.height}x{self.width} must be a multiple of the patch {h}x{w}: "
                "choose another patch or another frame size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one latent frame."""
        return self.height // self.patch[1], self.width // self.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.patch[1] * self.patch[2]
