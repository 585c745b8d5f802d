"""Teachers: bidirectional networks that a student learns from, each behind `Denoiser`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vidistill.diffusion import Denoiser, NoiseSchedule
from vidistill.shapes import LatentShape


@dataclass
class Teacher:
    """A loaded teacher: the network, the noise it was trained with, the clip it makes, and the codec of its latents."""

    net: Denoiser
    noise: NoiseSchedule
    shape: LatentShape
    codec: str
    name: str = ""


def _wan(source: str, **options: Any) -> Teacher:
    from vidistill.teachers import wan

    return wan.load(source, **options)


def _ltx(source: str, **options: Any) -> Teacher:
    from vidistill.teachers import ltx

    return ltx.load(source, **options)


FAMILIES: dict[str, Callable[..., Teacher]] = {"wan": _wan, "ltx": _ltx}


def load_teacher(source: str, family: str = "wan", **options: Any) -> Teacher:
    """The teacher at `source`, a local folder or a hub id; options are those of the family's `load`.

    Raises ValueError for an unknown family, FileNotFoundError or ValueError for what cannot be read.
    """
    if family not in FAMILIES:
        raise ValueError(f"no teacher family is called {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](source, **options)
