"""`vidistill convert`: published students become checkpoints of ours, and the reverse."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vidistill.checkpoint import CheckpointError, export, locate, read_record, read_tensors, rebuild, with_extension
from vidistill.cli.options import height_x_width, positive_int
from vidistill.conditioning.audio import AudioConfig
from vidistill.conditioning.condition import AUDIO_SITE
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.interop.families import TRAINED_FRAMES, family
from vidistill.interop.formats import Published, read_student, write_student
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.teachers.wan import VAE_FACTORS, WORLD


def add_convert(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "convert",
        help="read or write a published student",
        description="Turn a published student into a checkpoint that streams, or one of those back (--back).",
        epilog="example: vidistill convert self_forcing_dmd.pt sf --family self-forcing --allow-pickle --codec "
        "hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers --text Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    )
    p.add_argument("source", type=Path, help="published file (or folder of shards); with --back: our checkpoint")
    p.add_argument("out", type=Path, help="where to write")
    p.add_argument("--family", help="whose format it is: self-forcing, causvid, longlive, diagonal, livetalk, ...")
    p.add_argument("--back", action="store_true", help="write the published format again, weights unchanged")
    p.add_argument(
        "--size", type=height_x_width, default=(480, 832), help="pixels it streams, HEIGHTxWIDTH (default: 480x832)"
    )
    p.add_argument("--codec", default="wan", help="its codec: a diffusers folder with `vae`, hf://ORG/NAME, or a file")
    p.add_argument("--text", help="its text encoder: a diffusers folder or hub id with text_encoder and tokenizer")
    p.add_argument(
        "--tokens", type=positive_int, default=512, help="tokens a prompt is padded to (default: 512, Wan's)"
    )
    p.add_argument("--audio", help="of one that listens: its wav2vec 2.0 encoder, a transformers folder or hub id")
    p.add_argument("--entry", help="which weights of the file, e.g. generator_ema (default: the family's)")
    p.add_argument("--lora", type=Path, help="adapter file, merged into the weights for good")
    p.add_argument("--heads", type=int, default=0, help="attention heads (default: from the width)")
    p.add_argument("--given", type=int, default=0, help="chunks given at the start (image or video to continue)")
    p.add_argument("--allow-pickle", action="store_true", help="read .pt files (weights only)")
    p.set_defaults(run=run_convert)
    return p


def run_convert(args: argparse.Namespace) -> None:
    pass
    from vidistill.interop.families import FAMILIES

    if args.back:
        revert(args.source, args.out)
        print(args.out)
        return
    if args.family not in FAMILIES:
        wrong = "is needed: whose format is it?" if args.family is None else f"{args.family!r} is unknown;"
        raise ValueError(f"--family {wrong} Known: {', '.join(FAMILIES)}")
    card = convert(
        args.source,
        args.family,
        args.out,
        size=args.size,
        codec=args.codec,
        text=args.text,
        text_tokens=args.tokens,
        audio=args.audio,
        allow_pickle=args.allow_pickle,
        heads=args.heads,
        entry=args.entry,
        lora=args.lora,
        given_chunks=args.given,
    )
    print(json.dumps(card, indent=1))


# Px frames that speech is encoded in: a latent, two seconds before it and a quarter of one after it.
HEARD = {"block": 4, "context": 32, "lookahead": 4}


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
    audio: str | None = None,
    allow_pickle: bool = False,
    heads: int = 0,
    entry: str | None = None,
    lora: str | Path | None = None,
    given_chunks: int = 0,
) -> dict[str, Any]:
    """Write the published student at `path` as our checkpoint OUT.safetensors and OUT.json; returns its card.

    `name` is its family, `size` the pixels (height, width) it will stream; `codec`, `text` and `audio` are where the
    codec, the text encoder (padded to `text_tokens`) and, for one that listens, the wav2vec 2.0 encoder of its world
    are found, all kept as full paths or hub ids. Every weight keeps its precision. Raises ValueError, as `read_student`
    does, before anything is written.
    """
    published = read_student(path, name, allow_pickle=allow_pickle, heads=heads, entry=entry, lora=lora)
    pixels, _ = VAE_FACTORS[published.config.channels]
    if any(side % pixels for side in size):
        raise ValueError(f"size {size[0]}x{size[1]} must be whole latents of {pixels} pixels")
    if audio and AUDIO_SITE not in published.config.sites:
        raise ValueError(f"a student of family {name} hears nothing: leave out the audio encoder {audio}")
    student = student_of(published, size[0] // pixels, size[1] // pixels, frames)
    card = published.card()
    record = {
        "schedule": asdict(published.family.schedule(given_chunks)),
        "given_frames": student.first_frame(given_chunks) or int(published.family.pinned_first_frame),
        "noise": asdict(NoiseSchedule(shift=published.family.shift)),
        "codec": kept(codec, out),
        "text": {"kind": "umt5", "source": kept(text, out), "length": text_tokens} if text else None,
        "audio": asdict(AudioConfig("wav2vec2", fps=WORLD["fps"], source=kept(audio, out), **HEARD)) if audio else None,
        "world": WORLD,
        "card": card,
        "published": {"family": name, "entry": published.entry, "names": published.names},
    }
    export(out, student, record, dtype=None)
    return card


def kept(source: str, out: str | Path) -> str:
    """`source` as the record of `out` keeps it: the name of what lies beside it, else a full path; hub ids stay."""
    path = Path(source)
    ours = with_extension(path, ".json").is_file()
    if ours and path.resolve().parent == Path(out).resolve().parent:
        return path.name
    return str(path.resolve()) if ours or path.exists() else source


def revert(name: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write one of our checkpoints in the format of the family it was converted from; `dtype` None: as stored."""
    path = locate(name)
    record = read_record(path)
    if "published" not in record:
        raise CheckpointError(f"{name} was not converted from a published student: there is no format to go back to")
    with torch.device("meta"):
        config = rebuild(record, str(name)).dit_config
    tensors, _ = read_tensors(with_extension(path, ".safetensors"))
    state = {key.removeprefix("net."): x.to(dtype or x.dtype) for key, x in tensors.items()}
    origin = record["published"]
    published = Published(family(origin["family"]), config, state, origin["names"], origin["entry"], str(name))
    write_student(out, state, published)
