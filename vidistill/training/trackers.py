"""Where a run reports to: means of what its steps say, one JSON row every so often."""

import json
from pathlib import Path
from typing import Any

from vidistill.io import write_text


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
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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
