"""What runs an engine: in the thread that asks for frames, or ahead of it in worker threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch

from vidistill.streaming.engine import Chunk, Engine, Frame, Run


def inline(engine: Engine) -> Iterator[Frame]:
    """Frames made in the thread that asks for them, from run to run, until the engine is closed."""
    while not engine.closed:
        run = engine.run
        for chunk in engine.chunks(run):
            for frame in chain.from_iterable(engine.decode(chunk)):
                if run.over:
                    break
                yield frame


class Pipeline:
    """Makes frames ahead, denoising and decoding in a thread each, or both in one where cores are `crowded`.

    Two teams of threads on the same cores wait for each other inside every operator and lose more than they overlap.
    Holds no more than `capacity` frames, or one chunk if that is longer; at 0 a chunk waits until it is asked for.
    """

    def __init__(self, engine: Engine, capacity: int, threads: int, decode_threads: int, crowded: bool) -> None:
        self.engine, self.capacity, self.crowded = engine, capacity, crowded
        self.error: BaseException | None = None
        self._turn = threading.Condition()
        self._todo: deque[Chunk] = deque()
        self._ready: deque[Frame] = deque()
        self._pending = 0  # frames of this run that are denoised and not yet taken
        self._asked = False  # whether somebody waits for a frame
        jobs = {"denoise": (self._denoise, threads)}
        if not crowded:
            jobs["decode"] = (self._decode, decode_threads)
        self._workers = [
            threading.Thread(target=self._work, args=job, name=f"vidistill-{name}", daemon=True)
            for name, job in jobs.items()
        ]
        self._started = False

    def frames(self) -> Iterator[Frame]:
        """Frames of the current run, each waited for, until the engine is closed; raises what a worker raised."""
        while frame := self._next():
            yield frame

    def _next(self) -> Frame | None:
        with self._turn:
            if not self._started and not self.engine.closed:
                self._started = True
                for worker in self._workers:
                    worker.start()
            self._asked = True
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._ready or self._stopped)
            self._asked = False
            if self.error is not None:
                raise self.error
            if self.engine.closed:
                return None
            self._pending -= 1
            self._turn.notify_all()
            return self._ready.popleft()

    def begin(self, run: Run) -> None:
        with self._turn:
            # All in one turn: a worker that finishes a chunk of the old run finds itself over and keeps nothing of it.
            self.engine.begin(run)
            self._todo.clear()
            self._ready.clear()
            self._pending = 0
            self._turn.notify_all()

    def close(self) -> None:
        """Stop the workers and wait for them."""
        with self._turn:
            self.engine.close()
            self._turn.notify_all()
            started = self._started
        for worker in self._workers if started else ():
            if worker is not threading.current_thread():  # a finalizer may run in a worker
                worker.join()

    @property
    def _stopped(self) -> bool:
        return self.engine.closed or self.error is not None

    def _work(self, job: Callable[[], None], threads: int) -> None:
        """Run a worker; what it raises reaches the consumer and stops the other one."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            job()
        except BaseException as error:
            with self._turn:
                self.error = self.error or error
                self.engine.run.over = True
                self._turn.notify_all()
        finally:
            torch.set_num_threads(before)

    def _denoise(self) -> None:
        while not self._stopped:
            run = self.engine.run
            for chunk in self.engine.chunks(run, partial(self._admit, run)):
                with self._turn:
                    if not run.over:
                        self._pending += chunk.px_frames
                        self._todo.append(chunk)
                        self._turn.notify_all()
                if self.crowded:
                    self._decode_next()

    def _admit(self, run: Run, px_frames: int) -> bool:
        """Wait until a chunk fits, or `run` is over; True if the chunk may start."""
        with self._turn:
            self._turn.wait_for(lambda: run.over or self._fits(px_frames))
            return not run.over

    def _fits(self, px_frames: int) -> bool:
        if not self._pending:  # first: a chunk longer than the queue would otherwise never start
            return self.capacity > 0 or self._asked
        return self._pending + px_frames <= self.capacity

    def _decode(self) -> None:
        while not self._stopped:
            with self._turn:
                self._turn.wait_for(lambda: self._todo or self._stopped)
            self._decode_next()

    def _decode_next(self) -> None:
        """Decode the oldest chunk that waits, if there is one, as long as its run goes on."""
        with self._turn:
            if not self._todo or self._stopped:
                return
            chunk = self._todo.popleft()
        for frames in self.engine.decode(chunk):  # outside the lock: the consumer takes frames while others are decoded
            with self._turn:
                if chunk.run != self.engine.run.number:
                    return
                self._ready.extend(frames)
                self._turn.notify_all()
