"""LoRA of a network through peft: add it, train it, merge it into plain weights again."""

import re
from dataclasses import dataclass

import torch
from torch import nn

TARGETS = r".*blocks\.\d+\.(self_attn|cross_attn)\.(q|k|v|o)|.*blocks\.\d+\.ffn\.(0|2)"


@dataclass(frozen=True)
class LoraConfig:
    """Rank 0: no LoRA. `alpha` 0: the rank, so that the update is B A itself. `targets`: names of adapted linears."""

    rank: int = 0
    alpha: float = 0.0
    targets: str = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha < 0:
            raise ValueError(f"lora.rank and lora.alpha must not be negative, got {self.rank} and {self.alpha}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"lora.targets {self.targets!r} is no regular expression: {error}") from error


def add_lora(net: nn.Module, cfg: LoraConfig) -> nn.Module:
    """`net`, changed in place: only its new low-rank matrices train, and it computes what it computed before."""
    if not cfg.rank:
        return net
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'vidistill[lora]'") from error
    if not any(re.fullmatch(cfg.targets, name) for name, m in net.named_modules() if isinstance(m, nn.Linear)):
        raise ValueError(f"lora.targets {cfg.targets!r} matches no linear layer, by its whole name as blocks.0.ffn.2")
    settings = peft.LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha or cfg.rank, target_modules=cfg.targets)
    net.requires_grad_(False)
    adapted = peft.inject_adapter_in_model(settings, net)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


@torch.no_grad()
def merge_lora(net: nn.Module) -> nn.Module:
    """`net`, changed in place: plain linears again, with the update in their weights."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(net.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            net.set_submodule(name, module.get_base_layer())
    return net
