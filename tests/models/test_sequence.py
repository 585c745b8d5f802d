"""Processes that share the tokens of every frame compute what one process does: passes, memories, gradients."""

from dataclasses import replace
from random import Random

import pytest
import torch
from tiny_nets import DIT, SITES, VIEW, chunk_levels, clip, condition, tiny_dit, tiny_student
from tiny_ranks import same_ranks, together

from vidistill import distributed
from vidistill.checkpoint import read_tensors, save_tensors
from vidistill.memory.policies import MemoryConfig
from vidistill.models.lora import LoraConfig, add_lora
from vidistill.ops.sequence import SequenceGroup
from vidistill.rollout import chunk_noise, replay, rollout
from vidistill.schedules import ScheduleConfig, training

FOUR = {"heads": 4, "width": 48}
SITED = {"sites": SITES}
FULL = MemoryConfig("full", frames=9)
SINKS = MemoryConfig("window", frames=6, sinks=2)
LEARNED = MemoryConfig("compressed", frames=3, history=6, pattern=(1, 2), pool="learned")
EIGHT_BIT = MemoryConfig("endless", frames=3, history=3, pattern=(1, 2), entries="int8")
SCHEDULE = ScheduleConfig(levels=(1.0, 0.6), exit="per_chunk")


def whole_clip(student, x):
    return student.net.velocity(x, torch.rand(1, 9, generator=torch.Generator().manual_seed(0)), every(9))


def masked(student, x):
    return student.teacher_forced(x, chunk_levels(student, 9), every(9), clip(seed=7), torch.zeros(1, 9))


def rolled(student, x):
    made = rollout(
        student,
        training(SCHEDULE, 3, Random(1)),
        noise=chunk_noise(student, 1, 0),
        cond=every(9).frames,
        memory=student.new_memory(1),
        rng=torch.Generator().manual_seed(0),
    )
    return torch.cat(list(made), dim=1)


def replayed(student, x):
    records = []
    made = rollout(
        student,
        training(SCHEDULE, 3, Random(1)),
        noise=chunk_noise(student, 1, 0),
        cond=every(9).frames,
        memory=student.new_memory(1),
        rng=torch.Generator().manual_seed(0),
        records=records,
    )
    with torch.no_grad():
        made = list(made)
    again = replay(student, records, cond=every(9).frames, memory=student.new_memory(1))
    for _, x0 in again:
        x0.square().sum().backward()
    return torch.cat(made, dim=1)


@pytest.fixture(scope="module", autouse=True)
def ranks():
    run("clip", 1, lora=True)  # what it imports, processes that are forked have too
    with same_ranks():
        yield


def every(frames):
    return condition(frames, sites=("modulation", "hidden", "qk", "view"))


CASES = {  # what runs, the memory, what the network has besides
    "clip": (whole_clip, FULL, VIEW),
    "clip, recomputed": (whole_clip, FULL, {**SITED, "checkpoint": True, "predicts": "x0"}),
    "masked": (masked, FULL, SITED),
    "masked, moved sinks": (masked, SINKS, VIEW),
    "masked, learned history": (masked, LEARNED, {**SITED, "pool_factors": (2,)}),
    "rollout": (rolled, FULL, VIEW),
    "rollout, recomputed": (rolled, FULL, {"checkpoint": True}),
    "rollout, moved sinks": (rolled, SINKS, SITED),
    "rollout, learned history": (rolled, LEARNED, {"pool_factors": (2,)}),
    "rollout, 8-bit history": (rolled, EIGHT_BIT, {}),
    "rollout, replayed": (replayed, SINKS, {}),
}


def gradients(net):
    """Means over all processes, as a trainer takes them, of the gradients that are there."""
    distributed.mean_gradients(net.parameters(), 1)
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {f"grad.{n}": g.full_tensor() if distributed.is_sharded(g) else g for n, g in grads.items()}


def run(name, sequence, lora=False, shard=False):
    """Output and gradients of a case; the input's gradient as whoever made the input would get it."""
    make, memory, more = CASES[name]
    student = tiny_student(memory, dit=replace(DIT, **FOUR), **more)
    group = distributed.sequence_group(sequence)
    if group is not None:
        student.net.split_sequence(group)
    if lora:
        torch.manual_seed(0)
        add_lora(student.net, LoraConfig(rank=2))
        for n, p in student.net.named_parameters():
            torch.nn.init.normal_(
                p, std=0.2, generator=torch.Generator().manual_seed(len(n))
            ) if "lora_B" in n else None
    if shard:
        distributed.shard(student.net, student.net.units)
    x = clip(seed=5).requires_grad_()
    out = make(student, x)
    if out.requires_grad:
        (out * clip(seed=6)).sum().backward()
    found = {"out": out.detach(), **gradients(student.net)}
    if x.grad is not None:
        found["grad.x"] = x.grad.clone()
        if group is not None:
            torch.distributed.all_reduce(found["grad.x"], group=group.group)
            found["grad.x"] /= group.size
    return found


def job(names, sequence, out, settings):
    for i, name in enumerate(names):
        found = run(name, sequence, **settings)
        if distributed.rank() == 0:
            save_tensors(out / f"{i}.safetensors", {n: t.contiguous() for n, t in found.items()}, {})


def assert_equals_one_process(names, count, sequence, folder, **settings):
    folder.mkdir(exist_ok=True)
    together(count, job, names, sequence, folder, settings)
    for i, name in enumerate(names):
        wanted, (found, _) = run(name, 1, lora=settings.get("lora", False)), read_tensors(folder / f"{i}.safetensors")
        assert wanted.keys() == found.keys() and any(key.startswith("grad.") for key in wanted)
        for key, x in wanted.items():
            error, size = (found[key] - x).abs().max(), x.abs().max()
            assert error <= 2e-5 * size.clamp_min(1e-3), f"{name}: {key} is {error:.1e} off, at most {size:.1e}"


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_share_tokens_equal_one(count, tmp_path):
    assert_equals_one_process(list(CASES), count, count, tmp_path / "x")


@pytest.mark.parametrize("settings", [{"lora": True}, {"shard": True}, {"lora": True, "shard": True}])
def test_low_rank_and_sharded_networks_share_tokens(settings, tmp_path):
    names = ["clip", "masked, moved sinks", "rollout, recomputed", "rollout, replayed"]
    assert_equals_one_process(names, 2, 2, tmp_path / "x", **settings)


def test_two_pairs_of_processes_are_a_mesh_of_two_axes(tmp_path):
    assert_equals_one_process(["clip", "rollout, moved sinks"], 4, 2, tmp_path / "x", shard=True)


def test_a_process_remembers_its_own_heads_alone():
    student = tiny_student(FULL, dit=replace(DIT, **FOUR))
    whole = student.new_memory(1).memory_bytes
    student.net.split_sequence(SequenceGroup(None, 0, 4))
    assert 4 * student.new_memory(1).memory_bytes == whole


@pytest.mark.parametrize(("size", "message"), [(3, "sequence 3 .* 4 heads"), (8, "sequence 8 .* 4 heads")])
def test_a_sequence_that_does_not_divide_the_heads_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        tiny_dit(replace(DIT, **FOUR)).split_sequence(SequenceGroup(None, 0, size))


def test_a_sequence_that_does_not_divide_the_tokens_is_refused():
    net = tiny_dit(replace(DIT, heads=3))
    net.split_sequence(SequenceGroup(None, 0, 3))
    with pytest.raises(ValueError, match=r"sequence 3.*not divide.*4 tokens"):
        net.velocity(clip(), torch.rand(1, 9), condition())


def test_a_sequence_that_does_not_divide_the_processes_is_refused():
    with pytest.raises(ValueError, match=r"sequence 2.*not divide 1 processes"):
        distributed.sequence_group(2)


def test_half_precision_shares_tokens_too(tmp_path):
    (tmp_path / "x").mkdir()
    together(2, half_clip, 2, tmp_path / "x" / "two.safetensors")
    half_clip(1, tmp_path / "x" / "one.safetensors")
    (one, _), (two, _) = (read_tensors(tmp_path / "x" / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[key] - two[key]).abs().max() <= 0.03 * one[key].abs().max() for key in one)


def half_clip(sequence, out):
    with torch.autocast("cpu", torch.bfloat16):
        found = run("masked", sequence)
    if distributed.rank() == 0:
        save_tensors(out, {n: t.float().contiguous() for n, t in found.items()}, {})
