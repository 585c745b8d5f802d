"""Codecs: streams equal whole clips, causality, published weights, Wan's recorded numbers."""

import itertools
import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vidistill.codecs import CODECS, GEOMETRIES, Compiled, build_codec, codec_record, visibility
from vidistill.codecs.tiny import PUBLISHED, TinyCodec, TinyCodecConfig, smoothed, steadied
from vidistill.codecs.wan import WAN_2_2, WanCodec, WanCodecConfig, _diffusers_name

GOLDEN = Path(__file__).parents[1] / "goldens" / "wan_vae"

TINY = TinyCodecConfig(encoder_widths=(8, 12, 16), decoder_widths=(16, 12, 8))
STRIDED = TinyCodecConfig(
    patch_size=2,
    latent_channels=3,
    encoder_widths=(6, 8, 10, 12),
    encoder_time=(1, 2, 2),
    encoder_space=(2, 1, 1),
    encoder_blocks=(0, 1, 1),
    decoder_widths=(12, 10, 8, 6),
    decoder_time=(2, 1, 2),
    decoder_space=(1, 2, 1),
    decoder_blocks=(1, 2, 1),
)
HALF_TIME = TinyCodecConfig(
    encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), encoder_time=(2, 1), decoder_time=(1, 2)
)
STILL = TinyCodecConfig(encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), encoder_time=(1, 1), decoder_time=(1, 1))
WAN = WanCodecConfig(
    latent_channels=3,
    encoder_width=4,
    decoder_width=4,
    width_multiples=(1, 2, 2),
    temporal=(False, True),
    num_res_blocks=1,
    latent_mean=(0.1, -0.2, 0.3),
    latent_std=(0.5, 1.0, 2.0),
)
WAN_RESIDUAL = WanCodecConfig(
    latent_channels=3,
    encoder_width=4,
    decoder_width=8,
    width_multiples=(1, 2, 4, 4),
    temporal=(
        True,
        True,
        False,
    ),  # a temporal stage that narrows: its shortcut differs between the two frames it makes,
    num_res_blocks=1,
    residual=True,
    patch_size=2,
    latent_mean=(0.1, -0.2, 0.3),
    latent_std=(0.5, 1.0, 2.0),
)
CONFIGS = {
    "tiny": TINY,
    "smooth": replace(TINY, smooth=0.1),
    "strided": STRIDED,
    "half_time": HALF_TIME,
    "still": STILL,
    "wan": WAN,
    "wan_res": WAN_RESIDUAL,
}


def shaken(codec):
    """The codec with random weights everywhere: a fresh one ignores the past, its MemBlocks start at zero."""
    rng = torch.Generator().manual_seed(0)
    for p in codec.parameters():
        std = 0.05 if p.ndim == 1 else p[0].numel() ** -0.5
        p.data.copy_(std * torch.randn(p.shape, generator=rng))
    return codec


@pytest.fixture(params=CONFIGS)
def codec(request):
    torch.manual_seed(0)
    codec = build_codec(CONFIGS[request.param])
    if isinstance(codec, TinyCodec):
        shaken(codec)
        codec.set_normalisation(
            torch.linspace(-0.1, 0.1, codec.latent_channels), torch.full((codec.latent_channels,), 0.3)
        )
    return codec.requires_grad_(False)


def clip(codec, frames=5, batch=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(
        batch, codec.px_frames(frames), 3, 3 * codec.spatial_factor, 2 * codec.spatial_factor, generator=rng
    )


def noise(codec, frames=5, batch=2, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, codec.latent_channels, 3, 2, generator=rng)


SPLITS = [(5,), (1, 1, 1, 1, 1), (1, 4), (2, 3), (3, 1, 1), (4, 1)]


@pytest.mark.parametrize("split", SPLITS)
def test_streamed_decode_equals_whole_decode(codec, split):
    latents = noise(codec)
    state, parts = None, []
    for part in latents.split(split, dim=1):
        px, state = codec.decode_stream(part, state)
        parts.append(px)
    ends = [codec.px_frames(n) for n in accumulate(split)]
    assert [px.shape[1] for px in parts] == [end - start for start, end in zip([0, *ends], ends, strict=False)]
    torch.testing.assert_close(torch.cat(parts, 1), codec.decode(latents), rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_streamed_encode_equals_whole_encode(codec, split):
    px = clip(codec)
    state, parts, start = None, [], 0
    for end in (codec.px_frames(n) for n in accumulate(split)):
        latents, state = codec.encode_stream(px[:, start:end], state)
        parts.append(latents)
        start = end
    assert [part.shape[1] for part in parts] == list(split)
    torch.testing.assert_close(torch.cat(parts, 1), codec.encode(px), rtol=0, atol=1e-6)


def test_shapes_and_ranges_are_as_promised(codec):
    px = clip(codec)
    latents = codec.encode(px)
    assert latents.shape == (2, *codec.latent_shape(*(px.shape[i] for i in (1, 3, 4))))
    decoded = codec.decode(latents)
    assert decoded.shape == px.shape
    assert decoded.dtype == latents.dtype == torch.float32
    assert decoded.min() >= 0 and decoded.max() <= 1


def test_later_px_frames_never_change_earlier_latents(codec):
    px = clip(codec)
    before = codec.encode(px)
    for i in range(1, 5):
        changed = px.clone()
        changed[:, codec.px_frames(i) :] = torch.rand_like(changed[:, codec.px_frames(i) :])
        after = codec.encode(changed)
        torch.testing.assert_close(after[:, :i], before[:, :i], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, i], before[:, i])


def test_later_latents_never_change_earlier_px_frames(codec):
    latents = noise(codec)
    before = codec.decode(latents)
    for i in range(1, 5):
        changed = latents.clone()
        changed[:, i:] = torch.randn_like(changed[:, i:])
        after, end = codec.decode(changed), codec.px_frames(i)
        torch.testing.assert_close(after[:, :end], before[:, :end], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, end:], before[:, end:])


def test_clips_of_a_batch_do_not_mix(codec):
    px, latents = clip(codec), noise(codec)
    torch.testing.assert_close(codec.encode(px)[1:], codec.encode(px[1:]), rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(latents)[1:], codec.decode(latents[1:]), rtol=0, atol=1e-6)


def test_a_state_is_a_value_that_can_be_used_twice(codec):
    latents, px = noise(codec), clip(codec)
    _, state = codec.decode_stream(latents[:, :2])
    once = codec.decode_stream(latents[:, 2:], state)[0]
    assert torch.equal(codec.decode_stream(latents[:, 2:], state)[0], once)
    _, state = codec.encode_stream(px[:, : codec.px_frames(2)])
    once = codec.encode_stream(px[:, codec.px_frames(2) :], state)[0]
    assert torch.equal(codec.encode_stream(px[:, codec.px_frames(2) :], state)[0], once)


def test_wrong_lengths_and_sides_name_what_is_allowed(codec):
    px, t = clip(codec), codec.temporal_factor
    if t > 1:
        with pytest.raises(ValueError, match=rf"1 \+ {t} \* k .*\(1, {1 + t}, {1 + 2 * t}"):
            codec.encode(px[:, :t])
        with pytest.raises(ValueError, match=rf"1 \+ {t} \* k"):
            codec.latent_shape(t, 64, 64)
        state = codec.encode_stream(px[:, :1])[1]
        with pytest.raises(ValueError, match=rf"later chunk.*{t} \* k"):
            codec.encode_stream(px[:, : 1 + t], state)
    with pytest.raises(ValueError, match="1 \\+"):
        codec.encode(px[:, :0])
    with pytest.raises(ValueError, match=f"multiples of {codec.spatial_factor}"):
        codec.encode(px[..., 1:])
    with pytest.raises(ValueError, match=r"expected \[B, f, 3, H, W\]"):
        codec.encode(px.transpose(1, 2))
    with pytest.raises(ValueError, match=f"expected .* {codec.latent_channels}, h, w"):
        codec.decode(noise(codec).transpose(1, 2)[:, :, :1])
    with pytest.raises(ValueError, match="F >= 1"):
        codec.decode(noise(codec)[:, :0])


def test_a_record_rebuilds_the_codec_through_json(codec):
    record = json.loads(json.dumps(codec_record(codec)))
    again = build_codec(record)
    assert type(again) is type(codec) and again.cfg == codec.cfg
    again.load_state_dict(codec.state_dict())
    px = clip(codec, frames=2)
    assert torch.equal(again.encode(px), codec.encode(px))


def test_unknown_names_and_keys_are_refused():
    with pytest.raises(ValueError, match="taew2_1"):
        build_codec("taew9")
    with pytest.raises(ValueError, match="known: tiny, wan"):
        build_codec({"patch_size": 4})
    with pytest.raises(ValueError, match=r"codec_config\.patchsize.*patch_size"):
        build_codec({"family": "tiny", "patchsize": 4})
    assert set(CODECS) == {"tiny", "wan"} and {"tiny", "wan", "wan2_2", "taew2_1"} <= set(GEOMETRIES)


# ---- the tiny codec


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_time": (2, 1)},
        {"decoder_space": (2, 1)},
        {"encoder_blocks": (1,)},
        {"decoder_widths": (64, 32)},
        {"encoder_time": (4, 1)},
        {"encoder_pad": "both"},
        {"latent_channels": 0},
        {"smooth": -0.1},
    ],
)
def test_impossible_tiny_configs_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TinyCodecConfig(**changes)


def test_smoothing_takes_grain_and_leaves_edges():
    rng = torch.Generator().manual_seed(0)
    flat = torch.zeros(1, 2, 3, 12, 10)
    flat[..., 6:, :] = 0.5
    grainy = flat + 0.03 * torch.randn(flat.shape, generator=rng)
    out = smoothed(grainy, 0.08)
    assert (out - flat).square().mean() < 0.15 * (grainy - flat).square().mean()
    torch.testing.assert_close(smoothed(flat, 0.08), flat, rtol=0, atol=1e-6)


def test_smoothing_is_a_mean_weighted_by_likeness():
    rng = torch.Generator().manual_seed(1)
    px, spread, reach = torch.rand(2, 3, 5, 6, generator=rng), 0.3, 2
    expected = torch.zeros_like(px)
    for n, y, x in itertools.product(range(2), range(5), range(6)):
        near = px[n, :, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1].flatten(1)
        weight = torch.exp(-(near - px[n, :, y, x, None]).square().sum(0) / (2 * spread**2))
        expected[n, :, y, x] = (near * weight).sum(1) / weight.sum()
    torch.testing.assert_close(smoothed(px, spread, reach), expected, rtol=0, atol=1e-6)


def test_what_stands_still_does_not_shimmer_and_what_moves_leaves_no_trail():
    rng = torch.Generator().manual_seed(2)
    still = 0.5 + 0.015 * torch.randn(1, 20, 3, 8, 8, generator=rng)
    out = steadied(still, None, 0.08)
    assert torch.equal(out[:, 0], still[:, 0])
    assert out.diff(dim=1).square().mean() < 0.25 * still.diff(dim=1).square().mean()
    cut = torch.zeros(1, 2, 3, 8, 8)
    cut[:, 1] = 0.6
    torch.testing.assert_close(steadied(cut, None, 0.08), cut, rtol=0, atol=1e-6)
    again = steadied(still[:, 5:], out[:, 4], 0.08)
    assert torch.equal(again, out[:, 5:])


def mem_block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.conv.0.weight": (width, 2 * width, 3, 3),
        f"{name}.conv.0.bias": (width,),
        f"{name}.conv.2.weight": (width, width, 3, 3),
        f"{name}.conv.2.bias": (width,),
        f"{name}.conv.4.weight": (width, width, 3, 3),
        f"{name}.conv.4.bias": (width,),
    }


TAEW2_1_SHAPES = {
    "encoder.0.weight": (64, 3, 3, 3),
    "encoder.0.bias": (64,),
    "encoder.2.conv.weight": (64, 128, 1, 1),
    "encoder.3.weight": (64, 64, 3, 3),
    **mem_block("encoder.4", 64),
    **mem_block("encoder.5", 64),
    **mem_block("encoder.6", 64),
    "encoder.7.conv.weight": (64, 128, 1, 1),
    "encoder.8.weight": (64, 64, 3, 3),
    **mem_block("encoder.9", 64),
    **mem_block("encoder.10", 64),
    **mem_block("encoder.11", 64),
    "encoder.12.conv.weight": (64, 64, 1, 1),
    "encoder.13.weight": (64, 64, 3, 3),
    **mem_block("encoder.14", 64),
    **mem_block("encoder.15", 64),
    **mem_block("encoder.16", 64),
    "encoder.17.weight": (16, 64, 3, 3),
    "encoder.17.bias": (16,),
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.1.bias": (256,),
    **mem_block("decoder.3", 256),
    **mem_block("decoder.4", 256),
    **mem_block("decoder.5", 256),
    "decoder.7.conv.weight": (256, 256, 1, 1),
    "decoder.8.weight": (128, 256, 3, 3),
    **mem_block("decoder.9", 128),
    **mem_block("decoder.10", 128),
    **mem_block("decoder.11", 128),
    "decoder.13.conv.weight": (256, 128, 1, 1),
    "decoder.14.weight": (64, 128, 3, 3),
    **mem_block("decoder.15", 64),
    **mem_block("decoder.16", 64),
    **mem_block("decoder.17", 64),
    "decoder.19.conv.weight": (128, 64, 1, 1),
    "decoder.20.weight": (64, 64, 3, 3),
    "decoder.22.weight": (3, 64, 3, 3),
    "decoder.22.bias": (3,),
}


@pytest.fixture(scope="module")
def published_weights():
    rng = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(shape, generator=rng) * (0.05 if len(shape) == 1 else (shape[1] * shape[2] * shape[3]) ** -0.5)
        for key, shape in TAEW2_1_SHAPES.items()
    }


@pytest.fixture(scope="module")
def published(published_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "taew2_1.safetensors"
    save_file(published_weights, path)
    return build_codec("taew2_1", path).requires_grad_(False)


def by_frame(weights, half, layers, frames):
    """TAEHV's rules applied to a list of frames [B, D, h, w], one layer and one frame at a time."""
    for i, kind in enumerate(layers):
        key = f"{half}.{i}"
        weight, bias = weights.get(f"{key}.weight"), weights.get(f"{key}.bias")
        if kind == "clamp":
            frames = [torch.tanh(x / 3) * 3 for x in frames]
        elif kind == "relu":
            frames = [x.relu() for x in frames]
        elif kind == "up":
            frames = [F.interpolate(x, scale_factor=2) for x in frames]
        elif kind in ("conv", "down"):
            frames = [F.conv2d(x, weight, bias, padding=1, stride=2 if kind == "down" else 1) for x in frames]
        elif kind == "pool":
            weight = weights[f"{key}.conv.weight"]
            stride = weight.shape[1] // weight.shape[0]
            frames = [F.conv2d(torch.cat(frames[j : j + stride], 1), weight) for j in range(0, len(frames), stride)]
        elif kind == "grow":
            weight = weights[f"{key}.conv.weight"]
            frames = [y for x in frames for y in F.conv2d(x, weight).split(weight.shape[1], dim=1)]
        elif kind == "mem":
            pasts, out = [torch.zeros_like(frames[0]), *frames], []
            for x, past in zip(frames, pasts, strict=False):
                y = torch.cat([x, past], 1)
                for j in (0, 2, 4):
                    y = F.conv2d(y, weights[f"{key}.conv.{j}.weight"], weights[f"{key}.conv.{j}.bias"], padding=1)
                    y = y.relu() if j < 4 else y
                out.append((y + x).relu())
            frames = out
    return torch.stack(frames, 1)


def test_published_weights_have_exactly_the_expected_keys(published):
    shapes = {key: tuple(value.shape) for key, value in published.state_dict().items()}
    assert shapes == {**TAEW2_1_SHAPES, "latent_mean": (16,), "latent_std": (16,)}
    assert torch.equal(published.latent_mean, torch.zeros(16)) and torch.equal(published.latent_std, torch.ones(16))
    assert (published.spatial_factor, published.temporal_factor, published.latent_channels) == (8, 4, 16)


def test_a_missing_published_weight_is_refused(published_weights):
    incomplete = {key: value for key, value in published_weights.items() if key != "decoder.22.bias"}
    with pytest.raises(RuntimeError, match=r"decoder\.22\.bias"):
        TinyCodec(PUBLISHED["taew2_1"]).load_state_dict(incomplete)


def test_published_weights_compute_taehv(published, published_weights):
    px = torch.rand(2, 9, 3, 16, 24, generator=torch.Generator().manual_seed(2))
    stage = ["pool", "down", "mem", "mem", "mem"]
    frames = [*px.unbind(1), *[px[:, -1]] * 3]
    expected = by_frame(published_weights, "encoder", ["conv", "relu", *stage * 3, "conv"], frames)
    latents = published.encode(px)
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-5)
    stage = ["mem", "mem", "mem", "up", "grow", "conv"]
    layers = ["clamp", "conv", "relu", *stage * 3, "relu", "conv"]
    expected = by_frame(published_weights, "decoder", layers, latents.unbind(1))[:, 3:].clamp(0, 1)
    torch.testing.assert_close(published.decode(latents), expected, rtol=0, atol=2e-5)


def test_an_encoder_that_looks_ahead_refuses_to_stream(published):
    with pytest.raises(ValueError, match="encoder_pad='back'"):
        published.encode_stream(torch.rand(1, 1, 3, 16, 16))


def test_latents_are_normalised_once_with_mean_and_std():
    codec = shaken(TinyCodec(TINY)).requires_grad_(False)
    px, latents = clip(codec), noise(codec)
    raw, plain = codec.encode(px), codec.decode(latents)
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    codec.set_normalisation(mean, std)
    torch.testing.assert_close(codec.encode(px), (raw - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(codec(px)[1], raw)
    torch.testing.assert_close(
        codec.decode((latents - mean[:, None, None]) / std[:, None, None]), plain, rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match="positive"):
        codec.set_normalisation(mean, torch.zeros(16))
    with pytest.raises(ValueError, match="must be \\[16\\]"):
        codec.set_normalisation(mean[:3], std)


def test_training_forward_reaches_every_parameter():
    codec = shaken(TinyCodec(STRIDED))
    px = clip(codec)
    reconstruction, raw = codec(px, noise_std=0.1)
    assert reconstruction.shape == px.shape and raw.shape == (2, *codec.latent_shape(px.shape[1], *px.shape[3:]))
    (F.l1_loss(reconstruction, px) + raw.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())


def test_training_noise_comes_from_the_generator_only():
    codec = shaken(TinyCodec(TINY)).requires_grad_(False)
    px = clip(codec)
    runs = [codec(px, 0.5, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    assert all(torch.equal(run[1], codec(px)[1]) for run in runs)
    torch.testing.assert_close(codec(px)[0].clamp(0, 1), codec.decode(codec.encode(px)))


def test_tiny_stream_compiles_without_graph_breaks():
    codec = shaken(TinyCodec(TINY)).requires_grad_(False)
    latents, px = noise(codec), clip(codec)
    _, state = codec.decode_stream(latents[:, :2])
    decode = torch.compile(codec.decode_stream, fullgraph=True, backend="eager")
    assert torch.equal(decode(latents[:, 2:], state)[0], codec.decode_stream(latents[:, 2:], state)[0])
    _, state = codec.encode_stream(px[:, :5])
    encode = torch.compile(codec.encode_stream, fullgraph=True, backend="eager")
    assert torch.equal(encode(px[:, 5:9], state)[0], codec.encode_stream(px[:, 5:9], state)[0])


@pytest.mark.parametrize("smooth", [0.0, 0.08])
def test_a_compiled_codec_decodes_a_stream_without_graph_breaks(monkeypatch, smooth):
    compile, graphs = torch.compile, []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, backend=eager, **kw))
    codec = shaken(TinyCodec(replace(TINY, smooth=smooth))).requires_grad_(False)
    fast, latents, state, expected = Compiled(codec), noise(codec), None, []
    px, state = fast.decode_stream(latents[:, :2], state)
    rest, _ = fast.decode_stream(latents[:, 2:], state)
    state = None
    for latent in latents.split(1, dim=1):
        part, state = codec.decode_stream(latent, state)
        expected.append(part)
    assert torch.equal(torch.cat((px, rest), 1), torch.cat(expected, 1))
    assert torch.allclose(torch.cat((px, rest), 1), codec.decode(latents), atol=1e-6)
    assert len(graphs) == 2 and max(len(g.graph.nodes) for g in graphs) < 200  # one a kind, the filter one operator
    assert fast.temporal_factor == codec.temporal_factor and fast.cfg is codec.cfg


def test_tiny_runs_in_bfloat16_between_float32_pixels():
    codec = shaken(TinyCodec(TINY)).requires_grad_(False)
    px = clip(codec)
    full = codec.decode(codec.encode(px))
    half = codec.to(torch.bfloat16)
    out = half.decode(half.encode(px))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, full, rtol=0, atol=0.02)


# ---- the Wan codec


@pytest.mark.parametrize("cfg", [WAN, WAN_RESIDUAL], ids=["2.1", "2.2"])
@pytest.mark.parametrize("split", [(1, 1, 1), (2, 1), (1, 2)])
@torch.no_grad()
def test_a_half_precision_stream_equals_diffusers_whole_clip(cfg, split):
    torch.manual_seed(0)
    codec = WanCodec(cfg)
    codec.vae.to(torch.bfloat16)
    latents = torch.randn(1, 3, cfg.latent_channels, 2, 3)
    mean, std = (torch.tensor(part)[:, None, None] for part in (cfg.latent_mean, cfg.latent_std))
    state, parts = None, []
    for part in latents.split(split, dim=1):
        px, state = codec.decode_stream(part, state)
        parts.append(px)
    want = codec.vae.decode((latents * std + mean).transpose(1, 2).bfloat16()).sample.transpose(1, 2)
    torch.testing.assert_close(torch.cat(parts, 1) * 2 - 1, want.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cfg", [WAN, WAN_RESIDUAL], ids=["2.1", "2.2"])
@pytest.mark.parametrize("size", [(1, 1, 2, 2), (2, 3, 1, 2), (1, 5, 3, 1)])
def test_wan_equals_diffusers_on_whole_clips(cfg, size):
    torch.manual_seed(0)
    codec = WanCodec(cfg)
    batch, frames, h, w = size
    latents = torch.randn(batch, frames, cfg.latent_channels, h, w)
    raw = latents * torch.tensor(cfg.latent_std)[:, None, None] + torch.tensor(cfg.latent_mean)[:, None, None]
    with torch.no_grad():
        expected = codec.vae.decode(raw.transpose(1, 2)).sample.transpose(1, 2)
        torch.testing.assert_close(codec.decode(latents) * 2 - 1, expected, rtol=0, atol=1e-6)
    # diffusers groups px frames by four whatever the factor and drops the rest: odd latent counts leave no rest here
    px = torch.rand(batch, codec.px_frames(frames), 3, h * codec.spatial_factor, w * codec.spatial_factor)
    expected = codec.vae.encode((px * 2 - 1).transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    encoded = codec.encode(px) * torch.tensor(cfg.latent_std)[:, None, None]
    encoded = encoded + torch.tensor(cfg.latent_mean)[:, None, None]
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-6)


def test_wan_lets_gradients_through_but_keeps_none():
    codec = WanCodec(WAN)
    px = clip(codec, frames=2, batch=1).requires_grad_()
    codec.decode(codec.encode(px)).mean().backward()
    assert px.grad.abs().sum() > 0 and all(p.grad is None for p in codec.parameters())


def test_wan_reads_its_geometry_from_a_diffusers_folder(tmp_path):
    torch.manual_seed(0)
    codec = WanCodec(WAN_RESIDUAL)
    codec.vae.save_pretrained(tmp_path)
    again = WanCodec.from_pretrained(tmp_path)
    assert again.cfg == WAN_RESIDUAL
    latents = noise(codec, frames=2)
    assert torch.equal(again.decode(latents), codec.decode(latents))


def test_wan_2_2_geometry_is_the_published_one():
    with torch.device("meta"):
        codec = WanCodec(WAN_2_2)
    assert (codec.latent_channels, codec.spatial_factor, codec.temporal_factor) == (48, 16, 4)
    assert codec.vae.encoder.conv_in.weight.shape == (160, 12, 3, 3, 3)
    assert codec.vae.decoder.conv_out.weight.shape == (12, 256, 3, 3, 3)


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("encoder.downsamples.0.downsamples.1.residual.2.weight", "encoder.down_blocks.0.resnets.1.conv1.weight"),
        ("encoder.downsamples.1.downsamples.0.shortcut.bias", "encoder.down_blocks.1.resnets.0.conv_shortcut.bias"),
        ("encoder.downsamples.1.downsamples.2.time_conv.bias", "encoder.down_blocks.1.downsampler.time_conv.bias"),
        ("decoder.upsamples.2.upsamples.2.residual.6.bias", "decoder.up_blocks.2.resnets.2.conv2.bias"),
        ("decoder.upsamples.0.upsamples.3.resample.1.weight", "decoder.up_blocks.0.upsampler.resample.1.weight"),
        ("decoder.head.0.gamma", "decoder.norm_out.gamma"),
    ],
)
def test_wan_2_2_names_exist_in_diffusers(original, ours):
    with torch.device("meta"):
        names = WanCodec(WAN_2_2).vae.state_dict()
    assert _diffusers_name(original, num_res_blocks=2) == ours
    assert ours in names


@pytest.fixture(scope="module")
def golden():
    config, tensors = json.loads((GOLDEN / "config.json").read_text()), load_file(GOLDEN / "io.safetensors")
    vae = config["vae"]
    cfg = WanCodecConfig(
        latent_channels=vae["z_dim"],
        encoder_width=vae["dim"],
        decoder_width=vae["dim"],
        width_multiples=tuple(vae["dim_mult"]),
        temporal=tuple(vae["temperal_downsample"]),
        num_res_blocks=vae["num_res_blocks"],
        latent_mean=tuple(config["latents_mean"]),
        latent_std=tuple(config["latents_std"]),
    )
    return build_codec(cfg, GOLDEN / "weights.safetensors"), tensors, config


def test_wan_decodes_the_recorded_clip_in_every_recorded_split(golden):
    codec, tensors, config = golden
    for split in config["stream_chunks"]:
        state, parts = None, []
        for part in tensors["in.latents"].split(split, dim=1):
            px, state = codec.decode_stream(part, state)
            parts.append(px)
        recorded = config["streams"]["stream." + "_".join(map(str, split))]["pixel_frames_per_chunk"]
        assert [px.shape[1] for px in parts] == recorded
        torch.testing.assert_close(torch.cat(parts, 1) * 2 - 1, tensors["out.decode.pixel"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num", [1, 5, 17])
def test_wan_encodes_the_recorded_clip(golden, num):
    codec, tensors, _ = golden
    px = (tensors["in.pixels"].transpose(1, 2)[:, :num] + 1) / 2
    torch.testing.assert_close(codec.encode(px), tensors[f"out.encode{num}.latents"], rtol=0, atol=1e-5)


def test_visibility_is_what_a_unit_of_a_channel_changes_in_the_picture():
    class Sum(torch.nn.Module):  # channel c is seen with weight c + 1 in every pixel of its 2x2 cell
        def decode(self, x):
            grey = (x * torch.arange(1.0, 4.0)[:, None, None]).sum(2, keepdim=True)
            return F.interpolate(grey.flatten(0, 1), scale_factor=2).unflatten(0, x.shape[:2])

    shown = visibility(Sum(), torch.randn(4, 5, 3, 8, 8), torch.Generator().manual_seed(0), draws=16)
    torch.testing.assert_close(shown, torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64) * 3 / 14, rtol=0.05, atol=0.0)
