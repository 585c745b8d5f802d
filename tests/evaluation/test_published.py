"""Published metrics with random weights of the right shapes, against their own formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vidistill.evaluation.clips import Batch, Data
from vidistill.evaluation.pretrained import ViT, consistency, i3d, squared
from vidistill.evaluation.published import FREE, METRICS, lpips, published
from vidistill.evaluation.suite import measure, run_figures
from vidistill.interop.files import read_file
from vidistill.metrics import frechet


def clips(count, frames, side, seed=0):
    return torch.rand(count, frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def shown(metrics, px, rows):
    """Figures of rows (functions of a batch) beside the real clips px."""
    tallies = measure(metrics, rows, Data([Batch(px, None, 0)], 10.0))
    return {name: run_figures(metrics, own, tallies["real"][0]) for name, own in tallies.items()}


def saved(tmp_path, weights, name="weights.safetensors"):
    save_file({key: x.contiguous() for key, x in weights.items()}, tmp_path / name)
    return str(tmp_path / name)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def alexnet():
    layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU()]
    layers += [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()), (1, 4, 7, 9, 11)


def vgg16():
    layers, wide = [], 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(wide, width, 3, 1, 1), nn.ReLU()]
            wide = width
    return nn.Sequential(*layers), (3, 8, 15, 22, 29)


@pytest.mark.parametrize("net", [alexnet, vgg16])
def test_lpips_is_the_weighted_distance_of_unit_features_layer_by_layer(net):
    torch.manual_seed(0)
    layers, taps = net()
    a, b = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    weights = {f"features.{name}": x for name, x in layers.state_dict().items()}
    x, y, wanted, k = a, b, torch.zeros(2), 0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((2 * v - 1) - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for v in (a, b))
    for i, layer in enumerate(layers):
        x, y = layer(x), layer(y)
        if i in taps:
            lin = torch.rand(x.shape[1])
            weights[f"lin{k}.model.1.weight"], k = lin.view(1, -1, 1, 1), k + 1
            apart = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)) ** 2
            wanted += (apart * lin.view(-1, 1, 1)).sum(1).mean((1, 2))
    found = lpips(a, b, weights, "here")
    assert k == 5 and torch.allclose(found, wanted, rtol=1e-4) and found.min() > 0
    assert lpips(a, a, weights, "here").abs().max() < 1e-6
    named = {name.replace("features.", "net.slice1."): x for name, x in weights.items()}
    assert torch.equal(lpips(a, b, named, "here"), found)


def test_lpips_is_measured_beside_a_suites_own_figures(tmp_path):
    torch.manual_seed(0)
    weights = {f"features.{name}": x for name, x in alexnet()[0].state_dict().items()}
    weights |= {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) for k, c in enumerate((64, 192, 384, 256, 256))}
    path, px = saved(tmp_path, weights), clips(2, 3, 64)
    metrics = published({"lpips": path})
    found = shown(metrics, px, {"same": lambda b: b.px, "flat": lambda b: b.px.mean((-2, -1), True).expand_as(b.px)})
    assert found["same"]["lpips"] < 1e-6 < found["flat"]["lpips"] and "lpips" not in found["real"]
    flat = px.mean((-2, -1), True).expand_as(px)
    wanted = lpips(flat.flatten(0, 1), px.flatten(0, 1), weights, "").mean()
    assert found["flat"]["lpips"] == pytest.approx(float(wanted), rel=1e-4)


# --- FVD --------------------------------------------------------------------------------------------------------------

BLOCKS = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)), "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)), "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)), "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)), "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}  # fmt: skip


class Pad(nn.Module):
    """Pads as TensorFlow's SAME does, then runs a layer."""

    def __init__(self, layer, kernel, stride):
        super().__init__()
        self.layer, self.kernel, self.stride = layer, kernel, stride

    def forward(self, x):
        pads = []
        for size, k, s in zip(x.shape[2:], self.kernel, self.stride):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return self.layer(F.pad(x, pads))


class Unit(nn.Module):
    def __init__(self, wide, width, k, stride=1):
        super().__init__()
        self.conv3d, self.bn = nn.Conv3d(wide, width, k, stride, bias=False), nn.BatchNorm3d(width, eps=1e-3)
        self.k, self.stride = k, stride
        self.bn.running_mean.normal_(std=0.1)
        self.bn.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        return F.relu(self.bn(Pad(self.conv3d, (self.k,) * 3, (self.stride,) * 3)(x)))


class Block(nn.Module):
    def __init__(self, wide, widths):
        super().__init__()
        a, b1, b2, c1, c2, d = widths
        self.b0, self.b1a, self.b1b = Unit(wide, a, 1), Unit(wide, b1, 1), Unit(b1, b2, 3)
        self.b2a, self.b2b, self.b3b = Unit(wide, c1, 1), Unit(c1, c2, 3), Unit(wide, d, 1)

    def forward(self, x):
        pooled = Pad(nn.MaxPool3d(3, 1), (3, 3, 3), (1, 1, 1))(x)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class WholeI3D(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7, self.Conv3d_2b_1x1 = Unit(3, 64, 7, 2), Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        for name, (wide, widths) in BLOCKS.items():
            setattr(self, name, Block(wide, widths))
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, x):
        flat = Pad(nn.MaxPool3d((1, 3, 3), (1, 2, 2)), (1, 3, 3), (1, 2, 2))
        x = flat(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(flat(self.Conv3d_1a_7x7(x)))))
        for name in BLOCKS:
            if name == "Mixed_4b":
                x = Pad(nn.MaxPool3d(3, 2), (3, 3, 3), (2, 2, 2))(x)
            if name == "Mixed_5b":
                x = Pad(nn.MaxPool3d(2, 2), (2, 2, 2), (2, 2, 2))(x)
            x = getattr(self, name)(x)
        return self.logits.conv3d(nn.AvgPool3d((2, 7, 7), 1)(x)).mean((2, 3, 4))


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return WholeI3D().eval()


def test_fvd_is_the_frechet_distance_of_the_logits_of_i3d(inception, tmp_path):
    px = clips(2, 10, 32)
    path = saved(tmp_path, inception.state_dict())
    found = shown(published({"fvd": path}), px, {"dark": lambda b: 0.5 * b.px})
    with torch.no_grad():
        logits = [
            torch.cat([inception(squared(clip, 224)[None].movedim(2, 1) * 2 - 1) for clip in x]) for x in (0.5 * px, px)
        ]
        own = i3d(squared(px[0], 224)[None] * 2 - 1, inception.state_dict(), path)
    assert torch.allclose(own, logits[1][:1], atol=1e-4) and own.shape == (1, 400)
    a, b = (x.double() for x in logits)
    mean = (a.mean(0) - b.mean(0)).square().sum()
    # two clips: each covariance is v v^T / 2, v their difference; tr (A B)^1/2 = |v w| / 2
    v, w = (x[0] - x[1] for x in (a, b))
    wanted = float(mean + (v @ v + w @ w) / 2 - (v @ w).abs())
    assert found["dark"]["fvd"] == pytest.approx(wanted, rel=1e-3) == pytest.approx(frechet(a, b, most=400), rel=1e-3)
    with pytest.raises(ValueError, match=r"fvd needs.*9 frames"):
        shown(published({"fvd": path}), px[:, :4], {})


# --- VBench -----------------------------------------------------------------------------------------------------------


def dino():
    transformers = pytest.importorskip("transformers")
    how = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    return transformers.ViTModel(
        transformers.ViTConfig(**how, image_size=32, patch_size=8), add_pooling_layer=False
    ).eval()


def clip_vision():
    transformers = pytest.importorskip("transformers")
    how = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    cfg = transformers.CLIPVisionConfig(**how, image_size=32, patch_size=8, projection_dim=24)
    return transformers.CLIPVisionModelWithProjection(cfg).eval()


STATISTICS = {
    dino: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    clip_vision: ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def features(net, made, px):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in STATISTICS[made])
    with torch.no_grad():
        out = net(pixel_values=((px - mean) / std).flatten(0, 1))
    found = out.last_hidden_state[:, 0] if made is dino else out.image_embeds
    return found.unflatten(0, px.shape[:2])


@pytest.mark.parametrize(
    ("made", "name"), [(dino, "vbench.subject_consistency"), (clip_vision, "vbench.background_consistency")]
)
def test_consistency_is_how_like_the_first_frame_and_the_one_before_a_frame_is(made, name, tmp_path):
    torch.manual_seed(0)
    net, px = made(), clips(2, 4, 32)
    net.save_pretrained(tmp_path / "net")
    own = ViT(read_file(tmp_path / "net"), "here")(px[0])
    wanted = features(net, made, px)
    assert torch.allclose(own, wanted[0], atol=1e-4)
    total = 0.0
    for clip in wanted:
        for t in range(1, 4):
            first, before = (F.cosine_similarity(clip[t], clip[k], dim=0).clamp_min(0) for k in (0, t - 1))
            total += float(first + before) / 2
    key = name.replace(".", "_")
    found = shown(published({name: str(tmp_path / "net")}), px, {"still": lambda b: b.px[:, :1].expand_as(b.px)})
    assert found["real"][key] == pytest.approx(total / 6, rel=1e-3) and found["still"][key] == pytest.approx(1)


def test_consistency_does_not_count_what_is_opposite():
    assert consistency(torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]])).tolist() == [0.25]


def test_aesthetics_are_laions_head_on_unit_features(tmp_path):
    torch.manual_seed(0)
    net, px = clip_vision(), clips(1, 3, 32)
    head = nn.Linear(24, 1)
    net.save_pretrained(tmp_path / "net")
    weights = {**read_file(tmp_path / "net"), "aesthetic.weight": head.weight.data, "aesthetic.bias": head.bias.data}
    found = shown(published({"vbench.aesthetic_quality": saved(tmp_path, weights)}), px, {})
    wanted = [float(head(x / x.norm())) / 10 for x in features(net, clip_vision, px)[0]]
    assert found["real"]["vbench_aesthetic_quality"] == pytest.approx(sum(wanted) / 3, rel=1e-3)


def test_flickering_needs_no_weights_and_counts_levels_of_255():
    px = torch.zeros(1, 3, 3, 8, 8)
    px[:, 1] = 51 / 255
    found = shown(published({"vbench.temporal_flickering": ""}), px, {})
    assert found["real"]["vbench_temporal_flickering"] == pytest.approx((255 - 51) / 255)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_whose_weights_are_not_at_hand_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"--metric {name} .*{name}=PATH"):
        published({name: ""})
    with pytest.raises(ValueError, match=rf"--metric {name} .*absent is"):
        published({name: str(tmp_path / "absent")})


def test_other_metrics_foreign_weights_and_pickles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vbench.motion_smoothness is not.*lpips"):
        published({"vbench.motion_smoothness": ""})
    other = saved(tmp_path, {"some.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has no 0.weight"):
        shown(published({"lpips": other}), clips(1, 2, 64), {"dark": lambda b: 0.5 * b.px})
    with pytest.raises(ValueError, match=r"no layers.*DINO or CLIP"):
        published({"vbench.subject_consistency": other})
    torch.save({"state_dict": {"some.weight": torch.zeros(2)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="--allow-pickle"):
        published({"fvd": str(tmp_path / "weights.pth")})
    assert set(published({"fvd": str(tmp_path / "weights.pth")}, allow_pickle=True)) == {"fvd"} and FREE
