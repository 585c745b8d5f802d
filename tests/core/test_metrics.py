import math

import pytest
import torch

from vidistill import metrics


def grey(y):
    """Brightness [..., H, W] as a grey picture [..., 3, H, W]."""
    return y.unsqueeze(-3).expand(*y.shape[:-2], 3, *y.shape[-2:])


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def gaussians(n, mean, std, seed=0):
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.cholesky(torch.linalg.inv(torch.cov(x.T)))  # mean 0 and covariance 1, exactly
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def test_sharpness_is_the_slope_of_a_ramp_and_falls_with_blur():
    across = torch.arange(16.0).expand(16, 16)
    assert metrics.sharpness(grey(across * 0.03)) == pytest.approx(0.03, rel=1e-4)
    assert metrics.sharpness(grey(across * 0.03 + across.T * 0.04)) == pytest.approx(0.05, rel=1e-4)
    px = noise(2, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(px, 3, 1, 1)
    assert (metrics.sharpness(blurred) < 0.6 * metrics.sharpness(px)).all()


def test_saturation_is_the_spread_of_the_channels_and_zero_for_grey():
    px = torch.tensor([0.9, 0.5, 0.2])[:, None, None].expand(3, 4, 4)
    assert metrics.saturation(px) == pytest.approx(0.7)
    assert metrics.saturation(grey(noise(4, 4))) == 0


def test_contrast_is_the_deviation_of_the_brightness():
    half = torch.cat((torch.full((4, 2), 0.2), torch.full((4, 2), 0.8)), dim=1)
    assert metrics.contrast(grey(half)) == pytest.approx(0.3, rel=1e-5)
    assert metrics.contrast(grey(torch.full((4, 4), 0.7))) == pytest.approx(0, abs=1e-6)


def test_luma_weighs_green_most_and_keeps_white():
    assert metrics.luma(torch.ones(3, 2, 2)) == pytest.approx(torch.ones(2, 2))
    red, green, blue = (metrics.luma(torch.eye(3)[i][:, None, None]).item() for i in range(3))
    assert green > red > blue > 0


def test_motion_is_the_mean_step_between_frames():
    levels = torch.tensor([0.1, 0.3, 0.3, 0.0])
    clip = levels[:, None, None, None].expand(4, 3, 5, 5)
    assert metrics.motion(clip) == pytest.approx(torch.tensor([0.2, 0.0, 0.3]))


def test_flicker_is_zero_for_a_fade_and_known_for_two_frames_in_turn_and_for_noise():
    fade = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 16, 16)
    blink = torch.tensor([0.2, 0.8] * 5)[:, None, None, None].expand(10, 3, 16, 16)
    white = 0.1 * torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.flicker(fade) == pytest.approx(torch.zeros(7), abs=1e-6)
    assert metrics.flicker(blink) == pytest.approx(torch.full((8,), 1.2))
    assert metrics.flicker(white).mean() == pytest.approx(0.1 * math.sqrt(6) / 8 * math.sqrt(2 / math.pi), rel=0.03)
    assert metrics.flicker(torch.stack((fade[:5], blink[:5]))).shape == (2, 3)


def test_flicker_of_a_pan_is_small_beside_its_motion_and_grows_when_brightness_pulses():
    scene = torch.nn.functional.avg_pool2d(noise(3, 36, 136), 5, 1)
    pan = torch.stack([scene[:, :, 2 * t : 2 * t + 64] for t in range(20)])
    pulse = pan + 0.05 * (torch.arange(20) % 2 - 0.5)[:, None, None, None]
    assert metrics.flicker(pan).mean() < 0.3 * metrics.motion(pan).mean()
    assert metrics.flicker(pulse).mean() > 4 * metrics.flicker(pan).mean()
    assert metrics.motion(pulse).mean() < 2 * metrics.motion(pan).mean()


def test_psnr_of_a_known_error_and_of_an_equal_picture():
    px = torch.full((2, 3, 4, 4), 0.5)
    assert metrics.psnr(px + 0.1, px) == pytest.approx(torch.tensor([20.0, 20.0]), rel=1e-4)
    assert metrics.psnr(px, px) == pytest.approx(torch.tensor([100.0, 100.0]))
    assert metrics.mse(px + 0.1, px) == pytest.approx(torch.tensor([0.01, 0.01]), rel=1e-4)
    assert metrics.decibels(torch.tensor(0.001)).item() == pytest.approx(30, rel=1e-5)


@pytest.mark.parametrize("shift", [-7, -3, 0, 4, 9])
def test_horizontal_flow_finds_the_shift_and_its_sign(shift):
    scene = torch.nn.functional.avg_pool2d(noise(3, 68, 164), 5, 1)
    before, after = scene[..., 40:104], scene[..., 40 - shift : 104 - shift]  # content moves right by `shift`
    assert metrics.horizontal_flow(before, after).item() == pytest.approx(shift, abs=0.6)


def test_horizontal_flow_of_a_batch_is_that_of_its_members():
    px = noise(4, 2, 3, 16, 32)
    together = metrics.horizontal_flow(px[:, 0], px[:, 1])
    apart = torch.stack([metrics.horizontal_flow(a, b) for a, b in px])
    assert together.shape == (4,) and torch.equal(together, apart)


def test_frechet_of_gaussians_is_the_closed_form():
    a = gaussians(500, [0.0, 1.0, -2.0], [1.0, 2.0, 0.5])
    b = gaussians(400, [3.0, 1.0, -2.0], [1.0, 1.0, 1.5], seed=1)
    assert metrics.frechet(a, b) == pytest.approx(9 + 0 + 1 + 1, rel=1e-6)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a))


def test_frechet_sees_a_rotation_that_marginals_do_not_show():
    x = gaussians(300, [0.0, 0.0], [1.0, 1.0])
    plus = x @ torch.tensor([[1.0, 0.9], [0.0, math.sqrt(1 - 0.81)]], dtype=torch.float64)
    minus = plus * torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert torch.allclose(plus.std(0), minus.std(0))
    # The root of [[1, .9], [.9, 1]] [[1, -.9], [-.9, 1]] has trace 2 sqrt(1 - .81).
    assert metrics.frechet(plus, minus) == pytest.approx(4 - 4 * math.sqrt(1 - 0.81), rel=1e-6)


def test_frechet_survives_fewer_samples_than_dimensions():
    few = gaussians(200, [0.0] * 8, [1.0] * 8)[:5]
    wide = torch.cat((few, torch.zeros(5, 40)), dim=1)
    assert metrics.frechet(wide, wide + 1) == pytest.approx(48, rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "word"),
    [(torch.zeros(5, 65), "64"), (torch.zeros(1, 4), "least 2"), (torch.full((5, 4), math.nan), "finite")],
)
def test_frechet_refuses_what_it_cannot_measure(bad, word):
    with pytest.raises(ValueError, match=word):
        metrics.frechet(bad, torch.zeros(5, 4))


def test_sync_finds_the_shift_of_curves_that_are_just_long_enough():
    curve = torch.randn(8, 19, generator=torch.Generator().manual_seed(0))
    later, now = curve[:, 1:16], curve[:, 3:18]  # 15 frames: what is now comes two frames later in the other
    assert metrics.sync(later, now) == (pytest.approx(1.0), 2)
    with pytest.raises(ValueError, match="T >= 15"):
        metrics.sync(later[:, 1:], now[:, 1:])


def test_balanced_accuracy_counts_every_class_equally_and_skips_ignored_labels():
    true = torch.tensor([0, 0, 0, 0, 1, 1, -100])
    assert metrics.balanced_accuracy(torch.tensor([0, 0, 0, 0, 0, 1, 0]), true, 3) == pytest.approx(0.75)
    assert metrics.balanced_accuracy(torch.zeros(7).long(), true, 3) == pytest.approx(0.5)
    assert math.isnan(metrics.balanced_accuracy(true, torch.full((7,), -100), 3))


def test_ratio_has_no_answer_without_a_reference():
    assert metrics.ratio(3.0, 4.0) == 0.75
    assert math.isnan(metrics.ratio(3.0, 0.0))


def test_pace_compares_steps_and_has_no_answer_beside_what_stands_still():
    curve = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert metrics.pace(0.5 * curve + 3, curve) == pytest.approx(0.5)
    assert math.isnan(metrics.pace(curve, torch.zeros(2, 4)))


def test_drift_compares_the_end_with_the_beginning():
    values = torch.tensor([[1.0, 3.0, 9.0, 3.0, 3.0], [2.0, 2.0, 9.0, 6.0, 0.0]])
    assert metrics.drift(values, 2) == pytest.approx(3 / 2)
    with pytest.raises(ValueError, match="5"):
        metrics.drift(values, 6)


def test_curve_averages_windows_and_streams_and_drops_the_rest():
    values = torch.tensor([[0.0, 2.0, 4.0, 4.0, 99.0], [1.0, 1.0, 0.0, 0.0, 99.0]])
    assert metrics.curve(values, 2) == [1.0, 2.0]
    with pytest.raises(ValueError, match="6"):
        metrics.curve(values, 6)
