"""`vidistill export` and `vidistill publish`: what was trained or converted here, for others."""

import argparse
from pathlib import Path
from typing import Any

TO = ("self-forcing", "diffusers", "ours")
DTYPES = ("fp32", "bf16", "fp16")


def add_export(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "export",
        help="write a checkpoint in a layout that others read",
        description="Write a student or teacher as a file that Self Forcing reads, as a diffusers folder, or as our "
        "own checkpoint, bit for bit. A converted student goes back to the format of its family.",
        epilog="example: vidistill export runs/wan-selfforcing/wan-selfforcing --to diffusers -o sf-diffusers",
    )
    p.add_argument("name", help="a bundled name or the path of a checkpoint")
    p.add_argument("--to", required=True, choices=TO, help="layout")
    p.add_argument("-o", "--out", type=Path, help="file or folder to write (default: NAME-LAYOUT here)")
    p.add_argument("--whole", action="store_true", help="to ours: a folder OUT with its codec and start pictures, too")
    p.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as stored)")
    p.set_defaults(run=run_export)
    return p


def run_export(args: argparse.Namespace) -> None:
    from vidistill.interop.export import DTYPES, export_as

    dtype = DTYPES[args.dtype] if args.dtype else None
    print((export_whole if args.whole else export_as)(args.name, args.to, args.out, dtype))


def export_whole(name: str, to: str, out: Path | None, dtype: Any = None) -> Path:
    """A folder OUT with the student OUT/OUT, the codec it was trained on and the pictures it starts from."""
    import shutil

    from vidistill import checkpoint
    from vidistill.interop.export import export_as

    if to != "ours" or out is None:
        raise ValueError("--whole is a folder of ours: say --to ours and name it with --out")
    path = checkpoint.locate(name)
    codec = checkpoint.read_record(path)["codec"] or ""
    found = checkpoint.beside(path.parent, codec)
    if found is not None and (Path(codec).is_absolute() or ".." in Path(codec).parts):
        raise ValueError(f"{name} names its codec by the path {codec}, which is no path in a folder of its own")
    starts = checkpoint.start_pictures(name)
    made = export_as(name, to, out / out.name, dtype)
    if found is not None:
        (out / codec).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(checkpoint.with_extension(found, suffix), checkpoint.with_extension(out / codec, suffix))
    if starts:
        folder = out / f"{out.name}-starts"
        folder.mkdir()
        for picture in starts:
            shutil.copyfile(picture, folder / picture.name)
    return made


def add_publish(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "publish",
        help="upload a checkpoint to the Hugging Face hub",
        description="Upload a checkpoint with a model card (lineage, licence, figures, commands) to the hub. No other "
        "command uploads anything. Needs a token that may write: hf auth login, or HF_TOKEN.",
        epilog="example: vidistill publish runs/wan-selfforcing/wan-selfforcing me/wan-sf --licence apache-2.0",
    )
    p.add_argument("name", help="a bundled name or the path of a checkpoint")
    p.add_argument("repo", help="ORG/NAME on the hub; made if it is not there")
    p.add_argument("--to", default="ours", choices=TO, help="layout (default: ours)")
    p.add_argument("--licence", help="as the hub names it, e.g. apache-2.0 (default: the card's)")
    p.add_argument("--private", action="store_true", help="make the repository private")
    p.add_argument("--card", action="store_true", help="print the model card and upload nothing")
    p.set_defaults(run=run_publish)
    return p


def run_publish(args: argparse.Namespace) -> None:
    from vidistill.interop.hub import model_card, publish

    if args.card:
        print(model_card(args.name, args.repo, args.to, args.licence))
        return
    print(publish(args.name, args.repo, to=args.to, licence=args.licence, private=args.private))
