"""`vidistill data videos`: files of every kind in, clips with what lies beside them out."""

import json
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_videos import SIDE, moving, poses_of, report_of, write

from vidistill.cli.main import main
from vidistill.conditioning.audio import AudioConfig, clip_features
from vidistill.conditioning.camera import pose_of
from vidistill.data.clips import Clips
from vidistill.data.importers.decode import MediaError, sound_of
from vidistill.data.importers.sidecars import opencv_poses
from vidistill.data.shards import DataError
from vidistill.io import save_png

ALL = ("--split", "1,0,0", "--size", f"{SIDE}x{SIDE}")


def run(out, source, *options):
    return main(["data", "videos", str(out), "--from", str(source), *options])


def imported(out, source, *options):
    """The training clips of an import of everything."""
    assert run(out, source, *ALL, *options) == 0
    return Clips(out / "train")


def names_of(clips):
    return [clip["video"] for clip in clips.meta["described"]]


def test_a_folder_becomes_clips_near_what_was_filmed(tmp_path):
    px = moving(40)
    write(tmp_path / "in" / "a.mp4", px, options={"crf": "4"})
    clips = imported(tmp_path / "out", tmp_path / "in")
    found = clips.episode("frames", 0).numpy()
    assert found.shape == px.shape and clips.meta["fps"] == 16
    assert np.abs(found.astype(int) - px).mean() < 3
    wrong = np.abs(found[:-1].astype(int) - px[1:]).mean()
    assert np.abs(found.astype(int) - px).mean() < 0.5 * wrong


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [(".mp4", "libx264", "yuv420p"), (".mov", "libx264", "yuv420p"), (".mkv", "libx264", "yuv444p"),
     (".webm", "libvpx-vp9", "yuv420p"), (".gif", "gif", "rgb8"), (".mp4", "libx264", "yuv420p10le")],
)  # fmt: skip
def test_every_container_is_read(tmp_path, suffix, codec, pix_fmt):
    px = moving(24, seed=1)
    write(tmp_path / "in" / f"a{suffix}", px, fps=10, codec=codec, pix_fmt=pix_fmt)
    clips = imported(tmp_path / "out", tmp_path / "in")
    found = clips.episode("frames", 0).numpy()
    assert abs(len(found) - 24) <= 1 and clips.meta["fps"] == pytest.approx(10, abs=0.01)
    assert np.abs(found[:23].astype(int) - px[:23]).mean() < 30
    if "10" in pix_fmt:
        assert report_of(tmp_path / "out")[1]["a.mp4"]["odd"] == ["10 bits a colour, rounded to 8"]


def test_a_folder_of_pictures_is_a_video(tmp_path):
    px = moving(20)
    for t, picture in enumerate(px):
        save_png(tmp_path / "in" / "walk" / f"frame{t}.png", picture)  # frame10 comes after frame9
    clips = imported(tmp_path / "out", tmp_path / "in", "--still-fps", "8")
    assert np.array_equal(clips.episode("frames", 0).numpy(), px) and clips.meta["fps"] == 8


def test_captions_come_from_beside_a_video_and_are_read(tmp_path):
    for k in range(2):
        write(tmp_path / "in" / f"{k}.mp4", moving(20, seed=k))
    (tmp_path / "in" / "0.txt").write_text("a yellow\n square ")
    clips = imported(tmp_path / "out", tmp_path / "in", "--text", "kind=ngrams", "dim=8", "length=4")
    assert [clip.get("caption") for clip in clips.meta["described"]] == ["a yellow square", None]
    assert clips.meta["given"] == 0 and clips.meta["text"] == {"kind": "ngrams", "dim": 8, "length": 4}
    assert clips.episode("tokens", 0).any() and not clips.episode("tokens", 1).any()
    assert report_of(tmp_path / "out")[1]["1.mp4"]["odd"] == ["no caption: learned without words"]


@pytest.mark.parametrize("form", ["list.csv", "list.jsonl", "videos2caption.json"])
def test_lists_name_videos_and_captions(tmp_path, form):
    for k in range(2):
        write(tmp_path / "videos" / f"ü {k}.mp4", moving(20, seed=k))
    rows = [{"path": f"ü {k}.mp4", "cap": f"number {k}, 数字"} for k in range(2)]
    if form == "list.csv":
        lines = "".join(f'"{row["path"]}","{row["cap"]}"\n' for row in rows)
        (tmp_path / form).write_text("file,caption\n" + lines, encoding="utf-8-sig")
    elif form == "list.jsonl":
        (tmp_path / form).write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        (tmp_path / form).write_text(json.dumps([{**row, "cap": [row["cap"]]} for row in rows]))
    clips = imported(tmp_path / "out", tmp_path / form)
    assert [clip["caption"] for clip in clips.meta["described"]] == ["number 0, 数字", "number 1, 数字"]


# --- time -------------------------------------------------------------------------------------------------------------


def test_frames_are_those_nearest_in_time(tmp_path):
    px = moving(72)
    write(tmp_path / "in" / "a.mp4", px, fps=24, options={"crf": "4"})
    clips = imported(tmp_path / "out", tmp_path / "in", "--fps", "8")
    found = clips.episode("frames", 0).numpy()
    assert len(found) == 24 and np.abs(found.astype(int) - px[::3]).mean() < 3
    assert "resampled to 8" in report_of(tmp_path / "out")[1]["a.mp4"]["odd"][0]


def test_a_variable_frame_rate_is_evened_out(tmp_path):
    px, times = moving(40), np.cumsum([0.0, *([0.05, 0.15] * 20)])[:40]
    write(tmp_path / "in" / "a.mkv", px, times=times, options={"crf": "4"})
    clips = imported(tmp_path / "out", tmp_path / "in", "--fps", "10")
    picked = np.abs(times[:, None] - np.arange(len(clips.episode("frames", 0))) / 10 - 1e-4).argmin(0)
    assert np.abs(clips.episode("frames", 0).numpy().astype(int) - px[picked]).mean() < 4
    assert report_of(tmp_path / "out")[1]["a.mkv"]["odd"] == ["variable frame rate, resampled to 10"]


def test_slow_videos_are_not_shown_twice(tmp_path):
    write(tmp_path / "in" / "slow.mp4", moving(20), fps=5)
    write(tmp_path / "in" / "quick.mp4", moving(100, seed=1), fps=16)
    imported(tmp_path / "out", tmp_path / "in")
    assert report_of(tmp_path / "out")[1]["slow.mp4"]["dropped"].startswith("wrong fps: 5 where 16 are asked for")


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        (("--frames", "20"), [20, 20, 17]),
        (("--frames", "20", "--windows", "head"), [20]),
        (("--frames", "20", "--windows", "slide", "--stride", "10"), [20] * 4),
        (("--frames", "20", "--windows", "uniform", "--per-scene", "3"), [20] * 3),
    ],
)
def test_windows_are_cut_as_asked(tmp_path, options, lengths):
    px = moving(57)
    write(tmp_path / "in" / "a.mp4", px, options={"crf": "4", "g": "12"})
    clips = imported(tmp_path / "out", tmp_path / "in", *options)
    assert clips.lengths("frames") == lengths
    for k, clip in enumerate(clips.meta["described"]):
        first = round(clip["start"] * 16)
        assert np.abs(clips.episode("frames", k).numpy().astype(int) - px[first : first + lengths[k]]).mean() < 3


def test_scenes_are_kept_apart(tmp_path):
    px = np.concatenate([moving(30, seed=k) for k in range(3)] + [moving(5, seed=7)])
    write(tmp_path / "in" / "a.mp4", px, options={"crf": "10"})
    clips = imported(tmp_path / "out", tmp_path / "in")
    assert clips.lengths("frames") == [30, 30, 30] and not clips.ragged
    assert report_of(tmp_path / "out")[1]["a.mp4"]["odd"] == [
        "3 cuts, scenes kept apart",
        "1 scenes too short (under 17 frames)",
    ]
    assert imported(tmp_path / "whole", tmp_path / "in", "--cut", "0").lengths("frames") == [95]


# --- size -------------------------------------------------------------------------------------------------------------


def test_odd_sizes_are_cropped_or_fit(tmp_path):
    px = np.zeros((20, 36, 70, 3), np.uint8)
    px[:, :, :35], px[:, :, 35:] = (200, 30, 30), (30, 30, 200)
    px[np.arange(20), np.arange(20)] = 255
    write(tmp_path / "in" / "a.mkv", px, codec="libx264rgb", pix_fmt="rgb24", options={"crf": "0"})
    cropped = imported(tmp_path / "crop", tmp_path / "in", "--size", "18x18").episode("frames", 0)[0].float()
    fit = (
        imported(tmp_path / "fit", tmp_path / "in", "--size", "18x18", "--resize", "fit")
        .episode("frames", 0)[0]
        .float()
    )
    assert cropped[9].sum(-1).min() > 200 and cropped[9, 0, 0] > 190 and cropped[9, -1, 2] > 190
    assert fit[0].max() == 0 and fit[-1].max() == 0 and fit[9, 0, 0] > 190 and fit[9, -1, 2] > 190


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phone_that_was_turned_is_turned_back(tmp_path, degrees):
    px = moving(20, height=32, width=64)
    write(tmp_path / "in" / "a.mp4", px, rotate=degrees, options={"crf": "4"})
    height, width = (32, 64) if degrees == 180 else (64, 32)
    size = ("--split", "1,0,0", "--size", f"{height}x{width}")
    assert run(tmp_path / "out", tmp_path / "in", *size) == 0
    found = Clips(tmp_path / "out" / "train").episode("frames", 0).numpy()
    shown = np.rot90(px, degrees // 90, axes=(1, 2))  # counter-clockwise, as ffmpeg's own players show this file
    assert np.abs(found.astype(int) - shown).mean() < 3
    assert f"rotated by {degrees} degrees" in report_of(tmp_path / "out")[1]["a.mp4"]["odd"][0]


def test_pictures_of_a_folder_mean_what_pictures_mean_everywhere(tmp_path):
    """Turned as their EXIF says, 16 bits and fractions scaled by their range, what is transparent white."""
    for t, px in enumerate(moving(20)):
        folder = tmp_path / "in" / "walk"
        folder.mkdir(parents=True, exist_ok=True)
        picture, tag = Image.fromarray(px), Image.Exif()
        match t % 4:
            case 0:
                tag[0x0112] = 6  # to be turned by 90 degrees
                picture.rotate(90, expand=True).save(folder / f"{t}.png", exif=tag)
            case 1:
                Image.fromarray(px[..., 0].astype(np.uint16) * 257).save(folder / f"{t}.tif")
            case 2:
                Image.fromarray(px[..., 0] / np.float32(255)).save(folder / f"{t}.tiff")
            case 3:
                Image.fromarray(np.concatenate((px, np.zeros_like(px[..., :1])), -1)).save(folder / f"{t}.png")
    frames = imported(tmp_path / "out", tmp_path / "in", "--cut", "0").episode("frames", 0).numpy()
    for t, px in enumerate(moving(20)):
        grey = np.repeat(px[..., :1], 3, -1)
        want = {0: px, 1: grey, 2: grey, 3: np.full_like(px, 255)}[t % 4]
        assert np.abs(frames[t].astype(int) - want).max() <= 1, t


def test_a_video_that_is_turned_by_less_than_a_quarter_is_left_out(tmp_path, capsys):
    write(tmp_path / "in" / "a.mp4", moving(24), rotate=45)
    assert run(tmp_path / "out", tmp_path / "in", *ALL) == 1
    assert "no video can be used" in capsys.readouterr().err
    assert report_of(tmp_path / "out")[1]["a.mp4"]["dropped"].startswith("rotated by")


@pytest.mark.parametrize(("transfer", "name"), [(8, "linear light"), (16, "PQ"), (17, "SMPTE ST 428"), (18, "HLG")])
def test_a_video_whose_light_is_not_that_of_screens_is_left_out(tmp_path, transfer, name):
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p10le"
        stream.codec_context.color_trc = transfer
        for picture in moving(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    assert run(tmp_path / "out", tmp_path / "in", *ALL) == 1
    assert report_of(tmp_path / "out")[1]["a.mkv"]["dropped"].startswith(f"HDR ({name})")


@pytest.mark.parametrize("codec, pix_fmt, suffix", [
    ("ffv1", "gray", ".mkv"), ("ffv1", "gray16le", ".mkv"), ("mjpeg", "yuvj420p", ".avi"), ("qtrle", "rgb24", ".mov"),
    ("mpeg4", "yuv420p", ".avi"), ("prores_ks", "yuv422p10le", ".mov"), ("libvpx", "yuv420p", ".webm"),
])  # fmt: skip
def test_videos_of_odd_kinds_show_what_was_written(tmp_path, codec, pix_fmt, suffix):
    px = moving(24)
    if "gray" in pix_fmt:
        px = np.repeat(px.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    write(tmp_path / "in" / f"a{suffix}", px, codec=codec, pix_fmt=pix_fmt)
    found = imported(tmp_path / "out", tmp_path / "in").episode("frames", 0).numpy()
    assert found.shape == px.shape and np.abs(found.astype(int) - px).mean() < 30


@pytest.mark.parametrize("first", [-1.0, 100.0])
def test_a_video_that_does_not_begin_at_zero_is_read_from_its_first_frame(tmp_path, first):
    px = moving(40)
    write(tmp_path / "in" / "a.mkv", px, times=[first + t / 16 for t in range(40)])
    found = imported(tmp_path / "out", tmp_path / "in").episode("frames", 0).numpy()
    assert len(found) == 40 and np.abs(found.astype(int) - px).mean() < 12


def test_transparent_pixels_lie_over_black(tmp_path):
    px = np.concatenate([moving(20), np.full((20, SIDE, SIDE, 1), 255, np.uint8)], -1)
    px[:, :, :24, 3] = 0
    write(tmp_path / "in" / "a.mov", px, codec="png", pix_fmt="rgba")
    clips = imported(tmp_path / "out", tmp_path / "in")
    found = clips.episode("frames", 0).numpy()
    assert not found[:, :, :24].any() and np.array_equal(found[:, :, 24:], px[:, :, 24:, :3])
    assert report_of(tmp_path / "out")[1]["a.mov"]["odd"] == ["transparent pixels, laid over black"]


# --- beside the picture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_actions_come_back_bit_for_bit(tmp_path, form):
    px, rng = moving(40), np.random.default_rng(0)
    actions = {"left": rng.integers(0, 2, 40).astype(np.float32), "gas": rng.random(40, np.float32)}
    write(tmp_path / "in" / "a.mp4", px)
    rows = [{name: float(x[t]) for name, x in actions.items()} for t in range(40)]
    text = "\n".join(json.dumps(row) for row in rows)
    if form == "csv":
        text = "left,gas\n" + "\n".join(f"{row['left']},{row['gas']!r}" for row in rows)
    (tmp_path / "in" / f"a.actions.{form}").write_text(text)
    clips = imported(tmp_path / "out", tmp_path / "in", "--frames", "20")
    assert clips.meta["actions"] == ["left", "gas"] and clips.meta["given"] == 1
    for k in range(2):
        found = clips.episode("actions", k).numpy()
        want = np.stack(list(actions.values()), 1)[20 * k : 20 * k + 20]
        assert np.array_equal(found[1:], want[1:]) and not found[0].any()


def test_actions_that_fall_below_zero_become_two(tmp_path):
    for k, low in enumerate((-1.0, 0.0)):
        write(tmp_path / "in" / f"{k}.mp4", moving(20, seed=k))
        lines = [f"{low if t % 2 else 0.5}" for t in range(20)]
        (tmp_path / "in" / f"{k}.actions.csv").write_text("\n".join(["steer", *lines]))
    clips = imported(tmp_path / "out", tmp_path / "in")
    assert clips.meta["actions"] == ["steer_minus", "steer_plus"]
    assert clips.episode("actions", 0)[1:3].tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert clips.episode("actions", 1)[1:3].tolist() == [[0.0, 0.0], [0.0, 0.5]]


def test_actions_of_another_rate_are_averaged_over_what_lies_between_frames(tmp_path):
    write(tmp_path / "in" / "a.mp4", moving(40), fps=20)
    (tmp_path / "in" / "a.actions.csv").write_text("\n".join(["fire", *(str(int(t % 4 == 3)) for t in range(40))]))
    clips = imported(tmp_path / "out", tmp_path / "in", "--fps", "10")
    assert clips.episode("actions", 0)[:4, 0].tolist() == [0.0, 0.0, 0.5, 0.0]
    (tmp_path / "in" / "a.actions.csv").write_text("time,fire\n0,0\n0.5,1\n0.75,0\n")
    clips = imported(tmp_path / "timed", tmp_path / "in", "--fps", "10")
    found = clips.episode("actions", 0)[:, 0].tolist()
    assert found[:6] == [0.0] * 6 and found[6:9] == pytest.approx([1.0, 1.0, 0.5]) and not any(found[9:])


def test_poses_are_moved_to_our_axes_without_rounding(tmp_path):
    given = poses_of(40)
    write(tmp_path / "in" / "a.mp4", moving(40))
    np.save(tmp_path / "in" / "a.poses.npy", given)
    np.save(tmp_path / "in" / "a.intrinsics.npy", np.array([24.0, 24.0, 24.0, 24.0]))
    clips = imported(tmp_path / "out", tmp_path / "in")
    rows = clips.episode("poses", 0)
    assert np.array_equal(opencv_poses(rows.numpy()) + 0.0, given + 0.0)
    assert clips.meta["fov"] == pytest.approx(90)
    position, rotation = pose_of(rows)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(40, 3, 3))
    assert position[-1].tolist() == pytest.approx([3.0, 0.0, -0.05])  # ahead, and a little down
    assert torch.atan2(rotation[-1, 0, 1], rotation[-1, 0, 0]).item() == pytest.approx(-0.5)  # to the right


def test_latents_with_poses_alone_say_how_many_frames_a_latent_is(tmp_path):
    """Motion at latent rate needs it, and no packed actions show it."""
    write(tmp_path / "in" / "a.mp4", moving(41))
    np.save(tmp_path / "in" / "a.poses.npy", poses_of(41))
    size = ("--codec", "doom-codec", "--size", "64x64")
    clips = imported(tmp_path / "latents", tmp_path / "in", *size)
    assert clips.kind == "latents" and clips.factor == 4 and len(clips.episode("poses", 0)) == 11
    frames = imported(tmp_path / "frames", tmp_path / "in")
    with pytest.raises(DataError, match="temporal"):
        _ = frames.factor


def test_sound_becomes_features_of_the_same_frames(tmp_path):
    t = np.arange(3 * 16_000) / 16_000
    pcm = np.where(t > 1.5, 0.5 * np.sin(2 * np.pi * 440 * t), 0).astype(np.float32)
    write(tmp_path / "in" / "a.mp4", moving(40), pcm=pcm)
    write(tmp_path / "in" / "mute.mp4", moving(40, seed=1))
    clips = imported(tmp_path / "out", tmp_path / "in", "--audio", "kind=mel", "bands=8", "--frames", "20")
    audio = AudioConfig(fps=16.0, bands=8)
    want = clip_features(pcm, 40, audio)
    found = np.concatenate([clips.episode("audio", k).float().numpy() for k in range(2)])
    assert found.shape == want.shape and np.corrcoef(found.ravel(), want.ravel())[0, 1] > 0.97
    assert report_of(tmp_path / "out")[1]["mute.mp4"]["dropped"] == "no sound, which --audio asks for"


# --- splits -----------------------------------------------------------------------------------------------------------


def test_encodings_of_one_video_stay_in_one_split(tmp_path):
    for k in range(16):
        px = moving(40, seed=k)
        write(tmp_path / "in" / f"{k}.mp4", px)
        write(tmp_path / "in" / f"{k}-again.webm", px[:, ::2, ::2], codec="libvpx-vp9", options={"crf": "40"})
    assert run(tmp_path / "out", tmp_path / "in", "--split", "0.5,0.25,0.25", "--size", "16x16") == 0
    report, rows = report_of(tmp_path / "out")
    assert all(rows[f"{k}.mp4"]["split"] == rows[f"{k}-again.webm"]["split"] != "" for k in range(16))
    assert min(report["clips"].values()) > 0 and sum(report["clips"].values()) == 32
    assert sum(bool(row["same_as"]) for row in rows.values()) == 16
    assert {split: Clips(tmp_path / "out" / split).meta["episodes"] for split in report["clips"]} == report["clips"]


def test_another_video_moves_none_that_are_there(tmp_path):
    for k in range(12):
        write(tmp_path / "in" / f"{k}.mp4", moving(20, seed=k))
    half = ("--split", "0.5,0.5,0", "--size", "16x16", "--dry-run")
    assert run(tmp_path / "out", tmp_path / "in", *half) == 0
    before = {name: row["split"] for name, row in report_of(tmp_path / "out")[1].items()}
    write(tmp_path / "in" / "new.mp4", moving(20, seed=99))
    assert run(tmp_path / "out", tmp_path / "in", *half) == 0
    after = {name: row["split"] for name, row in report_of(tmp_path / "out")[1].items()}
    assert {name: after[name] for name in before} == before and set(before.values()) == {"train", "validation"}


def test_a_copy_is_dropped_and_another_encoding_on_request(tmp_path):
    path = write(tmp_path / "in" / "a.mp4", moving(40))
    (tmp_path / "in" / "copy.mp4").write_bytes(path.read_bytes())
    write(tmp_path / "in" / "other.mp4", moving(40), options={"crf": "35"})
    assert names_of(imported(tmp_path / "out", tmp_path / "in")) == ["a.mp4", "other.mp4"]
    assert names_of(imported(tmp_path / "one", tmp_path / "in", "--duplicates", "drop")) == ["a.mp4"]
    assert report_of(tmp_path / "one")[0]["dropped"] == {"duplicate of a.mp4": 2}


# --- the work ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for k in range(5):
        write(folder / f"{k}.mp4", moving(57, seed=k))
    return folder


SMALL = ("--size", "16x16", "--frames", "20", "--windows", "slide", "--stride", "3", "--split", "1,0,0")


def test_parts_make_what_one_process_makes(tmp_path, many, capsys):
    assert run(tmp_path / "one", many, *SMALL) == 0
    for k in (2, 3, 1):
        assert run(tmp_path / "parts", many, *SMALL, "--part", f"{k}/3") == 0
    assert "part 2 is written" in capsys.readouterr().out
    one, parts = Clips(tmp_path / "one" / "train"), Clips(tmp_path / "parts" / "train")
    assert one.meta == parts.meta and len(one) == 65 and one.meta["shards"] == 3
    assert all(torch.equal(a["frames"], b["frames"]) for a, b in zip(one.parts, parts.parts, strict=True))
    assert sorted(p.name for p in (tmp_path / "parts" / "train").iterdir()) == [
        "meta.json",
        *(f"shard-{i:05d}.safetensors" for i in range(3)),
    ]


def test_a_full_disk_costs_nothing_that_was_written(tmp_path, many, monkeypatch, capsys):
    from vidistill.data.importers import write as writing

    real, written = writing.write_shard, []

    def full(path, tensors):
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        written.append(path.name)
        real(path, tensors)

    monkeypatch.setattr(writing, "write_shard", full)
    assert run(tmp_path / "out", many, *SMALL) == 1
    assert "No space left" in capsys.readouterr().err and not (tmp_path / "out" / "train").exists()
    monkeypatch.setattr(writing, "write_shard", lambda path, tensors: (written.append(path.name), real(path, tensors)))
    assert run(tmp_path / "out", many, *SMALL) == 0
    assert written == [f"shard-{i:05d}.safetensors" for i in range(3)] and len(Clips(tmp_path / "out" / "train")) == 65
    assert run(tmp_path / "out", many, *SMALL) == 0 and len(written) == 3
    assert run(tmp_path / "out", many, *SMALL, "--size", "32x32") == 1
    assert "px_size 16" in capsys.readouterr().err


def test_a_dry_run_writes_a_report_alone(tmp_path, many, capsys):
    assert run(tmp_path / "out", many, "--dry-run") == 0
    assert "nothing written yet" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["inspected", "report.html", "report.json"]
    first = (tmp_path / "out" / "report.json").read_bytes(), (tmp_path / "out" / "report.html").read_bytes()
    assert run(tmp_path / "again", many, "--dry-run") == 0
    assert first == (
        (tmp_path / "again" / "report.json").read_bytes(),
        (tmp_path / "again" / "report.html").read_bytes(),
    )
    assert first[1].count(b"data:image/jpeg;base64,") == 5


def test_an_inspection_goes_on_where_it_stopped(tmp_path, many, monkeypatch):
    from vidistill.data.importers import videos

    real, seen = videos.inspect, []
    monkeypatch.setattr(videos, "inspect", lambda item, *rest: (seen.append(item.name), real(item, *rest))[1])
    assert run(tmp_path / "out", many, "--dry-run") == 0
    note = next((tmp_path / "out" / "inspected").iterdir())
    note.write_text("".join(note.read_text().splitlines(keepends=True)[:3]) + '{"name": "3.m')
    assert run(tmp_path / "out", many, "--dry-run") == 0
    assert seen == [f"{k}.mp4" for k in (0, 1, 2, 3, 4, 3, 4)]


def test_clips_are_encoded_as_they_are_cut(tmp_path, many, tiny_codec_path):
    clips = imported(tmp_path / "out", many, "--size", "16x16", "--codec", str(tiny_codec_path))
    assert clips.kind == "latents" and clips.lengths("latents") == [15] * 5
    assert clips.meta["codec"] == str(tiny_codec_path)
    assert clips.latents(2, 7, 0, 0).x.shape == (2, 7, 4, 4, 4)


def test_a_long_video_is_read_in_bounded_memory(tmp_path):
    from vidistill.data.importers.inspect import KEPT, Watch

    watch = Watch()
    for t in range(20 * KEPT):
        watch.see(t / 30, np.full((32, 32), t % 251, np.uint8))
    assert len(watch.kept) <= KEPT + 1 and len(watch.fingerprint()) == 48


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p.mkdir(), "has no videos"),
        (lambda p: None, "there is no such folder or list"),
        (lambda p: p.write_text("x"), "is no list that can be read"),
    ],
)
def test_nothing_to_import_is_said(tmp_path, capsys, make, says):
    make(tmp_path / "in")
    assert run(tmp_path / "out", tmp_path / "in") == 1
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "caption\nhello\n", "row 2 names no video"),
        ("a.jsonl", '{"path": "x.mp4"}\n{"pa', "row 2 is not JSON"),
        ("a.json", '{"path": "x.mp4"}', "must hold a list"),
    ],
)
def test_a_broken_list_names_its_row(tmp_path, capsys, name, text, says):
    (tmp_path / name).write_text(text)
    assert run(tmp_path / "out", tmp_path / name) == 1
    assert says in capsys.readouterr().err


def test_a_folder_of_other_things_is_left_alone(tmp_path, many, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert run(tmp_path / "out", many) == 1
    assert "holds other things" in capsys.readouterr().err


def test_every_file_that_cannot_be_used_has_its_reason(tmp_path, many):
    folder = tmp_path / "in"
    whole = write(folder / "good.mp4", moving(40, seed=3))
    (folder / "empty.mp4").touch()
    with av.open(str(folder / "none.mp4"), "w") as container:  # a video of no length
        stream = container.add_stream("libx264", rate=16)
        stream.height = stream.width = SIDE
        container.start_encoding()
    (folder / "text.mp4").write_text("this is no video")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    write(folder / "black.mp4", np.zeros((40, SIDE, SIDE, 3), np.uint8))
    write(folder / "frozen.mp4", moving(1).repeat(40, 0))
    write(folder / "short.mp4", moving(6, seed=5))
    for k, (name, transfer) in enumerate({"hdr.mkv": "smpte2084", "hlg.mkv": "arib-std-b67"}.items()):
        write(folder / name, moving(20, seed=6 + k), codec="libx264", pix_fmt="yuv420p10le", options={
            "x264-params": f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"})  # fmt: skip
    (folder / "lonely.txt").write_text("a caption")
    (folder / "lonely.actions.csv").write_text("a\n1\n")
    clips = imported(tmp_path / "out", folder)
    report, rows = report_of(tmp_path / "out")
    assert names_of(clips) == ["good.mp4"]
    reasons = {name: row["dropped"] for name, row in rows.items() if row["dropped"]}
    starts = {
        "empty.mp4": "corrupt: the file is empty",
        "none.mp4": "corrupt: there is no picture",
        "text.mp4": "corrupt: not a media file",
        "cut.mp4": "corrupt: ",
        "black.mp4": "black",
        "frozen.mp4": "frozen",
        "short.mp4": "too short (under 17 frames)",
        "hdr.mkv": "HDR (PQ)",
        "hlg.mkv": "HDR (HLG)",
    }
    assert set(reasons) == set(starts) and all(reasons[name].startswith(text) for name, text in starts.items()), reasons
    assert set(report["strays"]) == {"lonely.txt", "lonely.actions.csv"}
    assert report["dropped"] == {"HDR": 2, "black": 1, "corrupt": 4, "frozen": 1, "too short": 1}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(text in page for text in ("corrupt: the file is empty", "lonely.txt", "Dropped (9)"))
    assert not rows["none.mp4"]["odd"] and not rows["empty.mp4"]["odd"]  # nothing of them is used


def test_videos_in_which_nothing_moves_are_kept_where_that_is_asked(tmp_path):
    folder = tmp_path / "in"
    for k in range(8):
        write(folder / f"still{k}.mp4", moving(1, seed=k).repeat(40, 0))
    write(folder / "moves.mp4", moving(40, seed=9))
    write(folder / "black.mp4", np.zeros((40, SIDE, SIDE, 3), np.uint8))
    imported(tmp_path / "out", folder, "--frozen", "keep", "--split", "0.5,0,0.5")
    report, rows = report_of(tmp_path / "out")
    assert report["used"] == 9 and report["dropped"] == {"black": 1}
    assert rows["still0.mp4"]["odd"] == ["frozen"] and not rows["moves.mp4"]["odd"]
    assert {rows[f"still{k}.mp4"]["split"] for k in range(8)} == {"train", "test"}, "each is another video"
    for k in range(8):  # the same picture for longer, and in another encoding
        write(folder / f"then{k}.mp4", moving(1, seed=k).repeat(45, 0), options={"crf": "26"})
    write(folder / "twin.mp4", moving(1, seed=0).repeat(40, 0))
    imported(tmp_path / "more", folder, "--frozen", "keep", "--split", "0.5,0,0.5")
    more = report_of(tmp_path / "more")[1]
    assert more["twin.mp4"]["dropped"] == "duplicate of still0.mp4"
    still = [k for k in range(8) if "frozen" in more[f"then{k}.mp4"]["odd"]]  # in others the encoder's noise moves
    assert len(still) >= 5
    for k in still:
        then, split = more[f"then{k}.mp4"], rows[f"still{k}.mp4"]["split"]
        assert then["same_as"] == f"still{k}.mp4" and then["split"] == more[f"still{k}.mp4"]["split"] == split


def test_a_list_that_names_what_is_not_there_loses_that_row_alone(tmp_path):
    write(tmp_path / "here.mp4", moving(20))
    (tmp_path / "list.csv").write_text("path,caption\nhere.mp4,a square\ngone.mp4,nothing\n")
    assert names_of(imported(tmp_path / "out", tmp_path / "list.csv")) == ["here.mp4"]
    assert report_of(tmp_path / "out")[1]["gone.mp4"]["dropped"].startswith("corrupt: ")


def test_names_and_captions_are_of_any_script(tmp_path):
    names = ("日本語 の 動画.mp4", "вперёд.mp4", "كلب.mp4", "e\u0301te\u0301.mp4", "🎬 50% #1.mp4", "two\nlines.mp4")
    folder = tmp_path / "in" / "видео"
    for k, name in enumerate((*names, os.fsdecode(b"latin\xe9.mp4"))):
        write(folder / "plain.mp4", moving(20, seed=k)).rename(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{name[:3]!a} 犬が走る", encoding="utf-8")
        (folder / f"{name[:-4]}.actions.csv").write_text("вперёд,左\n" + "1,0.5\n" * 20, encoding="utf-8")
    clips = imported(tmp_path / "out", folder)
    assert len(clips) == 7 and clips.meta["actions"] == ["вперёд", "左"]
    assert all("犬が走る" in about["caption"] for about in clips.meta["described"])
    assert {about["video"] for about in clips.meta["described"]} >= set(names)
    assert imported(tmp_path / "out", folder).meta == clips.meta  # and a second time


def test_what_comes_before_damage_is_used(tmp_path):
    path = write(tmp_path / "in" / "a.mkv", moving(80), options={"g": "10"})
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    clips = imported(tmp_path / "out", tmp_path / "in")
    assert 40 < clips.lengths("frames")[0] < 75


def test_nothing_usable_is_an_error_with_a_report(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.mp4").touch()
    assert run(tmp_path / "out", tmp_path / "in") == 1
    assert "no video can be used" in capsys.readouterr().err and (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        (".actions.csv", "fire\n" + "1\n" * 7, "7 rows for 20 frames"),
        (".actions.csv", "fire\n" + "37\n" * 20, "reaches 37"),
        (".actions.csv", "fire\n" + "maybe\n" * 20, "no number"),
        (".actions.csv", "fire", "no rows"),
        (".actions.csv", "go left\n" + "1\n" * 20, "names of actions"),
        (".actions.csv", "time,fire\n1,0\n0,1\n", "must rise"),
        (".actions.jsonl", "[1]\n", "no rows of named actions"),
        (".actions.jsonl", "{", "cannot be read"),
        (".poses.npy", np.tile(np.eye(4, dtype=np.float32), (7, 1, 1)), "7 poses for 20 frames"),
        (".poses.npy", np.zeros((20, 3, 4), np.float32), r"floats [F, 4, 4]"),
        (".poses.npy", np.tile(2 * np.eye(4, dtype=np.float32), (20, 1, 1)), "no rotations"),
        (".poses.npy", "text", "no plain NumPy array"),
        (".intrinsics.npy", np.linspace([20, 20, 24, 24], [30, 30, 24, 24], 20), "varies from 20 to 30"),
        (".intrinsics.npy", np.zeros((3, 2)), "fx, fy, cx, cy"),
        (".intrinsics.npy", np.ones((7, 4)), "7 intrinsics for 20 frames"),
    ],
)
def test_what_does_not_belong_to_a_video_is_said(tmp_path, suffix, content, says):
    write(tmp_path / "in" / "a.mp4", moving(20))
    path = tmp_path / "in" / f"a{suffix}"
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content)
    assert run(tmp_path / "out", tmp_path / "in", *ALL) == 1
    assert says in report_of(tmp_path / "out")[1]["a.mp4"]["dropped"]


def test_videos_that_lack_what_others_have_are_left_out(tmp_path):
    for k, text in enumerate(("fire\n" + "1\n" * 20, "fire\n" + "0\n" * 20, "jump\n" + "1\n" * 20, "")):
        write(tmp_path / "in" / f"{k}.mp4", moving(20, seed=k))
        if text:
            (tmp_path / "in" / f"{k}.actions.csv").write_text(text)
    clips = imported(tmp_path / "out", tmp_path / "in")
    rows = report_of(tmp_path / "out")[1]
    assert names_of(clips) == ["0.mp4", "1.mp4"]
    assert rows["2.mp4"]["dropped"] == "other actions: jump, most videos have fire"
    assert rows["3.mp4"]["dropped"] == "no actions: others have them beside the video"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--split", "0.9,0.2,0.1"), "--split"),
        (("--part", "4/3"), "--part"),
        (("--min-frames", "400"), "--min-frames 400"),
        (("--audio", "rate=16001"), "audio.rate"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, many, capsys, options, says):
    assert run(tmp_path / "out", many, *options) == 1
    assert says in capsys.readouterr().err


def test_sizes_that_are_no_whole_latents_are_refused(tmp_path, many, capsys, tiny_codec_path):
    assert run(tmp_path / "out", many, "--size", "18x16", "--codec", str(tiny_codec_path)) == 1
    assert "multiples of 4" in capsys.readouterr().err


def floats(path, samples):
    """A video with float sound of these very samples."""
    with av.open(str(path), "w") as container:
        video, audio = (
            container.add_stream("mpeg4", rate=10),
            container.add_stream("pcm_f32le", rate=16_000, layout="mono"),
        )
        video.height, video.width, video.pix_fmt = 16, 16, "yuv420p"
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def test_sound_that_is_no_number_is_refused_and_too_loud_sound_is_cut_off(tmp_path):
    tone = np.full(1600, 0.25, np.float32)
    tone[800:] = 50.0
    heard = sound_of(floats(tmp_path / "loud.mkv", tone), 0.0, 0.1, 16_000)
    assert heard[400] == 0.25 and heard[1200] == 1.0 and np.abs(heard).max() <= 1
    tone[10] = np.nan
    with pytest.raises(MediaError, match="not finite"):
        sound_of(floats(tmp_path / "nan.mkv", tone), 0.0, 0.1, 16_000)
