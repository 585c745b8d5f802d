"""`vidistill info`."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from vidistill.cli.options import JSON, Arguments, add_command

ARGUMENTS: Arguments = {
    "name": {"nargs": "?", "help": "a bundled name or a path; default: list the zoo"},
    **JSON,
}


def add_info(commands: Any) -> None:
    about = {
        "help": "what is bundled, and what a checkpoint is",
        "description": "The zoo, or one checkpoint in detail.",
    }
    add_command(commands, "info", run_info, ARGUMENTS, **about)


def run_info(args: argparse.Namespace) -> None:
    from vidistill import checkpoint
    from vidistill.bench import cost

    if args.name in cost.NETWORKS:
        found: Any = cost.named_cost(args.name)
        lines = [*cost.report(found)]
    elif args.name:
        found = checkpoint.summary(args.name)
        lines = [summary(args.name, found), *details(found)]
    else:
        found = {name: checkpoint.summary(name) for name in sorted(checkpoint.zoo_names())}
        lines = [summary(*item) for item in found.items()]
    print("\n".join([*lines, json.dumps(found)] if args.json else lines))


def summary(name: str, row: dict[str, Any]) -> str:
    """A checkpoint in one line."""
    nfe = f"  evaluations a chunk {row['nfe_per_chunk']}" if "nfe_per_chunk" in row else ""
    alias = f"  (another name of {row['alias_of']})" if "alias_of" in row else ""
    return f"{name:20s} {row['kind']:8s} {row['parameters'] / 1e6:6.2f}M  {row['bytes'] / 1e6:6.2f} MB{nfe}{alias}"


def details(row: dict[str, Any]) -> Iterator[str]:
    """What else is known of one checkpoint."""
    if row["actions"]:
        yield f"actions {', '.join(row['actions'])}; {row['world']['fps']:g} frames a second"
    if memory := row.get("memory"):
        yield (
            f"memory {memory['policy']}: {memory['frames']} frames in {memory['tokens']} tokens, "
            f"{memory['bytes'] / 1e6:.2f} MB; "
            f"{memory['token_share']:.0%} of {memory['uncompressed_tokens']} plain tokens"
        )
