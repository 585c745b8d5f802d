"""Which family a published teacher is of, and loading it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidistill.io import read_json
from vidistill.teachers import Teacher


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
    said = read_json(path) if path.is_file() else {}
    return CLASSES.get(said.get("_class_name", ""), "wan")


def read_teacher(source: str | Path, family: str | None = None, **options: Any) -> Teacher:
    """The teacher at `source`, a local folder or a hub id.

    `family` None: what the folder says. Options are those of the family's `load`. Raises ValueError for an unknown
    family, FileNotFoundError or ValueError for what cannot be read.
    """
    family = family or family_of(source)
    if family not in FAMILIES:
        raise ValueError(f"no teacher family is called {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](str(source), **options)
