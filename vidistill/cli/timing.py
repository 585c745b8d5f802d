"""What stages of a project take on this machine: measured, beside whatever else it does, and at the very least."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vidistill import checkpoint
from vidistill.cli.recipe import Choice, Stage, codec_geometry, config, write_warm
from vidistill.cli.world import SHORT, World
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.data.shards import latent_shard, write_shards
from vidistill.models.dit import VideoDiT
from vidistill.ops.device import accelerator, wait_for
from vidistill.ops.precision import working_dtype
from vidistill.training.config import TrainConfig
from vidistill.training.trainer import Trainer

TIMED = 2  # steps timed after one that warms up
CPU_FACTOR = 1.2  # wall seconds of a quiet machine for a CPU second of each thread: reading, threads that wait
BACKWARD = 2  # of a forward pass
PASSES = {  # over a clip, forward or (two) backward, that a step cannot do without
    "teacher": 1 + BACKWARD,
    "tf": 2 * (1 + BACKWARD),  # the clean clip rides along
    "selfforcing": 2 + 1 + BACKWARD,  # a critic's turn: one level of a rollout and its context pass, then a score
    "diagonal": 1 + 1 + BACKWARD,  # its memory is the last step's
}
PRODUCTS, SIDE = 5, 1024  # products of matrices of this side that a machine shows its best speed on


@dataclass(frozen=True)
class Took:
    """Seconds that some work took: of wall time, and of CPU time on all threads of this process."""

    wall: float
    cpu: float

    @property
    def quiet(self) -> float:
        """Seconds of wall time where nothing else runs.

        Other programs stretch wall time as they please, CPU time hardly: the lesser of the two is the truth, CPU time
        shared by the threads. A GPU's work is no CPU time.
        """
        return self.wall if accelerator().type != "cpu" else min(self.wall, CPU_FACTOR * self.cpu / threads())

    def __mul__(self, factor: float) -> "Took":
        return Took(self.wall * factor, self.cpu * factor)

    def __add__(self, other: "Took") -> "Took":
        return Took(self.wall + other.wall, self.cpu + other.cpu)


def threads() -> int:
    return torch.get_num_threads()


def took(work: Callable[[], object], times: int = 1) -> Took:
    """What some work takes; done several times, the least of each: whatever disturbs it only adds."""
    walls, cpus = list[float](), list[float]()
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        wait_for(accelerator())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Took(min(walls), min(cpus))


# --- measured ---------------------------------------------------------------------------------------------------------


def measure(
    world: World, choice: Choice, stages: Mapping[str, Stage], name: str, folder: Path, frames: int = 0
) -> Took:
    """What a step of a stage takes, in a scratch folder that `write_stand_ins` filled; `frames`: latents of a clip."""
    changes = {"out": str(folder / "runs"), "steps": 10_000, **paths_in(folder, stages, name)}
    return took_by_step(config(stages, name, **changes, **({"frames": frames} if frames else {})))


def took_by_step(cfg: TrainConfig) -> Took:
    """What a step of a stage takes, the mean over a round of student and critic where there are both."""
    trainer = Trainer(cfg)
    trainer.step()
    if not cfg.rolls:
        return took(trainer.step, TIMED)
    trainer.step()
    of_critic, turns = took_at(trainer, 1), cfg.critic_steps + 1
    return of_critic * (cfg.critic_steps / turns) + took_at(trainer, turns) * (1 / turns)


def took_at(trainer: Trainer, step: int) -> Took:
    trainer.step_count = step
    return took(trainer.step)


def encoding(world: World, geometry: TinyCodecConfig) -> Took:
    """What the latents of all frames take."""
    frames = torch.zeros(1, min(world.length, 1 + 8 * world.factor), *world.size, 3, dtype=torch.uint8)
    codec = TinyCodec(geometry).eval().requires_grad_(False)
    return took(lambda: latent_shard(({"frames": frames}, [{}]), codec), TIMED) * (world.px_frames / frames.shape[1])


def paths_in(folder: Path, stages: Mapping[str, Stage], name: str) -> dict[str, Any]:
    """What a stage starts from, as it stands in the scratch folder."""
    if name == "codec":
        return {"init": str(folder / "init" / "codec")} if "init" in stages["codec"].values else {}
    return {
        "codec": str(folder / "codec"),
        "init": None if name == "teacher" else str(folder / "teacher"),
        **({"teacher": str(folder / "teacher")} if name in ("selfforcing", "diagonal") else {}),
    }


def write_stand_ins(folder: Path, world: World, choice: Choice, stages: Mapping[str, Stage]) -> None:
    """Random latents, an untrained codec and an untrained teacher: what they know costs nothing."""
    clips, (height, width) = 4, world.latent
    tensors: dict[str, Tensor] = {
        name: torch.randn(clips, choice.clips, 16, height, width) for name in ("latents", "images")
    }
    tensors |= {name: torch.rand(clips, choice.clips, width) for name, width in world.per_frame_dims.items()}
    if world.camera is not None:
        tensors["poses"] = world.camera.wander(clips, choice.clips)
    if world.text_dim:
        tensors["tokens"] = torch.randn(clips, 16, world.text_dim)
    meta = {"fps": world.fps, "actions": list(world.actions), "given": world.given, "temporal": world.factor}
    write_shards(folder / "latents", [(tensors, [{}] * clips)], meta)
    if choice.warm_codec:
        write_warm(folder, stages, replace(choice, warm_teacher=None))
    checkpoint.export(folder / "codec", TinyCodec(codec_geometry(stages["codec"], choice)), {"card": {}})
    cfg = config(stages, "teacher", init=None, steps=1)
    shape = {"frames": choice.clips, "channels": 16, "height": height, "width": width, "patch": list(cfg.dit.patch)}
    record = {"shape": shape, "noise": {"shift": 5.0, "logit_normal": False}, "codec": None, "card": {}}
    checkpoint.export(folder / "teacher", VideoDiT(cfg.dit), record)


# --- at the very least ------------------------------------------------------------------------------------------------


def least_seconds(world: World, choice: Choice, stages: Mapping[str, Stage], steps: Mapping[str, int]) -> float:
    """Seconds below which these steps of every stage and the latents cannot take: products at the speed of large ones.

    Nothing is trained for it. Convolutions, small products, reading and drawing take several times as long.
    """
    encode, decode = codec_flops(codec_geometry(stages["codec"], choice), world.size)
    codec = config(stages, "codec", steps=1)
    flops = encode * world.px_frames
    flops += (1 + BACKWARD) * (encode + decode) * codec.frames * codec.batch * steps["codec"]
    for name, passes in PASSES.items():
        cfg = config(stages, name, init=None, steps=1)
        frames, dit = min(SHORT, choice.clips) if name == "teacher" else choice.clips, cfg.dit
        tokens = frames * dit.grid[0] * dit.grid[1]
        layer = 2 * (4 * dit.width**2 + 2 * dit.width * dit.ffn)  # projections of attention, and feed-forward
        flops += passes * dit.layers * layer * tokens * cfg.batch * steps[name]
    return flops / best_flops_per_s()


def codec_flops(geometry: TinyCodecConfig, size: tuple[int, int]) -> tuple[float, float]:
    """FLOPs of a px frame to its latent, and back."""
    with torch.no_grad(), torch.device("meta"):
        codec = TinyCodec(geometry)
        frames = 1 + 2 * codec.temporal_factor
        with FlopCounterMode(display=False) as encoder:
            latents = codec.encode(torch.zeros(1, frames, 3, *size))
        with FlopCounterMode(display=False) as decoder:
            codec.decode(latents)
    return encoder.get_total_flops() / frames, decoder.get_total_flops() / frames


def best_flops_per_s() -> float:
    """FLOP/s of large products in the precision that stages run in, on all threads, were they alone here."""
    device = accelerator()
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=working_dtype("auto", device)) for _ in range(2))
    one = took(lambda: a @ b, PRODUCTS)
    seconds = one.wall if device.type != "cpu" else min(one.wall, one.cpu / threads())
    return 2 * SIDE**3 / seconds if seconds else math.inf
