"""Tiny published networks: the weights of a recording, named and stored as others publish theirs."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens"
HEADS = 4  # of the recorded network, whose width is 64


def weights(case: str = "self_forcing_rollout") -> dict[str, Tensor]:
    """Original Wan names."""
    return load_file(GOLDENS / case / "weights.safetensors")


def publish(path: Path, state: dict[str, Tensor], entry: str = "generator_ema", prefix: str = "model.") -> Path:
    """`state` as a safetensors file, or as an entry of a pickle; returns the path."""
    named = {prefix + key: x for key, x in state.items()}
    if path.suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save({entry: named, "step": 600}, path)
    return path


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Same names, precisions and bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
