"""Goldens of single forwards: the bidirectional network, and the training masks of the causal one."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from golden import Golden
from torch import Tensor
from wan_tables import Table

from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape
from vidistill.interop.keys import State, bare, build, infer_config, original_key, to_ours
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.student import CausalStudent, StudentConfig


def network(weights: State, arch: dict[str, Any], prefix: str = "") -> VideoDiT:
    """The network of a golden folder; `arch` is its `transformer` block (or a config that holds the same names)."""
    state = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    cfg = replace(infer_config(state, heads=arch["num_heads"]), eps=arch["eps"])
    return build(to_ours(state), cfg, "weights.safetensors").requires_grad_(True)


def text(golden: Golden, rows: slice | int, arch: dict[str, Any], name: str = "prompt_embeds") -> Condition:
    """Prompt rows, zero-padded to the network's text length as the original does."""
    tokens = golden.given(name)[rows]
    tokens = tokens[None] if tokens.ndim == 2 else tokens
    return Condition(tokens=F.pad(tokens, (0, 0, 0, max(0, arch["text_len"] - tokens.shape[1]))))


def grad_norms(net: VideoDiT, order: list[str]) -> Tensor:
    """L2 norms of the parameters' gradients in the golden's order; 0 where there is none."""
    grads = {bare(original_key(name)): p.grad for name, p in net.named_parameters()}
    return torch.stack([torch.zeros(()) if grads[n] is None else grads[n].norm() for n in map(bare, order)])


def grad_of(net: VideoDiT, name: str, shape: torch.Size) -> Tensor:
    grads = {original_key(key): p.grad for key, p in net.named_parameters()}
    return grads[bare(name)].reshape(shape)


def bidirectional(golden: Golden) -> None:
    cfg = golden.config
    arch = cfg["transformer"]
    net, table = network(golden.weights, arch), Table(shift=cfg["timestep_shift"])
    x = golden.given("x")
    cond = text(golden, slice(0, x.shape[0]), arch)
    i = 0
    while f"in.timestep.{i}" in golden.io:
        t = golden.given(f"timestep.{i}")[:, :1].expand(x.shape[:2])  # the original sees one time per sample
        seen = watch(net) if any(n.startswith(f"step{i}.") for n in golden.wanted()) else None
        with torch.no_grad():
            v = net.velocity(x, t.double() / 1000, cond)
        golden.compare(f"flow.{i}", v)
        golden.compare(f"x0.{i}", table.x0(x, v, t))
        if seen is not None:
            activations(golden, f"step{i}.act", seen)
        i += 1


def watch(net: VideoDiT) -> dict[str, Tensor]:
    """Outputs of the network's parts during its next forward."""
    seen: dict[str, Tensor] = {}
    parts = {"patch_embedding": net.patch_embedding, "text_embedding": net.text_embedding}
    parts |= {"time_embedding": net.time_embedding, "time_projection": net.time_projection}
    for n, block in enumerate(net.blocks):
        parts |= {f"block{n}": block, f"block{n}.self_attn": block.self_attn, f"block{n}.cross_attn": block.cross_attn}
    hooks = []
    for name, part in parts.items():
        hooks.append(part.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out)))

    def done(*_: Any) -> None:
        for hook in hooks:
            hook.remove()

    hooks.append(net.register_forward_hook(done))
    return seen


def activations(golden: Golden, prefix: str, seen: dict[str, Tensor]) -> None:
    """Compare parts with the original's: tokens are one sequence there, and times one per sample."""
    for name in golden.wanted(prefix):
        part, want = name.removeprefix(prefix + "."), golden.want(name)
        if part == "patch_embedding_sample_last":
            rows = seen["patch_embedding"][-1]  # [F, n, D] -> a convolution's [1, D, F, H, W]
            golden.compare(name, rows.permute(2, 0, 1).reshape(want.shape))
        elif part in ("time_embedding", "time_projection"):
            golden.compare(name, seen[part][:, 0].reshape(want.shape))
        elif part in seen:
            golden.compare(name, seen[part].reshape(want.shape))


def train_mask(golden: Golden) -> None:
    cfg = golden.config
    net, table = network(golden.weights, cfg["transformer"]), Table(shift=cfg["timestep_shift"])
    golden.each_variant(lambda golden, name, variant: masked_forward(golden, name, variant, net, table))


def masked_forward(golden: Golden, name: str, variant: dict[str, Any], net: VideoDiT, table: Table) -> None:
    """One block-causal (or teacher-forcing) forward and its loss gradient."""
    x, t = golden.given("x"), golden.given(f"{name}.timestep")
    cond = text(golden, slice(0, x.shape[0]), golden.config["transformer"])
    student = chunked(net, x, variant)
    frames = x.shape[1]
    if variant["teacher_forcing"]:
        clean, clean_t = golden.given("clean"), torch.zeros_like(t)
        if variant["noise_augmented_clean"]:
            clean_t = golden.given(f"{name}.aug_t")
            clean = table.add_noise(clean, golden.given(f"{name}.aug_noise"), clean_t)
            golden.compare(f"{name}.clean_aug", clean)
        mask = student.teacher_forcing_mask(frames)
        v = student.teacher_forced(x, t.double() / 1000, cond, clean, clean_t.double() / 1000)
    else:
        mask = student.causal_mask(frames)
        v = net(x, t.double() / 1000, cond, causal=mask)
    loss = F.mse_loss(v, golden.given("target"))
    net.zero_grad()
    loss.backward()
    tokens = student.shape.tokens_per_frame
    golden.compare(f"{name}.mask", mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(torch.uint8))
    golden.compare(f"{name}.flow", v)
    golden.compare(f"{name}.x0", table.x0(x, v, t))
    golden.compare(f"{name}.loss", loss)
    golden.compare(f"{name}.grad_norms", grad_norms(net, golden.config["parameter_order_of_grad_norms"]))
    for full in golden.wanted(f"{name}.grad."):
        golden.compare(full, grad_of(net, full.removeprefix(f"{name}.grad."), golden.want(full).shape))


def chunked(net: VideoDiT, x: Tensor, variant: dict[str, Any]) -> CausalStudent:
    """A student for clips like `x` with the variant's chunks; its window, as in training there, has no sinks."""
    local, frames = variant["local_attn_size"], x.shape[1]
    policy = "full" if local < 0 else "window"
    memory = MemoryConfig(policy=policy, frames=frames if local < 0 else local, phase="absolute")
    cfg = StudentConfig(
        chunk=variant["num_frame_per_block"],
        first_chunk=1 if variant["independent_first_frame"] else 0,
        memory=memory,
    )
    return CausalStudent(net, cfg, LatentShape(frames, *x.shape[2:], patch=net.cfg.patch))
