"""Published metrics on local weights: LPIPS, FVD, and what VBench asks of pictures. No network, no pickle unasked.

Each is asked for by name and path (`--metric lpips=alex.safetensors`), and refused by name without its weights. They
let results be laid beside papers; small pictures are enlarged for them, so they see blur first.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill import metrics
from vidistill.evaluation.clips import Tally, View
from vidistill.evaluation.pretrained import ViT, consistency, i3d, need, squared, taps
from vidistill.evaluation.report import Metric
from vidistill.interop.files import read_file

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]. Source: LPIPS
I3D_SIDE, I3D_FRAMES = 224, 9
AT_ONCE = 16  # pictures, or one clip, that a network sees at a time

Part = Callable[[View], Tensor]


def in_pieces(net: Callable[[Tensor], Tensor], px: Tensor) -> Tensor:
    """`net` of every picture of clips [B, T, 3, H, W]: [B, T, ...]."""
    return torch.cat([net(part) for part in px.flatten(0, 1).split(AT_ONCE)]).unflatten(0, px.shape[:2])


def lpips(px: Tensor, reference: Tensor, weights: Mapping[str, Tensor], where: str) -> Tensor:
    """Distance [N] of pictures [N, 3, H, W] in [0, 1] from others, by features of AlexNet or VGG16.

    Source: Zhang et al. 1801.03924, eq. 1, with the published weights of the layers.
    """
    shift, scale = (px.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
    pair = torch.cat((px, reference)) * 2 - 1
    total = px.new_zeros(len(px))
    for k, found in enumerate(taps((pair - shift) / scale, weights, where)):
        a, b = (found / (found.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
        total = total + F.conv2d((a - b).square(), need(weights, f"lin{k}.model.1.weight", where)).mean((1, 2, 3))
    return total


def of_lpips(weights: Mapping[str, Tensor], where: str) -> Metric:
    def part(view: View) -> Tensor:
        pairs = torch.cat((view.px, view.batch.px), 2)
        return in_pieces(lambda both: lpips(both[:, :3], both[:, 3:], weights, where), pairs)

    text = "LPIPS against the true future, mean over frames"
    return Metric(text, lambda row, real: row.mean("lpips") if row is not real else None, {"lpips": part}, best="low")


def of_fvd(weights: Mapping[str, Tensor], where: str) -> Metric:
    def part(view: View) -> Tensor:
        if view.px.shape[1] < I3D_FRAMES:
            raise ValueError(f"fvd needs clips of at least {I3D_FRAMES} frames, these have {view.px.shape[1]}")
        shown = (squared(clip, I3D_SIDE) * 2 - 1 for clip in view.px)
        return torch.cat([i3d(clip[None], weights, where) for clip in shown])

    def figure(row: Tally, real: Tally) -> float | None:
        size = row["i3d"].shape[1]
        return None if row is real else metrics.frechet(row["i3d"], real["i3d"], most=size)

    return Metric("FVD: Frechet distance of I3D logits to the real clips", figure, {"i3d": part}, best="low")


def of_consistency(name: str, text: str, weights: Mapping[str, Tensor], where: str) -> Metric:
    vit = ViT(weights, where)
    return Metric(
        text, lambda row, _: row.mean(name), {name: lambda view: consistency(in_pieces(vit, view.px))}, best="high"
    )


def of_aesthetics(weights: Mapping[str, Tensor], where: str) -> Metric:
    vit, head = ViT(weights, where), need(weights, "aesthetic.weight", where)

    def part(view: View) -> Tensor:
        features = F.normalize(in_pieces(vit, view.px), dim=-1)
        return F.linear(features, head, weights.get("aesthetic.bias"))[..., 0].mean(1) / 10

    text = "VBench aesthetic quality: LAION's head on CLIP, over 10"
    return Metric(text, lambda row, _: row.mean("aesthetic"), {"aesthetic": part}, best="high")


def of_flickering() -> Metric:
    text = "VBench temporal flickering: 1 less the mean change between frames"
    return Metric(
        text,
        lambda row, _: row.mean("steady"),
        {"steady": lambda view: 1 - (view.px.clamp(0, 1).diff(dim=1)).abs().mean((1, 2, 3, 4))},
        best="high",
    )


@dataclass(frozen=True)
class Published:
    """A published metric: what its weights are, and the metric that they make (`make(weights, where)`)."""

    weights: str
    make: Callable[[Mapping[str, Tensor], str], Metric]


SUBJECT, BACKGROUND = ("VBench subject consistency, by DINO", "VBench background consistency, by CLIP")
METRICS: Mapping[str, Published] = {
    "lpips": Published("state dict of lpips.LPIPS (AlexNet or VGG16, with lin0 to lin4)", of_lpips),
    "fvd": Published("I3D of Kinetics-400 (Conv3d_1a_7x7 to logits)", of_fvd),
    "vbench.subject_consistency": Published(
        "DINO ViT-B/16 as transformers names it", partial(of_consistency, "subject", SUBJECT)
    ),
    "vbench.background_consistency": Published(
        "CLIP ViT-B/32 as transformers names it", partial(of_consistency, "background", BACKGROUND)
    ),
    "vbench.aesthetic_quality": Published(
        "CLIP ViT-L/14 with LAION's head as aesthetic.weight and aesthetic.bias", of_aesthetics
    ),
}
FREE: Mapping[str, Callable[[], Metric]] = {"vbench.temporal_flickering": of_flickering}


def published(asked: Mapping[str, str], allow_pickle: bool = False) -> dict[str, Metric]:
    """Metrics by the names they are asked for with, from weights at these paths; ValueError names what is missing."""
    return dict(one(name, path, allow_pickle) for name, path in asked.items())


def one(name: str, path: str, allow_pickle: bool) -> tuple[str, Metric]:
    key = name.replace(".", "_")
    if name in FREE:
        return key, FREE[name]()
    if name not in METRICS:
        known = ", ".join([*METRICS, *FREE])
        raise ValueError(f"--metric {name} is not computed here; known are {known} (others: run VBench on the videos)")
    found = METRICS[name]
    if not path or not Path(path).exists():
        at = f" ({path} is not there)" if path else ""
        raise ValueError(f"--metric {name} needs local weights{at}: say {name}=PATH, {found.weights}")
    state = dict(flat(read_file(path, allow_pickle=allow_pickle)))
    return key, found.make(state, path)


def flat(held: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; one dictionary around them, as `state_dict`, is left out."""
    if not isinstance(held, Mapping):
        return
    for name, value in held.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from flat(value)
