"""Reading published student files, and writing them back bit for bit."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vidistill.interop.families import NON_COMMERCIAL, Family, family
from vidistill.interop.files import WEIGHTS, folder_config, listed, read_file
from vidistill.interop.keys import (
    build,
    infer_config,
    looks_like,
    original_key,
    our_names,
    to_original,
    to_ours,
)
from vidistill.interop.lora import WHOLE, Adapter, adapter_config, adapter_file, is_alpha, merge_lora
from vidistill.interop.quantized import read_up
from vidistill.io import write_atomic
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig

log = logging.getLogger("vidistill")

ADAPTERS = ("generator_lora", "lora", "state_dict", "model")  # entries of a file that hold an adapter


@dataclass(frozen=True)
class Published:
    """A published student: weights under our names, and what is needed to write the file again (this entry of it).

    `names`: our parameter -> its full name in the file; `entry`: the dictionary in the file that held it ("": none);
    `flat_patch`: the patch embedding is a linear layer there; `lora`: file and hash of what was merged into it.
    """

    family: Family
    config: DiTConfig
    state: dict[str, Tensor]
    names: dict[str, str]
    entry: str
    source: str
    flat_patch: bool = False
    lora: Mapping[str, Any] | None = None

    def net(self) -> VideoDiT:
        """The network; it owns the tensors of `state`. Raises ValueError with every key that does not fit."""
        return build(self.state, self.config, self.source)

    def card(self) -> dict[str, Any]:
        """Where the weights come from and under which licence; warns if it is not a free one."""
        bound = [self.family.source] if self.family.licence == NON_COMMERCIAL else []
        bound += [parent for parent in self.family.ancestry if NON_COMMERCIAL in parent]
        if bound:
            log.warning("%s: %s; what you derive from it is bound too", ", ".join(bound), NON_COMMERCIAL)
        card = {
            "source": self.family.source,
            "licence": self.family.licence,
            "ancestry": list(self.family.ancestry),
            "file": Path(self.source).name,
            "entry": self.entry,
            "checked": self.family.checked,
            "notes": self.family.notes,
        }
        return {**card, "lora": dict(self.lora)} if self.lora else card


def read_student(
    path: str | Path,
    kind: str | Family,
    *,
    allow_pickle: bool = False,
    heads: int = 0,
    entry: str | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
) -> Published:
    """The student of a family (or its name) in a file or a folder of any layout that `files` knows.

    `heads` 0: as in all Wan networks. `entry`: which dictionary of the file to read (default: the family's order, the
    averaged weights first). `lora`: a LoRA that is merged, `lora_alpha`: its alpha where nothing beside it says one.
    Raises ValueError for unknown families, refused pickles, and files that hold something else; missing, unexpected,
    doubled and mis-shaped keys are listed.
    """
    kind = family(kind) if isinstance(kind, str) else kind
    flat, chosen = pick_entry(read_file(path, allow_pickle=allow_pickle), kind.entry, entry, str(path))
    flat, said = read_up(flat, str(path)), folder_config(path)
    heads = heads or number_in(said, "num_attention_heads", path, 0) or number_in(said, "num_heads", path, 0)
    try:
        config, names = (
            replace(infer_config(flat, heads=heads), eps=number_in(said, "eps", path, DiTConfig.eps)),
            our_names(flat),
        )
    except ValueError as error:
        raise ValueError(f"{path} is no {kind.name} student: {error}") from error
    state, adapter = to_ours(flat), None
    if lora is not None:
        adapter = read_adapter(lora, kind, allow_pickle=allow_pickle, alpha=lora_alpha)
        state = merge_lora(state, adapter)
    flat_patch = flat[names["patch_embedding.weight"]].ndim == 2
    card = adapter.card() if adapter else None
    published = Published(kind, config, state, names, chosen, str(path), flat_patch, card)
    check_family(published, said)
    published.net()
    return published


def number_in(said: Mapping[str, Any], key: str, path: str | Path, default: Any) -> Any:
    """A number that a config.json says, of the kind of `default`; ValueError for another kind."""
    value = said.get(key, default)
    if type(value) is not type(default):
        raise ValueError(f"{path}: its config.json says {key} {value!r}, which is no {type(default).__name__}")
    return value


def read_adapter(path: str | Path, kind: Family, *, allow_pickle: bool = False, alpha: float | None = None) -> Adapter:
    """The adapter in a file, or in a folder that peft saved; raises ValueError if it holds none."""
    file = adapter_file(Path(path))
    state, _ = pick_entry(read_file(file, allow_pickle=allow_pickle), ADAPTERS, None, str(file))
    state = {key: x.float() if is_alpha(key) and x.dtype in WHOLE else x for key, x in state.items()}
    return Adapter(read_up(state, str(file)), adapter_config(file), str(file), file, alpha, kind.lora_alpha_is_rank)


# What a config.json of a causal student may say -> the field of its family.
SETTINGS = {
    "num_frames_per_block": "chunk",
    "num_frame_per_block": "chunk",
    "local_attn_size": "window",
    "sink_size": "sinks",
}


def check_family(published: Published, said: Mapping[str, Any]) -> None:
    """Raise ValueError if the weights, or the config.json beside them (`said`), are visibly of another family."""
    for key, name in SETTINGS.items():
        own = getattr(published.family, name)
        if said.get(key, own) != own:
            raise ValueError(
                f"{published.source}: its config.json says {key} {said[key]}, family {published.family.name!r} has "
                f"{own}: name another family, or say --{name} {said[key]}"
            )
    audio, wants = "hidden" in published.config.sites, published.family.pinned_first_frame
    if audio != wants:
        raise ValueError(
            f"{published.source} has {'' if audio else 'no '}audio layers and {published.config.extra_channels} extra "
            f"input channels: that is not family {published.family.name!r}; {looks_like(published.names.values())}"
        )


def pick_entry(content: Any, entries: tuple[str, ...], entry: str | None, source: str) -> tuple[dict[str, Tensor], str]:
    """Flat tensors of the dictionary to read, and its name ("": the file itself); the others are named in the log."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a dictionary of tensors")
    nested = [key for key, value in content.items() if isinstance(value, Mapping)]
    wanted = (entry,) if entry else entries
    chosen = next((name for name in wanted if name in nested), "")
    if entry and not chosen:
        raise ValueError(f"{source} has no entry {entry!r}; it has {nested or 'no entries, only tensors'}")
    if nested and not chosen:
        raise ValueError(f"{source} holds {nested}; none of {list(wanted)} is there. Name the entry to read")
    inner = content[chosen] if chosen else content
    if chosen and (left := [str(key) for key in content if key != chosen]):
        log.info("%s: %s is read, and not %s", source, chosen, listed(left))
    our_names(inner, source)
    flat = {key: x for key, x in inner.items() if isinstance(x, Tensor)}
    if not flat:
        held = f"it holds {listed(map(repr, inner))}" if inner else looks_like(flat)
        raise ValueError(f"{source} holds no tensors{f' under {chosen!r}' if chosen else ''}; {held}")
    if other := [f"{key} ({type(x).__name__})" for key, x in inner.items() if key not in flat]:
        raise ValueError(f"{source} holds what is no tensor among its weights: {listed(other)}; save the weights alone")
    if odd := [f"{key} ({what})" for key, x in flat.items() if (what := unusual(x))]:
        raise ValueError(f"{source} holds tensors that are not read: {listed(odd)}; save the weights as they are used")
    return flat, chosen


def unusual(x: Tensor) -> str:
    """What a tensor is if it does not hold a real number for each of its places, else nothing."""
    if x.layout != torch.strided:
        return "sparse"
    if x.is_meta:
        return "of the meta device, its numbers are elsewhere"
    if x.is_complex():
        return str(x.dtype).removeprefix("torch.")
    few = not x.is_quantized and x.untyped_storage().nbytes() < x.numel() * x.element_size()
    return "numbers that are repeated, which a small file may do without end" if few else ""


def write_student(path: str | Path, published: Published) -> None:
    """Write a student as a file of its family's own format: same names, entry, shapes and dtypes."""
    path = Path(path)
    if path.suffix not in WEIGHTS:
        raise ValueError(f"{path} has an unknown suffix; choose .safetensors or .pt")
    names = published.names
    shaped = dict(published.state) if published.flat_patch else to_original(published.state, published.config, "ours")
    flat = {names.get(key, original_key(key)): x.detach().contiguous().cpu() for key, x in shaped.items()}
    if path.suffix == ".safetensors":
        write_atomic(path, lambda p: save_file(flat, p))
    else:
        write_atomic(path, lambda p: torch.save({published.entry: flat} if published.entry else flat, p))
