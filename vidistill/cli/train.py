"""`vidistill train` and `vidistill diagnose`."""

import argparse
import json
from pathlib import Path
from typing import Any

from vidistill.cli.options import Arguments, add_command, positive_float, positive_int

TRAIN: Arguments = {
    "config": {"help": "YAML of the stage"},
    "overrides": {"nargs": "*", "metavar": "key=value", "help": "dotted overrides, e.g. optim.lr=1e-4"},
    "--dry-run": {
        "action": "store_true",
        "help": "run the stage once on tiny random networks, say what it would take",
    },
    "--gpus": {
        "type": positive_int,
        "metavar": "N",
        "help": "with --dry-run: plan the memory of N GPUs, and refuse what they cannot hold",
    },
    "--gpu-memory": {"type": positive_float, "metavar": "GB", "help": "with --gpus: of each of them (default: 80)"},
}
DIAGNOSE: Arguments = {
    "folder": {"type": Path, "metavar": "RUN", "help": "folder of a run, such as runs/talker"},
    "-o --out": {"type": Path, "help": "picture (default: RUN/diagnosis.png)"},
}


def add_train(commands: Any) -> None:
    about = {
        "help": "run a training stage",
        "description": "Run the training stage of a YAML to its end. The same command resumes it after a stop.",
        "epilog": "example: vidistill train configs/doom/teacher.yaml steps=2000 optim.lr=3e-4; several processes "
        "share a batch: torchrun --nproc-per-node 8 -m vidistill train stage.yaml parallel=shard",
    }
    add_command(commands, "train", run_train, TRAIN, **about)


def run_train(args: argparse.Namespace) -> None:
    from vidistill import distributed
    from vidistill.config import load_config
    from vidistill.io import check_folder
    from vidistill.training.config import TrainConfig
    from vidistill.training.trainer import train

    if (args.gpus and not args.dry_run) or (args.gpu_memory and not args.gpus):
        raise ValueError("--gpus and --gpu-memory plan a stage: add --dry-run and --gpus, or leave them out")
    cfg = load_config(TrainConfig, args.config, args.overrides)
    if args.dry_run:
        from vidistill.bench import dry_run

        row = dry_run.rehearse(cfg, args.gpus or 0, args.gpu_memory or 80.0)
        print(dry_run.report(row), json.dumps(row), sep="\n")
        return
    check_folder(Path(cfg.out) / cfg.name, "out")
    with distributed.group():
        path = train(cfg)
        if distributed.rank() == 0:
            print(path)


def add_diagnose(commands: Any) -> None:
    about = {
        "help": "draw where distillation helped and where it hurt",
        "description": "Draw the gradient of distillation of a run that was trained with validation.diagnose_every.",
    }
    add_command(commands, "diagnose", run_diagnose, DIAGNOSE, **about)


def run_diagnose(args: argparse.Namespace) -> None:
    from vidistill.evaluation import report
    from vidistill.io import check_output
    from vidistill.training.trackers import read_rows
    from vidistill.training.trainer import METRICS

    path = args.folder / METRICS
    rows = [row for row in read_rows(path) if "diagnosis" in row]
    if not rows:
        raise ValueError(
            f"{path} holds no diagnosis; train with validation.data=LATENTS validation.diagnose_every=STEPS"
        )
    out = args.out or args.folder / "diagnosis.png"
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out} is no picture: let its name end in .png")
    check_output(out, [path])
    report.draw_diagnosis(rows, out)
    last = rows[-1]["diagnosis"]
    for level, cosines in zip(last["levels"], last["cosine"], strict=True):
        print(f"step {rows[-1]['step']}  level {level:.2f}  cosine " + " ".join(f"{c:+.2f}" for c in cosines))
    print(out)
