"""`vidistill data latents`: frames that are there, encoded."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from tiny_training import write_frames, write_latents

from vidistill.checkpoint import load
from vidistill.cli.main import main
from vidistill.data import shards as shards_module
from vidistill.data.clips import Clips
from vidistill.data.importers.write import Part, write_split
from vidistill.data.shards import DataError, latent_shard, write_shards
from vidistill.data.types import pack_rows


def run(out, source, codec, *options):
    return main(["data", "latents", str(out), "--from", str(source), "--codec", str(codec), *options])


def test_frames_become_the_latents_of_their_shards(tmp_path, tiny_codec_path):
    rows = [[torch.randint(0, 256, (n, 16, 16, 3), dtype=torch.uint8) for n in part] for part in ((9, 14), (9, 9))]
    shards = [(pack_rows("frames", part), [{"seed": k} for k in range(2)]) for part in rows]
    write_shards(tmp_path / "in", shards, {"fps": 12.0, "given": 1, "source": "mine"})
    assert run(tmp_path / "out", tmp_path / "in", tiny_codec_path) == 0
    clips, codec = Clips(tmp_path / "out"), load(tiny_codec_path, "codec").net
    want = [latent_shard(shard, codec)[0] for shard in shards]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(clips.parts, want, strict=True) for name in b)
    assert clips.lengths("latents") == [3, 4, 3, 3] and clips.meta["described"] == [{"seed": 0}, {"seed": 1}] * 2
    assert (clips.meta["codec"], clips.meta["source"], clips.meta["fps"]) == (str(tiny_codec_path), "mine", 12.0)


def test_pictures_of_a_long_clip_are_encoded_a_few_at_a_time(tiny_codec_path, monkeypatch):
    codec, sizes = load(tiny_codec_path, "codec").net, []
    frames = torch.randint(0, 256, (1, 33, 16, 16, 3), dtype=torch.uint8)
    (whole, _) = latent_shard(({"frames": frames}, [{}]), codec)
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda px: sizes.append(len(px)) or encode(px))
    monkeypatch.setattr(shards_module, "PICTURE_PX", 4 * 16 * 16)
    (parts, _) = latent_shard(({"frames": frames}, [{}]), codec)
    assert sizes == [1, 4, 4, 1], "the clip, and nine pictures"
    torch.testing.assert_close(parts["images"], whole["images"], rtol=2e-3, atol=2e-3)
    assert torch.equal(parts["latents"], whole["latents"])


def test_all_splits_of_a_folder_are_encoded_in_parts(tmp_path, tiny_codec_path, capsys):
    for split in ("train", "test"):
        write_frames(tmp_path / "in" / split)
    assert run(tmp_path / "out", tmp_path / "in", tiny_codec_path, "--part", "2/2") == 0
    assert "part 2 is written" in capsys.readouterr().out
    assert run(tmp_path / "out", tmp_path / "in", tiny_codec_path, "--part", "1/2") == 0
    assert {p.name for p in (tmp_path / "out").glob("*/meta.json") for p in [p.parent]} == {"train", "test"}


def test_what_cannot_be_encoded_is_said(tmp_path, tiny_codec_path, capsys):
    write_latents(tmp_path / "latents")
    write_frames(tmp_path / "odd", side=18)
    for source, says in (("none", "no frames in it"), ("latents", "frames are needed"), ("odd", "multiples of 4")):
        assert run(tmp_path / "out", tmp_path / source, tiny_codec_path) == 1
        assert says in capsys.readouterr().err


def held(write, folder, begun, go_on):
    """Write two shards as another process does that has not got far."""

    def make(i):
        begun.set()
        assert go_on.wait(60)
        return {"frames": torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{"seed": i}]

    write(folder, make)


def by_parts(folder, make):
    assert write_split(folder, 2, make, {"fps": 10.0})


def at_once(folder, make):
    write_shards(folder, (make(i) for i in range(2)), {"fps": 10.0})


@pytest.mark.parametrize("write", [by_parts, at_once])
def test_a_folder_that_another_process_writes_is_left_alone(tmp_path, write):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "d"
    begun, go_on = context.Event(), context.Event()
    other = context.Process(target=held, args=(write, folder, begun, go_on))
    other.start()
    try:
        assert begun.wait(60)
        with pytest.raises(DataError, match=r"d\.partial is"):
            write(folder, lambda i: pytest.fail("the same shard was made twice"))
    finally:
        go_on.set()
        other.join(60)
    assert other.exitcode == 0 and [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["d"]
    names = ["meta.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names and len(Clips(folder)) == 2


def forked(folder, gone):
    """Begin to write shards as one does whose workers are forked, and tell their process id."""

    def make(i):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.start()
        gone.put(worker.pid)
        time.sleep(600)

    at_once(folder, make)


def test_workers_of_a_killed_process_hold_no_folder(tmp_path):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "d"
    pid = context.Queue()
    writer = context.Process(target=forked, args=(folder, pid))
    writer.start()
    worker = pid.get(timeout=60)
    try:
        writer.kill()
        writer.join()  # with a timeout it would wait for the pipe that the worker holds open
        at_once(folder, lambda i: ({"frames": torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{}]))
    finally:
        os.kill(worker, signal.SIGKILL)
    assert len(Clips(folder)) == 2


def test_what_a_process_left_that_was_killed_is_written_again(tmp_path):
    def killed(i):
        if i:
            raise KeyboardInterrupt
        return {"frames": torch.ones(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{}]

    for write in (by_parts, at_once):
        folder = tmp_path / write.__name__
        with pytest.raises(KeyboardInterrupt):
            write(folder, killed)
        (folder.with_name(folder.name + ".partial") / ".strange").mkdir()
        write(folder, lambda i: ({"frames": torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{}]))
        assert len(Clips(folder)) == 2


def test_a_part_stops_once_another_process_has_written_all(tmp_path):
    def make(i):
        if not (tmp_path / "d").is_dir():
            by_parts(tmp_path / "d", lambda k: ({"frames": torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{}]))
        return {"frames": torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8)}, [{}]

    assert write_split(tmp_path / "d", 2, make, {"fps": 10.0}, part=Part(0, 2))
    assert not (tmp_path / "d.partial").exists() and len(Clips(tmp_path / "d")) == 2
