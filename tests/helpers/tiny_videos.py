"""Little video files, written by PyAV."""

import json
from fractions import Fraction

import av
import numpy as np

SIDE = 48  # px


def moving(frames=40, seed=0, height=SIDE, width=SIDE, speed=2):
    """A bright square that wanders over coloured blocks, uint8 [T, H, W, 3]; every seed looks and moves otherwise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 200, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    ground = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    place, out = rng.uniform(4, 24, 2), np.tile(ground, (frames, 1, 1, 1))
    for t in range(frames):
        place = place + speed * rng.uniform(-1, 1, 2) + rng.uniform(-0.5, 0.5, 2)
        y, x = np.clip(place, 0, min(height, width) - 16).astype(int)
        out[t, y : y + 14, x : x + 14] = (250, 240, 60) if seed % 2 else (10, 20, 250)
    return out


def write(path, frames, fps=16, codec="libx264", pix_fmt="yuv444p", times=None, rotate=0, pcm=None, options=None):
    """A video file of uint8 [T, H, W, 3 or 4]; `times`: seconds of each frame; `pcm`: float sound at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000) if times is not None else 1 / stream.codec_context.framerate
        if rotate:
            stream.set_display_rotation(rotate)
        audio = None
        if pcm is not None:
            audio = container.add_stream("aac", rate=16_000, layout="mono")
        for t, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgba" if picture.shape[-1] == 4 else "rgb24")
            frame.pts = t if times is None else round(1000 * times[t])
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            for start in range(0, len(pcm), 1024):
                piece = av.AudioFrame.from_ndarray(pcm[None, start : start + 1024].astype(np.float32), "fltp", "mono")
                piece.sample_rate, piece.pts, piece.time_base = 16_000, start, Fraction(1, 16_000)
                container.mux(audio.encode(piece))
            container.mux(audio.encode())
    return path


def poses_of(frames, seed=0):
    """Camera-to-world [F, 4, 4] of a camera that turns to the right and walks ahead, in OpenCV's axes."""
    angle = np.linspace(0, 0.5, frames)
    out = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    out[:, 0, 0], out[:, 0, 2] = np.cos(angle), np.sin(angle)
    out[:, 2, 0], out[:, 2, 2] = -np.sin(angle), np.cos(angle)
    out[:, :3, 3] = np.stack((0 * angle, 0.1 * angle, np.linspace(0, 3, frames)), 1)
    return out


def report_of(out):
    """The rows of a report by name of the video."""
    report = json.loads((out / "report.json").read_text())
    return report, {row["name"]: row for row in report["files"]}
