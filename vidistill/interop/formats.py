"""Reading published student files, and writing them back bit for bit."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidistill.interop.families import NON_COMMERCIAL, Family, family
from vidistill.interop.keys import (
    State,
    bare,
    build,
    infer_config,
    looks_like,
    original_key,
    ours,
    to_original,
    to_ours,
)
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig

log = logging.getLogger("vidistill")

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"


@dataclass(frozen=True)
class Published:
    """A published student: weights under our names, and what is needed to write the file again (this entry of it).

    `names`: our parameter -> its full name in the file; `entry`: the dictionary in the file that held it ("": none).
    """

    family: Family
    config: DiTConfig
    state: dict[str, Tensor]
    names: dict[str, str]
    entry: str
    source: str

    def net(self) -> VideoDiT:
        """The network; it owns the tensors of `state`. Raises ValueError with every key that does not fit."""
        return build(self.state, self.config, self.source)

    def card(self) -> dict[str, Any]:
        """Where the weights come from and under which licence; warns if it is not a free one."""
        bound = [self.family.source] if self.family.licence == NON_COMMERCIAL else []
        bound += [parent for parent in self.family.ancestry if NON_COMMERCIAL in parent]
        if bound:
            log.warning("%s: %s; what you derive from it is bound too", ", ".join(bound), NON_COMMERCIAL)
        return {
            "source": self.family.source,
            "licence": self.family.licence,
            "ancestry": list(self.family.ancestry),
            "file": Path(self.source).name,
            "entry": self.entry,
            "notes": self.family.notes,
        }


def read_student(
    path: str | Path,
    name: str,
    *,
    allow_pickle: bool = False,
    heads: int = 0,
    entry: str | None = None,
    lora: str | Path | None = None,
) -> Published:
    """The student of family `name` in a .safetensors file, a folder of shards, or a .pt file.

    `heads` 0: as in all Wan networks. `entry`: which dictionary of the file to read (default: the family's order, the
    averaged weights first). `lora`: a LoRA file that is merged. Raises ValueError for unknown families, refused
    pickles, and files that hold something else; missing, unexpected and mis-shaped keys are listed.
    """
    kind = family(name)
    flat, chosen = pick_entry(read_file(path, allow_pickle=allow_pickle), kind, entry, str(path))
    if lora is not None:
        adapter, _ = pick_entry(read_file(lora, allow_pickle=allow_pickle), kind, "generator_lora", str(lora))
        flat = merge_lora(flat, adapter)
    try:
        config = infer_config(flat, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path} is no {name} student: {error}") from error
    published = Published(kind, config, to_ours(flat), {ours(key): key for key in flat}, chosen, str(path))
    check_family(published)
    published.net()
    return published


def check_family(published: Published) -> None:
    """Raise ValueError if the weights are visibly of another family."""
    audio, wants = "hidden" in published.config.sites, published.family.pinned_first_frame
    if audio != wants:
        raise ValueError(
            f"{published.source} has {'' if audio else 'no '}audio layers and {published.config.extra_channels} extra "
            f"input channels: that is not family {published.family.name!r}; {looks_like(published.names.values())}"
        )


def read_file(path: str | Path, *, allow_pickle: bool = False) -> Any:
    """What a file (or folder of shards) holds: tensors, possibly in nested dictionaries; mapped, not copied."""
    path = Path(path)
    if path.is_dir():
        return read_shards(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    if path.name.endswith(INDEX):
        return read_shards(path.parent, path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix not in PICKLED:
        raise ValueError(f"{path} has an unknown suffix; known: .safetensors, {', '.join(PICKLED)}, a folder of shards")
    if not allow_pickle:
        raise ValueError(f"{path} is a pickle and is not opened without --allow-pickle (it is then read weights-only)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read weights-only: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def read_shards(folder: Path, index: Path | None = None) -> dict[str, Tensor]:
    """Tensors of all shards of a folder; with an index, exactly those it lists."""
    index = index or next(iter(sorted(folder.glob(f"*{INDEX}"))), None)
    files = sorted(folder.glob("*.safetensors"))
    if index is not None:
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged: it holds no weight_map ({error!r}); download it again") from error
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise ValueError(f"{folder} lacks {', '.join(absent) or 'safetensors files'}: the download is incomplete")
    return {name: x for file in files for name, x in read_safetensors(file).items()}


def pick_entry(content: Any, kind: Family, entry: str | None, source: str) -> tuple[dict[str, Tensor], str]:
    """Flat tensors of the dictionary to read, and its name ("": the file itself)."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a dictionary of tensors")
    nested = [key for key, value in content.items() if isinstance(value, Mapping)]
    wanted = (entry,) if entry else kind.entry
    chosen = next((name for name in wanted if name in nested), "")
    if entry and not chosen and nested:
        raise ValueError(f"{source} has no entry {entry!r}; it has {nested}")
    if nested and not chosen:
        raise ValueError(f"{source} holds {nested}; none of {list(wanted)} is there. Name the entry to read")
    inner = content[chosen] if chosen else content
    flat = {key: x for key, x in inner.items() if isinstance(x, Tensor)}
    if not flat:
        raise ValueError(f"{source} holds no tensors{f' under {chosen!r}' if chosen else ''}; {looks_like(flat)}")
    return flat, chosen


def lora_pairs(adapter: State) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(bare parameter name, B, A) of every layer of a peft LoRA."""
    pattern = re.compile(r"^(.*)\.lora_(A|B)(?:\.[^.]+)?\.weight$")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, x in adapter.items():
        if found := pattern.match(key):
            halves.setdefault(bare(found.group(1)) + ".weight", {})[found.group(2)] = x
    for name, half in halves.items():
        if set(half) != {"A", "B"}:
            raise ValueError(f"the LoRA of {name} lacks its {'B' if 'A' in half else 'A'} half")
        yield name, half["B"], half["A"]


def merge_lora(base: State, adapter: State, alpha: float | None = None) -> dict[str, Tensor]:
    """`base` with W + (alpha / rank) B A for every adapted layer; `alpha` None: the rank (LongLive's choice)."""
    merged, full = dict(base), {bare(key): key for key in base}
    pairs = list(lora_pairs(adapter))
    if not pairs:
        raise ValueError(f"this is no LoRA: {looks_like(adapter)}")
    for name, up, down in pairs:
        if name not in full:
            raise ValueError(f"the LoRA adapts {name}, which the base checkpoint does not have; {looks_like(base)}")
        weight = merged[full[name]]
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        merged[full[name]] = (weight.float() + scale * up.float() @ down.float()).to(weight.dtype)
    return merged


def write_student(path: str | Path, state: State, published: Published) -> None:
    """Write `state` (our names) as a file of the family's own format: same names, entry, shapes and dtypes."""
    path = Path(path)
    original = to_original(state, published.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {original_key(key): name for key, name in published.names.items()}
    if style_is_diffusers(published):
        original = to_original(state, published.config, "diffusers")
        names = {bare(name): name for name in published.names.values()}
    flat = {names.get(key, key): x.detach().contiguous().cpu() for key, x in original.items()}
    if path.suffix != ".safetensors" and path.suffix not in PICKLED:
        raise ValueError(f"{path} has an unknown suffix; choose .safetensors or .pt")
    partial = path.with_name(f"{path.name}.tmp")  # a file that was there stays until this one is whole
    if path.suffix == ".safetensors":
        save_file(flat, partial)
    else:
        torch.save({published.entry: flat} if published.entry else flat, partial)
    os.replace(partial, path)


def style_is_diffusers(published: Published) -> bool:
    return any(".attn1." in name for name in published.names.values())
