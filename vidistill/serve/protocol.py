"""What browser and server say to each other: every message is checked here, before anything acts on it.

To the server: JSON text with a "type", one of MESSAGES, and its fields; or bytes whose first one is a kind (PICTURE:
the rest is a PNG to start from; INPUT: the second byte is the place of an input among `takes` of the hello, the rest
its value). To the browser: JSON text with a "type", or bytes, HEADER and a payload (FRAME: a picture; SOUND: what plays
while the picture of this index is shown). The server refuses unknown kinds, the page skips them.
"""

import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vidistill.io import read_image_bytes

VERSION = 2
HEADER = struct.Struct("<4B4I")  # version, kind, encoding, flags | sequence, index, chunk, input id
FRAME, SOUND = 1, 2  # kinds of bytes to the browser
PICTURE, INPUT = 1, 2  # kinds of bytes to the server
RAW, JPEG = 0, 1  # encodings: RGB rows, or a JPEG file
FIRST, GAP, RECORDING = 1, 2, 4  # flags: first after a start, frames were dropped before it, it is being recorded
RAW_BYTES = 48 * 1024  # a larger picture is sent as JPEG
JPEG_QUALITY = 88

MAX_MESSAGE = 4096  # characters in a text message
MAX_TEXT = 400  # characters in a prompt, and in words to speak
MIN_PIXELS = 2**20  # of a picture that are read in the smallest world
MAX_PICTURE = 4 * 1024 * 1024  # bytes in a picture message
MAX_INPUT = 1024 * 1024  # bytes in an input message
MAX_SEED = 2**31 - 1
MAX_ID = 2**32 - 1


class MessageError(ValueError):
    """A message that cannot be used; the text says why, and goes back to who sent it."""


@dataclass(frozen=True)
class Set:
    """Inputs from now on, as `StreamSession.set` takes them. `id` comes back in the first frame that used them."""

    id: int  # counts up; 0: nobody waits for it
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """The newest sequence number the page has drawn: frames on their way stay few."""

    sequence: int


@dataclass(frozen=True)
class Reset:
    """Start again. `start` names a start image, "upload" the picture sent last, "" noise."""

    seed: int
    start: str


@dataclass(frozen=True)
class Pause:
    on: bool


@dataclass(frozen=True)
class Record:
    on: bool


@dataclass(frozen=True)
class ReturnToStart:
    """Go back to where the run began, by undoing what was done."""


@dataclass(frozen=True)
class ShowHistory:
    """Look at the compressed history, or at the newest frames alone."""

    on: bool


@dataclass(frozen=True)
class Say:
    """Words to speak aloud, after what still waits to be spoken."""

    text: str


@dataclass(frozen=True)
class ClearAudio:
    """Drop the audio that waits: an interruption."""


@dataclass(frozen=True)
class Picture:
    """A PNG to start from, not decoded yet."""

    png: bytes


Message = Set | Seen | Reset | Pause | Record | ReturnToStart | ShowHistory | Say | ClearAudio | Picture

MESSAGES: dict[str, Callable[..., Message]] = {
    "set": Set,
    "seen": Seen,
    "reset": Reset,
    "pause": Pause,
    "record": Record,
    "return_to_start": ReturnToStart,
    "show_history": ShowHistory,
    "say": Say,
    "clear_audio": ClearAudio,
}
FIELDS = {kind: tuple(f.name for f in fields(message)) for kind, message in MESSAGES.items()}  # type: ignore[arg-type]


def pack_frame(
    px: np.ndarray, *, sequence: int, index: int, chunk: int, input_id: int, first: bool, gap: bool, recording: bool
) -> bytes:
    """One frame uint8 [H, W, 3] as bytes for the browser; raw RGB when small, else JPEG."""
    flags = FIRST * first | GAP * gap | RECORDING * recording
    encoding, body = (RAW, px.tobytes()) if px.nbytes <= RAW_BYTES else (JPEG, _jpeg(px))
    numbers = (n & MAX_ID for n in (sequence, index, chunk, input_id))
    return HEADER.pack(VERSION, FRAME, encoding, flags, *numbers) + body


def pack_sound(samples: np.ndarray, *, index: int) -> bytes:
    """The int16 samples that play while picture `index` is shown, as bytes for the browser."""
    return HEADER.pack(VERSION, SOUND, 0, 0, 0, index & MAX_ID, 0, 0) + samples.astype("<i2").tobytes()


def _jpeg(px: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(px).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def parse_text(text: str) -> Message:
    """The message in a text from the browser; MessageError says what is wrong with it."""
    if len(text) > MAX_MESSAGE:
        raise MessageError(f"the message has {len(text)} characters; at most {MAX_MESSAGE} are read")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"the message is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise MessageError("the message is not a JSON object")
    kind = said.pop("type", None)
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise MessageError(f"unknown message type {_short(kind)}; known are {', '.join(MESSAGES)}")
    if unknown := sorted(said.keys() - set(FIELDS[kind])):
        raise MessageError(f"{kind} has no field {_short(unknown[0])}; its fields are {', '.join(FIELDS[kind])}")
    if missing := [name for name in FIELDS[kind] if name not in said]:
        raise MessageError(f"{kind} needs the field {missing[0]}")
    return MESSAGES[kind](**{name: CHECKS[name](value, f"{kind}.{name}") for name, value in said.items()})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MessageError(f"{name} is {_short(value)}; allowed are whole numbers {low} to {high}")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise MessageError(f"{name} is {_short(value)}; allowed are true and false")
    return value


def _name(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{name} is {_short(value)}; needed is a name")
    return value


def _words(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise MessageError(f"{name} is {_short(value)}; needed is a text of 1 to {MAX_TEXT} characters")
    return " ".join(value.split())


def _inputs(value: Any, name: str) -> dict[str, Any]:
    """Names of inputs and their values, texts bounded; what else a value may be, its input says."""
    if not isinstance(value, dict) or not value:
        raise MessageError(f"{name} is {_short(value)}; needed is an object of inputs and their values")
    if not isinstance(value.get("switch", ""), str):
        raise MessageError(f"{name}.switch is {_short(value['switch'])}; needed is a name")
    return {key: _words(x, f"{name}.{_short(key)[1:-1]}") if isinstance(x, str) else x for key, x in value.items()}


CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "id": partial(_whole, low=1, high=MAX_ID),
    "inputs": _inputs,
    "sequence": partial(_whole, low=0, high=MAX_ID),
    "seed": partial(_whole, low=0, high=MAX_SEED),
    "start": _name,
    "on": _flag,
    "text": _words,
}


def parse_bytes(data: bytes, inputs: Sequence[str]) -> Picture | Set:
    """The message in bytes from the browser; `inputs` are the names of those it can set."""
    if not data or data[0] not in (PICTURE, INPUT):
        raise MessageError("bytes must start with their kind; known are 1, a PNG picture, and 2, an input")
    what, most = ("the picture", MAX_PICTURE) if data[0] == PICTURE else ("the input", MAX_INPUT)
    if len(data) > most:
        raise MessageError(f"{what} has {len(data):,} bytes; at most {most:,} are read")
    if data[0] == PICTURE:
        return Picture(data[1:])
    if len(data) < 2 or data[1] >= len(inputs):
        raise MessageError(f"the second byte of an input is its place among {', '.join(inputs) or 'none'}")
    return Set(0, {inputs[data[1]]: data[2:]})


def read_picture(png: bytes, size: tuple[int, int]) -> np.ndarray:
    """A picture from the browser as uint8 [H, W, 3] of `size` (height, width); MessageError if it cannot be read."""
    most = max(MIN_PIXELS, 16 * size[0] * size[1])  # what the page sends; more would keep other viewers waiting
    try:
        return read_image_bytes(png, size, formats=("PNG",), pixels=most)
    except ValueError as error:
        raise MessageError(str(error)) from None
