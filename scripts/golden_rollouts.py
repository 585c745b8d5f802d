"""Goldens of autoregressive inference: Self Forcing, LongLive, Diagonal Distillation and LiveTalk."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from golden import Golden
from golden_networks import network, text
from torch import Tensor
from wan_tables import Table, on_table

from vidistill.conditioning.condition import Condition, pack_audio
from vidistill.diffusion import LatentShape
from vidistill.interop.tables import diagonal_steps
from vidistill.memory.cache import KVMemory
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.rollout import reencode, rollout
from vidistill.schedules import Pass, ScheduleConfig, chunk_passes, context_pass

OVERSIZED_SINK = (
    "LongLive sink larger than a chunk: chunk 0 attends to unwritten slots, and sinks that a later chunk writes keep "
    "its pure-noise step"
)

SCHEDULED = ("call_timesteps", "call_start_frame", "call_num_frames", "denoising_step_list", "steps_per_block")
LAST_ENTRY = 1e-6  # a timestep of 0 in a step list is a step on the table's last entry, not the end of the list


class Whole(CausalStudent):
    """A student whose context passes compute their velocity as well: the originals logged it."""

    def velocity(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        *,
        start: int = 0,
        memory: KVMemory | None = None,
        output: bool = True,
    ) -> Tensor:
        return super().velocity(x, sigma, cond, start=start, memory=memory)


@dataclass
class Call:
    """One forward of the network, as the originals log it."""

    told: float
    start: int
    frames: int
    is_int: bool = False
    held: int = 0  # frames in memory after it
    recache: bool = False
    resets_sink: bool = False
    grad: bool = False
    x: Tensor | None = None
    v: Tensor | None = None
    x0: Tensor | None = None


@dataclass
class Run:
    """A variant while it runs: what was generated so far, the calls, the prompt in force."""

    golden: Golden
    name: str
    variant: dict[str, Any]
    student: CausalStudent
    memory: KVMemory
    table: Table
    conds: list[Condition]
    told: list[tuple[float, ...]]  # timesteps of chunk 0, 1, ...; the last list repeats
    integer: list[bool]  # whether the original's timesteps of those lists are Python integers
    segment: int = 0
    calls: list[Call] = field(default_factory=list)
    finished: list[Tensor] = field(default_factory=list)
    recached: int = 0

    def cond(self, start: int, stop: int) -> Condition:
        return self.conds[self.segment].frames(start, stop)

    def steps(self, generated: int) -> tuple[float, ...]:
        return self.told[min(generated, len(self.told) - 1)]

    def watch(self) -> None:
        """Log every forward of the network."""

        def hook(_net: Any, args: tuple, kw: dict, out: Tensor) -> None:
            x, sigma = args[0], args[1]
            told = float(sigma[0, -1]) * 1000
            x0 = self.table.x0(x, out, sigma * 1000)
            call = Call(told, int(kw["start"]), x.shape[1], x=x.detach(), v=out.detach(), x0=x0.detach())
            call.grad = torch.is_grad_enabled()
            self.calls.append(call)

        self.student.net.register_forward_hook(hook, with_kwargs=True)

    def compare_calls(self) -> None:
        golden, name, calls = self.golden, self.name, self.calls
        logs: dict[str, list] = {
            "call_timesteps": [c.told for c in calls],
            "call_start_frame": [c.start for c in calls],
            "call_num_frames": [c.frames for c in calls],
            "call_timestep_is_int": [int(c.is_int) for c in calls],
            "call_global_end_frame": [c.start + c.frames for c in calls],
            "call_local_end_frame": [c.held for c in calls],
            "call_sink_recache": [int(c.resets_sink) for c in calls],
            "call_grad_enabled": [int(c.grad) for c in calls],
        }
        for log, values in logs.items():
            golden.compare(f"{name}.{log}", values)
        for i, call in enumerate(calls):
            for prefix in (f"{name}.call{i}", f"{name}.call.{i}"):
                golden.compare(f"{prefix}.input", call.x)
                golden.compare(f"{prefix}.flow", call.v)
                golden.compare(f"{prefix}.x0", call.x0)

    def compare_memory(self, label: str) -> None:
        """The first layer's cache in order of frames, in the shape it was recorded in."""
        unrotated = bool(self.variant.get("use_infinite_attention", self.golden.config.get("use_infinite_attention")))
        keys, values, frames = self.memory.entries(0, unrotated=unrotated)
        end = torch.tensor([self.memory.next_frame, len(frames)]) * self.memory.tokens_per_frame
        for part, ours in (("k", keys), ("v", values)):
            want = self.golden.want(f"{self.name}.{label}.{part}")
            if want is not None and want.numel() == ours.numel():
                ours = ours.reshape(want.shape)
            self.golden.compare(f"{self.name}.{label}.{part}", ours)
        self.golden.compare(f"{self.name}.{label}.end", end)


def interactive(variant: dict[str, Any]) -> bool:
    """Whether the pipeline with prompt switches ran: it knows no diagonal lists and shows clean chunks to memory."""
    return variant.get("switch_frame_indices") is not None or variant.get("pipeline") == "interactive"


def step_lists(golden: Golden, name: str, variant: dict[str, Any], table: Table) -> tuple[list, list[bool], tuple]:
    """(timesteps of chunk 0, 1, ..., whether each list is of integers, the plain list) of a variant."""
    steps, used = variant["denoising_step_list"], golden.want(f"{name}.denoising_step_list")
    if used is not None and len(used) < len(steps):  # training drops a last step at 0, inference runs it
        steps = [s for s in steps if s]
    warped = variant.get("warp_denoising_step", golden.config.get("warp_denoising_step", True))
    plain = table.warp_steps(steps) if warped else tuple(float(s) for s in steps)
    if variant.get("use_diagonal_denoising") and not interactive(variant):
        return list(diagonal_steps(plain)), [True, True, not warped], plain
    return [plain], [not warped], plain


def variant_memory(variant: dict[str, Any], frames: int, infinite: bool) -> MemoryConfig:
    local = variant["local_attn_size"]
    if local < 0:
        return MemoryConfig(policy="full", frames=frames, phase="absolute")
    phase = "relative" if infinite else "absolute"
    return MemoryConfig(policy="window", frames=local, sinks=variant["sink_size"], phase=phase)


def prepare(golden: Golden, name: str, variant: dict[str, Any]) -> Run:
    """Everything a variant needs, before its first forward."""
    cfg, arch = golden.config, golden.config["transformer"]
    noise = golden.given(f"{name}.noise")
    given = golden.io.get(f"in.{name}.initial_latent")
    total = noise.shape[1] + (0 if given is None else given.shape[1])
    infinite = bool(variant.get("use_infinite_attention", cfg.get("use_infinite_attention")))
    net = network(golden.weights, arch)
    student = Whole(
        net,
        StudentConfig(
            chunk=variant["num_frame_per_block"],
            first_chunk=1 if variant.get("independent_first_frame") else 0,
            memory=variant_memory(variant, total, infinite),
        ),
        LatentShape(total, *noise.shape[2:], patch=net.cfg.patch),
    )
    table = Table(shift=cfg["timestep_shift"])
    told, integer, plain = step_lists(golden, name, variant, table)
    golden.compare(f"{name}.denoising_step_list", list(plain))
    batch = noise.shape[0]
    if not interactive(variant) and "pipeline" not in variant:
        conds = [text(golden, slice(0, batch), arch)]
    else:
        rows = golden.given("prompt_embeds").shape[0]
        one = [text(golden, row, arch) for row in range(rows)]
        conds = [c.map(lambda x: x.expand(batch, -1, -1)) for c in one]
    run = Run(golden, name, variant, student, student.new_memory(batch), table, conds, told, integer)
    run.watch()
    return run


def variant_passes(run: Run, chunks: int, given_chunks: int) -> Iterator[Pass]:
    """The passes of a variant: given chunks, then each chunk's steps and, but for Diagonal, its clean context pass."""
    v = run.variant
    diagonal = "use_diagonal_denoising" in v or run.golden.config["case"] == "diagonal_rollout"
    keeps_last_step = diagonal and not interactive(v)
    cfg = ScheduleConfig(
        context="last_step" if keeps_last_step else "clean",
        context_sigma=v.get("context_noise", 0) / 1000,
        given_chunks=given_chunks,
    )
    for chunk in range(chunks):
        if chunk < given_chunks:
            yield context_pass(chunk, cfg)
        else:
            levels = tuple(max(t, LAST_ENTRY) / 1000 for t in run.steps(chunk - given_chunks))
            yield from on_table(chunk_passes(chunk, levels, cfg), run.table)


def live(run: Run, passes: Iterator[Pass], given_chunks: int, label: str = "kv0_after_block0") -> Iterator[Pass]:
    """The passes, with prompt switches before the first pass of a chunk and snapshots after the first chunk."""
    switches: list[int] = list(run.variant.get("switch_frame_indices") or [])
    chunk = -1
    for p in passes:
        start = run.student.first_frame(p.chunk)
        if p.chunk != chunk and switches and start >= switches[0]:
            switches.pop(0)
            switch(run, start)
        chunk = p.chunk
        yield p
        call = run.calls[-1]
        call.held = len({*run.memory.frames, *range(start, start + call.frames)})
        call.is_int = (
            run.integer[min(max(0, p.chunk - given_chunks), len(run.integer) - 1)] and p.next_sigma is not None
        )
        if p.commit and p.chunk == given_chunks:
            run.compare_memory(label)


def switch(run: Run, start: int) -> None:
    """A new prompt from frame `start` on: the newest frames are written to memory again under it."""
    run.segment += 1
    if start == 0:
        return
    local, held = run.variant["local_attn_size"], run.variant["global_sink"]
    count = start if local < 0 else min(local, start)
    x = torch.cat(run.finished, dim=1)[:, start - count : start]
    told = run.variant["context_noise"] / 1000
    cond = run.cond(start - count, start)
    reencode(run.student, x, cond, run.memory, start=start - count, timestep=told, keep_sinks=held)
    call = run.calls[-1]
    call.held, call.is_int, call.recache, call.resets_sink = len(run.memory.frames), True, True, not held
    run.golden.compare(f"{run.name}.recache{run.recached}.call_index", len(run.calls) - 1)
    run.golden.compare(f"{run.name}.recache{run.recached}.x0", call.x0)
    run.compare_memory(f"recache{run.recached}")
    run.compare_memory(f"kv0_after_recache{run.recached}")
    run.recached += 1


def rollout_case(golden: Golden) -> None:
    golden.each_variant(generate_or_decline)


def generate_or_decline(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    """Run a variant; of one whose sinks exceed the first chunk of a LongLive cache, decline the numbers that differ."""
    longlive = "global_sink" in variant or golden.config["case"] == "diagonal_rollout"
    first = 1 if variant.get("independent_first_frame") else variant["num_frame_per_block"]
    if not (longlive and variant["local_attn_size"] > 0 and variant["sink_size"] > first):
        generate(golden, name, variant)
        return
    with contextlib.suppress(ValueError):  # a memory may have no room for a chunk beside such sinks
        generate(golden, name, variant)
    for output in golden.wanted(f"{name}."):
        outcome = golden.results.get(output)
        if outcome is None or (outcome[0] == "differs" and not output.endswith(SCHEDULED)):
            golden.results[output] = ("declined", 0.0, OVERSIZED_SINK)


@torch.no_grad()
def generate(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    run = prepare(golden, name, variant)
    noise = golden.given(f"{name}.noise")
    given = golden.io.get(f"in.{name}.initial_latent")
    clip = noise if given is None else torch.cat((given, noise), dim=1)
    student = run.student
    chunks = student.num_chunks(clip.shape[1])
    given_chunks = 0 if given is None else student.num_chunks(given.shape[1])

    def chunk_latents(chunk: int) -> Tensor:
        return clip[:, student.first_frame(chunk) : student.first_frame(chunk + 1)]

    passes = live(run, variant_passes(run, chunks, given_chunks), given_chunks)
    draws = golden.draws(f"{name}.renoise")
    for x0 in rollout(student, passes, noise=chunk_latents, cond=run.cond, memory=run.memory, rng=draws):
        run.finished.append(x0)
    golden.compare(f"{name}.latents", torch.cat(run.finished, dim=1))
    golden.compare(f"{name}.steps_per_block", [len(run.steps(c)) for c in range(chunks - given_chunks)])
    run.compare_memory("kv0_final")
    run.compare_calls()
    assert draws.used == len(draws.tensors), f"{name}: used {draws.used} of {len(draws.tensors)} recorded draws"


# --- LiveTalk ---------------------------------------------------------------------------------------------------------


def livetalk(golden: Golden) -> None:
    golden.each_variant(talk)
    with golden.guarded("train."):
        talk_train(golden)


def talker_condition(golden: Golden, features: Tensor, image: Tensor, frames: int) -> Condition:
    """Text, packed audio, and the reference image repeated over all frames with a mask that is 0 in frame 0."""
    mask = torch.ones(image.shape[0], frames, 1, *image.shape[-2:])
    mask[:, 0] = 0
    channels = torch.cat((image[:, None].expand(-1, frames, -1, -1, -1), mask), dim=2)
    packed = pack_audio(features, golden.config["audio_pack_patch"][0])
    return Condition(
        tokens=text(golden, slice(0, image.shape[0]), golden.config).tokens,
        per_frame={"hidden": packed},
        channels=channels,
    )


def compare_audio(golden: Golden, name: str, run: Run) -> None:
    """What the audio adds to each layer that takes it: [layers, F, 1, 1, D] in the original."""
    site = run.student.net.sites["hidden"]
    packed = run.conds[0].per_frame["hidden"]
    golden.compare(name, torch.cat([site(packed, layer) for layer in site.index])[:, :, None])


@torch.no_grad()
def talk(golden: Golden, name: str, variant: dict[str, Any]) -> None:
    cfg, noise, image = golden.config, golden.given(f"{name}.noise"), golden.given("image_latent")
    frames, chunk = noise.shape[1], cfg["num_frame_per_block"]
    net = network(golden.weights, cfg)
    memory = variant_memory(variant, frames, infinite=False)
    shape = LatentShape(frames, *noise.shape[2:], patch=net.cfg.patch)
    student = Whole(net, StudentConfig(chunk=chunk, memory=memory), shape)
    table = Table(shift=cfg["timestep_shift"], entries=cfg["scheduler_num_inference_steps"])
    levels: Sequence[float] = table.timesteps.tolist()
    golden.compare(f"{name}.denoising_step_list", list(levels))
    cond = talker_condition(golden, golden.given(f"{name}.audio_features"), image, frames)
    memory = student.new_memory(noise.shape[0])
    run = Run(golden, name, variant, student, memory, table, [cond], [tuple(levels)], [False])
    run.watch()
    compare_audio(golden, f"{name}.audio_cond", run)
    schedule = ScheduleConfig(context="clean", context_sigma=cfg["context_noise"] / 1000)
    passes = (
        p for c in range(student.num_chunks(frames)) for p in chunk_passes(c, [t / 1000 for t in levels], schedule)
    )
    parts = rollout(
        student,
        live(run, on_table(passes, table), 0),
        noise=lambda c: noise[:, c * chunk : (c + 1) * chunk],
        cond=run.cond,
        memory=run.memory,
        rng=golden.draws(f"{name}.renoise"),
        clamped=image[:, None],
    )
    golden.compare(f"{name}.latents", torch.cat(list(parts), dim=1))
    run.compare_memory("kv0_final")
    run.compare_calls()


@torch.no_grad()
def talk_train(golden: Golden) -> None:
    """The block-causal training forward; latents are [B, C, F, H, W] there."""
    if "in.train.x" not in golden.io:
        return
    x, y = (golden.given(f"train.{part}").transpose(1, 2) for part in ("x", "y"))
    train, net = golden.config["train"], network(golden.weights, golden.config)
    memory = variant_memory({"sink_size": 0, **train}, x.shape[1], infinite=False)
    student = CausalStudent(
        net,
        StudentConfig(chunk=train["num_frame_per_block"], memory=memory),
        LatentShape(x.shape[1], *x.shape[2:], patch=net.cfg.patch),
    )
    packed = pack_audio(golden.given("train.audio_features"), golden.config["audio_pack_patch"][0])
    cond = Condition(
        tokens=text(golden, slice(0, x.shape[0]), golden.config).tokens, per_frame={"hidden": packed}, channels=y
    )
    v = net(x, golden.given("train.timestep").double() / 1000, cond, causal=student.causal_mask(x.shape[1]))
    golden.compare("train.flow", v.transpose(1, 2))
