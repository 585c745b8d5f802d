"""The memory benchmark: look away or walk off, come back, and compare what is there with what was there.

Students are told the same actions as the real engine, and start from the same picture, on the paths of
`worlds.doom.paths`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
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
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import Batch, Data, Row, Tally, View
from vidistill.evaluation.probes import Probe, Reading, load_probe, read
from vidistill.evaluation.quality import walk_along, walk_condition
from vidistill.evaluation.report import Metric
from vidistill.evaluation.rooms import Rooms
from vidistill.evaluation.suite import Judgement, Suite
from vidistill.io import to_float
from vidistill.memory.policies import stream_memory
from vidistill.ops.precision import PRECISIONS
from vidistill.worlds.doom.paths import FIRST_ROOM, KINDS, PathConfig, Revisit, paths_of
from vidistill.worlds.doom.recorder import ACTIONS

BASELINES = ("window", "full")  # the same student with another memory: NAME-window, NAME-full


@dataclass(frozen=True)
class SpatialMemoryConfig(PathConfig):
    """The paths, and how they are played."""

    batch: int = 8
    first_seed: int = 0  # the first room of the split
    seeds: int = 3  # of rollout noise
    teacher_seeds: int = 1
    draws: int = 200  # of rooms, for an interval
    data: str = "data/doom-{split}"
    out: str = "out/eval"
    probe: str | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1 or self.precision not in PRECISIONS:
            raise ValueError(f"revisit needs a batch above 0 and a precision of {PRECISIONS}; got {self}")


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


# --- paths and rows ---------------------------------------------------------------------------------------------------


def recorded(rooms: Rooms, cfg: SpatialMemoryConfig) -> Clips:
    """Walks of validation that motion is read from."""
    return Rooms(rooms.source, rooms.world).episodes(cfg.data, "frames", (64, 321), (1, 8))


def revisits(bundle: Bundle, codec: Codec, rooms: Rooms, cfg: SpatialMemoryConfig) -> Data:
    """Batches of paths of one length. Their clips are what perfect memory of the start shows: the view from before the
    walk in place of the revisit; fact "true" is what the engine showed."""
    engine, probe = rooms.world.config(), load_probe(cfg.probe, rooms.world.probe)
    chunked, batches = codec.temporal_factor * bundle.net.cfg.chunk, []
    for seconds in cfg.seconds:
        paths = paths_of(cfg, engine, seconds, chunked, rooms.seeds(FIRST_ROOM, cfg.paths * cfg.tries))
        parts = [paths[i : i + cfg.batch] for i in range(0, len(paths), cfg.batch)]
        batches += [batch_of(part, seconds, int(part is parts[0]), cfg.seed) for part in parts]
    return Data(batches, engine.fps, probe, {}, reader=PoseReader(probe, recorded(rooms, cfg)))


def batch_of(paths: Sequence[Revisit], seconds: float, shown: int, seed: int) -> Batch:
    walks, judged = [path.walk for path in paths], paths[0].judged
    frames, actions, poses = (np.stack([getattr(w, name) for w in walks]) for name in ("frames", "actions", "poses"))
    true = to_float(frames)
    px = true.clone()
    px[:, judged.start - 2 : judged.stop + 1] = px[:, :1]
    rows = {"label": [p.label for p in paths], "away": [p.away for p in paths], "kind": [*map(kind_of, paths)]}
    facts = {"true": true, "actions": torch.from_numpy(actions), "poses": torch.from_numpy(poses)}
    facts |= {name: torch.tensor(row) for name, row in rows.items()}
    facts |= {"seconds": torch.full((len(paths),), seconds), "judged": torch.tensor([[judged.start, judged.stop]])}
    rooms = torch.tensor([w.seed for w in walks])
    condition = partial(walk_condition, facts["actions"], facts["poses"])
    return Batch(px, condition, derived_seed(seed, walks[0].seed), facts=facts, shown=shown, rooms=rooms)


def kind_of(path: Revisit) -> int:
    return list(KINDS).index(path.kind)


def played(bundle: Bundle, codec: Codec, cfg: SpatialMemoryConfig) -> Row:
    """The student's streams along the paths, at constant memory."""

    def row(batch: Batch) -> Tensor:
        told, total = (batch.facts["actions"], batch.facts["poses"]), batch.px.shape[1]
        made = walk_along(bundle, codec, batch.px[:, :1], *told, total, batch.seed, cfg.precision)
        return torch.cat(list(made), dim=1)[:, :total]

    return row


def repeat_last(batch: Batch) -> Tensor:
    """The last view that is not the revisited one, for ever."""
    own = batch.facts["true"][torch.arange(len(batch.px)), batch.facts["away"]]
    return own[:, None].expand_as(batch.px)


def contenders(student: Bundle, named: Mapping[str, str | None]) -> dict[str, Bundle]:
    """The baselines of a student: those named, else NAME-window and NAME-full where they exist."""
    found = {}
    for row in BASELINES:
        own = f"{student.name}-{row}"
        own = own if own in checkpoint.zoo_names() else str(student.folder / own)
        if named.get(row) or checkpoint.find_checkpoint(own) or own in checkpoint.zoo_names():
            found[row] = checkpoint.load(named.get(row) or own, "student")
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def judged_frames(view: View, px: Tensor, beyond: int = 0) -> Tensor:
    """The frames of a clip that are compared, and what the probe needs around them."""
    start, stop = view.batch.facts["judged"][0].tolist()
    return px[:, start - 2 * beyond : stop + beyond]


def readings(view: View) -> tuple[Reading, Reading]:
    """What the probe sees of the judged frames of a row, and of the true ones."""
    assert view.data.probe is not None
    shown, true = (judged_frames(view, px, 1) for px in (view.px, view.batch.facts["true"]))
    return read(view.data.probe, shown), read(view.data.probe, true)


def recognised(view: View) -> Tensor:
    """Whether most judged frames [B] show the wall picture that was there."""
    labels = readings(view)[0].labels["texture"]
    return (F.one_hot(labels).sum(1).argmax(-1) == view.batch.facts["label"]).double()


def distance(view: View) -> Tensor:
    shown, true = readings(view)
    return (shown.features - true.features).norm(dim=-1).mean(1)


def error(view: View) -> Tensor:
    return metrics.mse(judged_frames(view, view.px), judged_frames(view, view.batch.facts["true"])).mean(1)


def by_seconds(name: str, of: Callable[[Tensor], float] = float) -> Callable[[Tally, Tally], dict[str, float]]:
    """The mean of a part for every time away."""

    def figure(row: Tally, real: Tally) -> dict[str, float]:
        values, away = row[name].double(), row["seconds"]
        return {f"{float(s):g}": of(values[away == s].mean()) for s in away.unique()}

    return figure


METRICS = {
    "revisit_psnr": Metric(
        "PSNR of the revisited view in dB, by seconds away",
        by_seconds("error", lambda x: float(metrics.decibels(x))),
        {"error": error, "seconds": lambda v: v.batch.facts["seconds"]},
        best="high",
    ),
    "revisit_texture_acc": Metric(
        "share of wall pictures recognised", by_seconds("texture"), {"texture": recognised}, best="high"
    ),
    "revisit_feature_distance": Metric(
        "distance of probe features", by_seconds("distance"), {"distance": distance}, best="low"
    ),
    "rpe_trans": Metric(
        "error of the motion that is read back, in map units / 64 a frame",
        lambda row, _: row.mean("rpe_trans"),
        {"rpe_trans": lambda v: v.data.reader.error(v.px, v.batch.facts["poses"])[0].mean(1)},
        best="low",
    ),
    "rpe_rot": Metric(
        "the same of turns, in degrees a frame",
        lambda row, _: row.mean("rpe_rot"),
        {"rpe_rot": lambda v: v.data.reader.error(v.px, v.batch.facts["poses"])[1].mean(1)},
        best="low",
    ),
}


def details(judged: Judgement) -> None:
    """What the memories cost, how exact poses are, and how many paths of each kind counted."""
    result, student, cfg = judged.result, judged.bundles["student"], judged.cfg
    for row, bundle in judged.bundles.items():
        result[row] |= memory_of(bundle)
    result |= {row: None for row in BASELINES if row not in result}
    result |= {key: result["student"][key] for key in ("rpe_trans", "rpe_rot")}
    camera, factor = student.record["world"].get("camera"), judged.codec.temporal_factor
    walks = recorded(judged.rooms, cfg)
    result["pose_error"] = pose_error(walks, build(CameraConfig, camera), factor) if camera else None
    counted: dict[str, dict[str, int]] = {f"{s:g}": dict.fromkeys(KINDS, 0) for s in cfg.seconds}
    for batch in judged.data.batches:
        for kind in batch.facts["kind"]:
            counted[f"{float(batch.facts['seconds'][0]):g}"][list(KINDS)[int(kind)]] += 1
    assert judged.data.probe is not None
    judged.protocol |= {"counted": counted, "texture_chance": 1 / judged.data.probe.cfg.textures}


def memory_of(bundle: Bundle) -> dict[str, int]:
    """Tokens and bytes that a stream of a student remembers."""
    net = bundle.net
    memory = net.new_memory(1, cfg=stream_memory(net.cfg.memory, net.cfg.chunk))
    return {"memory_tokens": memory.tokens, "memory_bytes": memory.memory_bytes}


SUITE = Suite(
    "memory",
    SpatialMemoryConfig,
    revisits,
    METRICS,
    lambda result: [],
    details,
    rows={"repeat_last": lambda codec: repeat_last},
    student=played,
    others=contenders,
    quick={"paths": 12, "seconds": (5.0,), "seeds": 1, "draws": 100},
)
