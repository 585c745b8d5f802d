"""Timesteps of Wan's samplers, to the integer, against the published formulas written out number by number."""

import numpy as np
import pytest
from wan_solvers import levels, solver

pytest.importorskip("diffusers")

SHIFTS = (1.0, 3.0, 5.0, 6.0, 8.0, 12.0)


def published(kind: str, steps: int, shift: float) -> list[int]:
    """Wan2.1's `get_sampling_sigmas` (dpm++) and `FlowUniPCMultistepScheduler.set_timesteps`, one entry at a time.

    numpy's `linspace` counts up from its start in equal steps; UniPC's start is the float32 next to 0.999.
    """
    top = 1.0 if kind == "dpm++" else float(np.float32(1.0 - 1 / 1000))
    out = []
    for i in range(steps):
        u = top + i * ((0 - top) / steps)
        out.append(int(shift * u / (1 + (shift - 1) * u) * 1000))
    return out


@pytest.mark.parametrize("kind", ["dpm++", "unipc"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_timesteps_of_every_list_are_the_published_integers(kind, shift):
    for steps in range(2, 101):
        assert (levels(kind, steps, shift) * 1000).astype(np.int64).tolist() == published(kind, steps, shift), steps


@pytest.mark.parametrize(("steps", "timestep", "rounded"), [(10, 249, 250), (6, 600, 599)])
def test_a_level_that_float32_puts_on_the_other_side_keeps_its_integer(steps, timestep, rounded):
    run = solver("dpm++", steps, 3.0)
    assert timestep in run.timesteps and rounded not in run.timesteps
    assert run.sigmas[-1] == 0 and len(run.sigmas) == steps + 1


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"euler.*unipc.*dpm"):
        levels("euler", 4, 1.0)
