"""The memory benchmark: look away or walk off, come back, and compare what is there with what was there.

Students are told the same actions as the real engine, and start from the same picture, on the paths of
`worlds.doom.paths`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vidistill import checkpoint, metrics
from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.camera import (
    CameraConfig,
    Pose,
    integrate,
    latent_rate,
    moves,
    planar,
    relative,
    signed,
    wanted,
)
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.evaluation import report
from vidistill.evaluation.probes import Probe, load_probe, read
from vidistill.evaluation.quality import episodes_at, walk_along
from vidistill.evaluation.report import Sheet
from vidistill.evaluation.suite import world_of
from vidistill.io import to_float, to_uint8
from vidistill.memory.policies import stream_memory
from vidistill.ops.precision import PRECISIONS
from vidistill.worlds.doom.paths import KINDS, PathConfig, Revisit, paths_of
from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig

ROWS = ("student", "window", "full", "repeat_last", "real")
MEASURES = ("revisit_psnr", "revisit_texture_acc")


@dataclass(frozen=True)
class SpatialMemoryConfig(PathConfig):
    """The paths, and how they are played."""

    batch: int = 8
    data: str = "data/doom-heldout"
    out: str = "out/eval"
    probe: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1 or self.precision not in PRECISIONS:
            raise ValueError(f"revisit needs a batch above 0 and a precision of {PRECISIONS}; got {self}")


@torch.inference_mode()
def played(bundle: Bundle, codec: Codec, paths: Sequence[Revisit], cfg: SpatialMemoryConfig) -> Tensor:
    """The student's pictures [B, T, 3, H, W] along some paths of one length."""
    walks = [path.walk for path in paths]
    frames, actions, poses = (np.stack([getattr(w, name) for w in walks]) for name in ("frames", "actions", "poses"))
    px, told, total = to_float(frames[:, :1]), (torch.from_numpy(actions), torch.from_numpy(poses)), frames.shape[1]
    return torch.cat(list(walk_along(bundle, codec, px, *told, total, cfg, walks[0].seed)), dim=1)[:, :total]


class PoseReader:
    """Reads camera motion from pictures: ridge regression from a probe's features, fitted on real video.

    Motion is (forward, left, turn to the left) a px frame, in map units / 64 and radians.
    """

    def __init__(self, probe: Probe, clips: Clips, episodes: int = 24, ridge: float = 1e-2) -> None:
        self.probe = probe
        frames, poses = clips.tensors["frames"][:episodes], clips.tensors["poses"][:episodes]
        xs, ys = [], []
        for px, path in zip(frames, poses, strict=True):
            reading = read(probe, to_float(px.numpy())[None], 2)
            xs.append(self.inputs(reading.features[0]))
            ys.append(planar_motion(path)[reading.times])
        x, y = torch.cat(xs).double(), torch.cat(ys)
        self.weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    @staticmethod
    def inputs(features: Tensor) -> Tensor:
        """Features, what a rectifier makes of them, and a constant."""
        return torch.cat((features, F.relu(features), F.relu(-features), torch.ones_like(features[..., :1])), -1)

    def error(self, px: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
        """(distance, angle in degrees) [B, n] between read and true motion a frame of clips px [B, T, 3, H, W]."""
        reading = read(self.probe, px, 4)
        got = self.inputs(reading.features).double() @ self.weights
        wrong = got - planar_motion(poses)[:, reading.times]
        return wrong[..., :2].norm(dim=-1), wrong[..., 2].abs().rad2deg()


def planar_motion(poses: Tensor) -> Tensor:
    """Forward, left and turn [..., T, 3] from poses [..., T, 3]."""
    return moves(planar(poses))[..., [0, 1, 3]]


def pose_error(recorded: Clips, camera: CameraConfig, factor: int) -> dict[str, float]:
    """How far integrated poses are from the engine's at the end of recorded walks, means in map units / 64.

    `told`: from the relative actions of latents of `factor` px frames, as a network is told them. `keys`: from what the
    keys ask for, as in a stream, which knows no walls. `seconds`: how long the walks are.
    """
    actions, true = recorded.tensors["actions"], planar(recorded.tensors["poses"])
    frames = (actions.shape[1] - 1) // factor * factor
    start, end = Pose(true.position[:, :1], true.rotation[:, :1]), true.position[:, frames]
    at_latents, _ = latent_rate(moves(true)[:, 1 : 1 + frames], factor, start)
    paths = {
        "told": signed(relative(at_latents, camera, factor), camera, factor),
        "keys": wanted(actions[:, 1 : 1 + frames], ACTIONS, camera),
    }
    off = {name: float((integrate(m, start).position[:, -1] - end).norm(dim=-1).mean()) for name, m in paths.items()}
    return {"seconds": frames / recorded.meta["fps"], **off}


class RevisitTally:
    """What one row showed at the revisits."""

    def __init__(self, probe: Probe, reader: PoseReader | None) -> None:
        self.probe, self.reader = probe, reader
        self.parts: dict[str, dict[str, list[float]]] = {}
        self.rpe: dict[str, list[float]] = {"rpe_trans": [], "rpe_rot": []}

    def add(self, key: str, px: Tensor, paths: Sequence[Revisit]) -> None:
        """Compare clips px [B, T, 3, H, W] with the true pictures of the paths."""
        into = self.parts.setdefault(key, {"error": [], "right": [], "features": []})
        for clip, path in zip(px, paths, strict=True):
            lo, hi = path.judged.start, path.judged.stop
            true = to_float(path.walk.frames[lo - 2 : hi + 1])
            shown = clip[lo - 2 : hi + 1]
            into["error"].append(float(metrics.mse(shown[2:-1], true[2:-1]).mean()))
            readings = [read(self.probe, x[None]) for x in (shown, true)]
            votes = torch.bincount(readings[0].labels["texture"][0], minlength=self.probe.cfg.textures)
            into["right"].append(float(int(votes.argmax()) == path.label))
            into["features"].append(float((readings[0].features - readings[1].features).norm(dim=-1).mean()))
            if self.reader is not None:
                poses = torch.from_numpy(path.walk.poses)[None]
                for name, error in zip(self.rpe, self.reader.error(clip[None], poses), strict=True):
                    self.rpe[name].append(float(error.mean()))

    def figures(self) -> dict[str, Any]:
        """Revisit PSNR (of the mean squared error), share of wall pictures recognised, feature distance, by seconds."""

        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        out: dict[str, Any] = {
            "revisit_psnr": {k: float(metrics.decibels(torch.tensor(mean(v["error"])))) for k, v in self.parts.items()},
            "revisit_texture_acc": {k: mean(v["right"]) for k, v in self.parts.items()},
            "revisit_feature_distance": {k: mean(v["features"]) for k, v in self.parts.items()},
        }
        return out | {name: mean(values) for name, values in self.rpe.items() if values}


def held(path: Revisit, frame: int) -> Tensor:
    """A clip [T, 3, H, W] that shows one frame of a path for ever."""
    return to_float(path.walk.frames[frame])[None].expand(len(path.walk.frames), -1, -1, -1)


def returned(path: Revisit) -> Tensor:
    """The true clip [T, 3, H, W], with the view from before the walk in place of the revisit."""
    px = to_float(path.walk.frames)
    px[path.judged.start - 2 : path.judged.stop + 1] = px[0].clone()
    return px


def contenders(name: str, window: str | None, full: str | None) -> dict[str, Bundle]:
    """The student and its baselines: those named, else NAME-window and NAME-full where they exist."""
    found = {"student": checkpoint.load(name, "student")}
    for row, given in (("window", window), ("full", full)):
        own = f"{name}-{row}"
        if given or checkpoint.find_checkpoint(own) or own in checkpoint.zoo_names():
            found[row] = checkpoint.load(given or own, "student")
    return found


def memory_of(bundle: Bundle) -> dict[str, int]:
    """Tokens and bytes that a stream of a student remembers."""
    net = bundle.net
    memory = net.new_memory(1, cfg=stream_memory(net.cfg.memory, net.cfg.chunk))
    return {"memory_tokens": memory.tokens, "memory_bytes": memory.memory_bytes}


def evaluate_memory(
    name: str,
    cfg: SpatialMemoryConfig = SpatialMemoryConfig(),
    *,
    window: str | None = None,
    full: str | None = None,
    doom: DoomConfig | None = None,
) -> dict[str, Any]:
    """Revisit figures of a student, its baselines, the repeated last view and real video; a report into `cfg.out`."""
    doom = doom or DoomConfig()
    bundles = contenders(name, window, full)
    student = bundles["student"]
    worlds = {row: world_of(bundle.name, bundle.record) for row, bundle in bundles.items()}
    if other := [bundles[row].name for row, (source, _) in worlds.items() if source != "doom"]:
        raise ValueError(f"{', '.join(other)} did not learn from doom, whose paths the suite memory plays")
    codec, probe = checkpoint.load_codec(student), load_probe(cfg.probe)
    recorded = episodes_at(worlds["student"][1], Path(cfg.data) / "frames", (64, 321), (1, 8))
    reader = PoseReader(probe, recorded)
    tallies = {row: RevisitTally(probe, reader) for row in (*bundles, "repeat_last", "real")}
    chunked, count = codec.temporal_factor * student.net.cfg.chunk, {}
    sheets: dict[str, Sheet] = {}
    for seconds in cfg.seconds:
        paths = paths_of(cfg, doom, seconds, chunked)
        count[f"{seconds:g}"] = {kind: sum(p.kind == kind for p in paths) for kind in KINDS}
        for batch in batches(paths, cfg.batch):
            rows = {row: played(bundle, codec, batch, cfg) for row, bundle in bundles.items()}
            rows["repeat_last"] = torch.stack([held(p, p.away) for p in batch])
            rows["real"] = torch.stack([returned(p) for p in batch])
            for row, px in rows.items():
                tallies[row].add(f"{seconds:g}", px, batch)
            sheets.setdefault(f"{seconds:g}", sheet_of(f"away-{seconds:g}s", batch[0], rows))
    result: dict[str, Any] = {row: tallies[row].figures() if row in tallies else None for row in ROWS}
    for row, bundle in bundles.items():
        result[row] |= {"name": bundle.name, **memory_of(bundle)}
    result |= {key: result["student"][key] for key in ("rpe_trans", "rpe_rot")}
    camera = student.record["world"].get("camera")
    result["pose_error"] = pose_error(recorded, build(CameraConfig, camera), codec.temporal_factor) if camera else None
    result["protocol"] = {**asdict(cfg), "counted": count, "texture_chance": 1 / probe.cfg.textures}
    plain: dict[str, Any] = report.plain(result)
    if cfg.out:
        write(Path(cfg.out) / f"{student.name}-memory", plain, list(sheets.values()))
    return plain


def batches(paths: Sequence[Revisit], size: int) -> Iterator[Sequence[Revisit]]:
    return (paths[i : i + size] for i in range(0, len(paths), size))


# --- what people see --------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> Table:
    """The figures, one line a row, one column a time away."""
    out = Table(title="what comes back: PSNR in dB / share of wall pictures recognised")
    times = list(result["real"]["revisit_psnr"])
    for head in ("row", *(f"{t} s away" for t in times), "tokens", "bytes"):
        out.add_column(head, justify="left" if head == "row" else "right")
    for row in ROWS:
        r = result[row]
        if r is not None:
            cells = [f"{r['revisit_psnr'][t]:.1f} / {r['revisit_texture_acc'][t]:.2f}" for t in times]
            out.add_row(row, *cells, str(r.get("memory_tokens", "-")), str(r.get("memory_bytes", "-")))
    return out


def sheet_of(name: str, path: Revisit, rows: Mapping[str, Tensor]) -> Sheet:
    """The first path of some as the engine and the students show it."""
    clips = {"real": to_float(path.walk.frames), **{row: px[0] for row, px in rows.items() if row in ROWS[:3]}}
    pictures = [to_uint8(px[: path.judged.stop]) for px in clips.values()]
    return Sheet(name, pictures, list(clips), "", max(1, len(path.walk.frames) // 14))


def write(folder: Path, result: Mapping[str, Any], sheets: Sequence[Sheet]) -> None:
    """memory.json, a plot of both measures by time away, and a contact sheet of one path for each."""
    report.save(folder, "memory.json", result)
    rows = {row: result[row] for row in ROWS[:4] if result[row] is not None}
    panels = {
        measure: {name: ([float(t) for t in row[measure]], list(row[measure].values())) for name, row in rows.items()}
        for measure in MEASURES
    }
    report.plot(folder / "memory.png", panels, "")
    report.save_sheets(folder, sheets)


def run(name: str, window: str | None = None, full: str | None = None, **settings: Any) -> dict[str, Any]:
    """Judge what a student remembers; the table goes to stderr."""
    report.check_plots()
    result = evaluate_memory(name, SpatialMemoryConfig(**settings), window=window, full=full)
    Console(stderr=True).print(table(result))
    return result
