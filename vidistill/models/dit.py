"""VideoDiT: the one network behind teacher, critic and student. No sigma maths, no chunks."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidistill.conditioning.condition import VIEW_SITE, Condition
from vidistill.diffusion import v_from_blend
from vidistill.memory.autograd import AutogradView
from vidistill.memory.cache import KVMemory
from vidistill.memory.history import EntryRecorder
from vidistill.memory.pooling import average, frame_positions
from vidistill.models.layers import (
    NO_GRID,
    Around,
    Block,
    DiTConfig,
    Entries,
    Head,
    ImageEmbedding,
    Shown,
    Site,
    SiteConfig,
)
from vidistill.ops.linear import convert_linears
from vidistill.ops.masks import FrameMask
from vidistill.ops.rope import composed, rope_table, rotate, view_table
from vidistill.ops.sequence import SequenceGroup

SHAPES = 64  # graphs of one region, one a shape of clip, before torch takes more for a mistake (its own limit is 8)

__all__ = ["NO_GRID", "DiTConfig", "SiteConfig", "VideoDiT", "extend", "recomputing", "share_weights"]

X0_ERROR = 0.03  # variance up to which a head that predicts x0 is believed; below, the noisy latents are


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids [*, dim] (float64) of timesteps `t` [*] in 0..1000, cosines first."""
    freqs = torch.pow(10_000, -torch.arange(dim // 2, dtype=torch.float64, device=t.device) / (dim // 2))
    angles = t.double()[..., None] * freqs
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def new_site(cfg: DiTConfig, name: str) -> Site:
    """The untrained projections of a site of `cfg`."""
    return Site(cfg.projected[name], cfg.width, 0 if name == "modulation" else cfg.layers)


def new_pool_weights(cfg: DiTConfig) -> nn.ParameterDict:
    """Scores that pool by averages until they are trained, of each factor."""
    return nn.ParameterDict({str(s): nn.Parameter(torch.zeros(cfg.layers, cfg.heads, s, s)) for s in cfg.pool_factors})


class VideoDiT(nn.Module):
    """Video diffusion transformer with one timestep per frame.

    Source: Wan2.1 2503.20314 (block, modulation, rope split); per-frame times: Diffusion Forcing 2407.01392.
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.sequence: SequenceGroup | None = None  # processes that share the tokens of every frame
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
        self.pool_weights = new_pool_weights(cfg)
        if cfg.grid != NO_GRID:
            self.position = nn.Parameter(0.02 * torch.randn(cfg.grid[0] * cfg.grid[1], width))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.head = Head(cfg)
        self.sites = nn.ModuleDict({name: new_site(cfg, name) for name in cfg.projected})
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

    @property
    def units(self) -> list[list[nn.Module]]:
        """Layers that run together, inner ones first: what a sharded network gathers at a time."""
        readers = [block.cross_attn.readers for block in self.blocks if block.cross_attn is not None]
        return [*readers, *([block] for block in self.blocks)]

    def compile_regions(self, mode: str = "default") -> None:
        """Compile the blocks around their attention: two graphs, whatever the memory holds, one a shape."""
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
        for block in self.blocks:
            block.compile_regions(mode)

    @property
    def device(self) -> torch.device:
        return self.head.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.head.weight.dtype

    def for_inference(
        self,
        tokens: int,
        linears: str = "plain",
        compiled: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "VideoDiT":
        """A network of the same weights that only runs, in passes of `tokens`: the linear layers of its blocks are of
        kind `linears` (see `ops.linear`), the blocks `compiled` around their attention, its weights on `device` in
        `dtype` (None: as they are). This one stays as it is."""
        net = share_weights(self, self.cfg, device, dtype).eval().requires_grad_(False)
        convert_linears(net.blocks, linears, tokens)
        if compiled:
            net.compile_regions()
        return net

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
        memory: KVMemory | EntryRecorder | None = None,
        causal: Tensor | FrameMask | None = None,
        factor: int = 1,
        output: bool = True,
    ) -> Tensor:
        """Velocity [B, F, C, H, W] of `x` [B, F, C, H, W] at noise `sigma` [B, F].

        `start` is the time of the first frame, or the time [F] of each; with a `memory` frames also attend to what it
        holds, and their entries are staged there. `causal` [F, F] is True where a frame may look at another, or a mask
        of all keys. `factor`: `x` are latents pooled by it a side, whose tokens lie where those they stand for lay.
        Without `output` only entries are staged: the rest of the last block is left out, the velocity is zero.
        """
        grid = x.shape[3] // self.cfg.patch[1], x.shape[4] // self.cfg.patch[2]
        times = self.times(start, x.shape[1], cond, memory)
        table = self.rope(frame_positions(times.to(x.device), (grid[0] * factor, grid[1] * factor), factor))
        mask = FrameMask(causal, grid[0] * grid[1]) if isinstance(causal, Tensor) else causal
        e, e6 = self.embed_time(sigma, cond, memory)
        h = self.embed_patches(x, cond, factor)
        prompt, (hidden, keys, view) = self.read_prompt(cond, memory), self.read_sites(cond, memory, grid[0] * grid[1])
        recompute = self.cfg.checkpoint and torch.is_grad_enabled()
        # A block that runs again in the backward pass must find the memory as it was, and write nothing twice.
        history = memory.recall() if memory is not None and recompute else memory
        around = self.around(table if view is None else composed(table, view), view, mask, history, x.shape[1])
        for layer, block in enumerate(self.blocks):
            h, inside = self.inject(h, hidden[layer])
            needed = output or layer < self.cfg.layers - 1
            args = (h, e6, around, layer, prompt and prompt[layer], inside, keys[layer], needed)
            h = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        if not output:
            return torch.zeros_like(x)
        patches = self.head(h, e) if self.sequence is None else self.sequence.whole(self.head(h, e))
        out = self.unpatchify(patches.to(x.dtype), grid)
        return v_from_blend(x, out, sigma, X0_ERROR) if self.cfg.predicts == "x0" else out

    def around(
        self,
        table: Tensor,
        view: Tensor | None,
        mask: FrameMask | None,
        memory: KVMemory | AutogradView | EntryRecorder | None,
        frames: int,
    ) -> Around:
        """What all blocks see alike; of tables for whole frames, the part of this process's tokens."""
        if self.sequence is not None:
            table = self.sequence.own_table(table, frames)
            view = None if view is None else self.sequence.own_table(view, frames)
        return Around(table, view, mask, memory, self.sequence)

    def split_sequence(self, group: SequenceGroup) -> None:
        """From now on each process of `group` runs this network on its part of the tokens of every frame.

        All of them must pass the same latents and conditions; all get the whole velocity. Gradients are those of the
        part, times the processes: their mean over all processes of the run is that of the whole.
        """
        group.check(self.cfg.heads)
        self.sequence = group

    @property
    def own_heads(self) -> int:
        """Heads that this process attends with, and remembers."""
        return self.cfg.heads if self.sequence is None else self.cfg.heads // self.sequence.size

    def times(
        self, start: int | Tensor, frames: int, cond: Condition, memory: KVMemory | EntryRecorder | None
    ) -> Tensor:
        """Time of each frame [F]; a memory makes room for them, and keeps their poses."""
        if memory is not None:
            poses = cond.per_frame["qk"] if "qk" in self.sites else None
            return memory.begin(int(start) if isinstance(start, int) else 0, frames, poses)
        return start if isinstance(start, Tensor) else torch.arange(start, start + frames)

    def embed_time(
        self, sigma: Tensor, cond: Condition, memory: KVMemory | EntryRecorder | None = None
    ) -> tuple[Tensor, Tensor]:
        """Time embedding [B, F, D] and block modulation [B, F, 6, D]; with a memory computed once for each `sigma`."""

        def read():
            t = timestep_embedding(sigma.double() * 1000, self.cfg.freq_dim)
            e = self.time_embedding(t.to(self.time_embedding[0].weight.dtype))
            return e, e if "modulation" in self.sites else self.modulation(e)

        e, e6 = read() if memory is None else memory.cached("levels", sigma, read)
        if "modulation" in self.sites:
            e = e + self.sites["modulation"](cond.per_frame["modulation"])[:, :, 0]
            e6 = self.modulation(e)
        return e, e6

    def modulation(self, e: Tensor) -> Tensor:
        return self.time_projection(e).unflatten(-1, (6, -1))

    def embed_patches(self, x: Tensor, cond: Condition, factor: int = 1) -> Tensor:
        """Latents (and condition channels) -> tokens [B, F, n, D]."""
        if self.cfg.extra_channels:
            if cond.channels is None:
                raise ValueError(f"this network needs Condition.channels with {self.cfg.extra_channels} channels")
            x = torch.cat((x, cond.channels.to(x.dtype)), dim=2)
        _, p, q = self.cfg.patch
        patches = rearrange(x.to(self.dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=q)
        own = self.sequence.own if self.sequence is not None else lambda whole: whole
        h = self.patch_embedding(own(patches))
        if self.cfg.grid == NO_GRID:
            return h
        return h + own(average(self.position[None, :, None], self.cfg.grid, factor).movedim(1, 2))[0]

    def embed_tokens(self, cond: Condition) -> Tensor | None:
        """Condition tokens at the network's width; image tokens come first, zero-padded to the text tokens' width."""
        if not self.cfg.text_dim:
            return None
        if cond.tokens is None:
            raise ValueError("this network cross-attends: Condition.tokens is missing")
        tokens = cond.tokens.to(self.dtype)
        if not self.cfg.image_dim:
            return self.text_embedding(tokens)
        image = tokens[:, : self.cfg.image_tokens, : self.cfg.image_dim]
        text = tokens[:, self.cfg.image_tokens :, : self.cfg.text_dim]
        return torch.cat((self.img_emb(image), self.text_embedding(text)), dim=1)

    def read_prompt(self, cond: Condition, memory: KVMemory | EntryRecorder | None) -> list[Entries] | None:
        """Keys and values of the condition tokens, one item a layer; with a memory computed once for each prompt."""
        if not self.cfg.text_dim:
            return None

        def read():  # annotations of inner functions cannot be traced
            tokens = self.embed_tokens(cond)
            return [block.cross_attn.read(tokens) for block in self.blocks]

        return read() if memory is None else memory.cached("prompt", cond.tokens, read)

    def read_sites(
        self, cond: Condition, memory: KVMemory | EntryRecorder | None, tokens: int
    ) -> tuple[Shown, Shown, Tensor | None]:
        """What sites `hidden` and `qk` show each layer, and what turns the `tokens` of a frame by site `view`; with a
        memory computed once for each condition."""

        def read():
            view = None
            if self.cfg.fov:
                heading = cond.per_frame[VIEW_SITE][..., 0]
                view = view_table(heading, tokens, self.cfg.head_dim, self.cfg.panorama)
            return self.shown("hidden", cond), self.shown("qk", cond), view

        return read() if memory is None else memory.cached("sites", cond.per_frame, read)

    def shown(self, name: str, cond: Condition) -> Shown:
        if name not in self.sites:
            return [None] * self.cfg.layers
        return [self.sites[name](cond.per_frame[name], layer) for layer in range(self.cfg.layers)]

    def inject(self, h: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, F, n, D] with what site `hidden` shows a layer, and what is left to add after attention."""
        if value is None or self.sites["hidden"].cfg.place == "after_attention":
            return h, value
        return h + value, None

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        _, p, q = self.cfg.patch
        return rearrange(patches, "b f (h w) (p q c) -> b f c (h p) (w q)", h=grid[0], p=p, q=q)

    def rope(self, positions: Tensor) -> Tensor:
        """Cosines and sines [2, S, 1, head_dim / 2] of tokens at `positions` [S, 3]."""
        return rope_table(
            positions, self.cfg.head_dim, self.cfg.rope_theta, yarn=self.cfg.yarn, panorama=self.cfg.panorama
        )

    def new_rotation(self) -> "Rotation":
        """What turns keys to positions, or back, for a memory."""
        return Rotation(self.rope)

    def pool_scores(self, layer: int, factor: int) -> Tensor:
        """Learned scores [h, factor, factor] of the tokens of a cell."""
        if str(factor) not in self.pool_weights:
            raise ValueError(f"memory.pool 'learned' needs factor {factor} in dit.pool_factors {self.cfg.pool_factors}")
        scores = self.pool_weights[str(factor)][layer]
        return scores if self.sequence is None else self.sequence.own(scores, 0)


class Rotation:
    """Turns keys to positions, or back; layers and passes of a chunk share one table."""

    def __init__(self, rope: Callable[[Tensor], Tensor]) -> None:
        self._rope = rope
        self._last: tuple[Tensor, Tensor] | None = None

    def table(self, positions: Tensor, device: torch.device) -> Tensor:
        if self._last is None or self._last[0] is not positions:
            self._last = positions, self._rope(positions.to(device))
        return self._last[1]

    def __call__(self, keys: Tensor, positions: Tensor, inverse: bool) -> Tensor:
        return rotate(keys, self.table(positions, keys.device), inverse).to(keys.dtype)


def share_weights(
    net: VideoDiT, cfg: DiTConfig, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> VideoDiT:
    """Another network of the very same weights, or of copies where they are wanted elsewhere or in another type."""
    with torch.device("meta"):
        other = VideoDiT(cfg)
    weights = {name: x.to(device or x.device, dtype or x.dtype) for name, x in net.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    return other.train(net.training)


def recomputing(net: VideoDiT) -> VideoDiT:
    """A network of the very same weights that recomputes its blocks in the backward pass."""
    return share_weights(net, replace(net.cfg, checkpoint=True))


def extend(net: VideoDiT, cfg: DiTConfig) -> VideoDiT:
    """`net` with the condition channels, sites, field of view, pooling weights and rotary extension of `cfg` it lacks.

    New sites must be `zero_init`, so that it computes what it did but for extension and view; ValueError otherwise. New
    condition channels come after those it has, and weigh nothing at first.
    """
    wanted = net.cfg.extend(cfg)
    new = sorted(set(wanted.projected) - set(net.cfg.sites))
    if loud := [name for name in new if not wanted.sites[name].zero_init]:
        raise ValueError(f"dit.sites.{loud[0]} is new to this network: set zero_init so that it starts without effect")
    if wanted == net.cfg:
        return net
    with torch.device("meta"):  # what `net` has is not made again, where every process may hold one
        other = VideoDiT(wanted)
    other.sites.update({name: new_site(wanted, name) for name in new})
    other.pool_weights = new_pool_weights(wanted)
    state = net.state_dict()
    grown = other.patch_embedding.in_features - net.patch_embedding.in_features
    state["patch_embedding.weight"] = F.pad(state["patch_embedding.weight"], (0, grown))
    own = {name: x for name, x in other.state_dict().items() if not x.is_meta}
    other.load_state_dict({**own, **state}, assign=True)
    return other.train(net.training)
