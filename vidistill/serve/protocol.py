"""What browser and server say to each other: every message is checked here, before anything acts on it.

To the server: JSON text with a "type", one of FIELDS ("keys", "prompt", "seen", ...), and its fields; or bytes whose
first one is a kind (PICTURE: the rest is a PNG to start from; SPEECH: the rest is sound, 16-bit samples at the world's
rate). To the browser: JSON text with a "type", or bytes, HEADER and a payload (FRAME: a picture; SOUND: what sounds
while the picture of this index is shown). There is room for more kinds: the server refuses unknown ones, the page skips
them.
"""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vidistill.conditioning.audio import from_pcm16
from vidistill.io import read_image

VERSION = 1
HEADER = struct.Struct("<4B4I")  # version, kind, encoding, flags | sequence, index, chunk, input id
FRAME, SOUND = 1, 2  # kinds of bytes to the browser
PICTURE, SPEECH = 1, 2  # kinds of bytes to the server
RAW, JPEG = 0, 1  # encodings: RGB rows, or a JPEG file
FIRST, GAP, RECORDING = 1, 2, 4  # flags: first after a start, frames were dropped before it, it is being recorded
RAW_BYTES = 48 * 1024  # a larger picture is sent as JPEG
JPEG_QUALITY = 88

MAX_TEXT = 4096  # characters in a text message
MIN_PIXELS = 2**20  # of a picture that are read in the smallest world
MAX_PICTURE = 4 * 1024 * 1024  # bytes in a picture message
MAX_SPEECH = 1024 * 1024  # bytes in a sound message
MAX_PROMPT = 400  # characters in a prompt
SWITCHES = ("keep", "recache", "cut")  # what a prompt may do to what is remembered
MAX_SEED = 2**31 - 1
MAX_ID = 2**32 - 1


class MessageError(ValueError):
    """A message that cannot be used; the text says why, and goes back to who sent it."""


@dataclass(frozen=True)
class Keys:
    """The keys held from now on: name -> 0..1. `id` counts up, and comes back in the first frame that used it."""

    id: int
    action: Mapping[str, float]


@dataclass(frozen=True)
class Prompt:
    """Words to follow from now on, and what they do to what is remembered. `id` counts up with those of the keys."""

    id: int
    text: str
    switch: str


@dataclass(frozen=True)
class Seen:
    """The newest sequence number the page has drawn: frames on their way stay few."""

    sequence: int


@dataclass(frozen=True)
class Reset:
    """Begin again. `start` names a start image, "upload" the picture sent last, "" noise."""

    seed: int
    start: str


@dataclass(frozen=True)
class Pause:
    on: bool


@dataclass(frozen=True)
class Record:
    on: bool


@dataclass(frozen=True)
class Home:
    """Go back to where the dream began, by undoing what was done."""


@dataclass(frozen=True)
class History:
    """Look at the compressed history, or at the newest frames alone."""

    on: bool


@dataclass(frozen=True)
class Picture:
    """A picture to start from, uint8 [H, W, 3], at the size of the world."""

    px: np.ndarray


@dataclass(frozen=True)
class Say:
    """Words to speak aloud, after what is still to be spoken."""

    text: str


@dataclass(frozen=True)
class ClearAudio:
    """Stop speaking and listen: an interruption."""


@dataclass(frozen=True)
class Speech:
    """Sound to move the lips to, float32 [S] in [-1, 1] at the world's rate; it follows what is still to be spoken."""

    pcm: np.ndarray


Message = Say | ClearAudio | Speech | Keys | Prompt | Seen | Reset | Pause | Record | Home | History | Picture


def pack_frame(
    px: np.ndarray, *, sequence: int, index: int, chunk: int, input_id: int, first: bool, gap: bool, recording: bool
) -> bytes:
    """One frame uint8 [H, W, 3] as bytes for the browser; raw RGB when small, else JPEG."""
    flags = FIRST * first | GAP * gap | RECORDING * recording
    encoding, body = (RAW, px.tobytes()) if px.nbytes <= RAW_BYTES else (JPEG, _jpeg(px))
    numbers = (n & MAX_ID for n in (sequence, index, chunk, input_id))
    return HEADER.pack(VERSION, FRAME, encoding, flags, *numbers) + body


def pack_sound(samples: np.ndarray, *, index: int) -> bytes:
    """The int16 samples that sound while picture `index` is shown, as bytes for the browser."""
    return HEADER.pack(VERSION, SOUND, 0, 0, 0, index & MAX_ID, 0, 0) + samples.astype("<i2").tobytes()


def _jpeg(px: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(px).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def parse_text(text: str, actions: Sequence[str], starts: Sequence[str]) -> Message:
    """The message in a text from the browser; MessageError says what is wrong with it."""
    if len(text) > MAX_TEXT:
        raise MessageError(f"the message has {len(text)} characters; at most {MAX_TEXT} are read")
    try:
        said = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MessageError(f"the message is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise MessageError("the message is not a JSON object")
    kind = said.get("type")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise MessageError(f"unknown message type {_short(kind)}; known are {', '.join(FIELDS)}")
    if unknown := sorted(said.keys() - {"type", *FIELDS[kind]}):
        raise MessageError(f"{kind} has no field {_short(unknown[0])}; its fields are {', '.join(FIELDS[kind])}")
    if missing := [name for name in FIELDS[kind] if name not in said]:
        raise MessageError(f"{kind} needs the field {missing[0]}")
    if kind == "keys":
        return Keys(_whole(said["id"], "keys.id", 1, MAX_ID), _action(said["action"], actions))
    if kind == "prompt":
        return Prompt(_whole(said["id"], "prompt.id", 1, MAX_ID), _words(said["text"]), _switch(said["switch"]))
    if kind == "seen":
        return Seen(_whole(said["sequence"], "seen.sequence", 0, MAX_ID))
    if kind == "reset":
        return Reset(_whole(said["seed"], "reset.seed", 0, MAX_SEED), _start(said["start"], starts))
    if kind == "say":
        return Say(_words(said["text"], "say.text"))
    if kind in ("home", "hush"):
        return Home() if kind == "home" else ClearAudio()
    if not isinstance(said["on"], bool):
        raise MessageError(f"{kind}.on is {_short(said['on'])}; allowed are true and false")
    switches: dict[str, type[Pause] | type[Record] | type[History]] = {
        "pause": Pause,
        "record": Record,
        "history": History,
    }
    return switches[kind](said["on"])


FIELDS = {
    "keys": ("id", "action"),
    "prompt": ("id", "text", "switch"),
    "seen": ("sequence",),
    "reset": ("seed", "start"),
    "pause": ("on",),
    "record": ("on",),
    "say": ("text",),
    "hush": (),
    "home": (),
    "history": ("on",),
}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MessageError(f"{name} is {_short(value)}; allowed are whole numbers {low} to {high}")
    return value


def _action(given: Any, actions: Sequence[str]) -> dict[str, float]:
    if not isinstance(given, dict):
        raise MessageError(f"keys.action is {_short(given)}; needed is an object of names and numbers")
    if unknown := sorted(given.keys() - set(actions)):
        raise MessageError(f"keys.action has no {_short(unknown[0])}; this world knows {', '.join(actions)}")
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:  # NaN is neither
            raise MessageError(f"keys.action.{name} is {_short(value)}; allowed are numbers 0 to 1")
    return {name: float(given.get(name, 0.0)) for name in actions}


def _words(text: Any, name: str = "prompt.text") -> str:
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_PROMPT:
        raise MessageError(f"{name} is {_short(text)}; needed is a text of 1 to {MAX_PROMPT} characters")
    return " ".join(text.split())


def _switch(name: Any) -> str:
    if name not in SWITCHES:
        raise MessageError(f"prompt.switch is {_short(name)}; choose one of {', '.join(SWITCHES)}")
    return str(name)


def _start(name: Any, starts: Sequence[str]) -> str:
    if not isinstance(name, str) or name not in starts:
        raise MessageError(f"there is no start image {_short(name)}; choose one that the page shows")
    return name


def parse_bytes(data: bytes, size: tuple[int, int]) -> Picture | Speech:
    """The message in bytes from the browser; a picture comes back at `size` (height, width)."""
    if data and data[0] == SPEECH:
        if len(data) > MAX_SPEECH or len(data) % 2 == 0:
            raise MessageError(
                f"sound is 16-bit samples after one byte, at most {MAX_SPEECH:,} bytes; got {len(data):,}"
            )
        return Speech(from_pcm16(np.frombuffer(data[1:], "<i2")))
    if not data or data[0] != PICTURE:
        raise MessageError("bytes must start with their kind; known are 1, a PNG picture, and 2, sound")
    if len(data) > MAX_PICTURE:
        raise MessageError(f"the picture has {len(data):,} bytes; at most {MAX_PICTURE:,} are read")
    try:
        most = max(MIN_PIXELS, 16 * size[0] * size[1])  # what the page sends; more would keep other viewers waiting
        return Picture(read_image(data[1:], size, formats=("PNG",), pixels=most))
    except ValueError as error:
        raise MessageError(str(error)) from None
