"""Documents stay short, and what they cite exists."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {"vidistill/zoo/README.md", "configs/wan/PLAN.md"}  # by scripts/zoo_table.py, scripts/plan_table.py
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


def test_the_plan_of_wan_has_every_stage_as_its_config_is_planned():
    table = (ROOT / "configs/wan/PLAN.md").read_text(encoding="utf-8").splitlines()
    rows = dict(re.findall(r"^\| `(.+?)` \| (.*?) \|", line)[0] for line in table if line.startswith("| `"))
    heads = {p.stem: p.read_text(encoding="utf-8") for p in (ROOT / "configs/wan").glob("*.yaml")}
    planned = {name: re.findall(r"^# Planned for (.*)\.$", head, re.MULTILINE) for name, head in heads.items()}
    assert rows == {name: "".join(found[:1]) for name, found in planned.items()}


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


def test_every_kind_of_fault_is_held_by_tests_that_are_there():
    rows = [
        line.split("|") for line in (ROOT / "tests/README.md").read_text(encoding="utf-8").splitlines() if "|" in line
    ]
    assert len(rows) == 2 + 9, "a head and the kinds"
    for _, kind, promise, tests, changes, _ in rows[2:]:
        held, changed = re.findall(r"`(.+?)`", tests), re.findall(r"`(.+?)`", changes)
        assert promise.strip() and held, kind
        assert all("def test_" in (ROOT / name).read_text(encoding="utf-8") for name in held), kind
        for name in changed:
            text = (ROOT / name).read_text(encoding="utf-8")
            assert "given(" in text and "1000" in text and "slow" in text, f"{name} changes nothing a thousand times"


# --- names in code type -----------------------------------------------------------------------------------------------

OUTSIDE = {"torch", "nn"}  # whose names are not ours
FILE = re.compile(r"(?<![\w/.*<>-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml|sh))\b(?!\.)")
DATA = re.compile(r"[\w./-]+\.(?:mp4|txt|csv|json|npy|html|safetensors)\b")
DOTTED = re.compile(r"(?<![\w/.=-])([A-Za-z_]\w*)\.([A-Za-z_]\w*)")


def spans(name: str) -> list[str]:
    """What a document sets in code type within its lines; a command that shows an old file names what was."""
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    return [span for span in re.findall(r"`([^`\n]+)`", text) if not span.startswith("git show")]


def current() -> list[str]:
    """Documents that speak of the present: not what changed, nor what was measured, generated or recorded."""
    documents = {n for n in tracked() if n.endswith(".md") and not n.startswith("tests/goldens/")}
    return sorted(documents - GENERATED - {"CHANGELOG.md"})


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def members() -> dict[str, set[str]]:
    """What may stand behind a dot, by what stands before it: a module, a class, or a field that holds a dataclass."""
    found: dict[str, set[str]] = defaultdict(set)
    sections: list[tuple[str, str]] = []
    for name in (n for n in tracked() if n.startswith("vidistill/") and n.endswith(".py")):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        module = Path(name.removesuffix("/__init__.py").removesuffix(".py"))
        found[module.parent.name].add(module.name)
        found[module.name] |= set(assigned(tree.body))
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
            found[node.name] |= set(assigned(node.body))
            for field in (n for n in node.body if isinstance(n, ast.AnnAssign)):
                kinds = re.findall(r"\w+", ast.unparse(field.annotation))
                sections += [(ast.unparse(field.target), kind) for kind in kinds]
    for field, kind in sections:
        found[field] |= found.get(kind, set())
    return found


def test_every_file_that_a_document_names_is_there():
    files = [f"/{name}" for name in tracked()]
    named = [(name, path) for name in current() for span in spans(name) for path in FILE.findall(span)]
    named = [(name, path) for name, path in named if path.endswith(".md") or not Path(path).stem.isupper()]  # NAME.py
    assert not [(name, path) for name, path in named if not any(file.endswith(f"/{path}") for file in files)]


def test_every_dotted_name_of_a_document_exists():
    owners = members()
    named = [(n, *pair) for n in current() for s in spans(n) for pair in DOTTED.findall(DATA.sub("", FILE.sub("", s)))]
    assert not [(n, owner, end) for n, owner, end in named if owner not in OUTSIDE and end not in owners.get(owner, ())]


def test_every_identifier_of_a_document_is_in_the_code():
    sources = [n for n in tracked() if Path(n).suffix in {".py", ".js", ".html", ".yaml", ".sh"}]
    code = "\n".join((ROOT / n).read_text(encoding="utf-8") for n in sources)
    words = set(re.findall(r"\w+", code))
    ends = tuple(set(re.findall(r"\}(_[a-z_]+)", code)))  # of keys that are put together
    named = [(n, word) for n in current() for s in spans(n) for word in re.findall(r"[A-Za-z]\w*_\w+", FILE.sub("", s))]
    assert not [
        (n, word)
        for n, word in named
        if not (word in words or word.endswith(ends) or word.replace("_", ".", 1) in code)
    ]
