"""What data and checkpoints already know, compared with what a stage says: codec, rate, actions, encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint
from vidistill.training.config import TrainConfig

TOLERANCE = 0.02  # of two codecs' latents of a random clip; stored weights may be rounded to half precision
ENCODERS = ("text", "audio", "image")
WORLD = ("fps", "actions")  # of a record's `world` and of data


def check(cfg: TrainConfig, data: Mapping[str, Any]) -> None:
    """Raise ValueError where the stage, or a network it starts from or learns from, contradicts the data it names."""
    stored = data.get("codec")
    if cfg.codec and stored and not same_codec(cfg.codec, stored):
        raise ValueError(
            f"codec {cfg.codec!r} does not make the latents of {cfg.data}, which were made with {stored!r}: set "
            f"codec={stored}, or encode the clips again"
        )
    for field, name in (("init", cfg.init), ("teacher", cfg.teacher), ("critic_init", cfg.critic_init)):
        if name and cfg.objective != "codec":
            check_network_world(f"{field} {name!r}", record_of(name), data, cfg.data)


def record_of(name: str) -> Mapping[str, Any]:
    """What a checkpoint of ours says of itself; {} for a published network, which does not say."""
    return {} if checkpoint.is_published(name) else checkpoint.read_record(checkpoint.locate(name))


def check_network_world(what: str, record: Mapping[str, Any], data: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where a network was trained on another rate, other actions or other codes than those of data."""
    world = record.get("world") or {}
    pairs = [(name, world.get(name), data.get(name)) for name in WORLD]
    pairs += [(name, *common(record.get(name), data.get(name))) for name in ENCODERS]
    for name, own, other in pairs:
        if own and other and own != other:
            raise ValueError(
                f"{what} was trained with {name} {own}, {where} has {name} {other}: name a network of this world, or "
                "make the data as that one expects them"
            )
    if (own := record.get("codec")) and (other := data.get("codec")) and not same_codec(own, other):
        raise ValueError(
            f"{what} was trained on latents of codec {own!r}, {where} was made with {other!r}: name a network of these "
            "latents, or encode the clips with that codec"
        )


def common(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two encoders' settings those that both name and that decide about codes: not where files lie."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return None, None
    names = (one.keys() & other.keys()) - {"source", "folder", "length"}
    return {k: one[k] for k in names}, {k: other[k] for k in names}


def same_codec(one: str, other: str) -> bool:
    """Whether two names are of codecs that encode alike; their decoders may differ.

    Where one of them is not at hand, names decide: data may have been made on another machine.
    """
    if one == other:
        return True
    try:
        a, b = (latents_of_noise(name) for name in (one, other))
    except (ValueError, OSError):
        return Path(one).name == Path(other).name
    return a.shape == b.shape and float((a - b).norm()) <= TOLERANCE * float(a.norm())


@torch.no_grad()
def latents_of_noise(name: str) -> Tensor:
    """The latents that a codec makes of a fixed random clip."""
    codec = checkpoint.load_named(name, "codec").net
    px = torch.rand(1, 1 + codec.temporal_factor, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents: Tensor = codec.encode(px)
    return latents.float()
