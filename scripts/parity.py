"""Does vidistill compute what the originals computed? Reads a golden folder, runs the same case, compares.

    python scripts/parity.py DIR [DIR ...] [--tolerance 1e-4] [--quiet]

One line an output; the last line of each folder is a JSON object {"case", "max_abs", "ok", "declined"}. An output is
`ok`, `differs`, or `declined`: a defect of the original that we refuse to reproduce (vidistill/interop/README.md).
Exits with 1 if anything differs, 2 if a folder cannot be read.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden_losses
import golden_networks
import golden_rollouts
import golden_tables
from golden import Golden
from safetensors import SafetensorError

CASES: dict[str, Callable[[Golden], None]] = {
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
    case = golden.config["case"]
    if case not in CASES:
        raise ValueError(f"{folder}: config.json says case {case!r}; known cases are {sorted(CASES)}")
    if not golden.wanted():
        raise ValueError(f"{folder}: io.safetensors records no output (`out.*`), so there is nothing to compare")
    with golden.guarded(""):
        CASES[case](golden)
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
