"""Compressed history: exact accounting, hand-over, the operators, streaming = one masked forward, endless walks."""

import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from test_cache import memory_of, staged, turn, write
from tiny_nets import DIT, SHAPE, SITES, cached, chunk_levels, clip, condition, tiny_dit, tiny_student

from vidistill.memory.policies import RELIC_PATTERN, MemoryConfig, stream_memory
from vidistill.memory.pooling import Pooling, average, frame_positions, num_cells
from vidistill.ops.rope import rope_table, rotate
from vidistill.rollout import chunk_noise, replay, rollout
from vidistill.schedules import ScheduleConfig, endless, finite, training

COMPRESSED = MemoryConfig("compressed", frames=3, history=8, pattern=(1, 2, 2))
SCHEDULE = ScheduleConfig(levels=(1.0, 0.5), given_chunks=0)


# --- accounting -----------------------------------------------------------------------------------------------------


def test_the_pattern_of_relic_keeps_a_sixth_of_the_tokens():
    """Its own sizes: 30x52 tokens a frame, 80 latents; factors a side, odd sides rounded up."""
    whole = MemoryConfig("compressed", frames=1, history=18)
    assert [whole.factor(i) for i in range(20)] == [*RELIC_PATTERN, 1, 4]
    assert whole.history_tokens((32, 52)) == 32 * 52 + 5 * 16 * 26 + 12 * 8 * 13 == 32 * 52 * 18 // 6
    relic = MemoryConfig("compressed", frames=6, history=74)
    assert relic.tokens((32, 52)) < 21 * 32 * 52 * 1.05  # 20 s cost what 5 s cost plainly
    assert 28_000 < relic.tokens((30, 52)) < 31_000  # the paper's 30 thousand
    assert num_cells((30, 52), 4) == 8 * 13


@pytest.mark.parametrize("entries", ["dense", "int8", "fp8"])
def test_bytes_are_known_before_anything_is_allocated(entries):
    cfg = replace(COMPRESSED, entries=entries)
    student = tiny_student(cfg)
    memory, dit = student.new_memory(2), student.net.cfg
    size = {"layers": dit.layers, "width": dit.width, "tokens_per_frame": 4, "batch": 2}
    assert memory.memory_bytes == cfg.bytes(**size, grid=SHAPE.grid, heads=dit.heads)
    assert memory.tokens == cfg.tokens(SHAPE.grid) == 3 * 4 + 3 * 4 + 5 * 1


def test_an_account_says_what_compression_saves():
    account = replace(COMPRESSED, entries="int8").account((4, 8), layers=6, width=224, heads=4)
    plain = MemoryConfig("full", frames=11)
    assert account["uncompressed_tokens"] == plain.tokens((4, 8)) == 11 * 32
    assert account["uncompressed_bytes"] == plain.bytes(layers=6, width=224, tokens_per_frame=32)
    assert account["token_share"] == round(account["tokens"] / 352, 4) < 0.8


# --- hand-over ------------------------------------------------------------------------------------------------------


def test_a_frame_that_leaves_the_window_appears_in_the_history_exactly_once():
    memory = memory_of(COMPRESSED, tokens=2)
    for start in range(0, 9, 3):
        seen = write(memory, start, 3)
        assert [s.frame for s in memory.stored] == list(range(start + 3))
        window = [float(f) for f in range(start, start + 3)]
        assert seen[-3:] == window
    assert [s.factor for s in memory.stored] == [1, 2, 2, 1, 2, 2, 1, 1, 1]
    assert [s.tokens for s in memory.stored] == [2, 1, 1, 2, 1, 1, 2, 2, 2]


def test_rehearsing_a_chunk_hands_nothing_over_twice():
    memory = memory_of(COMPRESSED, tokens=2)
    write(memory, 0, 3)
    write(memory, 3, 3, commit=False)
    write(memory, 3, 3)
    assert [s.frame for s in memory.stored] == [0, 1, 2, 3, 4, 5]


def test_a_full_history_says_what_to_do():
    memory = memory_of(replace(COMPRESSED, history=3), tokens=2)
    write(memory, 0, 3)
    write(memory, 3, 3)
    with pytest.raises(ValueError, match=r"history of 3 frames is full.*endless"):
        memory.begin(6, 3)


def test_a_rewind_reaches_into_the_history_and_a_fork_is_independent():
    memory = memory_of(COMPRESSED, tokens=2)
    for start in (0, 3, 6):
        write(memory, start, 3)
    twin = memory.fork()
    twin.rewind(4)
    assert [s.frame for s in twin.stored] == [0, 1, 2, 3]
    assert [s.frame for s in memory.stored] == list(range(9))
    memory.reset()
    assert not memory.stored


def test_slots_that_a_rewind_has_freed_are_not_read():
    memory = memory_of(MemoryConfig("endless", frames=4, history=4, pattern=(1,)))
    for start in range(0, 8, 2):
        write(memory, start, 2)
    memory.rewind(6)
    seen = write(memory, 6, 1)  # one frame where two were
    assert seen == [0, 1, 2, 3, 4, 5, 6]


def test_history_can_be_hidden_and_comes_back_whole():
    student = tiny_student(COMPRESSED)
    x, sigma, cond = clip(), torch.full((1, 3), 0.5), condition()
    with torch.no_grad():
        memory = student.new_memory(1)
        for start in (0, 3):
            student.velocity(x[:, start : start + 3], sigma, cond, start=start, memory=memory)
            memory.commit()
        shown = student.velocity(x[:, 6:], sigma, cond, start=6, memory=memory)
        memory.show_history(False)
        hidden = student.velocity(x[:, 6:], sigma, cond, start=6, memory=memory)
        memory.show_history(True)
        assert torch.equal(student.velocity(x[:, 6:], sigma, cond, start=6, memory=memory), shown)
        window = tiny_student(MemoryConfig("window", frames=3)).new_memory(1)
        for start in (0, 3):
            student.velocity(x[:, start : start + 3], sigma, cond, start=start, memory=window)
            window.commit()
        alone = student.velocity(x[:, 6:], sigma, cond, start=6, memory=window)
    assert not torch.allclose(shown, hidden) and not torch.allclose(alone, shown)


# --- operators ------------------------------------------------------------------------------------------------------


def test_cells_of_odd_sides_average_what_is_left():
    x = torch.arange(15.0).view(1, 15, 1, 1)  # 3 rows of 5
    got = average(x, (3, 5), 2).flatten()
    assert got.tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    places = frame_positions(torch.tensor([7.0]), (3, 5), 2)
    assert places[:, 1:].tolist() == [[0.5, 0.5], [0.5, 2.5], [0.5, 4], [2, 0.5], [2, 2.5], [2, 4]]
    assert average(x, (3, 5), 8).flatten().tolist() == [7]


def test_pooling_before_turning_keeps_uniform_keys_uniform_and_the_other_order_does_not():
    keys = torch.randn(1, 1, 2, 12).expand(1, 16, 2, 12)
    fine = rope_table(frame_positions(torch.tensor([9.0]), (4, 4)), 12, theta=4.0)
    coarse = rope_table(frame_positions(torch.tensor([9.0]), (4, 4), 4), 12, theta=4.0)
    good = rotate(average(keys, (4, 4), 4), coarse)
    bad = average(rotate(keys, fine), (4, 4), 4)
    assert torch.allclose(good.norm(), keys[:, :1].norm()) and bad.norm() < 0.95 * good.norm()


def test_rescaled_keys_are_as_long_as_those_they_stand_for():
    keys, values = torch.randn(2, 1, 16, 2, 6)
    short, _ = Pooling("average", (4, 4))(0, keys, values, 4)
    long, means = Pooling("rescaled", (4, 4))(0, keys, values, 4)
    assert torch.allclose(long.norm(dim=-1), keys.norm(dim=-1).mean(1, keepdim=True))
    assert torch.allclose(torch.cosine_similarity(short, long, dim=-1), torch.ones(1, 1, 2))
    assert torch.allclose(means, values.mean(1, keepdim=True), atol=1e-6)


def test_stretched_keys_are_longer_whatever_they_stand_for_and_values_are_not():
    keys, values = torch.randn(2, 1, 16, 2, 6)
    for factor in (1, 2, 4):
        plain, means = Pooling("rescaled", (4, 4))(0, keys, values, factor)
        long, same = Pooling("rescaled", (4, 4), stretch=1.25)(0, keys, values, factor)
        assert torch.allclose(long, plain * 1.25) and torch.equal(same, means)


def test_learned_weights_start_as_the_average_and_pick_what_they_learn():
    keys, values = torch.randn(2, 1, 15, 2, 6)
    scores = torch.zeros(2, 2, 2)
    pooling = Pooling("learned", (3, 5), lambda layer, factor: scores)
    assert torch.allclose(pooling(0, keys, values, 2)[0], average(keys, (3, 5), 2), atol=1e-6)
    scores[:, 0, 1] = 50.0  # the right one of the upper row
    assert torch.allclose(pooling(0, keys, values, 2)[1][:, 0], values[:, 1], atol=1e-4)


def test_entries_of_one_byte_are_close():
    outs = {}
    x, sigma, cond = clip(), chunk_levels(tiny_student(COMPRESSED), 9), condition()
    for entries in ("dense", "int8", "fp8"):
        with torch.no_grad():
            outs[entries] = cached(tiny_student(replace(COMPRESSED, entries=entries)), x, sigma, cond)
    for entries, limit in (("int8", 0.02), ("fp8", 0.06)):
        error = (outs[entries] - outs["dense"]).norm() / outs["dense"].norm()
        assert 0 < error < limit


# --- one forward, many chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["average", "rescaled", "learned"])
@pytest.mark.parametrize("window", [3, 5])
def test_chunk_by_chunk_with_compressed_memory_equals_one_masked_forward(pool, window):
    memory = replace(COMPRESSED, pool=pool, frames=window, stretch=1.25)
    student = tiny_student(memory, sites=SITES, pool_factors=(2,))
    x, cond = clip(batch=2), condition(batch=2, sites=tuple(SITES))
    sigma = chunk_levels(student, 9, batch=2)
    with torch.no_grad():
        got = cached(student, x, sigma, cond)
        assert (got - student.block_causal(x, sigma, cond)).abs().max() < 1e-5
        plain = student.net(x, sigma, cond, causal=student.causal_mask(9))
        assert (got - plain).abs().max() > 1e-3  # the history counts


def test_teacher_forcing_shows_each_chunk_what_streaming_will_show_it():
    student = tiny_student(COMPRESSED, first=1, chunk=2)
    x, noisy, cond = clip(), clip(seed=5), condition()
    sigma = torch.full((1, 9), 0.6)
    with torch.no_grad():
        v = student.teacher_forced(noisy, sigma, cond, x, torch.zeros_like(sigma), first=5)
        memory, start = student.new_memory(1), 0
        for chunk in range(5):
            stop = student.first_frame(chunk + 1)
            part, span = cond.frames(start, stop), slice(start, stop)
            want = student.velocity(noisy[:, span], sigma[:, span], part, start=start, memory=memory)
            if start >= 5:
                assert (v[:, span] - want).abs().max() < 1e-5
            student.velocity(x[:, span], torch.zeros(1, stop - start), part, start=start, memory=memory)
            memory.commit()
            start = stop
    assert v[:, :5].abs().max() == 0


def test_who_sees_whom_when_a_clean_compressed_past_precedes_noise():
    """Jacobian: a late chunk sees its window in full and everything older; a clean one sees nothing after itself."""
    student = tiny_student(COMPRESSED)
    x = clip().requires_grad_()
    sigma = torch.tensor([[0.0] * 3 + [0.7] * 3 + [0.4] * 3])
    v = student.block_causal(x, sigma, condition())

    def reach(frame):
        return [f for f in range(9) if torch.autograd.grad(v[:, frame].sum(), x, retain_graph=True)[0][:, f].any()]

    assert reach(1) == [0, 1, 2] and reach(4) == list(range(6)) and reach(8) == list(range(9))


def test_learned_pooling_gets_gradient_in_one_forward():
    student = tiny_student(replace(COMPRESSED, pool="learned"), pool_factors=(2,))
    student.block_causal(clip(), chunk_levels(student, 9), condition()).square().sum().backward()
    assert student.net.pool_weights["2"].grad.abs().max() > 0


# --- rollouts -------------------------------------------------------------------------------------------------------


def roll(student, passes, memory, records=None):
    cond = condition(60)
    return rollout(
        student,
        passes,
        noise=chunk_noise(student, 1, 3),
        cond=cond.frames,
        memory=memory,
        rng=torch.Generator().manual_seed(0),
        records=records,
    )


@pytest.mark.parametrize("pool", ["average", "reencode"])
def test_replayed_gradients_with_a_compressed_past_equal_those_of_one_graph(pool):
    student, records, cond = tiny_student(replace(COMPRESSED, pool=pool, history=9), text_dim=8), [], condition(60)
    passes = list(training(SCHEDULE, 4, Random(1)))
    weight = clip(12, seed=9)
    x = torch.cat(list(roll(student, passes, student.new_memory(1), records)), dim=1)
    (x * weight).sum().backward()
    whole = [p.grad.clone() for p in student.net.parameters()]
    student.net.zero_grad()
    for chunk, x0 in replay(student, records, cond=cond.frames, memory=student.new_memory(1)):
        assert torch.equal(x0, x[:, 3 * chunk : 3 * chunk + 3])
        (x0 * weight[:, 3 * chunk : 3 * chunk + 3]).sum().backward()
    for a, p in zip(whole, student.net.parameters(), strict=True):
        assert (a - p.grad).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-6)


def test_a_frame_encoded_again_is_the_network_of_its_pooled_latents():
    student = tiny_student(replace(COMPRESSED, pool="reencode"))
    averaged = tiny_student(COMPRESSED)
    with torch.no_grad():
        a, b = (list(roll(s, finite(endless(SCHEDULE), 3), s.new_memory(1))) for s in (student, averaged))
        memory = student.new_memory(1)
        chunks = list(roll(student, finite(endless(SCHEDULE), 2), memory))
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1])
    assert [s.factor for s in memory.stored[:3]] == [1, 2, 2] and len(chunks) == 2


@pytest.mark.parametrize("policy", ["endless", "compressed"])
def test_an_endless_walk_costs_the_same_for_ever(policy):
    cfg = stream_memory(replace(COMPRESSED, policy=policy), 3)
    student = tiny_student(cfg, text_dim=8)
    memory = student.new_memory(1)
    size = memory.memory_bytes
    most = 0
    with torch.no_grad():
        for _ in itertools.islice(roll(student, endless(SCHEDULE), memory), 18):
            most = max(most, sum(s.tokens for s in memory.stored))
            assert memory.memory_bytes == size
    assert most == cfg.history_tokens(SHAPE.grid) and memory.next_frame == 51
    assert memory.stored[0].frame == 0 and len(memory.stored) > 5


def poses_of(*places):
    return torch.tensor([[list(map(float, p)) for p in places]])


def test_of_frames_seen_from_nearly_one_pose_the_newer_goes():
    memory = memory_of(MemoryConfig("endless", frames=1, history=3, pattern=(1,)), tokens=2)
    walked = [(0, 0), (5, 0), (5, 0.1), (9, 9), (0, 0.01), (20, 0)]
    for start, place in enumerate(walked):
        memory.begin(start, 1, poses_of(place))
        raw = torch.full((1, 2, 1, 2), float(start))
        for layer in range(2):
            memory.segments(layer, raw, turn(raw, frame_positions(torch.tensor([start]), (1, 2)), False), raw)
        memory.commit()
    assert [s.frame for s in memory.stored] == sorted(memory.poses) == [0, 1, 3, 5]
    memory.begin(6, 1, poses_of((7, 7)))
    _, values = memory.past(0)
    assert values[0, ::2, 0, 0].tolist() == [0, 3, 5]  # 0 and 1 were nearest


def test_after_frames_were_dropped_the_rest_sits_right_before_the_window():
    cfg = MemoryConfig("endless", frames=1, history=2, pattern=(1,))
    memory = memory_of(cfg, tokens=1)
    for start in range(6):
        write(memory, start, 1)
    memory.begin(6, 1)
    keys, values = memory.past(0)
    assert keys[0, :, 0, 0].tolist() == [4, 5] and values[0, 0, 0, 0] == 0


def test_a_needle_seen_from_the_same_pose_is_found_long_after():
    """Frame 0 carries a value of its own; at frame 60 the pose is that of frame 0 again."""
    width, far = 8, 60
    angles = torch.linspace(0, 2 * torch.pi, far + 1)
    turned = torch.stack([torch.cos(angles * (i + 1)) for i in range(width)], -1) * 4  # pose numbers; 60 = 0

    def recalled(cfg):
        memory = memory_of(cfg, tokens=4)
        memory._rotate = lambda keys, positions, inverse: keys
        memory._history and setattr(memory._history, "_rotate", memory._rotate)
        for f in range(far + 1):
            memory.begin(f, 1)
            raw = turned[f, :2].expand(1, 4, 1, 2)
            value = torch.full((1, 4, 1, 2), float(f == 0))
            keys, values = staged(memory, 0, raw, raw, value)
            memory.commit()
        share = (keys[0, :, 0] @ raw[0, 0, 0]).softmax(0)
        return float(share @ values[0, :, 0, 0])

    assert recalled(MemoryConfig("compressed", frames=7, history=54)) > 0.1
    assert recalled(MemoryConfig("window", frames=14)) == 0


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"policy": "compressed", "history": 0}, "history >= 1"),
        ({"policy": "window", "history": 3}, "no history"),
        ({"policy": "endless", "history": 3, "sinks": 1}, "no sinks"),
        ({"policy": "compressed", "history": 3, "pattern": ()}, "memory.pattern"),
        ({"policy": "compressed", "history": 3, "pool": "max"}, "memory.pool"),
        ({"policy": "compressed", "history": 3, "entries": "int4"}, "memory.entries"),
    ],
)
def test_impossible_histories_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**kw)


def test_the_least_history_is_one_frame():
    assert MemoryConfig("compressed", history=1).remembers
    with pytest.raises(ValueError, match="no history"):
        MemoryConfig("window", history=1)


def test_learned_pooling_needs_a_network_that_has_the_weights():
    student = tiny_student(replace(COMPRESSED, pool="learned"))
    with pytest.raises(ValueError, match=r"factor 2 in dit.pool_factors"):
        student.block_causal(clip(), chunk_levels(student, 9), condition())


def test_encoding_again_needs_latents_that_can_be_pooled():
    student = tiny_student(replace(COMPRESSED, pool="reencode", pattern=(4,)), text_dim=8)
    with pytest.raises(ValueError, match=r"multiples.*4"), torch.no_grad():
        list(roll(student, finite(endless(SCHEDULE), 1), student.new_memory(1)))


def test_a_network_without_history_is_what_it_was():
    assert set(tiny_dit(DIT).state_dict()) == set(tiny_dit(replace(DIT, pool_factors=())).state_dict())
