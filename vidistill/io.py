"""Videos and pictures in and out of files; the only place where uint8 and float meet."""

import io
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

MAX_SIDE = 4096  # pixels along a side of a picture that is read
SUFFIXES = (".mp4", ".mkv", ".mov", ".avi")  # of videos that are written


def to_float(frames: np.ndarray) -> torch.Tensor:
    """Returns float32 [..., 3, H, W] in [0, 1] from uint8 [..., H, W, 3]."""
    if frames.dtype != np.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; needed is uint8 [..., H, W, 3]")
    return (
        torch.from_numpy(np.ascontiguousarray(frames))
        .movedim(-1, -3)
        .to(torch.float32, copy=True)
        .contiguous()
        .div_(255)
    )


def to_uint8(px: torch.Tensor) -> np.ndarray:
    """Returns uint8 [..., H, W, 3] from float [..., 3, H, W] in [0, 1]: clamped, then rounded."""
    if px.ndim < 3 or px.shape[-3] != 3:
        raise ValueError(f"px is {list(px.shape)}; needed is [..., 3, H, W]")
    scaled = px.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.movedim(-3, -1).contiguous().cpu().numpy()


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Returns [..., H * factor, W * factor, 3], every pixel repeated."""
    return frames.repeat(factor, -3).repeat(factor, -2) if factor > 1 else frames


def check_video(path: Path) -> None:
    """ValueError, in the words of a command line, unless a video can be written at `path`: its folder is there."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {path} is no video file: let its name end in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it, or name another --out")
    if path.is_dir():
        raise ValueError(f"--out {path} is a folder; name a file")


def write_video(path: str | Path, frames: np.ndarray, fps: float, scale: int = 1) -> None:
    """Writes uint8 [T, H, W, 3] as H.264 (yuv420p); `scale` enlarges every pixel.

    The file appears complete or not at all. Height and width times scale must be even.
    """
    import imageio.v3 as iio

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; needed is uint8 [T, H, W, 3]")
    height, width = (side * max(scale, 1) for side in frames.shape[1:3])
    if height % 2 or width % 2:
        raise ValueError(f"frames times scale are {height}x{width}; yuv420p needs even sizes")
    options: dict[str, Any] = dict(
        fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=1, output_params=["-crf", "14"]
    )
    enlarged: Any = (upscale(px, scale) for px in frames)
    _atomically(path, lambda temporary: iio.imwrite(temporary, enlarged, plugin="FFMPEG", is_batch=True, **options))


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Returns (uint8 [T, H, W, 3], frames per second)."""
    import imageio.v3 as iio

    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    fps = float(iio.immeta(path, plugin="FFMPEG")["fps"])
    return np.asarray(iio.imread(path, plugin="FFMPEG")), fps


def read_image(
    source: str | Path | bytes,
    size: tuple[int, int],
    formats: tuple[str, ...] | None = None,
    pixels: int = MAX_SIDE**2,
) -> np.ndarray:
    """A picture (a file, or the bytes of one) as uint8 [H, W, 3] of `size` (height, width), cropped to its shape.

    formats: the only ones tried, as Pillow names them; default all. pixels: the most that are read. ValueError says why
    a picture cannot be read, FileNotFoundError that there is none.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as picture:
            if max(picture.size) > MAX_SIDE:
                raise ValueError(f"the picture is {picture.width}x{picture.height}; at most {MAX_SIDE} a side are read")
            if picture.width * picture.height > pixels:
                raise ValueError(f"the picture is {picture.width}x{picture.height}; at most {pixels:,} pixels are read")
            rgb = picture.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {source!s}; name one that is there") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        where = "" if isinstance(source, bytes) else f"{source}: "
        kinds = " or ".join(formats or ("picture",))
        raise ValueError(f"{where}not a whole {kinds} file; save it again and try once more") from error
    height, width = size
    scale = min(rgb.width / width, rgb.height / height)  # source pixels a target pixel
    left, top = (rgb.width - width * scale) / 2, (rgb.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return np.array(rgb.resize((width, height), Image.Resampling.LANCZOS, box=box))


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
    _atomically(path, lambda temporary: image.save(temporary, "PNG"))


def _atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Calls `write` with a temporary name beside `path` (same suffix), then moves the result there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
