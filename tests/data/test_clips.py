"""Data folders: order without state, clips that start from a picture, teacher trajectories, damage."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ACTIONS, DIT, SHAPE, random_dit
from tiny_training import FRAMES, NUM_ACTIONS, flow_stage, write_frames, write_latents

from vidistill.checkpoint import export
from vidistill.codecs.tiny import TinyCodec
from vidistill.data import shards
from vidistill.data.clips import Clips
from vidistill.data.ode_pairs import sampler_levels, write_trajectories
from vidistill.data.shards import DataError
from vidistill.data.types import Batch
from vidistill.diffusion import NoiseSchedule
from vidistill.models.student import StudentConfig
from vidistill.sampling import sample
from vidistill.training.losses import LossConfig
from vidistill.training.trainer import Trainer

NOISE = NoiseSchedule(2.0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("data") / "latents")


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.cond.per_frame["modulation"], b.cond.per_frame["modulation"])


def test_a_batch_depends_on_seed_and_step_alone(latents):
    first, second = Clips(latents), Clips(latents)
    first.latents(4, FRAMES, 0, 0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert same(first.latents(4, FRAMES, 1, 7), second.latents(4, FRAMES, 1, 7))
    assert not same(first.latents(4, FRAMES, 1, 7), first.latents(4, FRAMES, 1, 8))
    assert not same(first.latents(4, FRAMES, 1, 7), first.latents(4, FRAMES, 2, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_clip_starts_from_a_picture_and_leaves_the_data_as_it_is(tmp_path, dtype):
    clips = Clips(write_latents(tmp_path / "latents", dtype=dtype))
    before = {k: v.clone() for k, v in clips.tensors.items()}
    e, s = 2, 3
    batch = clips.gather([(e, s)], FRAMES)
    assert batch.given == 1 and batch.x.dtype == torch.float32
    assert torch.equal(batch.x[0, 0], clips.tensors["images"][e, s].float())
    assert torch.equal(batch.x[0, 1:], clips.tensors["latents"][e, s + 1 : s + FRAMES].float())
    actions = batch.cond.per_frame["modulation"][0]
    assert not actions[0, :-1].any() and actions[0, -1] == 1
    assert torch.equal(actions[1:], clips.tensors["actions"][e, s + 1 : s + FRAMES])
    assert all(torch.equal(before[k], clips.tensors[k]) for k in before)


def test_windows_cover_all_starts_and_no_more(latents):
    clips = Clips(latents)
    starts = {s for step in range(40) for _, s in clips.windows(8, 14, 0, step, "latents")}
    assert starts == {0, 1, 2}
    starts = {s for step in range(40) for _, s in clips.windows(8, 8, 0, step, "latents", stride=4)}
    assert starts == {0, 4, 8}


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    def broken():
        yield {"x": torch.zeros(1)}, [{}]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(tmp_path / "d", broken(), {})
    assert not (tmp_path / "d").exists()
    with pytest.raises(FileNotFoundError, match="vidistill data"):
        Clips(tmp_path / "d")
    with pytest.raises(DataError, match="no episodes"):
        shards.write_shards(tmp_path / "d", [], {})


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        shards.write_shards(tmp_path / "d", [({"x": torch.zeros(1)}, [{}])], {})
    assert not (tmp_path / "d").exists()


def test_damaged_data_is_named(tmp_path):
    folder = write_latents(tmp_path / "d")
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard-00000.safetensors.*damaged"):
        Clips(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00000.safetensors is missing"):
        Clips(folder)
    (folder / shards.META).write_text("{")
    with pytest.raises(DataError, match=r"meta.json is damaged"):
        Clips(folder)


def test_data_of_another_kind_is_refused(tmp_path, latents):
    frames = Clips(write_frames(tmp_path / "frames"))
    assert frames.kind == "frames" and Clips(latents).kind == "latents"
    with pytest.raises(DataError, match="frames, latents"):
        frames.latents(1, 2, 0, 0)
    with pytest.raises(DataError, match="latents, trajectories"):
        Clips(latents).trajectories(1, 0, 0)


def test_latents_of_a_shard_are_the_encoded_stream(tmp_path, tiny_codec_path):
    from vidistill.checkpoint import load

    codec = load(tiny_codec_path, "codec").net
    assert isinstance(codec, TinyCodec)
    frames = torch.randint(0, 256, (2, 9, 16, 16, 3), dtype=torch.uint8)
    tensors = {"frames": frames, "actions": torch.rand(2, 9, 4), "poses": torch.rand(2, 9, 3)}
    out, _ = shards.latent_shard((tensors, [{}, {}]), codec)
    px = frames.permute(0, 1, 4, 2, 3).float() / 255
    torch.testing.assert_close(out["latents"].float(), codec.encode(px), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(out["images"][:, 1].float(), codec.encode(px[:, 4:5])[:, 0], atol=2e-3, rtol=2e-3)
    assert out["actions"].shape == (2, 3, NUM_ACTIONS) and torch.equal(out["poses"], tensors["poses"][:, ::4])


# --- teacher trajectories ---------------------------------------------------------------------------------------------


def test_levels_lie_on_the_list_of_a_sampler_that_is_long_enough():
    levels = [NOISE.warp(u) for u in (1.0, 0.75, 0.5, 0.25)]
    steps, exact = sampler_levels(NOISE, 50, [round(level, 3) for level in levels])
    assert steps == 52 and exact == pytest.approx(levels)
    assert set(exact) <= set(NOISE.steps(52))
    assert sampler_levels(NOISE, 48, levels)[0] == 48


@pytest.mark.parametrize("levels", [(), (0.5,), (1.0, 0.5, 0.7), (1.0, 0.0), (1.0, 1.0)])
def test_levels_that_do_not_fall_from_noise_are_refused(levels):
    with pytest.raises(DataError):
        sampler_levels(NOISE, 4, levels)


def test_levels_on_no_sampler_name_the_nearest():
    with pytest.raises(DataError, match=r"no sampler.*2 to 8 steps .* nearest of 2 steps are \[1.0, 0.6667\]"):
        sampler_levels(NOISE, 2, (1.0, 0.61))


def paths(folder, latents, *, clips=5, bar=None, per_shard=2, net=None):
    steps, levels = sampler_levels(NOISE, 4, (1.0, NOISE.warp(0.5)))
    meta = {"clips": clips, "frames": FRAMES, "seed": 1, "sigmas": list(NOISE.steps(steps)), "levels": list(levels)}
    meta |= {"guidance": 2.0, "fps": 17.5, "actions": list(ACTIONS)}
    recorded = Clips(latents)

    def batch_of(count, i):
        return recorded.latents(count, FRAMES, 1, i)

    write_trajectories(folder, net or random_dit(DIT), batch_of, meta, per_shard, bar)
    return Clips(folder)


def test_trajectories_hold_the_states_of_the_teachers_ode(tmp_path, latents):
    clips, net = paths(tmp_path / "paths", latents), random_dit(DIT)
    assert len(clips) == 5 and clips.kind == "trajectories" and clips.latent_size == (4, 4, 4)
    batch = Clips(latents).latents(2, FRAMES, 1, 0)
    noise = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(1_000_003))
    want = sample(net, noise, NOISE.steps(4), batch.cond, given=batch.x[:, :1], nulls=[batch.cond.null()], scales=[2.0])
    states = clips.tensors["states"]
    assert states.shape == (5, 3, FRAMES, 4, 4, 4) and states.dtype == torch.float16
    torch.testing.assert_close(states[:2, -1].float(), want, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(states[:2, 0, 1:].float(), noise[:, 1:], atol=2e-3, rtol=2e-3)
    assert (states[:, :, 0] == states[:, :1, 0]).all(), "the start picture is clean in every state"
    assert torch.equal(clips.tensors["actions"][:2], batch.cond.per_frame["modulation"])
    drawn = clips.trajectories(3, 0, 4)
    assert drawn.x.shape == (3, 3, FRAMES, 4, 4, 4) and drawn.x.dtype == torch.float32 and drawn.given == 1
    assert same(drawn, clips.trajectories(3, 0, 4)) and not same(drawn, clips.trajectories(3, 0, 5))


def test_stopped_trajectories_go_on_after_the_last_whole_shard(tmp_path, latents):
    whole = paths(tmp_path / "whole", latents)

    class Stop:
        count = 0

        def update(self, size):
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        paths(tmp_path / "paths", latents, bar=Stop())
    assert not (tmp_path / "paths").exists()
    kept = [p.stat().st_mtime_ns for p in sorted((tmp_path / "paths.partial").glob("*.safetensors"))]
    assert len(kept) == 2
    again = paths(tmp_path / "paths", latents)
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "paths").glob("*.safetensors"))][:2] == kept
    assert torch.equal(again.tensors["states"], whole.tensors["states"])


def test_partial_trajectories_of_other_settings_are_neither_mixed_in_nor_lost(tmp_path, latents):
    partial = tmp_path / "paths.partial"
    partial.mkdir()
    (partial / "shard-00000.safetensors").write_bytes(b"of another writer")
    assert len(paths(tmp_path / "paths", latents)) == 5
    shutil.rmtree(tmp_path / "paths")
    partial.mkdir()
    (partial / shards.SETTINGS).write_text(json.dumps({"seed": 9}))
    (partial / "shard-00000.safetensors").write_bytes(b"old")
    with pytest.raises(DataError, match="clips None where 5 is asked"):
        paths(tmp_path / "paths", latents)
    assert (partial / "shard-00000.safetensors").read_bytes() == b"old"


def test_a_regression_stage_trains_on_trajectories(tmp_path, latents):
    clips = paths(tmp_path / "paths", latents)
    export(tmp_path / "teacher", random_dit(DIT), {"card": {}}, torch.float32)
    cfg = replace(
        flow_stage(tmp_path, init=str(tmp_path / "teacher"), data=str(latents)),
        objective="regression",
        data=str(tmp_path / "paths"),
        student=StudentConfig(chunk=3, first_chunk=1),
        loss=LossConfig(levels=(1.0, round(NOISE.warp(0.5), 3))),
    )
    trainer = Trainer(cfg)
    assert trainer.loss.levels == tuple(clips.meta["levels"])
    losses = [trainer.step()["student/loss"] for _ in range(2)]
    assert all(np.isfinite(losses)) and trainer.shape.channels == SHAPE.channels
    with pytest.raises(ValueError, match=r"loss.levels.*not those"):
        Trainer(replace(cfg, loss=LossConfig()))
    with pytest.raises(ValueError, match=r"frames 4.*not those"):
        Trainer(replace(cfg, frames=4))
    with pytest.raises(ValueError, match="latents, trajectories"):
        Trainer(replace(cfg, data=str(latents)))


def test_a_batch_may_carry_a_teachers_sample():
    assert Batch(torch.zeros(1)).target is None
