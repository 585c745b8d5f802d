"""A real environment behind the page: a session that steps it by what is held, and keeps what was played as clips."""

import argparse
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vidistill.conditioning.controls import held_values
from vidistill.data.importers import gym
from vidistill.data.importers.actions import ActionMap
from vidistill.data.importers.write import Clip, append_clip, check_same
from vidistill.data.shards import META, read_meta
from vidistill.serve.viewer import World
from vidistill.streaming.session import Frame

log = logging.getLogger(__name__)

ORDER = ("train", "train", "validation", "test", *["train"] * 6)  # splits of episodes as they are played, over and over
CLOSED_S = 20.0  # seconds that a server waits at its end for what is still being saved


@dataclass(frozen=True)
class Nowhere:
    """A navigator of what has no map."""

    placed: bool = False
    remembers: bool = False
    map: Mapping[str, Any] = field(default_factory=dict)


class Store:
    """The episodes that people play, in the splits of a data folder, each there as soon as it is over."""

    def __init__(self, out: Path, meta: Mapping[str, Any], least: int) -> None:
        """DataError where clips of other settings are there."""
        self.out, self.meta, self.least = out, meta, least
        self._lock = threading.Lock()
        found = {split: read_meta(out / split) for split in set(ORDER) if (out / split / META).is_file()}
        for split, record in found.items():
            check_same(out / split, record, self.meta_of(split))
        self.count = sum(record["episodes"] for record in found.values())

    def meta_of(self, split: str) -> dict[str, Any]:
        return {**self.meta, "split": split}

    def add(self, clip: Clip) -> None:
        """Keep an episode, unless it is too short. OSError if the disk is full; the episodes before it are kept."""
        if len(clip.frames) < self.least:
            return
        with self._lock:
            split = ORDER[self.count % len(ORDER)]
            append_clip(self.out / split, clip, self.meta_of(split))
            self.count += 1
        log.info("%s: %d frames", self.out / split, len(clip.frames))


class Played:
    """A session of an environment, as the page takes it: a frame is `repeat` steps of what is held.

    An episode that is over (unless its clip goes on: `restart`), or has all its frames, is stored, and the next one
    begins by the next seed.
    """

    nfe_per_chunk, memory_bytes, frames_per_chunk, queued_audio_s = 0.0, 0, 1, 0.0
    navigator = Nowhere()

    def __init__(self, real: "Real", seed: int) -> None:
        self.real, self.fps = real, real.fps
        names = real.named.names
        self.takes = {"action": {"kind": "hold", "names": list(names), "keys": real.keys}}
        self._env = gym.made(real.cfg)
        self._held, self._input, self._run = (0.0,) * len(names), 0, 0
        self._begin(seed)

    def _begin(self, seed: int) -> None:
        self.seed, self._episode, self._fresh = seed, 0, True
        _, self._over = gym.begin(self._env, self.real.cfg, self.real.named, seed)
        self._frames = [gym.shot(self._env, self.real.cfg)]
        self._actions = [np.zeros(len(self.real.named.names), np.float32)]

    def _store(self) -> None:
        frames, self._frames = self._frames, []
        if self.real.store is not None and frames:
            about = {"seed": self.seed, "played": True}
            self.real.store.add(Clip(np.stack(frames), about, actions=np.stack(self._actions)))

    def set(self, *, action: Any = None, switch: str | None = None) -> int:
        """Hold these actions from the next frame on; returns the number that frames made with them carry."""
        self._held, self._input = held_values(action, self.real.named.names), self._input + 1
        return self._input

    def reset(self, *, seed: int, image: np.ndarray | None = None) -> None:
        """Store what was played, and begin the episode of a seed."""
        self._store()
        self._run += 1
        self._begin(seed)

    def frames(self) -> Iterator[Frame]:
        """Frames for ever."""
        run = index = 0
        while True:
            number, held = self._input, np.array(self._held, np.float32)
            cfg, ended = self.real.cfg, self._over and not self.real.cfg.restart
            if not self._fresh and (ended or len(self._frames) >= cfg.num_frames):
                self._store()
                self._begin(self.seed + 1)
            elif not self._fresh:
                if self._over:
                    self._episode, held = self._episode + 1, np.zeros_like(held)
                    _, self._over = gym.begin(self._env, cfg, self.real.named, self.seed, self._episode)
                else:
                    _, self._over = gym.advance(self._env, self.real.named, held, cfg.repeat)
                self._frames.append(gym.shot(self._env, cfg))
                self._actions.append(held)
            self._fresh = False
            run, index = self._run, 0 if run != self._run else index
            yield Frame(self._frames[-1], index, index, number, run, time.perf_counter(), {})
            index += 1

    def close(self) -> None:
        """Store what was played, and close the environment."""
        self._store()
        self._env.close()
        self.real.open.discard(self)


@dataclass(frozen=True)
class Real:
    """An environment to be played, and where what is played is kept (None: nowhere)."""

    cfg: gym.GymConfig
    fps: float
    named: ActionMap
    keys: Mapping[str, list[str]]
    store: Store | None
    open: set[Played] = field(default_factory=set)

    @classmethod
    def of(cls, args: argparse.Namespace, out: Path | None) -> "Real":
        """The environment that a command line asks for (the options of `data gym`)."""
        cfg, fps, named, keys = gym.asked(args)
        if out is None:
            return cls(cfg, fps, named, keys, None)
        meta = gym.noted(cfg, fps, named, keys, gym.is_deterministic(cfg))
        return cls(cfg, fps, named, keys, Store(out, meta, cfg.least))

    def world(self) -> World:
        """What the page is served."""
        kept = f", recorded to {self.store.out}" if self.store else ""
        about = f"{self.cfg.env} itself, driven by the keys you hold{kept}. No model generates it."
        return World(self.cfg.env.rpartition("/")[2], self.cfg.size, self._session, about=about)

    def _session(self, seed: int, image: np.ndarray | None) -> Any:
        session = Played(self, seed + (self.store.count if self.store else 0))
        self.open.add(session)
        return session

    def finish(self) -> list[str]:
        """Wait until what was played is stored; says how much there is."""
        end = time.monotonic() + CLOSED_S
        while self.open and time.monotonic() < end:
            time.sleep(0.05)
        return [f"{self.store.out}: {self.store.count} episodes"] if self.store else []
