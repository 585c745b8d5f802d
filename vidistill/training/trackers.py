"""Where a run reports to: a row of JSON every so often, always, and the trackers that a stage names."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from vidistill.io import write_text

log = logging.getLogger("vidistill")
PROJECT = "vidistill"  # what trackers file all runs under


class Tracker(Protocol):
    """Somebody who is told of a run. Only the first process of a run has any."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def show(self, step: int, video: Path, sheet: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's own folder."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def show(self, step: int, video: Path, sheet: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(sheet) as picture:
            self.writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Board:
    """A service with the interface of wandb, which trackio shares."""

    def __init__(self, module: str, folder: Path, name: str, config: Mapping[str, Any], step: int) -> None:
        self.module = import_module(module)
        plain = json.loads(json.dumps(config))
        where = {"dir": str(folder), "id": name.replace("/", "-")} if module == "wandb" else {}
        self.module.init(project=PROJECT, name=name, config=plain, resume="allow", **where)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.module.log(dict(numbers), step=step)

    def show(self, step: int, video: Path, sheet: Path) -> None:
        self.module.log({"samples": self.module.Video(str(video), format="mp4")}, step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": lambda *run: Board("trackio", *run),
    "wandb": lambda *run: Board("wandb", *run),
}


def check_installed(names: Iterable[str]) -> None:
    """Raise ImportError, which names the extra to install, unless the trackers are here."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f"trackers={name} needs {name}: pip install 'vidistill[{name}]' ({error})") from error


class MetricsLog:
    """Rows of a run in the file at `path`, passed on to trackers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float]] = {}
        self.trackers: dict[str, Tracker] = {}

    def open(self, names: Iterable[str], name: str, config: Mapping[str, Any], step: int) -> None:
        """Start trackers by their names in TRACKERS, for a run that goes on from `step`."""
        for one in names:
            self.trackers[one] = TRACKERS[one](self.path.parent, name, config, step)

    def add(self, row: dict[str, float]) -> None:
        """Take values of one step into the next row."""
        for key, value in row.items():
            self.values.setdefault(key, []).append(value)

    def flush(self) -> dict[str, float]:
        """The means since the last flush."""
        means = {k: sum(v) / len(v) for k, v in self.values.items()}
        self.values = {}
        return means

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, of which trackers are told the numbers."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        numbers = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        if numbers:
            self.tell(lambda tracker: tracker.log(row["step"], numbers))

    def show(self, step: int, video: Path, sheet: Path) -> None:
        """Pass on a video of samples and the contact sheet of it."""
        self.tell(lambda tracker: tracker.show(step, video, sheet))

    def close(self) -> None:
        self.tell(lambda tracker: tracker.close())
        self.trackers = {}

    def tell(self, act: Callable[[Tracker], None]) -> None:
        """Tell every tracker; one that fails (a service that is away) is left out from then on: training goes on."""
        for name in list(self.trackers):
            try:
                act(self.trackers[name])
            except Exception as error:
                log.warning("trackers: %s failed and is left out from here on: %s", name, error)
                del self.trackers[name]

    def trim(self, step: int) -> None:
        """Drop rows after `step`, at which a run resumes, and what is no row."""
        if self.path.is_file():
            kept = "".join(json.dumps(row) + "\n" for row in read_rows(self.path) if row["step"] <= step)
            write_text(self.path, kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in the file at `path`; lines that are cut short or no row of a step are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(step := row.get("step"), int) and not isinstance(step, bool):
            rows.append(row)
    return rows
