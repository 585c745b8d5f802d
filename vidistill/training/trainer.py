"""Training stages: alternation of student and critic, EMA, logging, exact resume. No maths."""

import itertools
import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidistill import checkpoint, distributed
from vidistill.codecs.tiny import TinyCodec
from vidistill.data.clips import EVERY, Clips
from vidistill.data.loader import read_ahead
from vidistill.data.ode_pairs import LEVEL_TOLERANCE
from vidistill.data.prompts import NAMES, PROMPTS, Prompts, open_data
from vidistill.data.types import Batch
from vidistill.io import sweep, write_atomic, write_json
from vidistill.models.student import core
from vidistill.ops.attention import use_backend
from vidistill.ops.device import accelerator, kept_on_host
from vidistill.ops.precision import autocast, working_dtype
from vidistill.progress import Bar
from vidistill.training import known, networks, samples, validation
from vidistill.training.config import EXPORTS, TrainConfig, Turn, recipe
from vidistill.training.interruption import Interruption
from vidistill.training.losses import OBJECTIVES
from vidistill.training.on_policy import (
    DataSampler,
    LongRollout,
    OnPolicySampler,
    Sampler,
    last_picture,
    whole_chunks,
)
from vidistill.training.optim import TrainingError, TrainState
from vidistill.training.run_folder import RunLock, RunState, load_state, newest_state, save_state
from vidistill.training.trackers import MetricsLog, check_installed

log = logging.getLogger("vidistill")

BEST = "best"
SAMPLES = "samples"
METRICS = "metrics.jsonl"
STARTS = ("init", "critic_init")  # settings that a run which is resumed cannot change


class Trainer:
    """Runs one stage: `step` after `step`, resumable at any saved one."""

    def __init__(self, cfg: TrainConfig) -> None:
        self.cfg, self.device = cfg, accelerator()
        self.objective = OBJECTIVES[cfg.objective]
        self.parts = distributed.parts(cfg.batch, cfg.accumulate, cfg.sequence)
        self.folder = Path(cfg.out) / cfg.name
        self.metrics_log = MetricsLog(self.folder / METRICS)
        check_installed(cfg.trackers)
        self.lock: RunLock | None = None  # of rank 0 while it runs
        self.step_count = 0
        self.started, self.spent = time.monotonic(), 0.0  # seconds of the processes before this one
        self.data = open_data(cfg.data, cfg.episodes, cfg.rolls, cfg.camera, cfg.reference, cfg.curate)
        if isinstance(self.data, Prompts) and (cfg.loss.forcing or cfg.loss.invalid_weight < 1):
            raise ValueError(
                f"{cfg.data} holds prompts alone: loss.forcing and loss.invalid_weight need recorded clips"
            )
        self.peak, self.losses = validation.EarlyStopping(), list[float]()  # best score; the loss of every logged row
        if cfg.init and cfg.init_plateau:
            card = checkpoint.read_record(checkpoint.locate(cfg.init)).get("card") or {}
            validation.check_plateau(cfg.init, card, cfg.init_plateau)
        self.loss = cfg.loss if cfg.objective != "regression" else replace(cfg.loss, levels=self.levels())
        known.check(cfg, self.data.meta)
        torch.manual_seed(cfg.seed)
        self.roles, self.shape, self.teacher_noise = networks.make_roles(cfg, self.data)
        networks.prepare(cfg, self.roles, self.device)
        updates = sum(cfg.is_student_turn(s) for s in range(cfg.steps))
        self.student_state = TrainState(self.roles.student, cfg.optim, updates, cfg.ema, cfg.ema_start, cfg.ema_warmup)
        critic, motion = self.roles.critic, self.roles.motion
        self.critic = None if critic is None else TrainState(critic, cfg.critic_optim, max(1, cfg.steps - updates))
        self.motion = None if motion is None else TrainState(motion, cfg.optim, updates)
        self.samplers = [self.make_sampler() for _ in self.parts]  # one a micro-batch: each continues its own streams
        self.coming: tuple[int, Iterator[Batch]] | None = None  # step of the next batch, and batches from there on
        self.held: validation.HeldOut | None = None
        if cfg.validation.every or cfg.validation.diagnose_every:
            clips = Clips(cfg.validation.data, reference=cfg.reference, camera=cfg.camera)
            self.held = validation.held_out(clips, cfg.validation, cfg.frames, self.device)
            self.codec = self.load_codec() if cfg.codec else None

    @property
    def train_states(self) -> dict[str, TrainState]:
        """What is trained, under the names of its state."""
        every = {"student": self.student_state, "critic": self.critic, "motion": self.motion}
        return {name: state for name, state in every.items() if state is not None}

    def load_codec(self) -> Any:
        """The codec of the data's latents, which the stage names."""
        return checkpoint.load(str(self.cfg.codec), "codec").net.to(self.device)

    def normalisation_clips(self) -> Iterator[Tensor]:
        """Training clips that a new codec's latents are normalised on, other than those of any step."""
        for step in range(8):
            yield self.clips.frames(self.cfg.batch, self.cfg.frames, self.cfg.seed + 1, step).to(self.device)

    @property
    def clips(self) -> Clips:
        """The data of a stage that needs more than prompts."""
        assert isinstance(self.data, Clips)
        return self.data

    def levels(self) -> tuple[float, ...]:
        """The exact noise levels of the stored trajectories; ValueError if they are not the configured ones."""
        self.clips.need("trajectories")
        stored, asked = tuple(self.clips.meta["levels"]), self.cfg.loss.levels
        if len(stored) != len(asked) or any(abs(s - a) >= LEVEL_TOLERANCE for s, a in zip(stored, asked, strict=True)):
            raise ValueError(f"loss.levels {list(asked)} are not those of {self.cfg.data}: {list(stored)}")
        if self.clips.meta["frames"] != self.cfg.frames:
            raise ValueError(f"frames {self.cfg.frames} are not those of {self.cfg.data}: {self.clips.meta['frames']}")
        return stored

    def make_sampler(self) -> Sampler:
        """What makes the samples of a micro-batch that its losses are taken on."""
        cfg, student = self.cfg, self.roles.student
        if not cfg.rolls:
            return DataSampler(student, cfg.schedule.levels if self.objective.on_policy else ())
        given = whole_chunks(student, self.data.given)
        if cfg.schedule.given_chunks != given:
            raise ValueError(
                f"schedule.given_chunks must be {given}: clips of {cfg.data} start from {self.data.given} given "
                f"latents, and the first chunk has {student.first_frame(1)}"
            )
        student.num_chunks(cfg.frames)
        picture = last_picture(self.load_codec()) if cfg.long_frames and cfg.codec else None
        dtype = working_dtype(cfg.precision, self.device)
        rollouts = LongRollout(student, cfg.schedule, cfg.long_frames, picture, dtype, cfg.prompt_switch)
        return OnPolicySampler(rollouts, cfg.replay, self.roles.teacher, self.teacher_noise)

    def batch(self, step: int, rows: slice = EVERY) -> Batch:
        """The global batch of a step, or these rows of it."""
        cfg = self.cfg
        if cfg.objective == "codec":
            return Batch(self.clips.frames(cfg.batch, cfg.frames, cfg.seed, step, rows))
        if cfg.objective == "regression":
            return self.clips.trajectories(cfg.batch, cfg.seed, step, rows)
        if isinstance(self.data, Prompts) and self.shape is not None:
            size = (self.shape.channels, self.shape.height, self.shape.width)
            return self.data.batch(cfg.batch, cfg.frames_at(step), size, cfg.seed, step, rows)
        return self.clips.latents(cfg.batch, cfg.frames_at(step), cfg.seed, step, rows)

    @property
    def rows(self) -> slice:
        """Rows of a batch that this process reads: its own, or all where a rollout is judged beside all clips."""
        if self.loss.invalid_weight < 1:
            return EVERY
        size = self.cfg.batch // self.parts[0].count
        return slice(self.parts[0].index * size, (self.parts[-1].index + 1) * size)

    def next_batch(self) -> Batch:
        """The rows of the batch of this step, read ahead where the config asks for it."""
        if self.coming is None or self.coming[0] != self.step_count:
            drawn = (self.cfg.turn(step, self.loss).drawn for step in itertools.count(self.step_count))
            self.coming = self.step_count, read_ahead(self.read_rows, drawn, self.cfg.loader_workers)
        batches = self.coming[1]
        self.coming = self.step_count + 1, batches
        return next(batches)

    def read_rows(self, step: int) -> Batch:
        return self.batch(step, self.rows)

    def micro_batch(self, whole: Batch, part: distributed.Part) -> Batch:
        """One part of the rows that this process has read, on its device."""
        recorded = (
            whole.x.to(self.device) if self.loss.invalid_weight < 1 else None
        )  # a rollout is judged beside all recorded clips
        own = part if self.rows == EVERY else distributed.Part(part.index - self.parts[0].index, len(self.parts))
        mine = replace(whole, x=own.rows(whole.x), cond=whole.cond.map(own.rows), whole=recorded)
        return mine.to(self.device)

    def step(self) -> dict[str, float]:
        """One update of student or critic; returns what to log."""
        turn = self.cfg.turn(self.step_count, self.loss)
        states, logs = self.trained(turn), []
        for state in states:
            state.zero_grad()
        whole, loss_of = self.next_batch(), self.objective.loss_of(turn.role)
        for sampler, part in zip(self.samplers, self.parts, strict=True):  # micro-batches
            last = part is self.parts[-1]
            distributed.sync_gradients([core(s.net) for s in states], last or self.cfg.gradient_sync == "micro_batch")
            batch = self.micro_batch(whole, part)
            size = len(batch.x)
            draws: AbstractContextManager[Any] = nullcontext()
            if self.cfg.draws == "row":
                turn = replace(turn, rows=(part.index * size, size))
            else:
                draws = part.draws(size)
            rng, waiting = turn.rng(), kept_on_host(self.cfg.offload, self.device)
            with autocast(self.cfg.precision, self.device, self.caching), draws, waiting:
                sample = sampler(batch, rng, turn)
                loss = loss_of(self.roles, sample.x0, sample.batch, turn.loss, rng)
                sampler.backward(loss.value, sample)
            logs.append(loss.numbers())
        return self.update(turn, states, distributed.mean(logs))

    def trained(self, turn: Turn) -> list[TrainState]:
        """What a turn updates; its norm is that of the first."""
        states = [self.student_state, self.motion] if turn.of_student else [self.critic]
        return [state for state in states if state is not None]

    @property
    def caching(self) -> bool:
        """Whether passes may share the cast of a weight: FSDP2 has collected its gradient by the second."""
        return self.cfg.parallel != "shard"

    def update(self, turn: Turn, states: list[TrainState], logs: dict[str, float]) -> dict[str, float]:
        """Clip and take the step along the gradients of all micro-batches and processes; returns what to log."""
        for state in states:
            distributed.mean_gradients(state.params, len(self.parts))
        norms = [state.clip(logs["loss"]) for state in states]  # all of them, before the first one moves
        for state in states:
            state.step()
        if turn.of_student and self.roles.motion is not None:
            self.roles.motion.follow()
        self.step_count += 1
        return {f"{turn.role}/{k}": v for k, v in {"loss": logs["loss"], "grad_norm": norms[0], **logs}.items()}

    def run(self) -> Path:
        """Train to the end, saving and logging on the way; returns the path of the exported weights.

        SIGTERM, SIGHUP and SIGINT end it after the present step with SystemExit 143, 129 or 130, the state saved.
        """
        self.lock = distributed.first_does(RunLock(self.folder).acquire)
        with ExitStack() as stack:
            if self.lock is not None:
                stack.callback(self.lock.release)
            interruption = stack.enter_context(Interruption())
            first = distributed.rank() == 0
            if first:
                sweep(self.folder, stale_s=0)  # nobody else writes here
            self.resume()
            if first:
                write_json(self.folder / "config.json", asdict(self.cfg))
                self.metrics_log.open(self.cfg.trackers, self.cfg.name, asdict(self.cfg), self.step_count)
                stack.callback(self.metrics_log.close)
            self.started = time.monotonic()
            with Bar(self.cfg.steps, self.cfg.name, "step", self.step_count, shown=first) as bar:
                self.loop(bar, interruption)
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
            self.export(BEST)
        self.student_state.swap_ema()
        if distributed.rank() == 0:
            self.metrics_log.write(
                {"step": self.step_count, watched.score.rpartition(":")[2]: score, "best_step": self.peak.step}
            )
        log.info("%s: %s %.4f, best %.4f at step %d", cfg.name, watched.score, score, self.peak.score, self.peak.step)

    def show(self) -> None:
        """Write a video of what the averaged network makes, and its weights, where this step is due."""
        cfg, at = self.cfg, self.step_count
        due = [bool(every and at % every == 0) for every in (cfg.sample_every, cfg.export_every)]
        if not any(due):
            return
        self.student_state.swap_ema()
        if due[0]:
            batch = self.batch(0).first(samples.CLIPS)
            if cfg.objective == "regression":
                batch = replace(batch, x=batch.x[:, -1])
            with autocast(cfg.precision, self.device, self.caching):
                latents = samples.sample_clips(self.roles.student, cfg, batch.to(self.device))
            if distributed.rank() == 0:
                fps = self.data.meta.get("fps", samples.FPS)
                shown = samples.write_samples(self.folder / SAMPLES, at, latents, self.load_codec(), fps)
                self.metrics_log.show(at, *shown)
        if due[1]:
            self.export(f"{Path(cfg.name).name}-{at}")
        self.student_state.swap_ema()

    def export(self, name: str) -> None:
        """Write the student's present weights into the run's folder."""
        net = self.weights()
        if isinstance(net, TinyCodec) and (self.cfg.renormalise or not self.cfg.init):  # else its latents are in use
            net = deepcopy(net)  # training goes on with its own latents
            net.normalise_on(self.normalisation_clips())
        if distributed.rank() == 0:
            checkpoint.export(self.folder / name, net, self.record(), EXPORTS[self.cfg.export_dtype])

    def loop(self, bar: Bar, interruption: Interruption) -> None:
        first = self.step_count
        while self.step_count < self.cfg.steps and not self.peak.done(self.cfg.validation.patience):
            try:
                self.metrics_log.add(self.step())
            except FloatingPointError as error:
                raise TrainingError(
                    f"{self.cfg.name}: not finite at step {self.step_count} ({error}); nothing was updated. The last "
                    f"checkpoint is {newest_state(self.folder) or 'none yet'}; lower optim.lr or optim.clip and run "
                    "the same command again"
                ) from error
            bar.update()
            if self.step_count % self.cfg.log_every == 0 or self.step_count == self.cfg.steps:
                speed = (time.monotonic() - self.started) / (self.step_count - first)
                row = {"step": self.step_count, "s_per_step": speed, **self.metrics_log.flush()}
                self.losses += [row["student/loss"]] if "student/loss" in row else []
                self.write_log(row)
            self.validate()
            self.show()
            ended = self.step_count == self.cfg.steps or self.peak.done(self.cfg.validation.patience)
            told = 0 if ended else interruption.agreed()
            if self.step_count % self.cfg.save_every == 0 or ended or told:
                self.save()
            if told:
                if distributed.rank() == 0:
                    name = signal.Signals(told).name
                    log.warning("%s: %s: saved at step %d, where it resumes", self.cfg.name, name, self.step_count)
                raise SystemExit(128 + told)

    def write_log(self, row: dict[str, float]) -> None:
        if distributed.rank():
            return
        self.metrics_log.write(row)
        left = (self.cfg.steps - self.step_count) * row["s_per_step"] / 60
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "step")
        log.info("%s %d/%d  %s  (%.0f min left)", self.cfg.name, self.step_count, self.cfg.steps, shown, left)

    def save(self) -> None:
        """Write the state of this step; what the folder held before stays until it is known to be whole."""
        distributed.first_does(self.check_lock)
        state = RunState(
            self.step_count,
            asdict(self.cfg),
            losses=tuple(self.losses),
            peak=self.peak,
            seconds=self.spent + time.monotonic() - self.started,
            **{name: state.updates for name, state in self.train_states.items()},
        )
        save_state(self.folder, self.train_states, state)

    def check_lock(self) -> None:
        if self.lock is not None:
            self.lock.check()

    def resume(self) -> None:
        """Go on from the last saved step of this run, if there is one."""
        path = newest_state(self.folder)
        if path is not None:
            state = load_state(path, self.train_states)
            now = json.loads(json.dumps(asdict(self.cfg)))
            changed = [k for k, v in state.config.items() if k in now and now[k] != v]
            if fixed := [k for k in changed if k in STARTS]:
                name, before = fixed[0], state.config[fixed[0]]
                raise ValueError(
                    f"{name} {now[name]!r} would change nothing: {path} started from {before!r}. Leave {name} as it "
                    "was, or choose another name="
                )
            self.step_count, self.spent, self.coming = state.step, state.seconds, None
            if (draws := state.config.get("draws", "batch")) != self.cfg.draws:
                log.info("%s goes on with draws=%s, as it began", self.cfg.name, draws)
                self.cfg = replace(self.cfg, draws=draws)
            self.losses, self.peak = list(state.losses), state.peak
            note = f"; changed since: {', '.join(changed)}" if changed else ""
            log.info("%s resumes at step %d%s", self.cfg.name, self.step_count, note)
        if distributed.rank() == 0:  # also where nothing was saved: the first rows come again
            self.metrics_log.trim(self.step_count)

    def finish(self) -> Path:
        """Export the averaged weights as a checkpoint that can be loaded by path, which is returned."""
        cfg = self.cfg
        path = self.folder / Path(cfg.name).name
        if self.peak.step and distributed.rank() == 0:
            for suffix in (".safetensors", ".json"):
                best, out = (checkpoint.with_extension(p, suffix) for p in (self.folder / BEST, path))
                write_atomic(out, partial(shutil.copyfile, best))
        if self.peak.step:
            return checkpoint.with_extension(path, ".safetensors")
        self.student_state.swap_ema()
        self.export(path.name)
        self.student_state.swap_ema()
        return checkpoint.with_extension(path, ".safetensors")

    def weights(self) -> nn.Module:
        """The student in whole, plain weights on rank 0."""
        return networks.whole_weights(self.roles.student, self.cfg.lora, self.cfg.name)

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
            "hours": round((self.spent + time.monotonic() - self.started) / 3600, 3),
            "commit": checkpoint.git_commit(),
            "recipe": recipe(cfg),
            "train": asdict(cfg),
        }
        chosen = self.held.origin if self.held and self.peak.step else None
        card["chosen_on"] = dict(chosen) if chosen else "nothing: the last step is kept"
        if cfg.objective == "codec":
            return {"card": card}
        assert self.shape is not None
        meta = self.data.meta
        world: dict[str, Any] = {k: meta[k] for k in ("fps", "actions", "keys", "px_size", "temporal") if k in meta}
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
            "image": meta.get("image"),
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
