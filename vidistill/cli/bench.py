"""`vidistill bench`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidistill.cli.options import JSON, SPEED, Arguments, add_command, positive_float, positive_int, speed_of

ARGUMENTS: Arguments = {
    "name": {"nargs": "?", "help": "a bundled name or the path of a student"},
    "--vs": {"help": "a student or teacher to measure in the same run, computed alike; NAME itself: plain"},
    "--growth": {
        "action": "store_true",
        "help": "chunk time and bytes after 1, 10 and 60 minutes of stream; past --growth-run the clock is advanced",
    },
    "--growth-run": {
        "type": positive_float,
        "metavar": "MINUTES",
        "help": "with --growth: minutes that really run (default: 1)",
    },
    "--random-weights": {"nargs": "*", "metavar": "key=value", "help": "bench any shape without a checkpoint"},
    "--weights": {"type": Path, "help": "with --random-weights: a published file whose weights fit the shape"},
    "--family": {"help": "format of --weights (default: self-forcing)"},
    "--allow-pickle": {"action": "store_true", "help": "read --weights from a .pt file (weights only)"},
    "--profile": {"action": "store_true", "help": "with --random-weights: which operators take the time"},
    "--batch": {"type": positive_int, "default": 1, "help": "also time so many streams in one pass, beside one alone"},
    **JSON,
    **SPEED,
}


def add_bench(commands: Any) -> None:
    about = {
        "help": "measure speed and latency",
        "description": "Time a streaming student, beside another student or a teacher in the same run.",
    }
    add_command(commands, "bench", run_bench, ARGUMENTS, **about)


def run_bench(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vidistill.bench import bench, random_weights
    from vidistill.progress import console

    check_options(args)
    run = {"growth_run": args.growth_run} if args.growth_run else {}
    with console().status("warming up") as status:
        more: dict[str, Any] = {
            "speed": speed_of(args),
            "growth": args.growth,
            "progress": lambda part, what: status.update(f"{part:.0%} {what}"),
        }
        if args.random_weights is None:
            result = bench.bench(args.name, bench.BenchConfig(batch=args.batch, **run), vs=args.vs, **more)
        else:
            cfg = replace(random_weights.RandomConfig.parse(args.random_weights), **run)
            more |= {"batch": args.batch, "profiled": args.profile}
            result = random_weights.random_bench(cfg, cfg.bundle(read_weights(args, cfg.heads)), **more)
    Console().print(result.table())
    if args.json:
        print(result.to_json())


def check_options(args: argparse.Namespace) -> None:
    """ValueError for options that the bench that was asked for does not read."""
    random, reading = args.random_weights is not None, ("--family", "--allow-pickle")
    rules = (  # options, whether they are read, why not
        (("name", "--vs"), not random, "by --random-weights, which loads no checkpoint"),
        (("--weights", *reading, "--profile"), random, "without --random-weights: add it, or leave them out"),
        (reading, args.weights, "without --weights: name the file to read"),
        (("--growth-run",), args.growth, "without --growth: add it, or leave --growth-run out"),
    )
    for options, read, why in rules:
        given = [option for option in options if vars(args)[option.strip("-").replace("-", "_")]]
        if given and not read:
            raise ValueError(f"{', '.join(given)} would be ignored {why}")
    if not random and not args.name:
        raise ValueError("name a student, or give --random-weights")


def read_weights(args: argparse.Namespace, heads: int) -> Any:
    """The network in the file --weights, if there is one."""
    from vidistill.interop.formats import read_student

    if not args.weights:
        return None
    return read_student(args.weights, args.family or "self-forcing", allow_pickle=args.allow_pickle, heads=heads).net()
