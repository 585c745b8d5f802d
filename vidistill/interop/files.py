"""Weight files and folders of other people, recognised by what is in them and not by their names."""

import argparse
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidistill.io import read_json

INDEX = ".index.json"
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
LONGEST_PICKLE = 32 * 2**20  # bytes of the dictionary in a .pt file, without its tensors: a 14B network needs 0.2 MB
LONGEST_HEADER = 100 * 2**20  # bytes, safetensors' own bound
HEAD = 512  # bytes that tell a format

# First bytes -> what such a file is, and what to do with it.
FOREIGN = (
    (b"version https://git-lfs", "a git-lfs pointer and not the file: fetch it with `git lfs pull`, or download it"),
    (b"gguf", "a GGUF file of quantised weights: download the weights in bf16, fp16 or fp32"),
    (b"\x89hdf", "an HDF5 file: save its tensors as .safetensors"),
    (b"\x93numpy", "a numpy array: save the weights as .safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"rar!", "a RAR archive: unpack it first"),
    (b"<", "a web page and not the file: the download needs a login, or another address"),
    (b"{", "JSON text: give the weights it belongs to"),
)


def read_file(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """What a file or a folder of weights holds: tensors, possibly in nested dictionaries; mapped where it can be.

    A folder is read through its index, else as all its safetensors files, else as its only pickle; of a folder in
    diffusers' layout, `transformer` is read. Raises ValueError that says what was found instead.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, allow_pickle=allow_pickle)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if path.name.endswith(INDEX):
        return read_index(path, allow_pickle=allow_pickle)
    if (shard := SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        raise ValueError(f"{path} is shard {int(shard[2])} of {int(shard[3])}: give the folder that holds them all")
    return read_one(path, allow_pickle=allow_pickle)


def read_one(path: Path, *, allow_pickle: bool = False) -> Any:
    """What a single file holds, by its first bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not size:
        raise ValueError(f"{path} is empty: download it again")
    if int.from_bytes(head[:8], "little") <= LONGEST_HEADER and head[8:9] == b"{":
        return read_safetensors(path)
    if head[:2] == b"PK":
        check_zip(path)
        return read_pickle(path, allow_pickle, mmap=True)
    if head[:1] == b"\x80" or head[257:262] == b"ustar":  # what torch wrote before 1.6, and before 0.1.10
        check_memory(path, size)
        return read_pickle(path, allow_pickle, mmap=False)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if found := next((what for start, what in FOREIGN if text.startswith(start)), None):
        raise ValueError(f"{path} is {found}")
    raise ValueError(
        f"{path} is neither a safetensors file nor one that torch saved, or it is damaged or cut short: its first "
        f"bytes are {head[:8]!r}"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped; ValueError for a damaged one and for a checkpoint of ours."""
    try:
        with safe_open(path, framework="pt") as file:
            if "vidistill" in (file.metadata() or {}):
                raise ValueError(f"{path} is one of our own checkpoints: it is used as it is, by its name")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def check_memory(path: Path, size: int) -> None:
    """Raise ValueError unless a file that cannot be mapped fits into the memory of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"{path} is of torch before 1.6 and read whole: its {size:,} bytes are more than the {memory:,} of this "
            "machine; save it again as .safetensors where there are more"
        )


def check_zip(path: Path) -> None:
    """Raise ValueError unless a zip file is what torch saves: entries stored as they are, a dictionary of bounded size.

    A compressed entry may unfold to a thousand times its size while it is read, and torch writes none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    pickles = [entry for entry in entries if PurePosixPath(entry.filename).name == "data.pkl"]
    if len(pickles) != 1:
        names = [entry.filename for entry in entries[:3]]
        raise ValueError(f"{path} is a zip archive and nothing that torch saved: it holds {names}; unpack it first")
    packed = next((entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(
            f"{path} holds compressed or overlapping entries ({packed or 'overlapping'}): torch saves none"
        )
    if pickles[0].file_size > LONGEST_PICKLE:
        raise ValueError(
            f"{path} holds a dictionary of {pickles[0].file_size:,} bytes beside its tensors; at most "
            f"{LONGEST_PICKLE:,} are read"
        )


def read_pickle(path: Path, allow_pickle: bool, *, mmap: bool) -> Any:
    """What torch saved, weights only; settings kept as an argparse.Namespace may lie beside them."""
    if not allow_pickle:
        raise ValueError(f"{path} is a pickle and is not opened without --allow-pickle (it is then read weights-only)")
    named = path.suffix == ".safetensors"  # torch goes by that, so it is handed an open file, which it cannot map
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            source: Any = file if named else path
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and not named)
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"class '?([\w.]+)'?", str(error))
        if code:
            raise ValueError(
                f"{path} cannot be read weights-only: it holds a {code[1]}, which is code and no tensor; save its "
                "weights alone, as .safetensors"
            ) from error
        raise ValueError(
            f"{path} cannot be read weights-only, it is damaged or cut short: {str(error).partition(chr(10))[0]}"
        ) from error
    larger = next((x for x in tensors_in(found) if x.nbytes > x.untyped_storage().nbytes()), None)
    if larger is not None:
        raise ValueError(
            f"{path} holds a tensor of {larger.nbytes:,} bytes that repeats {larger.untyped_storage().nbytes():,} of "
            "them: save its weights whole"
        )
    return found


def tensors_in(found: Any) -> Iterator[Tensor]:
    """All dense tensors in nested dictionaries and lists, which may hold each other."""
    todo, seen = [found], set[int]()
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor) and one.layout == torch.strided:
            yield one
        elif isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, list | tuple):
            todo += one


def read_folder(folder: Path, *, allow_pickle: bool = False) -> Any:
    """What the weights of a folder are together; every tensor comes from exactly one file."""
    if any(folder.glob("*.distcp")) or (folder / ".metadata").is_file():
        raise ValueError(
            f"{folder} is a sharded training state (torch.distributed.checkpoint); make one file of it: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt"
        )
    if any(folder.glob("*_optim_states.pt")) or any(folder.glob("zero_pp_rank_*")):
        raise ValueError(f"{folder} is a DeepSpeed training state: make one file of it with its zero_to_fp32.py")
    indexes = sorted(folder.glob(f"*{INDEX}"))
    indexes = [path for path in indexes if ".safetensors" in path.name] or indexes
    if len(indexes) > 1:
        raise ValueError(f"{folder} holds several indexes, {listed(path.name for path in indexes)}: name one of them")
    if indexes:
        return read_index(indexes[0], allow_pickle=allow_pickle)
    files = sorted(folder.glob("*.safetensors"))
    files = files or sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    if not files and (folder / "transformer").is_dir():
        if (folder / "transformer_2").is_dir():
            raise ValueError(f"{folder} holds two networks, transformer and transformer_2: give the folder of one")
        return read_folder(folder / "transformer", allow_pickle=allow_pickle)
    if not files:
        raise ValueError(
            f"{folder} lacks safetensors files or others of {', '.join(WEIGHTS)}: the download is incomplete"
        )
    if len(files) > 1 and files[0].suffix != ".safetensors":
        raise ValueError(f"{folder} holds several files, {listed(path.name for path in files)}: name the one to read")
    check_complete(folder, files)
    return together({path.name: read_one(path, allow_pickle=allow_pickle) for path in files}, str(folder))


def folder_config(path: str | Path) -> dict[str, Any]:
    """The config.json of a folder, or of its `transformer` in diffusers' layout; empty without one."""
    for folder in (Path(path), Path(path) / "transformer"):
        file = folder / "config.json"
        if file.is_file():
            said = read_json(file)
            if not isinstance(said, dict):
                raise ValueError(f"{file} is damaged: it holds no dictionary; download it again")
            return said
    return {}


def check_complete(folder: Path, files: Iterable[Path]) -> None:
    """Raise ValueError if the names of shards say that there are more of them."""
    found = [match for match in (SHARD.fullmatch(path.name) for path in files) if match]
    wanted = {f"{m[1]}-{i:05d}-of-{m[3]}{m[4]}" for m in found for i in range(1, min(int(m[3]), 10_000) + 1)}
    if absent := sorted(wanted - {match[0] for match in found}):
        raise ValueError(f"{folder} lacks {listed(absent)}: the download is incomplete")


def read_index(index: Path, *, allow_pickle: bool = False) -> Any:
    """The tensors that an index lists, each from the file it names; files outside its folder are refused."""
    try:
        table: Any = read_json(index)["weight_map"]
        names = sorted(set(table.values()))
        outside = [name for name in names if PurePosixPath(name).name != name or "\\" in name or name in ("", "..")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it holds no weight_map ({error!r}); download it again") from error
    if outside:
        raise ValueError(f"{index} names files outside its folder: {listed(outside)}; they are not read")
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise ValueError(f"{index.parent} lacks {listed(absent)}: the download is incomplete")
    if not names:
        raise ValueError(f"{index} is damaged: its weight_map is empty; download it again")
    parts = {name: read_one(index.parent / name, allow_pickle=allow_pickle) for name in names}
    state = together(parts, str(index))
    if stray := sorted(table.keys() - state.keys()) or sorted(state.keys() - table.keys()):
        raise ValueError(f"{index} and its files do not hold the same tensors; in one of them alone: {listed(stray)}")
    if moved := [key for key, name in table.items() if key not in parts[name]]:
        raise ValueError(f"{index} says another file for {listed(moved)}; download it again")
    return state


def together(parts: Mapping[str, Any], source: str) -> Any:
    """One dictionary of what several files hold; a name in two of them is an error."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    state: dict[str, Any] = {}
    for name, part in parts.items():
        if not isinstance(part, Mapping):
            raise ValueError(f"{source}: {name} holds a {type(part).__name__}, not a dictionary of tensors")
        if twice := state.keys() & part.keys():
            raise ValueError(f"{source}: {name} holds {listed(sorted(map(str, twice)))}, as a file before it does")
        state.update(part)
    return state


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of `names`, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
