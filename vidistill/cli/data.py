"""`vidistill data`."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidistill.cli.options import (
    OPTION_TYPES,
    Arguments,
    Parser,
    add_command,
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
IMPORTED = (*SPLITS[:3], "inspected")  # what stands in a folder of imported data
FOLDER: Arguments = {"out": {"type": Path, "help": "folder to write"}}
TOKENS: Arguments = {
    "--tokens": {"type": positive_int, "default": 512, "help": "tokens a prompt is padded to (default: 512, Wan's)"}
}


def recorded(episodes: int, frames: int, splits: tuple[str, ...] = SPLITS) -> Arguments:
    """What all commands that record clips take; `episodes` and `frames` are the defaults of a world."""
    return {
        **FOLDER,
        "--split": {
            "choices": splits,
            "default": "train",
            "help": "whose clips: their seeds are disjoint (default: train; held_out is validation)",
        },
        "--episodes": {
            "type": positive_int,
            "default": episodes,
            "help": f"clips to record (default: {episodes})",
        },
        "--frames": {
            "type": positive_int,
            "default": frames,
            "help": f"pixel frames an episode (default: {frames})",
        },
        "--codec": {"help": "write latents of this codec instead of pixels"},
    }


PART: Arguments = {
    "--first": {
        "type": non_negative_int,
        "default": 0,
        "help": "first episode of the split to record (default: 0)",
    },
    "--workers": {"type": positive_int, "default": 2, "help": "processes that record (default: 2)"},
}
DOOM: Arguments = {
    **recorded(256, 321),
    **PART,
    "--palindromes": {
        "type": fraction,
        "default": 0.0,
        "help": "share of walks that go there and back (default: 0)",
    },
}
SHAPES: Arguments = {
    **recorded(1024, 129, (*SPLITS, "judge")),
    "--text": {
        "nargs": "+",
        "default": ["kind=ngrams"],
        "metavar": "key=value",
        "help": "text encoder: kind=ngrams dim=32 length=16 (default), or kind=umt5 source=FOLDER folder=CACHE",
    },
}
TALKER: Arguments = {
    **recorded(1024, 161),
    **PART,
    "--faults": {"type": fraction, "default": 0.0, "help": "share of clips with something wrong (default: 0)"},
    "--audio": {
        "nargs": "+",
        "default": ["kind=mel"],
        "metavar": "key=value",
        "help": "features, e.g. kind=mel lookahead=1",
    },
    "--text": {**SHAPES["--text"], "help": "as of shapes"},
}
SHARED: Arguments = {
    "--part": {
        "default": "1/1",
        "help": "share of the work that this process, or torchrun's processes, do, e.g. 2/4 (default: all)",
    }
}
TRAJECTORIES: Arguments = {
    **FOLDER,
    "--teacher": {"required": True, "help": "a bundled name or the path of a teacher"},
    "--data": {
        "type": Path,
        "required": True,
        "help": "latents whose start pictures and actions are used; prompts",
    },
    "--clips": {"type": positive_int, "default": 1024, "help": "trajectories (default: 1024)"},
    "--frames": {"type": positive_int, "help": "latents a clip (default: what the teacher was trained on)"},
    "--steps": {
        "type": positive_int,
        "default": 48,
        "help": "sampler steps, at least; more if --levels ask (default: 48)",
    },
    "--levels": {
        "type": numbers,
        "help": "levels to keep, e.g. 1,0.9,0.75,0.5 (default: four even steps, warped)",
    },
    "--guidance": {"type": float, "help": "default: what the teacher's record says, else 1"},
    "--seed": {"type": non_negative_int, "default": 0, "help": "seed of noise and clips (default: 0)"},
    "--size": {
        "type": height_x_width,
        "default": (480, 832),
        "help": "pixels, where the data are prompts (480x832)",
    },
    "--at-once": {
        "type": positive_int,
        "default": 64,
        "help": "clips sampled together, a file each time (default: 64)",
    },
    "--precision": {
        "choices": ("fp32", "bf16", "auto"),
        "default": "fp32",
        "help": "of products (default: fp32)",
    },
    **SHARED,
}
PROMPTS: Arguments = {
    **FOLDER,
    "--file": {"type": Path, "required": True, "help": "text file, one prompt a line"},
    "--text": {"required": True, "help": "diffusers folder or hub id that has text_encoder and tokenizer"},
    "--negative": {"default": "", "help": "what guidance is taken against (default: the empty prompt)"},
    "--fps": {"type": positive_float, "default": 16.0, "help": "frames a second of the student (16; Wan2.2-5B: 24)"},
    **TOKENS,
    "--at-once": {"type": positive_int, "default": 16, "help": "prompts encoded together (default: 16)"},
    **SHARED,
}


PICTURES: Arguments = {
    **FOLDER,
    "--file": {"type": Path, "required": True, "help": "text file: a picture beside it, a tab and a prompt a line"},
    "--model": {"required": True, "help": "diffusers folder or hub id that has vae, text_encoder and tokenizer"},
    "--image-encoder": {"help": "diffusers folder or hub id that has image_encoder, for Wan 2.1 (default: none)"},
    "--negative": PROMPTS["--negative"],
    "--frames": {"type": positive_int, "default": 21, "help": "latents of the clips that start so (default: 21)"},
    "--size": {"type": height_x_width, "default": (480, 832), "help": "pixels of the clips (480x832)"},
    "--fps": {"type": positive_float, "default": 16.0, "help": "frames a second of the student (default: 16)"},
    **TOKENS,
    **SHARED,
}


class KindParser(Parser):
    """The options of a kind of data; those of an importer are its own, and read when the kind is asked for."""

    def __init__(self, importer: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.importer = importer
        for name, read in OPTION_TYPES.items():
            self.register("type", name, read)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.importer:
            module = import_module(f"vidistill.data.importers.{self.importer}")
            self.importer = ""
            module.add_options(self)
            self.set_defaults(run=partial(run_importer, module))
        return super().parse_known_args(args, namespace)


def run_importer(module: Any, args: argparse.Namespace) -> None:
    """Import, unless other things than data of ours lie where it is to be written."""
    from vidistill.distributed import group

    check_splits(args.out)
    with group():
        print(module.run(args))


def check_splits(out: Path, what: str = "OUT") -> None:
    """ValueError unless splits of data may be written into the folder `out`: it can be, and holds nothing else."""
    from vidistill.data.shards import META, DataError
    from vidistill.io import check_folder, is_ours

    check_folder(out, what)
    ours = {META, *IMPORTED, *(f"{split}.partial" for split in IMPORTED)}
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if found and not found & ours and not is_ours(out / "sheet.png"):
        raise DataError(f"{out} is there and holds other things than data of ours; name a new folder")


def add_data(commands: Any) -> None:
    p = commands.add_parser("data", help="record and encode clips", description="Record clips, and encode them.")
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=KindParser)
    for name, brings in IMPORTERS.items():
        kinds.add_parser(name, help=brings, importer=name)
    add_command(kinds, "doom", run_doom, DOOM, help="random walks through rooms of the Doom engine")
    add_command(kinds, "shapes", run_shapes, SHAPES, help="captioned moving shapes, drawn here")
    add_command(kinds, "talker", run_talker, TALKER, help="people who talk, drawn here; their speech is espeak-ng's")
    add_command(
        kinds,
        "trajectories",
        run_trajectories,
        TRAJECTORIES,
        help="noise-to-sample paths of a teacher, for objective regression",
        description="Sample clips with a teacher and keep its states at a few noise levels. Resumes after a stop.",
        epilog="example: vidistill data trajectories data/doom/paths --teacher doom-teacher --data data/doom/latents",
    )
    add_command(
        kinds,
        "prompts",
        run_prompts,
        PROMPTS,
        help="text alone, for students that learn without recorded video",
        description="Encode a list of prompts once, so that training needs no text encoder. Resumes after a stop.",
        epilog="example: vidistill data prompts data/wan/prompts --file prompts.txt --text WAN_FOLDER",
    )

    add_command(
        kinds,
        "pictures",
        run_pictures,
        PICTURES,
        help="pictures and text, for image-to-video students",
        description="Encode start pictures and prompts once, as Wan's image-to-video networks take them. Resumes.",
        epilog="example: vidistill data pictures data/wan/pictures --file pictures.txt --model WAN_I2V_FOLDER "
        "--image-encoder WAN_I2V_FOLDER",
    )


def run_doom(args: argparse.Namespace) -> None:
    from vidistill.data.shards import frame_shards
    from vidistill.worlds.doom import recorder

    cfg = recorder.DoomConfig(num_frames=args.frames)
    more = {"first": args.first, "actions": list(recorder.ACTIONS), "palindromes": args.palindromes}
    record(
        args,
        cfg,
        more,
        lambda: recorder.record_many(cfg, part_of(args, recorder.seeds), args.workers),
        lambda episodes: frame_shards(recorder.with_palindromes(cfg, episodes, args.palindromes)),
    )


def run_shapes(args: argparse.Namespace) -> None:
    from vidistill.config import settings
    from vidistill.data.shards import captioned_shards
    from vidistill.worlds import shapes

    cfg, text = shapes.ShapesConfig(num_frames=args.frames), settings(args.text)
    record(
        args,
        cfg,
        {"given": 0, "text": text},
        lambda: shapes.record_many(cfg, shapes.seeds(args.split, args.episodes)),
        lambda clips: captioned_shards(clips, reader(text)),
    )


def run_talker(args: argparse.Namespace) -> None:
    from vidistill.conditioning.audio import AudioConfig
    from vidistill.config import build, settings
    from vidistill.data.shards import talk_shards
    from vidistill.worlds.talker import recorder

    audio, text = build(AudioConfig, settings(args.audio)), settings(args.text)
    cfg = recorder.TalkerConfig(num_frames=args.frames, faults=args.faults, audio=audio)
    record(
        args,
        cfg,
        {"first": args.first, "text": text, "audio": asdict(audio)},
        lambda: recorder.record_many(cfg, part_of(args, recorder.seeds), args.workers),
        lambda clips: talk_shards(clips, reader(text), audio, partial(recorder.measures, cfg=cfg)),
    )


def part_of(args: argparse.Namespace, seeds: Callable[[str, int], Any]) -> Any:
    """The seeds of the episodes of a split that were asked for."""
    return seeds(args.split, args.first + args.episodes)[args.first :]


def record(
    args: argparse.Namespace,
    cfg: Any,
    more: Mapping[str, Any],
    clips: Callable[[], Iterable[Any]],
    shards: Callable[[Iterable[Any]], Iterable[Any]],
) -> None:
    """Write the `shards` of the `clips` that a world's `cfg` makes, unless they are there; `more` of their record."""
    from vidistill import checkpoint
    from vidistill.data.shards import latent_shard, write_shards
    from vidistill.progress import track

    own = {"source": args.kind, "split": args.split, "config": asdict(cfg), "codec": args.codec}
    meta = {**own, "fps": cfg.fps, "px_size": cfg.size, **more}
    if is_there(args.out, {**meta, "episodes": args.episodes}):
        return
    codec = checkpoint.load(args.codec, "codec").net if args.codec else None
    made = shards(track(clips(), "clips", args.episodes, "clip"))
    write_shards(args.out, (latent_shard(s, codec) for s in made) if codec else made, meta)
    print(f"{args.out}: {args.episodes} clips of {args.frames} frames")


def reader(text: dict[str, Any]) -> "Encode":
    """What reads captions, as the settings of --text say."""
    from vidistill import checkpoint

    encode = checkpoint.text_encoder({"text": text}, text.get("folder"), offline=False)
    if encode is None:
        raise ValueError("--text names no encoder; say kind=ngrams or kind=umt5 source=FOLDER folder=CACHE")
    return encode


def run_trajectories(args: argparse.Namespace) -> None:
    from vidistill.data import ode_pairs
    from vidistill.data.shards import META
    from vidistill.distributed import group

    values = values_of(args, TRAJECTORIES)
    asked = {name: values[name] for name in ("teacher", "clips", "frames", "seed", "guidance")}
    said = {name: value for name, value in asked.items() if value is not None}

    def later() -> dict[str, Any]:
        return {"data": ode_pairs.digest(args.data)} if (args.data / META).is_file() else {}

    if not is_there(args.out, said, later):
        with group():
            print(ode_pairs.trajectories(**values))


def run_prompts(args: argparse.Namespace) -> None:
    from vidistill.data import prompts
    from vidistill.distributed import group

    def later() -> dict[str, Any]:
        lines = {"digest": prompts.digest(prompts.read_lines(args.file))} if args.file.is_file() else {}
        return {"text": read_by(args.text, args.tokens), **lines}

    if not is_there(args.out, {"negative": args.negative, "fps": args.fps}, later):
        with group():
            print(prompts.prompts(**values_of(args, PROMPTS)))


def run_pictures(args: argparse.Namespace) -> None:
    from vidistill.data import pictures, prompts
    from vidistill.distributed import group

    def later() -> dict[str, Any]:
        shown = {"frames": args.frames, "size": list(args.size)}
        known = {"text": read_by(args.model, args.tokens), prompts.SHOWN: shown}
        return known | (pictures.digests(pictures.read_list(args.file)) if args.file.is_file() else {})

    if not is_there(args.out, {"negative": args.negative, "fps": args.fps, "codec": args.model}, later):
        with group():
            print(pictures.pictures(**values_of(args, PICTURES)))


def values_of(args: argparse.Namespace, arguments: Arguments) -> dict[str, Any]:
    """What was given for `arguments`, by the names of their parameters."""
    names = [flags.strip("-").replace("-", "_") for flags in arguments]
    return {name: vars(args)[name] for name in names}


def read_by(source: str, length: int) -> dict[str, Any]:
    """What a folder of prompts says of its text encoder."""
    return {"kind": "umt5", "source": str(source).removeprefix("hf://"), "length": length}


def is_there(
    folder: Path, asked: Mapping[str, Any] | None = None, later: Callable[[], Mapping[str, Any]] = dict
) -> bool:
    """Whether a data folder is complete already; says so. ValueError if it is not what is `asked` for.

    `later`: what folders of earlier versions do not say, worked out for a complete one and asked for where it is said.
    """
    from vidistill.data.shards import META, partial_of, read_meta
    from vidistill.io import check_folder

    if not (folder / META).is_file():
        partial_of(folder)
        check_folder(folder, "OUT")
        return False
    found = read_meta(folder)
    asked = {**(asked or {}), **{key: value for key, value in later().items() if key in found}}
    other = [
        f"{key} {found.get(key)!r} where {value!r} is asked for"
        for key, value in json.loads(json.dumps(asked)).items()
        if found.get(key) != value
    ]
    if other:
        raise ValueError(f"{folder} is there already, with {', '.join(other)}; remove it, or name another folder")
    print(f"{folder} is there already ({found['episodes']} episodes); remove it to make it anew")
    return True
