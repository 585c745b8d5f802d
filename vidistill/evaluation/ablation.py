"""Quality against evaluations: cells of schedule x context, tuned equally from one checkpoint or run untuned."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from vidistill import checkpoint
from vidistill.checkpoint import Bundle
from vidistill.config import load_config
from vidistill.evaluation import report, suite_of
from vidistill.evaluation.prompt_adherence import AdherenceConfig
from vidistill.evaluation.quality import EvalConfig
from vidistill.evaluation.suite import glance
from vidistill.io import write_text
from vidistill.schedules import ScheduleConfig, evaluations
from vidistill.training.config import TrainConfig
from vidistill.training.trainer import train

log = logging.getLogger("vidistill")

CHUNKS = 7  # over which evaluations are counted, as in the papers
SHARED = "shared"  # weights of the checkpoint that every trained cell starts from
WORKING = ("backend", "compile", "threads", "save_every", "log_every")  # how it is trained, not what comes out
SHOWN = ("frechet_paired", "motion_ratio", "sharpness_ratio", "saturation_ratio")


@dataclass(frozen=True)
class Cell:
    """One schedule x context. `weights`: a trained cell, or "shared", to run without tuning; empty: it is tuned.

    `context_sigma`: noise of context `noised`. `settings`: further `key=value` overrides of its stage, such as
    loss.motion=0.
    """

    pattern: str = ""
    context: str = "last_step"
    context_sigma: float = 0.0
    weights: str = ""
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AblationConfig:
    """`stage`: YAML of the stage that tunes the trained cells for `steps` steps each, from its own `init`."""

    stage: str
    steps: int
    cells: Mapping[str, Cell]
    out: str = "out/frontier"
    walks: EvalConfig = EvalConfig(clips=64, out="")
    text: AdherenceConfig = AdherenceConfig(out="")
    settings: tuple[str, ...] = ()  # overrides for all cells
    measures: tuple[str, ...] = field(default=SHOWN)

    def __post_init__(self) -> None:
        trained = {name for name, cell in self.cells.items() if not cell.weights}
        for name, cell in self.cells.items():
            if cell.weights and cell.weights not in trained | {SHARED}:
                raise ValueError(
                    f"frontier cell {name} asks for the weights of {cell.weights!r}; trained cells are "
                    f"{', '.join(sorted(trained)) or 'none'}, or say {SHARED}"
                )
        if not trained or self.steps < 1:
            raise ValueError("a frontier needs steps of at least 1 and a cell that is trained")


def stage_of(cfg: AblationConfig, name: str) -> TrainConfig:
    """The training stage of a cell: the recipe's, equal in length and start, with the cell's schedule."""
    cell = cfg.cells[name]
    stage = load_config(TrainConfig, cfg.stage, [*cfg.settings, *cell.settings])
    if not stage.init:
        raise ValueError(f"{cfg.stage} names no `init`: the cells of a frontier start from one shared checkpoint")
    context, sigma = cell.context, cell.context_sigma
    schedule = replace(
        stage.schedule, pattern=cell.pattern, steps=(), timesteps=(), context=context, context_sigma=sigma
    )
    return replace(stage, name=name, out=cfg.out, steps=cfg.steps, schedule=schedule)


def tuned(cfg: AblationConfig, name: str) -> Bundle:
    """The student of a trained cell; trained now unless it is finished.

    ValueError if it was finished with other settings: figures of unequal cells are not comparable.
    """
    path, stage = Path(cfg.out) / name / name, stage_of(cfg, name)
    if not checkpoint.with_extension(path, ".json").is_file():
        train(stage)
    card = checkpoint.read_record(path).get("card") or {}
    found, asked = (report.plain(kept) for kept in (card.get("train") or {}, asdict(stage)))
    changed = sorted(key for key in asked if found.get(key) != asked[key] and key not in WORKING)
    if changed:
        raise ValueError(f"{path} was trained with other {', '.join(changed)}; remove that folder, or change `out`")
    return checkpoint.load(path, "student")


def with_schedule(student: Bundle, schedule: ScheduleConfig) -> Bundle:
    """The same weights run by another schedule; which chunks are given stays the student's own."""
    given = student.schedule.given_chunks
    return replace(student, record={**student.record, "schedule": {**asdict(schedule), "given_chunks": given}})


def row_of(cfg: AblationConfig, name: str, student: Bundle) -> dict[str, Any]:
    """Figures and cost of one cell."""
    cell = cfg.cells[name]
    suite, counted = suite_of(student.name, student.record), evaluations(student.schedule, CHUNKS)
    own = {"quality": cfg.walks, "prompt_adherence": cfg.text}.get(suite.name)
    return {
        "cell": name,
        "pattern": cell.pattern or "all",
        "context": cell.context,
        "trained": not cell.weights,
        "weights": cell.weights or name,
        "settings": list(cell.settings),
        "nfe_7_chunks": sum(counted),
        "nfe_steady": counted[-1],
        **glance(suite, student, own),
    }


def frontier(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Train, run and judge every cell of the YAML at `path`; writes frontier.json, .md and .png into its `out`.

    Finished cells are not trained again, so that the same command goes on after a stop.
    """
    cfg = load_config(AblationConfig, path, overrides or [])
    stages = {name: stage_of(cfg, name) for name in cfg.cells}  # every cell is checked before the first is trained
    report.check_out(Path(cfg.out), cfg.cells)
    start = next(stages[name] for name, cell in cfg.cells.items() if not cell.weights)
    assert start.init
    students: dict[str, Bundle] = {name: tuned(cfg, name) for name, cell in cfg.cells.items() if not cell.weights}
    students[SHARED] = checkpoint.load(start.init, "student")
    rows = []
    for name, cell in cfg.cells.items():
        rows.append(row_of(cfg, name, with_schedule(students[cell.weights or name], stages[name].schedule)))
        log.info("%s: %s", name, {key: rows[-1].get(key) for key in ("nfe_7_chunks", *cfg.measures)})
        result: dict[str, Any] = report.plain({"shared": start.init, "steps": cfg.steps, "measures": cfg.measures})
        result["cells"] = [{**report.plain(row), "trained": row["trained"]} for row in rows]
        write(Path(cfg.out), result)  # what is judged is not lost with a later cell
    return result


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """What people see: heads, then a row a cell."""
    heads = ["cell", "steps a chunk", "context", "weights", "evaluations, 7 chunks", *result["measures"]]
    rows = []
    for row in result["cells"]:
        weights = "tuned" if row["trained"] else f"inference only, weights of {row['weights']}"
        known = [row["cell"], row["pattern"], row["context"], weights, str(row["nfe_7_chunks"])]
        rows.append([*known, *(report.number(row, m) for m in result["measures"])])
    return [heads, *rows]


def table(result: Mapping[str, Any]) -> Table:
    heads, *rows = rows_of(result)
    out = Table(*heads, title=f"{result['steps']} steps each from {result['shared']}")
    for row in rows:
        out.add_row(*row)
    return out


def write(folder: Path, result: Mapping[str, Any]) -> None:
    """The figures as JSON, as a table in Markdown, and as one plot."""
    report.save(folder, "frontier.json", result)
    heads, *rows = (f"| {' | '.join(row)} |" for row in rows_of(result))
    write_text(folder / "frontier.md", "\n".join([heads, "|" + "---|" * heads.count(" |"), *rows]) + "\n")

    def paint(made: Any) -> None:
        axes = made.add_subplot()
        for row in result["cells"]:
            colour = {"clean": "C0", "noised": "C2", "last_step": "C1"}[row["context"]]
            at = (row["nfe_7_chunks"], row["frechet_paired"])
            axes.scatter(*at, facecolors=colour if row["trained"] else "none", edgecolors=colour)
            axes.annotate(row["cell"], at, xytext=(5, -2), textcoords="offset points", fontsize=7)
        axes.set(xlabel="evaluations for 7 chunks", ylabel="Frechet distance (lower is better)")
        axes.margins(0.12)
        colours = "orange: last_step, blue: clean, green: noised"
        axes.set_title(f"filled: tuned equally; hollow: inference only; {colours}", fontsize=8)

    report.draw(folder / "frontier.png", 8.0, paint)
