"""Tensors on disk: safetensors with a header of ours and a checksum, checked by name, shape, type and value."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vidistill.io import MARK, write_atomic


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and why."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """One safetensors file whose header carries `info` as JSON, and a checksum of all."""
    flat = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    header = {MARK: json.dumps(info)}
    header["checksum"] = checksum(flat, header[MARK])

    def write(temporary: Path) -> None:
        save_file(flat, temporary, metadata=header)
        read_tensors(temporary)  # what is there stays until this one is known to be whole

    write_atomic(path, write)


def checksum(tensors: Mapping[str, Tensor], info: str = "") -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of the text beside them."""
    digest = hashlib.sha256(info.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {list(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info of a file written by `save_tensors`; CheckpointError if it is missing, damaged or foreign.

    sha256: the checksum of the tensors alone, where a record has one. Files of earlier versions carry none.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            info = json.loads(header.get(MARK, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = sha256 or header.get("checksum")
        if said and said != checksum(tensors, "" if sha256 else header.get(MARK, "")):
            raise ValueError("its checksum is another")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); restore it or train again") from error
    if info is None:
        raise CheckpointError(f"{path} holds no vidistill checkpoint; foreign files are read by `vidistill convert`")
    return tensors, info


def stored_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The precision that most numbers of a file are in."""
    sizes = Counter[torch.dtype]()
    for x in tensors.values():
        sizes[x.dtype] += x.numel() if x.is_floating_point() else 0
    return max(sizes, key=sizes.__getitem__)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load float tensors of any precision into `module`; CheckpointError lists what does not fit.

    A module on the meta device takes over tensors that have its precision already: nothing is copied.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    for label, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", sorted(wrong))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(f"{where}: {label} weights: {', '.join(names[:5])}{more}")
    check_values(own, tensors, where)
    empty = any(x.is_meta for x in own.values())
    module.load_state_dict({name: tensors[name].to(own[name].dtype) for name in own}, assign=empty)


def check_values(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError unless `tensors` are numbers as those of `own`, finite, and not all zero."""
    other = [n for n, x in own.items() if x.is_floating_point() != tensors[n].is_floating_point()]
    if other:
        raise CheckpointError(f"{where}: {other[0]} holds {tensors[other[0]].dtype}, not {own[other[0]].dtype}")
    exact = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    whole = {n: x if x.dtype in exact else x.float() for n, x in tensors.items() if n in own and x.numel()}
    ranges = {n: [float(end) for end in x.aminmax()] for n, x in whole.items()}
    bad = [name for name, ends in ranges.items() if not all(map(math.isfinite, ends))]
    if bad:
        raise CheckpointError(f"{where}: {', '.join(sorted(bad)[:5])} is not finite; restore it or train again")
    if ranges and not any(low or high for low, high in ranges.values()):
        raise CheckpointError(f"{where}: every weight is zero; restore it or train again")


def check_header(path: Path, net: nn.Module) -> None:
    """CheckpointError unless the file at `path` holds tensors of the names and shapes of `net`; none is read."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); restore it or train again") from error
    other = sorted(found.items() ^ {name: tuple(x.shape) for name, x in net.state_dict().items()}.items())
    if other:
        raise CheckpointError(f"{path} does not belong to its record: {other[0][0]} is of another size or missing")
