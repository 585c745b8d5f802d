"""`vidistill`: parse, load a config, call one function."""

import argparse
import logging
import sys
from collections.abc import Sequence

from vidistill import __version__
from vidistill.cli.bench import add_bench
from vidistill.cli.convert import add_convert
from vidistill.cli.data import add_data
from vidistill.cli.evaluate import add_eval
from vidistill.cli.export import add_export, add_publish
from vidistill.cli.generate import add_generate
from vidistill.cli.info import add_info
from vidistill.cli.new import add_new
from vidistill.cli.options import Parser, print_anything
from vidistill.cli.serve import add_serve
from vidistill.cli.train import add_diagnose, add_train

COMMANDS = (
    *(add_train, add_generate, add_serve, add_bench, add_eval, add_diagnose),
    *(add_convert, add_export, add_publish, add_data, add_new, add_info),
)
COMPUTING = ("train", "generate", "serve", "bench", "eval", "data", "new")
EXPLAINED = (ValueError, OSError, RuntimeError, ImportError)  # their messages say what is wrong, and what to do


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted.

    With -v an exception is raised as it is, whose traceback Python prints.
    """
    print_anything()
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
    except Exception as error:
        if args.verbose:
            raise
        message = str(error)
        if not isinstance(error, EXPLAINED):
            name = type(error).__name__
            message = f"unexpected {name}: {error}; please report it with what the same command prints with -v"
        print(f"vidistill {args.command}: {message}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line, one function a subcommand."""
    root = Parser(
        prog="vidistill", description="Distil video diffusion models into causal students that stream in real time."
    )
    root.add_argument("--version", action="version", version=__version__)
    root.set_defaults(verbose=False)
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
