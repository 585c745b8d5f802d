"""Files in and out: the one atomic write, text and JSON, pictures and video; `sound` reads recordings.

Every failure is a ValueError or an OSError that names the file. The only place where uint8 and float pixels meet.
"""

import io
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open

MARK = "vidistill"  # what our pictures, videos and weights say of who wrote them
STALE_S = 600  # seconds without a change after which a temporary file of an unknown writer counts as left behind
MAX_JSON = 2**30  # bytes of a JSON file that is read
MAX_SIDE = 4096  # pixels along a side of a picture that is read
MAX_CHUNKS = 1000  # parts of a PNG; a picture of millions of empty ones takes seconds to walk through
MAX_FPS = 1000
SUFFIXES = (".mp4", ".mkv", ".mov", ".avi")  # of videos that are written
MAX_PICTURE = 2**29  # bytes of a picture file that are read
# Decoders that are tried, as Pillow names them: others start programs, or read what is no picture.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA")
WHOLE_RANGES = (255.0, 65535.0, 2.0**24 - 1, 2.0**31 - 1)  # of pictures of whole numbers that do not say their bits
RANGES = (1.0, 255.0, 65535.0)  # of pictures of fractions
FILLED = 0.25  # share of its range that the largest number of such a picture reaches at least
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

DOWNLOADS = "VIDISTILL_DOWNLOADS"  # environment variable: 1 lets the files of a checkpoint decide about downloads

_writes = itertools.count()


def may_download() -> bool:
    """Whether what a file names, and not the user, may be fetched from the hub; else it has to be on this machine."""
    return os.environ.get(DOWNLOADS, "0") not in ("", "0")


def not_found(source: str | Path, what: str, error: Exception, offline: bool) -> FileNotFoundError:
    """What to say, in one line, where `what` of a folder or hub id could not be read; `offline`: no hub was asked."""
    if any(type(cause).__name__ == "GatedRepoError" for cause in causes(error)):
        return FileNotFoundError(
            f"{what} {str(source)!r} is on the hub under a licence that has not been accepted from here: accept it on "
            f"the page of {source}, and log in with `hf auth login`"
        )
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    here = f"{what} {str(source)!r} is not on this machine, and the hub was not asked (offline)"
    there = f"{what} {str(source)!r} was found neither on this machine nor on the hub ({reason})"
    hint = f"fetch it with `hf download {source}`, name its folder"
    return FileNotFoundError(
        f"{here}: {hint}, or set {DOWNLOADS}=1" if offline else f"{there}; if this machine is offline, {hint}"
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and move the result to `path`; OSError names `path`, which is then as it was.

    The temporary file has the name of `path`, in a folder of its own beside it: whatever else a writer leaves there is
    swept with it, also after a kill, by the next write into the same folder. The umask decides who may read.
    """
    path = Path(path)
    room = path.with_name(f".{MARK}-{socket.gethostname()}-{os.getpid()}-{next(_writes)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        room.mkdir()
        temporary = room / path.name
        write(temporary)
        temporary.chmod(room.stat().st_mode & 0o666)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save and safetensors have errors of their own
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise OSError(f"could not write {path}: {reason}; what was there is untouched") from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def sweep(folder: Path, stale_s: float = STALE_S) -> None:
    """Remove what writers that were killed left in `folder`.

    Ours are named after their process; those of earlier versions and of safetensors count as left behind once they
    have not changed for `stale_s`.
    """
    for leftover in folder.glob(".*tmp*"):
        own = re.fullmatch(rf"\.{MARK}-(.+)-(\d+)-\d+\.tmp", leftover.name)
        if own and own[1] == socket.gethostname():
            dead = not _is_running(int(own[2]))
        elif own or re.fullmatch(r"\.tmp\w{6}|\..+\.\d+\.tmp", leftover.name):
            dead = _idle_s(leftover) >= stale_s
        else:
            continue
        if dead and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        elif dead:
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _idle_s(path: Path) -> float:
    """Seconds since `path`, or a file in it, was last written; 0 if it is gone."""
    try:
        return time.time() - max(p.stat().st_mtime for p in (path, *(path.iterdir() if path.is_dir() else ())))
    except OSError:
        return 0.0


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_text(path: str | Path) -> str:
    """The UTF-8 text in `path` (a byte-order mark is dropped); ValueError names the encoding it seems to have."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"no UTF-8 (byte {error.start})"
        raise ValueError(f"{path} is {found}; save it as UTF-8 text") from error
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes, which no text has; save it as UTF-8 text")
    return text


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path, most: int = MAX_JSON) -> Any:
    """What the JSON file at `path` holds; ValueError for a damaged one, and for more than `most` bytes."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > most:
        raise ValueError(f"{path} holds {path.stat().st_size:,} bytes; at most {most:,} of JSON are read")
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def to_float(frames: np.ndarray) -> torch.Tensor:
    """Returns float32 [..., 3, H, W] in [0, 1] from uint8 [..., H, W, 3]."""
    if frames.dtype != np.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; needed is uint8 [..., H, W, 3]")
    px = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3)
    return px.to(torch.float32, copy=True).contiguous().div_(255)


def to_uint8(px: torch.Tensor) -> np.ndarray:
    """Returns uint8 [..., H, W, 3] from float [..., 3, H, W] in [0, 1]: clamped, then rounded."""
    if px.ndim < 3 or px.shape[-3] != 3:
        raise ValueError(f"px is {list(px.shape)}; needed is [..., 3, H, W]")
    scaled = px.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.movedim(-3, -1).contiguous().cpu().numpy()


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Returns [..., H * factor, W * factor, 3], every pixel repeated."""
    return frames.repeat(factor, -3).repeat(factor, -2) if factor > 1 else frames


def is_ours(path: Path) -> bool:
    """Whether one of our commands wrote the picture, video, weights or record at `path`."""
    suffix = path.suffix.lower() if path.is_file() else ""  # a pipe would be waited for
    try:
        if suffix == ".png":
            with Image.open(path) as picture:
                return picture.info.get("Software") == MARK
        if suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return MARK in (file.metadata() or {})
        if suffix == ".json":
            found = read_json(path)
            return isinstance(found, dict) and {"format", "kind"} <= found.keys()
        if suffix in SUFFIXES:
            import av

            with av.open(str(path)) as video:
                return MARK in {value for key, value in video.metadata.items() if key.lower() == "comment"}
    except Exception:  # whatever a decoder says of it: we have not written that
        return False
    return False


def check_output(path: Path, reads: Iterable[str | Path | None] = (), what: str = "--out") -> None:
    """ValueError, in the words of a command line, unless a command that reads the files `reads` may write `path`.

    Its folder is there and can be written, and its name is free or that of a file we wrote. `what`: what to call it.
    """
    folder = path.parent
    if not path.name or path.is_dir():
        raise ValueError(f"{what} {path} is a folder; name a file")
    if not folder.is_dir():
        raise ValueError(f"{what} {path}: there is no folder {folder}; make it, or name another {what}")
    if path.exists():
        if any(source and Path(source).exists() and path.samefile(source) for source in reads):
            raise ValueError(f"{what} {path} would overwrite a file that is read; name another --out")
        if not is_ours(path):
            raise ValueError(f"{what} {path} is there and not a file of ours; move it away, or name another --out")
    check_folder(folder, what)


def check_folder(folder: Path, what: str = "--out") -> None:
    """ValueError unless files can be written into `folder`, or into the first folder above it that is there."""
    there = next((f for f in (folder, *folder.absolute().parents) if f.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{what}: {there} cannot be written ({error.strerror}); name another folder") from error


def check_video(path: Path, reads: Iterable[str | Path | None] = ()) -> None:
    """ValueError unless a command that reads `reads` may write a video at `path` and its contact sheet beside it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {path} is no video file: let its name end in {', '.join(SUFFIXES)}")
    reads = tuple(reads)
    check_output(path, reads)
    check_output(path.with_suffix(".png"), reads, f"the contact sheet of --out {path.name},")


def write_video(
    path: str | Path,
    frames: np.ndarray,
    fps: float,
    scale: int = 1,
    sound: np.ndarray | None = None,
    rate: int = 16_000,
) -> None:
    """Writes uint8 [T, H, W, 3] as H.264 (yuv420p); `scale` enlarges every pixel.

    Height and width times scale must be even. `sound`: float [S] in [-1, 1] at `rate`, cut or filled up with silence
    to the length of the pictures. The file appears once all its frames were found in it, or not at all.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; needed is uint8 [T, H, W, 3]")
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}; {path} needs a number above 0, at most {MAX_FPS}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} has an unknown suffix; videos end in {', '.join(SUFFIXES)}")
    height, width = (side * max(scale, 1) for side in frames.shape[1:3])
    if height % 2 or width % 2:
        raise ValueError(f"frames times scale are {height}x{width}; yuv420p needs even sizes")

    def encode(temporary: Path) -> None:
        _encode_video(temporary, frames, Fraction(fps).limit_denominator(1001), scale, sound, rate)
        if (found := _count_frames(temporary)) != len(frames):
            raise OSError(f"{found} of {len(frames)} frames are in the file")

    write_atomic(path, encode)


def _encode_video(
    path: Path, frames: np.ndarray, fps: Fraction, scale: int, sound: np.ndarray | None, rate: int
) -> None:
    import av

    with av.open(str(path), "w") as out:
        out.metadata["comment"] = MARK
        video: Any = out.add_stream("libx264", rate=fps, options={"crf": "14"})
        video.height, video.width = (side * max(scale, 1) for side in frames.shape[1:3])
        video.pix_fmt = "yuv420p"
        audio: Any = None if sound is None else out.add_stream("aac", rate=rate, layout="mono")
        at = 0
        for i, px in enumerate(frames, 1):
            out.mux(video.encode(av.VideoFrame.from_ndarray(upscale(px, scale), format="rgb24")))
            if sound is not None:  # sound up to the end of this picture, so that both are interleaved
                end = round(i * rate / fps)
                piece = sound[at:end].astype(np.float32)
                part = av.AudioFrame.from_ndarray(np.pad(piece, (0, end - at - len(piece)))[None], "fltp", "mono")
                part.sample_rate, part.pts = rate, at
                out.mux(audio.encode(part))
                at = end
        for stream in (video, audio):
            if stream is not None:
                out.mux(stream.encode())


def _count_frames(path: Path) -> int:
    """Pictures in a video file, counted without decoding them."""
    import av

    with av.open(str(path)) as file:
        return sum(packet.size > 0 for packet in file.demux(video=0))


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Returns (uint8 [T, H, W, 3], frames per second); ValueError for a file that cannot be read."""
    import imageio.v3 as iio

    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        plugin: Any = iio.imopen(path, "r", plugin="pyav")
        with plugin as file:
            return np.asarray(file.read(index=...)), float(file.metadata()["fps"])
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def natural(name: str) -> list[Any]:
    """What names are sorted by so that frame2 comes before frame10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def picture_files(folder: str | Path) -> list[Path]:
    """The files of `folder` that are pictures by their names, in the order of their numbers; hidden ones are not."""
    found = [p for p in Path(folder).iterdir() if p.suffix.lower() in PICTURES and p.is_file()]
    shown = (p for p in found if not re.match(r"\.[^.]", p.name))  # "....png" is a name, "._1.png" a file beside one
    return sorted(shown, key=lambda p: (natural(p.name), p.name))


def read_image(source: str | Path, size: tuple[int, int], formats: tuple[str, ...] | None = None) -> np.ndarray:
    """The picture in a file as uint8 [H, W, 3] of `size` (height, width), cropped to its shape; see `read_image_bytes`.

    FileNotFoundError that there is none.
    """
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a picture")
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}; name one that is there")
    if path.stat().st_size > MAX_PICTURE:
        raise ValueError(f"{path} holds {path.stat().st_size:,} bytes; at most {MAX_PICTURE:,} of a picture are read")
    return read_image_bytes(path.read_bytes(), size, formats, where=str(path))


def read_whole_image(path: Path, side: int = 4 * MAX_SIDE, pixels: int = 8 * MAX_SIDE**2) -> np.ndarray:
    """The picture in a file as uint8 [H, W, 3] of the size it has, as `read_image_bytes` reads it."""
    if path.stat().st_size > MAX_PICTURE:
        raise ValueError(f"{path} holds {path.stat().st_size:,} bytes; at most {MAX_PICTURE:,} of a picture are read")
    return np.asarray(_decoded(path.read_bytes(), None, side, pixels, str(path)))


def read_image_bytes(
    data: bytes,
    size: tuple[int, int],
    formats: tuple[str, ...] | None = None,
    pixels: int = MAX_SIDE**2,
    where: str = "the picture",
) -> np.ndarray:
    """The picture in `data` as uint8 [H, W, 3] of `size` (height, width), cropped to its shape, turned upright.

    What is transparent becomes white; a mode of more than 8 bits is scaled by its range, see `to_rgb`; colours of a
    profile become those of sRGB. formats: the only ones tried, as Pillow names them; default FORMATS. pixels: the most
    that are read. ValueError, whatever the decoder says.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and _has_many_chunks(data):
        raise ValueError(f"{where} has more than {MAX_CHUNKS} parts; save it again")
    rgb = _decoded(data, formats, MAX_SIDE, pixels, where)
    height, width = size
    scale = min(rgb.width / width, rgb.height / height)  # source pixels a target pixel
    left, top = (rgb.width - width * scale) / 2, (rgb.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return np.array(rgb.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _decoded(data: bytes, formats: tuple[str, ...] | None, side: int, pixels: int, where: str) -> Image.Image:
    """The picture in `data`, upright and in 8-bit RGB; ValueError, whatever the decoder says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of sizes and tags: what matters is checked here
            Image.init()
            with Image.open(io.BytesIO(data), formats=[f for f in formats or FORMATS if f in Image.OPEN]) as picture:
                if max(picture.size) > side or picture.width * picture.height > pixels:
                    said = f"at most {side} a side and {pixels:,} pixels are read"
                    raise Image.DecompressionBombError(f"it is {picture.width}x{picture.height}; {said}")
                return to_rgb(ImageOps.exif_transpose(picture), 32 if picture.format == "TIFF" else 16)
    except Exception as error:
        kinds = " or ".join(formats or ("picture",))
        damaged = isinstance(error, UnidentifiedImageError) or not str(error)
        reason = "it is none, or damaged" if damaged else error
        raise ValueError(f"{where} cannot be read as a {kinds} file: {reason}") from error


def _has_many_chunks(data: bytes) -> bool:
    """Whether a PNG has more than MAX_CHUNKS chunks."""
    at = 8
    for _ in range(MAX_CHUNKS):
        if at >= len(data):
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at < len(data)


def to_rgb(picture: Image.Image, bits: int = 16) -> Image.Image:
    """`picture` in 8-bit RGB: over white where it is transparent, scaled by its range where it has more bits.

    bits: of whole numbers, where its mode does not say. Pictures of 16 bits have all of them as their range. Those of
    32, as TIFF has them, do not say theirs, and fractions do not: it is the smallest of
    RANGES (fractions) or WHOLE_RANGES (whole numbers) that holds their largest number, if that fills FILLED of it, or
    is at most 1 in one of fractions. ValueError for others: they may be dark, or of another range.
    """
    if picture.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(picture, np.float64), posinf=0.0, neginf=0.0).clip(0)
        clear = values == picture.info.get("transparency", -1.0)
        values *= 255 / _range_of(picture.mode, bits, float(values.max()))
        values[clear] = 255
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, to_srgb(picture.convert("RGBA"))).convert("RGB")
    return to_srgb(picture.convert("RGB") if picture.mode in ("P", "YCbCr") else picture).convert("RGB")


def _range_of(mode: str, bits: int, top: float) -> float:
    """The number that is white in a picture of more than 8 bits whose largest is `top`; see `to_rgb`."""
    if mode != "F" and (mode != "I" or bits == 16):
        return 65535.0
    ranges = RANGES if mode == "F" else WHOLE_RANGES
    found = next((r for r in ranges if top <= r), None)
    if found is None or (0 < top < FILLED * found and found > 1):
        known = ", ".join(f"{r:,.0f}" for r in ranges)
        raise ValueError(
            f"its largest number is {top:g}, which does not tell what white is (known: {known}); save it with 8 or 16 "
            "bits a colour"
        )
    return found


def to_srgb(picture: Image.Image) -> Image.Image:
    """`picture` in the colours of sRGB; as it is without a profile, or with one that cannot be used."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    mode = picture.mode if picture.mode == "RGBA" else "RGB"
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, own, srgb, outputMode=mode) or picture
    except (ImageCms.PyCMSError, OSError):  # damaged, or of another kind of picture: what viewers do then
        return picture


def contact_sheet(
    rows: Sequence[np.ndarray], every: int = 1, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Returns one picture with a row for each clip uint8 [T, H, W, 3], showing every `every`-th frame, left to right.

    labels: a line of text above each row. scale: how often a pixel is repeated. Clips may differ in length and size.
    """
    if not rows or every < 1 or (labels is not None and len(labels) != len(rows)):
        raise ValueError(
            f"{len(rows)} rows, {labels and len(labels)} labels, every {every}; needed: as many labels as rows"
        )
    strips = [list(upscale(np.asarray(clip)[::every], scale)) for clip in rows]
    head, gap = (14 if labels else 0), 2
    width = max(len(strip) * (strip[0].shape[1] + gap) for strip in strips) - gap
    sheet = Image.new("RGB", (width, sum(strip[0].shape[0] + head + gap for strip in strips) - gap), (255, 255, 255))
    draw, y = ImageDraw.Draw(sheet), 0
    for k, strip in enumerate(strips):
        if labels:
            draw.text((2, y + 1), labels[k], fill=(0, 0, 0))
        for i, picture in enumerate(strip):
            sheet.paste(Image.fromarray(picture), (i * (picture.shape[1] + gap), y + head))
        y += strip[0].shape[0] + head + gap
    return sheet


def save_png(path: str | Path, picture: np.ndarray | Image.Image) -> None:
    """Writes a PIL image or uint8 [H, W, 3] as PNG. The file appears complete or not at all."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    info = PngInfo()
    info.add_text("Software", MARK)
    write_atomic(path, lambda temporary: image.save(temporary, "PNG", pnginfo=info))
