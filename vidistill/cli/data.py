"""`vidistill data`."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidistill.cli.options import (
    fraction,
    height_x_width,
    non_negative_int,
    numbers,
    positive_float,
    positive_int,
)
from vidistill.data.importers import IMPORTERS

if TYPE_CHECKING:
    from vidistill.conditioning.condition import Encode

SPLITS = ("train", "validation", "test", "held_out")
SPLIT = "whose clips: their seeds are disjoint (default: train; held_out is validation)"


OPTION_TYPES = {  # by the names that importers know them by
    "count": positive_int,
    "number": non_negative_int,
    "numbers": numbers,
    "rate": positive_float,
    "fraction": fraction,
    "size": height_x_width,
}


class KindParser(argparse.ArgumentParser):
    """The options of a kind of data; those of an importer are its own, and read when the kind is asked for."""

    def __init__(self, *args: Any, importer: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.importer = importer
        for name, read in OPTION_TYPES.items():
            self.register("type", name, read)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.importer:
            module = import_module(f"vidistill.data.importers.{self.importer}")
            self.importer = ""
            module.add_options(self)
            self.set_defaults(run=lambda parsed: print(module.run(parsed)))
        return super().parse_known_args(args, namespace)


def add_data(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser("data", help="record and encode clips", description="Record clips, and encode them.")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=KindParser)
    for name, brings in IMPORTERS.items():
        kinds.add_parser(name, help=brings, importer=name)
    doom = kinds.add_parser("doom", help="random walks through rooms of the Doom engine")
    doom.add_argument("out", type=Path, help="folder to write")
    doom.add_argument("--split", choices=SPLITS, default="train", help=SPLIT)
    doom.add_argument("--episodes", type=positive_int, default=256, help="clips to record (default: 256)")
    doom.add_argument(
        "--first", type=non_negative_int, default=0, help="first episode of the split to record (default: 0)"
    )
    doom.add_argument("--frames", type=positive_int, default=321, help="pixel frames an episode (default: 321)")
    doom.add_argument("--codec", help="write latents of this codec instead of pixels")
    doom.add_argument(
        "--palindromes", type=fraction, default=0.0, help="share of walks that go there and back (default: 0)"
    )
    doom.add_argument("--workers", type=positive_int, default=2, help="engine processes (default: 2)")
    doom.set_defaults(run=run_data_doom)
    add_shapes(kinds)
    add_talker(kinds)
    add_trajectories(kinds)
    add_prompts(kinds)
    return p


def add_shapes(kinds: Any) -> None:
    p = kinds.add_parser("shapes", help="captioned moving shapes, drawn here")
    p.add_argument("out", type=Path, help="folder to write")
    p.add_argument("--split", choices=(*SPLITS, "judge"), default="train", help=SPLIT)
    p.add_argument("--episodes", type=positive_int, default=1024, help="clips to record (default: 1024)")
    p.add_argument("--frames", type=positive_int, default=129, help="pixel frames an episode (default: 129)")
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

    from vidistill import checkpoint
    from vidistill.config import settings
    from vidistill.data.shards import captioned_shards, latent_shard, write_shards
    from vidistill.worlds import shapes

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
    shards = captioned_shards(clips, encode)
    write_shards(args.out, (latent_shard(s, codec) for s in shards) if codec else shards, meta)
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
    p.add_argument("--split", choices=SPLITS, default="train", help=SPLIT)
    p.add_argument("--episodes", type=positive_int, default=1024, help="clips to record (default: 1024)")
    p.add_argument("--first", type=non_negative_int, default=0, help="first episode of the split (default: 0)")
    p.add_argument("--frames", type=positive_int, default=161, help="pixel frames an episode (default: 161)")
    p.add_argument("--faults", type=fraction, default=0.0, help="share of clips with something wrong (default: 0)")
    p.add_argument("--codec", help="write latents of this codec instead of pixels")
    p.add_argument(
        "--audio", nargs="+", default=["kind=mel"], metavar="key=value", help="features, e.g. kind=mel lookahead=1"
    )
    p.add_argument("--text", nargs="+", default=["kind=ngrams"], metavar="key=value", help="as of shapes")
    p.add_argument("--workers", type=positive_int, default=2, help="processes that draw (default: 2)")
    p.set_defaults(run=run_data_talker)


def run_data_talker(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vidistill import checkpoint
    from vidistill.conditioning.audio import AudioConfig
    from vidistill.config import build, settings
    from vidistill.data.shards import latent_shard, talk_shards, write_shards
    from vidistill.worlds.talker import recorder

    audio = build(AudioConfig, settings(args.audio))
    cfg, text = recorder.TalkerConfig(num_frames=args.frames, faults=args.faults, audio=audio), settings(args.text)
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
    seeds = recorder.seeds(args.split, args.first + args.episodes)[args.first :]
    clips = tqdm(recorder.record_many(cfg, seeds, args.workers), total=len(seeds), desc="clips", disable=None)
    shards = talk_shards(clips, encode, audio, partial(recorder.measures, cfg=cfg))
    write_shards(args.out, (latent_shard(s, codec) for s in shards) if codec else shards, meta)
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
    p.add_argument("--clips", type=positive_int, default=1024, help="trajectories (default: 1024)")
    p.add_argument("--frames", type=positive_int, help="latents a clip (default: what the teacher was trained on)")
    p.add_argument(
        "--steps", type=positive_int, default=48, help="sampler steps, at least; more if --levels ask (default: 48)"
    )
    p.add_argument(
        "--levels", type=numbers, help="levels to keep, e.g. 1,0.9,0.75,0.5 (default: four even steps, warped)"
    )
    p.add_argument("--guidance", type=float, help="default: what the teacher's record says, else 1")
    p.add_argument("--seed", type=non_negative_int, default=0, help="seed of noise and clips (default: 0)")
    p.add_argument(
        "--size", type=height_x_width, default=(480, 832), help="pixels, where the data are prompts (480x832)"
    )
    p.add_argument(
        "--at-once", type=positive_int, default=64, help="clips sampled together, a file each time (default: 64)"
    )
    p.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help="of products (default: fp32)")
    p.set_defaults(run=run_data_trajectories)


def run_data_trajectories(args: argparse.Namespace) -> None:
    from vidistill.data import ode_pairs

    if not is_there(args.out):
        print(ode_pairs.trajectories(**kwargs_of(args)))


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
    p.add_argument(
        "--tokens", type=positive_int, default=512, help="tokens a prompt is padded to (default: 512, Wan's)"
    )
    p.set_defaults(run=run_data_prompts)


def run_data_prompts(args: argparse.Namespace) -> None:
    from vidistill.data import prompts

    if not is_there(args.out):
        print(prompts.prompts(**kwargs_of(args)))


def kwargs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command of `data`, without those of the command line itself."""
    return {k: v for k, v in vars(args).items() if k not in ("command", "kind", "run", "verbose")}


def is_there(folder: Path, asked: Mapping[str, Any] | None = None) -> bool:
    """Whether a data folder is complete already; says so. ValueError if it is not what is `asked` for."""

    from vidistill.data.shards import META, read_meta

    if not (folder / META).is_file():
        return False
    found = read_meta(folder)
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

    from vidistill import checkpoint
    from vidistill.data.shards import frame_shards, latent_shard, write_shards
    from vidistill.worlds.doom import recorder

    cfg = recorder.DoomConfig(num_frames=args.frames)
    meta = {
        "source": "doom",
        "split": args.split,
        "first": args.first,
        "config": asdict(cfg),
        "fps": cfg.fps,
        "actions": list(recorder.ACTIONS),
        "px_size": cfg.size,
        "codec": args.codec,
        "palindromes": args.palindromes,
    }
    if is_there(args.out, {**meta, "episodes": args.episodes}):
        return
    seeds = recorder.seeds(args.split, args.first + args.episodes)[args.first :]
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    episodes = tqdm(recorder.record_many(cfg, seeds, args.workers), total=len(seeds), desc="episodes", disable=None)
    shards = frame_shards(recorder.with_palindromes(cfg, episodes, args.palindromes))
    write_shards(args.out, (latent_shard(s, codec) for s in shards) if codec else shards, meta)
    print(f"{args.out}: {len(seeds)} episodes of {args.frames} frames")
