"""Parameter names of published Wan networks <-> ours. No tensor is changed but in shape: every map is exact."""

import math
import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig, SiteConfig

State = Mapping[str, Tensor]

# What wrappers of training frameworks put before, or between, the names of a network.
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
PREFIXES = (
    "model.",
    "module.",
    "generator.",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "net.",
    "dit.",
    "pipe.dit.",
)
HEAD_DIM = 128  # of every Wan network
MOST_LAYERS = 200
PATCH = (1, 2, 2)  # of every Wan network
LAYERS = {1536: 30, 3072: 30, 5120: 40}  # width of a published network -> blocks; tells a partial file from a small one

# Original name -> diffusers: outside the blocks, then inside a block, where `norm3` and `norm2` change places.
OUTSIDE = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "head.head.": "proj_out.",
    "head.modulation": "scale_shift_table",
}
IN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in {
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "o": "to_out.0",
            "norm_q": "norm_q",
            "norm_k": "norm_k",
            "k_img": "add_k_proj",
            "v_img": "add_v_proj",
            "norm_k_img": "norm_added_k",
        }.items()
    },
}
FROM_OUTSIDE = {theirs: name for name, theirs in OUTSIDE.items()}
FROM_BLOCK = {theirs: name for name, theirs in IN_BLOCK.items()}
AUDIO = {
    "audio_proj.proj.": "sites.hidden.embed.0.",
    "audio_proj.norm_out.": "sites.hidden.embed.1.",
    "audio_cond_projs.": "sites.hidden.project.",
}


def bare(key: str) -> str:
    """`key` without what training frameworks added."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while cut := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(cut)
    return key


def renamed(key: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """`key` under the other naming; a name that neither map knows stays."""
    if block := re.match(r"^(blocks\.\d+\.)(.+?)(\.weight|\.bias)?$", key):
        start, name, end = block.groups()
        return start + inside.get(name, name) + (end or "")
    for theirs, name in outside.items():
        if key.startswith(theirs):
            return name + key.removeprefix(theirs)
    return key


def to_diffusers_key(key: str) -> str:
    """Name of an original Wan parameter in diffusers' `WanTransformer3DModel`."""
    return renamed(key, OUTSIDE, IN_BLOCK)


def from_diffusers_key(key: str) -> str:
    """The inverse of `to_diffusers_key`."""
    return renamed(key, FROM_OUTSIDE, FROM_BLOCK)


def is_diffusers(key: str) -> bool:
    inside = r"\.attn[12]\.|^blocks\.\d+\.(scale_shift_table$|ffn\.net\.|norm2\.)"
    return key.startswith(tuple(FROM_OUTSIDE)) or re.search(inside, key) is not None


def ours(key: str) -> str:
    """Our name of a parameter of any published Wan network."""
    key = bare(key)
    if is_diffusers(key):
        return from_diffusers_key(key)
    for theirs, name in AUDIO.items():
        if key.startswith(theirs):
            return name + key.removeprefix(theirs)
    return key


def original_key(key: str) -> str:
    """The original Wan (or OmniAvatar) name of one of our parameters."""
    for theirs, name in AUDIO.items():
        if key.startswith(name):
            return theirs + key.removeprefix(name)
    return key


def our_names(keys: Iterable[str], source: str = "state dict") -> dict[str, str]:
    """Our name of each parameter -> the key it is published under; ValueError where two keys mean one parameter."""
    names: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str):
            raise ValueError(
                f"{source} has the key {key!r}, which is no name of a parameter: it may be the state of an optimiser"
            )
        name = ours(key)
        if name in names:
            raise ValueError(f"{source}: {names[name]} and {key} mean the same parameter; save the one that counts")
        names[name] = key
    return names


def to_ours(state: State) -> dict[str, Tensor]:
    """`state` under our names; the patch convolution becomes a linear layer (a view, nothing is copied)."""
    out = {name: state[key] for name, key in our_names(state).items()}
    if (weight := out.get("patch_embedding.weight")) is not None:
        out["patch_embedding.weight"] = weight.reshape(weight.shape[0], -1)
    return out


def to_original(state: State, cfg: DiTConfig, style: str = "wan") -> dict[str, Tensor]:
    """Our `state` as it is published, the inverse of `to_ours`.

    `style` of the names: "wan" (the original ones), "diffusers", or "ours".
    """
    styles: dict[str, Callable[[str], str]] = {
        "wan": original_key,
        "diffusers": lambda key: to_diffusers_key(original_key(key)),
        "ours": str,
    }
    names = styles[style]
    shape = (cfg.width, cfg.channels + cfg.extra_channels, *cfg.patch)
    return {names(key): x.reshape(shape) if key == "patch_embedding.weight" else x for key, x in state.items()}


# A part of a name that only some networks have -> the parameter whose shape says how large that part is.
PARTS = {
    ".cross_attn.": "text_embedding.0.weight",
    "text_embedding.": "text_embedding.0.weight",
    "img_emb.": "img_emb.proj.0.weight",
    ".k_img.": "img_emb.proj.0.weight",
    "sites.hidden.": "sites.hidden.embed.0.weight",
}

# Axes of the parameters that tell an architecture, where they are not the 2 of a linear layer: rCM keeps the patch
# convolution as one, whose patch is always Wan's.
AXES = {"patch_embedding.weight": (2, 5), "img_emb.proj.0.weight": (1,)}


def infer_config(state: State, *, heads: int = 0) -> DiTConfig:
    """Architecture behind a Wan state dict of any naming; only the number of heads is not in the shapes.

    `heads` 0: width / 128, as in every published Wan network. Raises ValueError if the names are not Wan's.
    """
    named = {name: tuple(state[key].shape) for name, key in our_names(state).items()}
    needed = ["patch_embedding.weight", "head.head.weight", "blocks.0.ffn.0.weight", "time_embedding.0.weight"]
    needed += [name for sign, name in PARTS.items() if any(sign in key for key in named)]
    if absent := [name for name in needed if name not in named]:
        raise ValueError(f"these are not the parameters of a Wan network: {absent} missing; {looks_like(state)}")
    for name in needed:
        if len(named[name]) not in AXES.get(name, (2,)) or 0 in named[name]:
            axes = " or ".join(map(str, AXES.get(name, (2,))))
            raise ValueError(f"{name} is {list(named[name])}; in a Wan network it has {axes} axes, none of them empty")
    width, inputs, *patch = named["patch_embedding.weight"]
    if not patch:
        patch, inputs = [*PATCH], inputs // math.prod(PATCH)
    if not heads and width % HEAD_DIM:
        raise ValueError(
            f"width {width} (of patch_embedding.weight) is not made of heads of {HEAD_DIM}: say how many heads there "
            "are (--heads)"
        )
    if heads < 0 or (heads and width % heads):
        raise ValueError(f"--heads {heads} does not divide width {width} (of patch_embedding.weight)")
    channels = named["head.head.weight"][0] // math.prod(patch)
    layers = 1 + max(int(m.group(1)) for m in (re.match(r"blocks\.(\d{1,4})\.", key) for key in named) if m)
    if layers > MOST_LAYERS:
        raise ValueError(f"blocks.{layers - 1} is one of {layers} blocks; at most {MOST_LAYERS} are read")
    sites = {}
    if "sites.hidden.embed.0.weight" in named:
        hidden, dim = named["sites.hidden.embed.0.weight"]
        taken = sum(re.fullmatch(r"sites\.hidden\.project\.\d+\.weight", key) is not None for key in named)
        sites["hidden"] = SiteConfig(dim=dim, hidden=hidden, layers=tuple(range(2, 2 + taken)), activation="norm")
    try:
        return DiTConfig(
            channels=channels,
            extra_channels=inputs - channels,
            patch=(patch[0], patch[1], patch[2]),
            width=width,
            layers=max(layers, LAYERS.get(width, 0)),
            heads=heads or width // HEAD_DIM,
            ffn=named["blocks.0.ffn.0.weight"][0],
            freq_dim=named["time_embedding.0.weight"][1],
            text_dim=named["text_embedding.0.weight"][1] if "text_embedding.0.weight" in named else 0,
            image_dim=named["img_emb.proj.0.weight"][0] if "img_emb.proj.0.weight" in named else 0,
            cross_attn_norm=any(".norm3." in key for key in named),
            sites=sites,
        )
    except ValueError as error:
        shapes = ", ".join(f"{name} {list(named[name])}" for name in needed)
        raise ValueError(f"{error}; told from the shapes of {shapes}") from error


# A part of a name -> the kind of network that has it, where it is none that is read here.
KINDS = {
    "lora_": "a LoRA (LongLive publishes one): give the base checkpoint too",
    ".proj_l.": "a TurboWan network with sparse-linear attention (SLA): take one with full attention",
    "to_gate_compress": "a FastWan network with sparse attention (VSA): take one with full attention",
    ".action_model.": "Matrix-Game, whose action modules are not read",
    "vace_": "a VACE network, whose control blocks are not read",
    "control_adapter.": "a Wan Fun network with camera control, which is not read",
    "motion_encoder.": "Wan-Animate, which is not read",
    "casual_audio_encoder.": "Wan2.2-S2V, which is not read",
    "ref_conv.": "a Wan Fun network with a reference picture, which is not read",
    "double_blocks.": "a HunyuanVideo network, not Wan's",
    "transformer_blocks.": "a network of another family than Wan (LTX-Video, CogVideoX, ...)",
    "self_attn.q_proj.": "a language model",
    "encoder.block.": "a text encoder (T5)",
}


def looks_like(keys: Iterable[str]) -> str:
    """A sentence on what a state dict with these keys seems to be."""
    names = [bare(key) for key in keys]
    if not names:
        return "the file holds no tensors"
    for sign, kind in KINDS.items():
        if any(sign in name for name in names):
            return f"it looks like {kind}"
    if any(name.startswith(("audio_proj.", "audio_cond_projs.")) for name in names):
        return "it looks like an OmniAvatar / LiveTalk network"
    if any(".attn1." in name for name in names):
        return "it looks like a diffusers transformer"
    if any(name.startswith("blocks.") and ".self_attn." in name for name in names):
        return "it looks like an original Wan network or a student of the Self Forcing family"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        return "it looks like a video codec (VAE)"
    return f"its first names are {names[:3]}"


def check_state(state: State, net: VideoDiT, source: str) -> None:
    """Raise ValueError unless `state` (our names) fits `net`: says which keys are missing, unexpected or mis-shaped."""
    want = {key: tuple(x.shape) for key, x in net.state_dict().items()}
    missing = [original_key(key) for key in want if key not in state]
    unexpected = [original_key(key) for key in state if key not in want]
    shaped = [
        f"{original_key(key)} is {list(state[key].shape)}, expected {list(want[key])}"
        for key in want
        if key in state and tuple(state[key].shape) != want[key]
    ]
    if not (missing or unexpected or shaped):
        return
    parts = [
        f"{len(found)} {what} ({'; '.join(found[:8])}{', ...' if len(found) > 8 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shaped))
        if found
    ]
    raise ValueError(
        f"{source} does not fit the network: {', '.join(parts)}; {looks_like(original_key(key) for key in state)}"
    )


def build(state: State, cfg: DiTConfig, source: str = "state dict") -> VideoDiT:
    """A VideoDiT that owns the tensors of `state` (our names): one copy of the weights in memory, no initialisation."""
    with torch.device("meta"):
        net = VideoDiT(cfg)
    check_state(state, net, source)
    net.load_state_dict(dict(state), assign=True)
    return net
