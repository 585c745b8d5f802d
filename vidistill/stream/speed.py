"""How the passes of a stream are computed."""

from dataclasses import dataclass, replace
from pathlib import Path

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
    if cfg == SpeedConfig():
        return bundle
    words = [cfg.linears] * (cfg.linears != "plain") + ["compiled"] * cfg.compile
    return replace(bundle, name=f"{bundle.name} ({', '.join(words)})", net=bundle.net.faster(cfg.linears, cfg.compile))


def load_fast(name: str | Path, cfg: SpeedConfig) -> tuple[Bundle, Codec]:
    """The student `name` and its codec, computed as `cfg` says."""
    bundle = load_student(name)
    codec = load_codec_of(bundle)
    return faster(bundle, cfg), Compiled(codec) if cfg.compile else codec
