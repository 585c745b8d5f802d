"""How the passes of a stream are computed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidistill.checkpoint import Bundle, load_codec, load_student
from vidistill.codecs import Codec, Compiled
from vidistill.ops.device import named_device
from vidistill.ops.precision import PRECISIONS, working_dtype


@dataclass(frozen=True)
class SpeedConfig:
    """`linears`: linear layers of the blocks, `plain`, `packed` (oneDNN's layout: a CPU, float32, changes rounding),
    `bf16` (a CPU with bfloat16 products), `int8` (weights, through torchao) or `fp8` (a GPU, through torchao).
    `compile`: the blocks are compiled around their attention, and so is the codec's decoder; torch keeps what it
    compiled for the next run. `device`: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:1`. `precision` of
    weights and memory: `fp32`, `bf16`, or `auto`, which is bf16 where the hardware multiplies it; codecs stay fp32.
    """

    linears: str = "plain"
    compile: bool = False
    device: str = "auto"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
        named_device(self.device)

    @property
    def where(self) -> torch.device:
        return named_device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.precision, self.where)

    @property
    def plain(self) -> bool:
        """Whether layers run as they are."""
        return self.linears == "plain" and not self.compile

    @property
    def baseline(self) -> "SpeedConfig":
        """What shows how much this gains: everything plain, on the same device."""
        return SpeedConfig(device=self.device)

    def keeps(self, net: nn.Module) -> bool:
        """Whether a network runs so as it is."""
        weight = next(net.parameters())
        return self.plain and (weight.device, weight.dtype) == (self.where, self.dtype)

    @property
    def how(self) -> tuple[str, bool, torch.device, torch.dtype]:
        """What `VideoDiT.for_inference` takes after the length of a pass."""
        return self.linears, self.compile, self.where, self.dtype


def for_inference(bundle: Bundle, cfg: SpeedConfig) -> Bundle:
    """The student `bundle` of the same weights, computed as `cfg` says; ValueError where that cannot run here."""
    return bundle if cfg.keeps(bundle.net) else named(bundle, cfg, bundle.net.for_inference(*cfg.how))


def named(bundle: Bundle, cfg: SpeedConfig, net: nn.Module) -> Bundle:
    """`bundle` with the network `net`, computed as `cfg` says, which its name tells."""
    words = [cfg.linears] * (cfg.linears != "plain") + ["compiled"] * cfg.compile
    words += ["bf16 weights"] * (cfg.dtype == torch.bfloat16)
    return replace(bundle, name=f"{bundle.name} ({', '.join(words)})" if words else bundle.name, net=net)


def fast_decoder(codec: Codec, cfg: SpeedConfig) -> Codec:
    """The codec where `cfg` says, its decoder compiled if that is asked for."""
    moved: Any = codec
    if cfg.where.type != "cpu":
        moved = moved.to(cfg.where)
    return Compiled(moved) if cfg.compile else moved


def load_fast(name: str | Path, cfg: SpeedConfig) -> tuple[Bundle, Codec]:
    """The student `name` and its codec, computed as `cfg` says."""
    bundle = load_student(name)
    return for_inference(bundle, cfg), fast_decoder(load_codec(bundle), cfg)
