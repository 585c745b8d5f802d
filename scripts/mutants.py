"""Would a test fail if one line were wrong? Changes one line at a time and runs the tests that reach it.

    python scripts/mutants.py                      the named mutants and 200 drawn ones, results in out/mutants.json
    python scripts/mutants.py --room memory        those of one room; --count, --seed: how many, and which draw
    python scripts/mutants.py --list               print them and run nothing
    python scripts/mutants.py --workers 2          two at a time

Mutants are drawn by rule from ROOMS: operators, comparisons, constants, conditions, statements left out, arguments
swapped, bounds off by one. What text a person reads, types and defaults of settings are left alone. First every test
file of a room runs once, unchanged, and notes which functions each test calls; a mutant then gets the tests that call
its function, file by file, quick ones first, until one fails. A test that also fails by itself without the mutant kills
nothing. Work happens in a private copy of the tree; an interrupted run goes on where it stopped, and survivors are
tried again.
Exits with 1 if a mutant survives that EQUIVALENT does not explain.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutation_rules import EQUIVALENT, NAMED, Site, sites

ROOT = Path(__file__).resolve().parent.parent
CORE = ("tests/core/test_rollout.py", "tests/core/test_schedules.py", "tests/core/test_sampling.py")
TRAINING = (
    "tests/training/test_consumers.py",
    "tests/training/test_trainer.py",
    "tests/training/test_relic_training.py",
    "tests/training/test_long_switches.py",
)
WIRED = ("tests/models/test_wiring.py", "tests/models/test_student.py")
HEARD = ("tests/training/test_talker_training.py", "tests/streaming/test_session.py")
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # files of the package, and files of tests
    "schedules": (("schedules.py", "diffusion.py"), (*CORE, "tests/core/test_diffusion.py")),
    "rollout": (
        ("rollout.py", "sampling.py"),
        (*CORE, "tests/core/test_api.py", "tests/streaming/test_prompt_switch.py"),
    ),
    "memory": (("memory/*.py",), ("tests/memory/*.py", *WIRED, *CORE)),
    "conditioning": (
        ("conditioning/*.py",),
        ("tests/conditioning/*.py", *WIRED, "tests/models/test_view.py", *HEARD),
    ),
    "losses": (
        ("training/losses.py", "training/motion.py", "training/on_policy.py"),
        ("tests/training/test_losses.py", *TRAINING, HEARD[0]),
    ),
    "trainer": (
        ("training/trainer.py", "training/optim.py", "training/validation.py", "training/config.py"),
        (
            *TRAINING,
            "tests/training/test_trackers.py",
            HEARD[0],
            "tests/training/test_run_folder.py",
            "tests/core/test_config.py",
        ),
    ),
    "evaluation": (  # the report is drawn for people
        ("evaluation/[!r]*.py", "evaluation/rooms.py", "evaluation/recall.py", "metrics.py"),
        ("tests/core/test_metrics.py", "tests/evaluation/test_[!c]*.py"),
    ),
}
NOT_RUN = "not gpu and not slow and not weights"
LINKED = 100_000  # bytes; larger files are linked into a copy of the tree
FIRST = 5.0  # seconds of the tests that are tried first
WALL = 900.0  # seconds for one process of tests, however busy the machine is


# --- running tests in a process of their own ------------------------------------------------------------------------


class Calls:
    """A pytest plugin that notes how long tests take, and which functions of the package each of them calls."""

    def __init__(self, tree: Path) -> None:
        self.prefix = f"{tree}/"
        self.tests: dict[str, dict[str, Any]] = {}
        self.shared: set[Any] = set()  # called by fixtures: any test of the file may depend on it

    @contextlib.contextmanager
    def noted(self, seen: set[Any]) -> Iterator[None]:
        def note(frame: Any, event: str, arg: Any) -> None:
            if event == "call":
                seen.add(frame.f_code)

        threading.setprofile(note)
        sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: Any) -> Any:
        with self.noted(self.shared):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        seen: set[Any] = set()
        began = time.process_time()
        with self.noted(seen):
            result = yield
        self.tests[item.nodeid] = {"seconds": round(time.process_time() - began, 3), "calls": seen}
        return result

    def found(self) -> dict[str, dict[str, Any]]:
        for test in self.tests.values():
            codes = test["calls"] | self.shared
            inside = (c for c in codes if c.co_filename.startswith(self.prefix + "vidistill/"))
            test["calls"] = sorted({f"{c.co_filename.removeprefix(self.prefix)}:{c.co_qualname}" for c in inside})
        return self.tests


class Chosen:
    """A pytest plugin that keeps the tests of a list, in its order, and says which one failed."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.order = {name: i for i, name in enumerate(ids)}
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def in_child(tree: Path, work: Callable[[], Any], cpu: float) -> Any:
    """What `work` returns in a process of its own in `tree`, as JSON; None if it runs out of time or dies."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os.setsid()
                out = os.open(os.devnull, os.O_WRONLY)
                os.dup2(out, 1)
                os.dup2(out, 2)
                resource.setrlimit(resource.RLIMIT_CPU, (int(cpu), int(cpu)))
                os.chdir(tree)
                os.environ |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
                sys.path.insert(0, str(tree))
                before = set(sys.modules)
                found = work()
                new = [name for name in set(sys.modules) - before if is_foreign(sys.modules[name], tree)]
                answer.write_text(json.dumps({"found": found, "modules": new}), encoding="utf-8")
            os._exit(0)
        deadline = time.monotonic() + WALL
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what the tests have started
        if not answer.exists():
            return None
        told = json.loads(answer.read_text(encoding="utf-8"))
        for name in told["modules"]:  # so that the next process need not import them again
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return told["found"]


def is_foreign(module: Any, tree: Path) -> bool:
    """Whether a module comes from another package than the one that is changed, or its tests."""
    return bool(file := getattr(module, "__file__", None)) and not file.startswith(f"{tree}/")


def pytest_in(files: Sequence[str], plugin: Any, *options: str) -> None:
    more = ("-p", "no:cacheprovider", "-p", "no:xdist", "-m", NOT_RUN, "--timeout", "600", *options)
    pytest.main([*more, *files], plugins=[plugin])


def copy_tree(folder: Path) -> None:
    """A private copy of what git tracks or does not ignore; large files are linked."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, folder / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.stat().st_size > LINKED:
            target.symlink_to(source)
        else:
            shutil.copyfile(source, target)


@contextlib.contextmanager
def changed(path: Path, content: bytes, stamp: int) -> Iterator[None]:
    """`path` with another content, and a time of its own: compiled files are told apart by time and size alone."""
    link = path.readlink() if path.is_symlink() else None
    before = path.read_bytes() if link is None else b""
    path.unlink()
    path.write_bytes(content)
    os.utime(path, (stamp, stamp))
    try:
        yield
    finally:
        path.unlink()
        if link is not None:
            path.symlink_to(link)
        else:
            path.write_bytes(before)


# --- mutants ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One change of one file. `scope`: the function that is changed, as `Calls` writes it; "" outside of functions."""

    key: str
    room: str
    file: str
    content: bytes = field(repr=False)
    around: str = field(repr=False)  # source that a result holds for
    scope: str = ""
    tests: tuple[str, ...] = ()


def rank(seed: int, key: str) -> str:
    """Where a key stands in the order of a seed, whatever other keys there are."""
    return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def files_of(room: str) -> list[Path]:
    return sorted({p for pattern in ROOMS[room][0] for p in (ROOT / "vidistill").glob(pattern)})


def drawn_in(room: str, seed: int) -> Iterator[Mutant]:
    """All mutants of a room: the kinds take turns, each in the order of the seed."""
    kinds: dict[str, list[tuple[str, Site, Path]]] = {}
    for path in files_of(room):
        name = str(path.relative_to(ROOT))
        for site in sites(path.read_text(encoding="utf-8")):
            key = f"{name}:{site.scope}: {site.before} -> {site.after}"
            kinds.setdefault(site.kind, []).append((key, site, path))
    for found in kinds.values():
        found.sort(key=lambda item: rank(seed, item[0]), reverse=True)
    while kinds:
        for kind in sorted(kinds):
            key, site, path = kinds[kind].pop()
            if not kinds[kind]:
                del kinds[kind]
            name = str(path.relative_to(ROOT))
            scope = f"{name}:{site.scope}" if site.scope else ""
            yield Mutant(
                key,
                room,
                name,
                site.apply(path.read_text(encoding="utf-8")).encode(),
                site.around,
                scope,
                ROOMS[room][1],
            )


def draw(count: int, seed: int, rooms: Sequence[str]) -> list[Mutant]:
    """`count` mutants, the rooms taking turns; a line with the same text twice counts once."""
    queues, found = [drawn_in(room, seed) for room in rooms], dict[str, Mutant]()
    while queues and len(found) < count:
        for queue in list(queues):
            mutant = next((m for m in queue if m.key not in found), None)
            if mutant is None:
                queues.remove(queue)
            elif len(found) < count:
                found[mutant.key] = mutant
    return list(found.values())


def named() -> Iterator[Mutant]:
    for one in NAMED:
        path = ROOT / one.file
        if one.like:
            content, text = (ROOT / one.like).read_bytes(), one.like
        else:
            text = path.read_text(encoding="utf-8")
            if text.count(one.old) != 1:
                raise SystemExit(
                    f"{one.name}: {one.old!r} stands {text.count(one.old)} times in {one.file}; once is meant"
                )
            content = text.replace(one.old, one.new).encode()
        yield Mutant(f"{one.file}: {one.name}", "named", one.file, content, text, "", one.tests)


# --- judging ----------------------------------------------------------------------------------------------------------


def baseline(tree: Path, path: Path, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What every test of a file calls and how long it takes; a file that has not changed is not run again."""
    name, digest = str(path.relative_to(tree)), hashlib.sha256(path.read_bytes()).hexdigest()
    kept = results["files"]
    if kept.get(name, {}).get("sha256") != digest:

        def work() -> Any:
            calls = Calls(tree)
            pytest_in([name], calls)
            return calls.found()

        kept[name] = {"sha256": digest, "tests": in_child(tree, work, 1800) or {}}
        for test in [test for test in results["sound"] if test.startswith(f"{name}::")]:
            del results["sound"][test]
        print(f"unchanged, {len(kept[name]['tests'])} tests: {name}", flush=True)
    found: dict[str, dict[str, Any]] = kept[name]["tests"]
    return found


def chosen(mutant: Mutant, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tests that call what a mutant changes, quick ones first."""
    if mutant.room == "named":
        hit = list(known)
    else:
        hit = [name for name, test in known.items() if mutant.scope in test["calls"]]
        hit = hit or [n for n, t in known.items() if any(call.startswith(f"{mutant.file}:") for call in t["calls"])]
    return sorted(hit, key=lambda name: known[name]["seconds"])


class Judge:
    """Runs mutants in a copy of the tree that is its own."""

    def __init__(self, sound: dict[str, bool]) -> None:
        self.sound = sound
        self.tree = Path(tempfile.mkdtemp(prefix="mutants-"))
        copy_tree(self.tree)

    def close(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)

    def run(self, ids: Sequence[str], seconds: float) -> tuple[bool, str | None]:
        """(whether the tests ran to their end, the first that failed)."""

        def work() -> Any:
            plugin = Chosen(ids)
            pytest_in(list(dict.fromkeys(name.split("::")[0] for name in ids)), plugin, "-x")
            return {"failed": plugin.failed}

        answer = in_child(self.tree, work, 60 + 8 * seconds)
        return (False, None) if answer is None else (True, answer["failed"])

    def alone(self, test: str) -> bool:
        """Whether a test passes by itself, nothing changed."""
        if test not in self.sound:
            self.sound[test] = self.run([test], 60) == (True, None)
        return self.sound[test]

    def judge(self, mutant: Mutant, stamp: int, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """{"killed": by which test, or None}, and how many tests were tried."""
        ids, tried = chosen(mutant, known), 0
        while ids:
            total, few = 0.0, []
            while ids and (total < FIRST or tried):
                few.append(ids.pop(0))
                total += known[few[-1]]["seconds"]
            tried += len(few)
            with changed(self.tree / mutant.file, mutant.content, stamp):
                ended, failed = self.run(few, total)
            if not ended:
                return {"killed": "out of time", "tests": tried}
            if failed and ("::" not in failed or self.alone(failed)):
                return {"killed": failed, "tests": tried}
            if failed:  # it says nothing; go on behind it
                ids = few[few.index(failed) + 1 :] + ids
        return {"killed": None, "tests": tried}


def run(mutants: Sequence[Mutant], results: dict[str, Any], save: Callable[[], None], workers: int) -> None:
    """Judge the mutants that are not known to be killed."""
    judges: Queue[Judge] = Queue()
    makers = [Judge(results["sound"]) for _ in range(workers)]
    for judge in makers:
        judges.put(judge)
    lock = threading.Lock()

    def one(numbered: tuple[int, Mutant], known: Mapping[str, Any]) -> None:
        number, mutant = numbered
        judge, began = judges.get(), time.monotonic()
        try:
            found = judge.judge(mutant, number + 1, known)
        finally:
            judges.put(judge)
        with lock:
            before = results["mutants"].get(digest_of(mutant), {}).get("tests", 0) if mutant in tried else 0
            tried.append(mutant)
            found["tests"] += before
            results["mutants"][digest_of(mutant)] = {"key": mutant.key, "room": mutant.room, **found}
            save()
            word = "killed" if found["killed"] else "alive"
            print(f"{word} {time.monotonic() - began:.0f} s  {mutant.key}  [{found['killed']}]", flush=True)

    def alive(numbered: tuple[int, Mutant]) -> bool:
        return not results["mutants"].get(digest_of(numbered[1]), {}).get("killed")

    tried: list[Mutant] = []
    groups: dict[tuple[str, ...], list[tuple[int, Mutant]]] = {}
    for numbered in filter(alive, enumerate(mutants)):
        groups.setdefault(numbered[1].tests, []).append(numbered)
    tree = makers[0].tree
    try:
        for tests, group in groups.items():
            for path in dict.fromkeys(path for pattern in tests for path in sorted(tree.glob(pattern))):
                if left := [numbered for numbered in group if alive(numbered)]:  # those no file before has killed
                    known = baseline(tree, path, results)
                    with ThreadPoolExecutor(workers) as pool:
                        list(pool.map(partial(one, known=known), left))
    finally:
        for judge in makers:
            judge.close()


def digest_of(mutant: Mutant) -> str:
    return hashlib.sha256(f"{mutant.key}\n{mutant.around}".encode()).hexdigest()[:16]


def summary(mutants: Sequence[Mutant], results: Mapping[str, Any]) -> bool:
    """Print the counts and the survivors; whether all of them are explained."""
    found = [(m, results["mutants"].get(digest_of(m))) for m in mutants]
    survivors = [m for m, result in found if result and not result["killed"]]
    unknown = [m for m in survivors if m.key not in EQUIVALENT]
    for mutant in survivors:
        print(f"survived: {mutant.key}\n    {EQUIVALENT.get(mutant.key, 'NOT EXPLAINED')}")
    tried = sum(result is not None for _, result in found)
    killed, same = tried - len(survivors), len(survivors) - len(unknown)
    share = killed / max(1, tried - same)
    print(f"{tried} of {len(mutants)} tried: {killed} killed, {same} equivalent, {len(unknown)} survived: {share:.1%}")
    return not unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", choices=["named", *ROOMS], action="append", help="only these rooms")
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2))
    parser.add_argument("--out", type=Path, default=Path("out/mutants.json"))
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    args = parser.parse_args()
    rooms = args.room or ["named", *ROOMS]
    mutants = [*(named() if "named" in rooms else ()), *draw(args.count, args.seed, [r for r in rooms if r in ROOMS])]
    if args.list:
        print("\n".join(m.key for m in mutants))
        return 0
    results: dict[str, Any] = {"files": {}, "sound": {}, "mutants": {}}
    if args.out.is_file():
        results |= json.loads(args.out.read_text(encoding="utf-8"))

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1), encoding="utf-8")
        part.replace(args.out)

    run(mutants, results, save, args.workers)
    return int(not summary(mutants, results))


if __name__ == "__main__":
    sys.exit(main())
