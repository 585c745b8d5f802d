"""The folder of a run: who holds it, and its state, which is checked before anything of it is used."""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidistill import checkpoint, distributed
from vidistill.config import ConfigError, build
from vidistill.training.optim import TrainingError, TrainState
from vidistill.training.validation import EarlyStopping

log = logging.getLogger("vidistill")

STATE = "state.safetensors"
PREVIOUS = "state-before.safetensors"  # what STATE was before: used where STATE is damaged
LOCK = ".lock"
BEAT_S = 15.0  # seconds between two signs of life of a run
SILENT_BEATS = 4  # a holder on another host that gives no sign for so many is dead


class RunLock:
    """A run folder held by one process, told by a file with its host, number and start, touched every `beat_s` seconds.

    No flock: it does not hold across hosts of a network file system. A holder on this host is looked for among the
    processes; one elsewhere is watched for a sign of life, by changes alone, since clocks of hosts differ.
    """

    def __init__(self, folder: Path, beat_s: float = BEAT_S) -> None:
        self.path, self.beat_s = folder / LOCK, beat_s
        self.mine = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        self.mine["token"] = uuid.uuid4().hex
        self.ended = threading.Event()

    def acquire(self) -> "RunLock":
        """Hold the folder; TrainingError if a living process does. A dead one's lock is taken over."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self.create():
            holder = read_holder(self.path)
            if self.lives(holder):
                raise TrainingError(
                    f"{self.path.parent} is being trained by process {holder.get('pid')} on {holder.get('host')}: wait "
                    "for it or stop it, or choose another name="
                )
            self.remove(holder)
        threading.Thread(target=self.beat, daemon=True).start()
        return self

    def release(self) -> None:
        """Let the folder go."""
        self.ended.set()
        if read_holder(self.path) == self.mine:
            self.path.unlink(missing_ok=True)

    def create(self) -> bool:
        """Whether the folder was free, and is ours now."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.mine, file)
        return True

    def lives(self, holder: dict[str, Any]) -> bool:
        """Whether the holder still runs; takes a while where only its signs of life can tell."""
        pid = holder.get("pid")
        if holder.get("host") == self.mine["host"] and isinstance(pid, int):
            start = process_start(pid)
            return start is not None and start == holder.get("start")
        log.info("%s is held by %s: waiting for a sign of life", self.path.parent, holder.get("host", "somebody"))
        before, patience = self.touched(), time.monotonic() + SILENT_BEATS * self.beat_s
        while time.monotonic() < patience:
            time.sleep(min(self.beat_s / 4, 1.0))
            if (now := self.touched()) != before:
                return now is not None  # gone: its run has just ended
        return False

    def touched(self) -> int | None:
        """When the lock was last touched, in its file system's time."""
        try:
            with open(self.path, "rb") as file:  # opening asks a network file system for the present attributes
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def remove(self, holder: dict[str, Any]) -> None:
        """Take a dead holder's lock away, unless another process was faster and holds the folder by now."""
        aside = self.path.with_name(f"{LOCK}.{self.mine['token']}.tmp")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if read_holder(aside) != holder:
            os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def beat(self) -> None:
        while not self.ended.wait(self.beat_s):
            try:
                os.utime(self.path)
            except OSError:  # taken over, or a file system that is away: `check` tells before the next save
                continue

    def check(self) -> None:
        """Raise TrainingError unless the folder is still ours, as it may not be after this process was suspended."""
        if (holder := read_holder(self.path)) != self.mine:
            raise TrainingError(
                f"{self.path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')} while this "
                "one gave no sign of life; nothing was written"
            )


def read_holder(lock: Path) -> dict[str, Any]:
    """What a lock says of its holder; {} where it says nothing, as while it is being written."""
    try:
        found = json.loads(lock.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def process_start(pid: int) -> str | None:
    """What tells a process from an earlier one of the same number; None if it does not run."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return after_name.split()[19]
    except OSError:
        return "unknown"


@dataclass(frozen=True)
class RunState:
    """What a state says beside its tensors: the step, the config, updates of each network, what was seen so far."""

    step: int
    config: Mapping[str, Any]
    student: int
    critic: int | None = None
    motion: int | None = None
    losses: tuple[float, ...] = ()
    peak: EarlyStopping = field(default_factory=EarlyStopping)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        counts = (self.step, self.student, self.critic or 0, self.motion or 0, self.peak.step, self.peak.since)
        if min(counts) < 0 or self.seconds < 0:
            raise ValueError(f"step, updates, peak and seconds must not be negative, got {counts}, {self.seconds}")

    def info(self) -> dict[str, Any]:
        """What is written; networks that a stage lacks are left out."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def parse_state(info: Any, path: Path) -> RunState:
    """The state that `info` describes; TrainingError names the field that is wrong."""
    try:
        if isinstance(info, dict) and isinstance(peak := info.get("peak"), dict) and peak.get("score") == -float("inf"):
            info = {k: v for k, v in info.items() if k != "peak"}  # nothing was judged yet
        return build(RunState, info)
    except ConfigError as error:
        raise TrainingError(f"{path} is damaged ({error}); restore it, or remove it and train again") from error


def newest_state(folder: Path) -> Path | None:
    """The complete state in `folder` of most steps: a file, or a folder of shards; None if there is none."""
    found = distributed.complete_shards(folder)
    if (file := folder / STATE).is_file():
        found.append((file, step_of(file)))
    elif not found and (file := folder / PREVIOUS).is_file():
        return file
    return max(found, key=lambda pair: pair[1], default=(None, 0))[0]


def step_of(file: Path) -> int:
    """The step of a state file by its header; 0 if it cannot be told, which `load_state` explains."""
    try:
        with safe_open(file, framework="pt") as opened:
            info = json.loads((opened.metadata() or {}).get("vidistill", "null"))
    except (SafetensorError, ValueError):
        return 0
    step = info.get("step") if isinstance(info, dict) else None
    return step if isinstance(step, int) else 0


def save_state(folder: Path, states: Mapping[str, TrainState], state: RunState) -> None:
    """Write the tensors of all networks and `state`: shards by every rank, else a file by the first."""
    tensors = {n: t for name, one in states.items() for n, t in one.state(name).items()}
    if any(distributed.is_sharded(t) for t in tensors.values()):
        distributed.save_shards(folder, tensors, state.info())
        for name in (STATE, PREVIOUS):
            (folder / name).unlink(missing_ok=True)
    elif distributed.rank() == 0:
        keep_previous(folder)
        checkpoint.save_tensors(folder / STATE, tensors, state.info())
        distributed.drop_shards(folder)


def keep_previous(folder: Path) -> None:
    """Give the present state a second name, under which it stays when the next one replaces it."""
    (folder / PREVIOUS).unlink(missing_ok=True)
    try:
        os.link(folder / STATE, folder / PREVIOUS)
    except FileNotFoundError:
        return
    except OSError as error:  # a file system without links: the next state is verified before it replaces this one
        log.debug("%s keeps no state before the last: %s", folder, error)


def load_state(path: Path, states: Mapping[str, TrainState]) -> RunState:
    """Put the state at `path`, or the one before it where it is damaged, into the networks; TrainingError if neither
    can be used, and where it is of other networks."""
    before = path.with_name(PREVIOUS)
    try:
        return restore_state(path, states)
    except checkpoint.CheckpointError as error:
        if path.name != STATE or not before.is_file():
            raise
        state = restore_state(before, states)
        log.warning("%s; going on from the state before it, at step %d", error, state.step)
        return state


def restore_state(path: Path, states: Mapping[str, TrainState]) -> RunState:
    """Put the state at `path` into the networks; CheckpointError if it is damaged, TrainingError if it is of others."""
    templates = {n: t for name, one in states.items() for n, t in one.state_template(name).items()}
    try:
        tensors: dict[str, Tensor]
        if path.is_dir():
            tensors, info = distributed.read_shards(path, templates)
        else:
            tensors, info = checkpoint.read_tensors(path)
            tensors = distributed.placed(tensors, templates)
        state = parse_state(info, path)
        for name, one in states.items():
            updates = getattr(state, name)
            if updates is None:
                raise KeyError(name)
            one.restore(name, tensors, updates)
    except TrainingError:
        raise
    except (KeyError, RuntimeError) as error:
        raise TrainingError(
            f"{path} is a run of other networks than this config ({error}); choose another name=, or remove it"
        ) from error
    return state
