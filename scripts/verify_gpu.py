"""Checks on one or more GPUs what machines without one cannot, and writes all that was found as one JSON file.

    bash scripts/verify_gpu.sh [--out verify_gpu.json] [--only SECTION ...]

Sections: goldens (recorded outputs of the originals, on the device), kernels (Triton against the plain references),
attention (every backend and mask against the reference), memory (bytes of a step, planned and measured), step (one step
of training at the true size of Wan2.1 1.3B, random weights), bench (its stream). On a CPU the same keys are written,
null where nothing can be measured there. Exit code 1 if something that ran was wrong.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
GOLDENS = Path(__file__).resolve().parents[1] / "tests" / "goldens"
NETWORK, FRAMES, LAYERS = "wan-1.3b", 21, 2  # LAYERS: of the networks whose planned bytes are measured
BENCH = ["dim=1536", "layers=30", "heads=12", "ffn=8960", "text=512x4096", "latent=16x60x104", "chunks=7", "rounds=3"]
OBJECTIVES = ("flow", "dmd")
TAKEN = ("planned_bytes", "measured_bytes", "ratio", "seconds")
ATOL, RTOL = 2e-2, 2e-2  # of attention in bfloat16

Row = dict[str, Any]


def machine(device: str) -> Row:
    gpus = range(torch.cuda.device_count()) if device == "cuda" else ()
    found = [torch.cuda.get_device_properties(i) for i in gpus]
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "gpus": [{"name": p.name, "bytes": p.total_memory, "capability": [p.major, p.minor]} for p in found],
    }


def goldens(device: str) -> Row:
    """Every recorded case: largest difference, and whether it is within its tolerance."""
    import parity

    torch.backends.cudnn.allow_tf32 = False  # recorded in full float32
    found = {}
    for folder in sorted(p.parent for p in GOLDENS.glob("*/io.safetensors")):
        with torch.device(device):
            found[folder.name] = parity.summary(parity.check(folder, device=device))
    return found


def kernels(device: str) -> Row:
    """Every kernel: whether all its cases agree with the reference; in Triton's interpreter on a CPU."""
    import verify_kernels

    return {name: {"ok": ok} for name, ok in verify_kernels.parity(device).items()}


def attention(device: str) -> Row:
    """Every backend under every mask: the largest error against the reference; null where it does not run here."""
    from vidistill.ops.attention import BACKENDS, choose, reference, resolve
    from vidistill.ops.masks import FrameMask

    tokens, frames = (128, 6) if device == "cuda" else (16, 6)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, frames * tokens, 4, 64, generator=rng).to(device, dtype) for _ in range(3))
    seen = torch.tensor([[j // 3 <= i // 3 for j in range(frames)] for i in range(frames)], device=device)
    found: Row = {"chosen": {mask: choose("auto", device, mask)[0] for mask in ("none", "frames")}}
    for kind, mask in (("none", None), ("frames", FrameMask(seen, tokens))):
        wanted = reference(q.float(), k.float(), v.float(), mask)
        for name, backend in BACKENDS.items():
            try:
                resolve(name, device, kind)
                error = float((backend(q, k, v, mask).float() - wanted).abs().max())
            except (ValueError, NotImplementedError) as refused:
                found[f"{name}/{kind}"] = {"error": None, "why": str(refused)}
                continue
            found[f"{name}/{kind}"] = {"error": error, "ok": error <= ATOL + RTOL * float(wanted.abs().max())}
    return found


def stage(root: Path, objective: str, layers: int) -> Any:
    """A stage at the width and length of NETWORK, on random clips, from random weights."""
    from vidistill import checkpoint
    from vidistill.bench.cost import DEFAULT_SIZE, NETWORKS
    from vidistill.data.shards import write_shards
    from vidistill.models.dit import VideoDiT
    from vidistill.training.config import TrainConfig

    dit = replace(NETWORKS[NETWORK], layers=layers, checkpoint=True)
    data, teacher = root / "clips", root / "teacher"
    if not data.is_dir():
        latents = torch.randn(1, FRAMES, dit.channels, *DEFAULT_SIZE).half()
        tokens = torch.randn(1, 512, dit.text_dim).half()
        shard = {"latents": latents, "images": latents.clone(), "tokens": tokens}
        write_shards(data, [(shard, [{"seed": 0}])], {"fps": 16.0, "actions": [], "given": 0})
    settings: Row = {"batch": 1, "frames": FRAMES, "dit": dit, "precision": "bf16", "ema": 0.99}
    if objective == "dmd":
        if not teacher.with_suffix(".safetensors").is_file():
            shape = {"frames": FRAMES, "channels": dit.channels, "height": DEFAULT_SIZE[0], "width": DEFAULT_SIZE[1]}
            record = {"noise": {"shift": 5.0}, "shape": shape, "codec": None, "card": {}}
            checkpoint.export(teacher, VideoDiT(dit), record, torch.bfloat16)
        settings |= {"teacher": str(teacher), "teacher_precision": "bf16", "critic_steps": 1}
    return TrainConfig(f"{objective}-{layers}", objective, str(data), out=str(root / "runs"), **settings)


def taken(cfg: Any, device: str, memory: float) -> Row:
    """Bytes and seconds of a step of each role, beside the plan; measured where a GPU of `memory` GB can hold it."""
    from vidistill.bench import plan
    from vidistill.training.trainer import Trainer

    roles = plan.roles_of(cfg)
    planned = plan.Planner(roles, plan.latent_size(cfg, roles["student"].dit) or (0, 0)).plan(cfg, 1, memory or 80)
    row: Row = {**dict.fromkeys(TAKEN), "planned_bytes": planned["peak_bytes"]}
    if device != "cuda" or not planned["fits"]:
        return row
    trainer = Trainer(cfg)
    trainer.step(), trainer.step()  # one of each role
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.perf_counter()
    trainer.step(), trainer.step()
    torch.cuda.synchronize()
    row["seconds"] = (time.perf_counter() - began) / 2
    row["measured_bytes"] = torch.cuda.max_memory_allocated()
    row["ratio"] = row["measured_bytes"] / row["planned_bytes"]
    row["ok"] = row["ratio"] <= 1.1  # a plan that is too small ends a run
    return row


def stages(device: str, layers: int) -> Row:
    gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if device == "cuda" else 0.0
    found = {}
    for objective in OBJECTIVES:
        with tempfile.TemporaryDirectory() as root:
            found[objective] = taken(stage(Path(root), objective, layers), device, gb)
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def memory(device: str) -> Row:
    """Bytes of a step, planned and measured, of networks of a few blocks."""
    return stages(device, LAYERS)


def step(device: str) -> Row:
    """Bytes and seconds of a step at the true size, on one GPU; null on a CPU."""
    from vidistill.bench.cost import NETWORKS

    if device != "cuda":
        return {objective: dict.fromkeys(TAKEN) for objective in OBJECTIVES}
    return stages(device, NETWORKS[NETWORK].layers)


def bench(device: str) -> Row:
    """Frames a second and latency of NETWORK's stream, random weights in bfloat16; null on a CPU."""
    keys = ("fps", "chunk_ms_p50", "chunk_ms_p95", "memory_bytes")
    if device != "cuda":
        return dict.fromkeys(keys)
    from vidistill.bench.random_weights import random_bench
    from vidistill.streaming.runtime import SpeedConfig

    found = json.loads(random_bench(BENCH, speed=SpeedConfig(device="cuda", precision="bf16")).to_json())
    return {key: found.get("student", found).get(key) for key in keys}


SECTIONS: dict[str, Callable[[str], Row]] = {
    "machine": machine,
    "goldens": goldens,
    "kernels": kernels,
    "attention": attention,
    "memory": memory,
    "step": step,
    "bench": bench,
}


def wrong(found: Any) -> bool:
    """Whether something in what was found says that it is not ok."""
    if not isinstance(found, dict):
        return False
    return found.get("ok") is False or any(map(wrong, found.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("verify_gpu.json"), help="the file to write")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "kernels" in args.only and os.environ.get("TRITON_INTERPRET") != "1":
        print("no GPU: Triton's kernels are not checked; set TRITON_INTERPRET=1 to check them in its interpreter")
        args.only.remove("kernels")
    results: Row = dict.fromkeys(SECTIONS)
    for name in args.only:
        print(f"{name} ...", flush=True)
        try:
            results[name] = SECTIONS[name](device)
        except Exception as error:  # the other sections still count
            results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    args.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
    bad = [name for name in args.only if wrong(results[name])]
    print(f"{args.out}: {', '.join(args.only)}; " + (f"WRONG: {', '.join(bad)}" if bad else "all that ran is right"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
