"""Player: one session in a thread of its own, generating just ahead of what is shown."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vidistill.streaming.session import Frame, StreamSession

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """A frame to show, and whether it is the first after a start."""

    frame: Frame
    first: bool


class Player:
    """Pulls frames from a session no sooner than needed, so that keys pressed late still count.

    `changed` is called, from the player's thread, whenever there is something new to look at: a frame, `session` after
    opening, `error`, `finished`. Every other method may be called from any thread, and returns at once.
    """

    def __init__(self, open_session: Callable[[], StreamSession], changed: Callable[[], None]) -> None:
        self.session: StreamSession | None = None
        self.error: Exception | None = None
        self.finished = False
        self.paused = False
        self._open, self._changed = open_session, changed
        self._lock = threading.Condition()
        self._frames: deque[Shown] = deque()
        self._start: tuple[int, np.ndarray | None] | None = None  # seed and image of the newest reset not yet begun
        self._closing = False
        self._first = True
        self._block_s = 0.0  # longest recent wait for a frame: how far ahead to ask for the next chunk
        self._taken_at = -math.inf  # when the last frame was taken
        self._fps, self._frame_s = 0.0, 0.0  # the world's own, and what a frame costs
        self._thread = threading.Thread(target=self._run, name="vidistill-player", daemon=True)
        self._thread.start()

    def reset(self, seed: int, image: np.ndarray | None) -> None:
        """Start again, with the inputs still held; frames that wait to be shown are dropped. The newest reset wins."""
        with self._lock:
            self._frames.clear()
            self._start = (seed, image)
            self._lock.notify()

    def pause(self, on: bool) -> None:
        with self._lock:
            self.paused = on
            self._lock.notify()

    def close(self) -> None:
        """Ask the thread to end after the frame it is busy with; `finished` tells when the session is closed."""
        with self._lock:
            self._closing = True
            self._lock.notify()

    def take(self) -> Shown | None:
        """The next frame to show, if there is one."""
        with self._lock:
            shown = self._frames.popleft() if self._frames and not self.paused else None
            if shown is not None:
                self._taken_at = time.perf_counter()
            self._lock.notify()
            return shown

    @property
    def frame_s(self) -> float:
        """Seconds between frames shown: the world's own pace, or what the machine manages."""
        return max(1 / self._fps, self._frame_s)

    def _run(self) -> None:
        session = None
        try:
            session = self.session = self._open()
            self._changed()
            self._play(session)
        except Exception as error:
            log.exception("a stream stopped")
            self.error = error
        finally:
            try:
                if session is not None:
                    session.close()
            except Exception:
                log.exception("a session did not close")
            # Whoever still holds the player, a traceback perhaps, does not hold the memory of its session.
            self.session = None
            self._frames.clear()
            self.finished = True
            self._changed()

    def _play(self, session: StreamSession) -> None:
        self._fps = session.fps
        frames, chunk, spent, count = session.frames(), None, 0.0, 0
        while self._wait(session):
            if self._begin(session):
                chunk = None
            began = time.perf_counter()
            frame = next(frames, None)
            took = time.perf_counter() - began
            if frame is None:
                raise RuntimeError("the session ended its stream")
            if chunk is not None and frame.chunk != chunk:
                self._block_s = max(took, 0.95 * self._block_s)
                self._frame_s = 0.8 * self._frame_s + 0.2 * spent / count
            elif not self._block_s:
                self._block_s = took  # nothing better is known yet
            if frame.chunk != chunk:
                chunk, spent, count = frame.chunk, 0.0, 0
            spent, count = spent + took, count + 1
            self._keep(frame)

    def _wait(self, session: StreamSession) -> bool:
        """Blocks until another frame is needed; False when it is time to close."""
        with self._lock:
            ahead = min(1 + math.ceil(self._lead_s / self.frame_s), 1 + session.frames_per_chunk)
            while not self._closing and self._start is None:
                if self.paused or len(self._frames) >= ahead:
                    self._lock.wait()
                elif (early := self._needed_at - time.perf_counter()) > 0:
                    self._lock.wait(early)
                else:
                    break
            return not self._closing

    @property
    def _needed_at(self) -> float:
        """When to ask for the next frame, to have it in time."""
        return self._taken_at + (1 + len(self._frames)) * self.frame_s - self._lead_s

    @property
    def _lead_s(self) -> float:
        """Seconds before a frame is due to ask for it: longest recent wait, and a margin for one that is longer."""
        return self._block_s + max(self.frame_s / 2, self._block_s / 4)

    def _begin(self, session: StreamSession) -> bool:
        """Start again if that was asked for."""
        with self._lock:
            start, self._start = self._start, None
        if start is None:
            return False
        session.reset(seed=start[0], image=start[1])
        with self._lock:
            self._frames.clear()
            self._first = True
        return True

    def _keep(self, frame: Frame) -> None:
        with self._lock:
            if self._start is not None:  # this frame is of the past
                return
            self._frames.append(Shown(frame, self._first))
            self._first = False
        self._changed()
