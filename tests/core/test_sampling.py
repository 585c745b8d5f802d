import pytest
import torch
from tiny_nets import clip, condition, tiny_dit

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import NoiseSchedule
from vidistill.sampling import guided, sample, trajectory

SIGMA = torch.full((1, 9), 0.6)


class Counting:
    """A denoiser that says how many clips it was asked about."""

    def __init__(self, net):
        self.net, self.clips = net, 0

    def velocity(self, x, sigma, cond):
        self.clips += x.shape[0]
        return self.net.velocity(x, sigma, cond)


@torch.no_grad()
def test_guidance_is_the_unconditional_velocity_plus_the_scaled_difference():
    net, x, cond = tiny_dit(), clip(), condition()
    c, u = net.velocity(x, SIGMA, cond), net.velocity(x, SIGMA, cond.null())
    got = guided(net, x, SIGMA, cond, [cond.null()], [4.0])
    assert torch.allclose(got, u + 4 * (c - u), atol=1e-5)
    assert torch.allclose(got, c + 3 * (c - u), atol=1e-5)  # papers that count from c call this 3


@torch.no_grad()
def test_clips_below_the_floor_are_not_guided():
    net, x, cond = tiny_dit(), clip(batch=2), condition(batch=2)
    sigma = torch.tensor([[0.0] + 8 * [0.9], [0.0] + 8 * [0.7]])  # the first frame is given
    plain = net.velocity(x, sigma, cond)
    fully = guided(net, x, sigma, cond, [cond.null()], [4.0])
    got = guided(net, x, sigma, cond, [cond.null()], [4.0], floor=0.8)
    assert not torch.allclose(fully[1], plain[1], atol=1e-3)
    torch.testing.assert_close(got, torch.stack((fully[0], plain[1])))


@torch.no_grad()
def test_a_scale_of_one_asks_the_network_once():
    net = Counting(tiny_dit())
    guided(net, clip(), SIGMA, condition(), [condition().null()], [1.0])
    assert net.clips == 1
    guided(net, clip(), SIGMA, condition(), [condition().null()], [2.0])
    assert net.clips == 3


@torch.no_grad()
def test_two_conditions_have_a_scale_each():
    net, x, full, text = tiny_dit(), clip(), condition(seed=2), condition(seed=5)
    v = [net.velocity(x, SIGMA, c) for c in (full, text, full.null())]
    got = guided(net, x, SIGMA, full, [text, full.null()], [5.0, 4.0])
    assert torch.allclose(got, v[2] + 5 * (v[0] - v[1]) + 4 * (v[1] - v[2]), atol=1e-5)


def test_a_negative_prompt_takes_the_place_of_zeros():
    negative = torch.ones(1, 6, 8)
    cond = Condition(tokens=condition().tokens, negative=negative)
    assert torch.equal(cond.null().tokens, negative)
    assert torch.equal(cond.drop(torch.tensor([False])).tokens, negative)


def test_scales_and_null_conditions_must_match():
    with pytest.raises(ValueError, match=r"guidance.*got 1 for 0"):
        guided(tiny_dit(), clip(), SIGMA, condition(), [], [2.0])


class Oracle:
    def __init__(self, x0):
        self.x0 = x0

    def velocity(self, x, sigma, cond):
        return (x - self.x0) / sigma.clamp_min(1e-6)[..., None, None, None]


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_an_oracle_is_sampled_exactly(steps):
    x0 = clip(seed=4)
    out = sample(Oracle(x0), clip(seed=5), NoiseSchedule(shift=3.0).steps(steps), Condition())
    assert torch.allclose(out, x0, atol=1e-5)


@pytest.mark.parametrize("held", [0, 1, 3])
def test_on_its_way_every_frame_that_is_not_given_is_as_noisy_as_the_level_says(held):
    x0, noise = clip(seed=4), clip(seed=5)
    given = x0[:, :held] if held else None
    for level, x in trajectory(Oracle(x0), noise, (1.0, 0.7, 0.2), Condition(), given=given):
        assert torch.allclose(x[:, held:], ((1 - level) * x0 + level * noise)[:, held:], atol=1e-5)


def test_given_frames_stay_and_are_told_to_be_clean():
    told, given = [], clip(2, seed=6)

    class Listening(Oracle):
        def velocity(self, x, sigma, cond):
            told.append((sigma.clone(), x[:, :2].clone()))
            return super().velocity(x, sigma, cond)

    states = list(trajectory(Listening(clip()), clip(seed=5), (1.0, 0.5), Condition(), given=given))
    assert [level for level, _ in states] == [1.0, 0.5, 0.0]
    assert all(s[0, :2].eq(0).all() and s[0, 2:].gt(0).all() and torch.equal(x, given) for s, x in told)
    assert torch.equal(states[-1][1][:, :2], given)
