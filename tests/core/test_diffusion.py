import itertools

import pytest
import torch

from vidistill.diffusion import (
    NoiseSchedule,
    RowGenerator,
    add_noise,
    decide,
    euler,
    randn_like,
    renoise,
    v_from,
    v_from_blend,
    v_from_x0,
)
from vidistill.diffusion import x0_from_v as to_x0


def pair(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 2, 2, generator=rng, dtype=dtype), torch.randn(
        2, 3, 4, 2, 2, generator=rng, dtype=dtype
    )


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98])
def test_x0_to_velocity_and_back_is_the_identity(sigma):
    x0, eps = pair()
    x = add_noise(x0, eps, sigma)
    v = v_from(x0, eps)
    assert torch.allclose(to_x0(x, v, sigma), x0, atol=1e-6)
    assert torch.allclose(v_from_x0(x, x0, sigma), v, atol=1e-4)


def test_nothing_is_divided_by_zero():
    x0, _ = pair()
    assert torch.isfinite(v_from_x0(x0, x0, 0.0)).all()
    assert torch.equal(add_noise(x0, torch.full_like(x0, 1e9), 0.0), x0)


@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.5, 0.98])
def test_a_blended_prediction_is_the_mean_of_both_estimates_weighed_by_their_errors(sigma):
    x0, eps = pair()
    x, error = add_noise(x0, eps, sigma), 0.03
    guess = x0 + error**0.5 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    other = (sigma / (1 - sigma)) ** 2
    mean = (error * x / (1 - sigma) + other * guess) / (error + other)
    blended = to_x0(x, v_from_blend(x, guess, sigma, error), sigma)
    assert torch.allclose(blended, mean, atol=1e-5)
    wrong = [float((y - x0).square().mean()) for y in (blended, guess, x / (1 - sigma))]
    assert wrong[0] < 1.1 * min(wrong[1:])


def test_a_blended_prediction_believes_the_head_alone_at_pure_noise_and_is_finite_without_noise():
    x0, eps = pair()
    assert torch.allclose(v_from_blend(eps, x0, 1.0, 0.03), eps - x0, atol=1e-6)
    assert torch.isfinite(v_from_blend(x0, eps, 0.0, 0.03)).all()


def test_a_prediction_in_half_precision_is_computed_in_double():
    x0, eps = pair()
    sigma = 0.8333333
    x, v = add_noise(x0, eps, sigma).bfloat16(), v_from(x0, eps).bfloat16()
    exact = (x.double() - sigma * v.double()).bfloat16()
    assert torch.equal(to_x0(x, v, torch.tensor(sigma, dtype=torch.float64)), exact)


def test_steps_fall_from_one_and_leave_zero_out():
    steps = NoiseSchedule(shift=5.0).steps(4)
    assert steps[0] == 1.0 and steps == tuple(sorted(steps, reverse=True)) and steps[-1] > 0
    assert steps == pytest.approx((1.0, 0.9375, 0.8333333, 0.625))


def test_levels_drawn_for_training_stay_inside_their_bounds():
    noise = NoiseSchedule(shift=3.0, logit_normal=False)
    drawn = noise.sample(2000, 1, torch.Generator().manual_seed(0), lo=0.2, hi=0.7)
    assert noise.warp(0.2) <= float(drawn.min()) and float(drawn.max()) <= noise.warp(0.7)


def test_an_oracle_reaches_x0_by_both_transitions():
    x0, eps = pair()
    x, rng = eps, torch.Generator().manual_seed(1)
    levels = [1.0, 0.7, 0.3, 0.0]
    for step in (euler, renoise):
        x = eps
        for now, after in itertools.pairwise(levels):
            s, n = (torch.full((2, 3), level) for level in (now, after))
            v = v_from_x0(x, x0, s)
            x = step(x, x0, v, s, n, rng if after else None)
        assert torch.allclose(x, x0, atol=1e-6)


def test_recorded_draws_take_the_place_of_a_generator():
    x, eps = pair()
    assert randn_like(x, lambda like: eps) is eps


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match="shift"):
        NoiseSchedule(shift=0)


def test_a_row_draws_the_same_wherever_a_batch_is_cut():
    whole, second = (RowGenerator(torch.Generator().manual_seed(3), first, n) for first, n in ((0, 4), (2, 2)))
    a, b = whole.draw(torch.randn, (4, 3, 5)), second.draw(torch.randn, (2, 3, 5))
    assert torch.equal(a[2:], b) and len({float(x) for x in a.flatten()}) == a.numel()
    twice = RowGenerator(torch.Generator().manual_seed(3), 0, 2).draw(torch.randn, (6, 5))  # three a row
    assert twice.shape == (6, 5) and len({float(x) for x in twice.flatten()}) == 30
    with pytest.raises(ValueError, match="2 rows"):
        second.draw(torch.randn, (3, 2))


def test_what_all_rows_share_is_drawn_from_the_generator_itself():
    plain, rows = (torch.Generator().manual_seed(5) for _ in range(2))
    assert [decide(10**6, plain) for _ in range(3)] == [decide(10**6, RowGenerator(rows, 1, 2)) for _ in range(3)]


def test_noise_of_rows_on_a_device_that_draws_nothing_has_its_shape():
    x = torch.zeros(2, 3, device="meta")
    noise = RowGenerator(torch.Generator(), 0, 2)(x)
    assert noise.device.type == "meta" and noise.shape == x.shape
