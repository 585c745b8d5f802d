"""Who computes when denoiser and decoder share a processor that one of them fills."""

from threading import Condition, get_ident


class Turns:
    """Passes and decodes, one at a time where a processor is `crowded`, the decoder next as soon as it waits.

    Two teams of threads on the same cores wait for each other inside every operator and lose more than they overlap.
    """

    def __init__(self, crowded: bool) -> None:
        self._crowded, self._turn = crowded, Condition()
        self._holder, self._decoders = 0, 0  # the thread that computes, and decoders that wait

    def take(self, decodes: bool) -> None:
        """Wait until this thread may compute."""
        if not self._crowded:
            return
        with self._turn:
            self._decoders += decodes
            self._turn.wait_for(lambda: not self._holder and (decodes or not self._decoders))
            self._decoders -= decodes
            self._holder = get_ident()

    def leave(self) -> None:
        """Let others compute; nothing happens where it is not this thread's turn."""
        with self._turn:
            if self._holder == get_ident():
                self._holder = 0
                self._turn.notify_all()
