"""The stages of a project: configs sized for a world, each number with the reason for it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vidistill import checkpoint
from vidistill.cli.world import LOOKED_AT, World
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.conditioning.condition import MOVE_SITE
from vidistill.config import build
from vidistill.data.clips import Clips
from vidistill.io import save_png
from vidistill.models.dit import VideoDiT
from vidistill.training.config import TrainConfig

MUON = "conv|^(encoder|decoder)[.][1-9][0-9]*[.]weight"
LEVELS = [1.0, 0.9375, 0.8333, 0.625]
LONG = 22  # latents of a clip: all that comes after the SHORT ones of a teacher's first steps
LONGER = 4  # clips that a stream lasts on which the last student is trained
WARM = {"codec": "doom-codec", "teacher": "doom-teacher"}  # bundled, trained longest
SIZES: Mapping[str, tuple[int, int, int]] = {"small": (160, 5, 480), "base": (224, 6, 672), "large": (320, 8, 960)}
TOKENS = 48  # of a latent frame, at most: what a laptop streams
STAGES = ("codec", "teacher", "tf", "selfforcing", "diagonal")


@dataclass(frozen=True)
class Row:
    """A line of a config: key, value, and why it is so."""

    key: str
    value: Any
    why: str = ""


@dataclass(frozen=True)
class Stage:
    """A config to be written: what it is for, the config it is based on, its lines."""

    name: str
    title: str
    rows: tuple[Row, ...]
    base: str = ""

    @property
    def values(self) -> dict[str, Any]:
        return {row.key: row.value for row in self.rows}

    def with_values(self, why: Mapping[str, str] = {}, **values: Any) -> "Stage":
        """The stage with other values, and the reasons for them."""
        rows = {row.key: row for row in self.rows}
        rows |= {key: Row(key, value, why.get(key, "")) for key, value in values.items()}
        return replace(self, rows=tuple(rows.values()))

    def text(self) -> str:
        """The YAML file."""
        lines = [f"# {line}" for line in self.title.split("\n")]
        lines += [f"base: {self.base}.yaml"] if self.base else []
        for row in self.rows:
            lines.append(f"{row.key}: {flow(row.value)}" + (f"  # {row.why}" if row.why else ""))
        return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value as YAML writes it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(inner) for inner in value) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


def merged(stages: Mapping[str, Stage], name: str) -> dict[str, Any]:
    """The values of a stage over those it is based on, mappings merged as configs are."""
    stage = stages[name]
    out = merged(stages, stage.base) if stage.base in stages else {}
    for key, value in stage.values.items():
        out[key] = {**out[key], **value} if isinstance(value, Mapping) and isinstance(out.get(key), Mapping) else value
    return out


def config(stages: Mapping[str, Stage], name: str, **changes: Any) -> TrainConfig:
    """The config that a stage's files make, with some values changed."""
    return build(TrainConfig, {**merged(stages, name), **changes})


# --- what the world asks for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What is chosen for a world beside steps: size of the networks, chunk, and where they start from."""

    size: str = "base"
    chunk: int = 3
    why_chunk: str = ""
    warm_codec: str | None = None
    warm_teacher: str | None = None
    clips: int = LONG
    extra: Mapping[str, Any] = field(default_factory=dict)


def choose(world: World, warm: bool = True) -> Choice:
    """Chunk length, clip length and warm starts of a world."""
    chunk, why = chunk_of(world)
    longest = min(LONG, world.longest)
    first = 1 if world.given else 0
    clips = first + (longest - first) // chunk * chunk
    codec = WARM["codec"] if warm and world.factor == 4 and world.spatial == 4 else None
    return Choice(
        chunk=chunk, why_chunk=why, warm_codec=codec, warm_teacher=WARM["teacher"] if codec else None, clips=clips
    )


def chunk_of(world: World) -> tuple[int, str]:
    """Latents a student makes at a time, and why: a key waits a whole chunk for its picture."""
    wait = 3 * world.factor / world.fps
    if not world.names:
        return 3, "no keys wait for it; longer chunks are steadier and cost less"
    held = "actions are held" if world.actions else "moves of the camera last"
    if world.held and world.held < 3 * world.factor:
        return 1, (
            f"{held} for {world.held:g} frames; a chunk of 3 is {3 * world.factor}, {wait:.2f} s that a key "
            f"would wait, a chunk of 1 {wait / 3:.2f} s"
        )
    return 3, f"{held} for {world.held:g} frames, as long as a chunk of 3 ({wait:.2f} s) or longer"


def patch_of(world: World) -> tuple[int, int, int]:
    """The smallest patch that gives a latent frame no more than TOKENS tokens."""
    height, width = world.latent
    known = [p for p in ((1, 1), (1, 2), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8)) if not (height % p[0] or width % p[1])]
    return (1, *next((p for p in known if height * width // (p[0] * p[1]) <= TOKENS), known[-1]))


def codec_stage(world: World, choice: Choice, data: str) -> Stage:
    """The codec: pixels to latents and back."""
    geometry: dict[str, Any] = {"patch_size": 4, "latent_channels": 16}
    geometry |= {"encoder_widths": [64, 64, 96], "decoder_widths": [96, 64, 48]}
    if world.spatial == 8:
        geometry |= {"encoder_space": [2, 1], "decoder_space": [1, 2]}
    if world.factor == 2:
        geometry |= {"encoder_time": [2, 1], "decoder_time": [1, 2]}
    frames = 1 + 2 * world.factor
    rows = [
        Row("name", "codec"),
        Row("objective", "codec"),
        Row("data", data),
        Row("frames", frames, "px frames of a clip: two latents after the first picture"),
        Row("batch", 12),
        Row("precision", "auto", "bf16 where this machine multiplies it"),
    ]
    if choice.warm_codec:
        why = f"{choice.warm_codec} without its filter, which wipes out low contrast: 2 to 3 times fewer steps"
        rows += [Row("init", "init/codec", why), Row("renormalise", True, "its latents mean other things here")]
    else:
        rows.append(
            Row("codec_config", geometry, f"a latent is {world.spatial} px a side and {world.factor} frames long")
        )
    loss = {
        "latent_noise": 0.04,
        "latent_penalty": 1e-3,
        "gradient_weight": 0.3,
        "mse_weight": 6.0,
        "temporal_weight": 1.0,
    }
    loss["moving_weight"] = 30.0
    rows += [
        Row("loss", loss, "moving_weight: small moving things are lost without it, and no mean error shows that"),
        Row("optim", {"lr": 2e-3, "muon": MUON, "warmup": 50, "decay": 0.6, "clip": 1.0, "weight_decay": 0.0}),
    ]
    return Stage("codec", "Pixels to latents and back.", tuple(rows))


def teacher_sites(world: World) -> dict[str, dict[str, Any]]:
    """The sites of per-frame conditions."""
    sites, dims = dict[str, dict[str, Any]](), world.per_frame_dims
    if world.camera is not None:
        sites[MOVE_SITE] = {"dim": world.camera.action_dim, "hidden": 128}
    if "actions" in dims:
        sites["modulation"] = {"dim": dims["actions"], "hidden": 128}
    if "audio" in dims:
        sites["hidden"] = {"dim": dims["audio"], "hidden": 64, "activation": "norm"}
    return sites


def camera_rows(world: World) -> list[Row]:
    """How the camera moves, where that is what a network is conditioned on."""
    if (camera := world.camera) is None:
        return []
    values = {"step": camera.step, "turn": camera.turn, "actions": list(camera.actions), "sites": list(camera.sites)}
    why = "a full move of a frame, in units of the poses and in radians: 95 of 100 frames stay below"
    return [Row("camera", values, why)]


def teacher_stage(world: World, choice: Choice, data: str) -> Stage:
    """The bidirectional model of clips."""
    width, layers, ffn = SIZES[choice.size]
    patch = patch_of(world)
    area = 16 * patch[1] * patch[2]
    dit: dict[str, Any] = {"channels": 16, "patch": list(patch), "width": max(width, math.ceil((area + 32) / 32) * 32)}
    grid = [world.latent[0] // patch[1], world.latent[1] // patch[2]]
    dit |= {"layers": layers, "heads": 4, "ffn": ffn, "grid": grid, "predicts": "x0"}
    if sites := teacher_sites(world):
        dit["sites"] = sites
    if world.text_dim:
        dit["text_dim"] = world.text_dim
    rows = [
        Row("name", "teacher"),
        Row("objective", "flow"),
        Row("data", data),
        Row("codec", "runs/codec/codec"),
        Row("frames", choice.clips, f"latents of a clip: {1 + world.factor * (choice.clips - 1)} frames"),
        Row("batch", 12),
        Row("precision", "auto"),
        Row(
            "dit",
            dit,
            f"{grid[0] * grid[1]} tokens a latent frame; conditions: {', '.join(world.conditions) or 'none'}",
        ),
    ]
    rows += camera_rows(world)
    if choice.warm_teacher:
        rows.append(Row("init", "init/teacher", f"what fits of {choice.warm_teacher}: 2.5 to 3 times fewer steps"))
    loss = {"noise": {"shift": 5.0, "logit_normal": False}, **world.drops, **world.guidance}
    if world.names and loss["guidance"] == 1:
        loss["guidance"] = 1.5
    why = "guidance: what a sampler uses"
    if "audio_guidance" in loss:
        why += "; of text, and of sound that is dropped alone, too"
    rows += [
        Row("loss", loss, why),
        Row(
            "optim",
            {
                "lr": 4e-3,
                "muon": "blocks.*weight",
                "betas": [0.9, 0.98],
                "warmup": 50,
                "decay": 0.6,
                "clip": 0.4,
                "weight_decay": 0.01,
            },
        ),
    ]
    return Stage(
        "teacher",
        "The bidirectional model: clips from noise, the first picture and conditions.",
        tuple(rows),
        "measured",
    )


def student_stages(world: World, choice: Choice) -> list[Stage]:
    """Causal init, Self Forcing and Diagonal Distillation."""
    first = 1 if world.given and choice.chunk > 1 else 0
    given = 1 if world.given else 0
    student = {"chunk": choice.chunk, "first_chunk": first, "memory": {"policy": "window", "frames": choice.clips}}
    slow = {"muon": "", "betas": [0.0, 0.999], "warmup": 10, "decay": 0.5, "weight_decay": 0.01}
    tf = Stage(
        "tf",
        "Causal init: the teacher sees the past alone, true clean history before every noisy chunk.",
        (
            Row("name", "tf"),
            Row("objective", "teacher_forcing"),
            Row("init", "runs/teacher/teacher"),
            Row("curriculum", []),
            Row("batch", 6),
            Row("student", student, f"chunk: {choice.why_chunk}"),
            Row("schedule", {"levels": LEVELS, "given_chunks": given}),
            Row("optim", {"lr": 1e-3, "warmup": 15, "decay": 0.7}),
        ),
        "teacher",
    )
    selfforcing = Stage(
        "selfforcing",
        "Self Forcing: the student's own rollouts, distribution matching against the teacher.",
        (
            Row("name", "selfforcing"),
            Row("objective", "dmd"),
            Row("init", "runs/tf/tf"),
            Row("teacher", "runs/teacher/teacher"),
            Row("batch", 4),
            Row("loss", {**world.guidance, "score_noise": {"shift": 5.0, "logit_normal": False}}),
            Row("optim", {"lr": 1e-4, **slow}),
            Row("critic_optim", {"lr": 3e-4, **slow, "warmup": 20}),
            Row("critic_steps", 3, "critic updates a student update"),
        ),
        "tf",
    )
    stream = LONGER * choice.clips
    floor = {"guidance": 1.3, "guidance_floor": 0.8} if world.names and world.guidance == {"guidance": 1.0} else {}
    diagonal = Stage(
        "diagonal",
        "Diagonal Distillation: 4, 3, then 2 steps a chunk, memory as the last step left it, on streams that go on.",
        (
            Row("name", "diagonal"),
            Row("init", "runs/selfforcing/selfforcing"),
            Row("schedule", {"pattern": "4322222", "context": "last_step", "exit": "per_chunk", "rewarm": 2}),
            Row(
                "long_frames",
                stream,
                f"streams of {world.factor * stream / world.fps:.0f} s: what comes only after a while is in no clip",
            ),
            Row("loss", {"motion": 0.2, **floor}, "motion matched in distribution, or few steps make slow pictures"),
            Row("optim", {"lr": 5e-5}),
            Row("critic_optim", {"lr": 2e-4}),
            Row("critic_steps", 4, "a critic must keep near its student"),
        ),
        "selfforcing",
    )
    return [tf, selfforcing, diagonal]


def stages_of(world: World, choice: Choice, frames: str, latents: str) -> dict[str, Stage]:
    """All stages of a project, without their numbers of steps."""
    every = [codec_stage(world, choice, frames), teacher_stage(world, choice, latents), *student_stages(world, choice)]
    return {stage.name: stage for stage in every}


# --- warm starts ------------------------------------------------------------------------------------------------------


def write_warm(folder: Path, stages: Mapping[str, Stage], choice: Choice) -> None:
    """The checkpoints that stages start from: bundled ones, as far as they fit."""
    if choice.warm_codec:
        old = checkpoint.load(choice.warm_codec, "codec").net
        codec = TinyCodec(replace(old.cfg, smooth=0.0))
        codec.load_state_dict(old.state_dict())
        checkpoint.export(folder / "init" / "codec", codec, {"card": {"parents": [choice.warm_codec]}})
    if choice.warm_teacher:
        bundle = checkpoint.load(choice.warm_teacher, "teacher")
        cfg = config(stages, "teacher", init=None, steps=1)
        net, old_state = VideoDiT(cfg.dit), bundle.net.state_dict()
        new = net.state_dict()
        fits = {name: x for name, x in old_state.items() if name in new and new[name].shape == x.shape}
        net.load_state_dict({**new, **fits})
        shape = {
            "frames": cfg.frames,
            "channels": cfg.dit.channels,
            "height": 0,
            "width": 0,
            "patch": list(cfg.dit.patch),
        }
        side = stages["teacher"].values["dit"]["grid"]
        shape |= {"height": side[0] * cfg.dit.patch[1], "width": side[1] * cfg.dit.patch[2]}
        record = {
            "shape": shape,
            "noise": bundle.record["noise"],
            "codec": None,
            "card": {"parents": [choice.warm_teacher]},
        }
        checkpoint.export(folder / "init" / "teacher", net, record)


def write_starts(folder: Path, world: World, count: int = 8) -> None:
    """First pictures, no two alike, of episodes that no stage learns from, where there are any: what a stream begins
    with."""
    held = next((split for split in ("test", "validation", "train") if split in world.splits), "")
    clips = Clips(world.data / held)
    seen = set[bytes]()
    for k in range(min(len(clips), LOOKED_AT)):
        picture = clips.episode("frames", k)[0].numpy()
        if len(seen) < count and picture.tobytes() not in seen:  # a game may begin the same every time
            save_png(folder / f"{len(seen):02d}.png", picture)
            seen.add(picture.tobytes())


# The lines of run.sh that put those pictures where a stream of the student finds them.
COPY_STARTS = """\
if [ -d starts ]; then # pictures to begin from, where a stream finds them
  mkdir -p runs/diagonal/diagonal-starts && cp starts/* runs/diagonal/diagonal-starts/
fi"""


def write_project(
    folder: Path, world: World, stages: Mapping[str, Stage], about: Mapping[str, Any], script: str
) -> None:
    """The files of a project: a config a stage, what its commands read of the plan, pictures to begin from, run.sh."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages.values():
        (folder / f"{stage.name}.yaml").write_text(stage.text(), encoding="utf-8")
    (folder / "plan.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    if world.given:
        write_starts(folder / "starts", world)
    run = folder / "run.sh"
    run.write_text(script, encoding="utf-8")
    run.chmod(0o755)


def codec_geometry(stage: Stage, choice: Choice) -> TinyCodecConfig:
    """The geometry that a codec stage makes."""
    if choice.warm_codec:
        return checkpoint.load(choice.warm_codec, "codec").net.cfg
    return build(TinyCodecConfig, stage.values["codec_config"])
