"""The demos start, the avatar speaks a recording, and the tutorial does what it says."""

import re
import runpy
import shlex
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from shell import commands_of, run_all
from tiny_talker import write_talker
from tiny_videos import moving, write

from vidistill import checkpoint
from vidistill.cli import planning, recipe, timing
from vidistill.cli.main import main, parser
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


@pytest.mark.parametrize(
    ("demo", "args", "says"),
    [
        ("story", ["--last", "-5"], "--last: must be above 0"),
        ("story", ["--last", "nan"], "--last: must be above 0"),
        ("story", ["--seed", "9" * 20], "--seed: must be"),
        ("story", ["--scale", "0"], "--scale: must be from 1"),
        ("story", ["--switch", "melt", "--name", "shapes"], "stream.switch 'melt'"),
        ("story", ["empty.txt"], "holds no prompts"),
        ("story", ["latin.txt"], r"latin\.txt is no UTF-8"),
        ("avatar", ["--seed", "-1"], "--seed: must be"),
        ("avatar", ["--wav", "empty.txt"], r"empty\.txt cannot be read as sound"),
        ("avatar", ["--image", "empty.txt", "--wav", "z.wav"], r"no recording z\.wav"),
        ("play", ["--port", "99999999"], "port is 99999999"),
    ],
)
def test_a_demo_refuses_what_it_cannot_do_in_a_line(demo, args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit) as left:
        run(DEMOS[0].with_name(f"{demo}.py"), monkeypatch, *args)
    assert left.value.code == 2 and re.search(says, capsys.readouterr().err.splitlines()[-1])


def test_a_story_of_one_prompt_at_its_start_has_a_frame_at_least(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("0: a red ring")
    run(DEMOS[0].with_name("story.py"), monkeypatch, "one.txt", "--last", "0.001", "--scale", "1")
    assert len(read_video(tmp_path / "story.mp4")[0]) == 1


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


def test_the_tutorial_leads_from_videos_to_a_student(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "took_by_step", lambda cfg: timing.Took(0.5, 0.5))
    monkeypatch.setattr(planning, "LESS_SIZE", 10**9)  # the smallest networks, and small ones
    monkeypatch.setitem(recipe.SIZES, "small", (144, 1, 64))
    monkeypatch.setattr(recipe, "WARM", {"codec": None, "teacher": None})
    monkeypatch.chdir(tmp_path)
    for k in range(4):
        write(tmp_path / "clips" / f"{k}.mp4", moving(36, seed=k))
    text = (DEMOS[0].parent / "own_world.md").read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("64x64", "16x16").splitlines()
    assert len(lines) == 6
    dry_run, cut, project, rehearsal, training, play = map(shlex.split, lines)
    assert main(dry_run[1:]) == 0 and (tmp_path / "data" / "mine" / "report.html").is_file()
    assert main(cut[1:]) == 0 and main(project[1:]) == 0
    assert rehearsal == ["STEPS=3", *training] and (tmp_path / training[0]).is_file()
    commands = commands_of(tmp_path / training[0], tmp_path, STEPS="1")
    [judge] = [words for _, *words in commands if words[0] == "eval"]
    run_all([command for command in commands if command[1:] != judge], monkeypatch)
    assert main(judge) == 1  # four clips are too few for an interval, and run.sh goes on
    served = Path(parser().parse_args(play[1:]).name)
    assert served.parts[0] == "mine"
    made = tmp_path / "mine" / "rehearsal" / Path(*served.parts[1:])
    assert checkpoint.load(str(made)).kind == "student" and made.with_name(f"{made.name}-starts").is_dir()
