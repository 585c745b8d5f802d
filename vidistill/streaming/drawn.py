"""Random numbers of a stream that were drawn elsewhere, so that two implementations can make the same latents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidistill.diffusion import Draws, randn_like
from vidistill.models.student import CausalStudent
from vidistill.rollout import Noise


@dataclass(frozen=True)
class Drawn:
    """Recorded noise of one rollout.

    noise [F, C, H, W]: what the first frames begin as; fresh [N, f, C, H, W]: what renoising adds, chunk by chunk and
    step by step. Past their end numbers are drawn as without them.
    """

    noise: Tensor
    fresh: Tensor | None = None

    def sources(self, student: CausalStudent, noise: Noise, rng: torch.Generator) -> tuple[Noise, Draws]:
        """`noise` and `rng` of a new rollout of one stream, these numbers first."""
        left = iter(() if self.fresh is None else self.fresh)

        def begin(chunk: int) -> Tensor:
            start, stop = student.first_frame(chunk), student.first_frame(chunk + 1)
            if stop > len(self.noise):
                return noise(chunk)
            return self.noise[None, start:stop].clone().to(student.net.device)

        def draw(x: Tensor) -> Tensor:
            found = next(left, None)
            return randn_like(x, rng) if found is None else found[None].to(x)

        return begin, draw
