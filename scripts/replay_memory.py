"""Peak memory of a student update on rollouts of several lengths: replayed chunk by chunk, and through the whole graph.

    python scripts/replay_memory.py configs/doom/relic.yaml --frames 22 40 79 --set dit.checkpoint=true

Every row runs in a process of its own: random weights of the stage's size, random data, one rollout and its backward
pass for a random gradient on all frames (the scores are left out). Prints the peak resident memory beside that of the
process before the rollout, and one JSON object last.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import replace

import torch

from vidistill.conditioning.condition import MOVE_SITE, POSE_SITE, Condition
from vidistill.config import load_config
from vidistill.data.types import Batch
from vidistill.diffusion import LatentShape
from vidistill.models.dit import VideoDiT
from vidistill.models.student import CausalStudent
from vidistill.ops.precision import fast_float32
from vidistill.training.config import TrainConfig
from vidistill.training.on_policy import LongRollout, replayed_backward

KIB = 1024  # ru_maxrss is in KiB on Linux


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def measure(cfg: TrainConfig, frames: int, replayed: bool) -> dict[str, int]:
    """Bytes at the peak of a rollout and its backward pass, and before."""
    fast_float32()
    dit = cfg.dit
    size = (dit.grid[0] * dit.patch[1], dit.grid[1] * dit.patch[2])
    memory = cfg.student.memory
    if memory.policy == "full":
        memory = replace(memory, frames=frames)
    student = CausalStudent(
        VideoDiT(dit), replace(cfg.student, memory=memory), LatentShape(frames, dit.channels, *size, dit.patch)
    )
    b, rng = cfg.batch, torch.Generator().manual_seed(cfg.seed)
    sites = {n: 0.1 * torch.randn(b, frames, s.dim, generator=rng) for n, s in dit.sites.items()}
    assert cfg.camera is None or {MOVE_SITE, POSE_SITE} <= set(sites)
    batch = Batch(torch.randn(b, frames, dit.channels, *size, generator=rng), Condition(per_frame=sites), given=1)
    before = peak_bytes()
    sample = LongRollout(student, cfg.schedule)(batch, rng, grad=not replayed, restart=True, record=replayed)
    grad = torch.randn(sample.x0.shape, generator=rng)
    if replayed:
        replayed_backward(student, sample, grad)
    else:
        sample.x0.backward(grad)
    return {"before_bytes": before, "peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--frames", type=int, nargs="+", default=[22, 40, 79], help="latents of the rollouts")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to replace")
    parser.add_argument("--ways", nargs="+", default=["replayed", "whole"], choices=("replayed", "whole"))
    parser.add_argument("--one", choices=("replayed", "whole"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        cfg = load_config(TrainConfig, args.config, args.set)
        print(json.dumps(measure(cfg, args.frames[0], args.one == "replayed")))
        return
    result: dict[str, dict[int, dict[str, int]]] = {}
    for way in args.ways:
        for frames in args.frames:
            command = [sys.executable, __file__, args.config, "--frames", str(frames), "--one", way, "--set", *args.set]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
            row = result.setdefault(way, {})[frames] = json.loads(out.splitlines()[-1])
            first = result[way][args.frames[0]]["peak_bytes"]
            print(
                f"{way:8s} {frames:4d} latents: {row['peak_bytes'] / 1e6:7.0f} MB, {row['before_bytes'] / 1e6:5.0f} MB "
                f"before; {row['peak_bytes'] / first:.2f} x that of {args.frames[0]}"
            )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
