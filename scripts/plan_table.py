"""Writes configs/wan/PLAN.md: what every stage at the size of Wan takes on 1, 8 and 32 GPUs of 80 and 141 GB.

python scripts/plan_table.py [CONFIG ...]      default: all of configs/wan; with names the table is printed
"""

import re
import sys
from pathlib import Path
from typing import Any

from vidistill.bench import plan, step_time
from vidistill.config import load_config
from vidistill.training.config import TrainConfig

CONFIGS = Path("configs/wan")
GPUS, MEMORY = (1, 8, 32), (80, 141)
PUBLISHED = {  # stage -> time as published
    "selfforcing": "600 critic steps in under 2 hours on 64 H100 (Self Forcing, README)",
    "diagonal": "600 steps in under 2 hours on 64 H100 (Diagonal Distillation, README)",
    "selfforcing-14b": "3000 steps in under 3 days on 64 H100 (Self-Forcing-Plus, README)",
    "long": "32 GPU days (LongLive)",
}
HEAD = f"""# What the stages take

Written by `python scripts/plan_table.py`: `vidistill train CONFIG --dry-run --gpus N --gpu-memory GB` for every stage.
A cell says how many GB each GPU holds at the peak and the `accumulate` that fits, with no other setting changed, or
what it would take; `-`: its batch or sequence does not divide so. What a stage is planned for may change more. Hours
are estimates: operations at {step_time.UTILISATION:.0%} of an H100's bfloat16 peak, what masks hide counted in full;
reading and communication left out. No figure was measured on a GPU.

"""


def planned(path: Path) -> str:
    """What the head of a config says that it is planned for."""
    named = re.search(r"^# Planned for (.*)\.$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return named[1] if named else ""


def cell(planner: plan.Planner, cfg: TrainConfig, gpus: int, memory: float) -> str:
    """What so many GPUs hold of a stage."""
    try:
        row = planner.plan(cfg, gpus, memory)
    except ValueError:
        return "-"
    gb = row["peak_bytes"] / 1e9
    return f"{gb:.0f} GB, accumulate={row['accumulate']}" if row["fits"] else f"no: {gb:.0f} GB"


def table_row(path: Path) -> str:
    """The line of a stage."""
    cfg = load_config(TrainConfig, path)
    roles = plan.roles_of(cfg)
    size = plan.latent_size(cfg, roles["student"].dit)
    if size is None:
        return ""
    planner, dits = plan.Planner(roles, size), {name: r.dit for name, r in roles.items()}
    time: dict[str, Any] = step_time.estimate(cfg, dits, size, plan.seen_frames(cfg), 1)
    cells = [cell(planner, cfg, gpus, memory) for memory in MEMORY for gpus in GPUS]
    hours = " / ".join(f"{time['hours'] / gpus:.3g}" for gpus in (8, 32, 64))
    return f"| `{path.stem}` | {planned(path)} | {' | '.join(cells)} | {hours} | {PUBLISHED.get(path.stem, '')} |"


def table(paths: list[Path]) -> str:
    columns = [f"{gpus} x {memory} GB" for memory in MEMORY for gpus in GPUS]
    head = ["stage", "planned for, with", *columns, "hours on 8 / 32 / 64", "published"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for path in paths:
        lines.append(row := table_row(path))
        print(row, file=sys.stderr, flush=True)
    return "\n".join(filter(None, lines)) + "\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(table([CONFIGS / f"{name}.yaml" for name in sys.argv[1:]]), end="")
    else:
        (CONFIGS / "PLAN.md").write_text(HEAD + table(sorted(CONFIGS.glob("*.yaml"))), encoding="utf-8")
