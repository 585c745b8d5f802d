"""Episodes of several lengths in one folder: on disk, encoded, and drawn as windows."""

import numpy as np
import pytest
import torch
from tiny_training import codec_stage

from vidistill.checkpoint import load
from vidistill.data import shards
from vidistill.data.clips import Clips
from vidistill.data.shards import DataError
from vidistill.data.types import count_episodes, pack_rows, row_lengths, unpack_rows
from vidistill.training.trainer import Trainer

LENGTHS = (5, 9, 14, 9, 9)


def episodes():
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (n, 16, 16, 3), generator=rng, dtype=torch.uint8) for n in LENGTHS]


def write(folder, frames, per_shard=3):
    parts = [frames[i : i + per_shard] for i in range(0, len(frames), per_shard)]
    whole = [(pack_rows("frames", part), [{}] * len(part)) for part in parts]
    shards.write_shards(folder, whole, {"fps": 10.0})
    return folder


def test_episodes_come_back_as_they_were_written(tmp_path):
    frames = episodes()
    clips = Clips(write(tmp_path / "d", frames))
    assert len(clips) == 5 and clips.lengths("frames") == list(LENGTHS) and clips.ragged
    assert all(torch.equal(clips.episode("frames", k), x) for k, x in enumerate(frames))
    with pytest.raises(DataError, match="several lengths"):
        clips.tensors  # noqa: B018


def test_shards_of_other_lengths_are_ragged_too(tmp_path):
    clips = Clips(write(tmp_path / "d", episodes()[:3], per_shard=1))
    assert clips.ragged and clips.lengths("frames") == [5, 9, 14]


def test_packing_keeps_one_tensor_where_lengths_agree():
    same = [torch.zeros(4, 2), torch.ones(4, 2)]
    packed = pack_rows("x", same)
    assert list(packed) == ["x"] and packed["x"].shape == (2, 4, 2)
    assert count_episodes(packed) == 2 and row_lengths(packed, "x") == [4, 4]
    other = pack_rows("x", [torch.zeros(4, 2), torch.ones(1, 2)])
    assert count_episodes(other) == 2 and row_lengths(other, "x") == [4, 1]
    assert torch.equal(unpack_rows(other, "x", 1), torch.ones(1, 2))


def test_every_window_that_fits_is_as_likely_as_any_other(tmp_path):
    clips = Clips(write(tmp_path / "d", episodes()))
    drawn = [w for step in range(400) for w in clips.windows(8, 9, 0, step, "frames")]
    counts = {w: drawn.count(w) for w in set(drawn)}
    assert set(counts) == {(1, 0), (3, 0), (4, 0), *((2, s) for s in range(6))}
    assert min(counts.values()) > 0.75 * np.mean(list(counts.values()))
    assert clips.windows(8, 9, 3, 4, "frames") == Clips(tmp_path / "d").windows(8, 9, 3, 4, "frames")
    assert {s for step in range(50) for _, s in clips.windows(8, 5, 0, step, "frames", stride=4)} == {0, 4, 8}
    with pytest.raises(DataError, match=r"15 frames.*episodes of 14"):
        clips.windows(1, 15, 0, 0, "frames")


def test_a_shard_of_several_lengths_is_encoded_an_episode_at_a_time(tmp_path, tiny_codec_path):
    codec = load(tiny_codec_path, "codec").net
    frames = episodes()[:3]
    actions = [torch.rand(len(x), 4) for x in frames]
    tensors = pack_rows("frames", frames) | pack_rows("actions", actions) | {"tokens": torch.rand(3, 2, 8)}
    out, _ = shards.latent_shard((tensors, [{}] * 3), codec)
    assert row_lengths(out, "latents") == [2, 3, 4] == row_lengths(out, "actions") == row_lengths(out, "images")
    alone, _ = shards.latent_shard(({"frames": frames[2][None, :13], "actions": actions[2][None, :13]}, [{}]), codec)
    assert torch.equal(unpack_rows(out, "latents", 2), alone["latents"][0])
    assert torch.equal(unpack_rows(out, "actions", 2), alone["actions"][0])
    assert torch.equal(out["tokens"], tensors["tokens"])
    shards.write_shards(tmp_path / "latents", [(out, [{}] * 3)], {"fps": 10.0, "temporal": 4, "actions": list("abcd")})
    batch = Clips(tmp_path / "latents").latents(4, 3, 0, 0)
    assert batch.x.shape == (4, 3, 4, 4, 4) and batch.cond.per_frame["modulation"].shape == (4, 3, 17)


def test_a_codec_trains_on_episodes_of_several_lengths(tmp_path):
    write(tmp_path / "frames", episodes())
    cfg = codec_stage(tmp_path, steps=2)
    trainer = Trainer(cfg)
    assert trainer.step()["student/loss"] > 0
