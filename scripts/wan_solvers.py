"""Many-step solvers of Wan's published samplers: diffusers' multistep schedulers on Wan's own table of levels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The level before the shift that each solver starts from; UniPC's is kept in float32 before the table is made of it.
TOP = {"unipc": float(np.float32(0.999)), "dpm++": 1.0}


@dataclass
class Solver:
    """One sampling run: `timesteps` [n] in 0..1000 (cut to integers, as published) are given to the network."""

    scheduler: Any
    timesteps: Tensor
    taken: int = 0

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [n + 1] (float32), the last one 0."""
        return self.scheduler.sigmas

    def step(self, v: Tensor, x: Tensor) -> Tensor:
        """The latents after the next step, where the network said velocity `v` of `x`."""
        self.taken += 1
        return self.scheduler.step(v, self.scheduler.timesteps[self.taken - 1], x, return_dict=False)[0]


def levels(kind: str, steps: int, shift: float) -> np.ndarray:
    """Noise levels [steps] in float64, where the published solvers cut them to timesteps.

    Float32 would do so at another integer for four lists in ten. Source: Wan2.1, `fm_solvers*.py` (behaviour).
    """
    if kind not in TOP:
        raise ValueError(f"solver {kind!r} is unknown; choose one of {tuple(TOP)}")
    u = np.linspace(TOP[kind], 0, steps + 1)[:steps]
    return shift * u / (1 + (shift - 1) * u)


def solver(kind: str, steps: int, shift: float) -> Solver:
    """A fresh solver; raises ValueError for an unknown kind."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    sigmas = levels(kind, steps, shift)
    common = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2}
    if kind == "unipc":
        scheduler = UniPCMultistepScheduler(**common)
    else:
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    # diffusers starts both from 0.999 or 1, and has no argument for it
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000
    return Solver(scheduler, torch.from_numpy((sigmas * 1000).astype(np.int64)))
