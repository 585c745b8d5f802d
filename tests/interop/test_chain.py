"""The way of configs/wan/README.md in miniature: a downloaded folder, two stages, a video, a published student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import same
from safetensors.torch import load_file
from test_export import both
from test_hub import hub  # noqa: F401 (a fixture)
from tiny_wan import write_wan

from vidistill import checkpoint, cli
from vidistill.interop.hub import publish
from vidistill.io import read_video

pytest.importorskip("diffusers")
pytest.importorskip("huggingface_hub")

WAN = Path(__file__).parents[2] / "configs" / "wan"
DIT = [
    f"dit.{k}={v}" for k, v in {"width": 24, "layers": 2, "heads": 2, "ffn": 40, "text_dim": 20, "freq_dim": 16}.items()
]
KINDS = {  # stages, latent channels, pixels a side of a latent, frames, px frames a second
    "T2V": ("", 16, 8, 3, 16.0),
    "TI2V": ("-5b", 48, 16, 4, 24.0),
}


def run(*args):
    assert cli.main([str(arg) for arg in args]) == 0, args


def train(*args, processes=1):
    """`vidistill train` here, or under torchrun."""
    if processes == 1:
        run("train", *args)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "vidistill", "train", *map(str, args)], env=env, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]


def walk(kind, tmp_path, hub, monkeypatch, processes=1):  # noqa: F811
    """Every command of the page, on networks that take seconds."""
    ending, channels, side, frames, fps = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    folder = write_wan(tmp_path / "models" / "Wan", channels)
    Path("prompts.txt").write_text("a red fox runs\ntwo boats at night\n", encoding="utf-8")
    run(
        "data",
        "prompts",
        "data/p",
        "--file",
        "prompts.txt",
        "--text",
        folder,
        "--negative",
        "blurred",
        "--tokens",
        8,
        "--fps",
        fps,
    )
    sampler = ["--at-once", 1, "--steps", 48, "--guidance", 6, "--levels", "1,0.9375,0.8333333,0.625"]
    size = ["--frames", frames, "--size", f"{4 * side}x{6 * side}"]
    run("data", "trajectories", "data/t", "--teacher", folder, "--data", "data/p", "--clips", 2, *sampler, *size)
    small = [f"frames={frames}", "latent_size=[4,6]", f"student.memory.frames={frames}", f"codec={folder}", *DIT]
    small += ["batch=2", f"parallel={'shard' if processes > 1 else 'replicate'}"]
    train(WAN / f"ode{ending}.yaml", "data=data/t", f"init={folder}", "steps=2", *small, processes=processes)
    stage = f"wan-selfforcing{ending}"
    roles = [f"init=runs/wan-ode{ending}/wan-ode{ending}", f"teacher={folder}", f"critic_init={folder}", "data=data/p"]
    train(
        WAN / f"selfforcing{ending}.yaml",
        *roles,
        "steps=6",
        f"accumulate={2 // processes}",
        *small,
        processes=processes,
    )
    student = f"runs/{stage}/{stage}"
    run("generate", student, "-o", "fox.mp4", "--seconds", 0.5, "--prompt", "a red fox runs", "--scale", 1)
    assert read_video("fox.mp4")[1] == fps
    run("export", student, "--to", "self-forcing", "-o", "sf.pt")
    back = ["--size", f"{4 * side}x{6 * side}", "--heads", 2, "--allow-pickle", "--chunk", 3]
    run("convert", "sf.pt", "again", *back)
    assert same(load_file("again.safetensors"), load_file(f"{student}.safetensors"))
    run("export", student, "--to", "diffusers", "-o", "d")
    run("convert", "d", "same")
    assert both(Path("same")) == both(Path(student))
    publish(student, "lab/wan-student", licence="apache-2.0", endpoint=hub.address)
    Path("down").mkdir()
    for name, content in hub.files.items():
        (Path("down") / name).write_bytes(content)
    loaded = checkpoint.load_student(f"down/{stage}")
    assert loaded.record["world"]["fps"] == fps and str(tmp_path) not in json.dumps(loaded.record)
    assert all(torch.isfinite(p).all() for p in loaded.net.parameters())


def test_text_to_video_from_a_download_to_the_hub(tmp_path, hub, monkeypatch):  # noqa: F811
    walk("T2V", tmp_path, hub, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "processes"), [("TI2V", 1), ("T2V", 2), ("TI2V", 2)])
def test_other_networks_and_process_counts_go_the_same_way(tmp_path, hub, monkeypatch, kind, processes):  # noqa: F811
    walk(kind, tmp_path, hub, monkeypatch, processes)
