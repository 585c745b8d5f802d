"""What people see of an evaluation: a table, plots, contact sheets and one HTML page that links them."""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vidistill.io import contact_sheet, save_png

ORDER = ("real", "codec", "teacher", "student", "repeat")
NUMBERS = {
    "frechet": "Frechet distance of probe features, against the real futures of the same clips (real: two halves)",
    "frechet_other_half": "the same against real clips of other episodes",
    "action_following": "balanced accuracy of the actions a probe reads back, mean of turning and walking",
    "action_chance": "the same against the actions of other clips",
    "sharpness_ratio": "mean gradient, against real",
    "saturation_ratio": "mean chroma, against real",
    "contrast_ratio": "deviation of brightness, against real",
    "motion_ratio": "mean change between frames, against real",
    "flicker_ratio": "brightness of blocks that comes and goes within three frames, against real",
    "idle_motion": "mean change between frames where no action was given",
    "sharpness_drift": "last seconds of a long stream against the first",
    "saturation_drift": "",
    "motion_drift": "",
}


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
class Target:
    """A promise about a figure: low <= value <= high."""

    text: str
    value: float | None
    low: float = -math.inf
    high: float = math.inf

    @property
    def kept(self) -> bool:
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        shown = "not measured" if self.value is None else f"{self.value:.3g}"
        need = f"{self.low:.3g} to {self.high:.3g}".replace("-inf to", "at most").replace(" to inf", " or more")
        return f"{'kept' if self.kept else 'MISSED'}: {self.text} {shown} (needed: {need})"


def targets(result: Mapping[str, Any]) -> list[Target]:
    """The promises that can be checked with the rows of `result`."""
    rows: dict[str, Callable[[], list[Target]]] = {
        "codec": lambda: codec_targets(result["codec"]),
        "teacher": lambda: teacher_targets(result),
        "student": lambda: student_targets(result),
    }
    return [gate for name, make in rows.items() if name in result for gate in make()]


def codec_targets(codec: Mapping[str, Any]) -> list[Target]:
    return [Target("codec PSNR, dB", codec["psnr"], 30), Target("codec sharpness", codec["sharpness_ratio"], 0.85)]


def teacher_targets(result: Mapping[str, Any]) -> list[Target]:
    teacher, real = result["teacher"], result["real"]
    out = [
        Target("teacher's action following", teacher["action_following"], 0.95 * real["action_following"]),
        Target("teacher's sharpness", teacher["sharpness_ratio"], 0.85, 1.15),
        Target(
            "teacher's Frechet distance to other episodes",
            teacher["frechet_other_half"],
            high=3 * result["codec"]["frechet_other_half"],
        ),
    ]
    if "0.5" in teacher["psnr_by_horizon"]:
        still = result["repeat"]["psnr_by_horizon"]["0.5"]
        out.append(Target("teacher's PSNR at 0.5 s, dB", teacher["psnr_by_horizon"]["0.5"], still))
    return out


def student_targets(result: Mapping[str, Any]) -> list[Target]:
    student, real = result["student"], result["real"]
    out = [
        Target("student's Frechet distance", student["frechet"], high=1.25 * result["teacher"]["frechet"]),
        Target("student's action following", student["action_following"], 0.9 * real["action_following"]),
    ]
    for name in ("sharpness", "saturation", "motion"):
        out.append(Target(f"student's {name} in the first seconds", student[f"{name}_ratio"], 0.8, 1.2))
        if "late" in student:
            out.append(Target(f"student's {name} in the last seconds", student["late"][f"{name}_ratio"], 0.8, 1.2))
    return out


def folder_of(result: Mapping[str, Any], out: str) -> Path:
    """Where the report of `result` lies under `out`: named after what was judged."""
    return Path(out) / "-".join(
        result[row]["name"] for row in ("student", "teacher", "codec") if "name" in result.get(row, {})
    )


def shown_rows(result: Mapping[str, Any]) -> list[str]:
    return [name for name in ORDER if name in result]


def number(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "-" if value is None else f"{value:.3f}"


def table(result: Mapping[str, Any]) -> Table:
    """The figures, one column a row of the evaluation, for a terminal."""
    names = shown_rows(result)
    out = Table(title=f"{result['protocol']['clips']} held-out clips")
    out.add_column("measure")
    for name in names:
        out.add_column(name, justify="right")
    for key in NUMBERS:
        out.add_row(key, *(number(result[name], key) for name in names))
    for horizon in result[names[-1]].get("psnr_by_horizon", {}):
        cells = [number(result[name].get("psnr_by_horizon", {}), horizon) for name in names]
        out.add_row(f"PSNR at {horizon} s", *cells)
    return out


def show(result: Mapping[str, Any], out: str) -> None:
    """Print the table, the gates and where the report lies, to stderr."""
    console = Console(stderr=True)
    console.print(table(result))
    for gate in targets(result):
        console.print(str(gate), style="" if gate.kept else "bold red")
    if out:
        console.print(f"report: {folder_of(result, out) / 'index.html'}")


# --- files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, result: dict[str, Any], pictures: dict[str, Any]) -> None:
    """result.json, curves.json, plots and contact sheets as PNG, and index.html in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    curves = {"motion_first_seconds": pictures["motion"], "long": pictures.get("curves", {})}
    (folder / "curves.json").write_text(json.dumps(plain(curves)) + "\n")
    files = [
        *sheets(folder, pictures),
        plot_horizons(folder, result),
        plot_motion(folder, pictures["motion"], pictures["fps"]),
    ]
    if "curves" in pictures:
        files.append(plot_drift(folder, pictures["curves"], pictures["fps"]))
    (folder / "index.html").write_text(page(result, [f for f in files if f]))


def sheets(folder: Path, pictures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Contact sheets (file, caption): every clip as one row for each kind of video; long streams below each other."""
    clips: Mapping[str, np.ndarray] = pictures["clips"]
    names = [name for name in ORDER if name in clips and name != "repeat"]
    fps = pictures["fps"]
    every = max(1, round(fps * 0.4))
    made = []
    rows = [clips[name][k] for k in range(len(clips["real"])) for name in names]
    labels = [f"{name}, clip {k + 1}" for k in range(len(clips["real"])) for name in names]
    save_png(folder / "clips.png", contact_sheet(rows, every=every, labels=labels))
    made.append(("clips.png", f"Same start image, same actions; one picture every {every / fps:.1f} s."))
    if "streams" in pictures:
        streams: Mapping[str, np.ndarray] = pictures["streams"]
        order = [name for name in ORDER if name in streams]
        rows = [streams[name][k] for k in range(len(streams["real"])) for name in order]
        labels = [f"{name}, stream {k + 1}" for k in range(len(streams["real"])) for name in order]
        save_png(folder / "streams.png", contact_sheet(rows, labels=labels))
        made.append(("streams.png", "Long streams, one picture for every window of the protocol."))
    return made


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


def figure(draw: Callable[[Any], None], path: Path, width: float = 6.0) -> None:
    """Draw one matplotlib figure into a file."""
    made = canvas(width, 3.4)
    draw(made)
    made.savefig(path, dpi=100)


def plot_horizons(folder: Path, result: Mapping[str, Any]) -> tuple[str, str] | None:
    lines = {name: result[name]["psnr_by_horizon"] for name in shown_rows(result) if "psnr_by_horizon" in result[name]}
    if not any(lines.values()):
        return None

    def draw(made: Any) -> None:
        axes = made.add_subplot()
        for name, values in lines.items():
            axes.plot([float(h) for h in values], list(values.values()), marker="o", label=name)
        axes.set(xlabel="seconds after the start image", ylabel="PSNR against the true future, dB", xscale="log")
        axes.legend()

    figure(draw, folder / "horizons.png")
    return "horizons.png", "How far each stays with what really happened; `repeat` shows the start image for ever."


def quarter(fps: float) -> int:
    """Px frames of about a quarter of a second."""
    return max(1, round(fps / 4))


def plot_motion(folder: Path, motion: Mapping[str, list[float]], fps: float) -> tuple[str, str]:
    step = quarter(fps) / fps

    def draw(made: Any) -> None:
        axes = made.add_subplot()
        for name, values in motion.items():
            axes.plot(step * np.arange(len(values)), values, label=name)
        axes.set(xlabel="seconds after the start image", ylabel="change between frames", ylim=(0, None))
        axes.legend()

    figure(draw, folder / "motion.png")
    return "motion.png", "Motion by time, mean over clips."


def plot_drift(folder: Path, curves: Mapping[str, Mapping[str, list[float]]], fps: float) -> tuple[str, str]:
    measures, step = list(curves["real"]), round(fps) / fps

    def draw(made: Any) -> None:
        for axes, measure in zip(made.subplots(1, len(measures)), measures, strict=True):
            for name, own in curves.items():
                axes.plot(step * np.arange(len(own[measure])), own[measure], label=name)
            axes.set(title=measure, xlabel="seconds", ylim=(0, None))
        axes.legend()

    figure(draw, folder / "drift.png", width=13.0)
    return "drift.png", "A long stream by time: the student's lines must stay with the real ones."


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%;image-rendering:pixelated}"
    ".missed{color:#b00020}figure{margin:1.5em 0}small{color:#666}"
)


def page(result: Mapping[str, Any], files: list[tuple[str, str]]) -> str:
    """One HTML page: figures, promises, pictures, protocol."""
    names = shown_rows(result)
    title = ", ".join(f"{name} {result[name]['name']}" for name in names if "name" in result[name])
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        f"<tr><td>{key}<br><small>{html.escape(text)}</small></td>"
        + "".join(f"<td>{number(result[name], key)}</td>" for name in names)
        + "</tr>"
        for key, text in NUMBERS.items()
    )
    promises = "".join(
        f'<li class="{"kept" if gate.kept else "missed"}">{html.escape(str(gate))}</li>' for gate in targets(result)
    )
    shown = "".join(
        f'<figure><img src="{file}" alt="{file}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for file, text in files
    )
    protocol = html.escape(json.dumps(result["protocol"], indent=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><table><tr><th></th>{head}</tr>{body}</table>"
        f"<h2>Promises</h2><ul>{promises}</ul><h2>Pictures</h2>{shown}<h2>Protocol</h2><pre>{protocol}</pre></html>\n"
    )


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
    made.savefig(path, dpi=110)
