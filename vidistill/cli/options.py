"""Numbers as they are typed, and the options that several commands share."""

import argparse
from typing import Any

GAIN = "how far a walker goes by the same action, where the camera is told (default: 1)"


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
    from vidistill.streaming.runtime import SpeedConfig

    set_backend(args.backend)
    return SpeedConfig(args.linears, args.compile, args.device, args.precision)


def read_number(text: str, kind: type[int] | type[float]) -> Any:
    """What `text` says, as a number of this kind; ArgumentTypeError if it says none."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None


def positive_int(text: str) -> int:
    """A number of things: an integer of at least 1."""
    number: int = read_number(text, int)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def non_negative_int(text: str) -> int:
    """A place in a row of things, counted from 0; also a seed."""
    number: int = read_number(text, int)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}")
    return number


def fraction(text: str) -> float:
    """A share of a whole."""
    number: float = read_number(text, float)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"is a share from 0 to 1, got {text}")
    return number


def positive_float(text: str) -> float:
    """A positive, finite number."""
    number: float = read_number(text, float)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(part) for part in text.split(","))


def height_x_width(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH")
    return int(height), int(width)
