"""A project that starts from a published Wan network instead of from nothing: for GPUs, with LoRA where that does."""

import os
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vidistill import checkpoint
from vidistill.bench import plan
from vidistill.cli.recipe import (
    COPY_STARTS,
    LEVELS,
    Choice,
    Row,
    Stage,
    camera_rows,
    choose,
    config,
    teacher_sites,
    write_project,
)
from vidistill.cli.world import World, look
from vidistill.data.shards import DataError
from vidistill.models.layers import DiTConfig
from vidistill.teachers.wan import VAE_FACTORS
from vidistill.training.losses import OBJECTIVES

FACTOR, CLIP = 4, 21  # px frames of a latent, latents of the clips that Wan was trained on
LONG_CLIP = 31  # of Wan2.2-TI2V-5B, at 24 frames/s
USUAL_PX = 480 * 832
STEPS = {"teacher": 2000, "tf": 1000, "selfforcing": 720, "diagonal": 1200}
RANK = {"teacher": 64, "tf": 128, "selfforcing": 128, "diagonal": 128}
HALF = 0.5  # of a GPU's memory: what networks and what trains them may take before they are shards
GUIDANCE = 4.0  # of Self Forcing (2506.08009), counted from the unconditional prediction
UNKNOWN = DiTConfig()


@dataclass(frozen=True)
class WanPlan:
    """What a project from `init` does on `gpus` of `gpu_memory` GB."""

    world: World
    choice: Choice
    init: str
    dit: DiTConfig
    gpus: int
    gpu_memory: float

    @property
    def side(self) -> int:
        """Pixels along the side of a latent."""
        return VAE_FACTORS[self.dit.channels][0]

    @property
    def whole(self) -> bool:
        """Whether all weights train: those of new inputs are no LoRA's."""
        return bool(teacher_sites(self.world))

    @property
    def guidance(self) -> dict[str, float]:
        """Scales at which a teacher is asked: of text as published, of sound as in projects from nothing."""
        return {**self.world.guidance, "guidance": GUIDANCE}

    def stages(self) -> dict[str, Stage]:
        """The stages, with shards where whole networks would fill a GPU."""
        every = [self.teacher(), self.init_stage(), self.self_forcing(), self.diagonal()]
        stages = {stage.name: stage for stage in every}
        for stage in every:
            held = self.held_bytes(stages, stage.name)
            if self.gpus > 1 and held > HALF * self.gpu_memory * 1e9:
                why = f"networks and what trains them are {held / 1e9:.0f} GB, {self.gpu_memory:g} GB a GPU"
                stages[stage.name] = stage.with_values({"parallel": why}, parallel="shard")
        return stages

    def held_bytes(self, stages: dict[str, Stage], name: str) -> float:
        """Bytes of a stage's networks, gradients, optimiser and average, were they on one GPU."""
        cfg = config(stages, name)
        roles = {"student": plan.Role("", "", self.dit)}
        if OBJECTIVES[cfg.objective].critic is not None:
            roles |= {role: plan.Role("", "", self.dit) for role in ("teacher", "critic")}
        costs = [plan.network_cost(cfg, role, one) for role, one in roles.items()]
        return sum(cost["weight_bytes"] + cost["training_bytes"] for cost in costs)

    def adapters(self, name: str) -> list[Row]:
        """How a stage trains its student: LoRA, or whole weights where the network has inputs that it never had."""
        if self.whole:
            return []
        return [Row("lora", {"rank": RANK[name]}, "low-rank updates; what is exported is plain weights")]

    def teacher(self) -> Stage:
        """Wan on clips of one's own."""
        world = self.world
        dit = {f.name: getattr(self.dit, f.name) for f in fields(DiTConfig)}
        dit = {name: value for name, value in dit.items() if value != getattr(UNKNOWN, name)}
        dit = {name: list(value) if isinstance(value, tuple) else value for name, value in dit.items()}
        if sites := teacher_sites(world):
            dit["sites"] = {site: {**one, "zero_init": True} for site, one in sites.items()}
        height, width = (side // self.side for side in world.size)
        rows = [
            Row("name", "teacher"),
            Row("objective", "flow"),
            Row("data", "latents/train" if world.splits else "latents"),
            Row("init", self.init),
            Row("codec", self.init),
            Row("frames", self.choice.clips, f"latents of a clip: {1 + FACTOR * (self.choice.clips - 1)} frames"),
            Row("latent_size", [height, width]),
            Row("batch", 8),
            Row("precision", "bf16"),
            Row(
                "dit",
                {**dit, "checkpoint": True},
                "as the folder says; blocks recomputed, or clips of this size fit no GPU",
            ),
            *camera_rows(world),
            *self.adapters("teacher"),
            Row("loss", {"noise": {"shift": 5.0, "logit_normal": False}, **world.drops, **self.guidance}),
            Row("optim", {"lr": 2e-5 if self.whole else 1e-4, "warmup": 100, "weight_decay": 0.01, "clip": 1.0}),
            Row("ema", 0.99),
            Row("sample_every", 250, "videos in runs/teacher/samples: stop when they look like yours"),
            *self.counted("teacher"),
        ]
        return Stage("teacher", f"{Path(self.init).name} on your clips.", tuple(rows))

    def counted(self, name: str) -> list[Row]:
        return [
            Row(
                "steps", STEPS[name], "nothing is timed here: `vidistill train FILE --dry-run --gpus N` estimates hours"
            ),
            Row("save_every", 100),
            Row("log_every", 10),
        ]

    def init_stage(self) -> Stage:
        """Causal init."""
        given = 1 if self.world.given else 0
        first = 1 if given and self.choice.chunk > 1 else 0
        student = {
            "chunk": self.choice.chunk,
            "first_chunk": first,
            "memory": {"policy": "full", "frames": self.choice.clips},
        }
        rows = [
            Row("name", "tf"),
            Row("objective", "teacher_forcing"),
            Row("init", "runs/teacher/teacher"),
            Row("sample_every", 0),
            Row("student", student, f"chunk: {self.choice.why_chunk}"),
            Row("schedule", {"levels": LEVELS, "given_chunks": given}),
            *self.adapters("tf"),
            *self.counted("tf"),
        ]
        title = "Causal init: the teacher sees the past alone, true clean history before every noisy chunk."
        return Stage("tf", title, tuple(rows), "teacher")

    def self_forcing(self) -> Stage:
        """Self Forcing."""
        slow = {"betas": [0.0, 0.999], "warmup": 0, "weight_decay": 0.01, "clip": 10.0}
        critic = [] if self.whole else [Row("critic_lora", {"rank": RANK["selfforcing"]})]
        rows = [
            Row("name", "selfforcing"),
            Row("objective", "dmd"),
            Row("init", "runs/tf/tf"),
            Row("teacher", "runs/teacher/teacher"),
            Row("teacher_precision", "bf16"),
            *self.adapters("selfforcing"),
            *critic,
            Row("schedule", {"exit": "shared"}),
            Row("loss", {**self.guidance, "score_noise": {"shift": 5.0, "logit_normal": False}}),
            Row("optim", {"lr": 2e-6 if self.whole else 1e-5, **slow}),
            Row("critic_optim", {"lr": 4e-7 if self.whole else 2e-6, **slow}),
            Row("critic_steps", 5, "critic updates a student update"),
            Row("replay", True, "rollouts run again chunk by chunk for their gradient: one chunk's memory at a time"),
            *self.counted("selfforcing"),
        ]
        title = "Self Forcing: the student's own rollouts, distribution matching against the teacher."
        return Stage("selfforcing", title, tuple(rows), "tf")

    def diagonal(self) -> Stage:
        """Diagonal Distillation."""
        window = min(12, self.choice.clips)
        sinks = {"sinks": 3} if window - 3 >= self.choice.chunk else {}
        rows = [
            Row("name", "diagonal"),
            Row("init", "runs/selfforcing/selfforcing"),
            Row("student", {"memory": {"policy": "window", "frames": window, **sinks}}),
            Row("schedule", {"pattern": "4322222", "context": "last_step", "exit": "per_chunk"}),
            Row("loss", {"motion": 0.2}, "motion matched in distribution, or few steps make slow pictures"),
            *self.counted("diagonal"),
        ]
        title = "Diagonal Distillation: 4, 3, then 2 steps a chunk, memory as the last step left it."
        return Stage("diagonal", title, tuple(rows), "selfforcing")

    def report(self, stages: dict[str, Stage]) -> str:
        """What people read of it."""
        world = self.world
        how = "whole weights: a LoRA has none for new inputs" if self.whole else "LoRA"
        shards = [name for name in stages if config(stages, name).parallel == "shard"]
        height, width = world.size
        lines = [
            f"{world.episodes} clips, {height}x{width} px at {world.fps:g} frames/s; {', '.join(world.conditions)}",
            f"from {self.init}: {self.dit.width} wide, {self.dit.layers} layers; {how}",
            f"clips of {self.choice.clips} latents; chunk {self.choice.chunk}: {self.choice.why_chunk}",
            f"on {self.gpus} GPUs of {self.gpu_memory:g} GB, shards: {', '.join(shards) or 'none'}",
        ]
        if height * width < USUAL_PX / 2:
            lines.append(
                "its clips were of about 480x832 px: much smaller ones look strange to it (`--size` of the data)"
            )
        return "\n".join(lines)


def wan_plan(data: Path, init: str, gpus: int, gpu_memory: float) -> WanPlan:
    """The plan of a project from a Wan folder or hub id; DataError or ValueError where they do not go together."""
    found = plan.role(str(Path(init).resolve()) if Path(init).is_dir() else init, UNKNOWN)
    if not checkpoint.is_published(found.source) or found.dit == UNKNOWN or found.dit.channels not in VAE_FACTORS:
        raise ValueError(f"--init {init} is no Wan network; name a folder in diffusers' layout")
    if found.experts > 1:
        raise ValueError(
            f"--init {init} holds {found.experts} experts; a recipe trains one network: name Wan2.1 or TI2V-5B"
        )
    if Path(init).is_dir() and not (Path(init) / "vae" / "config.json").is_file():
        raise ValueError(
            f"--init {init} has no vae/config.json, which encodes the clips; name the whole diffusers folder"
        )
    if found.dit.extra_channels:
        raise ValueError(
            f"--init {init} makes videos from pictures, which clips of one's own do not teach here; name a "
            "text-to-video network, or take configs/wan/ode-i2v-14b.yaml as a pattern"
        )
    world = look(data)
    side = VAE_FACTORS[found.dit.channels][0] * found.dit.patch[1]
    if world.size[0] % side or world.size[1] % side:
        raise DataError(
            f"{data} has frames of {world.size[0]}x{world.size[1]}; sides must be multiples of {side} for Wan"
        )
    if world.factor != FACTOR:
        raise DataError(f"{data} has {world.fps:g} frames/s, Wan makes 16 or 24: make the data with another --fps")
    if world.text_dim != found.dit.text_dim:
        raise DataError(
            f"{data} tells captions by {world.text_dim} numbers a token, {init} listens to {found.dit.text_dim}: make "
            f"it with captions and --text kind=umt5 source={init}"
        )
    choice = choose(world, warm=False)
    first, longest = min(1, world.given), min(LONG_CLIP if found.dit.channels == 48 else CLIP, world.longest)
    clips = first + (longest - first) // choice.chunk * choice.chunk
    return WanPlan(world, replace(choice, clips=clips), found.source, found.dit, gpus, gpu_memory)


def write(folder: Path, made: WanPlan) -> str:
    """Write the files of a project; returns what to say of it."""
    stages, frames = made.stages(), os.path.relpath(made.world.data, folder)
    about = {"init": made.init, "gpus": made.gpus, "gpu_memory": made.gpu_memory, "frames": frames}
    quoted = {"frames": shlex.quote(frames), "init": shlex.quote(made.init)}
    script = SCRIPT.format(**quoted, gpus=made.gpus, copy_starts=COPY_STARTS)
    write_project(folder, made.world, stages, about, script)
    return f"{made.report(stages)}\nlook before: vidistill train {folder / 'teacher.yaml'} --dry-run --gpus {made.gpus}"


SCRIPT = """\
#!/usr/bin/env bash
# From clips and a Wan network to a streaming student. Resumes where it stopped; finished stages are skipped.
# GPUS=2 ./run.sh takes two; STEPS=3 ./run.sh runs everything in a few steps of each stage, in a folder of its own.
set -euo pipefail
cd "$(dirname "$0")"
gpus="${{GPUS:-{gpus}}}" steps=
if [ -n "${{STEPS:-}}" ]; then
  rm -rf rehearsal && mkdir rehearsal && cp -r ./*.yaml rehearsal/
  [ ! -d starts ] || cp -r starts rehearsal/
  cd rehearsal
  steps="steps=$STEPS critic_warmup=0"
fi
frames={frames}
[ -d "$frames" ] || frames="../$frames"

train() {{
  [ ! -f "runs/$1/$1.json" ] || return 0
  if [ "$gpus" -gt 1 ]; then
    torchrun --standalone --nproc-per-node "$gpus" -m vidistill train "$1.yaml" $steps
  else
    vidistill train "$1.yaml" $steps parallel=replicate
  fi
}}

vidistill data latents latents --from "$frames" --codec {init}
for stage in teacher tf selfforcing diagonal; do train "$stage"; done
{copy_starts}
vidistill generate runs/diagonal/diagonal -o out.mp4 --seconds 5
echo "look at out.mp4, then play it: vidistill serve $PWD/runs/diagonal/diagonal"
"""
