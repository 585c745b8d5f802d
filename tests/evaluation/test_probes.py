import json

import numpy as np
import pytest
import torch
from tiny_walks import FAR, SPEED, write_walks

from vidistill import checkpoint
from vidistill.data.clips import Clips
from vidistill.evaluation import probes
from vidistill.evaluation.probes import IGNORED, Probe, ProbeConfig
from vidistill.worlds.doom.labels import TURNS, WALKS, action_labels, visible_walks

TINY = ProbeConfig(size=16, unshuffle=2, widths=(24, 32), features=16, textures=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("walks")
    train = write_walks(root / "train", num=8, length=80, split="train")
    return train, write_walks(root / "held", num=3, length=60, first=100)


@pytest.fixture(scope="module")
def trained(folders):
    losses = []
    probe = probes.train_probes(folders[0], steps=250, batch=48, lr=8e-3, cfg=TINY, progress=losses.append)
    return probe, losses


def test_a_trained_probe_reads_action_and_wall_from_pictures_of_other_walks(trained, folders):
    figures = probes.probe_figures(trained[0], folders[1], stride=2)
    assert figures["turn"] > 0.9 and figures["walk"] > 0.85 and figures["texture"] > 0.85, figures
    assert figures["texture_chance"] == 1 / 5


def test_training_reports_every_head_and_the_losses_fall(trained):
    losses = trained[1]
    assert len(losses) == 250 and set(losses[0]) == {"turn", "walk", "texture", "distance", "damage"}
    for name in ("turn", "walk", "texture"):
        assert np.mean([row[name] for row in losses[-20:]]) < 0.5 * losses[0][name], name


def test_features_are_standardised_on_real_video_and_move_when_it_is_blurred(trained, folders):
    px = torch.from_numpy(Clips(folders[1]).tensors["frames"].numpy()).permute(0, 1, 4, 2, 3).float() / 255
    real = probes.read(trained[0], px).features.flatten(0, 1)
    assert real.mean(0).abs().max() < 1.2 and 0.4 < real.std(0).mean() < 1.8
    blurred = torch.nn.functional.avg_pool2d(px.flatten(0, 1), 5, 1, 2).view_as(px)
    moved = probes.read(trained[0], blurred).features.flatten(0, 1)
    assert (moved.mean(0) - real.mean(0)).norm() > 1


def test_reading_a_clip_gives_every_stride_th_frame_whatever_the_batch(trained):
    px = torch.rand(3, 12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = probes.read(trained[0], px, stride=2)
    parts = probes.read(trained[0], px, stride=2, batch=1)
    assert whole.times.tolist() == [2, 4, 6, 8, 10] and whole.features.shape == (3, 5, 16)
    assert torch.allclose(whole.features, parts.features, atol=1e-4) and torch.equal(
        whole.labels["turn"], parts.labels["turn"]
    )


def test_a_stack_holds_two_frames_before_and_one_after():
    px = torch.arange(8.0)[None, :, None, None, None].expand(1, 8, 3, 2, 2)
    assert probes.stack_frames(px, torch.tensor([2, 6]))[0, :, :, 0, 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_action_labels_follow_the_order_of_the_recorder():
    left, right, forward, backward = torch.eye(4)
    turn, walk = action_labels(torch.stack([left, right, forward, backward, left + forward, torch.zeros(4)]))
    assert [TURNS[i] for i in turn] == ["left", "right", "none", "none", "left", "none"]
    assert [WALKS[i] for i in walk] == ["none", "none", "forward", "backward", "forward", "none"]


def test_a_step_that_a_wall_stops_has_no_label():
    poses = torch.zeros(1, 4, 3)
    poses[0, 1:, 0] = SPEED / 64  # the first step moves, the others do not
    walk = visible_walks(torch.tensor([[2, 2, 2, 1]]), poses, SPEED)
    assert walk.tolist() == [[IGNORED, 2, IGNORED, 1]]


def test_labels_name_the_wall_in_the_centre_of_view(folders):
    clips = Clips(folders[1])
    labels = probes.labels_of(clips)
    heading = clips.tensors["poses"][..., 2]
    expected = ((heading / (2 * np.pi) * 4 + 0.5).floor().long()) % 4
    inside = ((heading / (2 * np.pi) * 4) % 1 - 0.5).abs() > 0.1  # not at a corner
    assert torch.equal(labels["texture"][inside], expected[inside])
    distance = labels["distance"].expm1() * 64
    assert distance.min() > 0.9 * FAR and distance.max() < 1.1 * FAR * 2**0.5


def test_mirrored_stacks_turn_the_other_way(folders):
    clips = Clips(folders[0])
    own = {**probes.labels_of(clips), "time": torch.arange(80).expand(8, 80)}
    px, labels = probes.draw(clips, own, 200, np.random.default_rng(0))
    centre = px.mean(2)[:, :, :10]  # stripes of the walls, without the floor
    moves = (px[:, 2] - px[:, 1]).abs().mean((1, 2, 3))
    assert centre.shape[0] == 200 and moves[(labels["turn"] == 1) & (labels["walk"] == 1)].max() == 0
    lefts, rights = (px[labels["turn"] == k] for k in (0, 2))
    for stacks, shift in ((lefts, 2), (rights, -2)):  # a left turn moves the picture right
        rolled = stacks[:, 1, :, :10].roll(shift, -1)[..., 2:-2]
        assert torch.equal(rolled, stacks[:, 2, :, :10][..., 2:-2])


def test_damage_hurts_the_first_half_and_says_by_how_much():
    px = torch.rand(64, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hurt, amount = probes.damage(px, torch.Generator().manual_seed(1))
    assert torch.equal(hurt[32:], px[32:]) and not amount[32:].any()
    changed = (hurt[:32] - px[:32]).abs().amax((1, 2, 3, 4))
    assert ((changed > 1e-4) == (amount[:32] != 0).any(1)).all() and (changed > 1e-4).any()
    slope = hurt.diff(dim=-1).abs().mean((1, 2, 3, 4))
    only_blur = (amount[:, 0] > 0.5) & (amount[:, 1:] == 0).all(1)
    assert only_blur.any() and slope[only_blur].max() < 0.8 * slope[32:].min()
    grey, amount = probes.damage(torch.full((256, 4, 3, 16, 16), 0.5), torch.Generator().manual_seed(2))  # noise alone
    assert torch.allclose(grey.std((1, 2, 3, 4)), 0.06 * amount[:, 3], rtol=0.1, atol=1e-4)


def test_class_weights_make_rare_classes_count_as_much():
    weights = probes.class_weights(torch.tensor([0, 0, 0, 1, IGNORED]), 2)
    assert weights.tolist() == pytest.approx([4 / 6, 2])


def test_a_saved_probe_reads_as_before_and_a_foreign_file_is_refused(trained, tmp_path):
    probes.save_probe(tmp_path / "probe", trained[0], {"steps": 250})
    loaded = probes.load_probe(tmp_path / "probe")
    px = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before, after = (probes.read(p, px).features for p in (trained[0], loaded))
    assert loaded.cfg == TINY and (before - after).abs().max() < 0.1
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"kind": "codec"})
    with pytest.raises(checkpoint.CheckpointError, match="codec"):
        probes.load_probe(tmp_path / "other")


def test_making_a_probe_leaves_its_figures_and_seeds_on_the_card(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "train_probes", lambda frames, progress, **kw: Probe(TINY).eval())
    figures = probes.make_probe(*folders, tmp_path / "made", steps=3)
    card = json.loads((tmp_path / "made.json").read_text())["card"]
    assert card["held_out"] == figures and card["steps"] == 3
    assert card["train_seeds"] == [0, 7] and card["held_out_seeds"] == [1_000_100, 1_000_102]
    assert probes.load_probe(tmp_path / "made").cfg == TINY


def test_clips_of_another_size_are_refused():
    with pytest.raises(ValueError, match="16x16"):
        probes.read(Probe(TINY), torch.zeros(1, 8, 3, 32, 32))


def test_the_bundled_probe_is_small_and_reads_pictures_of_doom():
    path = checkpoint.zoo_folder() / f"{probes.BUNDLED}.safetensors"
    assert path.stat().st_size < 1_000_000
    probe = probes.load_probe()
    assert probe.cfg.features <= 64 and probe.cfg.textures == 33
    assert probes.read(probe, torch.rand(1, 6, 3, 64, 64)).features.isfinite().all()
