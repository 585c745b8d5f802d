"""`vidistill data files`: clips of our own worlds as files, and back by `vidistill data videos`."""

import json

import numpy as np
import pytest
import torch

from vidistill import checkpoint, metrics
from vidistill.cli.main import main
from vidistill.conditioning.camera import pose_of, rows_of
from vidistill.data.clips import Clips

FRAMES = 33


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Clips of the Doom engine, written as files, and read again: (the ones recorded, the ones that came back)."""
    folder = tmp_path_factory.mktemp("round")
    record = ["data", "doom", str(folder / "own"), "--episodes", "3", "--frames", str(FRAMES), "--workers", "1"]
    assert main(record) == 0
    assert main(["data", "files", str(folder / "files"), "--from", str(folder / "own")]) == 0
    back = ["--size", "64x64", "--cut", "0", "--split", "1,0,0", "--given", "1"]
    assert main(["data", "videos", str(folder / "back"), "--from", str(folder / "files"), *back]) == 0
    report = json.loads((folder / "back" / "report.json").read_text())
    assert report["used"] == 3
    return Clips(folder / "own"), Clips(folder / "back" / "train")


def test_actions_and_poses_come_back_bit_for_bit(recorded):
    own, back = recorded
    assert back.meta["actions"] == list(own.meta["actions"]) and back.meta["fps"] == own.meta["fps"]
    for k in range(3):
        assert torch.equal(back.episode("actions", k), own.episode("actions", k))
        poses = rows_of(pose_of(own.episode("poses", k))).float()
        assert torch.equal(back.episode("poses", k), poses)
        assert poses[1:].ne(poses[:-1]).any()


@torch.no_grad()
def test_latents_are_as_near_as_the_pictures_of_an_mp4(recorded):
    codec = checkpoint.load("doom-codec", "codec").net
    for k in range(3):
        px, again = (clips.episode("frames", k).permute(0, 3, 1, 2)[None].float() / 255 for clips in recorded)
        lost = float(metrics.psnr(again, px).mean())
        assert lost > 26  # of pictures this small yuv420p loses most
        shown = codec.decode(codec.encode(again))
        assert float(metrics.psnr(shown, codec.decode(codec.encode(px))).mean()) > lost - 3


def test_captions_come_back(tmp_path):
    assert main(["data", "shapes", str(tmp_path / "own"), "--episodes", "3", "--frames", str(FRAMES)]) == 0
    assert main(["data", "files", str(tmp_path / "files"), "--from", str(tmp_path / "own")]) == 0
    back = ["--size", "64x64", "--cut", "0", "--split", "1,0,0"]
    assert main(["data", "videos", str(tmp_path / "back"), "--from", str(tmp_path / "files"), *back]) == 0
    own, back = Clips(tmp_path / "own"), Clips(tmp_path / "back" / "train")
    told = [[about["caption"] for about in clips.meta["described"]] for clips in (own, back)]
    assert told[0] == told[1]
    assert all(torch.equal(own.episode("tokens", k), back.episode("tokens", k)) for k in range(3))
    assert np.array_equal(own.lengths("frames"), back.lengths("frames"))


def test_what_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    assert main(["data", "shapes", str(tmp_path / "own"), "--episodes", "1", "--frames", "17"]) == 0
    assert main(["data", "files", str(tmp_path / "full"), "--from", str(tmp_path / "own")]) == 1
    assert "holds other things" in capsys.readouterr().err
    assert main(["data", "files", str(tmp_path / "out"), "--from", str(tmp_path / "none")]) == 1
    assert "no data in" in capsys.readouterr().err
