"""Which videos there are to import, and what lies beside them: captions, actions, poses."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from vidistill.data.importers.decode import VIDEOS
from vidistill.data.shards import DataError
from vidistill.io import PICTURES, natural, read_text

CAPTIONS = ".txt"
ACTIONS = (".actions.csv", ".actions.jsonl")
POSES, INTRINSICS = ".poses.npy", ".intrinsics.npy"
SIDECARS = (*ACTIONS, POSES, INTRINSICS)
PATH_COLUMNS = ("path", "video", "file", "file_name", "video_path")
CAPTION_COLUMNS = ("caption", "cap", "text", "prompt")


@dataclass(frozen=True)
class Item:
    """A video to import: its name in reports, where it is (a file, or a folder of pictures), what it shows in words."""

    name: str
    path: Path
    caption: str | None = None

    def beside(self, suffixes: Iterable[str]) -> Path | None:
        """The file of the same name that ends in one of `suffixes`, if there is one."""
        stem = self.path.name if self.path.is_dir() else self.path.stem
        found = (self.path.with_name(stem + suffix) for suffix in suffixes)
        return next((p for p in found if p.is_file()), None)


@dataclass(frozen=True)
class Listing:
    """Items in the order of their names, and files that belong to none of them with what they lack."""

    items: tuple[Item, ...]
    strays: Mapping[str, str]


def list_videos(source: Path) -> Listing:
    """What there is to import in a folder, or in a list (.csv, .jsonl, .json); DataError for none."""
    if source.is_dir():
        found = in_folder(source)
    elif source.is_file():
        found = Listing(tuple(in_list(source)), {})
    else:
        raise FileNotFoundError(f"--from {source}: there is no such folder or list; name one that is there")
    if not found.items:
        raise DataError(f"--from {source} has no videos; what is read are {', '.join(VIDEOS)} and folders of pictures")
    return found


def in_folder(source: Path) -> Listing:
    """Videos anywhere below a folder; a folder that holds pictures and no videos is one itself."""
    files = sorted(
        (p for p in source.rglob("*") if p.is_file() and not hidden(p, source)), key=lambda p: natural(str(p))
    )
    videos = [p for p in files if p.suffix.lower() in VIDEOS]
    folders = {p.parent for p in files if p.suffix.lower() in PICTURES} - {p.parent for p in videos}
    paths = sorted([*videos, *folders], key=lambda p: natural(str(p)))
    items = [Item(shown(p.relative_to(source)) if p != source else shown(p.name), p) for p in paths]
    claimed = {p for item in items for suffix in (CAPTIONS, *SIDECARS) if (p := item.beside([suffix]))}
    captioned = tuple(
        Item(item.name, item.path, read_caption(text) if (text := item.beside([CAPTIONS])) else None) for item in items
    )
    strays = {shown(p.relative_to(source)): lacks for p in files if p not in claimed and (lacks := stray(p))}
    return Listing(captioned, strays)


def shown(path: Path | str) -> str:
    """A name that can be written anywhere: bytes of it that are no UTF-8 are spelled out."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def hidden(path: Path, source: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(source).parts)


def stray(path: Path) -> str:
    """What a file that belongs to no video is; nothing for one that never would."""
    if path.name.endswith(SIDECARS):
        return "actions or poses without a video of the same name"
    return "a caption without a video of the same name" if path.suffix == CAPTIONS else ""


def read_caption(path: Path) -> str:
    return " ".join(read_text(path).split())


def in_list(source: Path) -> Iterator[Item]:
    """The videos that a list names, by paths relative to it (or to a folder `videos` beside it)."""
    readers = {".csv": csv_rows, ".jsonl": jsonl_rows, ".json": json_rows}
    if source.suffix.lower() not in readers:
        raise DataError(f"--from {source} is no list that can be read; name a folder, or a {', '.join(readers)} file")
    for number, row in readers[source.suffix.lower()](source):
        path = first_of(row, PATH_COLUMNS)
        if not isinstance(path, str) or not path.strip():
            raise DataError(f"{source}, row {number} names no video; columns for it are {', '.join(PATH_COLUMNS)}")
        caption = first_of(row, CAPTION_COLUMNS)
        caption = caption[0] if isinstance(caption, list) and caption else caption
        words = " ".join(str(caption).split()) if caption is not None else None
        yield Item(path, located(source.parent, path), words)


def located(folder: Path, path: str) -> Path:
    beside, inside = folder / path, folder / "videos" / path
    return inside if not beside.exists() and inside.exists() else beside


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value under the first of `names` that a row has, in any case of letters."""
    lowered = {str(key).strip().lower(): value for key, value in row.items()}
    return next((lowered[name] for name in names if lowered.get(name) not in (None, "")), None)


def csv_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield from enumerate(csv.DictReader(StringIO(read_text(source), newline="")), start=2)


def jsonl_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(source).split("\n"), start=1):
        if line.strip():
            yield number, checked(source, number, parsed(source, number, line))


def json_rows(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    rows = parsed(source, 1, read_text(source))
    if not isinstance(rows, list):
        raise DataError(f"{source} must hold a list of videos with captions, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield number, checked(source, number, row)


def parsed(source: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{source}, row {number} is not JSON ({error}); mend it") from error


def checked(source: Path, number: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{source}, row {number} must hold names and values, got {row!r}")
    return row
