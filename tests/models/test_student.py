import pytest
import torch
from tiny_nets import DIT, SHAPE, chunk_levels, clip, condition, tiny_student

from vidistill.memory.policies import POLICIES, MemoryConfig
from vidistill.models.student import StudentConfig
from vidistill.ops.memory_attention import attend


def test_only_the_first_chunk_may_be_shorter():
    student = tiny_student(chunk=3, first=1)
    assert [student.first_frame(c) for c in range(4)] == [0, 1, 4, 7]
    assert student.chunk_of_frames(7).tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_a_clip_that_does_not_end_with_a_chunk_names_the_nearest_lengths():
    with pytest.raises(ValueError, match=r"lengths.*6 and 9"):
        tiny_student().num_chunks(7)


def test_the_block_causal_mask_is_written_out():
    student = tiny_student(MemoryConfig("window", frames=3, sinks=1), chunk=2, first=1)
    assert student.causal_mask(7).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 1],
        [1, 0, 0, 0, 0, 1, 1],
    ]


def test_the_teacher_forcing_mask_is_written_out():
    student = tiny_student(chunk=1)
    assert student.teacher_forcing_mask(3).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def keep_every_other(kept, incoming, cfg):
    """A policy that is not bundled: of what does not fit, every other frame goes first."""
    excess = max(0, len(kept) + incoming - cfg.frames)
    return sorted([*kept[1::2], *kept[::2]][:excess])


MEMORIES = {
    "full": MemoryConfig("full", frames=15),
    "window": MemoryConfig("window", frames=6),
    "window, sinks": MemoryConfig("window", frames=6, sinks=2),
    "window, sinks across chunks": MemoryConfig("window", frames=8, sinks=4),
    "window, absolute sinks": MemoryConfig("window", frames=6, sinks=2, phase="absolute"),
    "compressed": MemoryConfig("compressed", frames=3, history=12, pattern=(1, 2, 2)),
    "compressed, absolute": MemoryConfig("compressed", frames=3, history=12, pattern=(1, 2), phase="absolute"),
    "endless": MemoryConfig("endless", frames=3, history=12, pattern=(1, 2, 2)),
    "strided": ("strided", {"frames": 7}),
    "strided, sinks": ("strided", {"frames": 8, "sinks": 1}),
}


def test_every_policy_is_held_to_its_mask():
    assert set(POLICIES) <= {cfg.policy for cfg in MEMORIES.values() if isinstance(cfg, MemoryConfig)}


@pytest.mark.parametrize("name", MEMORIES)
def test_teacher_forcing_equals_a_noisy_chunk_after_clean_memory(name, monkeypatch):
    monkeypatch.setitem(POLICIES, "strided", keep_every_other)
    cfg = MEMORIES[name]
    student = tiny_student(cfg if isinstance(cfg, MemoryConfig) else MemoryConfig(cfg[0], **cfg[1]))
    frames = 15
    clean, x, cond = clip(frames, seed=5), clip(frames, seed=6), condition(frames)
    sigma, zero = chunk_levels(student, frames), torch.zeros(1, frames)
    memory, forced, causal = student.new_memory(1), [], []
    with torch.no_grad():
        for start in range(0, frames, 3):
            here = slice(start, start + 3)
            forced.append(student.velocity(x[:, here], sigma[:, here], cond, start=start, memory=memory))
            causal.append(student.velocity(clean[:, here], zero[:, here], cond, start=start, memory=memory))
            memory.commit()
        masked = student.teacher_forced(x, sigma, cond, clean, zero)
        assert (masked - torch.cat(forced, dim=1)).abs().max() < 1e-5
        assert (student.block_causal(clean, zero, cond) - torch.cat(causal, dim=1)).abs().max() < 1e-5
        late = student.teacher_forced(x, sigma, cond, clean, zero, first=9)
    assert (late[:, 9:] - masked[:, 9:]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MEMORIES)
def test_a_masked_clip_is_told_by_frames_whatever_the_memory_does(name, monkeypatch):
    monkeypatch.setitem(POLICIES, "strided", keep_every_other)
    cfg, found = MEMORIES[name], []
    student = tiny_student(cfg if isinstance(cfg, MemoryConfig) else MemoryConfig(cfg[0], **cfg[1]))
    monkeypatch.setattr(
        "vidistill.models.layers.attend", lambda q, s, mask: (found.append(mask), attend(q, s, mask))[1]
    )
    with torch.no_grad():
        student.block_causal(clip(15), torch.rand(1, 15), condition(15))
    assert len(found) == DIT.layers
    assert all(mask.seen.shape[0] == 15 and mask.tokens == SHAPE.tokens_per_frame for mask in found)


@pytest.mark.parametrize("kw", [{"chunk": 0}, {"first_chunk": -1}, {"chunk": 5, "memory": MemoryConfig("full", 4)}])
def test_impossible_students_are_refused(kw):
    with pytest.raises(ValueError):
        StudentConfig(**kw)
