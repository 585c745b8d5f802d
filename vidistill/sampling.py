"""Sampling a bidirectional denoiser in many steps with guidance: what a student is measured against."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vidistill.conditioning.condition import Condition, concat
from vidistill.diffusion import Denoiser, euler, x0_from_v


def guided(
    net: Denoiser,
    x: Tensor,
    sigma: Tensor,
    cond: Condition,
    nulls: Sequence[Condition],
    scales: Sequence[float],
    floor: float = 0.0,
) -> Tensor:
    """Velocity with classifier-free guidance, all branches batched in one forward.

    `nulls` lists ever poorer conditions, `scales` the weight of each difference: v = v_last + sum_i s_i (v_i - v_i+1);
    one null and scale s is u + s (c - u), and s = 1 is the conditional velocity alone. Source: 2207.12598, eq. 6.
    Clips whose level lies below `floor` are not guided (a limited interval, 2404.07724).
    """
    if len(nulls) != len(scales):
        raise ValueError(f"guidance needs one scale per null condition, got {len(scales)} for {len(nulls)}")
    if all(s == 1.0 for s in scales):
        return net.velocity(x, sigma, cond)
    high = sigma.amax(1) >= floor
    branches = [cond, *nulls]
    n = len(branches)
    v = net.velocity(x.repeat(n, 1, 1, 1, 1), sigma.repeat(n, 1), concat(branches)).chunk(n)
    out = v[-1]
    for better, poorer, scale in zip(v[:-1], v[1:], scales, strict=True):
        out = out + torch.where(high, scale, 1.0).to(out.dtype).view(-1, 1, 1, 1, 1) * (better - poorer)
    return out


def trajectory(
    net: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    cond: Condition,
    *,
    given: Tensor | None = None,
    nulls: Sequence[Condition] = (),
    scales: Sequence[float] = (),
) -> Iterator[tuple[float, Tensor]]:
    """(level, x [B, F, C, H, W]) along the probability-flow ODE by Euler steps, from noise to the sample at level 0.

    `given` [B, G, C, H, W] are clean frames at the start of the clip; they stay and are told as noise-free.
    """
    x, levels = noise, (*sigmas, 0.0)
    held = 0 if given is None else given.shape[1]
    for now, after in pairwise(levels):
        if given is not None:
            x = torch.cat((given, x[:, held:]), dim=1)
        yield now, x
        sigma = torch.full(x.shape[:2], now, device=x.device)
        sigma[:, :held] = 0.0
        v = guided(net, x, sigma, cond, nulls, scales)
        after_t = torch.full(x.shape[:2], after, device=x.device)
        after_t[:, :held] = 0.0
        x = euler(x, x0_from_v(x, v, sigma), v, sigma, after_t, None)
    yield 0.0, x


@torch.no_grad()
def sample(net: Denoiser, noise: Tensor, sigmas: Sequence[float], cond: Condition, **kw: object) -> Tensor:
    """The end of `trajectory`: a clip [B, F, C, H, W]."""
    states = trajectory(net, noise, sigmas, cond, **kw)  # type: ignore[arg-type]
    return deque(states, maxlen=1).pop()[1]
