"""Running measures of clips and streams: pixels come in, figures come out, nothing large is kept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidistill import metrics
from vidistill.evaluation.probes import AFTER, TURNS, WALKS, Probe, read
from vidistill.io import to_uint8

HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0)  # seconds
PICTURE_CURVES = {"sharpness": metrics.sharpness, "saturation": metrics.saturation, "contrast": metrics.contrast}
CURVES = (*PICTURE_CURVES, "motion")
SHOWN = 4  # clips and streams kept to look at


@dataclass(frozen=True)
class ClipBatch:
    """Real clips px [B, T, 3, H, W], their actions [B, T, A], poses [B, T, 3], classes `turn` and `walk` [B, T]."""

    index: int
    px: Tensor
    actions: Tensor
    poses: Tensor
    turn: Tensor
    walk: Tensor
    episodes: Tensor


class Tally:
    """What is known of one row after some batches of clips; pixels are not kept, but for a few clips to look at."""

    def __init__(self, probe: Probe, stride: int, window: int) -> None:
        self.probe, self.stride, self.window = probe, stride, window
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, px: Tensor, batch: ClipBatch) -> None:
        """Measure clips px [B, T, 3, H, W] that stand for those of `batch`; the start image counts in PSNR alone."""
        seen = px[:, : self.window + 1]
        reading = read(self.probe, px[:, : self.window + 1 + AFTER], self.stride)
        got = {name: measure(seen[:, 1:]) for name, measure in PICTURE_CURVES.items()}
        got |= {"motion": metrics.motion(seen), "flicker": metrics.flicker(seen)}
        got["error"] = metrics.mse(px, batch.px)
        got |= {
            "features": reading.features,
            **{n: reading.labels[n] for n in ("turn", "walk")},
            "episodes": batch.episodes,
        }
        times = reading.times
        got |= {"told_turn": batch.turn[:, times], "told_walk": batch.walk[:, times]}
        got["flow"] = metrics.horizontal_flow(px[:, times - 1], px[:, times]).float()
        got["still"] = ((batch.turn == 1) & (batch.walk == 1))[:, 1 : seen.shape[1]]
        if sum(x.shape[0] for x in self.parts.get("shown", [])) < SHOWN:
            got["shown"] = torch.from_numpy(to_uint8(px[:SHOWN]))
        for name, value in got.items():
            self.parts.setdefault(name, []).append(value)

    def all(self, name: str) -> Tensor:
        return torch.cat(self.parts[name])

    def mean(self, name: str) -> float:
        return float(self.all(name).double().mean())

    def features(self, half: int | None = None) -> Tensor:
        """Features [N, D] of all clips, or of those from even (0) or odd (1) episodes."""
        x = self.all("features")
        return (x if half is None else x[self.all("episodes") % 2 == half]).flatten(0, 1)

    def following(self, roll: int = 0) -> dict[str, float]:
        """Balanced accuracy of the actions that the probe reads; `roll` compares with those of other clips (chance)."""
        scores = {
            name: metrics.balanced_accuracy(self.all(name), self.all(f"told_{name}").roll(roll, 0), len(classes))
            for name, classes in (("turn", TURNS), ("walk", WALKS))
        }
        return {"both": sum(scores.values()) / 2, **scores}


def figures(row: Tally, real: Tally, fps: float) -> dict[str, Any]:
    """The measures of one row against real video."""
    halves = [metrics.frechet(row.features(a), real.features(1 - a)) for a in (0, 1)]
    follow = row.following()
    turning = row.all("told_turn") != 1
    commanded = 1 - row.all("told_turn")[turning]  # a left turn moves the picture to the right
    still = row.all("still")
    out: dict[str, Any] = {
        "frechet": metrics.frechet(row.features(), real.features()),
        "frechet_other_half": sum(halves) / 2,
        "action_following": follow["both"],
        "turn_following": follow["turn"],
        "walk_following": follow["walk"],
        "action_chance": row.following(max(1, len(row.all("turn")) // 2))["both"],
        "turn_flow_agrees": float((row.all("flow")[turning].sign() == commanded).double().mean()),
        "idle_motion": float(row.all("motion")[still].double().mean()),
    }
    out |= {f"{name}_ratio": metrics.ratio(row.mean(name), real.mean(name)) for name in (*CURVES, "flicker")}
    if row is real:
        out["frechet"] = out["frechet_other_half"]
    else:
        out["psnr"] = float(metrics.decibels(row.all("error").double().mean()))
        out["psnr_by_horizon"] = psnr_by_horizon(row, fps)
    return out


def psnr_by_horizon(row: Tally, fps: float) -> dict[str, float]:
    """dB against the true future that the recorded actions led to, of the squared error averaged over clips."""
    error = row.all("error").double().mean(0)
    ends = {f"{h:g}": round(h * fps) for h in HORIZONS}
    return {name: float(metrics.decibels(error[t])) for name, t in ends.items() if t < len(error)}


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
        joined = px if self.tail is None else torch.cat((self.tail, px), dim=1)
        fresh = px if self.tail is not None else px[:, 1:]
        for name, curve in PICTURE_CURVES.items() if fresh.shape[1] else ():
            self.curves[name].append(curve(fresh))
        self.curves["motion"].append(metrics.motion(joined[:, -(fresh.shape[1] + 1) :]))
        wanted = [t - self.seen for t in range(self.seen, self.seen + px.shape[1]) if t % self.window == 0]
        self.pictures.append(torch.from_numpy(to_uint8(px[:SHOWN, wanted])))
        self.tail, self.seen = joined[:, -self.keep :].clone(), self.seen + px.shape[1]

    def curve(self, name: str) -> Tensor:
        return torch.cat(self.curves[name], dim=1)


def curve_drifts(row: StreamTally, real: StreamTally) -> dict[str, Any]:
    """Each curve's last window against its first, and (`late`) against that of real streams."""
    n = row.window
    out: dict[str, Any] = {f"{name}_drift": metrics.drift(row.curve(name), n) for name in CURVES}
    out["late"] = {
        f"{name}_ratio": metrics.ratio(float(row.curve(name)[:, -n:].mean()), float(real.curve(name)[:, -n:].mean()))
        for name in CURVES
    }
    return out


def drifts(
    row: StreamTally, real: StreamTally, turn: Tensor, walk: Tensor, probe: Probe, stride: int
) -> dict[str, Any]:
    """The last window of the streams against their first one, and against real streams in the same window (`late`).

    turn, walk: the classes [S, T] of the actions along the streams.
    """
    out = curve_drifts(row, real)
    assert row.tail is not None
    reading = read(probe, row.tail, stride)
    times = reading.times + row.seen - row.tail.shape[1]
    scores = [
        metrics.balanced_accuracy(got, asked[:, times], len(classes))
        for got, asked, classes in ((reading.labels["turn"], turn, TURNS), (reading.labels["walk"], walk, WALKS))
    ]
    return {**out, "late": {**out["late"], "action_following": sum(scores) / 2}}
