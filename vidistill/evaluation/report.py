"""What people see of an evaluation: a table, plots, contact sheets and one HTML page that links them."""

import html
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vidistill.io import MARK, check_folder, contact_sheet, save_png, write_atomic, write_json, write_text, write_video

ORDER = (
    *("real", "codec", "teacher", "student", "vs", "student_unfiltered", "videos", "window", "full"),
    *("repeat", "repeat_last", "paste_start", "paste_nearest"),
)

COUNTS = ("clips", "paths", "streams")  # what a protocol counts
RESULTS = ("result.json", "frontier.json")  # what a folder of ours holds


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: nan and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class Metric:
    """A figure of a row: the only place where it is computed, named and explained.

    text: what it is, None for one that stands in JSON alone. figure: of the tallies of the row and of real video; None
    where that row has none, or for one that is not measured on clips. parts: what it needs of every clip, by name;
    metrics may share them. glance: whether a glance shows it. best: which side is better, "low", "high" or nearer to
    "one"; empty where none is.
    """

    text: str | None = None
    figure: Callable[[Any, Any], Any] | None = None
    parts: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    glance: bool = True
    best: str = ""


@dataclass(frozen=True)
class Target:
    """What a figure should be: low <= value <= high."""

    text: str
    value: float | None
    low: float = -math.inf
    high: float = math.inf

    @property
    def met(self) -> bool:
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        shown = "not measured" if self.value is None else f"{self.value:.3g}"
        need = f"{self.low:.3g} to {self.high:.3g}".replace("-inf to", "at most").replace(" to inf", " or more")
        return f"{'met' if self.met else 'missed'}: {self.text} {shown} (target: {need})"


def folder_of(result: Mapping[str, Any], suite: str, out: str) -> Path:
    """Where the report of `result` lies under `out`: named after what was judged, a student alone also by what."""
    names = [result[row]["name"] for row in ("student", "vs", "teacher", "codec") if "name" in result.get(row, {})]
    return Path(out) / "-".join([*names, *([suite] if "student" in result and len(names) == 1 else [])])


def check_out(folder: Path, kept: Iterable[str] = ()) -> None:
    """ValueError, before anything is judged, unless a report can be written into `folder` and replaces only ours.

    kept: names of what may stand there before the first report does.
    """
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in (*RESULTS, *kept)):
        raise ValueError(f"--out {folder} is there and holds no report ({RESULTS[0]}); name another folder")


def number(row: Mapping[str, Any] | None, key: str) -> str:
    """A figure with three digits and its interval; "-" where there is none. A key "a/b" is part b of figure a."""

    def found(names: Sequence[str]) -> Any:
        value: Any = row
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    first, *rest = key.split("/")
    return cell(found([first, *rest]), found([f"{first}_interval", *rest]))


def cell(value: float | None, edges: Sequence[float] | None) -> str:
    """A figure and its interval."""
    return "-" if value is None else f"{value:.3f}" + (" ({:.3f} to {:.3f})".format(*edges) if edges else "")


def lines(numbers: Mapping[str, Metric], columns: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """(key, what it is, cells) for every figure that has a text, its parts one by one."""
    for key, metric in numbers.items():
        held = [column[key] for column in columns.values() if key in column]
        parts = dict.fromkeys(part for value in held if isinstance(value, Mapping) for part in value)
        for name in [f"{key}/{part}" for part in parts] or [key] if metric.text else []:
            yield name, metric.text or "", [number(column, name) for column in columns.values()]


def columns_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The kinds of video in `result`, and a column for every way to switch."""
    rows = {name: result[name] for name in ORDER if result.get(name)}
    return rows | {f"switch: {name}": row for name, row in result.get("switch", {}).items()}


def table(numbers: Mapping[str, Metric], result: Mapping[str, Any]) -> Table:
    """The figures, one column a row of the evaluation, for a terminal."""
    columns = columns_of(result)
    protocol = result["protocol"]
    out = Table(title=f"{next(protocol[k] for k in COUNTS if k in protocol)} {protocol['split']} clips")
    out.add_column("measure")
    for name in columns:
        out.add_column(name, justify="right")
    for key, _, cells in lines(numbers, columns):
        out.add_row(key.replace("/", " "), *cells)
    return out


def confusions(result: Mapping[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """(title, lines of cells) of every confusion table: what was asked for downwards, what is read across."""
    for name, row in columns_of(result).items():
        for attribute, read in row.get("confusion", {}).items():
            edges = row.get("confusion_interval", {})
            words = list(dict.fromkeys(word for shares in read.values() for word in shares))
            body = [
                [asked, *(cell(shares[word], edges.get(f"{attribute}/{asked}/{word}")) for word in words)]
                for asked, shares in read.items()
            ]
            yield f"{name}: {attribute} asked for, and read", [["", *words], *body]


def differences(result: Mapping[str, Any]) -> list[str]:
    """How two rows differ, a line for every figure: those that tell them apart first."""
    out = []
    for pair, found in result.get("difference", {}).items():
        for key, d in sorted(found.items(), key=lambda item: item[1].get("verdict") not in ("better", "worse")):
            edges, verdict = d["interval"], d.get("verdict") or "no verdict"
            if d["value"] is not None:
                span = "no interval" if edges is None else f"{edges[0]:+.3g} to {edges[1]:+.3g}"
                out.append(f"{pair}: {key} {d['value']:+.3g} ({span}): {verdict}")
    return out


def show(
    numbers: Mapping[str, Metric], result: Mapping[str, Any], targets: Sequence[Target], folder: Path | str
) -> None:
    """Print the table, the targets and where the report lies, to stderr."""
    console = Console(stderr=True)
    console.print(table(numbers, result))
    for target in targets:
        console.print(str(target), style="" if target.met else "bold red")
    for line in differences(result):
        console.print(line)
    if folder:
        console.print(f"report: {Path(folder) / 'index.html'}")


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: clips uint8 [T, H, W, 3] below each other, one picture every `every` frames.

    columns: kinds of video that take turns in `rows`, where they also make a video, beside each other; 0: no video.
    """

    name: str
    rows: Sequence[np.ndarray]
    labels: Sequence[str]
    caption: str
    every: int = 1
    columns: int = 0

    @classmethod
    def beside(
        cls,
        name: str,
        clips: Mapping[str, Any],
        caption: str,
        noun: str,
        every: float = 1.0,
        names: Sequence[str] = (),
        video: bool = False,
    ) -> "Sheet":
        """The k-th clips [T, H, W, 3] of all kinds of video below each other, then the next ones."""
        kinds = sorted(clips, key=lambda kind: ORDER.index(kind) if kind in ORDER else len(ORDER))
        picked = [(kind, k) for k in range(min(map(len, clips.values()))) for kind in kinds]
        labels = [f"{kind}, {names[k] if names else f'{noun} {k + 1}'}" for kind, k in picked]
        rows, columns = [clips[kind][k] for kind, k in picked], len(kinds) if video else 0
        return cls(name, rows, labels, caption, max(1, round(every)), columns)

    def video(self) -> np.ndarray:
        """The clips [T, H, W, 3], kinds of video beside each other."""
        length = min(map(len, self.rows))
        cut = [np.asarray(row)[:length] for row in self.rows]
        lines = [np.concatenate(cut[i : i + self.columns], axis=2) for i in range(0, len(cut), self.columns)]
        return np.concatenate(lines, axis=1)


@dataclass
class Pictures:
    """What a report draws: sheets, motion by time of every row, and curves of long streams."""

    fps: float
    sheets: list[Sheet] = field(default_factory=list)
    motion: dict[str, list[float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def save(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Figures as a file of JSON in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, result)


def save_sheets(folder: Path, sheets: Sequence[Sheet]) -> list[tuple[str, str]]:
    """(file, caption) of contact sheets that are written as PNG."""
    for sheet in sheets:
        save_png(folder / f"{sheet.name}.png", contact_sheet(sheet.rows, sheet.every, sheet.labels))
    return [(f"{sheet.name}.png", sheet.caption) for sheet in sheets]


def write(
    folder: Path,
    numbers: Mapping[str, Metric],
    result: Mapping[str, Any],
    pictures: Pictures,
    targets: Sequence[Target],
) -> None:
    """result.json, curves.json, plots and contact sheets as PNG, and index.html in `folder`."""
    save(folder, "result.json", result)
    save(folder, "curves.json", plain({"motion_first_seconds": pictures.motion, "long": pictures.curves}))
    files = save_sheets(folder, pictures.sheets)
    for sheet in pictures.sheets:
        if sheet.columns and sheet.rows:
            write_video(folder / f"{sheet.name}.mp4", sheet.video(), pictures.fps, scale=2)
            kinds = ", ".join(label.split(",")[0] for label in sheet.labels[: sheet.columns])
            files.append((f"{sheet.name}.mp4", f"From left to right: {kinds}."))
    for key, metric in numbers.items():  # figures by seconds
        held = {name: row[key] for name, row in columns_of(result).items() if isinstance(row.get(key), Mapping)}
        if held and all(part.replace(".", "").isdigit() for row in held.values() for part in row):
            curves = {name: ([float(part) for part in row], list(row.values())) for name, row in held.items()}
            files.append(plot(folder / f"{key}.png", {key.replace("_", " "): curves}, metric.text or ""))
    if pictures.motion:
        step = quarter(pictures.fps) / pictures.fps
        moved = {name: (step * np.arange(len(v)), v) for name, v in pictures.motion.items()}
        files.append(plot(folder / "motion.png", {"change between frames": moved}, "Motion by time, mean over clips."))
    if pictures.curves:
        step, text = round(pictures.fps) / pictures.fps, "A long stream by time: the student must stay with real video."
        panels = {
            measure: {name: (step * np.arange(len(c[measure])), c[measure]) for name, c in pictures.curves.items()}
            for measure in pictures.curves["real"]
        }
        files.append(plot(folder / "drift.png", panels, text))
    write_text(folder / "index.html", page(numbers, result, targets, files))


def canvas(width: float, height: float) -> Any:
    """An empty matplotlib figure, sides in inches; ImportError names the extra where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "vidistill[eval]"') from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def check_plots() -> None:
    """ImportError if a report could not be drawn: to be asked before the work that it reports."""
    canvas(1.0, 1.0)


def draw(path: Path, width: float, paint: Callable[[Any], None]) -> None:
    """Draw one matplotlib figure into a file."""
    made = canvas(width, 3.4)
    paint(made)
    made.savefig(path, dpi=100)


def plot(path: Path, panels: Mapping[str, Mapping[str, tuple[Any, Any]]], caption: str) -> tuple[str, str]:
    """Lines (x, y) by name in panels beside each other, seconds along x; the file and its caption."""

    def paint(made: Any) -> None:
        for axes, (title, rows) in zip(made.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for name, (x, y) in rows.items():
                axes.plot(x, y, marker="o" if len(x) < 8 else None, label=name)
            axes.set(title=title, xlabel="seconds")
        axes.legend()

    draw(path, 6.0 if len(panels) == 1 else 3.3 * len(panels), paint)
    return path.name, caption


def quarter(fps: float) -> int:
    """Px frames of about a quarter of a second."""
    return max(1, round(fps / 4))


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}"
    ".missed{color:#b00020}figure{margin:1.5em 0}small{color:#666}"
)


def page(
    numbers: Mapping[str, Metric], result: Mapping[str, Any], targets: Sequence[Target], files: list[tuple[str, str]]
) -> str:
    """One HTML page: figures, targets, pictures, protocol."""
    columns = columns_of(result)
    title = ", ".join(f"{name} {row['name']}" for name, row in columns.items() if "name" in row)
    body = "".join(
        f"<tr><td>{key}<br><small>{html.escape(text)}</small></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for key, text, cells in lines(numbers, columns)
    )
    tables = "".join(
        f"<h3>{html.escape(title)}</h3><table>"
        + "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>" for line in rows)
        + "</table>"
        for title, rows in confusions(result)
    )
    goals = "".join(f'<li class="{"met" if t.met else "missed"}">{html.escape(str(t))}</li>' for t in targets)
    apart = "".join(f"<li>{html.escape(line)}</li>" for line in differences(result))
    shown = "".join(
        f"<figure>{shown_as(file)}<figcaption>{html.escape(text)}</figcaption></figure>" for file, text in files
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table><tr><th></th>{''.join(f'<th>{name}</th>' for name in columns)}</tr>{body}</table>{tables}"
        f"<h2>Targets</h2><ul>{goals}</ul><h2>Differences</h2><ul>{apart}</ul><h2>Pictures</h2>{shown}"
        f"<h2>Protocol</h2><pre>{html.escape(json.dumps(result['protocol'], indent=1))}</pre></html>\n"
    )


def shown_as(file: str) -> str:
    """How a page shows a picture or a video."""
    if file.endswith(".mp4"):
        return f'<video src="{file}" controls loop muted></video>'
    return f'<img src="{file}" alt="{file}">'


def draw_diagnosis(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Where distillation pulled, and whether towards the recorded clips, as a picture at `path`.

    A map of chunk and noise level for norm, gap and cosine, at the first, a middle and the last of the diagnosed steps.
    """
    shown = [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})]
    names = {"norm": "gradient (rms)", "gap": "critic - teacher, relative", "cosine": "cosine with regression"}
    made = canvas(4 * len(shown), 9)
    axes = made.subplots(len(names), len(shown), squeeze=False)
    for line, (name, title) in zip(axes, names.items(), strict=True):
        tables = [row["diagnosis"][name] for row in shown]
        low, high = (-1, 1) if name == "cosine" else (0, max(max(map(max, table)) for table in tables))
        for ax, row, table in zip(line, shown, tables, strict=True):
            found = row["diagnosis"]
            colours = "RdBu" if name == "cosine" else "viridis"
            image = ax.imshow(table, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
            ax.set_xticks(range(len(found["chunks"])), found["chunks"])
            ax.set_yticks(range(len(found["levels"])), found["levels"])
            ax.set(title=f"{title}, step {row['step']}", xlabel="chunk", ylabel="noise level")
        made.colorbar(image, ax=line)
    write_atomic(path, lambda temporary: made.savefig(temporary, dpi=110, metadata={"Software": MARK}))
