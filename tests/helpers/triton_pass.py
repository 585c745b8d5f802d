"""Prints how far passes through the Triton kernels are from plain ones; run with TRITON_INTERPRET=1."""

import torch
from tiny_nets import clip, condition, tiny_student

from vidistill.memory.policies import MemoryConfig
from vidistill.ops.attention import use_backend

MEMORIES = {
    "window and sinks": MemoryConfig("window", frames=6, sinks=1),
    "8-bit history": MemoryConfig("endless", frames=6, history=4, pattern=(1, 2), entries="int8"),
}


def stream(memory: MemoryConfig, backend: str) -> torch.Tensor:
    """Velocities of chunks told by one student, the last of them with a history."""
    student, out = tiny_student(memory).eval(), []
    held = student.new_memory(1)
    with use_backend(backend), torch.no_grad():
        for start in range(0, 12, 3):
            out.append(student.velocity(clip(3, seed=start), torch.zeros(1, 3), condition(3), start=start, memory=held))
            held.commit()
    return torch.cat(out, 1)


for name, memory in MEMORIES.items():
    wanted = stream(memory, "reference")
    print(f"{name}: {float((stream(memory, 'triton') - wanted).abs().max() / wanted.abs().max()):.1e}")
