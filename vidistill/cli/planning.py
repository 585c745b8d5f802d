"""How a budget of time becomes steps: every stage is timed here, then each gets its share."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.cli.recipe import (
    SHORT,
    SIZES,
    STAGES,
    Choice,
    Row,
    Stage,
    World,
    choose,
    codec_geometry,
    config,
    look,
    stages_of,
    write_warm,
)
from vidistill.codecs import visibility
from vidistill.codecs.tiny import TinyCodec
from vidistill.data.clips import Clips
from vidistill.data.shards import META, DataError, latent_shard, write_shards
from vidistill.io import read_json, write_text
from vidistill.models.dit import VideoDiT
from vidistill.sampling import sample
from vidistill.training.config import TrainConfig
from vidistill.training.trainer import Trainer

SHARES = {"codec": 0.15, "teacher": 0.45, "tf": 0.08, "selfforcing": 0.2, "diagonal": 0.12}
REST = 0.05  # of the budget: starting up, checks, videos
ENOUGH = {"codec": 6000, "teacher": 12_000, "tf": 1000, "selfforcing": 3000, "diagonal": 2000}
FEWEST = {"codec": 120, "teacher": 200, "tf": 30, "selfforcing": 60, "diagonal": 60}
WARM_SHARE = 0.4  # of the steps that a stage from nothing needs, measured on a driving game
TIMED = 3  # steps timed after one that warms up
MORE_SIZE, LESS_SIZE = 8000, 700  # steps of a teacher at which another size is worth its while
GATES = {  # what a check asks for, least and most
    "psnr": (24.0, 100.0),
    "sharpness": (0.7, 1.4),
    "moving": (0.5, 1.0),
    "teacher_sharpness": (0.5, 1.6),
    "teacher_motion": (0.3, 2.5),
}


@dataclass(frozen=True)
class Plan:
    """What a project does: the world, what was chosen for it, seconds and steps of every stage."""

    world: World
    choice: Choice
    budget: float
    seconds: Mapping[str, float]  # a step
    steps: Mapping[str, int]
    encode: float  # seconds of all latents
    short_seconds: float  # a step of the teacher on short clips

    def stages_for(self, frames: str, latents: str) -> dict[str, Stage]:
        """The stages with their numbers."""
        stages = stages_of(self.world, self.choice, frames, latents)
        return {name: self.numbered(stage) for name, stage in stages.items()}

    def numbered(self, stage: Stage) -> Stage:
        """A stage with its steps, and what follows from them."""
        steps, seconds = self.steps[stage.name], self.seconds[stage.name]
        save = max(10, min(200, steps // 5))
        ema = round(min(0.999, max(0.9, 1 - 8 / steps)), 4)
        why = f"{self.hours(stage.name) * 60:.0f} minutes of the budget at {seconds:.2f} s a step, measured here"
        rows = {"steps": Row("steps", steps, why), "ema": Row("ema", ema, "averages over about an eighth of the steps")}
        rows |= {"save_every": Row("save_every", save), "log_every": Row("log_every", max(1, min(20, steps // 10)))}
        if stage.name == "teacher" and self.choice.clips > SHORT:
            first = steps * 2 // 3
            rows["curriculum"] = Row(
                "curriculum",
                [[0, SHORT], [first, self.choice.clips]],
                f"clips of {SHORT} latents for two thirds, {self.short_seconds:.2f} s a step: more scenes, same work",
            )
        if stage.name in ("selfforcing", "diagonal"):
            rows["critic_warmup"] = Row(
                "critic_warmup", max(4, steps // 15), "a critic learns its student before it teaches"
            )
        return replace(stage, rows=(*stage.rows, *rows.values()))

    def hours(self, name: str) -> float:
        """Hours of a stage."""
        if name == "teacher" and self.choice.clips > SHORT:
            return self.steps[name] * (2 * self.short_seconds + self.seconds[name]) / 3 / 3600
        return self.steps[name] * self.seconds[name] / 3600

    def report(self) -> str:
        """What people read of a plan."""
        world, choice = self.world, self.choice
        told = [f"actions {', '.join(world.actions)}"] * bool(world.actions) + ["captions"] * bool(world.text_dim)
        lines = [
            f"{world.episodes} clips, {world.px_frames / world.fps / 3600:.2f} h, {world.size[0]}x{world.size[1]} px "
            f"at {world.fps:g} frames/s; {' and '.join(told) or 'nothing is told'}",
            f"teacher: {choice.size} ({SIZES[choice.size][0]} wide, {SIZES[choice.size][1]} layers)"
            f"{', from bundled weights' if choice.warm_teacher else ''}; chunk {choice.chunk}: {choice.why_chunk}",
        ]
        for name in STAGES:
            lines.append(f"  {name:12} {self.steps[name]:6} steps  {self.hours(name) * 60:6.1f} min")
        lines.append(f"  {'latents':12} {'':6}        {self.encode / 60:6.1f} min")
        total = sum(self.hours(name) for name in STAGES) + self.encode / 3600
        return "\n".join([*lines, f"  {'together':12} {'':6}        {total * 60:6.1f} of {self.budget / 60:.0f} min"])

    def record(self, frames: str) -> dict[str, Any]:
        """What checks read of a project."""
        held = next((split for split in ("validation", "test", "train") if split in self.world.splits), "")
        record: dict[str, Any] = {"frames": f"{frames}/{held}".rstrip("/"), "latents": f"latents/{held}".rstrip("/")}
        return record | {
            "budget": self.budget,
            "seconds": dict(self.seconds),
            "gates": GATES,
            "given": self.world.given,
        }

    def script(self, frames: str) -> str:
        """run.sh."""
        held = ",".join(f"{name}:24" for name in self.world.actions)
        action = f" --action {held},still:12" if held else ""
        return SCRIPT.format(frames=frames, action=action, report=self.judged(), budget=f"{self.budget / 3600:.2g} h")

    def judged(self) -> str:
        """The line of run.sh that judges the last student on clips that nothing learned from, where there are any."""
        split = next((split for split in ("test", "validation") if split in self.world.splits), "")
        if not split:
            return 'echo "no report: the data hold no clips out; make them with a share of test"'
        judge = f'vidistill eval runs/diagonal/diagonal --data "$frames" --split {split} --quick --out report'
        return f'{judge} || echo "no report, for the reason above; the student is none the worse"'


SCRIPT = """\
#!/usr/bin/env bash
# From clips to a streaming student, in about {budget}. Resumes where it stopped; finished stages are skipped.
# STEPS=3 ./run.sh runs everything in a few steps of each stage, in a folder of its own: a rehearsal of minutes.
set -euo pipefail
cd "$(dirname "$0")"
out=runs gate= steps=
if [ -n "${{STEPS:-}}" ]; then
  rm -rf rehearsal && mkdir rehearsal && cp -r ./*.yaml plan.json rehearsal/
  for made in init starts; do [ ! -d "$made" ] || cp -r "$made" rehearsal/; done
  sed -i 's#data: "\\.\\./#data: "../../#' rehearsal/codec.yaml
  sed -i 's#"frames": "\\.\\./#"frames": "../../#' rehearsal/plan.json
  cd rehearsal
  gate=--lenient steps="steps=$STEPS critic_warmup=0 curriculum=[]"
fi
frames={frames}
[ -d "$frames" ] || frames="../$frames"

train() {{ [ -f "$out/$1/$1.json" ] || vidistill train "$1.yaml" ${{steps:+$steps}}; }}

train codec
vidistill new . --check codec $gate
vidistill data latents latents --from "$frames" --codec runs/codec/codec
train teacher
vidistill new . --check teacher $gate
train tf
train selfforcing
train diagonal
if [ -d starts ]; then # pictures to begin from, where a stream finds them
  mkdir -p runs/diagonal/diagonal-starts && cp starts/* runs/diagonal/diagonal-starts/
fi
vidistill generate runs/diagonal/diagonal -o out.mp4 --seconds 10{action}
[ -d student ] || vidistill export runs/diagonal/diagonal --to ours --whole -o student # a folder to give away
{report}
echo "look at out.mp4, then play it: vidistill serve $PWD/student/student"
"""


# --- timing -----------------------------------------------------------------------------------------------------------


def plan(data: Path, budget: float, warm: bool = True) -> Plan:
    """The plan of a project for the clips in `data`, timed on this machine; ValueError for too short a budget."""
    world = look(data)
    choice = choose(world, warm)
    with tempfile.TemporaryDirectory(prefix="vidistill-") as folder:
        made = timed(world, choice, budget, Path(folder) / "base")
        size = (
            "large" if made.steps["teacher"] > MORE_SIZE else "small" if made.steps["teacher"] < LESS_SIZE else "base"
        )
        if size != "base" and not (choice.warm_teacher and size == "small"):
            made = timed(world, replace(choice, size=size, warm_teacher=None), budget, Path(folder) / size)
    short = [name for name in STAGES if made.steps[name] < FEWEST[name]]
    if short:
        needed = max(FEWEST[n] / max(1, made.steps[n]) for n in short) * budget
        raise ValueError(
            f"--budget {budget / 3600:.2g}h is too short here for {', '.join(short)}: give it at least "
            f"{needed / 3600:.2g}h, or make smaller frames"
        )
    return made


def timed(world: World, choice: Choice, budget: float, folder: Path) -> Plan:
    """Run some steps of every stage in a scratch folder, and share the budget out by what they took."""
    data = world.data / "train" if world.splits else world.data
    stages = stages_of(world, choice, str(data), str(folder / "latents"))
    write_stand_ins(folder, world, choice, stages)
    seconds = {}
    for name in STAGES:
        changes = {"out": str(folder / "runs"), "steps": 10_000, **paths_in(folder, stages, name)}
        seconds[name] = seconds_of(config(stages, name, **changes))
    short = seconds["teacher"]
    if choice.clips > SHORT:
        changes = {"out": str(folder / "runs"), "steps": 10_000, "frames": SHORT, **paths_in(folder, stages, "teacher")}
        short = seconds_of(config(stages, "teacher", **changes))
    encode = encoding(world, codec_geometry(stages["codec"], choice))
    left = max(0.0, budget * (1 - REST) - encode)
    steps = share_out(left, {**seconds, "teacher": (2 * short + seconds["teacher"]) / 3}, choice)
    return Plan(world, choice, budget, seconds, steps, encode, short)


def share_out(left: float, seconds: Mapping[str, float], choice: Choice) -> dict[str, int]:
    """Steps of every stage; what one does not need goes to the others."""
    enough = dict(ENOUGH)
    for name, warm in (("codec", choice.warm_codec), ("teacher", choice.warm_teacher)):
        enough[name] = round(enough[name] * (WARM_SHARE if warm else 1))
    steps, open_stages = dict.fromkeys(STAGES, 0), set(STAGES)
    while open_stages:
        total = sum(SHARES[name] for name in open_stages)
        asked = {name: int(left * SHARES[name] / total / seconds[name]) for name in open_stages}
        full = {name for name in open_stages if asked[name] >= enough[name]}
        for name in full or open_stages:
            steps[name] = min(asked[name], enough[name])
            left -= steps[name] * seconds[name] if full else 0.0
        open_stages = open_stages - full if full else set()
    return steps


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
    if world.actions:
        tensors["actions"] = torch.rand(clips, choice.clips, world.factor * len(world.actions) + 1)
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


def seconds_of(cfg: TrainConfig) -> float:
    """Seconds a step of a stage, the mean over a round of student and critic where there are both."""
    trainer = Trainer(cfg)
    rounds = 1 if not cfg.rolls else cfg.critic_steps + 1
    for _ in range(1 if rounds == 1 else 2):
        trainer.step()
    began, count = time.perf_counter(), TIMED if rounds == 1 else rounds
    for _ in range(count):
        trainer.step()
    return (time.perf_counter() - began) / count


def encoding(world: World, geometry: Any) -> float:
    """Seconds that the latents of all frames take."""
    frames = torch.zeros(1, min(world.length, 1 + 8 * world.factor), *world.size, 3, dtype=torch.uint8)
    codec = TinyCodec(geometry).eval().requires_grad_(False)
    latent_shard(({"frames": frames}, [{}]), codec)
    began = time.perf_counter()
    latent_shard(({"frames": frames}, [{}]), codec)
    return (time.perf_counter() - began) / frames.shape[1] * world.px_frames


# --- checks -----------------------------------------------------------------------------------------------------------


def check(folder: Path, name: str, lenient: bool) -> str:
    """Judge the codec or the teacher of a project on held-out clips; ValueError where it is too bad to go on with."""
    path = folder / "plan.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no project of `vidistill new`: there is no {path}")
    plan = read_json(path)
    found = check_codec(folder, plan) if name == "codec" else check_teacher(folder, plan)
    gates = {key: plan["gates"][key] for key in found}
    bad = [key for key, (low, high) in gates.items() if not low <= found[key] <= high]
    said = ", ".join(f"{key} {value:.3g} (from {gates[key][0]:g} to {gates[key][1]:g})" for key, value in found.items())
    if bad and not lenient:
        raise ValueError(
            f"{name} is not good enough in {', '.join(bad)}: {said}. Raise steps in {name}.yaml and run it again; or, "
            f"if it looks right to you, widen the gate in {path}"
        )
    return f"{name}: {said}" + (f"; {', '.join(bad)} would stop a real run" if bad else "")


def held_out(folder: Path, name: str) -> Clips:
    path = folder / name
    if not (path / META).is_file():
        raise DataError(f"{path} is not there; run run.sh from its beginning")
    return Clips(path)


@torch.no_grad()
def check_codec(folder: Path, plan: Mapping[str, Any]) -> dict[str, float]:
    """PSNR, sharpness beside real, and how much of what moves is kept; writes how much each channel shows."""
    codec = checkpoint.load(str(folder / "runs" / "codec" / "codec"), "codec").net
    clips = held_out(folder, plan["frames"])
    length = 1 + min(8, (clips.longest("frames") - 1) // codec.temporal_factor) * codec.temporal_factor
    px = clips.frames(8, length, 0, 0)
    latents = codec.encode(px)
    decoded = codec.decode(latents)
    with torch.enable_grad():
        shown = visibility(codec, latents[:2], torch.Generator().manual_seed(0)).sqrt()
    weights = ", ".join(f"{w:.3g}" for w in (shown / shown.mean()).clamp_min(0.1).tolist())
    note = "# How much each latent channel of the trained codec shows, as `vidistill new . --check codec` measured it."
    write_text(folder / "measured.yaml", f"{note}\nloss: {{channel_weights: [{weights}]}}\n")
    return {
        "psnr": float(metrics.psnr(decoded, px).mean()),
        "sharpness": float(metrics.sharpness(decoded).mean() / metrics.sharpness(px).mean().clamp_min(1e-6)),
        "moving": moving_kept(decoded, px),
    }


def moving_kept(decoded: Tensor, px: Tensor, share: float = 0.01) -> float:
    """How much of the pixels farthest from their median over the clip is there: 1 all, 0 the median in their place."""
    away = (px - px.median(1, keepdim=True).values).abs().amax(2)
    error = (decoded - px).abs().amax(2)
    far = away >= torch.quantile(away.flatten()[:: max(1, away.numel() // 1_000_000)], 1 - share)
    return max(0.0, 1 - float(error[far].sum() / away[far].sum().clamp_min(1e-6)))


@torch.no_grad()
def check_teacher(folder: Path, plan: Mapping[str, Any]) -> dict[str, float]:
    """Sharpness and motion of the teacher's samples beside real clips that begin the same."""
    bundle = checkpoint.load(str(folder / "runs" / "teacher" / "teacher"), "teacher")
    codec = checkpoint.load(str(folder / "runs" / "codec" / "codec"), "codec").net
    clips = held_out(folder, plan["latents"])
    frames = min(bundle.record["shape"]["frames"], clips.longest("latents"))
    batch = clips.latents(4, frames, 0, 0)
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0))
    guidance = bundle.record["guidance"]
    nulls, scales = ([], []) if guidance == 1 else ([batch.cond.null()], [guidance])
    made = sample(
        bundle.net,
        noise,
        bundle.noise.steps(16),
        batch.cond,
        given=batch.x[:, : batch.given],
        nulls=nulls,
        scales=scales,
    )
    px, real = codec.decode(made), codec.decode(batch.x)
    return {
        "teacher_sharpness": float(metrics.sharpness(px).mean() / metrics.sharpness(real).mean().clamp_min(1e-6)),
        "teacher_motion": float(metrics.motion(px).mean() / metrics.motion(real).mean().clamp_min(1e-6)),
    }
