"""Networks of published metrics, rebuilt from local weights: AlexNet and VGG (LPIPS), I3D (FVD), ViTs (VBench).

Weights are tensors by their published names; nothing is downloaded, and nothing here is trained.
"""

import math
import re
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def need(weights: Weights, name: str, where: str) -> Tensor:
    """A tensor by its name; ValueError that names the file where it is missing."""
    if name not in weights:
        raise ValueError(f"{where} has no {name}: it holds other weights than this metric's")
    return weights[name].float()


def normalised(px: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (px.new_tensor(values)[:, None, None] for values in statistics)
    return (px - mean) / std


def squared(px: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Pictures [N, 3, H, W] whose shorter side is made `side`, cropped around the middle."""
    height, width = px.shape[-2:]
    scale = side / min(height, width)
    if scale != 1:
        size = (max(side, round(height * scale)), max(side, round(width * scale)))
        px = F.interpolate(px, size, mode=mode, antialias=scale < 1).clamp(0, 1)
    top, left = (px.shape[-2] - side) // 2, (px.shape[-1] - side) // 2
    return px[..., top : top + side, left : left + side]


# --- AlexNet and VGG16, as torchvision and lpips name them ------------------------------------------------------------

ALEX = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}  # conv -> stride, padding
ALEX_POOLS, ALEX_TAPS = (3, 6), (0, 3, 6, 8, 10)  # convs before which is pooled; after which is tapped
VGG = dict.fromkeys((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (1, 1))
VGG_POOLS, VGG_TAPS = (5, 10, 17, 24), (2, 7, 14, 21, 28)
CONV = re.compile(r"(?:net\.slice\d\.|features\.|net\.)?(\d+)\.(weight|bias)")


def taps(px: Tensor, weights: Weights, where: str) -> list[Tensor]:
    """Five feature maps of AlexNet or VGG16 for normalised pictures [N, 3, H, W], whichever the weights are of."""
    own = {f"{found[1]}.{found[2]}": x for name, x in weights.items() if (found := CONV.fullmatch(name))}
    first = need(own, "0.weight", where)
    alex = first.shape[-1] == 11
    convs, pools, wanted = (ALEX, ALEX_POOLS, ALEX_TAPS) if alex else (VGG, VGG_POOLS, VGG_TAPS)
    out, x = [], px
    for k, (stride, padding) in convs.items():
        if k in pools:
            x = F.max_pool2d(x, 3 if alex else 2, 2)
        x = F.relu(F.conv2d(x, need(own, f"{k}.weight", where), need(own, f"{k}.bias", where), stride, padding))
        out += [x] if k in wanted else []
    return out


# --- I3D, as its PyTorch port names it --------------------------------------------------------------------------------

MIXED = ("3b", "3c", "pool4", "4b", "4c", "4d", "4e", "4f", "pool5", "5b", "5c")
POOLS = {"pool4": ((3, 3, 3), (2, 2, 2)), "pool5": ((2, 2, 2), (2, 2, 2))}


def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """x [N, C, T, H, W] padded with zeros as TensorFlow does: the rest on the far side."""
    pads: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        more = max(k - s if size % s == 0 else k - size % s, 0)
        pads += [more // 2, more - more // 2]
    return F.pad(x, pads)


def pool3d(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


def unit(x: Tensor, weights: Weights, name: str, where: str, stride: int = 1) -> Tensor:
    """Convolution, batch normalisation and ReLU."""
    kernel = need(weights, f"{name}.conv3d.weight", where)
    x = F.conv3d(same(x, tuple(kernel.shape[2:]), (stride,) * 3), kernel, stride=stride)
    mean, var, scale, shift = (
        need(weights, f"{name}.bn.{part}", where) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(x, mean, var, scale, shift, eps=1e-3))


def mixed(x: Tensor, weights: Weights, name: str, where: str) -> Tensor:
    """An Inception block: four branches beside each other."""

    def branch(y: Tensor, *units: str) -> Tensor:
        for part in units:
            y = unit(y, weights, f"{name}.{part}", where)
        return y

    pooled = pool3d(x, (3, 3, 3), (1, 1, 1))
    return torch.cat((branch(x, "b0"), branch(x, "b1a", "b1b"), branch(x, "b2a", "b2b"), branch(pooled, "b3b")), 1)


def i3d(px: Tensor, weights: Weights, where: str) -> Tensor:
    """Logits [N, classes] of clips [N, T, 3, 224, 224] in [-1, 1], at least 9 frames, averaged over time."""
    x = unit(px.movedim(2, 1), weights, "Conv3d_1a_7x7", where, 2)
    x = unit(pool3d(x, (1, 3, 3), (1, 2, 2)), weights, "Conv3d_2b_1x1", where)
    x = pool3d(unit(x, weights, "Conv3d_2c_3x3", where), (1, 3, 3), (1, 2, 2))
    for name in MIXED:
        x = pool3d(x, *POOLS[name]) if name in POOLS else mixed(x, weights, f"Mixed_{name}", where)
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    logits, bias = (need(weights, f"logits.conv3d.{part}", where) for part in ("weight", "bias"))
    return F.conv3d(x, logits, bias).mean((2, 3, 4))


# --- vision transformers, as transformers names them ------------------------------------------------------------------

HEAD_WIDTH = 64


class ViT:
    """DINO's or CLIP's picture encoder from a state dict; which one follows from its names."""

    def __init__(self, weights: Weights, where: str) -> None:
        self.weights, self.where = weights, where
        self.clip = any(name.startswith("vision_model.") for name in weights)
        self.prefix = "vision_model." if self.clip else ""
        self.layers = "encoder.layers" if self.clip else "encoder.layer"
        self.eps = 1e-5 if self.clip else 1e-12
        found = re.compile(re.escape(f"{self.prefix}{self.layers}.") + r"(\d+)\.")
        self.depth = 1 + max((int(at[1]) for name in weights if (at := found.match(name))), default=-1)
        if not self.depth:
            raise ValueError(f"{where} holds no layers of DINO or CLIP as transformers saves them")

    def __call__(self, px: Tensor) -> Tensor:
        """Features [N, D] of pictures [N, 3, H, W] in [0, 1]: the class token, projected if there is a projection."""
        side = math.isqrt(self.positions().shape[0] - 1) * self.kernel().shape[-1]
        shown = squared(px, side, "bicubic" if self.clip else "bilinear")
        x = self.embedded(normalised(shown, CLIP if self.clip else IMAGENET))
        for k in range(self.depth):
            x = self.block(x, k)
        x = self.norm(x[:, 0], "post_layernorm" if self.clip else "layernorm")
        projection = self.weights.get("visual_projection.weight")
        return x if projection is None else F.linear(x, projection.float())

    def take(self, name: str) -> Tensor:
        return need(self.weights, self.prefix + name, self.where)

    def kernel(self) -> Tensor:
        return self.take("embeddings.patch_embedding.weight" if self.clip else PATCHES + "weight")

    def positions(self) -> Tensor:
        return self.take("embeddings.position_embedding.weight") if self.clip else self.take(POSITIONS)[0]

    def embedded(self, px: Tensor) -> Tensor:
        kernel = self.kernel()
        bias = None if self.clip else self.take(PATCHES + "bias")
        x = F.conv2d(px, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        token = self.take("embeddings.class_embedding" if self.clip else "embeddings.cls_token").reshape(1, 1, -1)
        x = torch.cat((token.expand(len(x), -1, -1), x), 1) + self.positions()
        return self.norm(x, "pre_layrnorm") if self.clip else x

    def names(self) -> tuple[str, ...]:
        """Query, key, value, output, two layers of the MLP, two norms."""
        return CLIP_BLOCK if self.clip else DINO_BLOCK

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.take(f"{name}.weight"), self.take(f"{name}.bias"), self.eps)

    def block(self, x: Tensor, k: int) -> Tensor:
        at = f"{self.layers}.{k}."

        def linear(y: Tensor, name: str) -> Tensor:
            return F.linear(y, self.take(f"{at}{name}.weight"), self.take(f"{at}{name}.bias"))

        query, key, value, out, up, down, before, after = self.names()
        y = self.norm(x, at + before)
        q, k_, v = (linear(y, n).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for n in (query, key, value))
        x = x + linear(F.scaled_dot_product_attention(q, k_, v).transpose(1, 2).flatten(2), out)
        y = linear(self.norm(x, at + after), up)
        return x + linear(y * torch.sigmoid(1.702 * y) if self.clip else F.gelu(y), down)


PATCHES, POSITIONS = "embeddings.patch_embeddings.projection.", "embeddings.position_embeddings"
CLIP_BLOCK = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)
DINO_BLOCK = (
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after"),
)


def consistency(features: Tensor) -> Tensor:
    """Mean over frames [N, T, D] of how like the first and the one before they are, cosines not below 0: [N].

    Source: VBench 2311.17982, subject and background consistency.
    """
    unit_ = F.normalize(features, dim=-1)
    first = (unit_[:, 1:] * unit_[:, :1]).sum(-1).clamp_min(0)
    before = torch.stack([(a * b).sum(-1) for a, b in pairwise(unit_.unbind(1))], 1).clamp_min(0)
    return ((first + before) / 2).mean(1)
