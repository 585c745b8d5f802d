"""`vidistill serve`."""

import argparse
from pathlib import Path
from typing import Any

from vidistill.cli.data import check_splits
from vidistill.cli.options import GAIN, OPTION_TYPES, SPEED, Arguments, add_command, positive_int, speed_of
from vidistill.data.importers.options import add_world_options

ARGUMENTS: Arguments = {
    "name": {"nargs": "?", "help": "a bundled name or the path of a student"},
    "--host": {"default": "127.0.0.1", "help": "address to bind (default: this machine only)"},
    "--port": {"type": int, "default": 8000, "help": "port (default: 8000)"},
    "--max-viewers": {
        "type": positive_int,
        "default": 2,
        "help": "viewers at a time, each with a stream of their own (default: 2)",
    },
    "--starts": {"type": Path, "help": "folder of pictures to start from (default: the bundled ones)"},
    "--origin": {"action": "append", "default": [], "help": "further web address the page is opened under"},
    "--token": {"default": "", "help": "word that the page's address must carry (default: none is needed)"},
    **GAIN,
    **SPEED,
}


LONGEST = 3000  # frames of an episode that a person plays


def add_serve(commands: Any) -> None:
    about = {
        "help": "play a student in the browser",
        "description": "Serve a student as a web page; with --env an environment itself, to record what is played.",
        "epilog": "example: vidistill serve --env ale_py:ALE/Pong-v5 --record data/pong",
    }
    p = add_command(commands, "serve", run_serve, ARGUMENTS, **about)
    for name, read in OPTION_TYPES.items():
        p.register("type", name, read)
    group = p.add_argument_group("an environment in a student's place (Gymnasium)")
    group.add_argument("--record", type=Path, metavar="OUT", help="data folder that episodes are added to")
    add_world_options(group, frames=LONGEST)


def run_serve(args: argparse.Namespace) -> None:
    from vidistill.serve import app

    if (args.name is None) == (args.env is None):
        raise ValueError("name a student to play, or an environment with --env")
    if args.record and not args.env:
        raise ValueError("--record keeps what is played of an environment: name it with --env")
    if args.record:
        check_splits(args.record, "--record")
    shown = args.env if args.name is None else args.name
    door = {"host": args.host, "port": args.port, "max_viewers": args.max_viewers, "token": args.token}

    def ready(url: str) -> None:
        print(f"{shown} is at {url} - stop with Ctrl-C", flush=True)

    if args.name is not None:
        speed = {"speed": speed_of(args), "starts": args.starts, "gain": args.gain}
        return app.serve(args.name, origins=args.origin, ready=ready, **door, **speed)
    from vidistill.serve.environment import Real

    args.policy = "random"  # of the check that seeds bring episodes back: people play here
    real = Real.of(args, args.record)
    try:
        app.run(real.world(), app.ServeConfig(origins=tuple(args.origin), **door), ready)
    finally:
        print(*real.finish())
