"""Files in and out: pictures, sound and video of every kind, written whole or not at all, refused by name."""

import io as bytes_io
import os
import re
import struct
import subprocess
import time
import zlib
from contextlib import contextmanager

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vidistill import io
from vidistill.io import (
    contact_sheet,
    read_image,
    read_image_bytes,
    read_video,
    save_png,
    to_float,
    to_uint8,
    write_atomic,
    write_video,
)
from vidistill.sound import read_sound


def clip(num=12, size=32):
    """A square that moves one pixel a frame over a smooth ground."""
    frames = np.full((num, size, size, 3), (40, 90, 160), np.uint8)
    for t in range(num):
        frames[t, 8:20, t : t + 10] = (220, 60, 40)
    return frames


def test_float_and_back_is_exact_for_every_byte():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    px = to_float(frames)
    assert px.shape == (1, 3, 16, 16) and px.dtype == torch.float32 and px.min() >= 0 and px.max() == 1
    assert np.array_equal(to_uint8(px), frames)


def test_to_float_does_not_alias_its_input():
    frames = clip()
    before = frames.copy()
    to_float(frames).zero_()
    assert np.array_equal(frames, before)


def test_to_uint8_clamps_rounds_and_keeps_leading_axes():
    px = torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 3, 1, 1).expand(2, 5, 3, 4, 6)
    out = to_uint8(px)
    assert out.shape == (2, 5, 4, 6, 3) and out[0, 0, 0, 0].tolist() == [0, 128, 255]


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="uint8"):
        to_float(np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="3, H, W"):
        to_uint8(torch.zeros(4, 4, 3))


@pytest.mark.parametrize("scale", [1, 4])
def test_video_comes_back_nearly_as_written(tmp_path, scale):
    path = tmp_path / "deep" / "clip.mp4"
    write_video(path, clip(), fps=17.5, scale=scale)
    frames, fps = read_video(path)
    assert frames.shape == (12, 32 * scale, 32 * scale, 3) and fps == pytest.approx(17.5, abs=0.01)
    assert np.abs(frames[:, ::scale, ::scale].astype(int) - clip()).mean() < 6
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_a_long_clip_is_enlarged_frame_by_frame(tmp_path, monkeypatch):
    shapes = []
    real = io.upscale
    monkeypatch.setattr(io, "upscale", lambda px, factor: shapes.append(px.shape) or real(px, factor))
    write_video(tmp_path / "clip.mp4", clip(), fps=12, scale=2)
    assert shapes == [(32, 32, 3)] * 12


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_every_suffix_that_is_said_to_work_does(tmp_path, suffix):
    io.check_video(tmp_path / f"clip{suffix}")
    write_video(tmp_path / f"clip{suffix}", clip(), fps=12)
    frames, fps = read_video(tmp_path / f"clip{suffix}")
    assert frames.shape == (12, 32, 32, 3) and fps == pytest.approx(12, abs=0.1)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="even"):
        write_video(path, clip(size=31), fps=10)
    with pytest.raises((TypeError, ValueError, OSError)):
        save_png(path, np.zeros((4, 4, 7), np.uint8))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_contact_sheet_has_a_row_for_each_clip_and_shows_every_nth_frame(tmp_path):
    sheet = contact_sheet([clip(12), clip(6)], every=3, labels=["a", "b"], scale=2)
    assert sheet.size == (4 * 64 + 3 * 2, 2 * (64 + 14) + 2)
    assert np.array_equal(np.asarray(sheet)[14 : 14 + 64 : 2, 66:130:2], clip()[3])
    assert (np.asarray(sheet)[14:78, 64:66] == 255).all()
    save_png(tmp_path / "sheet.png", sheet)
    assert (tmp_path / "sheet.png").stat().st_size > 100
    with pytest.raises(ValueError, match="labels"):
        contact_sheet([clip()], labels=["a", "b"])


def test_reading_a_missing_video_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video"):
        read_video(tmp_path / "none.mp4")


@pytest.mark.parametrize("fps", [0, -3, float("nan"), float("inf"), 1e6])
def test_a_rate_that_no_video_has_is_refused_before_anything_is_written(tmp_path, fps):
    (tmp_path / "clip.mp4").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"fps .*clip\.mp4"):
        write_video(tmp_path / "clip.mp4", clip(), fps=fps)
    assert (tmp_path / "clip.mp4").read_bytes() == b"old"


def test_a_suffix_that_no_video_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        write_video(tmp_path / "clip.webm", clip(), fps=12)
    assert not list(tmp_path.iterdir())


@contextmanager
def full_disk():
    """Inside, no file grows beyond 8 KiB."""
    resource = pytest.importorskip("resource")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("frames", [8, 60])
@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_a_full_disk_is_an_error_and_the_old_video_stays(tmp_path, suffix, frames):
    path = tmp_path / f"clip{suffix}"
    write_video(path, clip(), fps=12)
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (frames, 128, 128, 3)).astype(np.uint8)
    with pytest.raises(OSError, match=rf"could not write.*{path.name}"), full_disk():
        write_video(path, noise, 16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_a_video_that_lost_frames_does_not_replace_a_good_one(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_video(path, clip(), fps=12)
    before = path.read_bytes()
    monkeypatch.setattr(io, "_count_frames", lambda path: 11)
    with pytest.raises(OSError, match="11 of 12 frames"):
        write_video(path, clip(), fps=12)
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_a_video_speaks(tmp_path, suffix):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    path = tmp_path / f"clip{suffix}"
    write_video(path, clip(24), fps=12, sound=tone)
    frames, fps = read_video(path)
    heard = read_sound(path, 16_000)
    assert len(frames) == 24 and fps == 12 and abs(len(heard) / 16_000 - 2) < 0.15
    spectrum = np.abs(np.fft.rfft(heard[4_000:12_000]))
    assert abs(np.argmax(spectrum) * 2 - 440) <= 4 and np.abs(heard[20_000:30_000]).max() < 0.01


# --- pictures ---------------------------------------------------------------------------------------------------------


def encoded(picture, kind="PNG", **options):
    file = bytes_io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_camera_says(tag, kind):
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32] = (255, 0, 0)  # red above on the left
    turned = Image.fromarray(upright)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's name of what turns upright into stored
    if tag in inverse:
        turned = turned.transpose(Image.Transpose(inverse[tag]))
    exif = Image.Exif()
    exif[0x0112] = tag
    out = read_image_bytes(encoded(turned, kind, exif=exif), (8, 8)).astype(int)
    assert out[1, 1, 0] > 200 and out[6, 1, 0] < 60 and out[1, 6, 0] < 60 and out[6, 6, 0] < 60


def test_what_is_transparent_is_white_in_every_mode():
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[..., [0, 2]] = 255
    rgba = Image.fromarray(hidden)
    grey = Image.fromarray(np.dstack([np.zeros((16, 16)), np.zeros((16, 16))]).astype(np.uint8), "LA")
    palette = rgba.convert("RGB").quantize(2)
    files = [encoded(rgba), encoded(grey), encoded(palette, transparency=palette.getpixel((0, 0)))]
    files.append(encoded(rgba, "WEBP", lossless=True))
    for data in files:
        assert (read_image_bytes(data, (8, 8)) == 255).all()
    half = hidden.copy()
    half[..., 3] = 128
    assert np.abs(read_image_bytes(encoded(Image.fromarray(half)), (8, 8))[0, 0] - [255.0, 127, 255]).max() < 2


def profile(red, green, blue):
    """The bytes of an ICC profile whose primaries have these XYZ and whose values are linear."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in values))

    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(90 - 14)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    tags |= {name: b"curv" + bytes(8) for name in (b"rTRC", b"gTRC", b"bTRC")}
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">2I", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)  # of sRGB, seen at D50


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_are_those_that_the_profile_of_a_picture_means(mode, kind):
    options = {"lossless": True} if kind == "WEBP" else {}

    def plain(*colour):
        picture = Image.new("RGB", (16, 16), colour)
        return picture.quantize(2) if mode == "P" else picture.convert(mode)

    picture = plain(255, 0, 0)
    swapped = read_image_bytes(encoded(picture, kind, **options, icc_profile=profile(GREEN, RED, BLUE)), (8, 8))
    assert np.abs(swapped - [0.0, 255, 0]).max() < 8
    grey = read_image_bytes(encoded(plain(55, 55, 55), kind, **options, icc_profile=profile(RED, GREEN, BLUE)), (8, 8))
    assert np.abs(grey - 128.0).max() < 4  # 0.5 of sRGB is 0.214 of light
    damaged = read_image_bytes(encoded(picture, kind, **options, icc_profile=b"junk"), (8, 8))
    assert np.abs(damaged - [255.0, 0, 0]).max() < 8


def test_a_page_of_postscript_is_no_picture_and_starts_no_program(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=r"picture.*none"):
        read_image_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n", (8, 8))


def test_a_file_that_is_too_large_for_a_picture_is_refused_unread(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ValueError, match=r"x\.png holds 3,221,225,472 bytes"):
        read_image(tmp_path / "x.png", (8, 8))


def test_the_transparent_grey_of_a_picture_of_16_bits_is_white():
    grey = np.full((16, 16), 0x1234, np.uint16)
    grey[:8] = 0x8000
    out = read_image_bytes(encoded(Image.fromarray(grey), transparency=0x1234), (16, 16))
    assert (out[12] == 255).all() and (np.abs(out[2] - 128.0) < 2).all()


def ramps():
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    yield "8-bit grey", encoded(Image.fromarray((255 * ramp).astype(np.uint8)))
    yield "16-bit grey", encoded(Image.fromarray((65535 * ramp).astype(np.uint16)))
    yield "16-bit grey TIFF", encoded(Image.fromarray((65535 * ramp).astype(np.uint16)), "TIFF")
    yield "32-bit TIFF", encoded(Image.fromarray(((2**31 - 1) * ramp).astype(np.int32)), "TIFF")
    yield "small 32-bit TIFF", encoded(Image.fromarray((65535 * ramp).astype(np.int32)), "TIFF")
    yield "float TIFF", encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF")
    yield "float TIFF of bytes", encoded(Image.fromarray((255 * ramp).astype(np.float32)), "TIFF")
    colour = Image.fromarray((255 * ramp).astype(np.uint8)).convert("RGB")
    yield "palette", encoded(colour.quantize(64, dither=Image.Dither.NONE))
    yield "RGBA", encoded(colour.convert("RGBA"))
    yield "LAB", encoded(lab(ramp), "TIFF")
    for mode in ("CMYK", "YCbCr"):
        yield mode, encoded(colour.convert(mode), "TIFF")


def lab(ramp):
    light = (255 * ramp).astype(np.uint8)
    return Image.merge("LAB", [Image.fromarray(x) for x in (light, 0 * light, 0 * light)])


@pytest.mark.parametrize(("name", "data"), list(ramps()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_mode_spans_black_to_white(name, data):
    out = read_image_bytes(data, (64, 64)).astype(int)
    assert out.min() <= 12 and out.max() >= 243 and (np.diff(out[0, :, 1]) >= -8).all(), name


def said_to_be(png, width, height):
    """The picture with another size in its header: what a bomb says of itself before anything is unpacked."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize(
    ("kind", "top", "white"),
    [
        (np.float32, 0.0, 1),
        (np.float32, 0.01, 1),
        (np.float32, 1.0, 1),
        (np.float32, 1.01, None),
        (np.float32, 40.0, None),
        (np.float32, 64.0, 255),
        (np.float32, 255.5, None),
        (np.float32, 40_000.0, 65535),
        (np.float32, 1e6, None),
        (np.int32, 0, 255),
        (np.int32, 3, None),
        (np.int32, 200, 255),
        (np.int32, 256, None),
        (np.int32, 16_384, 65535),
        (np.int32, 70_000, None),
        (np.int32, 2**23, 2**24 - 1),
        (np.int32, 2**30, 2**31 - 1),
    ],
)
def test_white_is_told_by_the_largest_number_or_the_picture_is_refused(kind, top, white):
    px = np.full((16, 16), top, kind)
    data = encoded(Image.fromarray(px), "TIFF")
    if white is None:
        with pytest.raises(ValueError, match=re.escape(f" {top:g},")):
            read_image_bytes(data, (8, 8))
        return
    assert np.abs(read_image_bytes(data, (8, 8)).astype(float) - 255 * top / white).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_a_dark_picture_of_16_bits_stays_dark(kind):
    data = encoded(Image.fromarray(np.full((16, 16), 1000, np.uint16)), kind)
    assert (read_image_bytes(data, (8, 8)) == 4).all()


def test_pictures_that_cannot_be_read_are_refused_by_name(tmp_path):
    whole = encoded(Image.fromarray(clip()[0]))
    broken = {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.png": b"hello",
        "large.png": encoded(Image.new("1", (5000, 10))),
        "huge.png": said_to_be(whole, 20000, 20000),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} cannot.*read"):
            read_image(tmp_path / name, (8, 8))
    with pytest.raises(ValueError, match="a folder"):
        read_image(tmp_path, (8, 8))
    with pytest.raises(FileNotFoundError, match="no picture"):
        read_image(tmp_path / "none.png", (8, 8))


@pytest.mark.parametrize("error", [RuntimeError, KeyError, MemoryError, Image.DecompressionBombError, RecursionError])
def test_whatever_a_decoder_raises_the_picture_cannot_be_read(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(ValueError, match=r"cannot.*read"):
        read_image_bytes(b"x", (8, 8))


def test_a_picture_of_a_million_empty_parts_is_refused_unread(monkeypatch):
    def chunk(kind, data=b""):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 2, 0, 0, 0]))
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="parts"):
        read_image_bytes(start + chunk(b"aaaa") * 300_000 + chunk(b"IEND"), (8, 8))


def test_the_pictures_of_a_folder_are_found_in_any_spelling(tmp_path):
    for name in ("a.PNG", "b.jpg", "c.webp", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in io.picture_files(tmp_path)] == ["a.PNG", "b.jpg", "c.webp"]


# --- sound ------------------------------------------------------------------------------------------------------------


def sound_file(path, codec, seconds=1.0, rate=48_000, layout="stereo", kind="s16"):
    """A tone of 440 Hz, louder on the left."""
    tone = np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout=layout)
        channels = len(stream.layout.channels)
        pcm = (tone[None] * np.linspace(0.6, 0.2, channels)[:, None]).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(pcm, "fltp", layout)
        frame.sample_rate = rate
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


SOUNDS = [
    ("a.wav", "pcm_s16le"),
    ("a.wav", "pcm_f32le"),
    ("a.wav", "pcm_u8"),
    ("a.wav", "pcm_s24le"),
    ("a.wav", "pcm_s32le"),
    ("a.mp3", "libmp3lame"),
    ("a.flac", "flac"),
    ("a.ogg", "libopus"),
    ("a.mka", "ac3"),
    ("a.m4a", "aac"),
]


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
@pytest.mark.parametrize(("name", "codec"), SOUNDS)
def test_sound_of_every_format_is_resampled_to_one_channel(tmp_path, name, codec, layout):
    if codec == "libmp3lame" and layout == "5.1":
        layout = "stereo"  # it has no more
    heard = read_sound(sound_file(tmp_path / name, codec, layout=layout), 16_000)
    assert heard.dtype == np.float32 and abs(len(heard) - 16_000) < 1_600
    spectrum = np.abs(np.fft.rfft(heard[4_000:12_000]))
    assert abs(np.argmax(spectrum) * 2 - 440) <= 4 and 0.1 < np.abs(heard).max() < 0.9


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.m4a", "aac"), ("a.mp3", "libmp3lame")]
)
def test_sound_that_is_cut_short_is_refused_by_name(tmp_path, name, codec):
    path = sound_file(tmp_path / name, codec, seconds=4)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 + 1])
    with pytest.raises(ValueError, match=rf"{name} .*(cut short|sound)"):
        read_sound(path, 16_000)


@pytest.mark.parametrize("data", [b"", b"RIFF", b"hello" * 100])
def test_files_without_sound_are_refused_by_name(tmp_path, data):
    (tmp_path / "z.wav").write_bytes(data)
    with pytest.raises(ValueError, match=r"z\.wav.*sound: \S"):
        read_sound(tmp_path / "z.wav", 16_000)
    write_video(tmp_path / "mute.mp4", clip(), fps=12)
    with pytest.raises(ValueError, match=r"mute\.mp4 .*no sound"):
        read_sound(tmp_path / "mute.mp4", 16_000)


def wav(kind=1, channels=1, rate=16_000, bits=16, data=bytes(3200), said=None):
    """A WAV file of any fields."""
    row = channels * bits // 8
    fields = struct.pack("<HHIIHH", kind, channels, rate, rate * row % 2**32, row % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fields)) + fields
    body += b"data" + struct.pack("<I", len(data) if said is None else said) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 9, 16, 24, 64])
def test_any_number_of_channels_is_averaged(tmp_path, channels):
    rows = np.tile(np.linspace(-0.9, 0.5, channels, dtype=np.float32), 1600)
    (tmp_path / "a.wav").write_bytes(wav(3, channels, bits=32, data=rows.tobytes()))
    heard = read_sound(tmp_path / "a.wav", 16_000)
    assert len(heard) == 1600 and np.abs(heard - rows[:channels].mean()).max() < 1e-4


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (wav(channels=0), "cannot be read as sound"),
        (wav(channels=255, data=bytes(255 * 200)), "cannot be read as sound"),
        (wav(rate=0), "cannot be read as sound"),
        (wav(rate=2**31 - 1), "cannot be read as sound"),
        (wav(bits=0), "cannot be read as sound"),
        (wav(kind=0xFFFF), "cannot be read as sound"),
        (wav(data=b""), "it is empty"),
        (wav(data=b"\1"), "cannot be read as sound"),
        (wav(3, bits=32, data=np.array([0, np.nan] * 800, np.float32).tobytes()), "not finite"),
        (wav(3, bits=32, data=np.array([0, -np.inf] * 800, np.float32).tobytes()), "not finite"),
        (wav(rate=1, data=bytes(2 * 3700)), "longer than 3600 s"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/x.ts\n#EXT-X-ENDLIST\n", "cannot be read as sound"),
        (b"ffconcat version 1.0\nfile b.wav\n", "cannot be read as sound"),
    ],
)
def test_sound_of_impossible_fields_is_refused_by_name(tmp_path, data, says):
    (tmp_path / "b.wav").write_bytes(wav())
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.wav .*{says}"):
        read_sound(tmp_path / "a.wav", 16_000)


def test_a_single_sample_is_sound_and_louder_than_all_is_cut_off(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav(data=b"\0\x40"))
    assert read_sound(tmp_path / "a.wav", 16_000).tolist() == [0.5]
    (tmp_path / "a.wav").write_bytes(wav(3, bits=32, data=np.array([100, -100] * 800, np.float32).tobytes()))
    assert set(read_sound(tmp_path / "a.wav", 16_000)) == {1.0, -1.0}


def test_a_recorder_that_did_not_know_its_length_is_read_to_the_end(tmp_path):
    path = sound_file(tmp_path / "a.wav", "pcm_s16le")
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\xff"
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert abs(len(read_sound(path, 16_000)) - 16_000) < 200


# --- the one write ----------------------------------------------------------------------------------------------------


def test_a_write_that_fails_is_named_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.txt"
    io.write_text(path, "old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"x\.txt: No space.*untouched"):
        write_atomic(path, full)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.txt"]
    with pytest.raises(OSError, match=r"y\.txt: File exists"):
        io.write_text(tmp_path / "x.txt" / "y.txt", "a file is no folder")


def test_what_killed_writers_left_is_swept_and_what_others_write_is_not(tmp_path):
    host = io.socket.gethostname()
    room = f".vidistill-{host}-{2**22 + 5}-0.tmp"  # more than any process has
    names = [room, f".vidistill-{host}-{'9' * 20}-0.tmp", f".vidistill-{host}-{os.getppid()}-0.tmp"]
    names += [".vidistill-elsewhere-7-0.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").touch()
    old = [".tmpKYVUDg", ".x.json.4242.tmp", ".state.safetensors.99999999999999999999.tmp"]
    for name in (*old, ".tmpabcdef", ".tmpnotes", "kept.tmp"):
        (tmp_path / name).touch()
    for name in old:
        os.utime(tmp_path / name, (time.time() - 3600,) * 2)
    io.write_json(tmp_path / "y.json", {})
    assert set(os.listdir(tmp_path)) == {*names[2:], ".tmpabcdef", ".tmpnotes", "kept.tmp", "y.json"}
    for path in (tmp_path / names[3], tmp_path / names[3] / "x.json"):
        os.utime(path, (time.time() - 3600,) * 2)
    io.sweep(tmp_path)
    assert names[3] not in os.listdir(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_atomic(tmp_path / "w.safetensors", lambda p: save_file({"w": torch.zeros(1)}, p))
        io.write_json(tmp_path / "x.json", {})
        save_png(tmp_path / "x.png", clip()[0])
        write_video(tmp_path / "x.mp4", clip(), fps=12)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_of_other_encodings_is_named(tmp_path):
    path = tmp_path / "l.txt"
    for data, found in (("caf\xe9".encode("latin-1"), "byte 3"), ("hi".encode("utf-16"), "UTF-16"), (b"a\0b", "zero")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"l\.txt .*{found}"):
            io.read_text(path)
    path.write_bytes("caf\xe9".encode("utf-8-sig"))
    assert io.read_text(path) == "caf\xe9"


def test_json_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "x.json"
    for text in ("", "{", "[" * 100_000, "1" * 5000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is damaged"):
            io.read_json(path)
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ValueError, match=r"x\.json holds 3,221,225,472 bytes"):
        io.read_json(path)


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_an_output_never_replaces_what_is_read_or_is_not_ours(tmp_path):
    ours, theirs = tmp_path / "ours.png", tmp_path / "theirs.png"
    save_png(ours, clip()[0])
    Image.fromarray(clip()[0]).save(theirs)
    io.check_output(ours)
    io.check_output(tmp_path / "free.png")
    with pytest.raises(ValueError, match=r"not.*ours"):
        io.check_output(theirs)
    link = tmp_path / "link.png"
    link.symlink_to(ours)
    for path in (ours, link):
        with pytest.raises(ValueError, match=r"overwrite.*read"):
            io.check_output(path, reads=[ours])


def test_a_video_is_refused_where_its_contact_sheet_would_replace_a_picture(tmp_path):
    Image.fromarray(clip()[0]).save(tmp_path / "walk.png")
    for reads in ((), [tmp_path / "walk.png"]):
        with pytest.raises(ValueError, match="contact sheet"):
            io.check_video(tmp_path / "walk.mp4", reads)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match="contact sheet"):
        io.check_video(tmp_path / "b.mp4")
    write_video(tmp_path / "c.mp4", clip(), fps=12)
    io.check_video(tmp_path / "c.mp4")
    (tmp_path / "d.mp4").write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match=r"not.*ours"):
        io.check_video(tmp_path / "d.mp4")


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_our_videos_are_known_as_ours(tmp_path, suffix):
    write_video(tmp_path / f"c{suffix}", clip(), fps=12)
    assert io.is_ours(tmp_path / f"c{suffix}")


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    def refused(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io.tempfile, "TemporaryFile", refused)
    with pytest.raises(ValueError, match="Permission denied"):
        io.check_video(tmp_path / "x.mp4")
