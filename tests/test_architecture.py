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

# Section 3 of DESIGN.md. A folder is one module; a row "folder/file" replaces the folder's row for that file.
ANYTHING = {"*"}
BENCH = {"stream", "sampling", "teachers", "checkpoint", "metrics", "shapes"}
ARROWS: dict[str, set[str]] = {
    # L0
    "shapes": set(),
    "schedules": set(),
    "config": set(),
    "distributed": {"ops"},
    "lora": set(),
    "video": set(),
    "ops": set(),
    "zoo": set(),
    "text": set(),
    "diffusion": {"shapes"},
    "metrics": {"shapes"},
    "poses": set(),
    "audio": set(),
    "speech": set(),
    "curation": set(),
    "conditioning": {"audio", "poses", "shapes"},
    "memory": {"ops", "shapes"},
    "codecs": {"shapes"},
    # L1
    "dit": {"memory", "ops", "conditioning", "diffusion", "shapes"},
    "student": {"dit", "memory", "ops", "diffusion", "conditioning", "shapes"},
    "interop": {"dit", "memory", "schedules", "diffusion", "conditioning", "shapes"},
    "teachers": {"dit", "diffusion", "conditioning", "shapes"},
    "teachers/wan": {"dit", "diffusion", "conditioning", "shapes", "interop"},
    # L2
    "rollout": {"student", "memory", "schedules", "conditioning", "diffusion", "shapes"},
    "sampling": {"diffusion", "conditioning", "shapes"},
    "objectives": {"sampling", "student", "conditioning", "diffusion", "metrics", "shapes"},
    "checkpoint": {"student", "codecs", "teachers", "interop", "zoo", "config", "shapes", "conditioning", "text"}
    | {"diffusion", "dit", "schedules"},
    "data": {"audio", "curation", "poses", "sources", "conditioning", "shapes", "video"},
    "learner": {"ops"},
    "sources": {"audio", "speech", "conditioning", "shapes", "video"},
    # L3
    "convert": {"checkpoint", "interop", "student", "teachers", "audio", "conditioning", "diffusion", "shapes"},
    "trainer": {"objectives", "long", "learner", "rollout", "schedules", "teachers", "student", "data", "codecs"}
    | {"checkpoint", "sampling", "dit", "conditioning", "diffusion", "metrics", "distributed", "shapes"}
    | {"journal", "lora", "ops", "stage", "watch"},
    "watch": {"objectives", "rollout", "schedules", "student", "data", "sources", "metrics"},
    "stage": {
        "ops",
        "watch",
        "conditioning",
        "poses",
        "objectives",
        "schedules",
        "student",
        "dit",
        "codecs",
        "learner",
        "distributed",
        "lora",
    },
    "prepare": {"checkpoint", "data", "diffusion", "sampling", "conditioning", "poses", "teachers", "ops"},
    "journal": {"checkpoint"},
    "long": {"rollout", "schedules", "student", "memory", "data", "conditioning", "shapes"},
    "roaming": {"conditioning", "memory", "poses"},
    "stream": {
        "roaming",
        "rollout",
        "schedules",
        "student",
        "memory",
        "codecs",
        "checkpoint",
        "conditioning",
        "ops",
        "video",
        "shapes",
    },
    "probes": {"checkpoint", "config", "data", "metrics", "ops", "sources", "video", "shapes"},
    "report": {"video"},
    # L4
    "tally": {"metrics", "probes", "video", "shapes"},
    "bench": BENCH | {"codecs", "conditioning", "dit", "memory", "ops", "rollout", "schedules"},
    "dryrun": {
        "watch",
        "trainer",
        "stage",
        "stream",
        "checkpoint",
        "data",
        "distributed",
        "codecs",
        "conditioning",
        "config",
    }
    | {"dit", "interop", "lora", "objectives", "ops", "schedules", "shapes", "student", "teachers"},
    "evaluate": BENCH
    | {"tally", "report", "probes", "sources", "data", "video"}
    | {"rollout", "schedules", "memory", "ops", "conditioning", "codecs", "poses"},
    "adherence": {"evaluate", "tally", "report", "probes", "sources", "stream", "rollout", "sampling", "schedules"}
    | {"checkpoint", "codecs", "conditioning", "metrics", "ops", "video"},
    "avatar": {"evaluate", "report", "sources", "stream", "rollout", "sampling", "schedules", "checkpoint", "codecs"}
    | {"conditioning", "data", "metrics", "audio", "video", "watch", "memory"},
    "frontier": {"adherence", "evaluate", "trainer", "stage", "report", "checkpoint", "config", "schedules"},
    "revisit": {"evaluate", "report", "probes", "sources", "data", "video", "checkpoint", "metrics"}
    | {"memory", "ops", "conditioning", "poses", "codecs"},
    "serve": {"audio", "speech", "stream", "checkpoint", "video", "shapes"},
    "cli": ANYTHING,
    "cli_data": ANYTHING,
    "__main__": {"cli"},
    "__init__": ANYTHING,
}


@dataclass(frozen=True)
class Extra:
    """A package that need not be installed: the extra that brings it, the files that may import it inside functions."""

    name: str
    files: tuple[str, ...] = ("*",)


HUB = ("teachers/*", "codecs/*", "conditioning", "conditioning/*", "audio")
OPTIONAL = {
    "diffusers": Extra("wan", HUB),
    "transformers": Extra("wan", HUB),
    "accelerate": Extra("wan", HUB),
    "sentencepiece": Extra("wan", HUB),
    "ftfy": Extra("wan", HUB),
    "peft": Extra("lora"),
    "xformers": Extra("cuda", ("ops/*",)),
    "triton": Extra("cuda", ("ops/*",)),
    "vizdoom": Extra("doom", ("sources/doom*",)),
    "fastapi": Extra("demo", ("serve/*",)),
    "starlette": Extra("demo", ("serve/*",)),
    "uvicorn": Extra("demo", ("serve/*",)),
    "websockets": Extra("demo", ("serve/*",)),
    "matplotlib": Extra("eval"),
    "scipy": Extra("eval"),
    "torchao": Extra("int8"),
    "espeakng_loader": Extra("audio"),
    "soundfile": Extra("audio"),
}
REQUIRED = {"torch", "numpy", "einops", "imageio", "av", "PIL", "safetensors", "tqdm", "rich"}
ONLY_IN = {"omegaconf": "config"}  # required, but one module's business
# A Triton kernel is decorated where it is defined: its file imports triton at the top, and is imported in functions.
KERNELS = "ops/triton_*"
NETWORK = ("requests", "urllib.request", "http.client", "httpx", "aiohttp", "huggingface_hub")
DYNAMIC = {"importlib.import_module", "import_module", "__import__"}
PICKLES = {"pickle", "dill", "joblib", "cloudpickle"}

MAX_FILE, MAX_FUNCTION, MAX_FORWARD = 500, 60, 40
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
    def module(self) -> str:
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
MODULES = {source.module for source in PACKAGE_SOURCES}


# --- rules: each yields one line a violation, with what to do ---------------------------------------------------------


def module_of(name: str, modules: set[str]) -> str | None:
    """The package module an import reaches; "__init__" for a noun of the package itself, None for another package."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    if len(parts) == 1 or (parts[1] not in modules and parts[1] not in ARROWS):
        return "__init__"
    return parts[1]


def arrows(source: Source, modules: set[str] = MODULES) -> Iterator[str]:
    allowed = ARROWS.get(source.file, ARROWS.get(source.module))
    if allowed is None:
        yield source.at(
            1,
            f"module '{source.module}' has no row in ARROWS. If no module of DESIGN.md is the place for this code, "
            "add the row deliberately: here, in section 3 of DESIGN.md, and with the reason in DECISIONS.md.",
        )
        return
    for used in source.imports:
        target = module_of(used.name, modules)
        if target in {None, source.module} or allowed == ANYTHING or used.name == f"{PACKAGE}.__version__":
            continue
        if target == "__init__":
            yield source.at(used.line, f"import '{used.name}' from the module that defines it, not from the package.")
        elif target not in allowed:
            may = ", ".join(sorted(allowed)) or "nothing of the package"
            yield source.at(
                used.line,
                f"'{source.module}' may not import '{target}' (it may import: {may}). Pass the value in, or move the "
                "code to the layer that may; a new arrow goes into ARROWS and DESIGN.md, its reason into DECISIONS.md.",
            )


def optional_packages(source: Source) -> Iterator[str]:
    for used in source.imports:
        top = used.name.split(".")[0]
        if top == PACKAGE or top in sys.stdlib_module_names or top in REQUIRED:
            if used.name.startswith(f"{PACKAGE}.ops.triton_") and not used.lazy:
                yield source.at(used.line, f"import '{used.name}' inside the function that uses it: it needs triton.")
        elif top in ONLY_IN:
            if source.module != ONLY_IN[top]:
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
    if source.module in {"teachers", "conditioning"}:
        return
    for used in source.imports:
        if any(used.name == name or used.name.startswith(f"{name}.") for name in NETWORK):
            yield source.at(used.line, f"'{used.name}' reaches the network; only teachers/* and conditioning may.")


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


# --- the project ------------------------------------------------------------------------------------------------------


def test_modules_import_only_what_their_arrows_allow():
    check(arrows, PACKAGE_SOURCES)


def test_optional_packages_stay_behind_their_doors():
    check(optional_packages, PACKAGE_SOURCES)


def test_only_teachers_and_conditioning_reach_the_network():
    check(network, PACKAGE_SOURCES)


def test_files_and_functions_keep_their_budget():
    check(sizes, PACKAGE_SOURCES)


def test_nothing_guesses_at_attributes():
    check(guesses, SOURCES)


def test_nothing_loads_a_pickle():
    check(pickles, PACKAGE_SOURCES)
    check(lambda source: (line for line in pickles(source) if "torch.load" in line), PYTHON)


def test_no_file_names_a_path_of_one_machine():
    check(machine_paths, [read(path) for path in TRACKED if path.suffix in TEXT and path.name != "LICENSE"])


def test_arrows_point_down_only():
    files = {name: targets for name, targets in ARROWS.items() if targets != ANYTHING}
    graph = {name: {target for target in targets if target != name} for name, targets in files.items()}
    for name in files:
        if "/" in name:  # a folder is as high as its highest file
            graph[name.split("/")[0]] |= graph[name]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle
    missing = {target for targets in graph.values() for target in targets} - set(ARROWS)
    assert not missing, f"ARROWS points at modules without a row: {sorted(missing)}"


def test_streaming_reaches_no_training_module():
    reached, todo = set(), ["stream"]
    while todo:
        name = todo.pop()
        reached.add(name)
        todo += [target for row, targets in ARROWS.items() if row.split("/")[0] == name for target in targets - reached]
    training = {"trainer", "stage", "objectives", "data", "sources", "evaluate"}
    assert not reached & training, f"stream can reach {sorted(reached & training)} through the modules it imports"
    assert "teachers" not in ARROWS["stream"]


def test_the_design_document_draws_the_same_arrows():
    text = (ROOT / PACKAGE / "DESIGN.md").read_text(encoding="utf-8")
    drawn = dict(re.findall(r"^(?:L\d)?\s+([\w/]+) +-> (.+)$", text, flags=re.MULTILINE))
    for name, targets in ARROWS.items():
        words = {"*": "anything"} if targets == ANYTHING else {}
        line = ", ".join(sorted(words.get(target, target) for target in targets)) or "nothing"
        assert name in drawn, f"section 3 of DESIGN.md needs the line: {name} -> {line}"
        got = {word.strip() for word in drawn[name].split(",")} - {"nothing"}
        want = {words.get(target, target) for target in targets}
        assert got == want, f"section 3 of DESIGN.md disagrees with ARROWS; it should say: {name} -> {line}"
    assert not set(drawn) - set(ARROWS), f"ARROWS needs rows for {sorted(set(drawn) - set(ARROWS))}"


# --- the rules themselves ---------------------------------------------------------------------------------------------

BROKEN = [
    (arrows, "stream", "from vidistill.trainer import train", "may not import 'trainer'"),
    (arrows, "stream", "def f():\n    from .teachers import wan", "may not import 'teachers'"),
    (arrows, "teachers/ltx", "from ..interop import wan", "may not import 'interop'"),
    (arrows, "dit", "from vidistill import student", "may not import 'student'"),
    (arrows, "dit", "import importlib\nimportlib.import_module('vidistill.stream')", "may not import 'stream'"),
    (arrows, "dit", "from vidistill import Condition", "not from the package"),
    (arrows, "helpers", "x = 1", "has no row"),
    (optional_packages, "teachers/wan", "import diffusers", "inside the function"),
    (optional_packages, "ops/attention", "try:\n    import xformers\nexcept ImportError: ...", "inside the function"),
    (optional_packages, "ops/attention", "from vidistill.ops.triton_attention import kernel", "inside the function"),
    (optional_packages, "dit", "def f():\n    import triton", "imported only in ops/*"),
    (optional_packages, "trainer", "from omegaconf import OmegaConf", "only in config.py"),
    (optional_packages, "sources/folder", "def f():\n    import vizdoom", "imported only in sources/doom*"),
    (optional_packages, "cli", "def f():\n    import uvicorn", "imported only in serve/*"),
    (optional_packages, "metrics", "import pandas", "not a declared dependency"),
    (network, "zoo/__init__", "from urllib.request import urlopen", "reaches the network"),
    (network, "data", "def f():\n    from huggingface_hub import hf_hub_download", "reaches the network"),
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
    (machine_paths, "data", "# see " + "/ho" + "me/me/notes", "a path of one machine"),
]

SOUND = [
    (arrows, "teachers/wan", "from vidistill.interop import wan"),
    (arrows, "teachers/ltx", "from . import Teacher\nfrom .wan import load\nfrom ..dit import VideoDiT"),
    (arrows, "bench", "from vidistill import __version__\nfrom vidistill.stream import StreamSession"),
    (arrows, "cli", "def f():\n    from vidistill.serve import app"),
    (optional_packages, "teachers/wan", "def f():\n    from diffusers import WanTransformer3DModel"),
    (optional_packages, "codecs/wan", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
    (optional_packages, "ops/triton_attention", "import triton\nimport triton.language as tl"),
    (optional_packages, "ops/attention", "def f():\n    from vidistill.ops.triton_attention import kernel"),
    (optional_packages, "sources/doom_play", "def f():\n    import vizdoom"),
    (optional_packages, "config", "from omegaconf import OmegaConf"),
    (network, "teachers/wan", "def f():\n    from huggingface_hub import snapshot_download"),
    (network, "data", "from urllib.parse import quote"),
    (sizes, "dit", "def forward(self):\n" + "    x = 1\n" * 39),
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
