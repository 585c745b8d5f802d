"""The way of configs/wan/README.md in miniature: a downloaded folder, two stages, a video, a published student."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from published import same
from safetensors.torch import load_file
from test_export import both
from test_hub import hub  # noqa: F401 (a fixture)
from tiny_audio import tiny_wav2vec2
from tiny_videos import moving, poses_of, write
from tiny_wan import transformer, write_wan

from vidistill import checkpoint, cli
from vidistill.interop.hub import publish
from vidistill.io import read_video, save_png

pytest.importorskip("diffusers")
pytest.importorskip("huggingface_hub")

WAN = Path(__file__).parents[2] / "configs" / "wan"
DIT = [
    f"dit.{k}={v}" for k, v in {"width": 24, "layers": 2, "heads": 2, "ffn": 40, "text_dim": 20, "freq_dim": 16}.items()
]
FRAMES, SIZE = 3, "32x48"  # latents of a clip, its pixels
SAMPLER = ["--at-once", 1, "--steps", 48, "--guidance", 6, "--levels", "1,0.9375,0.8333333,0.625"]


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


def prompts(folder, out, fps=16.0):
    Path("prompts.txt").write_text("a red fox runs\ntwo boats at night\n", encoding="utf-8")
    options = ["--text", folder, "--negative", "blurred", "--tokens", 8, "--fps", fps]
    run("data", "prompts", out, "--file", "prompts.txt", *options)


def small(folder, frames, processes, *more):
    """Settings that make a stage take seconds."""
    size = [f"frames={frames}", "latent_size=[4,6]", f"student.memory.frames={frames}", f"codec={folder}", *DIT]
    return [*size, "batch=2", f"parallel={'shard' if processes > 1 else 'replicate'}", *more]


def distilled(folder, ending, data, paths, settings, processes, expert=""):
    """The student that a causal initialisation on `paths` and Self Forcing on `data` make; `expert`: where it, and the
    critic, start, if the folder holds several networks."""
    one = folder / expert
    train(WAN / f"ode{ending}.yaml", f"data={paths}", f"init={one}", "steps=2", *settings, processes=processes)
    stage = f"wan-selfforcing{ending}"
    roles = [f"init=runs/wan-ode{ending}/wan-ode{ending}", f"teacher={folder}", f"critic_init={one}"]
    turns = [f"data={data}", "steps=6", f"accumulate={2 // processes}"]
    train(WAN / f"selfforcing{ending}.yaml", *roles, *turns, *settings, processes=processes)
    return f"runs/{stage}/{stage}"


def published(student, fps, hub, tmp_path, *start):  # noqa: F811
    """Play a student, publish it, and load what was uploaded."""
    run("generate", student, "-o", "fox.mp4", "--seconds", 0.5, "--prompt", "a red fox runs", "--scale", 1, *start)
    assert read_video("fox.mp4")[1] == fps
    publish(student, "lab/wan-student", licence="apache-2.0", endpoint=hub.address)
    Path("down").mkdir()
    for name, content in hub.files.items():
        (Path("down") / name).write_bytes(content)
    loaded = checkpoint.load_student(f"down/{Path(student).name}")
    assert loaded.record["world"]["fps"] == fps and str(tmp_path) not in json.dumps(loaded.record)
    assert all(torch.isfinite(p).all() for p in loaded.net.parameters())
    assert same(load_file(f"{student}.safetensors"), load_file(f"down/{Path(student).name}.safetensors"))


def exported(student):
    """Through diffusers' layout and back."""
    run("export", student, "--to", "diffusers", "-o", "d")
    run("convert", "d", "same")
    assert both(Path("same")) == both(Path(student))


def text_to_video(tmp_path, hub, processes, ending="", channels=16, side=8, frames=FRAMES, fps=16.0):  # noqa: F811
    folder = write_wan(tmp_path / "models" / "Wan", channels)
    prompts(folder, "data/p", fps)
    size = ["--frames", frames, "--size", f"{4 * side}x{6 * side}"]
    run("data", "trajectories", "data/t", "--teacher", folder, "--data", "data/p", "--clips", 2, *SAMPLER, *size)
    student = distilled(folder, ending, "data/p", "data/t", small(folder, frames, processes), processes)
    run("export", student, "--to", "self-forcing", "-o", "sf.pt")
    run("convert", "sf.pt", "again", *size[2:], "--heads", 2, "--allow-pickle", "--chunk", 3)
    assert same(load_file("again.safetensors"), load_file(f"{student}.safetensors"))
    exported(student)
    published(student, fps, hub, tmp_path)


def text_or_image_to_video(tmp_path, hub, processes):  # noqa: F811
    text_to_video(tmp_path, hub, processes, "-5b", 48, 16, 4, 24.0)


def image_to_video(tmp_path, hub, processes, experts=False):  # noqa: F811
    folder = write_wan(tmp_path / "models" / "Wan", image=not experts)
    if experts:
        for seed, name in enumerate(("transformer", "transformer_2")):
            transformer(seed, in_channels=36).save_pretrained(folder / name)
    for k, picture in enumerate(moving(2, height=40, width=60)):
        save_png(f"{k}.png", picture)
    Path("pictures.txt").write_text("0.png\ta red fox runs\n1.png\ttwo boats at night\n", encoding="utf-8")
    options = ["--negative", "blurred", "--tokens", 8, "--frames", FRAMES, "--size", SIZE]
    clip = [] if experts else ["--image-encoder", folder]
    run("data", "pictures", "data/p", "--file", "pictures.txt", "--model", folder, *clip, *options)
    made = ["--clips", 2, "--frames", FRAMES, "--size", SIZE]
    run("data", "trajectories", "data/t", "--teacher", folder, "--data", "data/p", *made, *SAMPLER)
    settings = small(folder, FRAMES, processes, f"dit.image_dim={0 if experts else 12}")
    ending, expert = ("-i2v-a14b", "transformer_2") if experts else ("-i2v-14b", "")
    student = distilled(folder, ending, "data/p", "data/t", settings, processes, expert)
    exported(student)
    published(student, 16.0, hub, tmp_path, "--image", "0.png")


def own_clips(folder, out, frames, *options):
    """Import videos of one's own, with what lies beside them, as latents."""
    text = ["--text", "kind=umt5", f"source={folder}", "folder=text", "length=8"]
    size = ["--size", SIZE, "--fps", 16, "--frames", frames, "--cut", 0, "--split", "1,0,0", "--given", 1]
    run("data", "videos", out, "--from", "clips", "--codec", folder, *size, *text, *options)
    save_png("start.png", moving(1, height=32, width=48)[0])


def camera(tmp_path, hub, processes):  # noqa: F811
    folder, frames = write_wan(tmp_path / "models" / "Wan"), 10
    for seed in range(2):
        write(Path("clips") / f"{seed}.mp4", moving(40, seed=seed, height=32, width=48))
        (Path("clips") / f"{seed}.txt").write_text("a red fox runs", encoding="utf-8")
        np.save(Path("clips") / f"{seed}.poses.npy", poses_of(40))
    own_clips(folder, "data/relic", 37)
    settings = [f"frames={frames}", "curriculum=[]", "steps=2", "batch=2", "data=data/relic/train", f"codec={folder}"]
    settings += [*DIT, "latent_size=[4,6]", f"parallel={'shard' if processes > 1 else 'replicate'}"]
    train(WAN / "relic-teacher.yaml", f"init={folder}", *settings, processes=processes)
    train(WAN / "relic-hybrid.yaml", "loss.noisy_chunks=1", *settings, processes=processes)
    train(WAN / "relic-14b.yaml", "steps=3", *settings, processes=processes)
    published("runs/wan-relic-14b/wan-relic-14b", 16.0, hub, tmp_path, "--image", "start.png")


def audio(tmp_path, hub, processes):  # noqa: F811
    folder = write_wan(tmp_path / "models" / "Wan")
    heard = tiny_wav2vec2(tmp_path / "models" / "wav2vec2")
    pcm = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    for seed in range(2):
        write(Path("clips") / f"{seed}.mp4", moving(16, seed=seed, height=32, width=48), pcm=pcm)
        (Path("clips") / f"{seed}.txt").write_text("a red fox runs", encoding="utf-8")
    sound = ["kind=wav2vec2", f"source={heard.source}", "block=4", "context=4", "lookahead=2"]
    own_clips(folder, "data/clips", 9, "--min-frames", 9, "--audio", *sound)
    site = ["dit.sites.hidden.dim=256", "dit.sites.hidden.hidden=4", "dit.sites.hidden.layers=[1]"]
    settings = small(folder, FRAMES, processes, *site)
    train(WAN / "talker-teacher.yaml", f"init={folder}", "data=data/clips/train", "steps=2", *settings)
    teacher = "runs/wan-talker-teacher/wan-talker-teacher"
    made = ["--clips", 2, "--frames", FRAMES, *SAMPLER]
    run("data", "trajectories", "data/t", "--teacher", teacher, "--data", "data/clips/train", *made)
    train(WAN / "talker-init.yaml", "data=data/t", "steps=2", *settings, processes=processes)
    roles = [f"teacher={teacher}", "data=data/t", "critic_warmup=0", "steps=3", f"accumulate={2 // processes}"]
    train(WAN / "talker.yaml", *roles, "critic_steps=1", *settings, processes=processes)
    published("runs/wan-talker/wan-talker", 16.0, hub, tmp_path, "--image", "start.png")


KINDS = {
    "T2V": text_to_video,
    "TI2V": text_or_image_to_video,
    "I2V": image_to_video,
    "I2V of two experts": partial(image_to_video, experts=True),
    "camera": camera,
    "audio": audio,
}


def test_text_to_video_from_a_download_to_the_hub(tmp_path, hub, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    text_to_video(tmp_path, hub, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_goes_that_way_in_one_process_and_two(tmp_path, hub, monkeypatch, kind, processes):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path, hub, processes)
