"""A log that whoever breaks connections all day does not fill."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINES = 20  # records of one place in the code that are written, tracebacks included
THEN_S = 60.0  # afterwards, one in so many seconds


class Few(logging.Filter):
    """Lets the first records of each place in the code through, then one a minute, which says how many were not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], tuple[int, int, float]] = {}  # written, left out, time of the last

    def filter(self, record: logging.LogRecord) -> bool:
        if "few" not in record.__dict__:  # else another handler has asked
            record.__dict__["few"] = self._count(record)
        return bool(record.__dict__["few"])

    def _count(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), self._clock()
        written, left, last = self._places.get(place, (0, 0, now))
        if written >= LINES and now - last < THEN_S:
            self._places[place] = written, left + 1, last
            return False
        self._places[place] = written + 1, 0, now
        if left:
            record.msg, record.args = f"{record.getMessage()} (and {left} more like it)", ()
        return True


@contextmanager
def few_lines() -> Iterator[None]:
    """Inside, every handler of the program writes few records of a kind, whoever logs them."""
    handlers, few = [*logging.getLogger().handlers, *logging.getLogger("uvicorn").handlers], Few()
    for handler in handlers:
        handler.addFilter(few)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(few)
