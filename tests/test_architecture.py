"""The rules of DESIGN.md that a parser can check. Reads source text only: nothing of the package is imported."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vidistill"

# Section 3 of DESIGN.md: a room may import its own layer and those below; no circle anywhere, and the first of a pair
# of APART never imports the second.
LAYERS = (
    {"ops", "schedules", "diffusion", "metrics", "conditioning", "codecs"}
    | {"config", "io", "sound", "progress", "distributed", "zoo"},
    {"memory", "models"},
    {"rollout", "sampling"},
    {"interop", "teachers", "record", "tensors", "checkpoint"},
    {"streaming", "data", "worlds"},
    {"training"},
    {"evaluation", "bench", "serve"},
    {"cli", "__init__", "__main__"},
)
APART = (
    ("training", "streaming"),
    ("training", "worlds"),
    ("data", "worlds"),
    ("data", "streaming"),
    ("streaming", "data"),
    ("streaming", "worlds"),
    ("worlds", "streaming"),
)
LAYER = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TOP = len(LAYERS) - 2  # evaluation, bench and serve never import each other


@dataclass(frozen=True)
class Extra:
    """A package that need not be installed: the extra that brings it, the files that may import it inside functions."""

    name: str
    files: tuple[str, ...] = ("*",)


HUB = ("teachers/*", "codecs/*", "conditioning/*")
OPTIONAL = {
    "diffusers": Extra("wan", HUB),
    "transformers": Extra("wan", HUB),
    "accelerate": Extra("wan", HUB),
    "sentencepiece": Extra("wan", HUB),
    "ftfy": Extra("wan", HUB),
    "peft": Extra("lora"),
    "huggingface_hub": Extra("hub", ("interop/hub", "teachers/wan")),
    "xformers": Extra("cuda", ("ops/*",)),
    "triton": Extra("cuda", ("ops/*",)),
    "vizdoom": Extra("doom", ("worlds/doom/*",)),
    "fastapi": Extra("demo", ("serve/*",)),
    "starlette": Extra("demo", ("serve/*",)),
    "uvicorn": Extra("demo", ("serve/*",)),
    "websockets": Extra("demo", ("serve/*",)),
    "matplotlib": Extra("eval"),
    "scipy": Extra("eval"),
    "torchao": Extra("int8"),
    "gymnasium": Extra("gym", ("data/importers/*", "worlds/drive/*")),
    "pygame": Extra("gym", ("worlds/drive/*",)),
    "pyarrow": Extra("lerobot", ("data/importers/*",)),
    "minari": Extra("minari", ("data/importers/*",)),
    "espeakng_loader": Extra("audio"),
    "soundfile": Extra("audio"),
}
REQUIRED = {"torch", "numpy", "einops", "imageio", "av", "PIL", "safetensors", "rich"}
ONLY_IN = {"omegaconf": "config"}  # required, but one module's business
# A Triton kernel is decorated where it is defined: its file imports triton at the top, and is imported in functions.
KERNELS = "ops/kernels/*"
NETWORK = ("requests", "urllib.request", "http.client", "httpx", "aiohttp", "huggingface_hub")
DYNAMIC = {"importlib.import_module", "import_module", "__import__"}
PICKLES = {"pickle", "dill", "joblib", "cloudpickle"}

# Three plain words in a row, of which none is part of a name, a path, an option or a command.
WORD = r"(?:[a-z]{2,}|a)"
SENTENCE = re.compile(rf"(?<![\w.\\'`/-]){WORD},? {WORD},? {WORD}(?![\w.\\'-])")

MAX_FILE, MAX_FUNCTION, MAX_FORWARD = 500, 60, 40
# Statements by room, docstrings apart: what there is, rounded up. A change that needs more raises its room on purpose.
BUDGETS = {
    "data": 2753,
    "training": 1754,
    "evaluation": 3026,
    "worlds": 1464,
    "bench": 1315,
    "ops": 1180,
    "cli": 1566,
    "serve": 1239,
    "interop": 1059,
    "conditioning": 805,
    "streaming": 686,
    "models": 607,
    "memory": 566,
    "codecs": 495,
    "io": 312,
    "teachers": 300,
    "checkpoint": 268,
    "distributed": 310,
    "schedules": 150,
    "config": 139,
    "record": 139,
    "rollout": 110,
    "metrics": 95,
    "diffusion": 101,
    "tensors": 81,
    "progress": 50,
    "sound": 53,
    "sampling": 40,
    "__init__": 20,
    "__main__": 5,
}
CONFIG_NAME = re.compile(r"^(?:\w*_)?(?:cfg|config|args)$")
MACHINE_PATH = re.compile(r"(?<![\w.~/<>})*-])/(?:work|root|home|tmp|Users)(?=[/\s\"'`]|$)")
TEXT = {".py", ".sh", ".toml", ".yaml", ".yml", ".md", ".json", ".html", ".js", ".css", ".txt", ".cfg", ".ini", ""}


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # dotted and absolute; "vidistill.x.y" for `from vidistill.x import y`
    lazy: bool  # inside a function, or for type checkers only


@dataclass(frozen=True)
class Source:
    path: str  # from the repository root
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def file(self) -> str:
        """The path inside the package, without suffix: "rollout", "teachers/wan", "codecs/__init__"."""
        return self.path.removeprefix(f"{PACKAGE}/").removesuffix(".py")

    @property
    def room(self) -> str:
        """The top of the path: a folder of the package, or a file beside them."""
        return self.file.split("/")[0]

    def at(self, line: int, message: str) -> str:
        return f"{self.path}:{line}: {message}"

    @property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, lazy=False))

    def _imports(self, node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = self._absolute(node)
            yield from (Import(node.lineno, f"{base}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in DYNAMIC and isinstance(node.args[0], ast.Constant):
            yield Import(node.lineno, str(node.args[0].value), lazy)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        for child in ast.iter_child_nodes(node):
            yield from self._imports(child, lazy)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.path.removesuffix(".py").split("/")[: -node.level]
        return ".".join([*package, *([node.module] if node.module else [])])


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as written."""
    return ast.unparse(node.func)


def tracked() -> list[Path]:
    """Every file that is, or would be, part of the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked source archive
        paths = [path for path in ROOT.rglob("*") if "/." not in f"/{path.relative_to(ROOT).as_posix()}"]
    return sorted(path for path in paths if path.is_file())


def read(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


TRACKED = tracked()
PACKAGE_SOURCES = [read(path) for path in TRACKED if path.suffix == ".py" and path.is_relative_to(ROOT / PACKAGE)]
SOURCES = PACKAGE_SOURCES + [
    read(path) for path in TRACKED if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in {"scripts", "demos"}
]
PYTHON = [read(path) for path in TRACKED if path.suffix == ".py"]
ROOMS = {source.room for source in PACKAGE_SOURCES}


# --- rules: each yields one line a violation, with what to do ---------------------------------------------------------


def room_of(name: str, rooms: set[str]) -> str | None:
    """The room an import reaches; "__init__" for a noun of the package itself, None for another package."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    if len(parts) == 1 or (parts[1] not in rooms and parts[1] not in LAYER):
        return "__init__"
    return parts[1]


def layers(source: Source, rooms: set[str] = ROOMS) -> Iterator[str]:
    if source.room not in LAYER:
        yield source.at(
            1,
            f"room '{source.room}' stands in no layer. If no room of DESIGN.md is the place for this code, put it into "
            "LAYERS here and into section 3 of DESIGN.md.",
        )
        return
    level = LAYER[source.room]
    for used in source.imports:
        target = room_of(used.name, rooms)
        if target in {None, source.room} or level == len(LAYERS) - 1 or used.name == f"{PACKAGE}.__version__":
            continue
        if target == "__init__":
            yield source.at(used.line, f"import '{used.name}' from the module that defines it, not from the package.")
        elif LAYER.get(target, 0) > level or (level == TOP == LAYER.get(target, 0)) or (source.room, target) in APART:
            yield source.at(
                used.line,
                f"'{source.room}' may not import '{target}': a room imports its own layer or a lower one, never "
                "the second of a pair of APART. Pass the value in, or move the code to the layer that may.",
            )


def file_of(name: str, files: set[str]) -> str | None:
    """The file an import of the package reads: a module, or the package whose `__init__` has the name."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        if path in files or f"{path}/__init__" in files:
            return path if path in files else f"{path}/__init__"
    return None


def imported(sources: list[Source], lazy: bool = True) -> dict[str, set[str]]:
    """Which files of the package each file imports; without `lazy` those that come with it."""
    files = {source.file for source in sources}
    return {
        source.file: {
            found
            for used in source.imports
            if used.name.startswith(f"{PACKAGE}.") and (lazy or not used.lazy) and (found := file_of(used.name, files))
        }
        - {source.file}
        for source in sources
    }


def optional_packages(source: Source) -> Iterator[str]:
    for used in source.imports:
        top = used.name.split(".")[0]
        if top == PACKAGE or top in sys.stdlib_module_names or top in REQUIRED:
            kernel = used.name.startswith(f"{PACKAGE}.ops.kernels.") and not source.file.startswith("ops/kernels/")
            if kernel and not used.lazy:
                yield source.at(used.line, f"import '{used.name}' inside the function that uses it: it needs triton.")
        elif top in ONLY_IN:
            if source.file != ONLY_IN[top]:
                yield source.at(used.line, f"'{top}' is imported only in {ONLY_IN[top]}.py; call that module instead.")
        elif top not in OPTIONAL:
            yield source.at(
                used.line,
                f"'{top}' is not a declared dependency: do without, or add it to pyproject.toml and to a table here.",
            )
        else:
            yield from _optional(source, used, top, OPTIONAL[top])


def _optional(source: Source, used: Import, top: str, rule: Extra) -> Iterator[str]:
    if not any(fnmatch(source.file, pattern) for pattern in rule.files):
        yield source.at(used.line, f"'{top}' is imported only in {', '.join(rule.files)}; call what they offer.")
    if not used.lazy and not (top == "triton" and fnmatch(source.file, KERNELS)):
        yield source.at(
            used.line,
            f"'{top}' is optional: import it inside the function that uses it, and let a missing one say "
            f'pip install "{PACKAGE}[{rule.name}]".',
        )


def network(source: Source) -> Iterator[str]:
    if source.room in {"teachers", "conditioning"} or source.file == "interop/hub":
        return
    for used in source.imports:
        if any(used.name == name or used.name.startswith(f"{name}.") for name in NETWORK):
            yield source.at(
                used.line, f"'{used.name}' reaches the network; only teachers, conditioning and publishing may."
            )


def sizes(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > MAX_FILE:
        yield source.at(1, f"{lines} lines, at most {MAX_FILE}: redesign it; two halves of it are not shorter.")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_FORWARD if node.name == "forward" else MAX_FUNCTION
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                yield source.at(node.lineno, f"{node.name} has {length} lines, at most {limit}: give its parts names.")


def guesses(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        if called(node) == "hasattr":
            yield source.at(node.lineno, "hasattr guesses: give the object a type, a Protocol or a field instead.")
        if called(node) == "getattr" and len(node.args) == 3:
            name = ast.unparse(node.args[0]).split(".")[-1]
            if CONFIG_NAME.match(name):
                yield source.at(node.lineno, f"getattr on {name} hides a default: put the field in the dataclass.")


def pickles(source: Source) -> Iterator[str]:
    for used in source.imports:
        if used.name.split(".")[0] in PICKLES:
            yield source.at(used.line, f"'{used.name}' can run code from a file: use safetensors and JSON.")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called(node) == "torch.load" and given.get("weights_only") != "True":
            yield source.at(node.lineno, "torch.load needs weights_only=True.")
        if given.get("allow_pickle") == "True" and called(node) in {"np.load", "numpy.load"}:
            yield source.at(node.lineno, "allow_pickle=True can run code from a file: store plain arrays.")


def machine_paths(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), start=1):
        if found := MACHINE_PATH.search(line):
            yield source.at(
                number,
                f"'{found.group()}' is a path of one machine: take a path from the user, stay inside the repository, "
                "or use tempfile, mktemp or tmp_path.",
            )


def check(rule, sources: list[Source]) -> None:
    found = list(dict.fromkeys(line for source in sources for line in rule(source)))
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def prose(source: Source) -> Iterator[str]:
    """Patterns of errors that hold a sentence: another wording, which says the same, would break them."""
    for function in (n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
        matched = [
            k.value for n in ast.walk(function) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "match"
        ]
        names = {value.id for value in matched if isinstance(value, ast.Name)}
        tables = [d for d in function.decorator_list if isinstance(d, ast.Call) and called(d).endswith("parametrize")]
        matched += [value for table in tables for name in names for value in column(table, name)]
        for text in (n for value in matched for n in ast.walk(value) if isinstance(n, ast.Constant)):
            if found := SENTENCE.search(str(text.value)):
                yield source.at(text.lineno, f"match names of fields, values or files, not the words '{found[0]}'.")


def column(table: ast.Call, name: str) -> Iterator[ast.expr]:
    """The values that `parametrize` gives an argument, as far as they are written out."""
    names = ast.unparse(table.args[0]).strip("()'\"").replace("'", "").replace(" ", "").split(",")
    if name in names and isinstance(table.args[1], ast.List | ast.Tuple):
        for row in table.args[1].elts:
            cells = row.args if isinstance(row, ast.Call) else row.elts if isinstance(row, ast.Tuple) else [row]
            yield cells[names.index(name)]


# --- the project ------------------------------------------------------------------------------------------------------


def test_rooms_import_their_layer_or_a_lower_one():
    check(layers, PACKAGE_SOURCES)


def test_every_layer_names_rooms_that_are_there():
    assert set(LAYER) - {"zoo"} <= ROOMS


def test_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(imported(PACKAGE_SOURCES)).prepare()  # CycleError names the circle


def test_optional_packages_stay_behind_their_doors():
    check(optional_packages, PACKAGE_SOURCES)


def test_only_teachers_and_conditioning_reach_the_network():
    check(network, PACKAGE_SOURCES)


def test_files_and_functions_keep_their_budget():
    check(sizes, PACKAGE_SOURCES)


def statements(source: Source) -> int:
    """Statements of a file; a docstring is none."""
    found = [node for node in ast.walk(source.tree) if isinstance(node, ast.stmt)]
    words = [
        n
        for n in found
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    ]
    return len(found) - len(words)


def test_rooms_keep_their_budget_of_statements():
    counted = dict.fromkeys(BUDGETS, 0)
    for source in PACKAGE_SOURCES:
        counted[source.room] += statements(source)
    over = {room: count for room, count in counted.items() if count > BUDGETS[room]}
    assert not over, (
        f"{over} are over { ({room: BUDGETS[room] for room in over}) }: make room, or raise BUDGETS on purpose"
    )


def test_patterns_of_errors_hold_no_sentence():
    check(prose, [source for source in PYTHON if source.path.startswith("tests/")])


def test_nothing_guesses_at_attributes():
    check(guesses, SOURCES)


def test_nothing_loads_a_pickle():
    check(pickles, PACKAGE_SOURCES)
    check(lambda source: (line for line in pickles(source) if "torch.load" in line), PYTHON)


def test_no_file_names_a_path_of_one_machine():
    check(machine_paths, [read(path) for path in TRACKED if path.suffix in TEXT and path.name != "LICENSE"])


def test_streaming_loads_no_training():
    graph, reached, todo = imported(PACKAGE_SOURCES), set(), ["streaming/session"]
    while todo:
        reached.add(name := todo.pop())
        todo += graph[name] - reached
    assert not {name for name in reached if name.split("/")[0] in {"training", "data", "worlds", "evaluation"}}


def test_the_design_document_names_the_same_layers():
    text = (ROOT / PACKAGE / "DESIGN.md").read_text(encoding="utf-8")
    drawn = [set(re.findall(r"`(\w+)`", line)) for line in re.findall(r"^\| L\d \|([^|]+)\|", text, flags=re.MULTILINE)]
    assert drawn == [rooms - {"zoo", "__init__", "__main__"} for rooms in LAYERS]


# --- the rules themselves ---------------------------------------------------------------------------------------------

BROKEN = [
    (layers, "streaming/engine", "from vidistill.training.trainer import train", "may not import 'training'"),
    (layers, "training/trainer", "from vidistill.worlds import talker", "may not import 'worlds'"),
    (layers, "bench/bench", "def f():\n    from vidistill.evaluation import report", "may not import 'evaluation'"),
    (layers, "models/dit", "def f():\n    from ..teachers import wan", "may not import 'teachers'"),
    (layers, "models/dit", "from vidistill import rollout", "may not import 'rollout'"),
    (layers, "ops/rope", "import importlib\nimportlib.import_module('vidistill.memory')", "may not import 'memory'"),
    (layers, "models/dit", "from vidistill import Condition", "not from the package"),
    (layers, "helpers", "x = 1", "stands in no layer"),
    (optional_packages, "teachers/wan", "import diffusers", "inside the function"),
    (optional_packages, "ops/attention", "try:\n    import xformers\nexcept ImportError: ...", "inside the function"),
    (optional_packages, "ops/attention", "from vidistill.ops.kernels.attention import kernel", "inside the function"),
    (optional_packages, "models/dit", "def f():\n    import triton", "imported only in ops/*"),
    (optional_packages, "trainer", "from omegaconf import OmegaConf", "only in config.py"),
    (optional_packages, "worlds/shapes", "def f():\n    import vizdoom", "imported only in worlds/doom/*"),
    (optional_packages, "cli", "def f():\n    import uvicorn", "imported only in serve/*"),
    (optional_packages, "metrics", "import pandas", "not a declared dependency"),
    (network, "zoo/__init__", "from urllib.request import urlopen", "reaches the network"),
    (network, "data/shards", "def f():\n    from huggingface_hub import hf_hub_download", "reaches the network"),
    (sizes, "dit", "\n" * 501, "501 lines"),
    (sizes, "dit", "def forward(self):\n" + "    x = 1\n" * 40, "forward has 41 lines, at most 40"),
    (sizes, "dit", "def f(self):\n" + "    x = 1\n" * 60, "f has 61 lines, at most 60"),
    (guesses, "dit", "hasattr(net, 'blocks')", "hasattr"),
    (guesses, "dit", "getattr(self.cfg, 'width', 64)", "hides a default"),
    (guesses, "dit", "getattr(student_config, 'width', 64)", "hides a default"),
    (pickles, "checkpoint", "torch.load(path)", "weights_only=True"),
    (pickles, "checkpoint", "torch.load(path, weights_only=False)", "weights_only=True"),
    (pickles, "data", "import pickle", "can run code"),
    (machine_paths, "data", "cache = '" + "/tm" + "p/cache'", "a path of one machine"),
    (prose, "t", "def test():\n    raises(E, match=r'x.json is damaged or cut short')", "is damaged or"),
    (prose, "t", "@parametrize('said', ['a thing is wrong'])\ndef test(said): raises(E, match=said)", "a thing is"),
    (
        prose,
        "t",
        "@parametrize(('n', 'm'), [(1, 'a thing is wrong')])\ndef test(n, m): raises(E, match=m)",
        "a thing is",
    ),
    (machine_paths, "data", "# see " + "/ho" + "me/me/notes", "a path of one machine"),
]

SOUND = [
    (layers, "teachers/wan", "from vidistill.interop import keys"),
    (layers, "teachers/ltx", "from . import Teacher\nfrom .wan import load\nfrom ..models.dit import VideoDiT"),
    (layers, "bench/bench", "from vidistill import __version__\nfrom vidistill.streaming.session import StreamSession"),
    (layers, "cli/serve", "def f():\n    from vidistill.serve import app"),
    (optional_packages, "teachers/wan", "def f():\n    from diffusers import WanTransformer3DModel"),
    (optional_packages, "codecs/wan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
    (optional_packages, "ops/kernels/attention", "import triton\nimport triton.language as tl"),
    (optional_packages, "ops/attention", "def f():\n    from vidistill.ops.kernels.attention import kernel"),
    (optional_packages, "worlds/doom/play", "def f():\n    import vizdoom"),
    (optional_packages, "config", "from omegaconf import OmegaConf"),
    (network, "teachers/wan", "def f():\n    from huggingface_hub import snapshot_download"),
    (network, "data/shards", "from urllib.parse import quote"),
    (sizes, "dit", "def forward(self):\n" + "    x = 1\n" * 39),
    (prose, "t", "@parametrize(('n', 'm'), [('it is so', 'dit.width.*0')])\ndef test(n, m): raises(E, match=m)"),
    (prose, "t", "def test():\n    raises(E, match=r'no checkpoint .*gone|dit\\\\.heads is 1')"),
    (guesses, "dit", "getattr(cfg, name)\ngetattr(torch, 'float8', None)"),
    (pickles, "interop/wan", "torch.load(path, map_location='cpu', weights_only=True)"),
    (machine_paths, "serve/app", "f'{base}" + "/ho" + "me'; 'https://example.org" + "/ho" + "me'; 'out/work'"),
]


@pytest.mark.parametrize(("rule", "file", "code", "message"), BROKEN)
def test_a_broken_rule_is_reported_with_what_to_do(rule, file, code, message):
    found = list(rule(Source(f"{PACKAGE}/{file}.py", code)))
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(("rule", "file", "code"), SOUND)
def test_sound_code_passes(rule, file, code):
    assert not list(rule(Source(f"{PACKAGE}/{file}.py", code)))
