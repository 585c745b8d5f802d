"""Video files and folders of pictures as frames, decoded by PyAV one at a time."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from vidistill.io import picture_files, read_whole_image

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".gif", ".avi")
HDR = {8: "linear light", 16: "PQ", 17: "SMPTE ST 428", 18: "HLG"}  # transfers of ITU-T H.273 to be mapped first
SAMPLES = 16_384  # of sound, decoded before they are resampled


class MediaError(ValueError):
    """A file that holds no usable picture or sound; the message says why."""


@dataclass(frozen=True)
class Frame:
    """A decoded picture: its number in the file, when it is shown in seconds after the first, PyAV's own frame."""

    index: int
    time: float
    raw: Any


@dataclass(frozen=True)
class Facts:
    """What a file says of itself: frames a second (0: nothing), sides as shown, and what needs care."""

    fps: float
    height: int
    width: int
    rotation: int  # degrees
    transfer: str = ""  # HDR transfer, or nothing
    depth: int = 8  # bits of a colour
    alpha: bool = False
    sound: bool = False
    aspect: float = 1.0  # width of a pixel over its height


def opened(path: Path) -> Any:
    """PyAV's container of a file; MediaError where there is none to read."""
    if path.is_file() and not path.stat().st_size:
        raise MediaError("the file is empty")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"not a media file that can be read ({error})") from error
    if not container.streams.video:
        container.close()
        raise MediaError("there is no picture in it")
    return container


def frames_of(path: Path, fps: float = 0.0, start: float = 0.0) -> Iterator[Frame]:
    """The frames of a video file or a folder of pictures (`fps` of them a second), from `start` seconds on or before.

    A file that is damaged somewhere gives what comes before the damage, then raises MediaError. Numbers of frames are
    true only from the beginning on (`start` 0).
    """
    if path.is_dir():
        for index, picture in enumerate(picture_files(path)):
            yield Frame(index, index / fps, still(picture))
        return
    with opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if start > 0 and stream.time_base:
            with contextlib.suppress(av.error.FFmpegError):  # what cannot be sought is read from its beginning
                container.seek(int((start + origin_of(stream)) / stream.time_base), stream=stream)
        yield from timed(decoded(container), stream)


def still(picture: Path) -> Any:
    """PyAV's frame of a picture, read as pictures are read everywhere; MediaError where it cannot be."""
    try:
        return av.VideoFrame.from_ndarray(read_whole_image(picture), format="rgb24")
    except (OSError, ValueError) as error:
        raise MediaError(str(error)) from error


def decoded(container: Any) -> Iterator[Any]:
    """PyAV's frames; MediaError where it cannot go on."""
    try:
        yield from container.decode(container.streams.video[0])
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"damaged ({error})") from error


def origin_of(stream: Any) -> float:
    """Seconds at which the first frame of a stream is stamped."""
    return float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0


def timed(raw: Iterator[Any], stream: Any) -> Iterator[Frame]:
    """Frames with times that rise; where stamps are missing or repeat, the stream's own rate is believed."""
    step, before, origin = 1 / float(stream.average_rate or stream.guessed_rate or 25), None, origin_of(stream)
    for index, frame in enumerate(raw):
        stamped = float(frame.pts * frame.time_base) - origin if frame.pts is not None and frame.time_base else None
        time = stamped if stamped is not None and (before is None or stamped > before) else None
        if time is None:
            time = 0.0 if before is None else before + step
        before = time
        yield Frame(index, time, frame)


def facts_of(path: Path, first: Any, fps: float = 0.0) -> Facts:
    """What a file says of itself, and what its first frame shows of it."""
    rotation, width, height = round(first.rotation) % 360, first.width, first.height
    names = {component.is_alpha for component in first.format.components}
    sound, aspect = False, 1.0
    if path.is_file():
        with opened(path) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            aspect = float(stream.sample_aspect_ratio or 1)
            sound = bool(container.streams.audio)
    width = max(1, round(width * aspect))
    if rotation % 180:
        width, height = height, width
    depth = max(component.bits for component in first.format.components)
    return Facts(fps, height, width, rotation, HDR.get(int(first.color_trc), ""), depth, True in names, sound, aspect)


def rgb(raw: Any, size: tuple[int, int], resize: str = "crop", aspect: float = 1.0) -> np.ndarray:
    """A frame as uint8 [H, W, 3] of `size` (height, width): cropped around the centre, or fit with black beside it.

    Turned as the file says; transparent pixels lie over black. `aspect`: width of a pixel over its height.
    """
    height, width = size
    turned = round(raw.rotation) % 360
    shown = (raw.height, raw.width * aspect) if turned % 180 == 0 else (raw.width * aspect, raw.height)
    pick = max if resize == "crop" else min
    scale = pick(height / shown[0], width / shown[1])
    inner = max(1, round(shown[0] * scale)), max(1, round(shown[1] * scale))
    before = inner if turned % 180 == 0 else inner[::-1]
    alpha = any(component.is_alpha for component in raw.format.components)
    options = {"height": before[0], "width": before[1], "interpolation": Interpolation.AREA}
    picture = raw.reformat(format="rgba" if alpha else "rgb24", **options).to_ndarray()
    if alpha:
        share = picture[..., 3:].astype(np.uint16)
        picture = ((picture[..., :3] * share + 127) // 255).astype(np.uint8)
    if turned:
        picture = np.rot90(picture, turned // 90)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    if top < 0 or left < 0:
        around = [(max(0, -top), max(0, height - picture.shape[0] + top)), (max(0, -left), 0), (0, 0)]
        around[1] = (around[1][0], max(0, width - picture.shape[1] - around[1][0]))
        picture = np.pad(picture, around)
        top, left = max(0, top), max(0, left)
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def nearest(frames: Iterator[Frame], start: float, fps: float, count: int) -> Iterator[Frame]:
    """The frames nearest to `count` times, `fps` of them a second from `start` seconds on; fewer where they end."""
    before = None
    k = 0
    for frame in frames:
        while k < count and before is not None and nearer(before, frame, start + k / fps):
            yield before
            k += 1
        if k == count:
            return
        before = frame
    while before is not None and k < count and start + k / fps <= before.time + 0.5 / fps:
        yield before
        k += 1


def nearer(before: Frame, after: Frame, time: float) -> bool:
    return time - before.time <= after.time - time


def sound_of(path: Path, start: float, seconds: float, rate: int) -> np.ndarray:
    """Mono float32 sound [S] in [-1, 1] of `seconds` from `start` on, silence where the file has none.

    MediaError for a file without sound. Memory grows with what is asked for, not with the file.
    """
    with opened(path) as container:
        if not container.streams.audio:
            raise MediaError("there is no sound in it")
        stream, origin = container.streams.audio[0], origin_of(container.streams.video[0])
        if start > 0:
            container.seek(int((start + origin) * av.time_base), any_frame=False)
        out = np.zeros(round(seconds * rate), np.float32)
        resampler = av.AudioResampler("flt", "mono", rate)
        at = None
        for frame in heard(container, stream):
            if at is None:
                time = float(frame.pts * frame.time_base) if frame.pts is not None else 0.0
                at = round((time - origin - start) * rate)
            for piece in resampler.resample(frame):
                samples = piece.to_ndarray()[0]
                if not np.isfinite(samples).all():
                    raise MediaError("its sound holds numbers that are not finite")
                at = lay(out, samples.clip(-1, 1), at)
            if at >= len(out):
                break
        return out


def heard(container: Any, stream: Any) -> Iterator[Any]:
    try:
        yield from container.decode(stream)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"its sound is damaged ({error})") from error


def lay(out: np.ndarray, piece: np.ndarray, at: int) -> int:
    """Write `piece` into `out` at sample `at`, as far as it fits; returns where it ends."""
    first, stop = max(0, at), min(len(out), at + len(piece))
    if first < stop:
        out[first:stop] = piece[first - at : stop - at]
    return at + len(piece)
