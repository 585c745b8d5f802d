"""Batches read before they are needed, by processes of their own."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vidistill.data.types import Batch

AHEAD = 2  # batches that each process holds ready


class _Batches(Dataset[Batch]):
    def __init__(self, read: Callable[[int], Batch]) -> None:
        self.read = read

    def __getitem__(self, step: int) -> Batch:
        return self.read(step)


def _same(batch: Any) -> Any:
    return batch


def read_ahead(read: Callable[[int], Batch], steps: Iterable[int], workers: int) -> Iterator[Batch]:
    """`read(step)` for each of `steps`, in order; `workers` processes read ahead, none reads when asked.

    Workers are forked: `read` and what it holds (mapped shards) are shared with them, not sent.
    """
    loader = DataLoader(
        _Batches(read),
        sampler=steps,
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    yield from loader
