"""Long streams of a student at constant memory, and what is measured of them as they come."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill import metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.condition import Condition
from vidistill.conditioning.script import Cue
from vidistill.evaluation.probes import AFTER
from vidistill.io import to_float, to_uint8
from vidistill.memory.policies import MemoryConfig, stream_memory
from vidistill.ops.precision import autocast, working_dtype
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import endless, finite
from vidistill.streaming.session import StreamConfig, StreamSession

PICTURES = {"sharpness": metrics.sharpness, "saturation": metrics.saturation, "contrast": metrics.contrast}
CURVES = (*PICTURES, "motion")
FLAT = 0.04  # contrast of a frame that shows next to nothing
SHOWN = 4  # clips and streams kept to look at


def student_chunks(
    student: Bundle, given: Tensor, cond: Condition, chunks: int, seed: int, precision: str
) -> Iterator[Tensor]:
    """The student's own rollout from the given first latent at constant memory: `chunks` finished chunks."""
    net = student.net
    memory = net.new_memory(
        len(given), dtype=working_dtype(precision), cfg=stream_memory(net.cfg.memory, net.cfg.chunk)
    )
    noise, rng = chunk_noise(net, len(given), seed, given), torch.Generator().manual_seed(seed)
    passes = finite(endless(student.schedule), chunks)
    made = rollout(net, passes, noise=noise, cond=cond.frames, memory=memory, rng=rng)
    for _ in range(chunks):
        with autocast(precision):  # not around the loop: it would hold for whoever asks for the chunks, too
            chunk = next(made)
        yield chunk.float()


@torch.inference_mode()
def pieces(
    student: Bundle, codec: Codec, given: Tensor, cond: Condition, chunks: int, seed: int, precision: str
) -> Iterator[Tensor]:
    """The pictures [B, t, 3, H, W] of `student_chunks`, decoded as they come."""
    state = None
    for chunk in student_chunks(student, given, cond, chunks, seed, precision):
        px, state = codec.decode_stream(chunk, state)
        yield px


def streamed(
    student: Bundle,
    codec: Codec,
    frames: int,
    seed: int,
    cues: Sequence[Cue] = (),
    image: np.ndarray | None = None,
    sound: np.ndarray | None = None,
    memory: MemoryConfig | None = None,
) -> Tensor:
    """The first frames [T, 3, H, W] of a session as it is served, told what the cues say and hearing a sound."""
    cfg = StreamConfig(seed=seed, pipelined=False, memory=memory)
    with StreamSession(student, codec, cfg, image=image) as session:
        if sound is not None:
            session.set(audio=sound)
        return to_float(session.record(frames, cues=cues if "prompt" in session.takes else ()))


def check_finite(px: Tensor, what: str) -> None:
    """ValueError for pictures that hold nan or infinity: means that leave them out would look right."""
    if not px.isfinite().all():
        raise ValueError(f"{what} hold numbers that are not finite: what made them is broken, and none of it is judged")


class StreamTally:
    """Curves by frame of streams that arrive piece by piece, one picture a window, and the frames of the last one."""

    def __init__(self, length: int, window: int) -> None:
        self.length, self.window, self.keep = length, window, window + 1 + AFTER
        self.curves: dict[str, list[Tensor]] = {name: [] for name in CURVES}
        self.pictures: list[Tensor] = []
        self.tail: Tensor | None = None
        self.seen = 0

    def add(self, px: Tensor) -> None:
        """Measure the next frames px [S, f, 3, H, W]; what lies beyond `length` does not count."""
        px = px[:, : self.length - self.seen]
        if not px.shape[1]:
            return
        check_finite(px, "streams")
        joined = px if self.tail is None else torch.cat((self.tail, px), dim=1)
        fresh = px if self.tail is not None else px[:, 1:]
        for name, curve in PICTURES.items() if fresh.shape[1] else ():
            self.curves[name].append(curve(fresh))
        self.curves["motion"].append(metrics.motion(joined[:, -(fresh.shape[1] + 1) :]))
        wanted = [t - self.seen for t in range(self.seen, self.seen + px.shape[1]) if t % self.window == 0]
        self.pictures.append(torch.from_numpy(to_uint8(px[:SHOWN, wanted])))
        self.tail, self.seen = joined[:, -self.keep :].clone(), self.seen + px.shape[1]

    def pick(self, index: Tensor) -> "StreamTally":
        """The curves of some of the streams [N]."""
        own = StreamTally(self.length, self.window)
        own.curves = {name: [self.curve(name)[index]] for name in self.curves}
        return own

    def curve(self, name: str) -> Tensor:
        return torch.cat(self.curves[name], dim=1)


def curve_drifts(row: StreamTally, real: StreamTally) -> dict[str, Any]:
    """Each curve's last window against its first, and (`late`) against that of real streams."""
    n = row.window
    late = {f"{c}_ratio": metrics.ratio(*(float(t.curve(c)[:, -n:].mean()) for t in (row, real))) for c in CURVES}
    flat = (row.curve("contrast") < FLAT).double()
    late["flat_frames"] = float(flat[:, -n:].mean())
    drifts = {f"{c}_drift": metrics.drift(row.curve(c), n) for c in CURVES}
    return {**drifts, "long_flat_frames": float(flat.mean()), "late": late}
