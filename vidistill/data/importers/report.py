"""The quality report of an import: JSON for machines, one page with pictures for people."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidistill.data.importers.decode import MediaError, frames_of, nearest, rgb
from vidistill.data.importers.inspect import Inspection
from vidistill.data.importers.listing import Item
from vidistill.data.importers.plan import SPLITS, Verdict
from vidistill.io import write_text

REPORT = "report.json"
PAGE = "report.html"
SHOWN = 120  # videos with pictures on the page, of each kind
HEIGHT, PICTURES = 64, 4  # pixels of a picture, pictures a video
STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:4px 8px;text-align:left;"
    "vertical-align:top;border-bottom:1px solid #ddd}.dropped{color:#a00}img{display:block}"
)


def summary(
    inspected: Sequence[Inspection], verdicts: Sequence[Verdict], strays: Mapping[str, str], fps: float
) -> dict[str, Any]:
    """What there is, what is used and what is not: the same videos give the same report."""
    clips = {split: 0 for split in SPLITS}
    frames = {split: 0 for split in SPLITS}
    for verdict in verdicts:
        if verdict.split:
            clips[verdict.split] += len(verdict.windows)
            frames[verdict.split] += sum(window.frames for window in verdict.windows)
    reasons = Counter(verdict.dropped.split(":")[0].split(" (")[0] for verdict in verdicts if verdict.dropped)
    return {
        "videos": len(verdicts),
        "used": sum(not verdict.dropped for verdict in verdicts),
        "hours": round(sum(found.seconds for found in inspected) / 3600, 4),
        "bytes": sum(found.bytes for found in inspected),
        "fps": fps,
        "clips": clips,
        "hours_used": {split: round(count / fps / 3600, 4) if fps else 0.0 for split, count in frames.items()},
        "dropped": dict(sorted(reasons.items())),
        "files": [row_of(found, verdict) for found, verdict in zip(inspected, verdicts, strict=True)],
        "strays": dict(sorted(strays.items())),
    }


def row_of(found: Inspection, verdict: Verdict) -> dict[str, Any]:
    """What the report says of a video."""
    size = [found.facts["height"], found.facts["width"]] if found.facts else []
    row = {"name": found.name, "split": verdict.split, "clips": len(verdict.windows), "dropped": verdict.dropped}
    row |= {"odd": list(verdict.odd), "seconds": found.seconds, "fps": found.fps, "size": size, "bytes": found.bytes}
    return row | {"scenes": len(found.scenes), "same_as": verdict.same_as}


def write_report(
    folder: Path, items: Sequence[Item], inspected: Sequence[Inspection], report: Mapping[str, Any], still_fps: float
) -> None:
    """Write both forms of a report into `folder`."""
    texts = {REPORT: json.dumps(report, indent=1, ensure_ascii=False)}
    texts[PAGE] = page(items, inspected, report, still_fps)
    for name, text in texts.items():
        write_text(folder / name, text)


def page(items: Sequence[Item], inspected: Sequence[Inspection], report: Mapping[str, Any], still_fps: float) -> str:
    """One HTML page, complete in itself: first what is odd or dropped, then what is used."""
    rows = list(zip(items, inspected, report["files"], strict=True))
    groups = {
        "Dropped": [row for row in rows if row[2]["dropped"]],
        "Used, with something to know": [row for row in rows if not row[2]["dropped"] and row[2]["odd"]],
        "Used": [row for row in rows if not row[2]["dropped"] and not row[2]["odd"]],
    }
    counts = ", ".join(f"{split} {report['clips'][split]} ({report['hours_used'][split]:g} h)" for split in SPLITS)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Import report</title><style>{STYLE}</style><h1>Import report</h1>",
        f"<p>{report['used']} of {report['videos']} videos used, {report['hours']:g} h, {report['fps']:g} frames "
        f"a second. Clips: {counts}.</p>",
    ]
    for title, group in groups.items():
        if group:
            parts.append(f"<h2>{title} ({len(group)})</h2><table>{table_head()}")
            parts += [table_row(*row, still_fps) for row in group[:SHOWN]]
            more = len(group) - SHOWN
            parts.append(f"</table>{f'<p>and {more} more, in {REPORT}</p>' if more > 0 else ''}")
    if report["strays"]:
        listed = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in report["strays"].items())
        parts.append(f"<h2>Files that belong to no video ({len(report['strays'])})</h2><ul>{listed}</ul>")
    return "".join(parts)


def table_head() -> str:
    return (
        "<tr>"
        + "".join(f"<th>{name}</th>" for name in ("", "video", "split", "clips", "seconds", "fps", "size", ""))
        + "</tr>"
    )


def table_row(item: Item, found: Inspection, row: Mapping[str, Any], still_fps: float) -> str:
    size = "x".join(str(side) for side in row["size"])
    says = f"<span class=dropped>{html.escape(row['dropped'])}</span> " if row["dropped"] else ""
    cells = (
        strip(item, found, still_fps),
        html.escape(row["name"]) + (f"<br><i>{html.escape(item.caption)}</i>" if item.caption else ""),
        row["split"],
        str(row["clips"]),
        f"{row['seconds']:.1f}",
        f"{row['fps']:g}",
        size,
        says + html.escape("; ".join(row["odd"])),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def strip(item: Item, found: Inspection, still_fps: float) -> str:
    """Pictures of a video beside each other, as an HTML image; nothing where there are none."""
    if not found.scenes:
        return ""
    width = max(1, round(HEIGHT * found.facts["width"] / found.facts["height"]))
    pictures = []
    for k in range(PICTURES):
        at = found.seconds * (k + 0.5) / PICTURES
        try:
            frame = next(nearest(frames_of(item.path, still_fps, at), at, 1.0, 1), None)
        except MediaError:
            frame = None
        if frame is not None:
            pictures.append(rgb(frame.raw, (HEIGHT, width), "crop", found.facts["aspect"]))
    if not pictures:
        return ""
    file = io.BytesIO()
    Image.fromarray(np.concatenate(pictures, 1)).save(file, "JPEG", quality=70)
    return f'<img height={HEIGHT} src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
