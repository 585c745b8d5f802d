"""`vidistill`: parse, load a config, call one function."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vidistill import __version__
from vidistill.cli_data import add_convert, add_data, amount, count, place

log = logging.getLogger("vidistill")
GAIN = "how far a walker goes by the same action, where the camera is told (default: 1)"
COMPUTING = ("train", "generate", "serve", "bench", "eval", "data")
USER_ERRORS = (ValueError, FileNotFoundError, ImportError, RuntimeError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if args.verbose else logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if args.command in COMPUTING:
            from vidistill.ops.precision import fast_float32

            fast_float32()
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted; what was saved is intact", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            raise
        print(f"vidistill {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, one function a subcommand."""
    root = argparse.ArgumentParser(
        prog="vidistill", description="Distil video diffusion models into causal students that stream in real time."
    )
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = (add_train, add_generate, add_serve, add_bench, add_eval, add_diagnose, add_convert, add_data, add_info)
    for add in every:
        command = add(commands)
        command.add_argument("-v", "--verbose", action="store_true", help="more log lines, tracebacks on errors")
    return root


def add_train(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "train",
        help="run a training stage",
        description="Run the training stage of a YAML to its end. The same command resumes it after a stop.",
        epilog="example: vidistill train configs/doom/teacher.yaml steps=2000 optim.lr=3e-4; several processes share a "
        "batch: torchrun --nproc-per-node 8 -m vidistill train stage.yaml parallel=shard",
    )
    p.add_argument("config", help="YAML of the stage")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. optim.lr=1e-4")
    p.add_argument(
        "--dry-run", action="store_true", help="run the stage once on tiny random networks, say what it would take"
    )
    p.set_defaults(run=run_train)
    return p


def run_train(args: argparse.Namespace) -> None:
    from vidistill import distributed
    from vidistill.config import load_config
    from vidistill.stage import TrainConfig
    from vidistill.trainer import train

    cfg = load_config(TrainConfig, args.config, args.overrides)
    if args.dry_run:
        from vidistill import dryrun

        row = dryrun.rehearse(cfg)
        print(dryrun.report(row), json.dumps(row), sep="\n")
        return
    with distributed.group():
        path = train(cfg)
        if distributed.rank() == 0:
            print(path)


def add_generate(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "generate",
        help="stream a student to a video file",
        description="Stream a student to an mp4 and a contact sheet (PNG beside it).",
        epilog="example: vidistill generate doom -o walk.mp4 --seconds 10 --action forward:20,turn_left:16",
    )
    p.add_argument("name", help="a bundled name or the path of a student")
    p.add_argument("-o", "--out", type=Path, default=Path("out.mp4"), help="video file (default: out.mp4)")
    p.add_argument("--seconds", type=amount, default=10.0, help="length of the video (default: 10)")
    p.add_argument("--seed", type=place, default=0, help="seed of the noise (default: 0)")
    p.add_argument("--image", type=Path, help="start picture (PNG); default: a bundled one")
    p.add_argument(
        "--action",
        default="",
        help="what to do, e.g. forward:20,turn_left+forward:16,still:8 (frames), repeated to the end; "
        "`vidistill info NAME` lists a world's actions",
    )
    p.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="[SECONDS [POLICY]:] TEXT",
        help='text, for students that listen to it; repeat it with times: "6 recache: a red ring moves up"; '
        "policies: keep, recache, cut",
    )
    p.add_argument("--scale", type=count, default=4, help="enlarge pixels by this factor (default: 4)")
    p.add_argument("--gain", type=amount, default=1.0, help=GAIN)
    add_speed(p)
    p.set_defaults(run=run_generate)
    return p


def run_generate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vidistill import checkpoint, video
    from vidistill.conditioning import parse_cues, parse_script
    from vidistill.stream import StreamConfig, StreamSession, load_fast

    video.check_film(args.out)
    script, cues = parse_script(args.action), parse_cues(args.prompt)
    if late := next((cue for cue in cues if cue.seconds >= args.seconds), None):
        raise ValueError(
            f"--prompt {late.prompt!r} at {late.seconds:g} s would not be heard in {args.seconds:g} s; raise --seconds"
        )
    bundle, codec = load_fast(args.name, speed_of(args))
    if args.image and not bundle.given_frames:
        raise ValueError(f"--image {args.image}: {args.name} starts from noise, takes no picture; leave --image out")
    size = (bundle.shape.height * codec.spatial_factor, bundle.shape.width * codec.spatial_factor)
    picture = args.image or next(iter(checkpoint.start_pictures(args.name)), None)
    image = video.read_image(picture, size) if picture and bundle.given_frames else None
    with StreamSession(bundle, codec, StreamConfig(seed=args.seed, gain=args.gain), image=image) as session:
        total = max(1, round(args.seconds * session.fps))
        if session.audio_rate:
            print(f"{args.name} hears nothing here and keeps still; demos/avatar.py makes it speak", file=sys.stderr)
        with tqdm(desc="frames", total=total, disable=None) as bar:
            frames = session.record(total, script, cues, bar.update)
        video.write_video(args.out, frames, session.fps, scale=args.scale)
        sheet = args.out.with_suffix(".png")
        video.save_png(sheet, video.contact_sheet([frames], every=max(1, total // 12), scale=2))
    print(f"{args.out} ({total} frames), {sheet}")


def add_speed(p: argparse.ArgumentParser) -> None:
    """Options of commands that run a student."""
    p.add_argument(
        "--backend", default="auto", help="attention: auto, reference, sdpa, products, flex, xformers or triton"
    )
    p.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:1")
    p.add_argument(
        "--precision", default="fp32", help="of weights and memory: fp32, bf16, or auto (bf16 where it is quick)"
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile blocks and decoder; what is compiled is kept for the next run (TORCHINDUCTOR_CACHE_DIR)",
    )
    p.add_argument(
        "--linears",
        default="plain",
        help="linear layers: plain, packed (CPU, float32), bf16 (CPU), int8 or fp8 (torchao); bench tells the error",
    )


def speed_of(args: argparse.Namespace) -> Any:
    """The SpeedConfig that was asked for; sets the attention backend."""
    from vidistill.ops.attention import set_backend
    from vidistill.stream import SpeedConfig

    set_backend(args.backend)
    return SpeedConfig(args.linears, args.compile, args.device, args.precision)


def add_serve(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser("serve", help="play a student in the browser", description="Serve a student as a web page.")
    p.add_argument("name", help="a bundled name or the path of a student")
    p.add_argument("--host", default="127.0.0.1", help="address to bind (default: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    p.add_argument("--max-viewers", type=count, default=2, help="viewers at a time, a dream each (default: 2)")
    p.add_argument("--starts", type=Path, help="folder of PNG pictures to begin from (default: the bundled ones)")
    p.add_argument("--origin", action="append", default=[], help="further web address the page is opened under")
    p.add_argument("--gain", type=amount, default=1.0, help=GAIN)
    add_speed(p)
    p.set_defaults(run=run_serve)
    return p


def run_serve(args: argparse.Namespace) -> None:
    from vidistill.serve import serve

    serve(
        args.name,
        speed=speed_of(args),
        host=args.host,
        port=args.port,
        starts=args.starts,
        max_viewers=args.max_viewers,
        origins=args.origin,
        gain=args.gain,
        ready=lambda url: print(f"{args.name} is at {url} - stop with Ctrl-C", flush=True),
    )


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
    p.add_argument("--growth-run", type=amount, metavar="MINUTES", help="with --growth: what really runs (default: 1)")
    p.add_argument("--random-weights", nargs="*", metavar="key=value", help="bench any shape without a checkpoint")
    p.add_argument("--weights", type=Path, help="with --random-weights: a published file whose weights fit the shape")
    p.add_argument("--family", help="format of --weights (default: self-forcing)")
    p.add_argument("--allow-pickle", action="store_true", help="read --weights from a .pt file (weights only)")
    p.add_argument("--profile", action="store_true", help="with --random-weights: which operators take the time")
    p.add_argument("--batch", type=count, default=1, help="also time so many streams in one pass, beside one alone")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    add_speed(p)
    p.set_defaults(run=run_bench)
    return p


def run_bench(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vidistill import bench

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
    from vidistill import bench
    from vidistill.interop.formats import read_student

    cfg, net = replace(bench.RandomConfig.parse(args.random_weights), **growth_run(args)), None
    if args.weights:
        family = args.family or "self-forcing"
        net = read_student(args.weights, family, allow_pickle=args.allow_pickle, heads=cfg.heads).net()
    more = {"growth": args.growth, "batch": args.batch, "profiled": args.profile}
    return bench.random_bench(cfg, cfg.bundle(net), speed=speed_of(args), progress=progress, **more)


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
    p.add_argument("--suite", choices=("quality", "memory"), default="quality", help="what to judge (default: quality)")
    p.add_argument(
        "--clips",
        type=count,
        help="held-out clips (default and protocol: 256; 96 captions for text), or paths for each time away (24)",
    )
    p.add_argument("--window", help="suite memory: the baseline with window memory (default: NAME-window)")
    p.add_argument("--full", help="suite memory: the baseline that keeps everything (default: NAME-full)")
    p.add_argument("--glance", action="store_true", help="the student's clips against real video only, no report")
    p.add_argument("--out", type=Path, help="folder of the report (default: out/eval)")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.set_defaults(run=run_eval)
    return p


def run_eval(args: argparse.Namespace) -> None:
    from rich.console import Console

    from vidistill import adherence, checkpoint, evaluate, report

    if not args.name and not args.frontier:
        raise ValueError("name a checkpoint, or give --frontier")
    out = args.out or Path("out/eval")
    if args.frontier:
        from vidistill import frontier

        given = {"name": args.name, "--clips": args.clips, "--glance": args.glance, "--teacher": args.teacher}
        given |= {"--window": args.window, "--full": args.full, "--suite": args.suite == "memory", "--out": args.out}
        if foreign := [key for key, value in given.items() if value]:
            raise ValueError(f"{', '.join(foreign)} say nothing to a frontier; its YAML names cells, clips and folder")
        report.check_plots()
        result = frontier.frontier(args.frontier)
        Console(stderr=True).print(frontier.table(result))
    elif args.suite == "memory":
        result = run_memory_suite(args, out)
    elif args.window or args.full:
        raise ValueError("--window and --full name baselines of --suite memory; add it, or leave them out")
    elif args.glance and (args.teacher or args.out):
        option = "--teacher" if args.teacher else "--out"
        raise ValueError(f"{option} says nothing to --glance, which shows the student alone; leave one of them out")
    elif checkpoint.talks(args.name):
        from vidistill import avatar

        clips = args.clips or 64
        if args.glance:
            result = avatar.glance(args.name, avatar.AvatarConfig(clips=clips))
        else:
            result = avatar.run(args.name, clips=clips, out=out, teacher=args.teacher)
    elif checkpoint.listens(args.name):
        clips = args.clips or 96
        if args.glance:
            result = adherence.glance(args.name, adherence.AdherenceConfig(clips=clips))
        else:
            result = adherence.run(args.name, clips=clips, out=out, teacher=args.teacher)
    else:
        clips = args.clips or 256
        if args.glance:
            result = evaluate.glance(args.name, evaluate.EvalConfig(clips=clips))
            print("  ".join(f"{key} {value:.3f}" for key, value in result.items() if isinstance(value, float)))
        else:
            result = evaluate.run(args.name, clips=clips, out=out, teacher=args.teacher)
    if args.glance:
        result["clips"] = clips
    if args.json:
        print(json.dumps(result))


def run_memory_suite(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from rich.console import Console

    from vidistill import report, revisit

    if args.glance or args.teacher:
        raise ValueError("--glance and --teacher say nothing to --suite memory; leave them out, or the suite")
    report.check_plots()
    cfg = revisit.RevisitConfig(paths=args.clips or 24, out=str(out))
    result = revisit.evaluate_memory(args.name, cfg, window=args.window, full=args.full)
    Console(stderr=True).print(revisit.table(result))
    return result


def add_diagnose(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "diagnose",
        help="draw where distillation helped and where it hurt",
        description="Draw the gradient of distillation of a run that was trained with watch.diagnose_every.",
    )
    p.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, such as runs/talker")
    p.add_argument("-o", "--out", type=Path, help="picture (default: RUN/diagnosis.png)")
    p.set_defaults(run=run_diagnose)
    return p


def run_diagnose(args: argparse.Namespace) -> None:
    from vidistill import report
    from vidistill.trainer import METRICS

    path = args.folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [row for row in map(json.loads, lines) if "diagnosis" in row]
    if not rows:
        raise ValueError(f"{path} holds no diagnosis; train with watch.data=LATENTS watch.diagnose_every=STEPS")
    out = args.out or args.folder / "diagnosis.png"
    report.draw_diagnosis(rows, out)
    last = rows[-1]["diagnosis"]
    for level, cosines in zip(last["levels"], last["cosine"], strict=True):
        print(f"step {rows[-1]['step']}  level {level:.2f}  cosine " + " ".join(f"{c:+.2f}" for c in cosines))
    print(out)


def add_info(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "info", help="what is bundled, and what a checkpoint is", description="The zoo, or one checkpoint in detail."
    )
    p.add_argument("name", nargs="?", help="a bundled name or a path; default: list the zoo")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.set_defaults(run=run_info)
    return p


def run_info(args: argparse.Namespace) -> None:
    from vidistill import checkpoint
    from vidistill.interop import cost

    if args.name in cost.NETWORKS:
        row = cost.named_cost(args.name)
        print_cost(row)
        if args.json:
            print(json.dumps(row))
        return
    names = [args.name] if args.name else sorted(checkpoint.zoo_names())
    rows = {name: checkpoint.summary(name) for name in names}
    for name, row in rows.items():
        nfe = f"  evaluations a chunk {row['nfe_per_chunk']}" if "nfe_per_chunk" in row else ""
        alias = f"  (another name of {row['alias_of']})" if "alias_of" in row else ""
        print(f"{name:20s} {row['kind']:8s} {row['parameters'] / 1e6:6.2f}M  {row['bytes'] / 1e6:6.2f} MB{nfe}{alias}")
        if args.name and (actions := row["world"].get("actions")):
            print(f"actions {', '.join(actions)}; {row['world']['fps']:g} frames a second")
        if args.name and (memory := row.get("memory")):
            print(
                f"memory {memory['policy']}: {memory['frames']} frames in {memory['tokens']} tokens, "
                f"{memory['bytes'] / 1e6:.2f} MB; "
                f"{memory['token_share']:.0%} of {memory['uncompressed_tokens']} plain tokens"
            )
    if args.json:
        print(json.dumps(rows[args.name] if args.name else rows))


def print_cost(row: dict[str, Any]) -> None:
    """What a network costs at its true size, and the speeds of papers beside the prediction."""
    from vidistill.interop import cost

    print(
        f"{row['network']}: {row['parameters'] / 1e9:.2f} B parameters, {row['tokens_per_frame']} tokens a latent frame"
    )
    print(f"a pass {row['flops_per_pass'] / 1e12:.2f} TFLOP, a chunk {row['flops_per_chunk'] / 1e12:.2f} TFLOP")
    for name, size in row["kv_bytes"].items():
        print(f"memory {name:20s} {size / 1e9:7.2f} GB")
    for name, found in row["gpus"].items():
        gpu = f"{cost.GPUS[name].tflops:.0f} TFLOP/s, {cost.GPUS[name].gb_per_s:.0f} GB/s"
        print(f"{name:10s} {found['fps']:7.1f} frames/s at most, first chunk {found['first_chunk_ms']:6.0f} ms ({gpu})")
    print(row["left_out"])
    print("published speeds, measured / predicted:")
    for paper in cost.against_papers():
        said = f"{paper['published_fps']:6.1f} of {paper['predicted_fps']:6.1f} ({paper['ratio']:.2f})"
        latency = f", first chunk {paper['published_latency_s']:.2f} s of {paper['predicted_latency_s']:.3f} s"
        latency = f"{latency} ({paper['latency_ratio']:.1f})" if paper["published_latency_s"] else ""
        print(f"  {paper['system']:28s} {paper['gpu']:12s} {said}{latency}")


if __name__ == "__main__":
    sys.exit(main())
