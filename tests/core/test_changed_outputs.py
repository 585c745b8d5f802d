"""Outputs that are right but for one change: what is read, and what is not ours, is never overwritten."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vidistill.io import check_output, check_video, save_png, write_video

PX = np.full((16, 16, 3), 90, np.uint8)
WORDS = (
    "walk",
    "clip",
    "sheet",
    "new",
    "Ünnamed",
    ".hidden",
    "a b",
    "..",
    "folder",
    "link",
    "hard",
    "gone/deep",
    "pipe",
)
SUFFIXES = (".png", ".mp4", ".MP4", ".webm", ".mkv", "", ".mp4.png", ".txt")
STYLES = {
    "plain": lambda name, folder: name,
    "dotted": lambda name, folder: f"./{name}",
    "absolute": lambda name, folder: str(folder / name),
    "around": lambda name, folder: f"folder.mp4/../{name}",
}


def world(folder):
    """A folder with what is read, what is ours and what is somebody else's; returns what is not to be touched."""
    Image.fromarray(PX).save(folder / "walk.png")  # what is read
    (folder / "clip.mp4").write_bytes(b"somebody else's")
    (folder / "notes.txt").write_text("somebody else's")
    save_png(folder / "sheet.png", PX)  # ours
    for name in ("folder.mp4", "folder.png"):
        (folder / name).mkdir()
    (folder / "link.png").symlink_to("walk.png")
    (folder / "link.mp4").symlink_to("clip.mp4")
    os.link(folder / "walk.png", folder / "hard.png")
    os.mkfifo(folder / "pipe.png")
    return ("walk.png", "clip.mp4", "notes.txt")


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_changed_output_replaces_nothing_but_what_is_ours(tmp_path, monkeypatch, examples):
    hits, at = Counter(), iter(range(10_000))

    def change(word, suffix, style, video):
        folder = tmp_path / str(next(at))
        folder.mkdir()
        monkeypatch.chdir(folder)
        kept = {name: (folder / name).read_bytes() for name in world(folder)}
        out = type(tmp_path)(STYLES[style](word + suffix, folder))
        try:
            (check_video if video else check_output)(out, ["walk.png", None, "nothing there"])
        except ValueError as error:
            assert "\n" not in str(error) and "--out" in str(error)
            hits[word, "refused"] += 1
        else:
            if video:
                write_video(out, PX[None], 10)
            save_png(out.with_suffix(".png") if video else out, PX)
            assert out.is_file()
            hits[word, "written"] += 1
        assert {name: (folder / name).read_bytes() for name in kept} == kept
        assert os.readlink("link.png") == "walk.png" and os.readlink("link.mp4") == "clip.mp4"

    few = settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    few(
        given(st.sampled_from(WORDS), st.sampled_from(SUFFIXES), st.sampled_from(sorted(STYLES)), st.booleans())(change)
    )()
    for word in WORDS:
        change(word, ".png", "plain", False)
    for field, number in sorted(hits.items()):
        print(f"{number:6d} {' '.join(field)}")
    assert {what for _, what in hits} == {"written", "refused"}
