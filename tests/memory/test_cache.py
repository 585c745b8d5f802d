import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_nets import DIT, SHAPE, clip, condition, tiny_student

from vidistill.memory.cache import KVMemory
from vidistill.memory.policies import MemoryConfig
from vidistill.memory.pooling import Pooling, frame_positions
from vidistill.memory.spec import CacheSpec
from vidistill.ops.memory_attention import joined


def turn(keys, positions, inverse):
    """A rotation that is easy to read back: time is added to the keys."""
    time = positions[:, 0].to(keys.dtype)[None, :, None, None]
    return keys - time if inverse else keys + time


def memory_of(cfg, tokens=1):
    grid = (1, tokens)
    pooling = Pooling(cfg.pool, grid, stretch=cfg.stretch)
    return KVMemory(cfg, CacheSpec(layers=2, batch=1, heads=1, head_dim=2, grid=grid, rotate=turn, pooling=pooling))


def staged(memory, layer, raw, keys, values):
    """All keys and values that a chunk's queries attend to."""
    return joined(memory.segments(layer, raw, keys, values), values.dtype)


def write(memory, start, frames, *, commit=True, value=None):
    """One pass over frames start.. whose values are their frame numbers; returns the frames its queries saw."""
    times = memory.begin(start, frames)
    n = memory.tokens_per_frame
    numbers = torch.arange(start, start + frames).float().repeat_interleave(n)[None, :, None, None].expand(-1, -1, 1, 2)
    raw = torch.zeros_like(numbers) if value is None else torch.full_like(numbers, value)
    keys = turn(raw, frame_positions(times, (1, n)), False)
    for layer in range(2):
        _, seen = staged(memory, layer, raw, keys, numbers)
    if commit:
        memory.commit()
    return sorted(seen[0, ::n, 0, 0].tolist())


def plain_window(kept, start, frames, cfg):
    """The policy over a plain list: sinks stay, then the oldest go."""
    excess = max(0, len(kept) + frames - cfg.frames)
    old = [f for f in kept if f >= cfg.sinks][:excess]
    return [f for f in kept if f not in old] + list(range(start, start + frames))


@settings(max_examples=40, deadline=None)
@given(
    sinks=st.integers(0, 4),
    room=st.integers(3, 6),
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=9),
    phase=st.sampled_from(["relative", "absolute"]),
)
def test_a_window_keeps_what_a_plain_list_keeps(sinks, room, lengths, phase):
    cfg = MemoryConfig("window", frames=sinks + room, sinks=sinks, phase=phase)
    memory, kept, start = memory_of(cfg, tokens=2), [], 0
    for frames, rehearsals in lengths:
        want = plain_window(kept, start, frames, cfg)
        for _ in range(rehearsals):
            assert write(memory, start, frames, commit=False) == want
        assert write(memory, start, frames) == want
        kept, start = want, start + frames
        keys, values, order = memory.entries(1, unrotated=True)
        assert order == kept and values[0, ::2, 0, 0].tolist() == kept
        assert keys.abs().max() == 0  # turning back undoes every turn, sinks that moved included


def test_a_full_memory_says_what_to_do():
    memory = memory_of(MemoryConfig("full", frames=4))
    write(memory, 0, 3)
    with pytest.raises(ValueError, match=r"memory.frames is 4.*window"):
        memory.begin(3, 3)


def test_a_chunk_that_does_not_fit_beside_the_sinks_is_refused():
    memory = memory_of(MemoryConfig("window", frames=5, sinks=3))
    write(memory, 0, 3)
    with pytest.raises(ValueError, match=r"not fit memory\.frames=5"):
        memory.begin(3, 3)


def test_chunks_come_in_order():
    memory = memory_of(MemoryConfig("full", frames=4))
    with pytest.raises(ValueError, match=r"starts.*0, got 2"):
        memory.begin(2, 1)


def test_a_chunk_that_is_never_committed_leaves_no_trace():
    memory = memory_of(MemoryConfig("full", frames=6))
    write(memory, 0, 3)
    write(memory, 3, 3, commit=False)
    assert memory.frames == [0, 1, 2] and memory.next_frame == 3


def test_relative_sinks_sit_right_before_the_window():
    memory = memory_of(MemoryConfig("window", frames=5, sinks=2, phase="relative"))
    for start in (0, 2, 4, 6):
        write(memory, start, 2)
    keys, _, frames = memory.entries(0)
    assert frames == [0, 1, 5, 6, 7] and keys[0, :, 0, 0].tolist() == [3, 4, 5, 6, 7]


def test_absolute_sinks_keep_the_phase_they_were_written_with():
    memory = memory_of(MemoryConfig("window", frames=5, sinks=2, phase="absolute"))
    for start in (0, 2, 4, 6):
        write(memory, start, 2)
    keys, _, frames = memory.entries(0)
    assert keys[0, :, 0, 0].tolist() == [float(f) for f in frames]


def test_bytes_are_known_before_anything_is_allocated():
    cfg = MemoryConfig("window", frames=5, sinks=2)
    memory = memory_of(cfg, tokens=3)
    assert memory.memory_bytes == cfg.bytes(layers=2, width=2, tokens_per_frame=3)


def test_while_autograd_records_only_the_own_part_carries_gradient():
    memory = memory_of(MemoryConfig("full", frames=4))
    write(memory, 0, 2)
    memory.begin(2, 2)
    own = torch.ones(1, 2, 1, 2, requires_grad=True)
    keys, _ = staged(memory, 0, own, own * 2, own)
    assert keys.data_ptr() != memory._keys.data_ptr()
    keys.sum().backward()
    assert torch.equal(own.grad, torch.full_like(own, 2.0))
    assert not memory._keys.requires_grad


def test_without_autograd_a_read_is_a_view():
    memory = memory_of(MemoryConfig("full", frames=4))
    memory.begin(0, 2)
    own = torch.ones(1, 2, 1, 2)
    keys, _ = staged(memory, 0, own, own, own)
    assert keys.data_ptr() == memory._keys.data_ptr()


def test_a_fork_is_independent():
    memory = memory_of(MemoryConfig("full", frames=6))
    write(memory, 0, 2)
    twin = memory.fork()
    write(twin, 2, 2)
    assert memory.frames == [0, 1] and twin.frames == [0, 1, 2, 3]
    write(memory, 2, 2)
    assert torch.equal(memory.entries(0)[1], twin.entries(0)[1])


@pytest.mark.parametrize("entries", ["dense", "int8"])
@torch.no_grad()
def test_a_fork_with_a_history_goes_on_as_the_original_does(entries):
    student = tiny_student(MemoryConfig("endless", frames=6, history=4, pattern=(1, 2), entries=entries))

    def go_on(memory, starts):
        for start in starts:
            v = student.velocity(clip(3, seed=start), torch.zeros(1, 3), condition(3), start=start, memory=memory)
            memory.commit()
        return v

    memory = student.new_memory(1)
    go_on(memory, range(0, 12, 3))
    twin = memory.fork()
    wanted = go_on(memory, range(12, 24, 3))  # frames leave the history of one, not of the other
    assert torch.equal(go_on(twin, range(12, 24, 3)), wanted)


def test_a_rewind_forgets_the_newest_frames():
    memory = memory_of(MemoryConfig("window", frames=6, sinks=1))
    for start in (0, 2, 4):
        write(memory, start, 2)
    memory.rewind(3)
    assert memory.frames == [0, 1, 2] and memory.next_frame == 3


def test_frames_written_again_look_at_the_sinks_that_stay():
    memory = memory_of(MemoryConfig("window", frames=6, sinks=2))
    for start in (0, 2, 4, 6):
        write(memory, start, 2)
    memory.rewind(2, keep_sinks=True)
    assert memory.frames == [0, 1]
    assert write(memory, 2, 6) == [0, 1, 4, 5, 6, 7]  # the first two only look
    assert memory.frames == [0, 1, 4, 5, 6, 7] and memory.next_frame == 8


def test_after_a_reset_the_first_frames_become_the_sinks():
    memory = memory_of(MemoryConfig("window", frames=4, sinks=2))
    write(memory, 0, 2)
    memory.reset(10)
    for start in (10, 12, 14):
        write(memory, start, 2)
    assert memory.frames == [10, 11, 14, 15]


@pytest.mark.parametrize(
    ("kw", "message"),
    [({"policy": "oldest"}, "memory.policy"), ({"phase": "none"}, "memory.phase"), ({"sinks": 22}, "sinks < frames")],
)
def test_impossible_memories_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**kw)


@torch.no_grad()
def test_a_memory_that_has_advanced_reads_as_one_that_ran_there():
    student = tiny_student(MemoryConfig("window", frames=6, sinks=1))
    cond, sigma = condition(3), torch.zeros(1, 3)

    def run(memory, starts):
        for start in starts:
            v = student.velocity(clip(3, seed=start % 12), sigma, cond, start=start, memory=memory)
            memory.commit()
        return v

    ran, jumped = student.new_memory(1), student.new_memory(1)
    run(ran, range(0, 9 + 120, 3))
    run(jumped, range(0, 9, 3))
    jumped.advance(120)
    assert jumped.frames == ran.frames and jumped.next_frame == 129
    torch.testing.assert_close(run(jumped, [129]), run(ran, [129]), rtol=1e-4, atol=1e-5)
    compressed = tiny_student(MemoryConfig("endless", frames=6, history=4, pattern=(1, 2))).new_memory(1)
    with pytest.raises(ValueError, match="multiple of 2"):
        compressed.advance(7)


@torch.no_grad()
def test_a_dense_history_lies_behind_the_window_and_is_read_without_a_copy():
    student = tiny_student(MemoryConfig("endless", frames=6, history=4, pattern=(1, 2)))
    memory = student.new_memory(1)
    for start in range(0, 15, 3):
        student.velocity(clip(3), torch.zeros(1, 3), condition(3), start=start, memory=memory)
        memory.commit()
    memory.begin(15, 3)
    own = torch.zeros(1, 12, 2, 12)
    (segment,) = memory.segments(0, own, own, own)
    assert segment.keys.shape[1] == 6 * 4 + sum(s.tokens for s in memory.stored if s.frame not in memory.frames)
    assert segment.keys.data_ptr() == memory._keys[0].data_ptr()
    old_keys, old_values = memory.past(0)
    turned = old_keys.shape[1] - len(memory.frames) * 4
    torch.testing.assert_close(segment.keys[:, 24:], old_keys[:, :turned])
    torch.testing.assert_close(segment.values[:, 24:], old_values[:, :turned])


def held_bytes() -> int:
    """Bytes of all storages that Python objects hold."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = [x.untyped_storage() for x in found if x.layout == torch.strided]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def recomputed_clip(cfg, before_backward=None):
    """Gradients of a clip whose chunks recompute their blocks, and the bytes of the past that their graphs hold."""
    student, cond, sigma = tiny_student(cfg, checkpoint=True), condition(3), torch.zeros(1, 3)
    memory, total, held = student.new_memory(1), 0.0, held_bytes()
    for start in range(0, 12, 3):
        total = total + student.velocity(clip(3, seed=start), sigma, cond, start=start, memory=memory).square().sum()
        memory.commit()
    held = held_bytes() - held
    if before_backward is not None:
        before_backward(student, memory)
    total.backward()
    return [p.grad for p in student.net.parameters()], held


def test_a_recomputed_clip_holds_no_copy_of_a_past_whose_slots_are_used_once():
    whole, held = recomputed_clip(MemoryConfig("full", frames=12))
    copied, more = recomputed_clip(MemoryConfig("window", frames=12))
    past = (3 + 6 + 9) * SHAPE.tokens_per_frame * DIT.width * 4
    assert more - held == 2 * DIT.layers * past  # keys and values of what each chunk found
    assert all(torch.equal(a, b) for a, b in zip(whole, copied, strict=True))


@pytest.mark.parametrize("way", ["reset", "rewind", "fork"])
@torch.no_grad()
def test_slots_that_are_filled_anew_leave_a_waiting_backward_pass_alone(way):
    def fill_anew(student, memory):
        with torch.no_grad():
            memory = memory.fork() if way == "fork" else memory
            memory.rewind(0) if way == "rewind" else memory.reset()
            for start in range(0, 12, 3):
                student.velocity(clip(3, seed=90), torch.ones(1, 3), condition(3), start=start, memory=memory)
                memory.commit()

    with torch.enable_grad():
        wanted, _ = recomputed_clip(MemoryConfig("full", frames=12))
        got, _ = recomputed_clip(MemoryConfig("full", frames=12), fill_anew)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
