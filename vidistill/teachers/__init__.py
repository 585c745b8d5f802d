"""Teachers: bidirectional networks that a student learns from, each behind `Denoiser`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vidistill.diffusion import Denoiser, LatentShape, NoiseSchedule


@dataclass
class Teacher:
    """A loaded teacher: the network, the noise it was trained with, the clip it makes, and the codec of its latents.

    `net` also has `blocks` and `compile_regions()`. `guidance`: the scale its publisher samples with. `world`: pixel
    frames a second (fps) and of one latent (temporal).
    """

    net: Denoiser
    noise: NoiseSchedule
    shape: LatentShape
    codec: str
    name: str = ""
    guidance: float = 1.0
    world: Mapping[str, Any] = field(default_factory=dict)
