"""What autograd keeps for a backward pass."""

from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Measures, as a context manager, how many bytes autograd keeps for the backward pass: `peak` and `now`.

    Tensors that share memory count once; parameters count as long as a graph refers to them.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.users: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def pack(self, x: Tensor) -> "Held":
        storage = x.untyped_storage()
        key = storage.data_ptr()
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        return Held(x, self)

    def release(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage.data_ptr()
        self.users[key] -= 1
        if self.users[key] == 0:
            del self.users[key]
            self.now -= storage.nbytes()

    def __enter__(self) -> "SavedBytes":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Held:
    """A saved tensor that tells when it is let go."""

    def __init__(self, tensor: Tensor, owner: SavedBytes) -> None:
        self.tensor, self.owner = tensor, owner

    def __del__(self) -> None:
        self.owner.release(self.tensor)
