"""`vidistill bench`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidistill.cli.options import add_speed, positive_float, positive_int, speed_of


def add_bench(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "bench",
        help="measure speed and latency",
        description="Time a streaming student, beside another student or a teacher in the same run.",
    )
    p.add_argument("name", nargs="?", help="a bundled name or the path of a student")
    p.add_argument("--vs", help="a student or teacher to measure in the same run, computed alike; NAME itself: plain")
    p.add_argument(
        "--growth",
        action="store_true",
        help="chunk time and bytes after 1, 10 and 60 minutes of stream; past --growth-run the clock is advanced",
    )
    p.add_argument(
        "--growth-run", type=positive_float, metavar="MINUTES", help="with --growth: what really runs (default: 1)"
    )
    p.add_argument("--random-weights", nargs="*", metavar="key=value", help="bench any shape without a checkpoint")
    p.add_argument("--weights", type=Path, help="with --random-weights: a published file whose weights fit the shape")
    p.add_argument("--family", help="format of --weights (default: self-forcing)")
    p.add_argument("--allow-pickle", action="store_true", help="read --weights from a .pt file (weights only)")
    p.add_argument("--profile", action="store_true", help="with --random-weights: which operators take the time")
    p.add_argument(
        "--batch", type=positive_int, default=1, help="also time so many streams in one pass, beside one alone"
    )
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_speed(p)
    p.set_defaults(run=run_bench)
    return p


def run_bench(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vidistill.bench import bench

    check_bench(args)
    console = Console(stderr=True)
    with console.status("warming up") as status:

        def progress(part: float, what: str) -> None:
            status.update(f"{part:.0%} {what}")

        if args.random_weights is not None:
            result = run_random(args, progress)
        else:
            cfg = bench.BenchConfig(batch=args.batch, **growth_run(args))
            more = {"speed": speed_of(args), "growth": args.growth, "progress": progress}
            result = bench.bench(args.name, cfg, vs=args.vs, **more)
    Console().print(result.table())
    if args.json:
        print(result.to_json())


def check_bench(args: argparse.Namespace) -> None:
    """ValueError for options that the bench that was asked for does not read."""
    checkpoints = {"NAME": args.name, "--vs": args.vs}
    reading = {"--family": args.family, "--allow-pickle": args.allow_pickle}
    shapes = {"--weights": args.weights, **reading, "--profile": args.profile}
    if args.random_weights is not None:
        if foreign := [key for key, value in checkpoints.items() if value]:
            raise ValueError(f"{', '.join(foreign)} would be ignored by --random-weights, which loads no checkpoint")
        if not args.weights and (foreign := [key for key, value in reading.items() if value]):
            raise ValueError(f"{', '.join(foreign)} would be ignored: name the file to read as --weights")
    elif not args.name:
        raise ValueError("name a student, or give --random-weights")
    elif foreign := [key for key, value in shapes.items() if value]:
        raise ValueError(f"{', '.join(foreign)} would be ignored without --random-weights: add it, or leave them out")
    if args.growth_run and not args.growth:
        raise ValueError("--growth-run would be ignored without --growth: add it, or leave --growth-run out")


def growth_run(args: argparse.Namespace) -> dict[str, Any]:
    """The setting of --growth-run, if it was given."""
    return {"growth_run": args.growth_run} if args.growth_run else {}


def run_random(args: argparse.Namespace, progress: Any) -> Any:
    """A bench without a checkpoint; what was asked to be faster runs beside the plain network."""
    from vidistill.bench import random_weights
    from vidistill.interop.formats import read_student

    cfg, net = replace(random_weights.RandomConfig.parse(args.random_weights), **growth_run(args)), None
    if args.weights:
        family = args.family or "self-forcing"
        net = read_student(args.weights, family, allow_pickle=args.allow_pickle, heads=cfg.heads).net()
    more = {"growth": args.growth, "batch": args.batch, "profiled": args.profile}
    return random_weights.random_bench(cfg, cfg.bundle(net), speed=speed_of(args), progress=progress, **more)
