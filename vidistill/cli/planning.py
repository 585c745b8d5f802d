"""How a budget of time becomes steps: every stage is timed here, then each gets its share."""

import math
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.cli import timing
from vidistill.cli.recipe import (
    COPY_STARTS,
    SIZES,
    STAGES,
    Choice,
    Row,
    Stage,
    choose,
    codec_geometry,
    stages_of,
)
from vidistill.cli.timing import CPU_FACTOR, Took
from vidistill.cli.world import SHORT, World, look
from vidistill.codecs import visibility
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import branches
from vidistill.data.clips import Clips
from vidistill.data.shards import META, DataError
from vidistill.io import read_json, write_text
from vidistill.progress import Bar
from vidistill.sampling import sample

SHARES = {"codec": 0.15, "teacher": 0.45, "tf": 0.08, "selfforcing": 0.2, "diagonal": 0.12}
REST = 0.05  # of the budget: starting up, checks, videos
ENOUGH = {"codec": 6000, "teacher": 12_000, "tf": 1000, "selfforcing": 3000, "diagonal": 2000}
FEWEST = {"codec": 120, "teacher": 200, "tf": 30, "selfforcing": 60, "diagonal": 60}
WARM_SHARE = 0.4  # of the steps that a stage from nothing needs, measured on a driving game
AWAY = 0.05  # from its median over a clip, at which a pixel has moved at all
BUSY = 1.25  # wall over planned time from which a machine is called busy
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
    measured: Mapping[str, Took]  # what a step took here

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
            return self.steps[name] * mean_teacher(self.seconds[name], self.short_seconds) / 3600
        return self.steps[name] * self.seconds[name] / 3600

    def report(self) -> str:
        """What people read of a plan."""
        world, choice = self.world, self.choice
        lines = [
            f"{world.episodes} clips, {world.px_frames / world.fps / 3600:.2f} h, {world.size[0]}x{world.size[1]} px "
            f"at {world.fps:g} frames/s; {', '.join(world.conditions) or 'no conditions'}",
            f"teacher: {choice.size} ({SIZES[choice.size][0]} wide, {SIZES[choice.size][1]} layers)"
            f"{', from bundled weights' if choice.warm_teacher else ''}; chunk {choice.chunk}: {choice.why_chunk}",
        ]
        for name in STAGES:
            one = self.measured[name]
            took = f"{self.seconds[name]:7.3f} s a step ({one.cpu:.3f} s of CPU, {one.wall:.3f} s of wall time)"
            lines.append(f"  {name:12} {self.steps[name]:6} steps  {self.hours(name) * 60:6.1f} min  {took}")
        lines.append(f"  {'latents':12} {'':6}        {self.encode / 60:6.1f} min")
        total = sum(self.hours(name) for name in STAGES) + self.encode / 3600
        lines.append(f"  {'together':12} {'':6}        {total * 60:6.1f} of {self.budget / 60:.0f} min")
        return "\n".join(lines) + self.beside()

    def beside(self) -> str:
        """How steps were timed where other programs ran, on lines of their own; nothing on a quiet machine."""
        wall, quiet = sum(one.wall for one in self.measured.values()), sum(self.seconds.values())
        if wall < BUSY * quiet:
            return ""
        return (
            f"\nother programs kept this machine busy: steps took {wall / quiet:.1f} times as long. Planned is what "
            f"they take without: {CPU_FACTOR:g} x CPU time over {timing.threads()} threads. Beside as much other work, "
            f"{written(self.budget)} become {written(self.budget * wall / quiet)}"
        )

    def record(self, frames: str) -> dict[str, Any]:
        """What checks read of a project."""
        held = next((split for split in ("validation", "test", "train") if split in self.world.splits), "")
        record: dict[str, Any] = {"frames": f"{frames}/{held}".rstrip("/"), "latents": f"latents/{held}".rstrip("/")}
        return record | {
            "budget": self.budget,
            "seconds": dict(self.seconds),
            "measured": {name: asdict(one) for name, one in self.measured.items()},
            "threads": timing.threads(),
            "gates": GATES,
            "given": self.world.given,
        }

    def script(self, frames: str) -> str:
        """run.sh."""
        held = ",".join(f"{name}:24" for name in self.world.names)
        action = f" --action {held},still:12" if held else ""
        return SCRIPT.format(
            frames=shlex.quote(frames),
            copy_starts=COPY_STARTS,
            action=action,
            report=self.judged(),
            budget=f"{self.budget / 3600:.2g} h",
        )

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
{copy_starts}
vidistill generate runs/diagonal/diagonal -o out.mp4 --seconds 10{action}
[ -d student ] || vidistill export runs/diagonal/diagonal --to ours --whole -o student # a folder to give away
{report}
echo "look at out.mp4, then play it: vidistill serve $PWD/student/student"
"""


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(data: Path, budget: float, warm: bool = True) -> Plan:
    """The plan of a project for the clips in `data`, timed on this machine; ValueError for too short a budget."""
    world = look(data)
    choice = choose(world, warm)
    refuse_hopeless(world, replace(choice, size="small"), budget)
    with tempfile.TemporaryDirectory(prefix="vidistill-") as folder:
        made = timed(world, choice, budget, Path(folder))
    short = [name for name in STAGES if made.steps[name] < FEWEST[name]]
    if short:
        needed = max(FEWEST[n] / max(1, made.steps[n]) for n in short) * budget
        raise ValueError(
            f"--budget {written(budget)} is too short here for {', '.join(short)}: give it at least {written(needed)}, "
            f"or make smaller frames{made.beside()}"
        )
    return made


def refuse_hopeless(world: World, choice: Choice, budget: float) -> None:
    """Raise ValueError, before anything is timed, for a budget that the operations alone of the fewest steps exceed."""
    least = timing.least_seconds(world, choice, scratch_stages(world, choice, Path()), FEWEST)
    if least > budget * (1 - REST):
        raise ValueError(
            f"--budget {written(budget)} cannot do: the operations alone of the fewest steps take {written(least)} "
            "here, and steps need several times as much; give it more, or make smaller frames or fewer clips"
        )


def written(seconds: float) -> str:
    """A time as --budget takes it, rounded up."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes}m" if minutes < 90 else f"{math.ceil(minutes / 6) / 10:g}h"


def scratch_stages(world: World, choice: Choice, folder: Path) -> dict[str, Stage]:
    """The stages on the project's own frames, and on latents of a scratch folder."""
    return stages_of(world, choice, str(world.data / "train" if world.splits else world.data), str(folder / "latents"))


def timed(world: World, choice: Choice, budget: float, folder: Path) -> Plan:
    """Time every stage in a scratch folder, and share the budget out by what a step takes."""
    found = dict[str, Took]()
    with Bar(len(STAGES), "timing", "stage") as bar:

        def measure(name: str, frames: int = 0) -> Took:
            bar.describe(f"timing {name}")
            return timing.measure(world, choice, stages, name, place, frames)

        def teacher() -> tuple[Took, Took]:
            whole = measure("teacher")
            return whole, measure("teacher", SHORT) if choice.clips > SHORT else whole

        stages, place = prepared(world, choice, folder / choice.size)
        found["codec"] = measure("codec")
        encode = timing.encoding(world, codec_geometry(stages["codec"], choice))
        left = max(0.0, budget * (1 - REST) - encode.quiet)
        bar.update()
        found["teacher"], short = teacher()
        size = size_for(left * SHARES["teacher"] / mean_teacher(found["teacher"].quiet, short.quiet))
        if size != choice.size and not (choice.warm_teacher and size == "small"):
            choice = replace(choice, size=size, warm_teacher=None)
            stages, place = prepared(world, choice, folder / size)
            found["teacher"], short = teacher()
        bar.update()
        for name in STAGES[2:]:
            found[name] = measure(name)
            bar.update()
    seconds = {name: one.quiet for name, one in found.items()}
    steps = share_out(left, {**seconds, "teacher": mean_teacher(seconds["teacher"], short.quiet)}, choice)
    return Plan(world, choice, budget, seconds, steps, encode.quiet, short.quiet, found)


def prepared(world: World, choice: Choice, folder: Path) -> tuple[dict[str, Stage], Path]:
    """The stages in a scratch folder that holds what they start from."""
    stages = scratch_stages(world, choice, folder)
    timing.write_stand_ins(folder, world, choice, stages)
    return stages, folder


def size_for(steps: float) -> str:
    """The size of network that so many steps of a teacher are worth."""
    return "large" if steps > MORE_SIZE else "small" if steps < LESS_SIZE else "base"


def mean_teacher(whole: float, short: float) -> float:
    """Seconds of a teacher's step: two thirds of them on short clips."""
    return (2 * short + whole) / 3


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


def held_out(folder: Path, name: str, camera: CameraConfig | None = None) -> Clips:
    path = folder / name
    if not (path / META).is_file():
        raise DataError(f"{path} is not there; run run.sh from its beginning")
    return Clips(path, camera=camera)


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
    """How much of the pixels farthest from their median over the clip is there: 1 all, 0 the median in their place.

    1 for clips in which nothing moves."""
    away = (px - px.median(1, keepdim=True).values).abs().amax(2)
    error = (decoded - px).abs().amax(2)
    quantile = torch.quantile(away.flatten()[:: max(1, away.numel() // 1_000_000)], 1 - share)
    far = away >= quantile.clamp_min(AWAY)  # a ball is fewer pixels than `share`, and the still ones beside it none
    if not far.any():
        return 1.0
    return max(0.0, 1 - float(error[far].sum() / away[far].sum().clamp_min(1e-6)))


@torch.no_grad()
def check_teacher(folder: Path, plan: Mapping[str, Any]) -> dict[str, float]:
    """Sharpness and motion of the teacher's samples beside real clips that begin the same."""
    bundle = checkpoint.load(str(folder / "runs" / "teacher" / "teacher"), "teacher")
    codec = checkpoint.load(str(folder / "runs" / "codec" / "codec"), "codec").net
    clips = held_out(folder, plan["latents"], bundle.spec.played.camera)
    frames = min(bundle.record["shape"]["frames"], clips.longest("latents"))
    batch = clips.latents(4, frames, 0, 0)
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0))
    nulls, scales = branches(batch.cond, bundle.record["guidance"], bundle.record["audio_guidance"])
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
