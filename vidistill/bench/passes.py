"""The bytes that passes of a network keep for their backward passes and work with, at any size.

Counted on fake tensors, which have shapes and no numbers: passes run forward and backward at their true width and
length, with one block of each kind and with one more, and every other block costs what that one does.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidistill.bench import cost
from vidistill.diffusion import LatentShape
from vidistill.models.dit import VideoDiT, share_weights
from vidistill.models.layers import DiTConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.ops.attention import use_backend
from vidistill.ops.precision import DTYPES, autocast


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators inside have made and that are still there, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is None or storage._cdata in self._known | given:  # a view of what was there
                continue
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return out

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


_counted: dict[str, tuple[int, int]] = {}  # by repr: the dicts inside cannot be hashed


@dataclass(frozen=True)
class Passes:
    """`count` forwards of a clip of `frames` latent frames, with `grad` all held for one backward pass.

    `memory`: a student's, into which each of them writes the first chunk of a stream; None: a clip seen at once.
    `frozen`: gradient reaches the latents alone, as through a teacher, whose weights are of `dtype`. `cached`: passes
    share the cast of a weight. `offload`: what autograd saves waits elsewhere. LoRA changes little of it: what its
    matrices keep lies inside blocks.
    """

    dit: DiTConfig
    size: tuple[int, int]
    frames: int
    count: int = 1
    memory: StudentConfig | None = None
    grad: bool = True
    frozen: bool = False
    dtype: torch.dtype = torch.float32
    precision: str = "bf16"
    cached: bool = True
    offload: bool = False


def kept_bytes(p: Passes) -> int:
    """Bytes of all but weights that stay from these forwards to their backward passes.

    Blocks that take the same sites keep the same: one of each kind is run, and then one more of it.
    """
    kinds = dict[tuple[str, ...], list[int]]()
    for k in range(p.dit.layers):
        kinds.setdefault(tuple(n for n, site in p.dit.sites.items() if k in site.layers), []).append(k)
    firsts = [blocks[0] for blocks in kinds.values()]
    total = base = live_bytes(replace(p, dit=with_blocks(p.dit, firsts)))[0]
    for blocks in kinds.values():
        if len(blocks) > 1:
            more = live_bytes(replace(p, dit=with_blocks(p.dit, [*firsts, blocks[1]])))[0]
            total += (len(blocks) - 1) * (more - base)
    return total


def with_blocks(dit: DiTConfig, blocks: Iterable[int]) -> DiTConfig:
    """A network of these of its blocks alone."""
    kept = sorted(blocks)
    sites = {
        name: replace(site, layers=tuple(k for k, block in enumerate(kept) if block in site.layers))
        for name, site in dit.sites.items()
    }
    return replace(dit, layers=len(kept), sites=sites)


def live_bytes(p: Passes) -> tuple[int, int]:
    """As `kept_bytes`, every block run; and the most that forward and backward passes work with beside that.

    Counted once a process: stages have networks in common, and so do the sizes that one plan tries.
    """
    if (key := repr(p)) not in _counted:
        _counted[key] = count_live(p)
    return _counted[key]


def count_live(p: Passes) -> tuple[int, int]:
    with FakeTensorMode(), use_backend("sdpa"):
        net = share_weights(VideoDiT(p.dit), p.dit, dtype=p.dtype).requires_grad_(not p.frozen)
        shape = LatentShape(p.frames, p.dit.channels, *p.size, p.dit.patch)
        student = CausalStudent(net, p.memory or StudentConfig(), shape)
        x = torch.zeros(1, p.frames, p.dit.channels, *p.size, requires_grad=p.frozen)
        cond, sigma = cost.blank_condition(p.dit, x.detach()), torch.zeros(1, p.frames)
        memories = [student.new_memory(1, dtype=DTYPES[p.precision]) if p.memory else None for _ in range(p.count)]
        elsewhere = saved_tensors_hooks(lambda x: (x.shape, x.dtype), lambda x: torch.empty(x[0], dtype=x[1]))
        with LiveBytes() as live, torch.set_grad_enabled(p.grad), autocast(p.precision, "cpu", p.cached):
            with elsewhere if p.offload else nullcontext():
                made = [net(x, sigma, cond, memory=memory) for memory in memories]
            kept = live.now - sum(v.nbytes for v in made)
            if p.grad:
                torch.autograd.backward([v.sum() for v in made])
    return kept, live.peak - kept
