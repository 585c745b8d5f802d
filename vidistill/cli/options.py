"""Commands as tables of arguments, numbers as they are typed, and what several commands share."""

import argparse
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

MAX_SIDE = 2**14  # pixels
Arguments = Mapping[str, Mapping[str, Any]]  # "-o --out" -> what `ArgumentParser.add_argument` takes beside its flags


def number(kind: type[int] | type[float], allowed: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    """A reader of typed numbers of this kind that are `allowed`; its ArgumentTypeError says the `rule`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            whole = "a whole" if kind is int else "a"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} number") from None
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
        return value

    return read


# JSON and browsers know no whole number above 2**53 exactly.
positive_int = number(int, lambda n: 1 <= n <= 10**9, "at least 1 and at most 10**9")
non_negative_int = number(int, lambda n: 0 <= n <= 2**53, "at least 0 and at most 2**53")
fraction = number(float, lambda x: 0 <= x <= 1, "a share from 0 to 1")
positive_float = number(float, lambda x: 0 < x < float("inf"), "above 0")
clip_seconds = number(float, lambda x: 0 < x <= 3600, "above 0 and at most 3600 (a clip is kept in memory)")
scale_factor = number(int, lambda n: 1 <= n <= 64, "from 1 to 64")


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(part) for part in text.split(","))


def height_x_width(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH")
    side = number(int, lambda n: 1 <= n <= MAX_SIDE, f"from 1 to {MAX_SIDE} pixels a side")
    return side(height), side(width)


OPTION_TYPES = {  # by the names that importers know them by
    "count": positive_int,
    "number": non_negative_int,
    "numbers": numbers,
    "rate": positive_float,
    "fraction": fraction,
    "size": height_x_width,
}
STUDENT: Arguments = {"name": {"help": "a bundled name or the path of a student"}}
JSON: Arguments = {"--json": {"action": "store_true", "help": "one JSON object as the last line"}}
GAIN: Arguments = {
    "--gain": {
        "type": positive_float,
        "default": 1.0,
        "help": "how far an action moves the camera, for students that take its motion (default: 1)",
    }
}
SPEED: Arguments = {
    "--backend": {
        "default": "auto",
        "help": "attention: auto, reference, sdpa, products, flex, xformers or triton",
    },
    "--device": {"default": "auto", "help": "auto (a GPU if there is one), cpu, cuda or cuda:1"},
    "--precision": {"default": "fp32", "help": "of weights and memory: fp32, bf16, or auto (bf16 where it is quick)"},
    "--compile": {
        "action": "store_true",
        "help": "torch.compile blocks and decoder; compiled code is kept for the next run (TORCHINDUCTOR_CACHE_DIR)",
    },
    "--linears": {
        "default": "plain",
        "help": "linear layers: plain, packed (CPU, float32), bf16 (CPU), int8 or fp8 (torchao); bench shows the error",
    },
}


def speed_of(args: argparse.Namespace) -> Any:
    """The SpeedConfig that was asked for; sets the attention backend."""
    from vidistill.ops.attention import set_backend
    from vidistill.streaming.runtime import SpeedConfig

    set_backend(args.backend)
    return SpeedConfig(args.linears, args.compile, args.device, args.precision)


def print_anything() -> None:
    """Let no name fail a command that has done its work, because the terminal's encoding lacks a letter of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """A parser that takes -v, as all parsers of its subcommands do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # without a default, which would undo a -v before the subcommand
        how: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        self.add_argument("-v", "--verbose", help="more log lines, tracebacks on errors", **how)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    arguments: Arguments,
    *,
    help: str,
    description: str | None = None,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add the subcommand `name`, which calls `run` with its parsed `arguments`; returns its parser."""
    p = commands.add_parser(name, help=help, description=description, epilog=epilog)
    for flags, settings in arguments.items():
        p.add_argument(*flags.split(), **settings)
    p.set_defaults(run=run)
    return p
