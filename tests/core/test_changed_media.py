"""Pictures and sound that are right but for one change: read as what they are, or refused by their name."""

import io as bytes_io
import struct
from collections import Counter

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vidistill.io import read_image
from vidistill.sound import read_sound

KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "PPM")
WAV = {"kind": "<H", "channels": "<H", "rate": "<I", "bytes a second": "<I", "row": "<H", "bits": "<H", "size": "<I"}
SOUNDS = {"wav": "pcm_s16le", "flac": "flac", "m4a": "aac", "mp3": "libmp3lame", "ogg": "libopus"}
RATE = 16_000


def picture(kind):
    """The bytes of a picture of this kind, with what phones put beside it."""
    px = np.random.default_rng(3).integers(0, 256, (24, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = bytes_io.BytesIO()
    said = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}
    Image.fromarray(px).save(file, kind, **said)
    return file.getvalue()


def recording(tmp_path, suffix):
    path = tmp_path / f"whole.{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(SOUNDS[suffix], rate=48_000, layout="mono")
        tone = np.sin(np.arange(9_600) / 20, dtype=np.float32)[None] / 2
        frame = av.AudioFrame.from_ndarray(tone, "fltp", "mono")
        frame.sample_rate = 48_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path.read_bytes()


@st.composite
def spoilt(draw, wholes):
    """The name of one of the files `wholes`, its bytes with one change, and what was changed."""
    name = draw(st.sampled_from(sorted(wholes)))
    data = bytearray(wholes[name])
    change = draw(st.sampled_from(["head", "body", "cut", "double", "swap", "insert"]))
    at = draw(st.integers(0, min(127, len(data) - 1) if change == "head" else len(data) - 1))
    if change in ("head", "body"):
        data[at] = draw(st.integers(0, 255))
    elif change == "cut":
        del data[at:]
    elif change == "double":
        data[at:at] = data[at : at + draw(st.integers(1, 64))]
    elif change == "swap":
        data[at:], data[:at] = data[: len(data) - at], data[len(data) - at :]
    else:
        data[at:at] = draw(st.binary(min_size=1, max_size=16))
    return name, bytes(data), change


def few(examples):
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)


def show(hits):
    for field, number in sorted(hits.items()):
        print(f"{number:6d} {' '.join(field)}")


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_changed_picture_is_read_or_refused_by_name(tmp_path, examples):
    hits, wholes = Counter(), {kind: picture(kind) for kind in KINDS}
    for kind, data in wholes.items():
        (tmp_path / kind).write_bytes(data)
        assert read_image(tmp_path / kind, (8, 8)).shape == (8, 8, 3)

    @few(examples)
    @given(spoilt(wholes))
    def change(found):
        kind, data, changed = found
        path = tmp_path / "walk.png"
        path.write_bytes(data)
        try:
            out = read_image(path, (8, 8))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            hits[kind, changed, "refused"] += 1
            return
        assert out.shape == (8, 8, 3) and out.dtype == np.uint8
        hits[kind, changed, "read"] += 1

    change()
    show(hits)
    assert {what for _, _, what in hits} == {"read", "refused"} and len({kind for kind, _, _ in hits}) == len(KINDS)


def heard_or_refused(path):
    """How a recording is taken; what is heard is sound."""
    try:
        heard = read_sound(path, RATE)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return "refused"
    assert heard.dtype == np.float32 and heard.ndim == 1 and len(heard)
    assert np.isfinite(heard).all() and np.abs(heard).max() <= 1
    return "read"


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_changed_recording_is_heard_or_refused_by_name(tmp_path, examples):
    hits, wholes = Counter(), {suffix: recording(tmp_path, suffix) for suffix in SOUNDS}

    @few(examples)
    @given(spoilt(wholes))
    def change(found):
        suffix, data, changed = found
        path = tmp_path / f"voice.{suffix}"
        path.write_bytes(data)
        hits[suffix, changed, heard_or_refused(path)] += 1

    change()
    show(hits)
    assert {what for _, _, what in hits} == {"read", "refused"} and len({name for name, _, _ in hits}) == len(SOUNDS)


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_recording_with_one_field_of_its_header_changed_is_heard_or_refused(tmp_path, examples):
    hits, odd = Counter(), st.one_of(st.integers(0, 70), st.integers(0, 2**32 - 1), st.sampled_from([8_000, 65_535]))

    @few(examples)
    @given(st.sampled_from(sorted(WAV)), odd, st.sampled_from([(1, 16), (3, 32), (1, 8), (3, 64)]))
    def change(field, value, stored):
        kind, bits = stored
        said = {"kind": kind, "channels": 2, "rate": RATE, "bytes a second": RATE * bits // 4, "row": bits // 4}
        said |= {"bits": bits, "size": 400 * bits // 8, field: value}
        numbers = {name: struct.pack(form, said[name] % 2 ** (8 * struct.calcsize(form))) for name, form in WAV.items()}
        head = b"".join(numbers[name] for name in list(WAV)[:-1])
        data = b"RIFF" + struct.pack("<I", 2**16) + b"WAVEfmt " + struct.pack("<I", len(head)) + head
        path = tmp_path / "voice.wav"
        path.write_bytes(data + b"data" + numbers["size"] + bytes(400 * bits // 8))
        hits[field, heard_or_refused(path)] += 1

    change()
    show(hits)
    assert {what for _, what in hits} == {"read", "refused"} and {name for name, _ in hits} == set(WAV)
