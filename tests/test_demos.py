"""The demos start, and the avatar speaks a recording."""

import runpy
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from tiny_talker import write_talker

from vidistill.conditioning.audio import to_pcm16
from vidistill.io import read_video, save_png

DEMOS = sorted((Path(__file__).parent.parent / "demos").glob("*.py"))


def run(demo: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(demo), *args])
    runpy.run_path(str(demo), run_name="__main__")


@pytest.mark.parametrize("demo", DEMOS, ids=[demo.stem for demo in DEMOS])
def test_a_demo_says_what_it_does(demo, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(demo, monkeypatch, "--help")
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


def test_an_avatar_speaks_a_recording(tmp_path, monkeypatch):
    write_talker(tmp_path)
    save_png(tmp_path / "face.png", np.full((16, 16, 3), 120, np.uint8))
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setparams((2, 2, 48_000, 0, "NONE", ""))
        file.writeframes(to_pcm16(np.random.default_rng(0).uniform(-0.3, 0.3, 48_000 * 2)).tobytes())
    out = tmp_path / "said.mp4"
    avatar = next(demo for demo in DEMOS if demo.stem == "avatar")
    said = [
        "--name",
        str(tmp_path / "student"),
        "--wav",
        str(tmp_path / "voice.wav"),
        "--image",
        str(tmp_path / "face.png"),
    ]
    run(avatar, monkeypatch, *said, "-o", str(out))
    frames, fps = read_video(out)
    assert fps == 16 and len(frames) >= 16
