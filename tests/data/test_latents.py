"""`vidistill data latents`: frames that are there, encoded."""

import torch
from tiny_training import write_frames, write_latents

from vidistill.checkpoint import load
from vidistill.cli.main import main
from vidistill.data.clips import Clips
from vidistill.data.shards import latent_shard, write_shards
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
