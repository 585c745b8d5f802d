"""Many-step solvers of the published samplers: diffusers' multistep schedulers with Wan's settings."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SOLVERS = ("unipc", "dpm++")


TOP = {"unipc": 0.999, "dpm++": 1.0}  # the level before the shift that each solver starts from


@dataclass
class Solver:
    """One sampling run: `timesteps` [n] in 0..1000 (cut to integers, as published) are told to the network."""

    scheduler: Any
    timesteps: Tensor
    taken: int = 0

    @property
    def sigmas(self) -> Tensor:
        """Noise levels [n + 1], the last one 0."""
        return self.scheduler.sigmas

    def step(self, v: Tensor, x: Tensor) -> Tensor:
        """The latents after the next step, where the network said velocity `v` of `x`."""
        self.taken += 1
        return self.scheduler.step(v, self.scheduler.timesteps[self.taken - 1], x, return_dict=False)[0]


def solver(kind: str, steps: int, shift: float) -> Solver:
    """A fresh solver; raises ValueError for an unknown kind. Source: Wan2.1, `fm_solvers*.py` (behaviour)."""
    try:
        from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
    except ImportError as error:
        raise ImportError("Wan's solvers need diffusers: pip install 'vidistill[wan]'") from error
    if kind not in SOLVERS:
        raise ValueError(f"solver {kind!r} is unknown; choose one of {SOLVERS}")
    common = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift, "solver_order": 2}
    u = torch.linspace(TOP[kind], 0, steps + 1)[:-1]
    sigmas = torch.cat((shift * u / (1 + (shift - 1) * u), torch.zeros(1)))
    if kind == "unipc":
        scheduler = UniPCMultistepScheduler(**common)
    else:
        scheduler = DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas  # diffusers starts both from 0.999 or 1, and has no argument for it
    scheduler.timesteps = sigmas[:-1] * 1000
    return Solver(scheduler, (sigmas[:-1] * 1000).long())
