"""`vidistill convert`: published students become checkpoints of ours, and the reverse."""

import argparse
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vidistill.checkpoint import export, with_extension
from vidistill.cli.options import height_x_width, non_negative_int, positive_float, positive_int
from vidistill.conditioning.audio import AudioConfig
from vidistill.conditioning.condition import AUDIO_SITE, check_pictured, is_shown
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.interop.export import RECORD, export_as, restore
from vidistill.interop.families import FAMILIES, LAYOUT, Family, family
from vidistill.interop.formats import Published, read_student
from vidistill.io import check_folder, is_ours
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.teachers.wan import FPS, VAE_FACTORS, WORLD

log = logging.getLogger("vidistill")

MOST_PIXELS = 8192  # a side


def add_convert(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "convert",
        help="read a published student",
        description="Turn a published student into a checkpoint that streams. The way back is `vidistill export`.",
        epilog="example: vidistill convert self_forcing_dmd.pt sf --family self-forcing --allow-pickle --codec "
        "hf://Wan-AI/Wan2.1-T2V-1.3B-Diffusers --text Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    )
    p.add_argument("source", type=Path, help="published file (or folder of shards); with --back: our checkpoint")
    p.add_argument("out", type=Path, help="where to write")
    p.add_argument("--family", help=f"whose format it is: {', '.join(FAMILIES)}")
    p.add_argument("--back", action="store_true", help="another name of `vidistill export --to self-forcing`")
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
    p.add_argument("--lora-alpha", type=positive_float, help="its alpha, where nothing beside it says one")
    p.add_argument("--heads", type=non_negative_int, default=0, help="attention heads (default: from the width)")
    p.add_argument(
        "--given", type=non_negative_int, default=0, help="chunks given at the start (image or video to continue)"
    )
    own = p.add_argument_group("what no family knows", "in place of the family's, or of a family (then --chunk too)")
    own.add_argument("--chunk", type=positive_int, help="latent frames of a chunk")
    own.add_argument("--window", type=positive_int, help="latent frames a chunk looks at, sinks and itself included")
    own.add_argument("--sinks", type=non_negative_int, help="first latent frames that never leave the window")
    own.add_argument("--steps", type=step_list, help="its steps as published, before the shift: 1000,750,500,250")
    own.add_argument("--shift", type=positive_float, help="shift of its noise levels")
    p.add_argument("--allow-pickle", action="store_true", help="read .pt files (weights only)")
    p.set_defaults(run=run_convert)
    return p


def step_list(text: str) -> tuple[int, ...]:
    """Timesteps with commas between them."""
    steps = tuple(positive_int(part) for part in text.split(","))
    if steps[0] != 1000 or any(b >= a for a, b in itertools.pairwise(steps)):
        raise argparse.ArgumentTypeError(f"{text!r} does not fall from 1000 on")
    return steps


def run_convert(args: argparse.Namespace) -> None:
    if args.back:
        log.warning("convert --back is now: vidistill export %s --to self-forcing -o %s", args.source, args.out)
        print(export_as(args.source, "self-forcing", args.out))
        return
    own = {name: getattr(args, name) for name in OWN if getattr(args, name) is not None}
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
        lora_alpha=args.lora_alpha,
        given_chunks=args.given,
        settings=own,
    )
    print(json.dumps(card, indent=1))


OWN = ("chunk", "window", "sinks", "steps", "shift")  # settings of a family that can be given


def family_of(name: str | None, settings: Mapping[str, Any], source: Path) -> Family:
    """The family called `name` with some settings of its own, or one of these settings alone."""
    if name is None and "chunk" in settings:
        kind = Family("custom", source.name, "not stated: see where it is from", channels=0, ancestry=("not stated",))
    elif name is None:
        raise ValueError(f"--family is needed: whose format is it? Known: {', '.join(FAMILIES)}; or say --chunk")
    else:
        kind = family(name)
    if not settings:
        return kind
    given = "as given: " + ", ".join(f"{key} {value}" for key, value in settings.items())
    return replace(kind, checked=LAYOUT, notes="; ".join(filter(None, (kind.notes, given))), **settings)


# Px frames that speech is encoded in: a latent, two seconds before it and a quarter of one after it.
HEARD = {"block": 4, "context": 32, "lookahead": 4}


def student_of(published: Published, height: int, width: int, frames: int = 0) -> CausalStudent:
    """The published network with its chunks and memory; sizes in latents, `frames` 0: as many as in its clips."""
    kind, config = published.family, published.config
    frames = frames or kind.frames
    return CausalStudent(
        published.net(),
        StudentConfig(chunk=kind.chunk, first_chunk=kind.first_chunk, memory=kind.memory(frames)),
        LatentShape(frames, config.channels, height, width, patch=config.patch),
    )


def convert(
    path: str | Path,
    name: str | None,
    out: str | Path,
    *,
    size: tuple[int, int] = (480, 832),
    frames: int = 0,
    codec: str = "wan",
    text: str | None = None,
    text_tokens: int = 512,
    audio: str | None = None,
    allow_pickle: bool = False,
    heads: int = 0,
    entry: str | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    given_chunks: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the published student at `path` as our checkpoint OUT.safetensors and OUT.json; returns its card.

    A folder that `vidistill export --to diffusers` wrote needs no family. `name` is its family, whose fields `settings`
    replace; `size` the pixels (height, width) it will stream; `codec`, `text` and `audio` are where the codec, the text
    encoder (padded to `text_tokens`) and, for one that listens, the wav2vec 2.0 encoder of its world are found, all
    kept as full paths or hub ids. Every weight keeps its precision. Raises ValueError, as `read_student` does, before
    anything is written.
    """
    out = free(out, [path, lora])
    if name is None and not settings and (Path(path) / RECORD).is_file():
        asked = {"lora": lora, "entry": entry, "text": text, "audio": audio, "heads": heads, "given": given_chunks}
        if unused := [f"--{option}" for option, value in asked.items() if value]:
            raise ValueError(f"{path} is read as its {RECORD} says: leave out {', '.join(unused)}, or name a --family")
        return restore(path, out)
    kind = family_of(name, settings or {}, Path(path))
    frames = frames or kind.frames
    published = read_student(
        path, kind, allow_pickle=allow_pickle, heads=heads, entry=entry, lora=lora, lora_alpha=lora_alpha
    )
    check_geometry(published, size, given_chunks, frames)
    if audio and AUDIO_SITE not in published.config.sites:
        raise ValueError(f"a student of family {kind.name} hears nothing: leave out the audio encoder {audio}")
    pixels, _ = VAE_FACTORS[published.config.channels]
    student = student_of(published, size[0] // pixels, size[1] // pixels, frames)
    card, world = published.card(), {**WORLD, "fps": FPS[published.config.channels]}
    record = {
        "schedule": asdict(kind.schedule(given_chunks)),
        "given_frames": student.first_frame(given_chunks) or int(kind.pinned_first_frame),
        "noise": asdict(NoiseSchedule(shift=kind.shift)),
        "codec": kept(codec, out),
        "text": {"kind": "umt5", "source": kept(text, out), "length": text_tokens} if text else None,
        "audio": asdict(AudioConfig("wav2vec2", fps=world["fps"], source=kept(audio, out), **HEARD)) if audio else None,
        "world": world,
        "card": card,
        "published": origin(published),
    }
    export(out, student, record, dtype=None)
    return card


def origin(published: Published) -> dict[str, Any]:
    """What a record keeps of the file it was read from, so that the file can be written again."""
    row = {"family": published.family.name, "entry": published.entry, "names": published.names}
    return {**row, "flat_patch": True} if published.flat_patch else row


def check_geometry(published: Published, size: tuple[int, int], given_chunks: int, frames: int) -> None:
    """Raise ValueError unless the student has a codec, can stream this size and is left something to make."""
    channels, kind = published.config.channels, published.family
    if channels not in VAE_FACTORS or kind.channels not in (0, channels):
        raise ValueError(
            f"{published.source} has {channels} latent channels: family {kind.name!r} has {kind.channels or 'any'}, "
            f"Wan's codecs have {' or '.join(map(str, VAE_FACTORS))}"
        )
    extra = published.config.extra_channels
    check_pictured(published.source, channels, extra, published.config.image_dim)
    if is_shown(channels, extra):
        raise ValueError(
            f"{published.source} takes {extra} condition channels, as Wan's image-to-video networks do: how a causal "
            "one of somebody else is shown its picture is not known, so it is not converted; one that was trained here "
            "is read from the folder that `vidistill export --to diffusers` writes"
        )
    pixels, _ = VAE_FACTORS[channels]
    for side, patch in zip(size, published.config.patch[1:], strict=True):
        if not 0 < side <= MOST_PIXELS or side % (pixels * patch):
            raise ValueError(
                f"--size {size[0]}x{size[1]}: sides must be multiples of {pixels * patch} pixels (whole patches of "
                f"{patch} latents), from {pixels * patch} to {MOST_PIXELS}"
            )
    most = (frames - kind.first_chunk) // kind.chunk + bool(kind.first_chunk) - 1
    if not 0 <= given_chunks <= most:
        raise ValueError(
            f"--given {given_chunks}: a clip of {frames} latent frames has {most + 1} chunks, of which at most {most} "
            "can be given"
        )


def free(out: str | Path, inputs: Sequence[str | Path | None]) -> Path:
    """Where to write a checkpoint, without a suffix; ValueError if it would replace an input or another's file."""
    path = Path(out)
    path = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    weights, record = with_extension(path, ".safetensors"), with_extension(path, ".json")
    for source in inputs:
        if source is not None and Path(source).exists() and weights.resolve() in files_of(Path(source)):
            raise ValueError(f"{weights} is what is read: name another place to write to")
    for target in (weights, record):
        if target.exists() and not is_ours(target):
            raise ValueError(f"{target} is there already and is no checkpoint of ours: name another place to write to")
    check_folder(path.parent, "OUT")
    return path


def files_of(source: Path) -> set[Path]:
    return {path.resolve() for path in (source.rglob("*") if source.is_dir() else [source])}


def kept(source: str, out: str | Path) -> str:
    """`source` as the record of `out` keeps it: the name of what lies beside it, else a full path; hub ids stay."""
    path = Path(source)
    ours = with_extension(path, ".json").is_file()
    if ours and path.resolve().parent == Path(out).resolve().parent:
        return path.name
    return str(path.resolve()) if ours or path.exists() else source
