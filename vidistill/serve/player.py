"""Player: one session in a thread of its own, generating just ahead of what is shown."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

log = logging.getLogger(__name__)

HISTORY = 256  # inputs whose browser id is remembered


class Frame(Protocol):
    """What of a `stream.Frame` is served."""

    @property
    def px(self) -> np.ndarray: ...  # uint8 [H, W, 3]
    @property
    def index(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def input_id(self) -> int: ...
    @property
    def made_at(self) -> float: ...  # time.perf_counter()
    @property
    def stats(self) -> Mapping[str, float]: ...
    @property
    def sound(self) -> np.ndarray | None: ...  # float32 [n], of a session that speaks


class Session(Protocol):
    """What of a `stream.StreamSession` is served."""

    @property
    def fps(self) -> float: ...
    @property
    def nfe_per_chunk(self) -> float: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def frames_per_chunk(self) -> int: ...
    @property
    def queued_audio_s(self) -> float: ...  # seconds of sound that wait for their turn
    @property
    def navigator(self) -> Any: ...  # placed, map, go_home, ...; None for a session that knows no places
    def set(
        self,
        *,
        action: Mapping[str, float] | None = None,
        prompt: str | None = None,
        switch: str | None = None,
        audio: np.ndarray | None = None,
    ) -> int: ...
    def clear_audio(self) -> None: ...
    def reset(self, *, seed: int, image: np.ndarray | None) -> Any: ...
    def frames(self) -> Iterator[Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Shown:
    """A frame to show: the browser's id of the input behind it, and whether it is the first after a start."""

    frame: Frame
    input_id: int
    first: bool


class Player:
    """Pulls frames from a session no sooner than needed, so that keys pressed late still count.

    `changed` is called, from the player's thread, whenever there is something new to look at: a frame, `session` after
    opening, `error`, `finished`. Every other method may be called from any thread; all but `say` return at once.
    """

    def __init__(self, open_session: Callable[[], Session], changed: Callable[[], None]) -> None:
        self.session: Session | None = None
        self.error: Exception | None = None
        self.finished = False
        self._open, self._changed = open_session, changed
        self._lock = threading.Condition()
        self._frames: deque[Shown] = deque()
        self._jobs: deque[Callable[[Session], object]] = deque()
        self._ids: dict[int, int] = {}  # id of the session -> id of the browser
        self._paused = self._closing = False
        self._first = True
        self._block_s = 0.0  # longest recent wait for a frame: how far ahead to ask for the next chunk
        self._frame_s = 0.0  # what a frame costs
        self._thread = threading.Thread(target=self._run, name="vidistill-player", daemon=True)
        self._thread.start()

    def act(self, browser_id: int, action: Mapping[str, float]) -> None:
        """Hold these keys from the next chunk on."""
        assert self.session is not None
        with self._lock:
            self._know(self.session.set(action=action), browser_id)

    def say(self, browser_id: int, prompt: str, switch: str) -> None:
        """Follow these words from the next chunk on, once they are read; ValueError if the student does not listen."""
        assert self.session is not None
        input_id = self.session.set(prompt=prompt, switch=switch)
        with self._lock:
            self._know(input_id, browser_id)

    def _know(self, input_id: int, browser_id: int) -> None:
        self._ids[input_id] = browser_id
        while len(self._ids) > HISTORY:
            del self._ids[next(iter(self._ids))]

    def reset(self, seed: int, image: np.ndarray | None) -> None:
        """Begin again, with the keys still held; frames that wait to be shown are dropped."""

        def job(session: Session) -> None:
            session.reset(seed=seed, image=image)
            with self._lock:
                self._frames.clear()
                self._first = True

        with self._lock:
            self._frames.clear()
            self._jobs.append(job)
            self._lock.notify()

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self, on: bool) -> None:
        with self._lock:
            self._paused = on
            self._lock.notify()

    def close(self) -> None:
        """Ask the thread to end after the frame it is busy with; `finished` tells when the session is closed."""
        with self._lock:
            self._closing = True
            self._lock.notify()

    def take(self) -> Shown | None:
        """The next frame to show, if there is one."""
        with self._lock:
            shown = self._frames.popleft() if self._frames and not self._paused else None
            self._lock.notify()
            return shown

    @property
    def frame_s(self) -> float:
        """Seconds between frames shown: the world's own pace, or what the machine manages."""
        assert self.session is not None
        return max(1 / self.session.fps, self._frame_s)

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
            self.finished = True
            self._changed()

    def _play(self, session: Session) -> None:
        frames, chunk, spent, count = session.frames(), None, 0.0, 0
        while self._wait(session):
            with self._lock:
                jobs = list(self._jobs)
                self._jobs.clear()
            for job in jobs:
                job(session)
                chunk = None
            began = time.perf_counter()
            frame = next(frames, None)
            took = time.perf_counter() - began
            if frame is None:
                raise RuntimeError("the session ended its stream")
            if chunk is not None and frame.chunk != chunk:
                self._block_s = max(took, 0.9 * self._block_s)
                self._frame_s = 0.8 * self._frame_s + 0.2 * spent / count
            elif not self._block_s:
                self._block_s = took  # nothing better is known yet
            if frame.chunk != chunk:
                chunk, spent, count = frame.chunk, 0.0, 0
            spent, count = spent + took, count + 1
            self._keep(frame)

    def _wait(self, session: Session) -> bool:
        """Blocks until another frame is needed; False when it is time to close."""
        with self._lock:
            ahead = min(1 + math.ceil(self._block_s / self.frame_s), session.frames_per_chunk)
            while not self._closing and not self._jobs and (self._paused or len(self._frames) >= ahead):
                self._lock.wait()
            return not self._closing

    def _keep(self, frame: Frame) -> None:
        with self._lock:
            if self._jobs:  # a reset waits: this frame is of the past
                return
            self._frames.append(Shown(frame, self._ids.get(frame.input_id, 0), self._first))
            self._first = False
        self._changed()
