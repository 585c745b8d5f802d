"""Published students -> our checkpoints, and back."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vidistill.checkpoint import CheckpointError, export, load, locate
from vidistill.diffusion import NoiseSchedule
from vidistill.interop.families import TRAINED_FRAMES, family
from vidistill.interop.formats import Published, read_student, write_student
from vidistill.shapes import LatentShape
from vidistill.student import CausalStudent, StudentConfig

PIXELS_PER_LATENT, FRAMES_PER_LATENT = 8, 4
FPS = 16.0  # of every Wan 2.1 network


def student_of(published: Published, height: int, width: int, frames: int = TRAINED_FRAMES) -> CausalStudent:
    """The published network with its chunks and memory; `height`, `width` and `frames` are in latents."""
    kind, config = published.family, published.config
    return CausalStudent(
        published.net(),
        StudentConfig(chunk=kind.chunk, first_chunk=kind.first_chunk, memory=kind.memory(frames)),
        LatentShape(frames, config.channels, height, width, patch=config.patch),
    )


def convert(
    path: str | Path,
    name: str,
    out: str | Path,
    *,
    size: tuple[int, int] = (480, 832),
    frames: int = TRAINED_FRAMES,
    codec: str = "wan",
    text: str | None = None,
    text_tokens: int = 512,
    allow_pickle: bool = False,
    heads: int = 0,
    entry: str | None = None,
    lora: str | Path | None = None,
    given_chunks: int = 0,
) -> dict[str, Any]:
    """Write the published student at `path` as our checkpoint OUT.safetensors and OUT.json; returns its card.

    `name` is its family, `size` the pixels (height, width) it will stream, `codec` and `text` where the codec and the
    text encoder (padded to `text_tokens`) of its world are found, both kept as paths or hub ids. Weights keep their
    precision. Raises ValueError, as `read_student` does, before anything is written.
    """
    published = read_student(path, name, allow_pickle=allow_pickle, heads=heads, entry=entry, lora=lora)
    if any(side % PIXELS_PER_LATENT for side in size):
        raise ValueError(f"size {size[0]}x{size[1]} must be whole latents of {PIXELS_PER_LATENT} pixels")
    student = student_of(published, size[0] // PIXELS_PER_LATENT, size[1] // PIXELS_PER_LATENT, frames)
    card = published.card()
    record = {
        "schedule": asdict(published.family.schedule(given_chunks)),
        "noise": asdict(NoiseSchedule(shift=published.family.shift)),
        "codec": codec,
        "text": {"kind": "umt5", "source": text, "length": text_tokens} if text else None,
        "world": {"fps": FPS, "temporal": FRAMES_PER_LATENT},
        "card": card,
        "published": {"family": name, "entry": published.entry, "names": published.names},
    }
    export(out, student, record, dtype=student.net.head.head.weight.dtype)
    return card


def revert(name: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one of our checkpoints in the format of the family it was converted from; `dtype` None: as stored."""
    bundle = load(name, "student")
    if "published" not in bundle.record:
        raise CheckpointError(f"{name} was not converted from a published student: there is no format to go back to")
    origin = bundle.record["published"]
    stored = dtype or stored_dtype(name)
    state = {key.removeprefix("net."): x.to(stored) for key, x in bundle.net.state_dict().items()}
    cfg = bundle.net.dit_config
    published = Published(family(origin["family"]), cfg, state, origin["names"], origin["entry"], str(name))
    write_student(out, state, published)


def stored_dtype(name: str | Path) -> torch.dtype:
    """Precision of the weights of one of our files, read from its header."""
    path = locate(name)
    with path.with_name(path.name + ".safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    return kinds[next(value["dtype"] for key, value in header.items() if key != "__metadata__")]
