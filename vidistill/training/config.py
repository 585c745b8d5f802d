"""The config of one training stage, and which of its settings can work together."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vidistill import config, distributed
from vidistill.codecs.tiny import TinyCodecConfig
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import ACTION_SITE, AUDIO_SITE, POSE_SITE, check_pictured, is_shown
from vidistill.data.prompts import PROMPTS, check_shown
from vidistill.diffusion import AnyGenerator, RowGenerator, derived_seed
from vidistill.models.layers import DiTConfig
from vidistill.models.lora import LoraConfig
from vidistill.models.student import StudentConfig
from vidistill.ops.attention import BACKENDS
from vidistill.ops.precision import DTYPES, PRECISIONS
from vidistill.schedules import ScheduleConfig
from vidistill.training.losses import OBJECTIVES, LossConfig
from vidistill.training.optim import EMA_WARMUP, OptimConfig
from vidistill.training.trackers import TRACKERS
from vidistill.training.validation import MAX_SEED, ValidationConfig

EXPORTS = {"fp16": torch.float16, **DTYPES}
CHOICES: Mapping[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "parallel": distributed.PARALLEL,
    "precision": PRECISIONS,
    "teacher_precision": DTYPES,
    "export_dtype": EXPORTS,
    "gather": DTYPES,
    "gradient_sync": ("micro_batch", "step"),
    "draws": ("row", "batch"),
    "backend": ("auto", *BACKENDS),
}
UNSEEN = ("out", "threads", "loader_workers", "log_every", "sample_every", "export_every", "trackers")  # by weights
EVERY = ("log_every", "save_every")
COUNTS = ("steps", "batch", "accumulate", "sequence", "frames", "critic_steps", "critic_reuse", *EVERY)
OPTIONS = ("episodes", "threads", "seed", "critic_warmup", "ema_start", "long_frames", "loader_workers", "shard_group")
SOMETIMES = ("sample_every", "export_every")
LEAST = {**dict.fromkeys((*COUNTS, "ema_warmup"), 1), **dict.fromkeys((*OPTIONS, *SOMETIMES, "init_plateau"), 0)}


@dataclass(frozen=True)
class Turn:
    """One update: all that its number alone decides, so that a resumed run repeats it."""

    step: int
    role: str  # whose turn it is: student or critic
    drawn: int  # step whose batch and rollout it learns from: its own, or that of a critic turn before it
    shared: bool  # whether later critic turns may learn from the same rollout
    restart: bool  # whether a stream starts anew
    loss: LossConfig
    seed: int
    rows: tuple[int, int] | None = None  # first and number of the rows that draw for themselves; None: all as one

    @property
    def of_student(self) -> bool:
        return self.role == "student"

    def rng(self, step: int | None = None) -> AnyGenerator:
        """Fresh randomness of this turn, or of the turn at `step`."""
        rng = torch.Generator().manual_seed(derived_seed(self.seed, self.step if step is None else step))
        return RowGenerator(rng, *self.rows) if self.rows else rng


@dataclass(frozen=True)
class TrainConfig:
    """One stage. `init` names the checkpoint the student starts from, `teacher` what it learns from; both are optional.

    Either may also be a published network: a folder in diffusers' or Wan's own layout, or hf://ORG/NAME. A student
    without `init` starts from the teacher. For objectives that score the student's own rollouts (dmd, sid): `on_policy`
    false takes its predictions from noised real latents instead (CausVid); `replay` runs the rollout again chunk by
    chunk for its gradient, so that peak memory is one chunk's; `long_frames` continues one stream from step to step up
    to so many latents. A stream restarts after every save: what a step sees depends on its number alone.
    """

    name: str
    objective: str
    data: str
    episodes: int = 0  # use only this many episodes; 0: all
    steps: int = 1000
    batch: int = 16  # clips of one update, of all processes and micro-batches together
    accumulate: int = 1  # micro-batches an update
    parallel: str = "replicate"  # under torchrun: every process has whole networks, or its `shard` of them (FSDP2)
    sequence: int = 1  # under torchrun: so many processes share the tokens of every frame, and work on the same clips
    offload: bool = False  # inputs of recomputed blocks (dit.checkpoint) wait in host memory for their backward pass
    gather: str = "fp32"  # of shards: the precision that weights are gathered in, fp32 or bf16
    draws: str = "row"  # random numbers: every row's its own, or those of the whole `batch`, as runs once did
    loader_workers: int = 0  # processes that read coming batches; 0: this one, when it needs them
    shard_group: int = 0  # of shards: so many processes hold one copy of the weights (HSDP); 0: all of them
    gradient_sync: str = "micro_batch"  # of shards: when gradients are summed; once a `step` keeps whole ones
    frames: int = 22  # latent frames of a clip (pixel frames for a codec)
    curriculum: tuple[tuple[int, int], ...] = ()  # (step, frames): clips of so many latents from this step on
    seed: int = 0
    init: str | None = None
    teacher: str | None = None
    codec: str | None = None  # name of the codec whose latents the data holds
    latent_size: tuple[int, int] = (0, 0)  # height and width of latents, where the data are prompts alone
    reference: bool = False  # tell the networks the clip's first picture at every frame (condition channels)
    curate: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # measure -> what it may be of a clip
    init_plateau: float = 0.0  # refuse an `init` whose loss still fell by more than this share; 0: any will do
    validation: ValidationConfig = ValidationConfig()
    camera: CameraConfig | None = None  # tell the networks camera moves (site `hidden`) and poses (site `qk`)
    codec_config: TinyCodecConfig = TinyCodecConfig()
    renormalise: bool = False  # measure a codec's latents anew although it has an `init`: nothing uses the old ones
    dit: DiTConfig = DiTConfig()
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = OptimConfig()
    critic_optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()  # of the student; its export is plain weights
    critic_lora: LoraConfig = LoraConfig()
    critic_init: str | None = None  # default: the teacher
    critic_steps: int = 5  # critic updates per student update
    critic_reuse: int = 1  # of which so many in a row learn from one rollout, at other noise levels
    critic_warmup: int = 0  # critic updates before the first student update
    on_policy: bool = True
    replay: bool = False
    long_frames: int = 0  # latents of a stream; 0: every rollout is a clip of `frames` latents
    prompt_switch: float = 0.0  # share of streams that switch to another prompt, memory written again under it
    ema: float = 0.999
    ema_start: int = 0  # student updates before which the average is a copy
    ema_warmup: float = EMA_WARMUP  # decay (1 + n) / (ema_warmup + n) at update n, at most ema; 1: ema, as published
    export_dtype: str = "fp16"  # of finished weights: fp16, bf16 or fp32
    precision: str = "fp32"  # or bf16, or auto: bf16 where the hardware multiplies it
    teacher_precision: str = "fp32"  # of the frozen teacher's weights
    backend: str = "auto"  # attention: auto or a key of ops.attention.BACKENDS
    compile: bool = False  # torch.compile the blocks around their attention
    threads: int = 0  # 0: all
    out: str = "runs"
    log_every: int = 20
    save_every: int = 200
    sample_every: int = 0  # steps between videos of the averaged network's clips, in samples/; 0: none
    export_every: int = 0  # steps between exports of averaged weights, as NAME-STEP; 0: the last one alone
    trackers: tuple[str, ...] = ()  # who is told of the run beside metrics.jsonl: tensorboard, trackio, wandb

    def __post_init__(self) -> None:
        self.check_values()
        self.check_parts()
        self.check_policy()
        self.check_curriculum()

    def check_values(self) -> None:
        """Raise ValueError for a value that no stage can have."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {sorted(known)}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if unknown := set(self.trackers) - set(TRACKERS):
            raise ValueError(f"trackers {sorted(unknown)} are unknown; choose from {sorted(TRACKERS)}")
        if not self.name.strip("./") or not 0 <= self.ema < 1:
            raise ValueError(f"a stage needs a name and ema in [0, 1), got {self.name!r} and {self.ema}")
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts or "\0" in self.name:
            raise ValueError(f"name {self.name!r} leads out of the folder `out`: set out= for another place")
        if self.seed >= MAX_SEED:
            raise ValueError(f"seed must be below 2**53, got {self.seed}")

    def check_parts(self) -> None:
        """Raise ValueError where settings of networks, processes and reports cannot work together."""
        if self.teacher_precision == "bf16" and self.precision != "bf16":
            raise ValueError("a teacher in bf16 needs precision=bf16 around it")
        if self.gather == "bf16" and self.precision != "bf16":
            raise ValueError("weights gathered in bf16 need precision=bf16 around them; set gather=fp32")
        if self.parallel == "shard" and (self.objective == "codec" or self.optim.muon or self.critic_optim.muon):
            raise ValueError("parallel=shard is for transformers and AdamW; clear optim.muon or set parallel=replicate")
        if self.shard_group and self.parallel != "shard":
            raise ValueError(f"shard_group {self.shard_group} is of shards: set parallel=shard, or leave it 0")
        if self.objective == "codec" and self.sequence > 1:
            raise ValueError("a codec has no tokens to share; set sequence=1")
        if self.offload and not self.dit.checkpoint:
            raise ValueError("offload=true is for the inputs of recomputed blocks; set dit.checkpoint=true")
        if self.objective == "codec" and (self.lora.rank or self.compile):
            raise ValueError("a codec has no blocks to adapt or compile; set lora.rank=0 and compile=false")
        if self.sample_every and (self.objective == "codec" or not self.codec):
            raise ValueError("sample_every shows decoded clips: set `codec`, and leave it 0 for objective 'codec'")
        if self.init_plateau and not self.init:
            raise ValueError(f"init_plateau {self.init_plateau} asks about an `init`: name one, or leave it 0")
        if self.validation.every and self.save_every % self.validation.every:
            raise ValueError(f"save_every {self.save_every} must be whole validation.every {self.validation.every}")

    @property
    def rolls(self) -> bool:
        """Whether the student's own rollouts are what the stage learns from."""
        return OBJECTIVES[self.objective].on_policy and self.on_policy

    def frames_at(self, step: int) -> int:
        """Latent frames of the clips of a step."""
        return next((frames for first, frames in reversed(self.curriculum) if step >= first), self.frames)

    def is_student_turn(self, step: int) -> bool:
        """Whether a step updates the student: alone, or after `critic_steps` updates of the critic.

        The critic must know the samples of the student as it is now, or its score pulls towards an older one.
        """
        late = step - self.critic_warmup
        return OBJECTIVES[self.objective].critic is None or (late >= 0 and late % (self.critic_steps + 1) == 0)

    def turn(self, step: int, loss: LossConfig) -> Turn:
        """What the update at `step` is."""
        of_student, late = self.is_student_turn(step), step - self.critic_warmup
        since = step if late < 0 else late % (self.critic_steps + 1) - 1  # critic updates since the student moved
        return Turn(
            step,
            "student" if of_student else "critic",
            step if of_student else step - since % self.critic_reuse,
            shared=not of_student and self.critic_reuse > 1,
            restart=step % self.save_every == 0,  # a state holds no memory of a stream
            loss=loss.at(step),
            seed=self.seed,
        )

    def check_curriculum(self) -> None:
        """Raise ValueError unless the curriculum rises in steps and ends with clips of `frames`."""
        steps = [step for step, _ in self.curriculum]
        lengths = [frames for _, frames in self.curriculum]
        if self.curriculum and (steps[0] != 0 or steps != sorted(set(steps)) or min(lengths) < 2):
            raise ValueError(f"curriculum lists (step, frames), from step 0 on, rising; got {list(self.curriculum)}")
        if self.curriculum and (lengths[-1] != self.frames or max(lengths) > self.frames or self.long_frames):
            raise ValueError(
                f"curriculum must end with the longest clips, of `frames` {self.frames} latents, and goes without "
                f"long_frames; got {list(self.curriculum)}"
            )

    def check_policy(self) -> None:
        """Raise ValueError where settings of student rollouts cannot work together."""
        if OBJECTIVES[self.objective].on_policy and not self.teacher:
            raise ValueError(f"objective {self.objective!r} needs a `teacher`")
        if self.objective != "dmd" and (self.loss.motion or self.loss.needs_target or self.loss.forcing):
            raise ValueError(
                f"loss.motion, motion_head, regression and forcing belong to objective 'dmd', not {self.objective!r}"
            )
        if self.loss.needs_target and not self.on_policy:
            raise ValueError("loss.regression and motion_head compare rollouts with the teacher's: set on_policy=true")
        if self.loss.forcing and self.long_frames:
            raise ValueError("loss.forcing learns from recorded clips, not from streams that go on: set long_frames=0")
        if (self.validation.every or self.validation.diagnose_every) and not self.rolls:
            raise ValueError(f"validation looks at rollouts; objective {self.objective!r} here trains on data")
        if self.loss.invalid_weight < 1 and (not self.rolls or self.objective != "dmd" or self.long_frames):
            raise ValueError(
                "loss.invalid_weight compares rollouts of objective dmd with recorded clips, without long_frames"
            )
        if (self.replay or self.long_frames) and not self.rolls:
            raise ValueError(f"replay and long_frames need rollouts; objective {self.objective!r} here trains on data")
        memory = self.student.memory
        if self.long_frames and not (self.frames <= self.long_frames and self.schedule.name == "chunkwise"):
            raise ValueError(f"long_frames {self.long_frames} must be at least frames {self.frames}, chunk by chunk")
        if self.long_frames and self.frames <= self.student.chunk:
            raise ValueError(
                f"long_frames need clips longer than a chunk of {self.student.chunk}, frames is {self.frames}"
            )
        if self.long_frames and self.camera and POSE_SITE in self.camera.sites:
            raise ValueError(
                "long_frames goes on with the actions of another clip, whose poses begin elsewhere: tell no poses "
                "(camera.sites without qk), or leave long_frames 0 and roll out longer clips"
            )
        if not 0 <= self.prompt_switch <= 1 or (self.prompt_switch and self.long_frames < 2 * self.frames):
            raise ValueError(
                f"prompt_switch {self.prompt_switch} is a share (0 to 1) of streams that go on: set long_frames to at "
                f"least twice frames, {2 * self.frames}"
            )
        if self.critic_reuse > 1 and (self.long_frames or not self.rolls):
            raise ValueError("critic_reuse is for rollouts of whole clips: leave it 1 with long_frames or without them")
        if self.rolls and (length := self.long_frames or self.frames) > memory.reach:
            raise ValueError(
                f"rollouts of {length} latents do not fit student.memory, which holds {memory.reach} and forgets none; "
                "set student.memory.policy=window (endless for a compressed one), or give it more frames"
            )
        masked = self.loss.forcing or not (self.rolls or self.objective in ("codec", "flow"))
        if memory.remembers and memory.pool == "reencode" and masked:
            raise ValueError(
                "student.memory.pool 'reencode' encodes finished frames a second time, which a clip seen in one pass "
                "(teacher or diffusion forcing, regression) cannot do; choose another pool here"
            )


def recipe(cfg: TrainConfig) -> str:
    """A hash of everything a stage is told that its outcome depends on: of its YAML, if nothing was replaced."""
    told = {name: value for name, value in config.differences(cfg).items() if name not in UNSEEN}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_network(cfg: TrainConfig, source: Any, size: tuple[int, int, int], name: str, dit: DiTConfig) -> None:
    """Raise ValueError unless a network takes the latents (channels, height, width) and conditions of `source`."""
    data, (channels, height, width) = cfg.data, size
    if dit.channels != channels or height % dit.patch[1] or width % dit.patch[2]:
        raise ValueError(
            f"{name} takes latents of {dit.channels} channels in patches of {dit.patch[1:]}, {data} holds "
            f"{channels} x {height} x {width}"
        )
    wanted = dit.sites[ACTION_SITE].dim if ACTION_SITE in dit.sites else 0
    if wanted and wanted != source.width_of("actions"):
        raise ValueError(f"{name} takes actions of {wanted} numbers, {data} has {source.width_of('actions')}")
    if dit.told_width and dit.told_width != source.width_of("tokens"):
        raise ValueError(
            f"{name} listens to text, {dit.told_width} numbers a token; {data} has {source.width_of('tokens')}: "
            "make it with `vidistill data prompts`, or from such a folder"
        )
    if cfg.prompt_switch and not dit.text_dim:
        raise ValueError(f"prompt_switch {cfg.prompt_switch} is for networks that listen to text; {name} does not: 0")
    heard = source.width_of("audio")
    if heard and (AUDIO_SITE not in dit.sites or dit.sites[AUDIO_SITE].dim != heard):
        raise ValueError(f"{name} needs dit.sites.{AUDIO_SITE} with dim {heard}: the audio of {data}")
    check_pictured(name, channels, dit.extra_channels, dit.image_dim)
    check_shown(name, dit, source)
    if is_shown(channels, dit.extra_channels):
        if cfg.long_frames:
            raise ValueError("long_frames goes on with the conditions of another clip, which starts from a picture: 0")
        if OBJECTIVES[cfg.objective].critic and source.kind != PROMPTS:
            raise ValueError(
                f"objective {cfg.objective!r} guides {name} against the negative prompt of a picture: set data to a "
                "folder of `vidistill data pictures`"
            )
    camera = cfg.camera
    for site, dim in ({} if camera is None else camera.dims).items():
        if site not in dit.sites or dit.sites[site].dim != dim:
            raise ValueError(f"{name} needs dit.sites.{site} with dim {dim} for the camera of this stage")
