"""`vidistill new`: a project for a world of one's own, sized for this machine and a budget of time."""

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidistill.cli.options import positive_float, positive_int

if TYPE_CHECKING:
    from vidistill.cli.planning import Plan

BUDGET = 3 * 3600.0  # seconds
UNITS = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0}


def duration(text: str) -> float:
    """Seconds of a time such as 3h, 90m or 1h30m."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(h|min|m|s)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 3h, 90m or 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def add_new(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "new",
        help="make a project: configs and a script from clips to a streaming student",
        description="Look at clips and at this machine, measure seconds a step, and write NAME/*.yaml and NAME/run.sh: "
        "codec, latents, teacher, causal init, Self Forcing, Diagonal Distillation, sized for the budget. Every number "
        "has its reason beside it; edit what you like. run.sh resumes where it stopped.",
        epilog="example: vidistill new mine --data data/mine --budget 3h && mine/run.sh",
    )
    p.add_argument("name", type=Path, help="folder to write")
    p.add_argument("--data", type=Path, help="clips made by `vidistill data videos` or `vidistill data gym`, as frames")
    p.add_argument(
        "--budget",
        type=duration,
        help="wall time on this machine when nothing else runs, e.g. 3h or 90m (default: 3h)",
    )
    p.add_argument(
        "--init", help="a Wan network to start from, a folder or hf://ORG/NAME: the project is for GPUs then"
    )
    p.add_argument("--gpus", type=positive_int, help="with --init: how many (default: 1)")
    p.add_argument("--gpu-memory", type=positive_float, help="with --init: GB of each of them (default: 80)")
    p.add_argument("--cold", action="store_true", help="start from nothing, not from bundled weights that fit")
    p.add_argument(
        "--check", choices=("codec", "teacher"), help="of a project: judge what run.sh trained; exit 1 if it is bad"
    )
    p.add_argument("--lenient", action="store_true", help="with --check: say what is bad, and go on")
    p.set_defaults(run=run_new)
    return p


def run_new(args: argparse.Namespace) -> None:
    from vidistill.cli import planning
    from vidistill.io import check_folder

    if args.check:
        print(planning.check(args.name, args.check, args.lenient))
        return
    if args.data is None:
        raise ValueError("--data is missing: name the clips that the project is for")
    if args.name.exists() and (not args.name.is_dir() or any(args.name.iterdir())):
        raise ValueError(f"{args.name} is there and not empty; name a new folder, or remove it")
    check_folder(args.name, "NAME")
    if args.init:
        print(from_wan(args))
        return
    if args.gpus or args.gpu_memory:
        raise ValueError("--gpus and --gpu-memory size a project from a Wan network: add --init, or leave them out")
    plan = planning.plan(args.data, args.budget or BUDGET, not args.cold)
    write_project(args.name, plan)
    print(plan.report(), f"start it: {args.name / 'run.sh'}", sep="\n")


def from_wan(args: argparse.Namespace) -> str:
    """Write a project that starts from a Wan network; returns what to say of it."""
    from vidistill.cli import wan_recipe

    if args.budget or args.cold:
        raise ValueError("--budget and --cold size a project for this machine: leave them out beside --init")
    made = wan_recipe.wan_plan(args.data, args.init, args.gpus or 1, args.gpu_memory or 80.0)
    return f"{wan_recipe.write(args.name, made)}\nstart it: {args.name / 'run.sh'}"


def write_project(folder: Path, plan: "Plan") -> None:
    """Write the files of a project."""
    from vidistill.cli import recipe

    frames = os.path.relpath(plan.world.data, folder)
    stages = plan.stages_for(frames if not plan.world.splits else f"{frames}/train", latents_of(plan))
    recipe.write_project(folder, plan.world, stages, plan.record(frames), plan.script(frames))
    (folder / "measured.yaml").write_text(MEASURED, encoding="utf-8")
    recipe.write_warm(folder, stages, plan.choice)


def latents_of(plan: "Plan") -> str:
    return "latents/train" if plan.world.splits else "latents"


MEASURED = """\
# What `vidistill new . --check codec` measures of the trained codec: how much each latent channel shows.
loss: {channel_weights: []}
"""
