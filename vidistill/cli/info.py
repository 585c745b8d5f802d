"""`vidistill info`."""

import argparse
import json
from typing import Any


def add_info(commands: Any) -> argparse.ArgumentParser:
    p = commands.add_parser(
        "info", help="what is bundled, and what a checkpoint is", description="The zoo, or one checkpoint in detail."
    )
    p.add_argument("name", nargs="?", help="a bundled name or a path; default: list the zoo")
    p.add_argument("--json", action="store_true", help="one JSON object as the last line")
    p.set_defaults(run=run_info)
    return p


def run_info(args: argparse.Namespace) -> None:
    from vidistill import checkpoint
    from vidistill.bench import cost

    if args.name in cost.NETWORKS:
        row = cost.named_cost(args.name)
        print_cost(row)
        if args.json:
            print(json.dumps(row))
        return
    names = [args.name] if args.name else sorted(checkpoint.zoo_names())
    rows = {name: checkpoint.summary(name) for name in names}
    for name, row in rows.items():
        nfe = f"  evaluations a chunk {row['nfe_per_chunk']}" if "nfe_per_chunk" in row else ""
        alias = f"  (another name of {row['alias_of']})" if "alias_of" in row else ""
        print(f"{name:20s} {row['kind']:8s} {row['parameters'] / 1e6:6.2f}M  {row['bytes'] / 1e6:6.2f} MB{nfe}{alias}")
        if args.name and (actions := row["world"].get("actions")):
            print(f"actions {', '.join(actions)}; {row['world']['fps']:g} frames a second")
        if args.name and (memory := row.get("memory")):
            print(
                f"memory {memory['policy']}: {memory['frames']} frames in {memory['tokens']} tokens, "
                f"{memory['bytes'] / 1e6:.2f} MB; "
                f"{memory['token_share']:.0%} of {memory['uncompressed_tokens']} plain tokens"
            )
    if args.json:
        print(json.dumps(rows[args.name] if args.name else rows))


def print_cost(row: dict[str, Any]) -> None:
    """What a network costs at its true size, and the speeds of papers beside the prediction."""
    from vidistill.bench import cost

    print(
        f"{row['network']}: {row['parameters'] / 1e9:.2f} B parameters, {row['tokens_per_frame']} tokens a latent frame"
    )
    print(f"a pass {row['flops_per_pass'] / 1e12:.2f} TFLOP, a chunk {row['flops_per_chunk'] / 1e12:.2f} TFLOP")
    for name, size in row["kv_bytes"].items():
        print(f"memory {name:20s} {size / 1e9:7.2f} GB")
    for name, found in row["gpus"].items():
        gpu = f"{cost.GPUS[name].tflops:.0f} TFLOP/s, {cost.GPUS[name].gb_per_s:.0f} GB/s"
        print(f"{name:10s} {found['fps']:7.1f} frames/s at most, first chunk {found['first_chunk_ms']:6.0f} ms ({gpu})")
    print(row["left_out"])
    print("published speeds, measured / predicted:")
    for paper in cost.against_papers():
        said = f"{paper['published_fps']:6.1f} of {paper['predicted_fps']:6.1f} ({paper['ratio']:.2f})"
        latency = f", first chunk {paper['published_latency_s']:.2f} s of {paper['predicted_latency_s']:.3f} s"
        latency = f"{latency} ({paper['latency_ratio']:.1f})" if paper["published_latency_s"] else ""
        print(f"  {paper['system']:28s} {paper['gpu']:12s} {said}{latency}")
