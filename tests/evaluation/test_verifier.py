"""What the judge of faces learns from: people, strangers, blends, and faces that have run."""

import numpy as np
import pytest
import torch

from vidistill.evaluation import verifier
from vidistill.evaluation.verifier import EYES, FRAMES, Faces, drawn_faces, run_together, samples
from vidistill.worlds.talker import face
from vidistill.worlds.talker.recorder import is_held_out


class Plain:
    """A codec that changes nothing."""

    def encode(self, px):
        return px

    def decode(self, latents):
        return latents


@pytest.fixture(scope="module")
def people():
    return drawn_faces(9, Plain())


def test_as_many_people_are_drawn_as_asked_for_and_some_frames_have_their_eyes_shut(people):
    assert people.frames.shape == (9, FRAMES, 3, 64, 64) and people.lids.shape == (9, FRAMES)
    assert torch.equal(people.coded, people.frames)
    assert 0.1 < (people.lids == 1).double().mean() < 0.35 and people.lids.min() >= 0


def test_every_second_person_is_like_the_one_before_but_for_one_thing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        look = verifier.person(rng)
        other = verifier.changed(look, rng)
        assert sum(look[name] != other[name] for name in face.IDENTITY) == 1
        assert not is_held_out(look) and not is_held_out(other)


def test_one_sample_in_six_shows_somebody_else_or_a_blend_and_says_so():
    shade = torch.arange(12, dtype=torch.uint8) * 20  # each person is a plain colour, on which nothing can run
    frames = shade.view(-1, 1, 1, 1, 1).expand(-1, FRAMES, 3, 64, 64)
    px, told = samples(Faces(frames, frames, torch.zeros(12, FRAMES)), 300, np.random.default_rng(0))
    alike = (px[:, 1:] - px[:, :1]).abs().amax((1, 2, 3, 4)) < 1e-3
    assert torch.equal(alike, told["same"] == 1)
    assert 0.75 < alike.double().mean() < 0.9
    blended = (px[~alike, 1, 0, 0, 0] * 255 / 10).round() % 2 == 1  # half way between two shades
    assert 0.05 < blended.double().mean() < 0.35


def test_a_face_runs_along_rows_in_one_piece_around_the_eyes():
    px = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for seed in range(8):
        out, whole = run_together(px, np.random.default_rng(seed))
        rows, columns = (out != px).any(0).any(0).nonzero().T
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert not whole and EYES[0][0] <= top and bottom <= EYES[0][1] and EYES[1][0] <= left and right <= EYES[1][1]
        before, after = (x[..., top:bottom, left:right].diff(dim=-1) for x in (px, out))
        left_over = (after * before).sum() / before.square().sum()  # of the picture; what ran is even along a row
        assert 0 <= left_over <= 0.4 + 1e-5 and torch.allclose(after, left_over * before, atol=1e-5)
