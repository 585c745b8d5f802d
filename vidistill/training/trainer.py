"""Training stages: alternation of student and critic, EMA, logging, exact resume. No maths."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vidistill import checkpoint, distributed
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import branches
from vidistill.data.clips import Clips
from vidistill.data.ode_pairs import LEVEL_TOLERANCE
from vidistill.data.prompts import NAMES, PROMPTS, Prompts, open_data
from vidistill.data.types import Batch
from vidistill.diffusion import LatentShape, NoiseSchedule, derived_seed
from vidistill.models.dit import VideoDiT, extend, recomputing
from vidistill.models.layers import DiTConfig
from vidistill.models.lora import LoraConfig, add_lora, merge_lora
from vidistill.models.student import CausalStudent, core
from vidistill.ops.attention import use_backend
from vidistill.ops.device import accelerator
from vidistill.ops.precision import autocast, working_dtype
from vidistill.sampling import sample as sample_teacher
from vidistill.training import validation
from vidistill.training.config import TrainConfig, check_network
from vidistill.training.losses import OBJECTIVES, Loss, Roles, noised_sample
from vidistill.training.motion import MotionHead
from vidistill.training.on_policy import LongRollout, Rollout, last_picture, replayed_backward, whole_chunks
from vidistill.training.optim import TrainingError, TrainState
from vidistill.training.trackers import MetricsLog

log = logging.getLogger("vidistill")

STATE = "state.safetensors"
BEST = "best"
METRICS = "metrics.jsonl"


class Trainer:
    """Runs one stage: `step` after `step`, resumable at any saved one."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg = cfg
        self.objective = OBJECTIVES[cfg.objective]
        self.parts = distributed.parts(cfg.batch, cfg.accumulate)
        self.folder = Path(cfg.out) / cfg.name
        self.metrics_log = MetricsLog(self.folder / METRICS)
        self.step_count = 0
        self.started, self.spent = time.time(), 0.0  # seconds of the processes before this one
        self.data = open_data(cfg.data, cfg.episodes, cfg.rolls, cfg.camera, cfg.reference, cfg.curate)
        if isinstance(self.data, Prompts) and (cfg.loss.forcing or cfg.loss.invalid_weight < 1):
            raise ValueError(
                f"{cfg.data} holds prompts alone: loss.forcing and loss.invalid_weight need recorded clips"
            )
        self.peak, self.losses = (
            validation.EarlyStopping(),
            list[float](),
        )  # best judgement so far; the loss of every logged row
        if cfg.init and cfg.init_plateau:
            validation.check_plateau(
                cfg.init, checkpoint.read_record(checkpoint.locate(cfg.init))["card"], cfg.init_plateau
            )
        self.loss = cfg.loss if cfg.objective != "regression" else replace(cfg.loss, levels=self.levels())
        self.teacher_noise = cfg.loss.noise
        torch.manual_seed(cfg.seed)
        self.roles, self.shape = self.make_roles()
        self.prepare()
        updates = sum(self.is_student_turn(s) for s in range(cfg.steps))
        self.student_state = TrainState(self.roles.student, cfg.optim, updates, cfg.ema, cfg.ema_start)
        critic, motion = self.roles.critic, self.roles.motion
        self.critic = None if critic is None else TrainState(critic, cfg.critic_optim, max(1, cfg.steps - updates))
        self.motion = None if motion is None else TrainState(motion, cfg.optim, updates)
        self.samplers = [self.make_sampler() if cfg.rolls else None for _ in self.parts]  # one a micro-batch
        self.sampler = self.samplers[0]
        self.kept: dict[int, tuple[int, Rollout]] = {}  # sampler -> the rollout of a step, for critic_reuse
        self.held: validation.HeldOut | None = None
        if cfg.validation.every or cfg.validation.diagnose_every:
            clips = Clips(cfg.validation.data, reference=cfg.reference, camera=cfg.camera)
            self.held = validation.held_out(clips, cfg.validation, cfg.frames, accelerator())
            self.codec = self.load_codec() if cfg.codec else None

    @property
    def train_states(self) -> dict[str, TrainState]:
        """What is trained, under the names of its state."""
        every = {"student": self.student_state, "critic": self.critic, "motion": self.motion}
        return {name: state for name, state in every.items() if state is not None}

    def prepare(self) -> None:
        """Add LoRA where it is asked for, move networks to this process's device, shard them if the run does."""
        cfg, roles = self.cfg, self.roles
        for net, lora in ((roles.student, cfg.lora), (roles.critic, cfg.critic_lora), (roles.teacher, LoraConfig())):
            if net is None:
                continue
            inner: VideoDiT = core(net.to(accelerator()))
            add_lora(inner, lora)
            if cfg.parallel == "shard":
                distributed.shard(inner, inner.units)
            if cfg.compile and not (net is roles.student and cfg.rolls):  # every memory a new shape
                inner.compile_regions()
        if roles.motion is not None:
            roles.motion.to(accelerator())

    def make_roles(self) -> tuple[Roles, LatentShape | None]:
        """The networks of this stage."""
        cfg = self.cfg
        if cfg.objective == "codec":
            codec = checkpoint.load(cfg.init, "codec").net if cfg.init else TinyCodec(cfg.codec_config)
            return Roles(codec.requires_grad_(True).train()), None
        name = cfg.init or cfg.teacher
        net = self.load(name) if name else VideoDiT(cfg.dit)
        if not isinstance(net, VideoDiT):
            raise checkpoint.CheckpointError(f"{name} is a {type(net).__name__}; one network is needed to start from")
        net = extend(net, cfg.dit).requires_grad_(True).train()
        self.check_network(name or "dit", net.cfg)
        shape = LatentShape(cfg.frames, *self.latent_size(net.cfg.channels), net.cfg.patch)
        if cfg.objective == "flow":
            return Roles(net), shape
        student = CausalStudent(net, cfg.student, shape).train()
        if not self.objective.critic:
            return Roles(student), shape
        assert cfg.teacher
        critic_name = cfg.critic_init or cfg.teacher
        teacher = checkpoint.load(cfg.teacher, "teacher", working_dtype(cfg.teacher_precision))
        critic = self.load(critic_name, "teacher").requires_grad_(True).train()
        if not isinstance(critic, VideoDiT):
            raise ValueError(f"{critic_name} is no single network: name one in critic_init for the critic")
        if isinstance(teacher.net, VideoDiT):
            self.check_network(cfg.teacher, teacher.net.cfg)
        self.check_network(critic_name, critic.cfg)
        self.teacher_noise = teacher.noise if "noise" in teacher.record else NoiseSchedule()
        return Roles(student, teacher.net, critic, MotionHead(shape.channels) if cfg.loss.motion_head else None), shape

    def load(self, name: str, kind: str | None = None) -> Any:
        """The network of a checkpoint, or that of its student; it recomputes its blocks if this stage does."""
        net = core(checkpoint.load(name, kind).net)
        return recomputing(net) if self.cfg.dit.checkpoint and isinstance(net, VideoDiT) else net

    def load_codec(self) -> Any:
        """The codec of the data's latents, which the stage names."""
        return checkpoint.load(str(self.cfg.codec), "codec").net.to(accelerator())

    def normalisation_clips(self) -> Iterator[Tensor]:
        """Training clips that a new codec's latents are normalised on, other than those of any step."""
        for step in range(8):
            yield self.clips.frames(self.cfg.batch, self.cfg.frames, self.cfg.seed + 1, step).to(accelerator())

    @property
    def clips(self) -> Clips:
        """The data of a stage that needs more than prompts."""
        assert isinstance(self.data, Clips)
        return self.data

    def latent_size(self, channels: int) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame: those of the data, those of the stage where it has none."""
        if not isinstance(self.data, Prompts):
            return self.data.latent_size
        if not all(self.cfg.latent_size):
            raise ValueError(f"{self.cfg.data} holds prompts alone: set latent_size=[HEIGHT, WIDTH], in latents")
        return (channels, *self.cfg.latent_size)

    def check_network(self, name: str, dit: DiTConfig) -> None:
        """Raise ValueError unless a network takes the latents and conditions of this stage's data."""
        check_network(self.cfg, self.data, self.latent_size(dit.channels), name, dit)

    def levels(self) -> tuple[float, ...]:
        """The exact noise levels of the stored trajectories; ValueError if they are not the configured ones."""
        self.clips.need("trajectories")
        stored, asked = tuple(self.clips.meta["levels"]), self.cfg.loss.levels
        if len(stored) != len(asked) or any(abs(s - a) >= LEVEL_TOLERANCE for s, a in zip(stored, asked, strict=True)):
            raise ValueError(f"loss.levels {list(asked)} are not those of {self.cfg.data}: {list(stored)}")
        if self.clips.meta["frames"] != self.cfg.frames:
            raise ValueError(f"frames {self.cfg.frames} are not those of {self.cfg.data}: {self.clips.meta['frames']}")
        return stored

    def make_sampler(self) -> LongRollout:
        """What makes the student's rollouts."""
        cfg, student = self.cfg, self.roles.student
        given = whole_chunks(student, self.data.given)
        if cfg.schedule.given_chunks != given:
            raise ValueError(
                f"schedule.given_chunks must be {given}: clips of {cfg.data} start from {self.data.given} given "
                f"latents, and the first chunk has {student.first_frame(1)}"
            )
        student.num_chunks(cfg.frames)
        picture = last_picture(self.load_codec()) if cfg.long_frames and cfg.codec else None
        return LongRollout(student, cfg.schedule, cfg.long_frames, picture, working_dtype(cfg.precision, accelerator()))

    def is_student_turn(self, step: int) -> bool:
        if self.objective.critic is None:
            return True
        late = step - self.cfg.critic_warmup
        return late >= 0 and late % (self.cfg.critic_steps + 1) == 0

    def drawn_at(self, step: int) -> int:
        """The step whose batch and rollout an update learns from: its own, or that of a critic update before it."""
        if self.is_student_turn(step):
            return step
        late, cycle = step - self.cfg.critic_warmup, self.cfg.critic_steps + 1
        since = step if late < 0 else late % cycle - 1  # critic updates since the student moved
        return step - since % self.cfg.critic_reuse

    def rng_for(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.cfg.seed, step))

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        cfg = self.cfg
        if cfg.objective == "codec":
            return Batch(self.clips.frames(cfg.batch, cfg.frames, cfg.seed, step))
        if cfg.objective == "regression":
            return self.clips.trajectories(cfg.batch, cfg.seed, step)
        if isinstance(self.data, Prompts) and self.shape is not None:
            size = (self.shape.channels, self.shape.height, self.shape.width)
            return self.data.batch(cfg.batch, cfg.frames_at(step), size, cfg.seed, step)
        return self.clips.latents(cfg.batch, cfg.frames_at(step), cfg.seed, step)

    def sample(self, batch: Batch, rng: torch.Generator, grad: bool) -> Rollout:
        """The student's own rollout for the condition and given frames of `batch`, with `grad` or to be replayed."""
        assert self.sampler is not None
        restart, replayed = self.step_count % self.cfg.save_every == 0, grad and self.cfg.replay
        return self.sampler(batch, rng, grad=grad and not replayed, restart=restart, record=replayed)

    def rolled(self, batch: Batch, rng: torch.Generator, learning: bool) -> Rollout:
        """The rollout of a turn, made now or kept from a critic update before."""
        drawn, held = self.drawn_at(self.step_count), self.kept.pop(id(self.sampler), None)
        if held is None or held[0] != drawn:  # the first to use it, or a run that was resumed in between
            own = drawn == self.step_count
            held = drawn, self.sample(batch, rng if own else self.rng_for(drawn), learning)
        if not learning and self.cfg.critic_reuse > 1:
            self.kept[id(self.sampler)] = held
        return held[1]

    def target(self, sample: Rollout, rng: torch.Generator) -> Tensor:
        """The teacher's sample [B, F, C, H, W] for the noise, condition and given frames of a rollout."""
        assert self.sampler is not None
        batch, cfg = sample.batch, self.loss.at(self.step_count)
        nulls, scales = branches(batch.cond, cfg.guidance, cfg.audio_guidance)
        return sample_teacher(
            self.roles.teacher,
            self.sampler.noise_of(sample, rng),
            self.teacher_noise.steps(cfg.target_steps),
            batch.cond,
            given=batch.x[:, : batch.given],
            nulls=nulls,
            scales=scales,
        )

    def step(self) -> dict[str, float]:
        """One update of student or critic; returns what to log."""
        turn = "student" if self.is_student_turn(self.step_count) else "critic"
        states = [self.student_state, self.motion] if turn == "student" else [self.critic]
        trained = [state for state in states if state is not None]
        for state in trained:
            state.zero_grad()
        logs = self.gradients(turn)
        for state in trained:
            distributed.mean_gradients(state.params, len(self.parts))
        norms = [state.clip(logs["loss"]) for state in trained]
        for state in trained:
            state.step()
        if turn == "student" and self.roles.motion is not None:
            self.roles.motion.follow()
        self.step_count += 1
        return {f"{turn}/{k}": v for k, v in {"loss": logs["loss"], "grad_norm": norms[0], **logs}.items()}

    def gradients(self, turn: str) -> dict[str, float]:
        """Means over the whole batch of the loss of a turn and its logs; gradients of this process's parts added up."""
        whole, logs, device = self.batch(self.drawn_at(self.step_count)), [], accelerator()
        recorded = whole.x.to(device) if self.loss.invalid_weight < 1 else None
        cache = self.cfg.parallel != "shard"  # a cast shared by passes gets its gradient after FSDP2 has collected it
        for k, part in enumerate(self.parts):
            self.sampler = self.samplers[k]
            batch = replace(whole, x=part.rows(whole.x), cond=whole.cond.map(part.rows), whole=recorded).to(device)
            half = autocast(self.cfg.precision, device, cache)
            with half, part.draws(batch.x.shape[0]):
                loss = self.loss_of(turn, batch, self.rng_for(self.step_count))
            logs.append({"loss": float(loss.value.detach()), **{k: float(v) for k, v in loss.logs.items()}})
        return distributed.mean(logs)

    def loss_of(self, turn: str, batch: Batch, rng: torch.Generator) -> Loss:
        """The loss of a turn, its gradients accumulated."""
        learning = turn == "student"
        fn = self.objective.student if learning else self.objective.critic
        assert fn is not None
        x0, sample = batch.x, None
        if self.sampler is not None:
            sample = self.rolled(batch, rng, learning)
            x0, batch = sample.x0, sample.batch
        elif self.objective.on_policy:
            with torch.set_grad_enabled(learning):
                x0 = noised_sample(self.roles.student, batch, self.cfg.schedule.levels, rng)
        if sample is not None and learning and self.loss.needs_target:
            batch = replace(batch, target=self.target(sample, rng))
        replayed = sample is not None and learning and self.cfg.replay
        if replayed:
            x0 = x0.detach().requires_grad_()
        loss: Loss = fn(self.roles, x0, batch, self.loss.at(self.step_count), rng)
        loss.value.backward()
        if replayed:
            assert sample is not None and x0.grad is not None
            replayed_backward(self.roles.student, sample, x0.grad)
        return loss

    def run(self) -> Path:
        """Train to the end, saving and logging on the way; returns the path of the exported weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        first = distributed.rank() == 0
        if first:
            config = json.dumps(asdict(self.cfg), indent=1)
            checkpoint.write_atomic(self.folder / "config.json", lambda p: p.write_text(config))
        self.started = time.time()
        quiet = None if first else True
        bar = tqdm(total=self.cfg.steps, initial=self.step_count, desc=self.cfg.name, unit="step", disable=quiet)
        with bar, logging_redirect_tqdm():
            self.loop(bar)
        return self.finish()

    def validate(self) -> None:
        """Judge and diagnose where this step is due; keep the best weights."""
        cfg, watched = self.cfg, self.cfg.validation
        if self.held is None:
            return
        if watched.diagnose_every and self.step_count % watched.diagnose_every == 0:
            found = validation.diagnose(
                self.roles, cfg.schedule, self.held, self.loss.at(self.step_count), watched.levels
            )
            if distributed.rank() == 0:
                self.metrics_log.write({"step": self.step_count, "diagnosis": found})
        if not watched.every or self.step_count % watched.every or not self.student_state.updates:
            return
        self.student_state.swap_ema()
        score = validation.judge(self.roles.student, cfg.schedule, self.held, self.codec, watched.score)
        if self.peak.update(score, self.step_count):
            net = self.weights()
            if distributed.rank() == 0:
                checkpoint.export(self.folder / BEST, net, self.record(), torch.float16)
        self.student_state.swap_ema()
        if distributed.rank() == 0:
            self.metrics_log.write(
                {"step": self.step_count, watched.score.rpartition(":")[2]: score, "best_step": self.peak.step}
            )
        log.info("%s: %s %.4f, best %.4f at step %d", cfg.name, watched.score, score, self.peak.score, self.peak.step)

    def loop(self, bar: Any) -> None:
        first = self.step_count
        while self.step_count < self.cfg.steps and not self.peak.done(self.cfg.validation.patience):
            try:
                self.metrics_log.add(self.step())
            except FloatingPointError as error:
                kept = self.folder / STATE
                raise TrainingError(
                    f"{self.cfg.name}: not finite at step {self.step_count} ({error}); nothing was updated. The last "
                    f"checkpoint is {kept if kept.is_file() else 'none yet'}; lower optim.lr or optim.clip and run the "
                    "same command again"
                ) from error
            bar.update()
            if self.step_count % self.cfg.log_every == 0 or self.step_count == self.cfg.steps:
                speed = (time.time() - self.started) / (self.step_count - first)
                row = {"step": self.step_count, "s_per_step": speed, **self.metrics_log.flush()}
                self.losses += [row["student/loss"]] if "student/loss" in row else []
                self.write_log(row)
            self.validate()
            ended = self.step_count == self.cfg.steps or self.peak.done(self.cfg.validation.patience)
            if self.step_count % self.cfg.save_every == 0 or ended:
                self.save()

    def write_log(self, row: dict[str, float]) -> None:
        if distributed.rank():
            return
        self.metrics_log.write(row)
        left = (self.cfg.steps - self.step_count) * row["s_per_step"] / 60
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        log.info("%s %d/%d  %s  (%.0f min left)", self.cfg.name, self.step_count, self.cfg.steps, shown, left)

    def save(self) -> None:
        tensors = {n: t for name, state in self.train_states.items() for n, t in state.state(name).items()}
        info: dict[str, Any] = {"step": self.step_count, "config": asdict(self.cfg)}
        info |= {"losses": self.losses, "peak": asdict(self.peak)}
        info["seconds"] = self.spent + time.time() - self.started
        info.update({name: state.updates for name, state in self.train_states.items()})
        if any(distributed.is_sharded(t) for t in tensors.values()):
            distributed.save_shards(self.folder, tensors, info)
            (self.folder / STATE).unlink(missing_ok=True)
        elif distributed.rank() == 0:
            checkpoint.save_tensors(self.folder / STATE, tensors, info)
            distributed.drop_shards(self.folder)

    def resume(self) -> None:
        """Go on from the last saved step of this run, if there is one."""
        path = distributed.newest(self.folder, self.folder / STATE)
        if not path.exists():
            return
        templates = {n: t for name, state in self.train_states.items() for n, t in state.state_template(name).items()}
        try:
            if path.is_dir():
                tensors, info = distributed.read_shards(path, templates)
            else:
                tensors, info = checkpoint.read_tensors(path)
                tensors = distributed.placed(tensors, templates)
            for name, state in self.train_states.items():
                state.restore(name, tensors, info[name])
        except (KeyError, RuntimeError) as error:
            raise TrainingError(
                f"{path} is a run of other networks than this config ({error}); choose another name=, or remove it"
            ) from error
        self.step_count, self.spent = info["step"], info.get("seconds", 0.0)
        self.losses, self.peak = info.get("losses", []), validation.EarlyStopping(**info.get("peak", {}))
        if distributed.rank() == 0:
            self.metrics_log.trim(self.step_count)
        now = json.loads(json.dumps(asdict(self.cfg)))
        changed = [k for k, v in info["config"].items() if k in now and now[k] != v]
        note = f"; changed since: {', '.join(changed)}" if changed else ""
        log.info("%s resumes at step %d%s", self.cfg.name, self.step_count, note)

    def finish(self) -> Path:
        """Export the averaged weights as a checkpoint that can be loaded by path, which is returned."""
        cfg = self.cfg
        path = self.folder / Path(cfg.name).name
        if self.peak.step and distributed.rank() == 0:
            for suffix in (".safetensors", ".json"):
                best, out = (checkpoint.with_extension(p, suffix) for p in (self.folder / BEST, path))
                checkpoint.write_atomic(out, lambda p, best=best: p.write_bytes(best.read_bytes()))
        if self.peak.step:
            return checkpoint.with_extension(path, ".safetensors")
        self.student_state.swap_ema()
        net = self.weights()
        if isinstance(net, TinyCodec) and not cfg.init:  # else its latents are in use
            net.normalise_on(self.normalisation_clips())
        if distributed.rank() == 0:
            checkpoint.export(path, net, self.record(), torch.float16)
        self.student_state.swap_ema()
        return checkpoint.with_extension(path, ".safetensors")

    def weights(self) -> nn.Module:
        """The student in whole, plain weights on rank 0: shards gathered, LoRA merged."""
        net, lora = self.roles.student, self.cfg.lora
        if not lora.rank and not any(distributed.is_sharded(p) for p in net.parameters()):
            return net
        state = distributed.whole_state(net)
        plain = checkpoint.rebuild(checkpoint.describe(net))
        add_lora(core(plain), lora)
        if distributed.rank() == 0:
            checkpoint.load_into(plain, state, self.cfg.name)
        merge_lora(core(plain))
        return plain

    def record(self) -> dict[str, Any]:
        cfg = self.cfg
        card = {
            "objective": cfg.objective,
            "steps": self.step_count,
            "losses": [round(loss, 6) for loss in self.losses],
            "dropped": self.data.dropped,
            "seed": cfg.seed,
            "parents": [p for p in (cfg.init, cfg.teacher) if p],
            "data": {k: v for k, v in self.data.meta.items() if k not in ("described", PROMPTS, NAMES)},
            "hours": round((self.spent + time.time() - self.started) / 3600, 3),
            "commit": checkpoint.git_commit(),
            "train": asdict(cfg),
        }
        if cfg.objective == "codec":
            return {"card": card}
        assert self.shape is not None
        meta = self.data.meta
        world: dict[str, Any] = {k: meta[k] for k in ("fps", "actions", "px_size", "temporal") if k in meta}
        if cfg.camera is not None:
            world["camera"] = asdict(cfg.camera)
        return {
            "shape": asdict(self.shape),
            "noise": asdict(cfg.loss.noise),
            "guidance": cfg.loss.guidance if cfg.objective == "flow" else 1.0,  # what a sampler should use
            "audio_guidance": cfg.loss.audio_guidance if cfg.objective == "flow" else 0.0,
            "schedule": asdict(cfg.schedule),
            "given_frames": self.data.given,
            "codec": cfg.codec,
            "text": meta.get("text"),
            "audio": meta.get("audio"),
            "world": world,
            "card": card,
        }


def train(cfg: TrainConfig) -> Path:
    """Run the stage `cfg` to its end and return the path of its weights; resumes where it stopped.

    Processes started by torchrun share the work; every one returns when the run is done.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with distributed.group(), use_backend(cfg.backend):
        return Trainer(cfg).run()
