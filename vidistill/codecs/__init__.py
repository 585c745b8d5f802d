"""Codecs: pixels to latents and back, whole clips or streamed exactly."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vidistill.codecs.tiny import PUBLISHED, TinyCodec, TinyCodecConfig
from vidistill.codecs.wan import WAN_2_2, WanCodec, WanCodecConfig
from vidistill.config import ConfigError, build

CodecConfig = TinyCodecConfig | WanCodecConfig


class Codec(Protocol):
    """Pixels float32 [B, f, 3, H, W] in [0, 1] <-> normalised latents [B, F, C, H/s, W/s].

    Latent 0 holds the first px frame alone, latent i the px frames t*(i-1)+1 .. t*i: a clip has f = 1 + t*(F-1)
    px frames. Streamed chunks, concatenated, equal the whole clip. A state is an opaque value: None starts a stream,
    and a call never changes the state it was given.
    """

    @property
    def cfg(self) -> CodecConfig: ...

    latent_channels: int  # C
    spatial_factor: int  # s
    temporal_factor: int  # t

    def latent_shape(self, px_frames: int, height: int, width: int) -> tuple[int, int, int, int]: ...

    def px_frames(self, frames: int) -> int: ...

    def encode(self, px: Tensor) -> Tensor: ...

    def encode_stream(self, px: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def decode_stream(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


class Compiled:
    """`codec` with its streamed decode of one latent as one graph, and another for the first latent of a stream."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._step = torch.compile(codec.decode_stream, fullgraph=True, dynamic=False)

    def decode_stream(self, latents: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        parts = []
        for latent in latents.split(1, dim=1):
            px, state = self._step(latent, state)
            parts.append(px)
        return torch.cat(parts, dim=1), state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


CODECS: dict[str, tuple[type, Callable[[Any, str | Path | None], Codec]]] = {  # family: (config, load)
    "tiny": (TinyCodecConfig, TinyCodec.load),
    "wan": (WanCodecConfig, WanCodec.load),
}
GEOMETRIES: dict[str, CodecConfig] = {
    "tiny": TinyCodecConfig(),
    "wan": WanCodecConfig(),
    "wan2_2": WAN_2_2,
    **PUBLISHED,
}


def build_codec(codec: str | Mapping[str, Any] | CodecConfig, weights: str | Path | None = None) -> Codec:
    """A codec by geometry name, config or record (of `codec_record`); weights: a safetensors file, None: untrained."""
    if isinstance(codec, str):
        if codec not in GEOMETRIES:
            raise ValueError(f"no codec is called {codec!r}; known: {', '.join(GEOMETRIES)}")
        codec = GEOMETRIES[codec]
    cfg = read_codec_config(codec) if isinstance(codec, Mapping) else codec
    _, load = CODECS[_family(cfg)]
    return load(cfg, weights)


def open_codec(source: str | Path, offline: bool = False) -> Codec | None:
    """A published codec: a diffusers folder or hub id (the autoencoder itself, or what has it as `vae`), or a
    safetensors file named as its geometry, e.g. taew2_1.safetensors; None for a folder that holds none.

    offline: a hub id is looked for in the local cache alone.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors" and path.stem in GEOMETRIES:
        return build_codec(path.stem, path)
    if path.is_dir():
        inside = next((f for f in (path / "vae", path) if (f / "config.json").is_file()), None)
        return None if inside is None else WanCodec.from_pretrained(inside)
    return WanCodec.from_pretrained(source, "vae", offline)


def codec_record(codec: Codec) -> dict[str, Any]:
    """The codec's family and config as plain values for JSON; `build_codec` accepts it."""
    return {"family": _family(codec.cfg), **asdict(codec.cfg)}


def _family(cfg: CodecConfig) -> str:
    for family, (config_class, _) in CODECS.items():
        if isinstance(cfg, config_class):
            return family
    raise ValueError(f"{type(cfg).__name__} configures no codec; known families: {', '.join(CODECS)}")


def read_codec_config(record: Mapping[str, Any]) -> CodecConfig:
    """The config in a codec's record; ConfigError for an unknown family or key, or an impossible value."""
    family = record.get("family")
    if not isinstance(family, str) or family not in CODECS:
        raise ConfigError(f"codec_config.family is {family!r}; known: {', '.join(CODECS)}")
    rest = {key: value for key, value in record.items() if key != "family"}
    cfg: CodecConfig = build(CODECS[family][0], rest, "codec_config.")
    return cfg


def visibility(codec: Codec, latents: Tensor, rng: torch.Generator, draws: int = 4) -> Tensor:
    """How much each latent channel shows [C], mean 1: squared change of the pixels of `latents` [B, F, C, h, w] a unit.

    The diagonal of J^T J of the decoder, estimated with random pixel directions; weights for `loss.channel_weights`.
    """
    shown = torch.zeros(latents.shape[2], dtype=torch.float64)
    for _ in range(draws):
        x = latents.detach().requires_grad_()
        px = codec.decode(x)
        (grad,) = torch.autograd.grad((px * torch.randn(px.shape, generator=rng)).sum(), x)
        shown += grad.double().square().mean(dim=(0, 1, 3, 4))
    return shown / shown.mean()
