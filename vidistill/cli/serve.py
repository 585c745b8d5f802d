"""`vidistill serve`."""

import argparse
from pathlib import Path
from typing import Any

from vidistill.cli.options import GAIN, SPEED, STUDENT, Arguments, add_command, positive_int, speed_of

ARGUMENTS: Arguments = {
    **STUDENT,
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


def add_serve(commands: Any) -> None:
    about = {"help": "play a student in the browser", "description": "Serve a student as a web page."}
    add_command(commands, "serve", run_serve, ARGUMENTS, **about)


def run_serve(args: argparse.Namespace) -> None:
    from vidistill.serve.app import serve

    serve(
        args.name,
        speed=speed_of(args),
        host=args.host,
        port=args.port,
        starts=args.starts,
        max_viewers=args.max_viewers,
        origins=args.origin,
        gain=args.gain,
        token=args.token,
        ready=lambda url: print(f"{args.name} is at {url} - stop with Ctrl-C", flush=True),
    )
