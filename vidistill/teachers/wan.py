"""Wan 2.1 and 2.2 as teachers: diffusers' folders and hub ids, and Wan's own folders, mapped into VideoDiT."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidistill import io
from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.interop.files import read_folder
from vidistill.interop.keys import build, infer_config, to_ours
from vidistill.interop.quantized import read_up
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig
from vidistill.teachers import Teacher

log = logging.getLogger("vidistill")

# Folders of the high-noise and the low-noise expert, or of the only network.
PAIRS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
PUBLISHED = ["model_index.json", "scheduler/*", *(f"{name}/*" for name in PAIRS[0])]  # what is fetched of a hub id
BOUNDARY = {False: 0.875, True: 0.9}  # Wan2.2: the level where experts change, by whether an image is given
WORLD = {"fps": 16.0, "temporal": 4}  # pixel frames a second, and of one latent
FPS = {16: 16.0, 48: 24.0}  # latent channels -> pixel frames a second
VAE_FACTORS = {16: (8, "wan"), 48: (16, "wan2_2")}  # latent channels -> pixels a side of a latent, codec
SHIFT = 5.0  # Wan's default; a scheduler config in the folder overrides it
GUIDANCE = 5.0  # Wan's default


@dataclass(frozen=True)
class LoadConfig:
    """How a Wan teacher is loaded. `offline`: never reach the network. `shift` 0: what the folder says, else 5.

    `dtype` "": weights in the precision they were stored in, mapped from their files.
    """

    height: int = 480
    width: int = 832
    frames: int = 21  # latent frames of a clip
    dtype: str = "bfloat16"
    device: str = "cpu"
    offline: bool = False
    heads: int = 0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype {self.dtype!r} is no torch dtype; choose float32, bfloat16 or float16")


class Experts(nn.Module):
    """Wan2.2's two networks: one for levels at or above `boundary`, one for those below. A `Denoiser`."""

    def __init__(self, high: VideoDiT, low: VideoDiT, boundary: float) -> None:
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def cfg(self) -> DiTConfig:
        return self.high.cfg

    @property
    def units(self) -> list[list[nn.Module]]:
        return [*self.high.units, *self.low.units]

    def compile_regions(self) -> None:
        self.high.compile_regions()
        self.low.compile_regions()

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Velocity [B, F, C, H, W]; each clip goes to the expert of its highest level."""
        return self(x, sigma, cond)

    def forward(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        noisy = sigma.amax(dim=1) >= self.boundary
        if bool(noisy.all()):
            return self.high.velocity(x, sigma, cond)
        if not bool(noisy.any()):
            return self.low.velocity(x, sigma, cond)
        out = torch.empty_like(x)
        for rows, net in ((noisy, self.high), (~noisy, self.low)):
            index = rows.nonzero()[:, 0]
            out[index] = net.velocity(x[index], sigma[index], cond.map(itemgetter(index)))
        return out


def architecture_of(net: Any) -> DiTConfig | None:
    """The architecture of a network, or of each of Wan2.2's experts; None for a foreign one."""
    return net.cfg if isinstance(net, VideoDiT | Experts) else None


def load(source: str | Path, **options: Any) -> Teacher:
    """A Wan teacher from a folder (diffusers' or Wan's own layout) or a hub id; options are those of LoadConfig.

    Raises FileNotFoundError if nothing is there, ValueError with the keys that do not fit.
    """
    cfg = LoadConfig(**options)
    folder = Path(source) if Path(source).is_dir() else fetched(str(source), cfg.offline)
    index, scheduler = (read_json(folder / name) for name in ("model_index.json", "scheduler/scheduler_config.json"))
    nets = [network(part, cfg, f"{source}") for part in parts_in(folder, f"{source}")]
    net: VideoDiT | Experts = nets[0]
    if len(nets) == 2:
        image = nets[0].cfg.extra_channels > 0
        net = Experts(nets[0], nets[1], index.get("boundary_ratio") or BOUNDARY[image])
    channels = nets[0].cfg.channels
    if channels not in VAE_FACTORS:
        raise ValueError(f"{source} has {channels} latent channels; Wan's networks have {sorted(VAE_FACTORS)}")
    side, codec = VAE_FACTORS[channels]
    shift = cfg.shift or scheduler.get("flow_shift") or SHIFT
    shape = LatentShape(cfg.frames, channels, cfg.height // side, cfg.width // side, patch=nets[0].cfg.patch)
    world = {**WORLD, "fps": FPS[channels]}
    return Teacher(net, NoiseSchedule(shift=shift), shape, codec, str(source), GUIDANCE, world)


@dataclass(frozen=True)
class Part:
    """Weights of one network under any published naming, and what its config says."""

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]


def parts_in(folder: Path, source: str) -> list[Part]:
    """The networks in the folder of `source`: one, or Wan2.2's high-noise and low-noise expert.

    FileNotFoundError where there is none, or not every one that its index names: half a download.
    """
    index = read_json(folder / "model_index.json")
    named = [name for name in PAIRS[0] if (index.get(name) or [None])[0]]
    if missing := [name for name in named if not (folder / name).is_dir()]:
        raise FileNotFoundError(f"{source} has no {' and no '.join(missing)}, which its index names: download it again")
    for first, second in PAIRS:
        if (folder / first).is_dir():
            names = [first] + ([second] if (folder / second).is_dir() else [])
            return [part_in(folder / name) for name in names]
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{source} holds neither safetensors files nor a folder named transformer")
    return [part_in(folder)]


def part_in(folder: Path) -> Part:
    """The network whose weights and config lie in `folder`."""
    return Part(read_up(read_folder(folder), str(folder)), read_json(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    found = io.read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no dictionary; download it again")
    return found


def fetched(source: str, offline: bool) -> Path:
    """The folder of a hub id in the hub's own cache; its networks and their configs are downloaded if they are missing.

    Weights are then mapped from their files as those of any folder, so a process that needs a shard holds no more.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("the hub is read by huggingface_hub: pip install 'vidistill[hub]'") from error
    try:
        folder = Path(snapshot_download(source, allow_patterns=PUBLISHED, local_files_only=offline))
    except (OSError, ValueError) as error:  # a name that can be none of the hub is a ValueError
        raise io.not_found(source, "the teacher", error, offline) from error
    if not (folder / "model_index.json").is_file():  # it says how many networks there are
        raise FileNotFoundError(
            f"{source} has no model_index.json of diffusers' layout here: fetch all of it with `hf download {source}`, "
            "or name its folder"
        )
    return folder


def network(part: Part, cfg: LoadConfig, source: str) -> VideoDiT:
    """One network, frozen, at the wanted precision and place; tensors that already fit are not copied."""
    net = build(to_ours(part.state), architecture(part, cfg.heads), source).requires_grad_(False).eval()
    return net.to(device=cfg.device, dtype=getattr(torch, cfg.dtype) if cfg.dtype else None)


def architecture(part: Part, heads: int = 0) -> DiTConfig:
    """The architecture of a network, from its shapes and what its config says of heads."""
    said = part.config
    heads = heads or said.get("num_attention_heads", 0) or said.get("num_heads", 0)
    return replace(infer_config(part.state, heads=heads), eps=said.get("eps", 1e-6))
