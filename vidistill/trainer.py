"""Training stages: alternation of student and critic, EMA, logging, exact resume. No maths."""

import json
import logging
import math
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.data import Batch, Clips
from vidistill.dit import DiTConfig, VideoDiT
from vidistill.objectives import OBJECTIVES, Loss, LossConfig, Roles
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import ScheduleConfig, training
from vidistill.shapes import LatentShape
from vidistill.student import CausalStudent, StudentConfig

log = logging.getLogger("vidistill")

STATE = "state.safetensors"
METRICS = "metrics.jsonl"


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is left intact."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and, over the last `decay` of the run, linear decay to zero.

    `muon`: parameters of two or more axes whose name this regular expression finds are updated by Muon instead (the
    momentum is orthogonalised, scaled to AdamW's size). Source: Jordan et al. 2024; scaling 2502.16982.
    """

    lr: float = 1e-4
    muon: str = ""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 0
    decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"optim needs lr > 0 and 0 <= decay <= 1, got {self.lr} and {self.decay}")

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the learning rate at `step`."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        tail = max(1.0, self.decay * steps)
        down = min(1.0, (steps - step) / tail) if self.decay else 1.0
        return up * down


@dataclass(frozen=True)
class TrainConfig:
    """One stage. `init` names the checkpoint the student starts from, `teacher` what it learns from (both optional)."""

    name: str
    objective: str
    data: str
    episodes: int = 0  # use only this many episodes; 0: all
    steps: int = 1000
    batch: int = 16
    frames: int = 22  # latent frames of a clip (pixel frames for a codec)
    seed: int = 0
    init: str | None = None
    teacher: str | None = None
    codec: str | None = None  # name of the codec whose latents the data holds
    codec_config: TinyCodecConfig = TinyCodecConfig()
    dit: DiTConfig = DiTConfig()
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = OptimConfig()
    critic_optim: OptimConfig = OptimConfig()
    critic_init: str | None = None  # default: the teacher
    critic_steps: int = 5  # critic updates per student update
    critic_warmup: int = 0  # critic updates before the first student update
    ema: float = 0.999
    ema_start: int = 0
    precision: str = "fp32"
    threads: int = 0  # 0: all
    out: str = "runs"
    log_every: int = 20
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective {self.objective!r} is unknown; choose one of {sorted(OBJECTIVES)}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} is unknown; choose fp32 or bf16")
        for name in ("steps", "batch", "frames", "critic_steps", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if OBJECTIVES[self.objective].on_policy and not self.teacher:
            raise ValueError(f"objective {self.objective!r} needs a `teacher`")


class Learner:
    """A network being trained: optimiser, learning-rate schedule, and optionally an averaged copy."""

    def __init__(self, net: nn.Module, cfg: OptimConfig, steps: int, ema: float = 0.0, ema_start: int = 0) -> None:
        self.net, self.cfg, self.steps = net, cfg, steps
        self.decay, self.ema_start = ema, ema_start
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        matrix = [bool(cfg.muon and p.ndim > 1 and re.search(cfg.muon, n)) for n, p in named]
        plain = [p for p, m in zip(self.params, matrix, strict=True) if not m]
        self.optims: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(plain, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, foreach=True)
        ]
        self.matrices = [p for p, m in zip(self.params, matrix, strict=True) if m]
        self.views = [nn.Parameter(p.data.flatten(1)) for p in self.matrices]  # Muon takes two axes; memory is shared
        if self.views:
            self.optims.append(
                torch.optim.Muon(
                    self.views, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.average = [p.detach().clone() for p in self.params] if ema else []
        self.updates = 0

    def update(self, loss: Tensor) -> float:
        """One optimiser step; returns the gradient norm before clipping. Raises FloatingPointError before any change."""
        for p in self.params:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, self.cfg.clip))
        value = float(loss.detach())
        if not math.isfinite(norm) or not math.isfinite(value):
            raise FloatingPointError(f"loss {value}, gradient norm {norm}")
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.cfg.lr * self.cfg.factor(self.updates, self.steps)
            optim.step()
        self.updates += 1
        if self.average:
            self.move_average()
        return norm

    @torch.no_grad()
    def move_average(self) -> None:
        if self.updates <= self.ema_start:
            torch._foreach_copy_(self.average, self.params)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.average, self.params, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights."""
        for p, a in zip(self.params, self.average, strict=True):
            held = p.detach().clone()
            p.copy_(a)
            a.copy_(held)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of this learner under `prefix`."""
        tensors = {f"{prefix}.net.{n}": t for n, t in self.net.state_dict().items()}
        tensors.update({f"{prefix}.ema.{i}": t for i, t in enumerate(self.average)})
        for i, (optim, p) in enumerate(self.owners()):
            tensors.update({f"{prefix}.optim.{i}.{k}": v for k, v in optim.state.get(p, {}).items()})
        return tensors

    def owners(self) -> list[tuple[torch.optim.Optimizer, nn.Parameter]]:
        """Every parameter with the optimiser that holds its state, in a fixed order."""
        return [(o, p) for o in self.optims for group in o.param_groups for p in group["params"]]

    @torch.no_grad()
    def restore(self, prefix: str, tensors: dict[str, Tensor], updates: int) -> None:
        self.updates = updates
        own = {n: tensors[f"{prefix}.net.{n}"] for n in self.net.state_dict()}
        self.net.load_state_dict(own)
        for i, a in enumerate(self.average):
            a.copy_(tensors[f"{prefix}.ema.{i}"])
        for i, (optim, p) in enumerate(self.owners()):
            keys = [k for k in tensors if k.startswith(f"{prefix}.optim.{i}.")]
            if keys:
                optim.state[p] = {k.rsplit(".", 1)[1]: tensors[k].clone() for k in keys}


class Trainer:
    """Runs one stage: `step` after `step`, resumable at any saved one."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.objective = OBJECTIVES[cfg.objective]
        self.folder = Path(cfg.out) / cfg.name
        self.step_count = 0
        self.clips = Clips(cfg.data, episodes=cfg.episodes)
        torch.manual_seed(cfg.seed)
        self.roles, self.shape = self.make_roles()
        student_updates = sum(self.is_student_turn(s) for s in range(cfg.steps))
        self.learner = Learner(self.roles.student, cfg.optim, student_updates, cfg.ema, cfg.ema_start)
        self.critic = Learner(self.roles.critic, cfg.critic_optim, cfg.steps) if self.roles.critic is not None else None

    def make_roles(self) -> tuple[Roles, LatentShape | None]:
        """The networks of this stage."""
        cfg = self.cfg
        if cfg.objective == "codec":
            codec = checkpoint.load(cfg.init, "codec").net if cfg.init else TinyCodec(cfg.codec_config)
            return Roles(codec.requires_grad_(True).train()), None
        channels, height, width = self.clips.tensors["latents"].shape[2:]
        start = checkpoint.load(cfg.init) if cfg.init else None
        net = VideoDiT(cfg.dit) if start is None else start.net
        dit = net.net.cfg if isinstance(net, CausalStudent) else net.cfg
        shape = LatentShape(cfg.frames, channels, height, width, dit.patch)
        if cfg.objective == "flow":
            return Roles(net.requires_grad_(True).train()), shape
        inner = net.net if isinstance(net, CausalStudent) else net
        student = CausalStudent(inner.requires_grad_(True), cfg.student, shape).train()
        if not self.objective.critic:
            return Roles(student), shape
        assert cfg.teacher
        teacher = checkpoint.load(cfg.teacher, "teacher").net
        critic = checkpoint.load(cfg.critic_init or cfg.teacher, "teacher").net.requires_grad_(True).train()
        return Roles(student, teacher, critic), shape

    def is_student_turn(self, step: int) -> bool:
        if self.objective.critic is None:
            return True
        late = step - self.cfg.critic_warmup
        return late >= 0 and late % (self.cfg.critic_steps + 1) == 0

    def rng_for(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + step)

    def batch(self, step: int) -> Batch:
        cfg = self.cfg
        if cfg.objective == "codec":
            return Batch(self.clips.frames(cfg.batch, cfg.frames, cfg.seed, step))
        return self.clips.latents(cfg.batch, cfg.frames, cfg.seed, step)

    def sample(self, batch: Batch, rng: torch.Generator, grad: bool) -> Tensor:
        """The student's own rollout [B, F, C, H, W] for the condition and given frames of `batch`."""
        student, cfg = self.roles.student, self.cfg
        b, frames = batch.x.shape[:2]
        draw = Random(int(torch.randint(2**31, (1,), generator=rng)))
        passes = training(cfg.schedule, student.num_chunks(frames), draw)
        memory = student.new_memory(b, dtype=torch.bfloat16 if cfg.precision == "bf16" else torch.float32)
        noise = chunk_noise(student, b, draw.randrange(2**31), batch.x[:, : batch.given])
        with torch.set_grad_enabled(grad):
            chunks = rollout(student, passes, noise=noise, cond=batch.cond.frames, memory=memory, rng=rng)
            return torch.cat(list(chunks), dim=1)

    def step(self) -> dict[str, float]:
        """One update of student or critic; returns what to log."""
        rng, batch = self.rng_for(self.step_count), self.batch(self.step_count)
        turn = "student" if self.is_student_turn(self.step_count) else "critic"
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            x0 = self.sample(batch, rng, grad=turn == "student") if self.objective.on_policy else batch.x
            fn = self.objective.student if turn == "student" else self.objective.critic
            assert fn is not None
            loss: Loss = fn(self.roles, x0, batch, self.cfg.loss, rng)
        learner = self.learner if turn == "student" else self.critic
        assert learner is not None
        norm = learner.update(loss.value)
        self.step_count += 1
        logs = {f"{turn}/{k}": float(v) for k, v in loss.logs.items()}
        return {f"{turn}/loss": float(loss.value.detach()), f"{turn}/grad_norm": norm, **logs}

    def run(self) -> None:
        """Train to the end, saving and logging on the way."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        (self.folder / "config.json").write_text(json.dumps(asdict(self.cfg), indent=1))
        started, first, sums = time.time(), self.step_count, Averages()
        while self.step_count < self.cfg.steps:
            try:
                sums.add(self.step())
            except FloatingPointError as error:
                raise TrainingError(
                    f"{self.cfg.name}: not finite at step {self.step_count} ({error}); nothing was updated. The last "
                    f"checkpoint is {self.folder / STATE}; lower optim.lr or optim.clip and run the same command again"
                ) from error
            if self.step_count % self.cfg.log_every == 0 or self.step_count == self.cfg.steps:
                speed = (time.time() - started) / (self.step_count - first)
                self.write_log({"step": self.step_count, "s_per_step": speed, **sums.flush()})
            if self.step_count % self.cfg.save_every == 0 or self.step_count == self.cfg.steps:
                self.save()
        self.finish(time.time() - started)

    def write_log(self, row: dict[str, float]) -> None:
        with open(self.folder / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")
        left = (self.cfg.steps - self.step_count) * row["s_per_step"] / 60
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        log.info("%s %d/%d  %s  (%.0f min left)", self.cfg.name, self.step_count, self.cfg.steps, shown, left)

    def save(self) -> None:
        tensors = self.learner.state("student")
        info = {"step": self.step_count, "student": self.learner.updates, "config": asdict(self.cfg)}
        if self.critic is not None:
            tensors.update(self.critic.state("critic"))
            info["critic"] = self.critic.updates
        checkpoint.save_tensors(self.folder / STATE, tensors, info)

    def resume(self) -> None:
        """Go on from the last saved step of this run, if there is one."""
        path = self.folder / STATE
        if not path.is_file():
            return
        tensors, info = checkpoint.read_tensors(path)
        self.learner.restore("student", tensors, info["student"])
        if self.critic is not None:
            self.critic.restore("critic", tensors, info["critic"])
        self.step_count = info["step"]
        log.info("%s resumes at step %d", self.cfg.name, self.step_count)

    def finish(self, seconds: float) -> None:
        """Export the averaged weights as a checkpoint that can be loaded by path."""
        cfg = self.cfg
        if self.learner.average:
            self.learner.swap()
        if isinstance(self.roles.student, TinyCodec):
            self.normalise(self.roles.student)
        checkpoint.export(self.folder / cfg.name, self.roles.student, self.record(seconds), torch.float16)
        if self.learner.average:
            self.learner.swap()

    def record(self, seconds: float) -> dict[str, Any]:
        cfg = self.cfg
        card = {
            "objective": cfg.objective,
            "steps": cfg.steps,
            "seed": cfg.seed,
            "parents": [p for p in (cfg.init, cfg.teacher) if p],
            "data": {k: v for k, v in self.clips.meta.items() if k not in ("described",)},
            "hours": round(seconds / 3600, 3),
            "commit": git_commit(),
            "train": asdict(cfg),
        }
        if cfg.objective == "codec":
            return {"card": card}
        assert self.shape is not None
        world = {k: self.clips.meta[k] for k in ("fps", "actions", "px_size") if k in self.clips.meta}
        return {
            "shape": asdict(self.shape),
            "noise": asdict(cfg.loss.noise),
            "schedule": asdict(cfg.schedule),
            "codec": cfg.codec,
            "world": world,
            "card": card,
        }

    @torch.no_grad()
    def normalise(self, codec: TinyCodec) -> None:
        """Measure mean and deviation of the codec's latents on training clips and store them in the codec."""
        raws = []
        for step in range(8):
            px = self.clips.frames(self.cfg.batch, self.cfg.frames, self.cfg.seed + 1, step)
            raws.append(codec(px)[1])
        raw = torch.cat(raws).float()
        mean, std = raw.mean(dim=(0, 1, 3, 4)), raw.std(dim=(0, 1, 3, 4))
        codec.set_normalisation(mean, std)


class Averages:
    """Means of logged values since the last flush."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.values.setdefault(key, []).append(value)

    def flush(self) -> dict[str, float]:
        means = {k: sum(v) / len(v) for k, v in self.values.items()}
        self.values = {}
        return means


def git_commit() -> str | None:
    """Short hash of the checkout this runs from, None outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def train(cfg: TrainConfig) -> None:
    """Run the stage `cfg` to its end; resumes where it stopped."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    Trainer(cfg).run()
