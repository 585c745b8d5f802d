import numpy as np
import pytest
import torch

from vidistill import cli
from vidistill.data.clips import Clips
from vidistill.worlds import shapes
from vidistill.worlds.shapes import ATTRIBUTES, COLOURS, DISTANCES, GROUNDS, ShapesConfig

SMALL = ShapesConfig(num_frames=9)


def scene(**changes):
    return {"colour": "red", "shape": "circle", "motion": "right", "ground": "black", **changes}


def test_the_same_seed_draws_the_same_clip_and_another_seed_another():
    a, b, c = shapes.record_many(SMALL, [3, 3, 4])
    assert np.array_equal(a.frames, b.frames) and a.caption == b.caption and not np.array_equal(a.frames, c.frames)
    assert a.frames.shape == (9, 32, 32, 3) and all(word in a.caption for word in a.labels.values())


def test_training_never_meets_a_held_out_caption_and_sees_every_word():
    train = [shapes.describe(seed)[0] for seed in shapes.seeds("train", 400)]
    held = [shapes.describe(seed)[0] for seed in shapes.seeds("held_out", 100)]
    assert not {tuple(x.values()) for x in train} & {tuple(x.values()) for x in held}
    judge = [shapes.describe(seed)[0] for seed in shapes.seeds("judge", 300)]
    assert 0 < sum(map(shapes.is_held_out, judge)) < 300
    for name, words in ATTRIBUTES.items():
        assert {x[name] for x in train} == set(words)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)])
def test_shapes_move_where_the_caption_says_and_come_back_on_the_other_side(motion, axis, sign):
    frames = shapes.draw(ShapesConfig(num_frames=120, speed=(0.5, 0.5)), scene(motion=motion), 1).astype(float)
    mass = (frames - GROUNDS["black"]).sum(-1).sum(2 - axis if axis else 2)
    phase = np.unwrap(np.angle(mass @ np.exp(2j * np.pi * np.arange(32) / 32))) * 32 / (2 * np.pi)
    steps = sign * np.diff(phase)
    assert ((steps > 0.4) & (steps < 0.6)).all() and steps.sum() > 32


def test_colour_ground_and_every_shape_are_as_told():
    pictures = {s: shapes.draw(SMALL, scene(shape=s, motion="nowhere"), 2) for s in DISTANCES}
    circle = pictures["circle"]
    assert np.array_equal(circle[0], circle[-1])
    assert {GROUNDS["black"], COLOURS["red"]} <= {tuple(p) for p in circle[0].reshape(-1, 3)}
    flat = list(pictures.values())
    assert all(np.abs(a - b.astype(float)).max() > 100 for i, a in enumerate(flat) for b in flat[:i])


def test_the_command_writes_latents_with_cached_tokens_and_nothing_given(tmp_path, tiny_codec_path):
    out = tmp_path / "latents"
    args = ["data", "shapes", str(out), "--episodes", "3", "--frames", "9", "--codec", str(tiny_codec_path)]
    assert cli.main([*args, "--text", "kind=ngrams", "dim=8", "length=4"]) == 0
    clips = Clips(out)
    batch = clips.latents(2, 2, 0, 0)
    assert batch.given == 0 and batch.cond.tokens.shape == (2, 4, 24) and not batch.cond.per_frame
    assert clips.meta["text"] == {"kind": "ngrams", "dim": 8, "length": 4}
    assert clips.meta["described"][0]["caption"] == shapes.describe(0)[1]
    assert torch.isfinite(batch.x).all()


def test_impossible_clips_are_refused():
    with pytest.raises(ValueError, match="speed"):
        ShapesConfig(speed=(2.0, 1.0))
    with pytest.raises(ValueError, match="split"):
        shapes.seeds("games", 3)
