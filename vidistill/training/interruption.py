"""Ending a run when it is told to: the step is finished and saved first."""

import signal
import threading
from typing import Any

from vidistill import distributed

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interruption:
    """As a context: notes the first signal of SIGNALS for the loop to end at; a second one ends the process at once.

    Signals that are ignored, as SIGHUP is under nohup, stay so. Outside the main thread nothing is changed.
    """

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        for number in self.before:
            signal.signal(number, self.note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def agreed(self) -> int:
        """The signal any process of the run has received, the same answer on every rank; 0: none."""
        return distributed.largest(self.received)
