"""Writes vidistill/zoo/README.md and the results of the README from the cards: python scripts/zoo_table.py [--check]

Every figure of a bundled checkpoint stands once, in its card (`vidistill/zoo/NAME.json`, `card.figures`), and what was
measured of a paper's claim in scripts/claims.yaml.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
ZOO, CLAIMS = ROOT / "vidistill" / "zoo", ROOT / "scripts" / "claims.yaml"
SOURCE = ("command", "commit", "machine")
MARKS = "<!-- results: written by scripts/zoo_table.py -->", "<!-- end of results -->"
# Rows of the README: student, its teacher, keys of its distance and of what it is asked to do, and what that is.
ROWS = (
    ("doom-teacher", "quality.frechet_paired", "quality.action_following", "actions"),
    ("doom-selfforcing", "quality.frechet_paired", "quality.action_following", "actions"),
    ("doom-diagonal", "quality.frechet_paired", "quality.action_following", "actions"),
    ("drive-diagonal", "quality.frechet_paired", "quality.action_following", "actions"),
    ("doom-relic", "quality.frechet_paired", "quality.action_following", "actions"),
    ("shapes-selfforcing", "quality.frechet_paired", "quality.before.asked", "captions"),
    ("talker-improved", "quality.frechet_paired", "quality.sync_corr", "lip sync"),
    ("talker-selfforcing", "quality.frechet_paired", "quality.sync_corr", "lip sync"),
)


def records() -> dict[str, dict[str, Any]]:
    paths = [path for path in sorted(ZOO.glob("*.json")) if path.stem not in ("aliases", "clone_only")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def find(figures: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = figures
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(map(number, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def groups(figures: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """(name, source, figures) of everything measured in one run: nested figures without a source of their own belong to
    the run around them."""
    own: dict[str, Any] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping) and "command" in value:
            yield from groups(value, key)
        elif key in (*SOURCE, "confusion"):  # tables of its own
            continue
        elif isinstance(value, Mapping):
            own |= {f"{key} {inner}": x for inner, x in value.items()}
        else:
            own[key] = value
    if own:
        yield name, {key: figures.get(key, "-") for key in SOURCE}, own


def judged(figures: Mapping[str, Any], key: str) -> str:
    """A figure and its interval, where there is one."""
    value, parts = find(figures, key), key.split(".")
    places = (".".join([*parts[:i], f"{parts[i]}_interval", *parts[i + 1 :]]) for i in range(len(parts)))
    edges = next((found for place in places if (found := find(figures, place))), None)
    return "-" if value is None else f"{value:.2f}" + (f" ({edges[0]:.2f}-{edges[1]:.2f})" if edges else "")


def results(cards: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| network | Frechet | follows | frames/s | x teacher |", "|---|---|---|---|---|"]
    for name, distance, task, what in ROWS:
        figures = cards[name]["figures"]
        speed, teacher = figures.get("speed", {}), figures.get("beside_teacher", {})
        against = speed.get("fps_ratio") if "-teacher" in speed.get("command", "") else None
        if teacher.get("machine") == speed.get("machine"):  # ratios of another machine do not belong beside these
            against = against or teacher.get("fps_ratio")
        cells = (judged(figures, distance), f"{judged(figures, task)} {what}", number(speed.get("fps")))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {number(against)} |")
    return "\n".join(lines)


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a claim holds: a whole interval decides, and never a single training."""
    (low, high), least, most = row["interval"], row.get("least", -math.inf), row.get("most", math.inf)
    if row["trainings"] == 1:
        return "undecided, one training"
    if low > least and high < most:
        return "held"
    return "not held" if high < least or low > most else "undecided"


def claims(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| paper | claim | verdict | measured | to hold | hours | command | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        asked = f"above {row['least']:g}" if "least" in row else f"below {row['most']:g}"
        cells = (
            row["paper"],
            row["claim"],
            verdict(row),
            f"{row['measured']:g} ({low:g} to {high:g})",
            asked,
            f"{row['hours']:g}",
        )
        lines.append(f"| {' | '.join(cells)} | `{row['command']}` | {row['commit']} |")
    return lines


def confusion(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """For each attribute of a caption, the shares of what was seen (columns) where a value was asked for (rows)."""
    for attribute, rows in tables.items():
        yield from ("", f"| {attribute} asked | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|")
        for asked, seen in rows.items():
            yield f"| {asked} | {' | '.join(f'{seen.get(value, 0.0):.3f}' for value in rows)} |"


def zoo_page(found: Mapping[str, Mapping[str, Any]], claimed: Sequence[Mapping[str, Any]]) -> str:
    aliases = json.loads((ZOO / "aliases.json").read_text(encoding="utf-8"))
    also = {stem: alias for alias, stem in aliases.items()}
    lines = [
        "# Bundled checkpoints",
        "",
        "Written by `python scripts/zoo_table.py` from the cards beside the weights; change a card, not this page.",
        "Distances compare at equal numbers of clips within a world only. A `*_ratio` is over real video, `late` and",
        "`*_drift` are of the last seconds of a minute-long stream; the READMEs of `vidistill/evaluation` and",
        "`vidistill/bench` explain the keys. Figures without an interval are single runs.",
        "",
        "| name | kind | also | MB | objective | steps | hours | from | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, record in found.items():
        card, path = record["card"], ZOO / f"{name}.safetensors"
        size = f"{path.stat().st_size / 1e6:.1f}"
        parents = ", ".join(f"`{Path(p).name}`" for p in card["parents"]) or "-"
        row = (also.get(name, "-"), size, card["objective"], card["steps"], card["hours"], parents, card["commit"])
        lines.append(f"| `{name}` | {record['kind']} | {' | '.join(map(str, row))} |")
    lines += [
        "",
        "## What the papers claim",
        "",
        "As far as networks of two to four million parameters can say. A whole 95 % interval decides, never one",
        "training, whose own noise it does not hold; a difference is in favour of the claim where it is positive.",
        "",
        *claims(claimed),
    ]
    for name, record in found.items():
        figures = record["card"].get("figures")
        if not figures:
            continue
        lines += ["", f"## {name}", "", "| figures | command | commit | machine |", "|---|---|---|---|"]
        for _, source, own in groups(figures):
            told = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in own.items())
            lines.append(f"| {told} | `{source['command']}` | {source['commit']} | {source['machine']} |")
        lines += confusion(figures.get("quality", {}).get("confusion", {}))
        if note := record["card"].get("note"):
            lines += ["", note[0].upper() + note[1:] + "."]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """What the two files should hold."""
    found, readme = records(), ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    claimed: Any = OmegaConf.to_container(OmegaConf.load(CLAIMS))
    table = results({name: record["card"] for name, record in found.items()})
    return {readme: f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", ZOO / "README.md": zoo_page(found, claimed)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    check = parser.parse_args().check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if not check:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
