"""Does vidistill compute what the originals computed? Reads a golden folder, runs the same case, compares.

    python scripts/parity.py DIR [DIR ...] [--tolerance 1e-4] [--quiet]

One line an output; the last line of each folder is a JSON object {"case", "max_abs", "ok", "declined"}. An output is
`ok`, `differs`, or `declined`: a defect of the original that we refuse to reproduce (vidistill/interop/README.md).
Exits with 1 if anything differs, 2 if a folder cannot be read.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

TOLERANCE = 1e-4


class Golden:
    """One folder: what was given, what the original made of it, and the comparison with ours."""

    def __init__(self, folder: Path, tolerance: float | None = None, device: str = "cpu") -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.io = load_file(folder / "io.safetensors", device)
        weights = folder / "weights.safetensors"
        self.weights = load_file(weights, device) if weights.exists() else {}
        self.tolerance = tolerance or float(self.config.get("tolerance", self.config.get("atol", TOLERANCE)))
        self.results: dict[str, tuple[str, float, str]] = {}  # output -> outcome, max abs, reason

    def given(self, name: str) -> Tensor:
        return self.io[f"in.{name}"]

    def wanted(self, prefix: str = "") -> list[str]:
        """Names of recorded outputs that start with `prefix`, without the leading `out.`."""
        names = [key.removeprefix("out.") for key in self.io if not key.startswith("in.")]
        return sorted(name for name in names if name.startswith(prefix))

    def want(self, name: str) -> Tensor:
        return self.io.get(f"out.{name}", self.io.get(name))

    def draws(self, prefix: str) -> "Draws":
        """Recorded Gaussians `prefix.0`, `prefix.1`, ..., handed out in order."""
        found, i = [], 0
        while (key := f"in.{prefix}.{i}") in self.io:
            found.append(self.io[key])
            i += 1
        return Draws(found)

    def compare(self, name: str, ours: Tensor | float | list) -> None:
        """Record how far `ours` is from the recorded output; outputs that were not recorded are skipped."""
        want = self.want(name)
        if want is None:
            return
        got = torch.as_tensor(ours)
        if got.shape != want.shape:
            self.results[name] = ("differs", math.inf, f"shape {list(got.shape)} != {list(want.shape)}")
            return
        worst = float((got.detach().cpu().double() - want.cpu().double()).abs().max()) if got.numel() else 0.0
        good = worst <= self.tolerance  # False for nan
        self.results[name] = ("ok" if good else "differs", worst, "")

    def decline(self, name: str, reason: str) -> None:
        if self.want(name) is not None and name not in self.results:
            self.results[name] = ("declined", 0.0, reason)

    @contextlib.contextmanager
    def guarded(self, prefix: str) -> Iterator[None]:
        """An error in here is a difference of those outputs `prefix*` that nothing was compared with yet."""
        try:
            yield
        except Exception as error:
            for name in self.wanted(prefix):
                self.results.setdefault(name, ("differs", math.inf, f"{type(error).__name__}: {error}"))

    def each_variant(self, run: Callable[["Golden", str, dict[str, Any]], None]) -> None:
        """Run every variant; one that fails does not hide the others."""
        for name, variant in self.config["variants"].items():
            with self.guarded(f"{name}."):
                run(self, name, variant)

    def finish(self) -> None:
        """Every recorded output that nothing was compared with counts as different."""
        for name in self.wanted():
            self.results.setdefault(name, ("differs", math.inf, "not computed"))


class Draws:
    """Recorded noise in place of a generator: each call returns the next tensor, in the shape it is asked for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.used = tensors, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.used += 1
        return self.tensors[self.used - 1].reshape(x.shape).to(x.dtype)


def cases() -> dict[str, Callable[[Golden], None]]:
    import golden_losses
    import golden_networks
    import golden_rollouts
    import golden_tables

    return {
        "bidirectional": golden_networks.bidirectional,
        "causal_train_mask": golden_networks.train_mask,
        "rollout": golden_rollouts.rollout_case,
        "diagonal_rollout": golden_rollouts.rollout_case,
        "longlive_rollout": golden_rollouts.rollout_case,
        "livetalk": golden_rollouts.livetalk,
        "training_rollout": golden_losses.training_rollout,
        "dmd": golden_losses.distribution_matching,
        "losses": golden_losses.losses,
        "scheduler": golden_tables.scheduler,
        "wan_vae": golden_tables.wan_vae,
    }


def check(folder: Path, tolerance: float | None = None, device: str = "cpu") -> Golden:
    """Run the case of `folder` on a device; ValueError for a case nobody knows or a folder that records nothing."""
    golden = Golden(folder, tolerance, device)
    known = cases()
    case = golden.config["case"]
    if case not in known:
        raise ValueError(f"{folder}: config.json says case {case!r}; known cases are {sorted(known)}")
    if not golden.wanted():
        raise ValueError(f"{folder}: io.safetensors records no output (`out.*`), so there is nothing to compare")
    with golden.guarded(""):
        known[case](golden)
    golden.finish()
    return golden


def summary(golden: Golden) -> dict[str, Any]:
    """The last line; `max_abs` is null where an output has another shape, is not a number or could not be computed."""
    outcomes = golden.results
    compared = [worst for outcome, worst, _ in outcomes.values() if outcome != "declined"]
    return {
        "case": golden.folder.resolve().name,
        "max_abs": max(compared, default=0.0) if all(map(math.isfinite, compared)) else None,
        "ok": all(outcome != "differs" for outcome, _, _ in outcomes.values()),
        "declined": sorted(name for name, (outcome, _, _) in outcomes.items() if outcome == "declined"),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--tolerance", type=float, default=None)
    parser.add_argument("--quiet", action="store_true", help="only lines that are not ok, and the JSON line")
    args = parser.parse_args(argv)
    code = 0
    for folder in args.folders:
        try:
            golden = check(folder, args.tolerance)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            print(f"cannot check {folder}: {type(error).__name__}: {error}", file=sys.stderr)
            print(
                json.dumps(
                    {"case": folder.resolve().name, "max_abs": None, "ok": False, "declined": [], "error": str(error)}
                )
            )
            code = max(code, 2)
            continue
        for name, (outcome, worst, reason) in sorted(golden.results.items()):
            if not args.quiet or outcome != "ok":
                print(f"{outcome:9} {worst:9.2e}  {name}{'  ' + reason if reason else ''}")
        result = summary(golden)
        print(json.dumps(result), flush=True)
        code = max(code, 0 if result["ok"] else 1)
    return code


if __name__ == "__main__":
    sys.exit(main())
