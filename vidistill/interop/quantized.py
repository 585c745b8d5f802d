"""Weights that were published in 8 bits: read up where that is exact or has its scales, refused by name elsewhere."""

import json
import logging

import torch
from torch import Tensor

from vidistill.interop.files import listed
from vidistill.interop.keys import State

log = logging.getLogger("vidistill")

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
SCALES = (".scale_weight", ".weight_scale")  # of a weight: one number, or one a row
UNUSED = (".scale_input", ".input_scale")  # of activations, for products that are taken in 8 bits; ours are not
MARKER = "scaled_fp8"  # an empty tensor that says that weights have scales
FORMAT = ".comfy_quant"  # JSON as bytes: how the weight beside it is stored


def read_up(state: State, source: str) -> dict[str, Tensor]:
    """`state` in numbers that networks compute with; fp8 becomes bfloat16, times its scale if it has one.

    Every fp8 number is a bfloat16 number. Raises ValueError for integers (weights of 8 or 4 bits, or no weights at
    all) and for scales without a weight.
    """
    small = {key for key, x in state.items() if x.dtype in FP8}
    marked = {key for key in state if key.rpartition(".")[2] == MARKER or key.endswith(FORMAT)}
    for key in sorted(marked):
        if key.endswith(FORMAT):
            check_format(key, state[key], source)
    if whole := [key for key, x in state.items() if not x.is_floating_point() and key not in marked]:
        kinds = sorted({str(state[key].dtype).removeprefix("torch.") for key in whole})
        raise ValueError(
            f"{source} holds {', '.join(kinds)} tensors ({listed(whole)}): weights quantised to integers are not read; "
            "convert the bf16, fp16 or fp32 weights"
        )
    scales = {key: key.removesuffix(end) + ".weight" for key in state for end in SCALES if key.endswith(end)}
    if not small and not scales and not marked:
        return dict(state)
    if lost := [key for key, weight in scales.items() if weight not in small]:
        raise ValueError(f"{source} holds scales of weights that are not fp8: {listed(lost)}")
    if len(set(scales.values())) < len(scales):
        raise ValueError(f"{source} holds two scales of one weight, among {listed(scales)}")
    if scales and (bare := sorted(key for key in small - set(scales.values()) if state[key].ndim > 1)):
        raise ValueError(f"{source} has scales for some fp8 weights, but none for {listed(bare)}")
    if unused := [key for key in state if key.endswith(UNUSED)]:
        log.info("%s: %s: not used, products are not taken in fp8 here", source, listed(unused))
    out = {}
    for key, x in state.items():
        if key not in marked and key not in scales and not key.endswith(UNUSED):
            out[key] = x.to(torch.bfloat16) if key in small else x
    for key, weight in scales.items():
        out[weight] = scaled(state[weight], state[key], key, source)
    log.info("%s: %d tensors of fp8 are read as bfloat16", source, len(small))
    return out


def scaled(x: Tensor, scale: Tensor, key: str, source: str) -> Tensor:
    """An fp8 weight [O, I] times its scale: one number, or one a row."""
    if scale.numel() not in (1, x.shape[0]) or (scale.ndim > 1 and scale.numel() not in (1, scale.shape[0])):
        raise ValueError(f"{source}: {key} is {list(scale.shape)}, its weight {list(x.shape)}: one number or one a row")
    return (x.float() * scale.float().reshape(-1, *[1] * (x.ndim - 1))).to(torch.bfloat16)


def check_format(key: str, x: Tensor, source: str) -> None:
    """Raise ValueError unless a note on how a weight is stored says fp8."""
    try:
        said = json.loads(bytes(x.to(torch.uint8).tolist()))["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {key} does not say a format ({error!r}); download it again") from error
    if said not in ("float8_e4m3fn", "float8_e5m2"):
        raise ValueError(f"{source}: {key} says format {said!r}; float8_e4m3fn and float8_e5m2 are read")
