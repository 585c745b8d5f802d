import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from tiny_nets import SHAPE, clip, condition, tiny_student
from torch.utils._python_dispatch import TorchDispatchMode

from vidistill.diffusion import euler
from vidistill.memory.policies import MemoryConfig
from vidistill.rollout import chunk_noise, reencode, replay, rollout, run_pass
from vidistill.schedules import ScheduleConfig, endless, finite, training

WINDOW = MemoryConfig("window", frames=6, sinks=1)
WIDE = MemoryConfig("window", frames=8, sinks=1)
CHUNKWISE = ScheduleConfig(levels=(1.0, 0.7, 0.4))
SCHEDULES = {
    "clean context": CHUNKWISE,
    "noised context": ScheduleConfig(levels=(1.0, 0.5), context="noised", context_sigma=0.1),
    "last step": ScheduleConfig(levels=(1.0, 0.7, 0.4), pattern="32", context="last_step"),
}


def run(student, passes, *, seed=0, given=None, records=None, clamped=None, memory=None, **kw):
    """Finished chunks of a rollout whose every draw follows from the seed."""
    cond = condition(30)
    return rollout(
        student,
        passes,
        noise=chunk_noise(student, 1, seed, given=given),
        cond=lambda start, stop: cond.frames(start, stop),
        memory=memory or student.new_memory(1),
        rng=torch.Generator().manual_seed(seed),
        records=records,
        clamped=clamped,
        **kw,
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_finite_rollout_is_the_prefix_of_the_endless_one(schedule):
    student = tiny_student(WINDOW)
    with torch.no_grad():
        whole = list(run(student, finite(endless(schedule), 4)))
        stream = list(itertools.islice(run(student, endless(schedule)), 4))
    assert len(whole) == 4 and all(torch.equal(a, b) for a, b in zip(whole, stream, strict=True))
    assert [c.shape[1] for c in whole] == [3] * 4


def test_another_seed_is_another_clip_and_the_same_seed_the_same():
    student = tiny_student(WINDOW)
    with torch.no_grad():
        a, b, c = (torch.cat(list(run(student, finite(endless(CHUNKWISE), 2), seed=s)), 1) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)


class Known(torch.nn.Module):
    """A network whose velocity is a known function of latents and level; it writes down what it is asked."""

    def __init__(self, student):
        super().__init__()
        self.student, self.asked = student, []

    def velocity(self, x, sigma, cond, *, start, memory, output=True):
        self.asked.append((start, x.clone(), sigma[0].tolist(), output))
        memory.begin(start, x.shape[1])
        return 0.3 * x + sigma[:, :, None, None, None].to(x.dtype)

    def commit(self, memory, x, cond, *, start):
        self.asked.append((start, x.clone(), "kept", True))
        memory.next_frame += 3

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "student" else getattr(self.student, name)


def test_rolling_moves_every_chunk_of_its_window_one_level_down_in_each_pass():
    student = Known(tiny_student(MemoryConfig("window", frames=12, sinks=1)))
    cfg = ScheduleConfig(name="rolling", levels=(1.0, 0.6, 0.3))
    with torch.no_grad():
        chunks = list(itertools.islice(run(student, endless(cfg), transition=euler), 3))
    for i, chunk in enumerate(chunks):
        x = chunk_noise(student, 1, 0)(i)
        for now, after in ((1.0, 0.6), (0.6, 0.3), (0.3, 0.0)):  # by hand, each chunk for itself
            told = [
                level[3 * i - start :][:3]
                for start, window, level, _ in student.asked
                if start <= 3 * i < start + window.shape[1]
                and torch.allclose(window[:, 3 * i - start :][:, :3], x, atol=1e-5)
            ]
            assert told[0] == [now] * 3
            v = 0.3 * x + now
            x = x - now * v if not after else x + (after - now) * v
        torch.testing.assert_close(chunk, x)
    kept = [asked for asked in student.asked if asked[2] == "kept"]
    assert [start for start, *_ in kept] == [0, 3]
    torch.testing.assert_close(kept[0][1], chunks[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_network_is_told_and_shown_follows_the_passes(name):
    student, schedule = Known(tiny_student(WINDOW)), SCHEDULES[name]
    passes = list(finite(endless(schedule), 2))
    with torch.no_grad():
        chunks = list(run(student, passes))
    asked = [a for a in student.asked if a[2] != "kept"]
    kept = [a for a in student.asked if a[2] == "kept"]
    assert [a[2] for a in asked] == [[*(p.timesteps or p.sigma)] * 3 for p in passes]
    assert [a[3] for a in asked] == [p.kind == "denoise" for p in passes]  # a context pass is asked for no output
    for chunk, (start, x, _, _) in enumerate(kept):
        clean = torch.equal(x, chunks[chunk])
        assert start == 3 * chunk and clean == (schedule.context != "noised")
        if not clean:  # shown at its level: mostly the chunk, a little noise
            assert (x - 0.9 * chunks[chunk]).std() == pytest.approx(0.1, rel=0.2)


def test_levels_told_apart_from_the_noise_reach_the_network_and_leave_the_noise_alone():
    cfg = ScheduleConfig(steps=((1.0, 0.5),), timesteps=((0.99, 0.4),), context_sigma=0.05)
    student = Known(tiny_student(WINDOW))
    with torch.no_grad():
        (chunk,) = run(student, finite(endless(cfg), 1))
    (_, _, *_), (_, x, told, _), (_, shown, context, _), *_ = student.asked
    assert told == [0.4] * 3 and context == [0.05] * 3 and torch.equal(shown, chunk)
    torch.testing.assert_close(chunk, x - 0.5 * (0.3 * x + 0.4))


class Asked(TorchDispatchMode):
    """Counts what makes a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "unique"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_rollout_never_waits_for_its_device(schedule):
    student = tiny_student(WINDOW)
    with torch.no_grad():
        list(run(student, finite(endless(schedule), 4)))  # levels are read once
        with Asked() as asked:
            list(run(student, finite(endless(schedule), 4)))
    assert not asked.count


def test_given_chunks_come_out_as_they_went_in():
    student, given = tiny_student(WINDOW), clip(3)
    cfg = ScheduleConfig(levels=(1.0, 0.5), given_chunks=1)
    with torch.no_grad():
        chunks = list(run(student, finite(endless(cfg), 2), given=given))
    assert torch.equal(chunks[0], given) and not torch.equal(chunks[1], given)


def test_given_frames_behind_a_given_chunk_are_not_part_of_it():
    student, given = tiny_student(WINDOW), clip(7)
    noise = chunk_noise(student, 1, 0, given)
    assert torch.equal(noise(0), given[:, :3]) and torch.equal(noise(1), given[:, 3:6])
    assert torch.equal(noise(2), chunk_noise(student, 1, 0)(2))  # it is given in part only


def test_pinned_frames_are_seen_and_predicted_clean_and_the_callers_noise_is_untouched():
    student, image = tiny_student(WINDOW), clip(1, seed=8)
    noise, seen = clip(6), []
    kept = noise.clone()
    student.net.register_forward_hook(lambda _m, args, _o: seen.append(args[0][:, 0].clone()))
    with torch.no_grad():
        chunks = list(
            rollout(
                student,
                finite(endless(CHUNKWISE), 2),
                noise=lambda c: noise[:, 3 * c : 3 * c + 3],
                cond=lambda *_: condition(),
                memory=student.new_memory(1),
                rng=torch.Generator().manual_seed(0),
                clamped=image,
            )
        )
    assert torch.equal(chunks[0][:, :1], image) and torch.equal(noise, kept)
    assert all(torch.equal(x, image[:, 0]) for x in seen[:4])  # three steps and the context pass
    assert not any(torch.equal(x, image[:, 0]) for x in seen[4:])


REPLAYED = {**SCHEDULES, "rolling": ScheduleConfig("rolling", levels=(1.0, 0.6))}


@pytest.mark.parametrize("schedule", REPLAYED.values(), ids=REPLAYED.keys())
def test_replayed_gradients_equal_those_of_one_graph(schedule):
    student, records = tiny_student(WIDE), []
    passes = list(training(schedule, 3, Random(1)))
    weight = clip(9, seed=9)
    cond = condition(30)
    x = torch.cat(list(run(student, passes, records=records)), dim=1)
    (x * weight).sum().backward()
    whole = [p.grad.clone() for p in student.net.parameters()]
    student.net.zero_grad()
    pieces = replay(student, records, cond=lambda a, b: cond.frames(a, b), memory=student.new_memory(1))
    for chunk, predicted in pieces:
        x0 = predicted[:, :3]  # of the first chunk in the pass
        assert torch.equal(x0, x[:, 3 * chunk : 3 * chunk + 3])
        (x0 * weight[:, 3 * chunk : 3 * chunk + 3]).sum().backward()
    for a, p in zip(whole, student.net.parameters(), strict=True):
        assert (a - p.grad).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-6)


def test_only_passes_that_promise_gradient_carry_it():
    student = tiny_student(WINDOW)
    for p in training(CHUNKWISE, 1, Random(0)):
        x = clip(3).requires_grad_()
        _, x0, _ = run_pass(student, p, x, lambda *_: condition(), student.new_memory(1))
        assert x0.requires_grad == p.grad


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_leaves_the_memory_of_streaming(name):
    """With an exit for each chunk, whatever the context."""
    schedule = replace(SCHEDULES[name], exit="per_chunk")
    memories = []
    for passes, grad in (
        (finite(endless(schedule), 3), False),
        (training(schedule, 3, Random(5)), False),
        (training(schedule, 3, Random(5)), True),
    ):
        student = tiny_student(WINDOW)
        memories.append(student.new_memory(1))
        with torch.set_grad_enabled(grad):
            list(run(student, passes, memory=memories[-1]))
    streamed, trained, differentiated = ([m.entries(layer)[:2] for layer in (0, 1)] for m in memories)
    for a, b, c in zip(
        itertools.chain(*streamed), itertools.chain(*trained), itertools.chain(*differentiated), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-5)  # other kernels while autograd records
    assert memories[0].frames == memories[1].frames == memories[2].frames


def test_the_noise_of_a_chunk_does_not_depend_on_the_others():
    student = tiny_student()
    a, b = (chunk_noise(student, 2, 7) for _ in range(2))
    a(0)
    assert torch.equal(a(3), b(3)) and not torch.equal(a(3), a(4))


def test_every_chunk_of_every_seed_has_noise_of_its_own():
    student, firsts = tiny_student(), set()
    for seed in (0, 1, 2, 1000):
        noise = chunk_noise(student, 1, seed)
        firsts |= {noise(chunk).flatten()[0].item() for chunk in range(200)}
        firsts.add(torch.randn(1, generator=torch.Generator().manual_seed(seed)).item())  # a caller's own draws
    assert len(firsts) == 4 * 201


def test_a_seed_keeps_its_noise_from_version_to_version():
    """What people share is a seed: its clip must not change behind their backs."""
    firsts = [chunk_noise(tiny_student(), 1, 7)(chunk).flatten()[:2].tolist() for chunk in (0, 3)]
    assert firsts == [pytest.approx([1.7619286, 1.0881221]), pytest.approx([-0.6199873, -0.2101199])]


def test_writing_finished_frames_again_under_the_same_prompt_keeps_the_newest_chunk_whole():
    """A chunk of its own sees only itself, so that one pass over it writes what the rollout wrote."""
    student = tiny_student(MemoryConfig("window", frames=3))
    memory, cond = student.new_memory(1), condition(30)
    with torch.no_grad():
        chunks = list(run(student, finite(endless(CHUNKWISE), 2), memory=memory))
        keys, values, frames = memory.entries(1)
        reencode(student, chunks[1], cond, memory, start=3)
    again = memory.entries(1)
    assert frames == again[2] == [3, 4, 5] and memory.next_frame == 6
    assert torch.allclose(keys, again[0], atol=1e-5) and torch.allclose(values, again[1], atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_what_is_written_again_is_noised_and_told_as_it_was_the_first_time(sigma):
    student, x = Known(tiny_student(MemoryConfig("window", frames=6))), clip(3)
    memory = student.new_memory(1)
    memory.begin(0, 3)
    memory.commit()
    reencode(student, x, condition(3), memory, start=0, timestep=0.2, sigma=sigma, rng=torch.Generator().manual_seed(4))
    (start, shown, told, output), (_, finished, _, _) = student.asked
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    assert (start, told, output) == (0, [0.2] * 3, False) and torch.equal(finished, shown)
    torch.testing.assert_close(shown, (1 - sigma) * x + sigma * noise)


def test_a_scene_that_begins_late_has_sinks_of_its_own_and_each_frame_once():
    student = tiny_student(MemoryConfig("window", frames=9, sinks=3))
    memory, cond = student.new_memory(1), condition(30, seed=77)
    with torch.no_grad():
        list(run(student, finite(endless(CHUNKWISE), 2), memory=memory))
        memory.reset(6)  # a cut
        scene = torch.cat(list(run(student, finite(endless(CHUNKWISE, 2), 4), memory=memory)), dim=1)
        before = memory.entries(1)[1]
        reencode(student, scene, cond, memory, start=6)
        after, frames = memory.entries(1)[1:]
        assert frames == [6, 7, 8, 9, 10, 11] and not torch.allclose(before, after), "sinks are written again, too"
        list(run(student, finite(endless(CHUNKWISE, 4), 6), memory=memory))
    assert memory.frames == [6, 7, 8, 12, 13, 14, 15, 16, 17]


def test_what_is_written_again_is_compressed_again_where_memory_encodes_it_coarsely():
    cfg = MemoryConfig("endless", frames=6, history=6, pattern=(2,), pool="reencode")
    old, new = tiny_student(cfg), tiny_student(cfg)
    histories = []
    with torch.no_grad():
        for student, prompt in ((old, 2), (new, 77)):
            memory = student.new_memory(1)
            x = torch.cat(list(run(student, finite(endless(CHUNKWISE), 3), memory=memory)), dim=1)
            reencode(student, x[:, 3:], condition(30, seed=prompt), memory, start=3)
            list(run(student, finite(endless(CHUNKWISE, 3), 4), memory=memory))
            assert [s.frame for s in memory.stored if s.factor == 2] == [0, 1, 2, 3, 4, 5]
            histories.append(memory.past(1)[1][:, :6])  # one token a frame
    (told, retold), (same, other) = (h.split(3, dim=1) for h in histories)
    assert torch.equal(told, same) and not torch.allclose(retold, other)


def test_a_prompt_switch_rewrites_what_is_remembered_but_not_the_sinks():
    student = tiny_student(MemoryConfig("window", frames=6, sinks=1))
    memory, n = student.new_memory(1), SHAPE.tokens_per_frame
    with torch.no_grad():
        chunks = torch.cat(list(run(student, finite(endless(CHUNKWISE), 3), memory=memory)), dim=1)
        before = memory.entries(1)[1]
        reencode(student, chunks[:, 3:], condition(30, seed=77), memory, start=3)
    after, frames = memory.entries(1)[1:]
    assert frames == [0, 4, 5, 6, 7, 8]
    assert torch.equal(before[:, :n], after[:, :n]) and not torch.allclose(before[:, n:], after[:, n:])
