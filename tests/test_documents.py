"""Documents stay short, and what they cite exists."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"vidistill/zoo/README.md"}  # by scripts/zoo_table.py
CITED = re.compile(r"\(D\d+(?:, D\d+)*\)")
TEXT = {".py", ".yaml", ".md", ".sh"}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    return [name for name in listed if name and (ROOT / name).is_file()]


def size(*names: str) -> int:
    return sum((ROOT / name).stat().st_size for name in names)


def test_documents_keep_their_size():
    written = [n for n in tracked() if n.endswith(".md") and n not in GENERATED and not n.startswith("tests/goldens/")]
    assert size("README.md") <= 8 * 1024 and size("vidistill/DECISIONS.md") <= 15 * 1024
    assert size(*written) <= 120 * 1024, sorted(((size(n), n) for n in written), reverse=True)


def test_every_decision_that_is_cited_exists_and_numbers_are_in_order():
    decided = [
        int(n) for n in re.findall(r"^\*\*D(\d+)\.", (ROOT / "vidistill/DECISIONS.md").read_text(), re.MULTILINE)
    ]
    assert decided == list(range(1, len(decided) + 1))
    for name in tracked():
        if Path(name).suffix in TEXT and name != "tests/test_documents.py":
            cited = re.findall(r"\d+", " ".join(CITED.findall((ROOT / name).read_text(encoding="utf-8"))))
            unknown = sorted({int(n) for n in cited} - set(decided))
            assert not unknown, f"{name} cites decisions that do not exist: {unknown}"


def test_every_file_that_a_document_links_to_is_there():
    for name in tracked():
        if name.endswith(".md") and not name.startswith("tests/goldens/"):
            text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"
