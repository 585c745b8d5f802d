"""What a VideoDiT is made of: its architecture as data, norms, attention, blocks, head."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidistill.conditioning.condition import SITES, VIEW_SITE
from vidistill.memory.autograd import AutogradView
from vidistill.memory.cache import KVMemory
from vidistill.memory.history import EntryRecorder
from vidistill.ops import fused
from vidistill.ops.attention import attention
from vidistill.ops.fused import wide
from vidistill.ops.masks import FrameMask
from vidistill.ops.memory_attention import Segment, attend
from vidistill.ops.rope import FLAT, Panorama, Yarn, rotate
from vidistill.ops.sequence import SequenceGroup

PLACES = ("before", "after_attention")
ACTIVATIONS = {"silu": lambda width: nn.SiLU(), "norm": nn.LayerNorm}


PREDICTS = ("velocity", "x0")
NO_GRID = (0, 0)


@dataclass(frozen=True)
class SiteConfig:
    """A per-frame condition: `dim` numbers a frame, projected for each of `layers` (empty: all) through `hidden` units.

    `activation` of the hidden units: `silu`, or `norm` (a LayerNorm: OmniAvatar's audio packing). `place` (of site
    `hidden`): `before` a block, or `after_attention` inside it. `zero_init`: no effect until trained.
    """

    dim: int
    layers: tuple[int, ...] = ()
    hidden: int = 0
    place: str = "before"
    zero_init: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        for name, choices in (("place", PLACES), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"dit.sites {name} {getattr(self, name)!r} is unknown; choose one of {choices}")


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a VideoDiT; the defaults of everything but size are Wan2.1's."""

    channels: int = 16  # latent channels, in and out
    extra_channels: int = 0  # condition channels concatenated to the input
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 256
    layers: int = 6
    heads: int = 4
    ffn: int = 1024
    freq_dim: int = 256
    text_dim: int = 0  # width of condition tokens; 0: no cross-attention
    image_dim: int = 0  # width of image tokens that precede the text tokens (Wan2.1 image-to-video); 0: none
    image_tokens: int = 257
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_theta: float = 10_000.0
    yarn: Yarn = Yarn()
    fov: float = 0.0  # degrees that the columns of `grid` span; tokens are placed by direction, see Panorama; 0: not
    pool_factors: tuple[int, ...] = ()  # factors of a compressed memory for which pooling weights are learned
    sites: Mapping[str, SiteConfig] = field(default_factory=dict)
    predicts: str = "velocity"  # what the head says: `velocity`, or `x0` where a patch is as wide as the network
    grid: tuple[int, int] = NO_GRID  # learned position of every token of a frame of this grid; (0, 0): none
    checkpoint: bool = False  # recompute block activations in the backward pass

    def __post_init__(self) -> None:
        sizes = ("channels", "width", "layers", "heads", "ffn", "freq_dim")
        small = [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) < 1]
        if small or min(self.patch) < 1 or min(self.extra_channels, self.text_dim, self.image_dim, *self.grid) < 0:
            raise ValueError(f"dit sizes must be positive, got {', '.join(small) or self}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"dit.width {self.width} must be an even multiple of dit.heads {self.heads}")
        if self.patch[0] != 1:
            raise ValueError(f"dit.patch[0] must be 1 (chunks are whole latent frames), got {self.patch}")
        if (self.fov > 0) != (VIEW_SITE in self.sites) or (self.fov and self.grid == NO_GRID):
            raise ValueError(f"dit.fov goes with dit.grid and a site {VIEW_SITE!r} of dim 1, the camera's heading")
        if self.predicts not in PREDICTS:
            raise ValueError(f"dit.predicts {self.predicts!r} is unknown; choose one of {PREDICTS}")
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown:
            raise ValueError(f"dit.sites has no site {unknown}; sites are {SITES}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def told_width(self) -> int:
        """Width of condition tokens, of text and of pictures alike; 0: none are read."""
        return max(self.text_dim, self.image_dim) if self.text_dim else 0

    @property
    def projected(self) -> Mapping[str, SiteConfig]:
        """The sites that have weights: all but the heading, which turns queries and keys."""
        return {name: site for name, site in self.sites.items() if name != VIEW_SITE}

    @property
    def panorama(self) -> Panorama:
        return Panorama(self.fov, self.grid[1]) if self.fov else FLAT

    @property
    def patch_dim(self) -> int:
        return math.prod(self.patch) * self.channels

    def extend(self, asked: "DiTConfig") -> "DiTConfig":
        """This architecture with the condition channels, sites, field of view, pooling weights and rotary extension of
        `asked` it lacks."""
        return replace(
            self,
            extra_channels=self.extra_channels or asked.extra_channels,
            fov=self.fov or asked.fov,
            sites={**asked.sites, **self.sites},
            yarn=asked.yarn if asked.yarn.ratio != 1.0 else self.yarn,
            pool_factors=asked.pool_factors or self.pool_factors,
        )


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width (Wan normalises queries and keys before splitting heads)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), x.shape[-1:], wide(self.weight), self.eps).to(x.dtype)


class Site(nn.Module):
    """Per-layer projections of one per-frame condition: [B, F, dim] -> [B, F, 1, D] for a layer that takes it."""

    def __init__(self, cfg: SiteConfig, width: int, layers: int) -> None:
        super().__init__()
        self.cfg = cfg
        takers = (0,) if layers == 0 else cfg.layers or tuple(range(layers))
        self.index = {layer: i for i, layer in enumerate(takers)}
        inner = cfg.hidden or cfg.dim
        self.embed = (
            nn.Sequential(nn.Linear(cfg.dim, inner), ACTIVATIONS[cfg.activation](inner))
            if cfg.hidden
            else nn.Identity()
        )
        self.project = nn.ModuleList(nn.Linear(inner, width) for _ in takers)
        if cfg.zero_init:
            for linear in self.project:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, layer: int = 0) -> Tensor | None:
        if layer not in self.index:
            return None
        return self.project[self.index[layer]](self.embed(x.to(next(self.parameters()).dtype)))[:, :, None]


Entries = list[tuple[Tensor, Tensor]]  # keys and values [B, L, h, d] of condition tokens, one pair a softmax
Shown = list[Tensor | None]  # what a per-frame condition shows each layer [B, F, 1, D]


class SelfAttention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads, self.sharpness = cfg.heads, cfg.yarn.sharpness
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.width, cfg.width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.width, cfg.eps), RMSNorm(cfg.width, cfg.eps)

    def project(
        self, x: Tensor, table: Tensor, key: Tensor | None, raw: bool, view: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Turned queries, keys before and after turning, values [B, f n, h, d] of `x` [B, F, n, D].

        `key` [B, F, 1, D] is added to queries and keys, not to values. Keys before turning may be left out unless
        `raw`; they are turned by `view`, which `table` holds already.
        """
        q, k, v = self.q(x), self.k(x), self.v(x)
        if key is None and view is None and self.sharpness == 1.0 and fused.kernels(x.device.type):
            weights = self.norm_q.weight, self.norm_k.weight
            q, keys = fused.norm_rope(q.flatten(1, 2), k.flatten(1, 2), *weights, table, self.heads, self.norm_q.eps)
            return q, self.split(self.norm_k(k)) if raw else None, keys, self.split(v)
        q, k = self.norm_q(q), self.norm_k(k)
        if key is not None:
            q, k = q + key, k + key
        if self.sharpness != 1.0:
            q = q * self.sharpness
        q, k, v = (self.split(y) for y in (q, k, v))
        return rotate(q, table), k if view is None or not raw else rotate(k, view), rotate(k, table), v

    def split(self, x: Tensor) -> Tensor:
        """Heads [B, f n, h, d] of `x` [B, F, n, D]."""
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1))

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Attention output [B, f n, h, d] projected to the shape of `x` [B, F, n, D]."""
        return self.o(out.flatten(2).view(x.shape).to(x.dtype))


class CrossAttention(nn.Module):
    """Queries over condition tokens; Wan2.1 image-to-video adds a second softmax over image tokens.

    `read` gives the keys and values of a prompt; they are the same in every pass, so a stream reads them once.
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads, self.image_tokens = cfg.heads, cfg.image_tokens if cfg.image_dim else 0
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.width, cfg.width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.width, cfg.eps), RMSNorm(cfg.width, cfg.eps)
        if self.image_tokens:
            self.k_img, self.v_img = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, cfg.width)
            self.norm_k_img = RMSNorm(cfg.width, cfg.eps)

    @property
    def readers(self) -> list[nn.Module]:
        """The layers that `read` runs, outside of the block's own pass."""
        return [module for name, module in self.named_children() if name.startswith(("k", "v", "norm_k"))]

    def read(self, tokens: Tensor) -> Entries:
        """Keys and values [B, L, h, d] of the text, then of image tokens if there are any; they lie head by head."""
        split = self.split
        image, text = tokens[:, : self.image_tokens], tokens[:, self.image_tokens :]
        entries = [(split(self.norm_k(self.k(text))), split(self.v(text)))]
        if self.image_tokens:
            entries.append((split(self.norm_k_img(self.k_img(image))), split(self.v_img(image))))
        return entries

    def split(self, x: Tensor) -> Tensor:
        """Heads [B, L, h, d] of `x` [B, L, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous().transpose(1, 2)

    def forward(self, x: Tensor, entries: Entries) -> Tensor:
        q = rearrange(self.norm_q(self.q(x)), "b f n (h d) -> b (f n) h d", h=self.heads)
        out = attention(q, *entries[0])
        for keys, values in entries[1:]:
            out = out + attention(q, keys, values)
        return self.o(rearrange(out, "b (f n) h d -> b f n (h d)", f=x.shape[1]))


class Gelu(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return fused.gelu(x)


@dataclass(frozen=True)
class Around:
    """What all blocks of one pass see alike.

    `table` [2, (B,) F n, 1, d / 2] turns queries and keys; `view`, which it holds already, is the part of the cameras.
    `sequence`: the processes that share the tokens of every frame; block inputs and `table` are this one's part.
    """

    table: Tensor
    view: Tensor | None = None
    mask: FrameMask | None = None
    memory: KVMemory | AutogradView | EntryRecorder | None = None
    sequence: SequenceGroup | None = None


class Block(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        width = cfg.width
        self.eps = cfg.eps
        self._before, self._after = Block.before, Block.after
        self.self_attn = SelfAttention(cfg)
        self.cross_attn = CrossAttention(cfg) if cfg.text_dim else None
        affine = cfg.cross_attn_norm and cfg.text_dim > 0
        self.norm3 = nn.LayerNorm(width, cfg.eps) if affine else nn.Identity()
        self.ffn = nn.Sequential(nn.Linear(width, cfg.ffn), Gelu(approximate="tanh"), nn.Linear(cfg.ffn, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def compile_regions(self, mode: str) -> None:
        """Run what lies before and after the attention as two graphs, the same two for all blocks.

        Attention stays out of them: its keys grow with the memory, and every length would be a graph of its own.
        """
        self._before = torch.compile(Block.before, fullgraph=True, dynamic=False, mode=mode)
        self._after = torch.compile(Block.after, fullgraph=True, dynamic=False, mode=mode)

    def targets(self, e: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward: six times [B, F, 1, D]."""
        return (wide(e) + wide(self.modulation))[:, :, :, None].unbind(2)

    def before(
        self, x: Tensor, e: Tensor, table: Tensor, key: Tensor | None, raw: bool, view: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        shift, scale, *_ = self.targets(e)
        return self.self_attn.project(fused.modulated_norm(x, shift, scale, self.eps), table, key, raw, view)

    def after(self, x: Tensor, out: Tensor, e: Tensor, prompt: Entries | None, inside: Tensor | None) -> Tensor:
        _, _, gate1, shift2, scale2, gate2 = self.targets(e)
        x = fused.gated_sum(x, self.self_attn(out, x), gate1)
        if inside is not None:
            x = x + inside
        if self.cross_attn is not None and prompt is not None:
            x = x + self.cross_attn(self.norm3(x), prompt)
        return fused.gated_sum(x, self.ffn(fused.modulated_norm(x, shift2, scale2, self.eps)), gate2)

    def read(
        self, x: Tensor, e: Tensor, around: Around, layer: int, key: Tensor | None
    ) -> tuple[Tensor, list[Segment]]:
        """Queries of `x` [B, F, n, D] and what they attend to; stages the entries of `x`."""
        memory, sequence = around.memory, around.sequence
        raw_too = memory is not None and memory.wants_raw
        q, raw, keys, v = self._before(self, x, e, around.table, key, raw_too, around.view)
        if sequence is not None:
            if memory is None:
                q, keys = q.to(v.dtype), keys.to(v.dtype)  # as below, before they travel
            q, keys, v = (sequence.to_heads(y, x.shape[1]) for y in (q, keys, v))
            raw = sequence.to_heads(raw, x.shape[1]) if raw is not None and raw_too else None
        segments = [Segment(keys.to(v.dtype), v)] if memory is None else memory.segments(layer, raw, keys, v)
        held = segments[-1].values
        assert isinstance(held, Tensor)  # the window, or all there is
        return q.to(held.dtype), segments

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        around: Around,
        layer: int,
        prompt: Entries | None = None,
        inside: Tensor | None = None,
        key: Tensor | None = None,
        output: bool = True,
    ) -> Tensor:
        """`x` [B, F, n, D], `e` [B, F, 6, D]; `inside` and `key` [B, F, 1, D] are per-frame conditions.

        Without `output` the entries are staged and nothing else is computed.
        """
        q, segments = self.read(x, e, around, layer, key)
        if not output:
            return x
        out = attend(q, segments, around.mask)
        if around.sequence is not None:
            out = around.sequence.to_tokens(out, x.shape[1])
        return self._after(self, x, out, e, prompt, inside)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.width, cfg.patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.width) / cfg.width**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """`x` [B, F, n, D], time embedding `e` [B, F, D] -> patches [B, F, n, P]."""
        shift, scale = (wide(e)[:, :, None] + wide(self.modulation))[:, :, :, None].unbind(2)
        return self.head(fused.modulated_norm(x, shift, scale, self.eps))


class ImageEmbedding(nn.Module):
    """Image features -> condition tokens (Wan2.1 `MLPProj`)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width), nn.LayerNorm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
