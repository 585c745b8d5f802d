"""Recordings of any format that ffmpeg reads, taken as they are meant or refused by name."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PLAYLISTS = ("concat", "hls", "dash", "sdp")  # of ffmpeg: lists of other files
MAX_SOUND_S = 3600  # seconds of a recording that is read


def read_sound(path: str | Path, rate: int) -> np.ndarray:
    """A recording of any format that ffmpeg reads as float32 [S] at `rate`, its channels averaged.

    ValueError for a file that holds no sound, that is cut short, or that is longer than an hour.
    """
    import av

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no recording {path}")
    try:
        with av.open(str(path)) as file:
            if file.format.name in PLAYLISTS or not file.streams.audio:
                raise ValueError("it holds no sound")
            stream = file.streams.audio[0]
            said = _wav_seconds(path) or float((stream.duration or 0) * (stream.time_base or 0))
            if said > MAX_SOUND_S:
                raise ValueError(f"it is longer than {MAX_SOUND_S} s")
            pcm = np.concatenate([np.zeros(0, np.float32), *_decode_sound(file, rate)])
    except Exception as error:
        raise ValueError(f"{path} cannot be read as sound: {error or type(error).__name__}") from error
    seconds = len(pcm) / rate
    if not len(pcm):
        raise ValueError(f"{path} cannot be read as sound: it is empty")
    if said - seconds > max(0.25, 0.02 * said):
        raise ValueError(f"{path} is cut short: {seconds:.2f} of its {said:.2f} s are there; copy it again")
    return pcm


def _wav_seconds(path: str | Path) -> float:
    """How long a WAV file says it is; 0 for another file, and where the recorder did not know.

    ffmpeg takes what is there for the whole.
    """
    with open(path, "rb") as file:
        head = file.read(2**16)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return 0.0
    rate, at = 0, 12
    while at + 8 <= len(head):
        kind, size = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if kind == b"fmt ":
            rate = int.from_bytes(head[at + 16 : at + 20], "little")  # bytes a second
        if kind == b"data":
            return size / rate if rate and size < 2**32 - 2**16 else 0.0
        at += 8 + size + size % 2
    return 0.0


def _decode_sound(file: Any, rate: int) -> Iterator[np.ndarray]:
    """Pieces of float32 sound at `rate` of an opened file."""
    import av

    # packed: PyAV finds the planes of no more than 8 channels, and reads beside the others
    resampler, total = av.AudioResampler("flt", None, rate), 0
    for frame in itertools.chain(file.decode(audio=0), [None]):  # None empties the resampler
        for piece in resampler.resample(frame):
            pcm = piece.to_ndarray().reshape(piece.samples, -1).mean(1)
            total += len(pcm)
            if not np.isfinite(pcm).all():
                raise ValueError("it holds numbers that are not finite")
            if total > MAX_SOUND_S * rate:
                raise ValueError(f"it is longer than {MAX_SOUND_S} s")
            yield pcm.clip(-1, 1)
