"""The memory benchmark: look away or walk off, come back, and compare what is there with what was there.

Scripted paths in held-out worlds are played in the real engine, so the true pictures of the revisit exist. Students are
told the same actions and start from the same picture. Paths that need no memory do not count.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

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
from vidistill.conditioning.condition import ACTION_SITE
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.data.types import Episode
from vidistill.diffusion import derived_seed
from vidistill.evaluation import report
from vidistill.evaluation.probes import Probe, load_probe, read
from vidistill.evaluation.quality import EvalConfig, check, episodes_at, student_chunks, walk_condition
from vidistill.io import contact_sheet, save_png, to_float, to_uint8
from vidistill.memory.policies import stream_memory
from vidistill.ops.precision import working_dtype
from vidistill.worlds.doom.maps import FRAME_TEXTURE, centre_texture
from vidistill.worlds.doom.recorder import ACTIONS, DoomConfig, replay, seeds

ROWS = ("student", "window", "full", "repeat_last", "real")
FIRST_SEED = 96  # held-out seeds after those of clips and long walks


@dataclass(frozen=True)
class SpatialMemoryConfig:
    """`seconds` away from the start view, `paths` that count for each; frames stand still for `lead` before leaving and
    `hold` after coming back, of which the last `judged` are compared.

    A path counts if the walker really comes back, the wall in the centre is within `near` (map units / 64) and has a
    picture, and the last view away from it neither shows the same picture nor resembles it by `floor_psnr` dB.
    """

    seconds: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    paths: int = 24
    batch: int = 8
    lead: int = 8
    hold: int = 12
    judged: int = 6
    near: float = 6.0
    floor_psnr: float = 18.0
    seed: int = 0
    tries: int = 8  # worlds tried for each path that counts, at most
    data: str = "data/doom-heldout"
    out: str = "out/eval"
    probe: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) <= 0 or min(self.paths, self.batch, self.judged, self.tries) < 1:
            raise ValueError("revisit needs seconds, paths, batch, judged and tries above 0")
        if self.judged + 2 > self.hold or self.lead < 1:
            raise ValueError(f"revisit.hold {self.hold} must be judged {self.judged} + 2 or more, and lead at least 1")


# --- paths ------------------------------------------------------------------------------------------------------------

LEFT, RIGHT, FORWARD = (ACTIONS.index(name) for name in ("turn_left", "turn_right", "forward"))


def look_away(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray:
    """Actions [frames, 4]: turn away by up to 145 degrees, look around there, turn back."""
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    turn = min(round(145 / doom.turn_degrees), (frames - 1) // 2)
    back = LEFT + RIGHT - side
    out[:turn, side] = out[frames - turn :, back] = 1
    for start in range(turn + 4, frames - turn - 12, 16):  # a little to one side and to the other, net nothing
        out[start : start + 4, back], out[start + 6 : start + 10, side] = 1, 1
    return out


def full_turn(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray | None:
    """Actions of one turn all the way around, in eight parts with rests between; None where there is too little time.

    Slower turns would not do: the engine rounds angles, and the walker would not come back.
    """
    part = round(360 / doom.turn_degrees / 8)
    if frames < 8 * part:
        return None
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    for k in range(8):
        start = k * frames // 8
        out[start : start + part, side] = 1
    return out


def walk_out(frames: int, side: int, doom: DoomConfig, reach: float) -> np.ndarray | None:
    """Actions that turn around, walk off for `reach` of the time left (at most FARTHEST frames), turn and walk back."""
    half = round(180 / doom.turn_degrees)
    steps = int(reach * min(FARTHEST, (frames - 2 * half) / 2))
    if steps < 4:
        return None
    out = np.zeros((frames, len(ACTIONS)), np.float32)
    out[:half, side] = out[half + steps : 2 * half + steps, side] = 1
    out[half : half + steps, FORWARD] = out[2 * half + steps : 2 * (half + steps), FORWARD] = 1
    return np.roll(out, (frames - 2 * (half + steps)) // 2, axis=0)


FARTHEST = 40  # px frames of walking out: about 6 map units / 64, more than most rooms have
KINDS = {"look": look_away, "turn": full_turn, "walk": walk_out}


@dataclass(frozen=True)
class Revisit:
    """A path that counts: its kind, what the engine showed, the true wall picture, and the frames that are compared."""

    kind: str
    walk: Episode
    label: int
    away: int  # frame of the last view that is not the revisited one
    judged: range


def returns(poses: np.ndarray, first: int, last: int) -> bool:
    """Whether frame `last` is seen from where frame `first` was."""
    gone = np.linalg.norm(poses[last, :2] - poses[first, :2])
    turned = (poses[last, 2] - poses[first, 2] + np.pi) % (2 * np.pi) - np.pi
    return bool(gone < 0.05 and abs(turned) < math.radians(1.0))


def frames_of(cfg: SpatialMemoryConfig, seconds: float, doom: DoomConfig, chunked: int) -> tuple[int, int]:
    """(frames on the way, frames in all): whole multiples of `chunked` after the first."""
    away = round(seconds * doom.fps)
    least = cfg.lead + away + cfg.hold
    return away, 1 + -(-(least - 1) // chunked) * chunked


def make_path(
    cfg: SpatialMemoryConfig, doom: DoomConfig, kind: str, seconds: float, seed: int, chunked: int
) -> Revisit | None:
    """The path of a kind in the world of a seed, or None if it does not count there."""
    away, total = frames_of(cfg, seconds, doom, chunked)
    rng = np.random.default_rng([cfg.seed, seed])
    side = (LEFT, RIGHT)[int(rng.integers(2))]
    for reach in (1.0, 0.5, 0.25):
        script = KINDS[kind](away, side, doom, reach)
        if script is None:
            return None
        actions = np.zeros((total, len(ACTIONS)), np.float32)
        actions[cfg.lead : cfg.lead + away] = script
        walk = replay(doom, seed, actions)
        end = cfg.lead + away
        if returns(walk.poses, 0, end):
            break
        if kind != "walk":
            return None
    else:
        return None
    judged = range(end + cfg.hold - cfg.judged - 1, end + cfg.hold - 1)
    return counted(cfg, kind, walk, judged, cfg.lead + away // 2)


def counted(cfg: SpatialMemoryConfig, kind: str, walk: Episode, judged: range, away: int) -> Revisit | None:
    """The path, if only memory can say what its revisit shows."""
    label, distance = centre_texture(walk.walls, walk.poses[0])
    other, _ = centre_texture(walk.walls, walk.poses[away])
    if label in (-1, FRAME_TEXTURE, other) or distance > cfg.near:
        return None
    still, back = (to_float(walk.frames[t]) for t in (away, judged[0]))
    if float(metrics.psnr(still, back)) >= cfg.floor_psnr:
        return None
    return Revisit(kind, walk, label, away, judged)


def paths_of(cfg: SpatialMemoryConfig, doom: DoomConfig, seconds: float, chunked: int) -> list[Revisit]:
    """`cfg.paths` paths that count, kinds in turn, each in a world of its own."""
    found: list[Revisit] = []
    worlds = iter(seeds("held_out", FIRST_SEED + cfg.paths * cfg.tries)[FIRST_SEED:])
    kinds = [k for k in KINDS if KINDS[k](round(seconds * doom.fps), LEFT, doom, 1.0) is not None]
    with tqdm(total=cfg.paths, desc=f"paths of {seconds:g} s", unit="path") as bar:
        for seed in worlds:
            path = make_path(cfg, doom, kinds[len(found) % len(kinds)], seconds, seed, chunked)
            if path is not None:
                found.append(path)
                bar.update()
            if len(found) == cfg.paths:
                return found
    if not found:
        raise ValueError(f"no path of {seconds:g} s counts in {cfg.paths * cfg.tries} worlds; raise revisit.tries")
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def dream(bundle: Bundle, codec: Codec, paths: Sequence[Revisit], cfg: SpatialMemoryConfig) -> Tensor:
    """The student's pictures [B, T, 3, H, W] along some paths of one length."""
    net, quality = bundle.net, EvalConfig(precision=cfg.precision)
    px = to_float(np.stack([p.walk.frames[:1] for p in paths]))
    given, total = codec.encode(px), len(paths[0].walk.frames)
    actions = torch.from_numpy(np.stack([p.walk.actions for p in paths]))
    poses = torch.from_numpy(np.stack([p.walk.poses for p in paths]))
    cond = walk_condition(bundle, actions, poses, codec.temporal_factor)
    frames = cond.per_frame[ACTION_SITE].shape[1]
    memory = net.new_memory(
        len(paths), dtype=working_dtype(cfg.precision), cfg=stream_memory(net.cfg.memory, net.cfg.chunk)
    )
    state, parts = None, []
    seed = derived_seed(cfg.seed, paths[0].walk.seed)
    for chunk in student_chunks(bundle, given, cond, net.num_chunks(frames), quality, seed, memory):
        part, state = codec.decode_stream(chunk, state)
        parts.append(part)
    return torch.cat(parts, dim=1)[:, :total]


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
    check(student)
    codec = checkpoint.load_codec(student)
    probe = load_probe(cfg.probe)
    recorded = episodes_at(Path(cfg.data) / "frames", (64, 321), (1, 8))
    reader = PoseReader(probe, recorded)
    tallies = {row: RevisitTally(probe, reader) for row in (*bundles, "repeat_last", "real")}
    chunked, count = codec.temporal_factor * student.net.cfg.chunk, {}
    shown: dict[str, tuple[Revisit, dict[str, Tensor]]] = {}
    for seconds in cfg.seconds:
        paths = paths_of(cfg, doom, seconds, chunked)
        count[f"{seconds:g}"] = {kind: sum(p.kind == kind for p in paths) for kind in KINDS}
        for batch in batches(paths, cfg.batch):
            rows = {row: dream(bundle, codec, batch, cfg) for row, bundle in bundles.items()}
            rows["repeat_last"] = torch.stack([held(p, p.away) for p in batch])
            rows["real"] = torch.stack([returned(p) for p in batch])
            for row, px in rows.items():
                tallies[row].add(f"{seconds:g}", px, batch)
            shown.setdefault(f"{seconds:g}", (batch[0], {row: px[0] for row, px in rows.items()}))
    result: dict[str, Any] = {row: tallies[row].figures() if row in tallies else None for row in ROWS}
    for row, bundle in bundles.items():
        result[row] |= {"name": bundle.name, **memory_of(bundle)}
    result |= {key: result["student"][key] for key in ("rpe_trans", "rpe_rot")}
    camera = student.record["world"].get("camera")
    result["pose_error"] = pose_error(recorded, build(CameraConfig, camera), codec.temporal_factor) if camera else None
    result["protocol"] = {**asdict(cfg), "counted": count, "texture_chance": 1 / probe.cfg.textures}
    plain: dict[str, Any] = report.plain(result)
    if cfg.out:
        write(Path(cfg.out) / f"{student.name}-memory", plain, shown)
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


def write(folder: Path, result: Mapping[str, Any], shown: Mapping[str, tuple[Revisit, Mapping[str, Tensor]]]) -> None:
    """memory.json, a plot of both measures by time away, and a contact sheet of one path for each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(result, indent=1) + "\n")

    def draw(figure: Any) -> None:
        for axes, measure in zip(figure.subplots(1, 2), ("revisit_psnr", "revisit_texture_acc"), strict=True):
            for row in ROWS[:4]:
                if result[row] is not None:
                    points = result[row][measure]
                    axes.plot([float(t) for t in points], list(points.values()), marker="o", label=row)
            axes.set(xlabel="seconds away", ylabel=measure.replace("_", " "))
        axes.legend()

    report.figure(draw, folder / "memory.png", 9.0)
    for key, (path, rows) in shown.items():
        clips = {"real": to_float(path.walk.frames), **{n: px for n, px in rows.items() if n in ROWS[:3]}}
        every = max(1, len(path.walk.frames) // 14)
        pictures = [to_uint8(px[: path.judged.stop]) for px in clips.values()]
        save_png(folder / f"away-{key}s.png", contact_sheet(pictures, every=every, labels=list(clips)))
