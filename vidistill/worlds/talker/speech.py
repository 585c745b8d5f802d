"""Speech from text by espeak-ng: sound, and how the mouth is shaped while it sounds."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

RATE = 16_000  # samples a second of everything said here
TRACK = 100  # mouth shapes a second
SMOOTH_S = 0.11  # a mouth glides from shape to shape in about so long
VOICES = tuple(f"en-us+{kind}{i}" for kind, last in (("m", 8), ("f", 5)) for i in range(1, last + 1))
REST = (0.0, 0.45)

# (opening, width) of the mouth, 0 to 1, by espeak-ng's phoneme names; two for diphthongs: from, to
SHAPES: dict[str, tuple[tuple[float, float], ...]] = {
    **dict.fromkeys(("a", "a#", "A", "A@", "aa"), ((0.95, 0.6),)),
    **dict.fromkeys(("E", "E2", "e", "e@", "e:"), ((0.65, 0.7),)),
    **dict.fromkeys(("V", "@", "@2", "@5", "@L", "3"), ((0.5, 0.5),)),
    **dict.fromkeys(("I", "I2", "I#", "i", "i@", "i@3"), ((0.35, 0.95),)),
    **dict.fromkeys(("0", "O", "O@", "o", "o@"), ((0.75, 0.25),)),
    **dict.fromkeys(("U", "u", "U@"), ((0.35, 0.05),)),
    "aI": ((0.95, 0.6), (0.35, 0.9)),
    "aU": ((0.95, 0.6), (0.35, 0.1)),
    "eI": ((0.65, 0.7), (0.35, 0.95)),
    "OI": ((0.75, 0.25), (0.35, 0.9)),
    "oU": ((0.65, 0.3), (0.35, 0.05)),
    **dict.fromkeys(("p", "b", "m"), ((0.0, 0.5),)),
    **dict.fromkeys(("f", "v"), ((0.08, 0.55),)),
    **dict.fromkeys(("T", "D", "t", "t2", "d", "n", "l", "s", "z", "t#"), ((0.2, 0.6),)),
    **dict.fromkeys(("S", "Z", "tS", "dZ"), ((0.25, 0.2),)),
    **dict.fromkeys(("k", "g", "N", "h", "?"), ((0.35, 0.5),)),
    **dict.fromkeys(("r", "r-"), ((0.25, 0.25),)),
    "w": ((0.15, 0.0),),
    "j": ((0.25, 0.85),),
    **dict.fromkeys(("_", "_:", "_!", "_|", "_::", ""), (REST,)),
}
MIDDLING = ((0.35, 0.5),)  # a phoneme that is not in the table


@dataclass(frozen=True)
class Voice:
    """Who speaks: an espeak-ng voice with a variant, words a minute, pitch 0 to 100."""

    name: str = VOICES[0]
    speed: int = 165
    pitch: int = 50

    def __post_init__(self) -> None:
        if not 80 <= self.speed <= 450 or not 0 <= self.pitch <= 100:
            raise ValueError(f"voice.speed must be 80 to 450 and pitch 0 to 100, got {self.speed} and {self.pitch}")


@dataclass(frozen=True)
class Utterance:
    """pcm: float32 [S] in [-1, 1] at RATE. mouth: float32 [T, 2], opening and width of the lips at TRACK."""

    pcm: np.ndarray
    mouth: np.ndarray


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_LOCK = threading.Lock()  # the library keeps one state for the whole process
_SYNCHRONOUS, _PHONEMES, _DONT_EXIT, _END, _PHONEME, _UTF8 = 2, 1, 0x8000, 0, 7, 1
_SPEED, _PITCH = 1, 3


def loader() -> Any:
    """The package that brings espeak-ng; ImportError says how to get it."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError("speech from text needs espeak-ng: pip install 'vidistill[audio]'") from error
    return espeakng_loader


class Speaker:
    """espeak-ng, freshly loaded; see `speaker`."""

    def __init__(self, lib: ctypes.CDLL, rate: int) -> None:
        self._lib, self._rate = lib, rate
        self._sound: list[np.ndarray] = []
        self._phonemes: list[tuple[float, str]] = []  # (seconds, name)
        self._keep = _CALLBACK(self._hear)
        lib.espeak_SetSynthCallback(self._keep)

    def _hear(self, wav: Any, count: int, events: Any) -> int:
        if wav and count > 0:
            self._sound.append(np.ctypeslib.as_array(wav, (count,)).copy())
        i = 0
        while events[i].type != _END:
            if events[i].type == _PHONEME:
                self._phonemes.append((events[i].sample / self._rate, events[i].id.decode("utf-8", "ignore")))
            i += 1
        return 0

    def say(self, text: str, voice: Voice = Voice()) -> Utterance:
        """The sound and the mouth of a text; ValueError for a voice that espeak-ng lacks, and for nothing to say."""
        if self._lib.espeak_SetVoiceByName(voice.name.encode()):
            raise ValueError(f"espeak-ng has no voice {voice.name!r}; voices are such as {', '.join(VOICES[:3])}")
        self._lib.espeak_SetParameter(_SPEED, voice.speed, 0)
        self._lib.espeak_SetParameter(_PITCH, voice.pitch, 0)
        self._sound, self._phonemes = [], []
        data = text.encode() + b"\0"
        self._lib.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 1, 0, _UTF8, None, None)
        self._lib.espeak_Synchronize()
        if not self._sound or not text.strip():
            raise ValueError(f"there is nothing to say in {text!r}")
        pcm = resample(np.concatenate(self._sound).astype(np.float32) / 32768, self._rate, RATE)
        return Utterance(pcm, mouth_track(self._phonemes, len(pcm) / RATE))


@contextmanager
def speaker(seed: int = 0) -> Iterator[Speaker]:
    """espeak-ng for as long as it is held; what is said depends on `seed` and on what was said before it.

    The library is loaded anew each time: it keeps the phase of its oscillators from one sentence to the next.
    """
    package = loader()
    with _LOCK:
        lib = ctypes.CDLL(package.get_library_path())
        rate = lib.espeak_Initialize(_SYNCHRONOUS, 0, package.get_data_path().encode(), _PHONEMES | _DONT_EXIT)
        if rate <= 0:
            raise RuntimeError(f"espeak-ng does not start from {package.get_data_path()}; reinstall espeakng-loader")
        lib.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        try:
            yield Speaker(lib, rate)
        finally:
            lib.espeak_Terminate()
            ctypes.CDLL(None).dlclose(ctypes.c_void_p(lib._handle))


def say(text: str, voice: Voice = Voice(), seed: int = 0) -> Utterance:
    """One text by a speaker of its own."""
    with speaker(seed) as someone:
        return someone.say(text, voice)


def resample(pcm: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Sound [S] at another rate, exactly band-limited (by its spectrum), float32."""
    if rate == wanted or not len(pcm):
        return pcm.astype(np.float32)
    count = round(len(pcm) * wanted / rate)
    size = max(1, round(len(pcm) / 441)) * 441 + 441  # padded: a length that a Fourier transform likes
    spectrum = np.fft.rfft(pcm, size)
    out_size = round(size * wanted / rate)
    return (np.fft.irfft(spectrum[: out_size // 2 + 1], out_size)[:count] * (out_size / size)).astype(np.float32)


def mouth_track(phonemes: list[tuple[float, str]], seconds: float) -> np.ndarray:
    """Opening and width [T, 2] of the mouth at TRACK from (seconds, phoneme name) in order of time."""
    times, shapes = [0.0], [REST]
    ends = [start for start, _ in phonemes[1:]] + [seconds]
    for (start, name), end in zip(phonemes, ends, strict=True):
        found = SHAPES.get(name.strip("',:%=|"), MIDDLING)
        for k, shape in enumerate(found):
            times.append(start + (end - start) * (k + 1) / (len(found) + 1))
            shapes.append(shape)
    at = np.arange(round(seconds * TRACK) + 1) / TRACK
    track = np.stack([np.interp(at, times, [s[i] for s in shapes]) for i in (0, 1)], axis=1)
    window = np.hanning(round(SMOOTH_S * TRACK) + 2)[1:-1]
    half = len(window) // 2
    padded = np.pad(track, ((half, len(window) - 1 - half), (0, 0)), mode="edge")
    smooth = np.stack([np.convolve(padded[:, i], window / window.sum(), "valid") for i in (0, 1)], axis=1)
    return smooth.astype(np.float32)
