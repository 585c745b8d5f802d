"""VideoDiT: the one network behind teacher, critic and student. No sigma maths, no chunks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidistill.conditioning import SITES, Condition
from vidistill.diffusion import v_from_blend
from vidistill.memory import KVMemory, Recall, Rotate, Sketch, frame_positions
from vidistill.memory.pooling import average
from vidistill.ops.attention import attention
from vidistill.ops.masks import FrameMask
from vidistill.ops.rope import Yarn, rope_table, rotate

PLACES = ("before", "after_attention")
ACTIVATIONS = {"silu": lambda width: nn.SiLU(), "norm": nn.LayerNorm}


PREDICTS = ("velocity", "x0")
NO_GRID = (0, 0)
X0_ERROR = 0.03  # variance up to which a head that predicts x0 is believed; below, the noisy latents are


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
        if self.predicts not in PREDICTS:
            raise ValueError(f"dit.predicts {self.predicts!r} is unknown; choose one of {PREDICTS}")
        unknown = sorted(set(self.sites) - set(SITES))
        if unknown:
            raise ValueError(f"dit.sites has no site {unknown}; sites are {SITES}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        return math.prod(self.patch) * self.channels


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids [*, dim] (float64) of timesteps `t` [*] in 0..1000, cosines first."""
    freqs = torch.pow(10_000, -torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = t.double()[..., None] * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (x * (1 + scale) + shift).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: modulation and norms are not computed in half precision (as Wan does)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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
        return self.project[self.index[layer]](self.embed(x))[:, :, None]


Entries = list[tuple[Tensor, Tensor]]  # keys and values [B, L, h, d] of condition tokens, one pair a softmax


class SelfAttention(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.heads, self.sharpness = cfg.heads, cfg.yarn.sharpness
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.width, cfg.width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(cfg.width, cfg.eps), RMSNorm(cfg.width, cfg.eps)

    def project(self, x: Tensor, table: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turned queries, keys before and after turning, values [B, f n, h, d] of `x` [B, F, n, D].

        `key` [B, F, 1, D] is added to queries and keys, not to values.
        """
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        if key is not None:
            q, k = q + key, k + key
        if self.sharpness != 1.0:
            q = q * self.sharpness
        q, k, v = (y.flatten(1, 2).unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        return rotate(q, table), k, rotate(k, table), v

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

    def read(self, tokens: Tensor) -> Entries:
        """Keys and values [B, L, h, d] of the text, then of the image tokens if there are any."""
        split = partial(rearrange, pattern="b l (h d) -> b l h d", h=self.heads)
        image, text = tokens[:, : self.image_tokens], tokens[:, self.image_tokens :]
        entries = [(split(self.norm_k(self.k(text))), split(self.v(text)))]
        if self.image_tokens:
            entries.append((split(self.norm_k_img(self.k_img(image))), split(self.v_img(image))))
        return entries

    def forward(self, x: Tensor, entries: Entries) -> Tensor:
        q = rearrange(self.norm_q(self.q(x)), "b f n (h d) -> b (f n) h d", h=self.heads)
        out = attention(q, *entries[0])
        for keys, values in entries[1:]:
            out = out + attention(q, keys, values)
        return self.o(rearrange(out, "b (f n) h d -> b f n (h d)", f=x.shape[1]))


class Block(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        width = cfg.width
        self.norm1 = nn.LayerNorm(width, cfg.eps, elementwise_affine=False)
        self._before, self._after = Block.before, Block.after
        self.self_attn = SelfAttention(cfg)
        self.cross_attn = CrossAttention(cfg) if cfg.text_dim else None
        affine = cfg.cross_attn_norm and cfg.text_dim > 0
        self.norm3 = nn.LayerNorm(width, cfg.eps) if affine else nn.Identity()
        self.norm2 = nn.LayerNorm(width, cfg.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(width, cfg.ffn), nn.GELU(approximate="tanh"), nn.Linear(cfg.ffn, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def compile_regions(self, mode: str) -> None:
        """Run what lies before and after the attention as two graphs, the same two for all blocks."""
        self._before = torch.compile(Block.before, fullgraph=True, dynamic=False, mode=mode)
        self._after = torch.compile(Block.after, fullgraph=True, dynamic=False, mode=mode)

    def gates(self, e: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the feed-forward: six times [B, F, 1, D]."""
        return (wide(e) + wide(self.modulation))[:, :, :, None].unbind(2)

    def before(self, x: Tensor, e: Tensor, table: Tensor, key: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shift, scale, *_ = self.gates(e)
        return self.self_attn.project(modulate(self.norm1(x), shift, scale), table, key)

    def after(self, x: Tensor, out: Tensor, e: Tensor, prompt: Entries | None, inside: Tensor | None) -> Tensor:
        _, _, gate1, shift2, scale2, gate2 = self.gates(e)
        x = x + (self.self_attn(out, x) * gate1).to(x.dtype)
        if inside is not None:
            x = x + inside
        if self.cross_attn is not None and prompt is not None:
            x = x + self.cross_attn(self.norm3(x), prompt)
        return x + (self.ffn(modulate(self.norm2(x), shift2, scale2)) * gate2).to(x.dtype)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        table: Tensor,
        prompt: Entries | None,
        mask: FrameMask | None,
        memory: KVMemory | Recall | Sketch | None,
        layer: int,
        inside: Tensor | None,
        key: Tensor | None,
    ) -> Tensor:
        """`x` [B, F, n, D], `e` [B, F, 6, D]; `inside` and `key` [B, F, 1, D] are per-frame conditions."""
        q, raw, keys, v = self._before(self, x, e, table, key)
        if memory is not None:
            keys, v = memory.stage(layer, raw, keys, v)
        out = attention(q.to(v.dtype), keys.to(v.dtype), v, mask)
        return self._after(self, x, out, e, prompt, inside)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(cfg.width, cfg.eps, elementwise_affine=False)
        self.head = nn.Linear(cfg.width, cfg.patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.width) / cfg.width**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """`x` [B, F, n, D], time embedding `e` [B, F, D] -> patches [B, F, n, P]."""
        shift, scale = (wide(e)[:, :, None] + wide(self.modulation))[:, :, :, None].unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class ImageEmbedding(nn.Module):
    """Image features -> condition tokens (Wan2.1 `MLPProj`)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, width), nn.LayerNorm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class VideoDiT(nn.Module):
    """Video diffusion transformer with one timestep per frame.

    Source: Wan2.1 2503.20314 (block, modulation, rope split); per-frame times: Diffusion Forcing 2407.01392.
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.width
        self.patch_embedding = nn.Linear(cfg.patch_dim // cfg.channels * (cfg.channels + cfg.extra_channels), width)
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if cfg.text_dim:
            self.text_embedding = nn.Sequential(
                nn.Linear(cfg.text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
            )
        if cfg.image_dim:
            self.img_emb = ImageEmbedding(cfg.image_dim, width)
        self.pool_weights = nn.ParameterDict(
            {str(s): nn.Parameter(torch.zeros(cfg.layers, cfg.heads, s, s)) for s in cfg.pool_factors}
        )
        if cfg.grid != NO_GRID:
            self.position = nn.Parameter(0.02 * torch.randn(cfg.grid[0] * cfg.grid[1], width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)
        self.sites = nn.ModuleDict(
            {name: Site(site, width, 0 if name == "modulation" else cfg.layers) for name, site in cfg.sites.items()}
        )
        self.initialise()

    def initialise(self) -> None:
        """Xavier linears, small embeddings, zero head: the network starts by predicting zero velocity."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("sites"):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for sequential in (self.time_embedding, *([self.text_embedding] if self.cfg.text_dim else [])):
            for module in sequential:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def compile_regions(self, mode: str = "default") -> None:
        """Compile the blocks around their attention: two graphs, whatever the memory holds."""
        for block in self.blocks:
            block.compile_regions(mode)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        """Velocity [B, F, C, H, W] of a whole clip seen in both directions."""
        return self(x, sigma, cond)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        cond: Condition,
        *,
        start: int | Tensor = 0,
        memory: KVMemory | Sketch | None = None,
        causal: Tensor | FrameMask | None = None,
        factor: int = 1,
    ) -> Tensor:
        """Velocity [B, F, C, H, W] of `x` [B, F, C, H, W] at noise `sigma` [B, F].

        `start` is the time of the first frame, or the time [F] of each; with a `memory` frames also attend to what it
        holds, and their entries are staged there. `causal` [F, F] is True where a frame may look at another, or a mask
        of all keys. `factor`: `x` are latents pooled by it a side, whose tokens lie where those they stand for lay.
        """
        grid = x.shape[3] // self.cfg.patch[1], x.shape[4] // self.cfg.patch[2]
        times = self.times(start, x.shape[1], cond, memory)
        table = self.rope(frame_positions(times.to(x.device), (grid[0] * factor, grid[1] * factor), factor))
        mask = FrameMask(causal, grid[0] * grid[1]) if isinstance(causal, Tensor) else causal
        e, e6 = self.embed_time(sigma, cond)
        h = self.embed_patches(x, cond, factor)
        prompt = self.read_prompt(cond, memory)
        recompute = self.cfg.checkpoint and torch.is_grad_enabled()
        history = memory.recall() if memory is not None and recompute else memory
        for layer, block in enumerate(self.blocks):
            h, inside = self.inject(h, cond, layer)
            key = self.sites["qk"](cond.per_frame["qk"], layer) if "qk" in self.sites else None
            args = (h, e6, table, prompt and prompt[layer], mask, history, layer, inside, key)
            h = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        out = self.unpatchify(self.head(h, e).to(x.dtype), grid)
        return v_from_blend(x, out, sigma, X0_ERROR) if self.cfg.predicts == "x0" else out

    def times(self, start: int | Tensor, frames: int, cond: Condition, memory: KVMemory | Sketch | None) -> Tensor:
        """Time of each frame [F]; a memory makes room for them, and keeps their poses."""
        if memory is not None:
            poses = cond.per_frame["qk"] if "qk" in self.sites else None
            return memory.begin(int(start) if isinstance(start, int) else 0, frames, poses)
        return start if isinstance(start, Tensor) else torch.arange(start, start + frames)

    def embed_time(self, sigma: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """Time embedding [B, F, D] and block modulation [B, F, 6, D]."""
        t = timestep_embedding(sigma.double() * 1000, self.cfg.freq_dim)
        e = self.time_embedding(t.to(self.time_embedding[0].weight.dtype))
        if "modulation" in self.sites:
            e = e + self.sites["modulation"](cond.per_frame["modulation"])[:, :, 0]
        return e, self.time_projection(e).unflatten(-1, (6, -1))

    def embed_patches(self, x: Tensor, cond: Condition, factor: int = 1) -> Tensor:
        """Latents (and condition channels) -> tokens [B, F, n, D]."""
        if self.cfg.extra_channels:
            if cond.channels is None:
                raise ValueError(f"this network needs Condition.channels with {self.cfg.extra_channels} channels")
            x = torch.cat((x, cond.channels.to(x.dtype)), dim=2)
        _, p, q = self.cfg.patch
        h = self.patch_embedding(rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=q))
        if self.cfg.grid == NO_GRID:
            return h
        return h + average(self.position[None, :, None], self.cfg.grid, factor)[0, :, 0]

    def embed_tokens(self, cond: Condition) -> Tensor | None:
        """Condition tokens at the network's width; image tokens come first, zero-padded to the text tokens' width."""
        if not self.cfg.text_dim:
            return None
        if cond.tokens is None:
            raise ValueError("this network cross-attends: Condition.tokens is missing")
        if not self.cfg.image_dim:
            return self.text_embedding(cond.tokens)
        image = cond.tokens[:, : self.cfg.image_tokens, : self.cfg.image_dim]
        text = cond.tokens[:, self.cfg.image_tokens :, : self.cfg.text_dim]
        return torch.cat((self.img_emb(image), self.text_embedding(text)), dim=1)

    def read_prompt(self, cond: Condition, memory: KVMemory | Sketch | None) -> list[Entries] | None:
        """Keys and values of the condition tokens, one item a layer; with a memory computed once for each prompt."""
        if not self.cfg.text_dim:
            return None

        def read() -> list[Entries]:
            tokens = self.embed_tokens(cond)
            return [block.cross_attn.read(tokens) for block in self.blocks]

        return read() if memory is None else memory.read_once(cond.tokens, read)

    def inject(self, h: Tensor, cond: Condition, layer: int) -> tuple[Tensor, Tensor | None]:
        """Apply site `hidden` of `layer`: hidden states [B, F, n, D] and what is left to add after attention."""
        if "hidden" not in self.sites:
            return h, None
        site = self.sites["hidden"]
        value = site(cond.per_frame["hidden"], layer)
        if value is None or site.cfg.place == "after_attention":
            return h, value
        return h + value, None

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        _, p, q = self.cfg.patch
        return rearrange(patches, "b f (h w) (p q c) -> b f c (h p) (w q)", h=grid[0], p=p, q=q)

    def rope(self, positions: Tensor) -> Tensor:
        """Cosines and sines [2, S, 1, head_dim / 2] of tokens at `positions` [S, 3]."""
        return rope_table(positions, self.cfg.head_dim, self.cfg.rope_theta, yarn=self.cfg.yarn)

    def new_rotation(self) -> Rotate:
        """What turns keys to positions, or back, for a memory; layers and passes of a chunk share one table."""
        last: tuple[Tensor, Tensor] | None = None

        def turn(keys: Tensor, positions: Tensor, inverse: bool) -> Tensor:
            nonlocal last
            if last is None or last[0] is not positions:
                last = positions, self.rope(positions.to(keys.device))
            return rotate(keys, last[1], inverse).to(keys.dtype)

        return turn

    def pool_scores(self, layer: int, factor: int) -> Tensor:
        """Learned scores [h, factor, factor] of the tokens of a cell."""
        if str(factor) not in self.pool_weights:
            raise ValueError(f"memory.pool 'learned' needs factor {factor} in dit.pool_factors {self.cfg.pool_factors}")
        return self.pool_weights[str(factor)][layer]


def recomputing(net: VideoDiT) -> VideoDiT:
    """A network of the very same weights that recomputes its blocks in the backward pass."""
    with torch.device("meta"):
        other = VideoDiT(replace(net.cfg, checkpoint=True))
    other.load_state_dict(net.state_dict(), assign=True)
    return other.train(net.training)


def grown(net: VideoDiT, cfg: DiTConfig) -> VideoDiT:
    """`net` with the sites, pooling weights and rotary extension of `cfg` that it lacks.

    New sites must be `zero_init`, so that it computes what it did but for the extension; ValueError otherwise.
    """
    sites = {**cfg.sites, **net.cfg.sites}
    new = sorted(set(sites) - set(net.cfg.sites))
    if loud := [name for name in new if not sites[name].zero_init]:
        raise ValueError(f"dit.sites.{loud[0]} is new to this network: set zero_init so that it starts without effect")
    yarn = cfg.yarn if cfg.yarn.ratio != 1.0 else net.cfg.yarn
    wanted = replace(net.cfg, sites=sites, yarn=yarn, pool_factors=cfg.pool_factors or net.cfg.pool_factors)
    if wanted == net.cfg:
        return net
    other = VideoDiT(wanted)
    other.load_state_dict({**other.state_dict(), **net.state_dict()})
    return other.train(net.training)
