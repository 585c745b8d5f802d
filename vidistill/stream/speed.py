"""How the passes of a stream are computed."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vidistill.checkpoint import Bundle, load_codec_of, load_student
from vidistill.codecs import Codec, Compiled


@dataclass(frozen=True)
class SpeedConfig:
    """`linears`: linear layers of the blocks, `plain`, `packed` (oneDNN's layout: a CPU, float32, changes rounding),
    `bf16` (a CPU with bfloat16 products), `int8` (weights, through torchao) or `fp8` (a GPU, through torchao).
    `compile`: the blocks are compiled around their attention, and so is the codec's decoder; torch keeps what it
    compiled for the next run.
    """

    linears: str = "plain"
    compile: bool = False


def faster(bundle: Bundle, cfg: SpeedConfig) -> Bundle:
    """The student `bundle` of the same weights, computed as `cfg` says; ValueError where that cannot run here."""
    return bundle if cfg == SpeedConfig() else named(bundle, cfg, bundle.net.faster(cfg.linears, cfg.compile))


def named(bundle: Bundle, cfg: SpeedConfig, net: nn.Module) -> Bundle:
    """`bundle` with the network `net`, computed as `cfg` says, which its name tells."""
    words = [cfg.linears] * (cfg.linears != "plain") + ["compiled"] * cfg.compile
    return replace(bundle, name=f"{bundle.name} ({', '.join(words)})", net=net)


def fast_decoder(codec: Codec, cfg: SpeedConfig) -> Codec:
    """The codec, its decoder computed as `cfg` says."""
    return Compiled(codec) if cfg.compile else codec


def load_fast(name: str | Path, cfg: SpeedConfig) -> tuple[Bundle, Codec]:
    """The student `name` and its codec, computed as `cfg` says."""
    bundle = load_student(name)
    return faster(bundle, cfg), fast_decoder(load_codec_of(bundle), cfg)
