"""A memory as one pass under autograd sees it."""

from typing import Protocol

import torch
from torch import Tensor

from vidistill.ops.memory_attention import Segment


class Memory(Protocol):
    """What a pass needs of a memory: its past, and a place for its own entries."""

    @property
    def wants_raw(self) -> bool: ...
    def past(self, layer: int) -> tuple[Tensor, Tensor]: ...
    def write(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> None: ...


class AutogradView:
    """A memory as one pass under autograd sees it: read once, written once, so that the backward pass may run a block
    again (activation checkpointing) and finds the history of the first time."""

    def __init__(self, memory: Memory, own_tokens: int) -> None:
        self._memory, self._own = memory, own_tokens
        self._past: dict[int, tuple[Tensor, Tensor]] = {}
        self.wants_raw = memory.wants_raw  # of this pass, also once the memory has gone on

    def segments(self, layer: int, raw: Tensor | None, keys: Tensor, values: Tensor) -> list[Segment]:
        """As `KVMemory.segments`; only the chunk's own part carries gradient."""
        if layer not in self._past:
            self._past[layer] = self._memory.past(layer)
            self._memory.write(layer, raw, keys, values)
        past_keys, past_values = self._past[layer]
        own = slice(keys.shape[1] - self._own, None)
        return [Segment(torch.cat((past_keys, keys[:, own]), dim=1), torch.cat((past_values, values[:, own]), dim=1))]
