"""Progress bars on stderr where it is a terminal; where it is a file or a pipe, nothing at all."""

import functools
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

REDRAW_S = 0.25

Item = TypeVar("Item")


@functools.cache
def console() -> Console:
    """The console of stderr, shared: rich draws bars inside bars only where they have one console."""
    return Console(stderr=True)


class Speed(ProgressColumn):
    """Units a second, as far as they have been counted."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {task.fields['unit']}/s" if task.speed else "")


class Bar:
    """A bar that counts to `total` (None: unknown) from `done`, shown between `__enter__` and `__exit__`.

    It is drawn by `update` alone, at most every REDRAW_S: a thread that draws would run beside what is timed. While it
    is shown, log records and prints go above it.
    """

    def __init__(self, total: int | None, text: str = "", unit: str = "it", done: int = 0, shown: bool = True):
        count = "{task.completed:.0f}/{task.total:.0f}" if total is not None else "{task.completed:.0f}"
        self.rich = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn(count + " {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            Speed(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console(),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # what is printed into a file stays there
            disable=not (shown and console().file.isatty()),
        )
        self.task = self.rich.add_task(text, total=total, completed=done, unit=unit, note="")
        self.drawn = 0.0

    def __enter__(self) -> "Bar":
        before = sys.stderr
        self.rich.start()
        redirect_logs(before, sys.stderr)
        self.rich.refresh()
        return self

    def __exit__(self, *_: Any) -> None:
        before = sys.stderr
        self.rich.stop()
        redirect_logs(before, sys.stderr)

    def update(self, count: int = 1) -> None:
        """Count so many more."""
        now = time.monotonic()
        due = now - self.drawn >= REDRAW_S
        self.drawn = now if due else self.drawn
        self.rich.update(self.task, advance=count, refresh=due)

    def describe(self, text: str) -> None:
        """Change the text before the bar, from the next time it is drawn."""
        self.rich.update(self.task, description=text)

    def note(self, text: str) -> None:
        """Change the text after the bar, from the next time it is drawn."""
        self.rich.update(self.task, note=text)


def redirect_logs(before: TextIO, after: TextIO) -> None:
    """Let the handlers of the root logger that write to `before` write to `after`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)


def track(items: Iterable[Item], text: str = "", total: int | None = None, unit: str = "it") -> Iterator[Item]:
    """The items, counted by a bar while they are used."""
    with Bar(total, text, unit) as bar:
        for item in items:
            yield item
            bar.update()
