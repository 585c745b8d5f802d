"""Launch parameters of the Triton kernels, as data.

Every list starts with what is used; the rest are candidates for `scripts/verify_kernels.py --tune`. They are starting
points chosen by arithmetic, not by measurement: all of them compile for their machine and fit its shared memory (the
script checks that without a GPU), but nobody has timed them on one yet. Whoever does puts the winner first.
"""

from functools import cache

Config = dict[str, int]


def _configs(*rows: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple({"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s} for m, n, w, s in rows)


def _rows(*rows: tuple[int, int]) -> tuple[Config, ...]:
    return tuple({"ROWS": r, "num_warps": w} for r, w in rows)


ATTENTION_FORWARD = "attention_forward"
ATTENTION_BACKWARD = "attention_backward"
MEMORY = "memory_attention"
NORM_ROPE = "norm_rope"
MODULATION = "modulation"
APPEND = "append"

TABLES: dict[str, dict[str, tuple[Config, ...]]] = {
    "hopper": {  # compute capability 9.0: 227 KiB of shared memory a block
        ATTENTION_FORWARD: _configs((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
        ATTENTION_BACKWARD: _configs((64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2)),
        MEMORY: _configs((64, 64, 4, 3), (128, 64, 8, 2), (32, 64, 4, 3), (16, 128, 4, 2)),
        NORM_ROPE: _rows((4, 4), (8, 4), (1, 4), (4, 8)),
        MODULATION: _rows((4, 4), (8, 8), (2, 4), (1, 4)),
        APPEND: _rows((8, 4), (4, 4), (16, 4), (16, 8)),
    },
    "ada": {  # compute capability 8.9: 99 KiB
        ATTENTION_FORWARD: _configs((64, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)),
        ATTENTION_BACKWARD: _configs((32, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 2), (64, 32, 4, 2)),
        MEMORY: _configs((64, 32, 4, 2), (32, 64, 4, 2), (64, 64, 4, 2), (16, 64, 4, 2)),
        NORM_ROPE: _rows((4, 4), (2, 4), (8, 4), (1, 4)),
        MODULATION: _rows((4, 4), (2, 4), (8, 8), (1, 4)),
        APPEND: _rows((8, 4), (4, 4), (16, 4), (16, 8)),
    },
    "interpreter": {  # small tiles, so that odd shapes cross their edges in the tests
        ATTENTION_FORWARD: _configs((32, 32, 4, 1)),
        ATTENTION_BACKWARD: _configs((32, 32, 4, 1)),
        MEMORY: _configs((32, 32, 4, 1)),
        NORM_ROPE: _rows((16, 4)),
        MODULATION: _rows((16, 4)),
        APPEND: _rows((16, 4)),
    },
}
ARCHITECTURES = {(9, 0): "hopper", (8, 9): "ada"}


def table_for(capability: tuple[int, int]) -> str:
    """Name of the table for a GPU: its own, or that of the nearest machine with at most its shared memory."""
    return ARCHITECTURES.get(capability, "hopper" if capability >= (9, 0) and capability[0] != 12 else "ada")


@cache
def config(kernel: str, device: str, index: int | None) -> Config:
    """Launch parameters of `kernel` on a device ("cuda", its index) or in the interpreter ("cpu")."""
    if device != "cuda":
        return TABLES["interpreter"][kernel][0]
    import torch

    return TABLES[table_for(torch.cuda.get_device_capability(index))][kernel][0]
