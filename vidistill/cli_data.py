"""`vidistill data`: record, draw and encode clips, sample a teacher's trajectories. `vidistill convert`."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidistill.conditioning import Encode

SPLIT = "whose clips: their seeds are disjoint (default: train)"


def read_number(text: str, kind: type[int] | type[float]) -> Any:
    """What `text` says, as a number of this kind; ArgumentTypeError if it says none."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None


def count(text: str) -> int:
    """A number of things: an integer of at least 1."""
    number: int = read_number(text, int)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def place(text: str) -> int:
    """A place in a row of things, counted from 0; also a seed."""
    number: int = read_number(text, int)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}")
    return number


def share(text: str) -> float:
    """A share of a whole."""
    number: float = read_number(text, float)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"is a share from 0 to 1, got {text}")
    return number


def amount(text: str) -> float:
    """A positive, finite number."""
    number: float = read_number(text, float)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(part) for part in text.split(","))


def sides(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH")
    return int(height), int(width)


def add_data(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser("data", help="record and encode clips", description="Record clips, and encode them.")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND")
    doom = kinds.add_parser("doom", help="random walks through rooms of the Doom engine")
    doom.add_argument("out", type=Path, help="folder to write")
    doom.add_argument("--split", choices=("train", "held_out"), default="train", help=SPLIT)
    doom.add_argument("--episodes", type=count, default=256, help="clips to record (default: 256)")
    doom.add_argument("--first", type=place, default=0, help="first episode of the split to record (default: 0)")
    doom.add_argument("--frames", type=count, default=321, help="pixel frames an episode (default: 321)")
    doom.add_argument("--codec", help="write latents of this codec instead of pixels")
    doom.add_argument(
        "--palindromes", type=share, default=0.0, help="share of walks that go there and back (default: 0)"
    )
    doom.add_argument("--workers", type=count, default=2, help="engine processes (default: 2)")
    doom.set_defaults(run=run_data_doom)
    add_shapes(kinds)
    add_talker(kinds)
    add_trajectories(kinds)
    add_prompts(kinds)
    return p


def add_shapes(kinds: Any) -> None:
    p = kinds.add_parser("shapes", help="captioned moving shapes, drawn here")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--split", choices=("train", "held_out", "judge"), default="train", help=SPLIT)
    p.add_argument("--episodes", type=count, default=1024, help="clips to record (default: 1024)")
    p.add_argument("--frames", type=count, default=129, help="pixel frames an episode (default: 129)")
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument(
        "--text",
        nargs="+",
        default=["kind=ngrams"],
        metavar="key=value",
        help="text encoder: kind=ngrams dim=32 length=16 (default), or kind=umt5 source=FOLDER folder=CACHE",
    )
    p.set_defaults(run=run_data_shapes)


def run_data_shapes(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vidistill import checkpoint, data
    from vidistill.config import settings
    from vidistill.sources import shapes

    cfg, text = shapes.ShapesConfig(num_frames=args.frames), settings(args.text)
    meta = {
        "source": "shapes",
        "split": args.split,
        "config": asdict(cfg),
        "fps": cfg.fps,
        "px_size": cfg.size,
        "codec": args.codec,
        "given": 0,
        "text": text,
    }
    if is_there(args.out, {**meta, "episodes": args.episodes}):
        return
    encode = reader(text)
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    clips = tqdm(shapes.record_many(cfg, shapes.seeds(args.split, args.episodes)), total=args.episodes, disable=None)
    shards = data.captioned_shards(clips, encode)
    data.write_shards(args.out, (data.latent_shard(s, codec) for s in shards) if codec else shards, meta)
    print(f"{args.out}: {args.episodes} clips of {args.frames} frames")


def reader(text: dict[str, Any]) -> "Encode":
    """What reads captions, as the settings of --text say."""
    from vidistill import checkpoint

    encode = checkpoint.text_encoder({"text": text})
    if encode is None:
        raise ValueError("--text names no encoder; say kind=ngrams or kind=umt5 source=FOLDER folder=CACHE")
    return encode


def add_talker(kinds: Any) -> None:
    p = kinds.add_parser("talker", help="people who talk, drawn here; their speech is espeak-ng's")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--split", choices=("train", "held_out"), default="train", help=SPLIT)
    p.add_argument("--episodes", type=count, default=1024, help="clips to record (default: 1024)")
    p.add_argument("--first", type=place, default=0, help="first episode of the split (default: 0)")
    p.add_argument("--frames", type=count, default=161, help="pixel frames an episode (default: 161)")
    p.add_argument("--faults", type=share, default=0.0, help="share of clips with something wrong (default: 0)")
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument(
        "--audio", nargs="+", default=["kind=mel"], metavar="key=value", help="features, e.g. kind=mel lookahead=1"
    )
    p.add_argument("--text", nargs="+", default=["kind=ngrams"], metavar="key=value", help="as of shapes")
    p.add_argument("--workers", type=count, default=2, help="processes that draw (default: 2)")
    p.set_defaults(run=run_data_talker)


def run_data_talker(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vidistill import checkpoint, data
    from vidistill.audio import AudioConfig
    from vidistill.config import build, settings
    from vidistill.sources import talker

    audio = build(AudioConfig, settings(args.audio))
    cfg, text = talker.TalkerConfig(num_frames=args.frames, faults=args.faults, audio=audio), settings(args.text)
    meta = {
        "source": "talker",
        "split": args.split,
        "first": args.first,
        "config": asdict(cfg),
        "fps": cfg.fps,
        "px_size": cfg.size,
        "codec": args.codec,
        "text": text,
        "audio": asdict(audio),
    }
    if is_there(args.out, {**meta, "episodes": args.episodes}):
        return
    encode = reader(text)
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    seeds = talker.seeds(args.split, args.first + args.episodes)[args.first :]
    clips = tqdm(talker.record_many(cfg, seeds, args.workers), total=len(seeds), desc="clips", disable=None)
    shards = data.talk_shards(clips, encode, audio, partial(talker.measures, cfg=cfg))
    data.write_shards(args.out, (data.latent_shard(s, codec) for s in shards) if codec else shards, meta)
    print(f"{args.out}: {len(seeds)} clips of {args.frames} frames")


def add_trajectories(kinds: Any) -> None:
    p = kinds.add_parser(
        "trajectories",
        help="noise-to-sample paths of a teacher, for objective regression",
        description="Sample clips with a teacher and keep its states at a few noise levels. Resumes after a stop.",
        epilog="example: vidistill data trajectories data/doom/paths --teacher doom-teacher --data data/doom/latents",
    )
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--teacher", required=True, help="a bundled name or the path of a teacher")
    p.add_argument(
        "--data", type=Path, required=True, help="latents whose start pictures and actions are used; prompts"
    )
    p.add_argument("--clips", type=count, default=1024, help="trajectories (default: 1024)")
    p.add_argument("--frames", type=count, help="latents a clip (default: what the teacher was trained on)")
    p.add_argument(
        "--steps", type=count, default=48, help="sampler steps, at least; more if --levels ask (default: 48)"
    )
    p.add_argument(
        "--levels", type=numbers, help="levels to keep, e.g. 1,0.9,0.75,0.5 (default: four even steps, warped)"
    )
    p.add_argument("--guidance", type=float, help="default: what the teacher's record says, else 1")
    p.add_argument("--seed", type=place, default=0, help="seed of noise and clips (default: 0)")
    p.add_argument("--size", type=sides, default=(480, 832), help="pixels, where the data are prompts (480x832)")
    p.add_argument("--at-once", type=count, default=64, help="clips sampled together, a file each time (default: 64)")
    p.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="of products (default: fp32)")
    p.set_defaults(run=run_data_trajectories)


def run_data_trajectories(args: argparse.Namespace) -> None:
    from vidistill import prepare

    if not is_there(args.out):
        print(prepare.trajectories(**kwargs_of(args)))


def add_prompts(kinds: Any) -> None:
    p = kinds.add_parser(
        "prompts",
        help="text alone, for students that learn without recorded video",
        description="Encode a list of prompts once, so that training needs no text encoder. Resumes after a stop.",
        epilog="example: vidistill data prompts data/wan/prompts --file prompts.txt --text WAN_FOLDER",
    )
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--file", type=Path, required=True, help="text file, one prompt a line")
    p.add_argument("--text", required=True, help="diffusers folder or hub id that has text_encoder and tokenizer")
    p.add_argument("--negative", default="", help="what guidance is taken against (default: the empty prompt)")
    p.add_argument("--tokens", type=count, default=512, help="tokens a prompt is padded to (default: 512, Wan's)")
    p.set_defaults(run=run_data_prompts)


def run_data_prompts(args: argparse.Namespace) -> None:
    from vidistill import prepare

    if not is_there(args.out):
        print(prepare.prompts(**kwargs_of(args)))


def kwargs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command of `data`, without those of the command line itself."""
    return {k: v for k, v in vars(args).items() if k not in ("command", "kind", "run", "verbose")}


def is_there(folder: Path, asked: Mapping[str, Any] | None = None) -> bool:
    """Whether a data folder is complete already; says so. ValueError if it is not what is `asked` for."""
    from vidistill import data

    if not (folder / data.META).is_file():
        return False
    found = data.read_meta(folder)
    other = [
        f"{key} {found.get(key)!r} where {value!r} is asked for"
        for key, value in json.loads(json.dumps(asked or {})).items()
        if found.get(key) != value
    ]
    if other:
        raise ValueError(f"{folder} is there already, with {', '.join(other)}; remove it, or name another folder")
    print(f"{folder} is there already ({found['episodes']} episodes); remove it to make it anew")
    return True


def run_data_doom(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vidistill import checkpoint, data
    from vidistill.sources import doom

    cfg = doom.DoomConfig(num_frames=args.frames)
    meta = {
        "source": "doom",
        "split": args.split,
        "first": args.first,
        "config": asdict(cfg),
        "fps": cfg.fps,
        "actions": list(doom.ACTIONS),
        "px_size": cfg.size,
        "codec": args.codec,
        "palindromes": args.palindromes,
    }
    if is_there(args.out, {**meta, "episodes": args.episodes}):
        return
    seeds = doom.seeds(args.split, args.first + args.episodes)[args.first :]
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    episodes = tqdm(doom.record_many(cfg, seeds, args.workers), total=len(seeds), desc="episodes", disable=None)
    shards = data.frame_shards(doom.with_palindromes(cfg, episodes, args.palindromes))
    data.write_shards(args.out, (data.latent_shard(s, codec) for s in shards) if codec else shards, meta)
    print(f"{args.out}: {len(seeds)} episodes of {args.frames} frames")


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
    p.add_argument("--size", type=sides, default=(480, 832), help="pixels it streams, HEIGHTxWIDTH (default: 480x832)")
    p.add_argument("--codec", default="wan", help="its codec: a diffusers folder with `vae`, hf://ORG/NAME, or a file")
    p.add_argument("--text", help="its text encoder: a diffusers folder or hub id with text_encoder and tokenizer")
    p.add_argument("--tokens", type=count, default=512, help="tokens a prompt is padded to (default: 512, Wan's)")
    p.add_argument("--audio", help="of one that listens: its wav2vec 2.0 encoder, a transformers folder or hub id")
    p.add_argument("--entry", help="which weights of the file, e.g. generator_ema (default: the family's)")
    p.add_argument("--lora", type=Path, help="adapter file, merged into the weights for good")
    p.add_argument("--heads", type=int, default=0, help="attention heads (default: from the width)")
    p.add_argument("--given", type=int, default=0, help="chunks given at the start (image or video to continue)")
    p.add_argument("--allow-pickle", action="store_true", help="read .pt files (weights only)")
    p.set_defaults(run=run_convert)
    return p


def run_convert(args: argparse.Namespace) -> None:
    from vidistill.convert import convert, revert
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
