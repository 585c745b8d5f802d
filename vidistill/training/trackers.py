"""Where a run reports to: means of what its steps say, one JSON row every so often."""

import json
from pathlib import Path
from typing import Any

from vidistill.checkpoint import write_atomic


class MetricsLog:
    """Rows of a run in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float]] = {}

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
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def trim(self, step: int) -> None:
        """Drop rows after `step`, at which a run resumes, and a row cut short."""
        kept = []
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue
        write_atomic(self.path, lambda p: p.write_text("".join(kept)))
