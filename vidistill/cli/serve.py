"""`vidistill serve`."""

import argparse
from pathlib import Path
from typing import Any

from vidistill.cli.options import GAIN, add_speed, positive_float, positive_int, speed_of


def add_serve(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser("serve", help="play a student in the browser", description="Serve a student as a web page.")
    p.add_argument("name", help="a bundled name or the path of a student")
    p.add_argument("--host", default="127.0.0.1", help="address to bind (default: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    p.add_argument("--max-viewers", type=positive_int, default=2, help="viewers at a time, a stream each (default: 2)")
    p.add_argument("--starts", type=Path, help="folder of PNG pictures to begin from (default: the bundled ones)")
    p.add_argument("--origin", action="append", default=[], help="further web address the page is opened under")
    p.add_argument("--token", default="", help="word that the page's address must carry (default: none is needed)")
    p.add_argument("--gain", type=positive_float, default=1.0, help=GAIN)
    add_speed(p)
    p.set_defaults(run=run_serve)
    return p


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
