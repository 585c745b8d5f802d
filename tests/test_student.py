import pytest
import torch
from tiny_nets import chunk_levels, clip, condition, tiny_student

from vidistill.memory import MemoryConfig
from vidistill.student import StudentConfig


def test_only_the_first_chunk_may_be_shorter():
    student = tiny_student(chunk=3, first=1)
    assert [student.first_frame(c) for c in range(4)] == [0, 1, 4, 7]
    assert student.chunk_of_frames(7).tolist() == [0, 1, 1, 1, 2, 2, 2]


def test_a_clip_that_does_not_end_with_a_chunk_names_the_nearest_lengths():
    with pytest.raises(ValueError, match="nearest lengths are 6 and 9"):
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


def test_teacher_forcing_equals_a_noisy_chunk_after_clean_memory():
    student = tiny_student()
    clean, x, cond = clip(seed=5), clip(seed=6), condition()
    sigma, zero = chunk_levels(student, 9), torch.zeros(1, 9)
    memory, parts = student.new_memory(1), []
    with torch.no_grad():
        forced = student.teacher_forced(x, sigma, cond, clean, zero)
        for start in (0, 3, 6):
            here = slice(start, start + 3)
            parts.append(student.velocity(x[:, here], sigma[:, here], cond, start=start, memory=memory))
            student.velocity(clean[:, here], zero[:, here], cond, start=start, memory=memory)
            memory.commit()
    assert (forced - torch.cat(parts, dim=1)).abs().max() < 1e-5


@pytest.mark.parametrize("kw", [{"chunk": 0}, {"first_chunk": -1}, {"chunk": 5, "memory": MemoryConfig("full", 4)}])
def test_impossible_students_are_refused(kw):
    with pytest.raises(ValueError):
        StudentConfig(**kw)
