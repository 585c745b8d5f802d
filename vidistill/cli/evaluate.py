"""`vidistill eval`."""

import argparse
import json
from pathlib import Path
from typing import Any

from vidistill.cli.options import non_negative_int, numbers, positive_float, positive_int

COUNTED = {"quality": "clips", "memory": "paths", "minutes": "streams"}  # suites, and what --clips counts


def add_eval(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "eval",
        help="judge a student beside its teacher and real video",
        description="Student, teacher and real video side by side on held-out episodes; plots, sheets, a report.",
        epilog="Distances compare at equal numbers of clips only: fewer clips, larger distance. Held-out episodes are "
        "recorded into data/ the first time (a minute or two), and samples of a teacher are kept there.",
    )
    p.add_argument("name", nargs="?", help="a bundled name or the path of a student, teacher or codec")
    p.add_argument("--frontier", type=Path, help="YAML of schedules and contexts to tune equally, run and compare")
    p.add_argument("--teacher", help="the teacher beside it (default: the one in its card)")
    p.add_argument("--vs", help="another student beside it, such as its initialisation: paired differences are shown")
    p.add_argument("--guidance", type=positive_float, help="of the teacher (default: what its record says)")
    p.add_argument(
        "--choose-guidance",
        type=numbers,
        metavar="G1,G2,...",
        help="of these the teacher's best on validation: written with the reasons to OUT/NAME-guidance.json",
    )
    p.add_argument(
        "--data",
        type=Path,
        help="held-out clips of a world of one's own: a folder of splits, or one split beside its train folder",
    )
    p.add_argument("--suite", choices=COUNTED, default="quality", help="what to judge (default: quality)")
    p.add_argument(
        "--clips",
        type=positive_int,
        help="held-out clips or captions (default and protocol: 256; any world: 128), paths of each kind (6), or "
        "walks of minutes (64)",
    )
    p.add_argument("--window", help="suite memory: the baseline with window memory (default: NAME-window)")
    p.add_argument("--full", help="suite memory: the baseline that keeps everything (default: NAME-full)")
    p.add_argument("--write-paths", type=Path, help="suite memory, no name: a new folder of paths for another system")
    p.add_argument("--videos", type=Path, help="suite memory, no name: judge the videos that it put into that folder")
    p.add_argument(
        "--split",
        choices=("test", "validation"),
        help="whose rooms: test for what is published (default), validation to choose settings by",
    )
    p.add_argument("--first-seed", type=non_negative_int, help="the first room of the split (default: 0)")
    p.add_argument("--quick", action="store_true", help="fewer clips of the checkpoint alone, with wide intervals")
    p.add_argument("--glance", action="store_true", help="the student's validation clips alone, no report")
    p.add_argument(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="published metrics on local weights: lpips, fvd, vbench.subject_consistency and others",
    )
    p.add_argument("--allow-pickle", action="store_true", help="read those weights from .pt files too, weights only")
    p.add_argument("--out", type=Path, help="folder of the report (default: out/eval)")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.set_defaults(run=run_eval)
    return p


def run_eval(args: argparse.Namespace) -> None:
    outside = args.write_paths or args.videos
    if not args.name and not args.frontier and not outside:
        raise ValueError("name a checkpoint, or give --frontier")
    inside = run_frontier if args.frontier else run_guidance if args.choose_guidance else run_suite
    result = (run_outside if outside else inside)(args)
    if args.json:
        print(json.dumps(result))


def run_outside(args: argparse.Namespace) -> dict[str, Any]:
    """The memory benchmark of other systems: its paths written, or their videos judged."""
    from vidistill.evaluation import SUITES, benchmark, report

    given = {"NAME": args.name, "--frontier": args.frontier, "--teacher": args.teacher, "--data": args.data}
    given |= {"--window": args.window, "--full": args.full, "--glance": args.glance, "--metric": args.metric}
    given |= {"--vs": args.vs, "--guidance": args.guidance, "--choose-guidance": args.choose_guidance}
    if args.videos:  # its paths say the rest
        given |= {"--write-paths": args.write_paths, "--clips": args.clips, "--first-seed": args.first_seed}
        given |= {"--split": args.split, "--quick": args.quick}
    if foreign := [key for key, value in given.items() if value]:
        option = "--videos" if args.videos else "--write-paths"
        raise ValueError(f"{', '.join(foreign)} say nothing to {option}; leave them out")
    if args.suite != "memory":
        raise ValueError("--write-paths and --videos are of the memory benchmark; add --suite memory")
    memory = SUITES["memory"]
    asked = {"first_seed": args.first_seed, "paths": args.clips, "out": args.out and str(args.out)}
    settings = {key: value for key, value in asked.items() if value}
    cfg = memory.config(**{**(memory.quick if args.quick else {}), **settings})
    if args.write_paths:
        written: dict[str, Any] = benchmark.write_paths(args.write_paths, cfg, args.split or "test")
        print(f"{len(written['paths'])} paths in {args.write_paths}; videos belong into {args.write_paths / 'videos'}")
        return written
    result: dict[str, Any] = benchmark.judge_videos(args.videos, cfg)
    report.show(memory.metrics, result, [], cfg.out and benchmark.report_folder(args.videos, cfg.out))
    return result


def run_frontier(args: argparse.Namespace) -> dict[str, Any]:
    from vidistill.evaluation import ablation, report
    from vidistill.progress import console

    given = {"name": args.name, "--clips": args.clips, "--glance": args.glance, "--teacher": args.teacher}
    given |= {"--window": args.window, "--full": args.full, "--suite": args.suite != "quality", "--out": args.out}
    given |= {"--data": args.data, "--metric": args.metric, "--vs": args.vs}
    given |= {"--guidance": args.guidance, "--choose-guidance": args.choose_guidance}
    given |= {"--first-seed": args.first_seed, "--split": args.split, "--quick": args.quick}
    if foreign := [key for key, value in given.items() if value]:
        raise ValueError(f"{', '.join(foreign)} say nothing to a frontier; its YAML names cells, clips and folder")
    report.check_plots()
    result = ablation.frontier(args.frontier)
    console().print(ablation.table(result))
    return result


def run_guidance(args: argparse.Namespace) -> dict[str, Any]:
    from vidistill import checkpoint
    from vidistill.evaluation import SUITES, suite, suite_of
    from vidistill.io import write_json

    given = {"--suite": args.suite != "quality", "--split test": args.split == "test", "--guidance": args.guidance}
    given |= {"--teacher": args.teacher, "--vs": args.vs, "--window": args.window, "--full": args.full}
    given |= {"--quick": args.quick, "--glance": args.glance}
    if foreign := [key for key, value in given.items() if value]:
        raise ValueError(
            f"{', '.join(foreign)} say nothing to --choose-guidance, which chooses a teacher's scale on validation by "
            "the suite of quality; leave them out"
        )
    own = (
        SUITES["any_world"] if args.data else suite_of(args.name, checkpoint.read_record(checkpoint.locate(args.name)))
    )
    cfg = own.config(**settings_of(args, "clips"))
    result = suite.choose_guidance(own, args.name, args.choose_guidance, cfg)
    path = Path(cfg.out) / f"{result['teacher']}-guidance.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"guidance {result['guidance']:g}: {result['why']} ({path})")
    return result


def settings_of(args: argparse.Namespace, counted: str) -> dict[str, Any]:
    """What is asked of a suite; `counted`: its name for --clips."""
    asked = {
        "first_seed": args.first_seed,
        counted: args.clips,
        "out": args.out and str(args.out),
        "data": args.data and str(args.data),
        "metrics": dict(item.partition("=")[::2] for item in args.metric),
        "allow_pickle": args.allow_pickle,
        "guidance": args.guidance,
    }
    return {key: value for key, value in asked.items() if value}


def run_suite(args: argparse.Namespace) -> dict[str, Any]:
    from vidistill import checkpoint
    from vidistill.evaluation import SUITES, suite, suite_of

    memory, minutes = args.suite == "memory", args.suite == "minutes"
    named = {"teacher": args.teacher, "window": args.window, "full": args.full, "vs": args.vs}
    if minutes and (args.glance or args.metric or args.vs or args.guidance):
        options = "--glance, --metric, --vs and --guidance"
        raise ValueError(f"{options} say nothing to --suite minutes; leave them out, or the suite")
    if memory and (args.glance or args.teacher or args.metric or args.vs or args.guidance):
        options = "--glance, --teacher, --metric, --vs and --guidance"
        raise ValueError(f"{options} say nothing to --suite memory; leave them out, or the suite")
    if not memory and (args.window or args.full):
        raise ValueError("--window and --full name baselines of --suite memory; add it, or leave them out")
    if args.data and (memory or minutes or args.first_seed is not None):
        raise ValueError("--data names the clips that are judged: leave out --suite and --first-seed")
    if args.quick and (args.glance or any(named.values())):
        raise ValueError("--quick shows the checkpoint alone: leave out --glance, --teacher, --vs, --window and --full")
    if args.glance and (args.teacher or args.out or args.vs):
        option = "--teacher" if args.teacher else "--vs" if args.vs else "--out"
        raise ValueError(f"{option} says nothing to --glance, which shows the student alone; leave one of them out")
    if args.glance and args.split == "test":
        raise ValueError("--glance is to choose by, and shows validation clips; leave out --split test")
    chosen = "any_world" if args.data else args.suite if args.suite != "quality" else ""
    own = SUITES[chosen] if chosen else suite_of(args.name, checkpoint.read_record(checkpoint.locate(args.name)))
    settings = settings_of(args, COUNTED[args.suite])
    if not args.glance:
        return suite.run(own, args.name, named, args.split or "test", args.quick, **settings)
    cfg = own.config(**settings)
    result = suite.glance(own, args.name, cfg)
    print("  ".join(f"{key} {value:.3f}" for key, value in result.items() if isinstance(value, float)))
    return {**result, "clips": cfg.clips}
