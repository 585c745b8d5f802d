"""Teachers: bidirectional networks that a student learns from, each behind `Denoiser`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidistill.diffusion import Denoiser, NoiseSchedule
from vidistill.shapes import LatentShape


@dataclass
class Teacher:
    """A loaded teacher: the network, the noise it was trained with, the clip it makes, and the codec of its latents.

    `net` also has `blocks` and `compile_regions()`. `guidance`: the scale its publisher samples with.
    """

    net: Denoiser
    noise: NoiseSchedule
    shape: LatentShape
    codec: str
    name: str = ""
    guidance: float = 1.0


def _wan(source: str, **options: Any) -> Teacher:
    from vidistill.teachers import wan

    return wan.load(source, **options)


def _ltx(source: str, **options: Any) -> Teacher:
    from vidistill.teachers import ltx

    return ltx.load(source, **options)


FAMILIES: dict[str, Callable[..., Teacher]] = {"wan": _wan, "ltx": _ltx}
CLASSES = {"LTXVideoTransformer3DModel": "ltx"}  # diffusers' class -> family; every other network is read as Wan's


def family_of(source: str | Path) -> str:
    """The family of the network in a local diffusers folder; `wan` for everything else."""
    path = Path(source) / "transformer" / "config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return CLASSES.get(said.get("_class_name", ""), "wan")


def load_teacher(source: str | Path, family: str | None = None, **options: Any) -> Teacher:
    """The teacher at `source`, a local folder or a hub id.

    `family` None: what the folder says. Options are those of the family's `load`. Raises ValueError for an unknown
    family, FileNotFoundError or ValueError for what cannot be read.
    """
    family = family or family_of(source)
    if family not in FAMILIES:
        raise ValueError(f"no teacher family is called {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](str(source), **options)
