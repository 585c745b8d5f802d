import numpy as np
import pytest
import torch

from vidistill import io
from vidistill.io import contact_sheet, read_video, save_png, to_float, to_uint8, write_video


def clip(num=12, size=32):
    """A square that moves one pixel a frame over a smooth ground."""
    frames = np.full((num, size, size, 3), (40, 90, 160), np.uint8)
    for t in range(num):
        frames[t, 8:20, t : t + 10] = (220, 60, 40)
    return frames


def test_float_and_back_is_exact_for_every_byte():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    px = to_float(frames)
    assert px.shape == (1, 3, 16, 16) and px.dtype == torch.float32 and px.min() >= 0 and px.max() == 1
    assert np.array_equal(to_uint8(px), frames)


def test_to_float_does_not_alias_its_input():
    frames = clip()
    before = frames.copy()
    to_float(frames).zero_()
    assert np.array_equal(frames, before)


def test_to_uint8_clamps_rounds_and_keeps_leading_axes():
    px = torch.tensor([-1.0, 0.5, 2.0]).view(1, 1, 3, 1, 1).expand(2, 5, 3, 4, 6)
    out = to_uint8(px)
    assert out.shape == (2, 5, 4, 6, 3) and out[0, 0, 0, 0].tolist() == [0, 128, 255]


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="uint8"):
        to_float(np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="3, H, W"):
        to_uint8(torch.zeros(4, 4, 3))


@pytest.mark.parametrize("scale", [1, 4])
def test_video_comes_back_nearly_as_written(tmp_path, scale):
    path = tmp_path / "deep" / "clip.mp4"
    write_video(path, clip(), fps=17.5, scale=scale)
    frames, fps = read_video(path)
    assert frames.shape == (12, 32 * scale, 32 * scale, 3) and fps == pytest.approx(17.5, abs=0.01)
    assert np.abs(frames[:, ::scale, ::scale].astype(int) - clip()).mean() < 6
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


def test_a_long_clip_is_enlarged_frame_by_frame(tmp_path, monkeypatch):
    shapes = []
    real = io.upscale
    monkeypatch.setattr(io, "upscale", lambda px, factor: shapes.append(px.shape) or real(px, factor))
    write_video(tmp_path / "clip.mp4", clip(), fps=12, scale=2)
    assert shapes == [(32, 32, 3)] * 12


@pytest.mark.parametrize("suffix", io.SUFFIXES)
def test_every_suffix_that_is_said_to_work_does(tmp_path, suffix):
    io.check_video(tmp_path / f"clip{suffix}")
    write_video(tmp_path / f"clip{suffix}", clip(), fps=12)
    frames, fps = read_video(tmp_path / f"clip{suffix}")
    assert frames.shape == (12, 32, 32, 3) and fps == pytest.approx(12, abs=0.1)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="even"):
        write_video(path, clip(size=31), fps=10)
    with pytest.raises((TypeError, ValueError, OSError)):
        save_png(path, np.zeros((4, 4, 7), np.uint8))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_contact_sheet_has_a_row_for_each_clip_and_shows_every_nth_frame(tmp_path):
    sheet = contact_sheet([clip(12), clip(6)], every=3, labels=["a", "b"], scale=2)
    assert sheet.size == (4 * 64 + 3 * 2, 2 * (64 + 14) + 2)
    assert np.array_equal(np.asarray(sheet)[14 : 14 + 64 : 2, 66:130:2], clip()[3])
    assert (np.asarray(sheet)[14:78, 64:66] == 255).all()
    save_png(tmp_path / "sheet.png", sheet)
    assert (tmp_path / "sheet.png").stat().st_size > 100
    with pytest.raises(ValueError, match="labels"):
        contact_sheet([clip()], labels=["a", "b"])


def test_reading_a_missing_video_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video"):
        read_video(tmp_path / "none.mp4")
