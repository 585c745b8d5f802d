"""Teachers of the small world: our own network under our own names."""

from vidistill.diffusion import NoiseSchedule
from vidistill.dit import DiTConfig, VideoDiT
from vidistill.shapes import LatentShape
from vidistill.teachers import Teacher


def new(cfg: DiTConfig, shape: LatentShape, *, noise: NoiseSchedule | None = None, codec: str = "tiny") -> Teacher:
    """An untrained teacher for clips of `shape`; raises ValueError if the network has other channels or patches."""
    if (cfg.channels, cfg.patch) != (shape.channels, shape.patch):
        raise ValueError(
            f"dit has {cfg.channels} channels and patch {cfg.patch}, the clip {shape.channels} and {shape.patch}"
        )
    return Teacher(VideoDiT(cfg), noise or NoiseSchedule(), shape, codec, "tiny")
