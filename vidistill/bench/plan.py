"""What a stage takes at its true size: its networks, and the bytes that each GPU holds at the peak of a step."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from vidistill import checkpoint
from vidistill.bench import cost, step_time
from vidistill.bench.passes import Passes, kept_bytes, live_bytes
from vidistill.conditioning.condition import Condition, branches
from vidistill.data import clips, shards
from vidistill.data import prompts as prompts_module
from vidistill.diffusion import LatentShape
from vidistill.memory.policies import MemoryConfig
from vidistill.memory.pooling import num_cells
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import NO_GRID, DiTConfig
from vidistill.models.lora import LoraConfig
from vidistill.models.student import CausalStudent
from vidistill.ops.precision import DTYPES, working_dtype
from vidistill.ops.sequence import SequenceGroup
from vidistill.schedules import training
from vidistill.teachers.wan import architecture, parts_in
from vidistill.training.config import TrainConfig
from vidistill.training.losses import OBJECTIVES

RESERVED = 0.08  # share of a GPU that its context, communication and fragments take
DOUBLED = ("teacher_forcing", "regression")  # the clean clip rides along


@dataclass(frozen=True)
class Role:
    """A network of the stage: where it is from, how that is known, its true architecture, how many take turns."""

    source: str
    known: str
    dit: DiTConfig
    experts: int = 1


def roles_of(cfg: TrainConfig) -> dict[str, Role]:
    """The networks of a stage by role."""
    roles = {"student": role(cfg.init or cfg.teacher, cfg.dit)}
    if OBJECTIVES[cfg.objective].critic is not None:
        roles["teacher"] = role(cfg.teacher, cfg.dit)
        roles["critic"] = role(cfg.critic_init or cfg.teacher, cfg.dit)
    return roles


def role(name: str | None, fallback: DiTConfig) -> Role:
    """What is known of network `name` without its weights; `fallback` if it is not here and its name says nothing."""
    if name is None:
        return Role("", "new", fallback)
    if checkpoint.is_published(name) and Path(name).is_dir():
        first, *others = parts_in(Path(name), name)
        return Role(name, "read from its folder", architecture(first), 1 + len(others))
    if network := cost.network_called(name):
        return Role(name, f"not here, {network} by its name", cost.NETWORKS[network], cost.experts_called(name))
    try:
        record = checkpoint.read_record(checkpoint.locate(name))
    except checkpoint.CheckpointError:
        return Role(name, "not here, taken for the `dit` of the config", fallback)
    return Role(name, "read from its record", checkpoint.parse(record, name).dit or fallback)


def network_cost(cfg: TrainConfig, name: str, r: Role) -> dict[str, Any]:
    """Parameters of a network, how many of them train, and bytes of weights, gradients, optimiser and average."""
    total, lora = r.experts * cost.parameters(r.dit), lora_of(cfg, name)
    trained = 0 if name == "teacher" else adapters(r.dit, lora) if lora.rank else total
    state = trained * (4 + 8 + 4 * (name == "student" and cfg.ema > 0))  # gradient, two moments of AdamW, average
    size = working_dtype(cfg.teacher_precision).itemsize if name == "teacher" else 4
    return {
        "source": r.source,
        "known": r.known,
        "parameters": total,
        "trained": trained,
        "weight_bytes": size * (total + (trained if lora.rank else 0)),
        "training_bytes": state,
    }


def lora_of(cfg: TrainConfig, name: str) -> LoraConfig:
    return {"student": cfg.lora, "critic": cfg.critic_lora}.get(name, LoraConfig())


def adapters(dit: DiTConfig, lora: LoraConfig) -> int:
    """Parameters of the low-rank adapters of a network."""
    with torch.device("meta"):
        linears = {n: m for n, m in VideoDiT(dit).named_modules() if isinstance(m, nn.Linear)}
    adapted = [m for n, m in linears.items() if re.fullmatch(lora.targets, n)]
    return sum(lora.rank * (m.in_features + m.out_features) for m in adapted)


def latent_size(cfg: TrainConfig, dit: DiTConfig) -> tuple[int, int] | None:
    """Height and width of the stage's true latents, where something says so."""
    if all(cfg.latent_size):
        return cfg.latent_size
    if (Path(cfg.data) / shards.META).is_file():
        source = prompts_module.open_data(cfg.data)
        if isinstance(source, clips.Clips):
            return source.latent_size[1:]
    return (dit.grid[0] * dit.patch[1], dit.grid[1] * dit.patch[2]) if dit.grid != NO_GRID else None


# --- bytes of a step --------------------------------------------------------------------------------------------------


class Planner:
    """Counts what a step takes, under any settings that leave the networks of the stage as they are."""

    def __init__(self, roles: Mapping[str, Role], size: tuple[int, int]) -> None:
        self.roles, self.size = roles, size

    def passes(self, cfg: TrainConfig, name: str, frames: int, **more: Any) -> Passes:
        """Passes of a role as the stage runs it: a teacher's weights are frozen, and its blocks not recomputed."""
        dit, frozen = self.roles[name].dit, name == "teacher"
        dit = dit.extend(cfg.dit) if name == "student" else dit
        return Passes(
            replace(dit, checkpoint=cfg.dit.checkpoint and not frozen),
            self.size,
            frames,
            frozen=frozen,
            dtype=DTYPES[cfg.teacher_precision if frozen else "fp32"],
            precision=precision_of(cfg),
            cached=cfg.parallel != "shard",
            offload=cfg.offload,
            **more,
        )

    def kept(self, p: Passes) -> int:
        """`kept_bytes`, counted for one and for two passes: all others cost what the second does."""
        one = kept_bytes(replace(p, count=1))
        if p.count == 1:
            return one
        two = kept_bytes(replace(p, count=2))
        return one + (p.count - 1) * (two - one)

    def work(self, cfg: TrainConfig, name: str, frames: int, grad: bool = True) -> int:
        """Bytes that a pass of a role works with beside what it keeps: those of one block."""
        p = replace(self.passes(cfg, name, frames), grad=grad, frozen=False, offload=False)
        one = replace(p, dit=replace(p.dit, layers=1, sites={}, fov=0.0, checkpoint=True))
        return live_bytes(one)[1]

    def scores(self, cfg: TrainConfig) -> int:
        """Bytes that the largest pass of a score without gradient works with, guidance's branches at once."""
        guided = branches(Condition(), cfg.loss.guidance, cfg.loss.audio_guidance)[0]
        sizes = {name: self.work(cfg, name, cfg.frames, grad=False) for name in ("teacher", "critic")}
        return max((1 + len(guided)) * sizes["teacher"], sizes["critic"])

    def phases(self, cfg: TrainConfig) -> dict[str, dict[str, int]]:
        """Bytes of one clip in each phase of a step: what is remembered, kept for a backward pass, worked with."""
        clip, found = cfg.frames, dict[str, dict[str, int]]()
        if cfg.rolls:
            run = self.rollout(cfg)
            memory, graph = run["memory"], run["graph"] + run["history"]
            chunk = [self.work(cfg, "student", cfg.student.chunk, grad) for grad in (False, True)]
            found["rollout"] = {"memory": memory * (2 if cfg.replay else 1), "kept": 0, "work": chunk[0]}
            found["student"] = {"memory": memory, "kept": graph, "work": max(chunk[1], self.scores(cfg))}
        else:
            frames = seen_frames(cfg)
            work = self.work(cfg, "student", frames)
            scored = OBJECTIVES[cfg.objective].on_policy
            kept = self.kept(self.passes(cfg, "student", frames))
            found["student"] = {"memory": 0, "kept": kept, "work": max(work, self.scores(cfg)) if scored else work}
        if cfg.objective == "sid":  # gradient runs through both scores
            student = found["student"]
            student["kept"] += sum(self.kept(self.passes(cfg, name, clip)) for name in ("teacher", "teacher", "critic"))
            student["work"] = max(student["work"], self.work(cfg, "critic", clip))
        if cfg.loss.forcing:
            found["student"]["kept"] += self.kept(self.passes(cfg, "student", 2 * clip))
            found["student"]["work"] = max(found["student"]["work"], self.work(cfg, "student", 2 * clip))
        if "critic" in self.roles:
            stream = found["rollout"]["memory"] if cfg.long_frames else 0
            kept = self.kept(self.passes(cfg, "critic", clip))
            found["critic"] = {"memory": stream, "kept": kept, "work": self.work(cfg, "critic", clip)}
        return found

    def rollout(self, cfg: TrainConfig) -> dict[str, int]:
        """Passes of a rollout, those with gradient at once, and bytes of its memory, history copies and graph."""
        dit, memory, item = self.roles["student"].dit, cfg.student.memory, DTYPES[precision_of(cfg)].itemsize
        shape = LatentShape(cfg.frames, dit.channels, *self.size, dit.patch)
        with torch.device("meta"):
            student = CausalStudent(VideoDiT(replace(dit, layers=1)), cfg.student, shape)
        passes = list(training(cfg.schedule, student.num_chunks(cfg.frames), Random(cfg.seed)))
        late = max(0, cfg.long_frames - cfg.frames)  # a stream that goes on has a past throughout
        past = [
            past_tokens(memory, shape.grid, late + student.first_frame(p.chunk), cfg.student.chunk)
            for p in passes
            if p.grad
        ]
        count, copied = (1, max(past)) if cfg.replay else (len(past), sum(past))
        joined = 2 * dit.width * item  # keys and values of a token in a layer
        # a memory that fills every slot once lends views, which recomputed blocks join one at a time
        lent = cfg.dit.checkpoint and memory.policy == "full"
        graph = self.passes(cfg, "student", cfg.student.chunk, memory=cfg.student, count=count)
        return {
            "passes": len(passes),
            "at_once": count,
            "memory": memory.account(shape.grid, layers=dit.layers, width=dit.width, heads=dit.heads, itemsize=item)[
                "bytes"
            ],
            "history": joined * max(past) if lent else joined * copied * dit.layers,
            "graph": self.kept(graph),
        }

    def state(self, cfg: TrainConfig, gpus: int) -> dict[str, int]:
        """Bytes on each of so many GPUs, whatever is run: networks, optimisers, what sharded ones gather, a step."""
        split = gpus if cfg.parallel == "shard" else 1
        found, steps, units = {}, [0], [0]
        for name, r in self.roles.items():
            row = network_cost(cfg, name, r)
            found[name] = (row["weight_bytes"] + row["training_bytes"]) // split
            flat = gpus > 1 and cfg.parallel == "replicate"  # gradients are added up in one piece
            steps.append((4 + 4 * flat) * row["trained"] // split)
            one, two = (cost.parameters(replace(r.dit, layers=n)) for n in (1, 2))
            size = working_dtype(cfg.teacher_precision).itemsize if name == "teacher" else 4
            units.append(size * (2 * one - two + 3 * (two - one)))  # the ends, two blocks, a gradient
        return {**found, "gathered": max(units) if split > 1 else 0, "optimiser step": max(steps)}

    def plan(self, cfg: TrainConfig, gpus: int, gpu_memory: float) -> dict[str, Any]:
        """Bytes on each GPU at the peak of a step, and whether they fit `gpu_memory` GB, with the fewest micro-batches
        (`accumulate`, at least the stage's own) that fit. ValueError where batch, heads or tokens cannot be split so.
        """
        groups, rest = divmod(gpus, cfg.sequence)
        if rest:
            raise ValueError(f"sequence {cfg.sequence} does not divide {gpus} GPUs: give a multiple of it")
        check_sequence(cfg, self.roles, self.size)
        if cfg.batch % (groups * cfg.accumulate):
            raise ValueError(
                f"batch {cfg.batch} cannot be split among {groups} groups of GPUs x accumulate {cfg.accumulate}: "
                f"choose a multiple of {groups * cfg.accumulate}"
            )
        state, share = self.state(cfg, gpus), cfg.batch // groups
        phases = {name: {k: v // cfg.sequence for k, v in row.items()} for name, row in self.phases(cfg).items()}
        clip = max(sum(row.values()) for row in phases.values())
        base = sum(bytes_ for name, bytes_ in state.items() if name not in ("gathered", "optimiser step"))
        usable = (1 - RESERVED) * gpu_memory * 1e9

        def peak(accumulate: int) -> int:
            return base + max(state["optimiser step"], state["gathered"] + share // accumulate * clip)

        choices = [a for a in range(cfg.accumulate, share + 1) if share % a == 0]
        accumulate = next((a for a in choices if peak(a) <= usable), choices[-1])
        return {
            "gpus": gpus,
            "gpu_memory_gb": gpu_memory,
            "usable_bytes": int(usable),
            "accumulate": accumulate,
            "clips_at_once": share // accumulate,
            "state_bytes": state,
            "clip_bytes": phases,
            "peak_bytes": peak(accumulate),
            "fits": peak(accumulate) <= usable,
        }

    def remedies(self, cfg: TrainConfig, gpus: int, gpu_memory: float) -> Iterator[str]:
        """Settings, and numbers of GPUs, with which a stage that does not fit does: the first of each kind."""
        exact: dict[str, Any] = {"parallel": "shard", "dit.checkpoint": True}  # what is learned stays the same
        exact |= {"replay": True} if cfg.rolls and not cfg.long_frames else {}
        exact |= {"teacher_precision": "bf16"} if cfg.precision == "bf16" and "teacher" in self.roles else {}
        lora = {"lora.rank": 256} | ({"critic_lora.rank": 256} if "critic" in self.roles else {})
        shorter = cfg.frames // 2 // cfg.student.chunk * cfg.student.chunk + cfg.student.first_chunk
        shared: list[dict[str, Any]] = [{"sequence": n} for n in (2, 4, 8)]
        kinds: list[list[tuple[dict[str, Any], int]]] = [
            [({}, gpus), ({"offload": True}, gpus)],
            [(change, gpus) for change in shared],
            [(change, n * gpus) for n in (2, 4, 8) for change in ({}, *shared)],
            [({**lora, **change}, gpus) for change in ({}, *shared)],
            [({"frames": shorter, "curriculum": (), **change}, gpus) for change in ({}, *shared)],
        ]
        for kind in kinds:
            yield from islice(filter(None, (self.fitting(cfg, {**exact, **c}, n, gpu_memory) for c, n in kind)), 1)

    def fitting(self, cfg: TrainConfig, change: Mapping[str, Any], gpus: int, gpu_memory: float) -> str:
        """Words for the settings of `change` with which the stage fits; "" where it does not."""
        wanted = {key: value for key, value in change.items() if value != value_of(cfg, key)}
        try:
            found = self.plan(changed(cfg, wanted), gpus, gpu_memory)
        except ValueError:
            return ""
        words = [f"{key}={str(value).lower()}" for key, value in wanted.items() if value != ()]
        return " ".join([*words, f"accumulate={found['accumulate']}", f"on {gpus} GPUs"]) if found["fits"] else ""


def checked(cfg: TrainConfig, roles: Mapping[str, Role], gpus: int, gpu_memory: float) -> dict[str, Any]:
    """The plan of a stage; ValueError, which says what would fit, where these GPUs cannot hold it."""
    size = latent_size(cfg, roles["student"].dit) if roles else None
    if size is None:
        raise ValueError(f"{cfg.name} cannot be planned: nothing says the size of its latents; set latent_size")
    planner = Planner(roles, size)
    found = planner.plan(cfg, gpus, gpu_memory)
    if not found["fits"]:
        fits = "; ".join(planner.remedies(cfg, gpus, gpu_memory)) or "nothing that was tried"
        raise ValueError(
            f"{cfg.name} takes {gb(found['peak_bytes'])} on each of {gpus} GPUs, a clip at a time, and "
            f"{gb(found['usable_bytes'])} of {gpu_memory:g} GB can be used. What fits: {fits}"
        )
    dits = {name: r.dit for name, r in roles.items()}
    return {**found, **step_time.estimate(cfg, dits, size, seen_frames(cfg), gpus)}


def true_size(cfg: TrainConfig, roles: Mapping[str, Role]) -> dict[str, Any]:
    """Tokens, passes, FLOPs and bytes of one clip at the size the stage is for; {} if nothing says its latents.

    Bytes are those of one of the processes that share the clip; ValueError unless their number divides it.
    """
    dit, size = roles["student"].dit, latent_size(cfg, roles["student"].dit)
    if size is None:
        return {}
    check_sequence(cfg, roles, size)
    planner, shape, memory = Planner(roles, size), LatentShape(cfg.frames, dit.channels, *size, dit.patch), cfg.student
    n, frames = shape.tokens_per_frame, memory.chunk if cfg.rolls else seen_frames(cfg)
    seen = min(memory.memory.tokens(shape.grid), cfg.frames * n) if cfg.rolls else cfg.frames * n
    kept = planner.kept(planner.passes(cfg, "student", frames, memory=memory if cfg.rolls else None))
    run = planner.rollout(cfg) if cfg.rolls else {}
    item = DTYPES[precision_of(cfg)].itemsize
    held = memory.memory.account(shape.grid, layers=dit.layers, width=dit.width, heads=dit.heads, itemsize=item)
    row: dict[str, Any] = {
        "latents": [cfg.frames, dit.channels, *size],
        "tokens_per_frame": n,
        "tokens_per_pass": frames * n,
        "flops_per_pass": sum(cost.pass_flops(dit, shape, frames, seen).values()),
        "activation_bytes_per_pass": kept / cfg.sequence,
        "recomputed_blocks": cfg.dit.checkpoint,
    }
    if run:
        row |= {"passes_per_rollout": run["passes"], "passes_with_gradient_at_once": run["at_once"]}
        row["history_bytes"] = run["history"] // cfg.sequence
    return row if cfg.objective == "flow" else {**row, "memory_bytes": held["bytes"] // cfg.sequence}


def check_sequence(cfg: TrainConfig, roles: Mapping[str, Role], size: tuple[int, int]) -> None:
    """ValueError unless so many processes can share the heads and tokens of every network."""
    for r in roles.values():
        tokens = size[0] // r.dit.patch[1] * (size[1] // r.dit.patch[2])
        SequenceGroup(None, 0, cfg.sequence).check(r.dit.heads, tokens)


def seen_frames(cfg: TrainConfig) -> int:
    """Latent frames of a pass over a recorded clip: twice as many where the clean clip rides along."""
    alone = cfg.objective == "regression" and cfg.loss.history == "noisy"
    return cfg.frames * (2 if cfg.objective in DOUBLED and not alone else 1)


def report(row: Mapping[str, Any], accumulate: int) -> list[str]:
    """What people read of a plan."""
    state = ", ".join(f"{name} {gb(size)}" for name, size in row["state_bytes"].items() if size)
    lines = [
        f"plan      {row['gpus']} GPUs of {row['gpu_memory_gb']:g} GB: {gb(row['peak_bytes'])} on each at the peak, "
        f"{row['clips_at_once']} clips at once with accumulate={row['accumulate']}"
        + (f" (the stage says {accumulate}: change it)" if row["accumulate"] != accumulate else ""),
        f"  always  {state}",
    ]
    for phase, sizes in row["clip_bytes"].items():
        lines.append(f"  {phase:8s}" + ", ".join(f"{name} {gb(size)}" for name, size in sizes.items()) + " a clip")
    if "hours" in row:
        lines.append(
            f"  time    about {row['seconds_per_step']:.3g} s a step, {row['hours']:.3g} hours, at "
            f"{row['utilisation']:.0%} of an H100's bfloat16 peak"
        )
    return lines


def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def precision_of(cfg: TrainConfig) -> str:
    """What products run in on a GPU, which multiplies bfloat16."""
    return "fp32" if cfg.precision == "fp32" else "bf16"


def past_tokens(memory: MemoryConfig, grid: tuple[int, int], start: int, own: int) -> int:
    """Tokens that a memory holds when a chunk of `own` frames starts at frame `start`."""
    window = min(start, memory.frames - own)
    older = min(start - window, memory.history) if memory.remembers else 0
    return window * grid[0] * grid[1] + sum(num_cells(grid, memory.factor(i)) for i in range(older))


def value_of(cfg: TrainConfig, key: str) -> Any:
    """The setting that a dotted key names."""
    value: Any = cfg
    for name in key.split("."):
        value = vars(value)[name]
    return value


def changed(cfg: Any, values: Mapping[str, Any]) -> Any:
    """`cfg` with the settings that dotted keys name replaced."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        cfg = replace(cfg, **{name: changed(vars(cfg)[name], {rest: value}) if rest else value})
    return cfg
