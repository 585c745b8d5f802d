"""Adapters of any trainer, merged into a network: every tensor of the file is used, or named in an error."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidistill.interop.files import WEIGHTS, listed
from vidistill.interop.keys import State, bare, looks_like, ours, to_diffusers_key
from vidistill.io import read_json

CONFIG = "adapter_config.json"
KOHYA = "ss_network_alpha"  # of the header of kohya's files: the alpha of layers that come without one
PEFT = "base_model.model."  # what peft puts before every name
FLATTENED = re.compile(r"(lora_unet|lora_transformer|lycoris)_+(.*)")  # kohya: dots of a module's name are underscores

# What may stand behind a layer's name -> the part of the adapter it is; `name`: peft's name of the adapter.
NAMED = r"(?:\.(?P<name>[^.]+))?"
PARTS = {
    "down": rf"\.lora[_.](?:A|down){NAMED}\.weight",
    "up": rf"\.lora[_.](?:B|up){NAMED}\.weight",
    "up_bias": rf"\.lora[_.](?:B|up){NAMED}\.bias",
    "magnitude": rf"(?:\.lora_magnitude_vector{NAMED}(?:\.weight)?|\.dora_scale)",
    "alpha": r"\.(?:lora_)?alpha",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    "diff_m": r"\.diff_m",
}
PATTERNS = {part: re.compile(rf"(?P<layer>.+?){pattern}") for part, pattern in PARTS.items()}
WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)  # numbers that trainers store an alpha in
FULL = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)(?=\.)")
OTHER = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "lora_mid": "LoCon", "lora_embedding_": "LoRA of embeddings"}
# Settings of peft that change what an adapter computes -> the values under which it is W + s B A and no more.
PLAIN = {
    "peft_type": ("LORA", None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}


@dataclass
class Layer:
    """What an adapter holds for one layer: tensors by part, and the key of each."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was published, read from `file`. `config`: peft's settings, empty if there were none.

    `alpha`: where neither the file nor the settings say one; `alpha_is_rank`: they never do, and the rank is meant.
    """

    state: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "LoRA"
    file: Path | None = None
    alpha: float | None = None
    alpha_is_rank: bool = False

    def card(self) -> dict[str, Any]:
        """The name of its file and the SHA-256 of it."""
        if self.file is None:
            return {"file": self.source}
        with self.file.open("rb") as file:
            return {"file": self.file.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_alpha(key: str) -> bool:
    """Whether the tensor of a key is the alpha of a layer."""
    return PATTERNS["alpha"].fullmatch(key) is not None


def adapter_file(path: Path) -> Path:
    """The file with the weights of an adapter, which may be named by its folder."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    own = [file for file in files if file.stem == "adapter_model"] or files
    if len(own) != 1:
        raise ValueError(f"{path} holds {listed([f.name for f in own]) or 'no weights'}: name the file of the LoRA")
    return own[0]


def adapter_config(file: Path) -> dict[str, Any]:
    """Settings of the adapter in `file`: peft's, beside it or in its header, where diffusers keeps them, or kohya's."""
    beside = file.parent / CONFIG
    if file.stem == "adapter_model" and beside.is_file():
        found: Any = read_json(beside)
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                written = opened.metadata() or {}
            header = json.loads(written.get("lora_adapter_metadata", "{}"))
            found = {key.removeprefix("transformer."): value for key, value in header.items()}
        except (SafetensorError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: lora_adapter_metadata in its header is damaged: {error}") from error
        found |= kohya_alpha(file, written.get(KOHYA))
    else:
        found = {}
    if not isinstance(found, dict):
        raise ValueError(f"{beside} is damaged: it holds no dictionary; download it again")
    for name, plain in PLAIN.items():
        if found.get(name, plain[-1]) not in plain:
            raise ValueError(f"{file}: {name} {found[name]!r} is not supported; allowed: {plain[:-1] or 'none'}")
    check_scales(file, found)
    return found


def kohya_alpha(file: Path, said: str | None) -> dict[str, float]:
    """The alpha in the header of a file of kohya's, if there is one; ValueError for one that is no number."""
    if said is None or said == "None":
        return {}
    try:
        return {KOHYA: float(said)}
    except ValueError as error:
        raise ValueError(f"{file}: {KOHYA} in its header is {said!r}, not a number") from error


def check_scales(file: Path, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless what peft's settings say of scales are numbers, and patterns with numbers."""
    numbers = {name: config[name] for name in ("r", "lora_alpha") if name in config}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"{file}: {name} is {patterns!r}, not a dictionary of layers and numbers")
        numbers |= {f"{name} of {key!r}": value for key, value in patterns.items()}
        for key in patterns:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{file}: {name} {key!r} is no regular expression: {error}") from error
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{file}: {name} is {value!r}, not a number")


def layers_of(adapter: Adapter, base: State) -> tuple[dict[str, Layer], dict[str, tuple[str, Tensor]]]:
    """What an adapter holds: parts of each layer, and whole parameters (our name -> its key and tensor).

    Raises ValueError for tensors that are neither, several adapters in a file, and two keys that mean one thing.
    """
    layers: dict[str, Layer] = {}
    whole: dict[str, tuple[str, Tensor]] = {}
    flat, names, unknown = flattened(base), set[str | None](), list[str]()
    for key, x in adapter.state.items():
        part, found = next(((p, m) for p, pattern in PATTERNS.items() if (m := pattern.fullmatch(key))), (None, None))
        if part is None or found is None:
            name = ours(FULL.sub("", key))
            if name not in base:
                unknown.append(key)
            elif name in whole:
                raise ValueError(f"{adapter.source}: {whole[name][0]} and {key} mean the same parameter")
            else:
                whole[name] = key, x
            continue
        if "name" in found.groupdict() and part != "magnitude":
            names.add(found["name"])
        name = layer_name(found["layer"], flat)
        layer = layers.setdefault(name, Layer())
        if part in layer.parts:
            raise ValueError(f"{adapter.source}: {layer.keys[part]} and {key} mean the same part of {name}")
        layer.parts[part], layer.keys[part] = x, key
    if unknown:
        raise ValueError(f"{adapter.source} holds what is no LoRA of this network: {listed(unknown)}{kind_of(unknown)}")
    if len(names) > 1:
        raise ValueError(
            f"{adapter.source} holds several adapters, {listed(sorted(map(str, names)))}: save the one to merge alone"
        )
    if not layers and not whole:
        raise ValueError(f"{adapter.source} is no LoRA: it holds no tensors")
    return layers, whole


def kind_of(keys: list[str]) -> str:
    """What kind of adapter has such keys, if it is a known one that is not merged."""
    kinds = sorted({kind for key in keys for sign, kind in OTHER.items() if sign in key})
    if any(key.startswith("lora_te") or key.startswith("text_encoder.") for key in keys):
        kinds.append("an adapter of the text encoder")
    return f"; it looks like {' and '.join(kinds)}, which is not merged" if kinds else ""


def flattened(base: State) -> dict[str, str]:
    """Names of the modules of a network with underscores for dots, in both namings -> our name."""
    modules = {key.rpartition(".")[0] for key in base}
    theirs = {to_diffusers_key(f"{module}.weight").removesuffix(".weight"): module for module in modules}
    named = {**theirs, **{module: module for module in modules}}
    return {name.replace(".", "_"): module for name, module in named.items()}


def layer_name(written: str, flat: Mapping[str, str]) -> str:
    """Our name of a layer as any trainer writes it; one that is not known stays as it is."""
    if found := FLATTENED.fullmatch(written):
        return flat.get(found[2], written)
    return ours(FULL.sub("", written) + ".weight").removesuffix(".weight")


def scale_of(adapter: Adapter, layer: Layer, name: str) -> float:
    """What B A of a layer is multiplied by: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

    Where no layer says one it is that of kohya's header, if layers are called as kohya calls them: whoever renames them
    keeps the header and has multiplied it in (musubi-tuner's convert_lora.py). Where nothing says alpha it is the rank,
    as diffusers, ComfyUI, DiffSynth and LightX2V read such files; peft's own never go without. Source: LoRA 2106.09685,
    rsLoRA 2312.03732.
    """
    config, rank, alpha = adapter.config, layer.parts["down"].shape[0], adapter.alpha
    if (own := layer.parts.get("alpha")) is not None and own.numel() != 1:
        raise ValueError(f"{adapter.source}: {layer.keys['alpha']} is {list(own.shape)}, alpha is one number")
    said = [] if own is None else [float(own)]
    if "lora_alpha" in config:
        written = bare(layer.keys["down"]).partition(".lora")[0]
        said.append(float(patterned(config.get("alpha_pattern") or {}, written, config["lora_alpha"])))
        wanted = patterned(config.get("rank_pattern") or {}, written, config.get("r", rank))
        if wanted != rank:
            raise ValueError(f"{adapter.source}: {name} has rank {rank}, {CONFIG} says {wanted}")
    if not said and KOHYA in config and FLATTENED.match(layer.keys["down"]):
        said.append(config[KOHYA])
    if len({*said, *([] if alpha is None else [alpha])}) > 1:
        raise ValueError(
            f"{adapter.source}: alpha of {name} is {' and '.join(map(str, said))} there"
            + ("" if alpha is None else f", and --lora-alpha is {alpha:g}: leave that out")
        )
    if not said and alpha is None and not adapter.alpha_is_rank and layer.keys["down"].startswith(PEFT):
        raise ValueError(
            f"{adapter.source} is peft's, but {CONFIG} does not lie beside it: say its alpha (--lora-alpha)"
        )
    value = said[0] if said else rank if alpha is None else alpha
    if not 0 < value < math.inf:
        raise ValueError(f"{adapter.source}: alpha of {name} is {value:g}; it must be a number above 0")
    return value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def patterned(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that a layer's name ends with, as peft chooses it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def merge_lora(base: State, adapter: Adapter) -> dict[str, Tensor]:
    """`base` (our names) with an adapter merged: whole parameters first, then W + s B A and what else it holds.

    Sums are taken in float32 and stored in the precision of `base`. Raises ValueError, with file and layer, for every
    tensor that is not used and every shape that does not fit.
    """
    if bad := [key for key, x in adapter.state.items() if not x.float().isfinite().all()]:
        raise ValueError(f"{adapter.source} holds numbers that are not finite: {listed(bad)}; download it again")
    layers, whole = layers_of(adapter, base)
    merged = dict(base)
    for name, (key, x) in whole.items():
        merged[name] = fitting(adapter, key, x, base[name]).to(base[name].dtype)
    for name, layer in layers.items():
        for target, value in moved(merged, adapter, layer, name):
            merged[target] = value.to(base[target].dtype)
            if not merged[target].isfinite().all():
                raise ValueError(f"{adapter.source}: with it {target} is not finite in {base[target].dtype}")
    return merged


def moved(merged: State, adapter: Adapter, layer: Layer, name: str) -> Iterator[tuple[str, Tensor]]:
    """New values of the parameters of one layer."""
    parts, keys = layer.parts, layer.keys
    targets = {"down": f"{name}.weight", "diff": f"{name}.weight", "up_bias": f"{name}.bias"}
    targets |= {"diff_b": f"{name}.bias", "diff_m": f"{name}.modulation"}
    if absent := [keys[part] for part, target in targets.items() if part in parts and target not in merged]:
        raise ValueError(
            f"{adapter.source} adapts {listed(absent)}, which the base checkpoint does not have{kind_of(absent)}; "
            f"{looks_like(merged)}"
        )
    if ("down" in parts) != ("up" in parts):
        raise ValueError(f"{adapter.source}: {listed(keys.values())} is half a LoRA: its other matrix is missing")
    if "down" not in parts and (left := [keys[p] for p in ("alpha", "magnitude", "up_bias") if p in parts]):
        raise ValueError(f"{adapter.source}: {listed(left)} belongs to a LoRA of {name} that is not there")
    if adapter.config.get("use_dora") and "down" in parts and "magnitude" not in parts:
        raise ValueError(f"{adapter.source}: {CONFIG} says use_dora, but {name} has no magnitude")
    for part in ("diff", "diff_b", "diff_m"):
        if part in parts:
            old = merged[targets[part]]
            yield targets[part], old.float() + fitting(adapter, keys[part], parts[part], old).float()
    if "down" not in parts:
        return
    if "diff" in parts:
        raise ValueError(f"{adapter.source}: {keys['diff']} and {keys['down']} both move {name}.weight")
    check_matrices(adapter, layer, name, merged[f"{name}.weight"])
    scale = scale_of(adapter, layer, name)
    yield f"{name}.weight", adapted(adapter, layer, merged[f"{name}.weight"], scale)
    if "up_bias" in parts:
        old = merged[f"{name}.bias"]
        yield f"{name}.bias", old.float() + scale * fitting(adapter, keys["up_bias"], parts["up_bias"], old).float()


def check_matrices(adapter: Adapter, layer: Layer, name: str, weight: Tensor) -> None:
    """Raise ValueError unless B A has the shape of the weight; axes of a convolution are laid flat."""
    up, down = list(layer.parts["up"].shape), list(layer.parts["down"].shape)
    fits = min(len(up), len(down)) > 1 and down[0] > 0 and [up[0], math.prod(down[1:])] == list(weight.shape)
    if not fits or math.prod(up[1:]) != down[0]:
        raise ValueError(
            f"{adapter.source}: {name} has a LoRA of {up} times {down}, its weight is {list(weight.shape)}; the "
            "adapter was made for another network"
        )


def adapted(adapter: Adapter, layer: Layer, weight: Tensor, scale: float) -> Tensor:
    """W + s B A (float32), its rows (or columns) brought to the norms of a DoRA. Source: DoRA 2402.09353, eq. 5."""
    up, down = layer.parts["up"].float().flatten(1), layer.parts["down"].float().flatten(1)
    new = weight.float() + scale * up @ down
    if "magnitude" not in layer.parts:
        return new
    size = layer.parts["magnitude"].float()
    columns = size.ndim == 2 and size.shape == (1, weight.shape[1])
    if not columns and size.numel() != weight.shape[0]:
        raise ValueError(
            f"{adapter.source}: {layer.keys['magnitude']} is {list(size.shape)}, the weight {list(weight.shape)}"
        )
    norm = new.norm(dim=0 if columns else 1, keepdim=True)
    return new * size.reshape(norm.shape) / norm


def fitting(adapter: Adapter, key: str, x: Tensor, old: Tensor) -> Tensor:
    """`x` in the shape of the parameter it is for; only the axes of a patch convolution may be laid flat."""
    if x.shape != old.shape and (x.ndim != 5 or x.flatten(1).shape != old.shape):
        raise ValueError(f"{adapter.source}: {key} is {list(x.shape)}, the parameter {list(old.shape)}")
    return x.reshape(old.shape)
