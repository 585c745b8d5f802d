"""The journeys of DESIGN.md as one straight line on a miniature: record, codec, teacher, init, distil, stream."""

import json
from pathlib import Path

import pytest

from vidistill import checkpoint, io
from vidistill.cli.main import main

pytest.importorskip("vizdoom", reason="recording needs the doom extra")

TINY_DIT = "{channels: 4, patch: [1, 4, 4], width: 24, layers: 2, heads: 2, ffn: 32, freq_dim: 16, " \
    "sites: {modulation: {dim: 17}}}"  # fmt: skip
STUDENT = "{chunk: 3, first_chunk: 1, memory: {policy: full, frames: 7}}"
SCHEDULE = "{levels: [1.0, 0.5], given_chunks: 1}"
COMMON = "steps: 3\nbatch: 2\nlog_every: 1\nsave_every: 2\nout: runs\noptim: {lr: 1e-3}\n"


def run(*argv: str) -> None:
    assert main(list(argv)) == 0


def stage(name: str, text: str) -> str:
    """Train a stage written as YAML; returns the path of its checkpoint."""
    path = Path(f"{name}.yaml")
    path.write_text(f"name: {name}\n{COMMON}{text}")
    run("train", str(path))
    return f"runs/{name}/{name}"


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Checkpoints of every stage, trained for three steps each."""
    monkeypatch.chdir(tmp_path)
    run("data", "doom", "frames", "--episodes", "2", "--frames", "33", "--workers", "1")
    codec_config = "{latent_channels: 4, encoder_widths: [8, 8, 8], decoder_widths: [8, 8, 8]}"
    made = {"codec": stage("codec", f"objective: codec\ndata: frames\nframes: 5\ncodec_config: {codec_config}\n")}
    run("data", "doom", "latents", "--episodes", "2", "--frames", "33", "--workers", "1", "--codec", made["codec"])
    base = f"data: latents\nframes: 7\ncodec: {made['codec']}\n"
    made["teacher"] = stage("teacher", f"objective: flow\n{base}dit: {TINY_DIT}\n")
    causal = f"{base}student: {STUDENT}\nschedule: {SCHEDULE}\n"
    made["tf"] = stage("tf", f"objective: teacher_forcing\n{causal}init: {made['teacher']}\n")
    on_policy = f"{causal}init: {made['tf']}\nteacher: {made['teacher']}\ncritic_steps: 1\n"
    made["selfforcing"] = stage("selfforcing", f"objective: dmd\n{on_policy}")
    return made


def test_a_world_goes_from_recording_to_a_streamed_video(chain: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    frames = [p for p in Path("frames").glob("*.safetensors")]
    assert frames
    student = checkpoint.load_student(chain["selfforcing"])
    assert student.schedule.given_chunks == 1
    image = Path("start.png")
    from PIL import Image

    Image.new("RGB", (64, 64), (90, 160, 40)).save(image)
    run("generate", chain["selfforcing"], "-o", "walk.mp4", "--seconds", "2", "--image", str(image),
        "--action", "forward:8,turn_left:8")  # fmt: skip
    film, fps = io.read_video("walk.mp4")
    assert len(film) == 35 and abs(fps - 17.5) < 0.1
    capsys.readouterr()
    run("info", chain["selfforcing"], "--json")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["kind"] == "student" and said["nfe_per_chunk"] == [3] * 7
