"""Checkpoints of ours in the layouts that others read, tensor for tensor, and back."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidistill import checkpoint
from vidistill.checkpoint import CheckpointError, with_extension
from vidistill.config import build as build_config
from vidistill.diffusion import LatentShape
from vidistill.interop.families import FAMILIES, Family
from vidistill.interop.files import WEIGHTS, read_folder
from vidistill.interop.formats import Published, write_student
from vidistill.interop.keys import build, infer_config, to_original, to_ours
from vidistill.io import check_folder, write_json
from vidistill.models.layers import DiTConfig
from vidistill.models.student import CausalStudent, StudentConfig

log = logging.getLogger("vidistill")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD = "vidistill.json"  # of a diffusers folder: all that its layout has no place for
WRAPPED = "model."  # what the Self Forcing family writes before every name
SHARD_BYTES = 10 * 10**9  # as diffusers cuts them
FREE = ("checkpoint", "image_tokens")  # fields of a network that are no part of a published layout


@dataclass(frozen=True)
class Exported:
    """A checkpoint of ours as it lies on disk: its record, and its network's tensors under our names."""

    name: str
    record: dict[str, Any]
    config: DiTConfig
    state: dict[str, Tensor]


def read_ours(name: str | Path, dtype: torch.dtype | None = None) -> Exported:
    """A student or teacher of ours, its floating-point tensors in `dtype` (None: as stored); nothing is computed."""
    path = checkpoint.locate(name)
    record = checkpoint.read_record(path)
    if record["kind"] == "codec":
        raise CheckpointError(f"{name} is a codec: students and teachers can be exported")
    with torch.device("meta"):
        net = checkpoint.rebuild(record, f"{path}.json")
    config = net.net.cfg if isinstance(net, CausalStudent) else net.cfg
    tensors = checkpoint.read_weights(path, record)
    prefix = "net." if isinstance(net, CausalStudent) else ""
    state = {
        key.removeprefix(prefix): x.to(dtype) if dtype and x.is_floating_point() else x for key, x in tensors.items()
    }
    return Exported(path.name, record, config, state)


def export_as(name: str | Path, to: str, out: str | Path | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write a checkpoint of ours in a layout of LAYOUTS; returns where.

    `out` None: a name in the current folder. `dtype` None: every tensor in the precision it has. Raises ValueError,
    before anything is written, for a network that the layout has no names for and for a place that is taken.
    """
    if to not in LAYOUTS:
        raise ValueError(f"--to {to!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    ending, write = LAYOUTS[to]
    path = Path(out) if out else Path(f"{checkpoint.locate(name).name}-{to}{ending}")
    if to == "self-forcing" and path.suffix not in WEIGHTS:
        raise ValueError(f"--out {path}: let its name end in {' or '.join(WEIGHTS)}")
    taken = [p for p in (path, with_extension(path, ".json"), with_extension(path, ".safetensors")) if p.exists()]
    if taken:
        raise ValueError(f"{taken[0]} is there already: name another place to write to (--out)")
    check_folder(path.parent)
    write(read_ours(name, dtype), path)
    return path


def write_self_forcing(source: Exported, path: Path) -> None:
    """A file that Self Forcing's code reads, or the one that a converted student was read from."""
    there = source.record.get("published")
    if there is None:
        there = {"family": "self-forcing", "entry": "generator_ema", "names": {}}
        original = to_original(source.state, source.config)
        check_layout(source, original, "self-forcing")
        there["names"] = dict(zip(source.state, (WRAPPED + key for key in original), strict=True))
    kind = FAMILIES.get(there["family"]) or Family(there["family"], "", "")
    flat = bool(there.get("flat_patch"))
    write_student(path, Published(kind, source.config, source.state, there["names"], there["entry"], source.name, flat))


def write_diffusers(source: Exported, folder: Path) -> None:
    """A folder in diffusers' layout, whose `transformer` WanTransformer3DModel loads; what has no place there is in
    RECORD, from which `restore` makes the checkpoint again."""
    state = to_original(source.state, source.config, "diffusers")
    check_layout(source, state, "diffusers")
    if not source.config.text_dim or source.config.sites:
        raise ValueError(f"{source.name} cannot be exported to diffusers: it reads no text, or audio too (dit.sites)")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (partial / "transformer").mkdir(parents=True)
        (partial / "scheduler").mkdir()
        write_shards(partial / "transformer", "diffusion_pytorch_model", state)
        write_json(partial / "transformer" / "config.json", transformer_config(source.config))
        shift = source.record.get("noise", {}).get("shift", 1.0)
        write_json(partial / "scheduler" / "scheduler_config.json", scheduler_config(shift))
        index = {"transformer": ["diffusers", "WanTransformer3DModel"]}
        index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
        write_json(partial / "model_index.json", {"_class_name": "WanPipeline", **index})
        write_json(partial / RECORD, source.record)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_ours(source: Exported, path: Path) -> None:
    """A checkpoint of ours."""
    write_checkpoint(path, source.state, source.config, source.record)


# Layout -> the ending of its files, and what writes them.
LAYOUTS: dict[str, tuple[str, Callable[[Exported, Path], None]]] = {
    "self-forcing": (".pt", write_self_forcing),
    "diffusers": ("", write_diffusers),
    "ours": ("", write_ours),
}


def write_checkpoint(path: Path, state: Mapping[str, Tensor], config: DiTConfig, record: Mapping[str, Any]) -> None:
    """Write PATH.safetensors and PATH.json of these tensors (our names), in the precision they have."""
    net: nn.Module = build(state, config, str(path))
    if record["kind"] == "student":
        student, shape = build_config(StudentConfig, record["student"]), build_config(LatentShape, record["shape"])
        net = CausalStudent(net, student, shape)
    checkpoint.export(path, net, record, dtype=None)


def restore(folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Make the checkpoint again that `write_diffusers` wrote to `folder`; returns its card."""
    folder = Path(folder)
    record = checkpoint.read_record(folder / RECORD.removesuffix(".json"))
    with torch.device("meta"):
        net = checkpoint.rebuild(record, str(folder / RECORD))
    config = net.net.cfg if isinstance(net, CausalStudent) else net.cfg
    write_checkpoint(Path(out), to_ours(read_folder(folder / "transformer")), config, record)
    card: dict[str, Any] = record.get("card", {})
    return card


def check_layout(source: Exported, state: Mapping[str, Tensor], layout: str) -> None:
    """Raise ValueError unless the network can be told from the names and shapes of `state`, as a reader has to."""
    try:
        told = replace(infer_config(state, heads=source.config.heads), eps=source.config.eps)
    except ValueError as error:
        raise ValueError(f"{source.name} cannot be exported to {layout}: {error}; --to ours keeps it") from error
    wrong = [
        f"dit.{f.name}"
        for f in fields(DiTConfig)
        if f.name not in FREE and getattr(told, f.name) != getattr(source.config, f.name)
    ]
    if wrong:
        raise ValueError(
            f"{source.name} cannot be exported to {layout}, which has no place for its {', '.join(wrong)}: it is no "
            "plain Wan network; --to ours keeps it"
        )


def transformer_config(cfg: DiTConfig) -> dict[str, Any]:
    """The config of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(cfg.patch),
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.width // cfg.heads,
        "in_channels": cfg.channels + cfg.extra_channels,
        "out_channels": cfg.channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn,
        "num_layers": cfg.layers,
        "cross_attn_norm": cfg.cross_attn_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": cfg.eps,
        "image_dim": cfg.image_dim or None,
        "added_kv_proj_dim": cfg.width if cfg.image_dim else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def scheduler_config(shift: float) -> dict[str, Any]:
    """The scheduler that Wan's own folders name."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "num_train_timesteps": 1000,
    }


def write_shards(folder: Path, stem: str, state: Mapping[str, Tensor], limit: int = SHARD_BYTES) -> None:
    """`state` as STEM.safetensors, or as several files of at most `limit` bytes (or one tensor) and their index."""
    parts = list(cut(state, limit))
    if len(parts) == 1:
        save_file(parts[0], folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    table: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        name = f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    size = sum(x.nbytes for x in state.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": table})


def cut(state: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """`state` in order, in parts of at most `limit` bytes or one tensor."""
    part: dict[str, Tensor] = {}
    size = 0
    for key, x in state.items():
        if part and size + x.nbytes > limit:
            yield part
            part, size = {}, 0
        part[key] = x.detach().contiguous().cpu()
        size += x.nbytes
    yield part
