"""One network being trained: AdamW and Muon, learning-rate schedule, averaged weights, a state that resumes exactly."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidistill.ops.precision import working_dtype

EMA_WARMUP = 10.0  # of the averages' decay, in updates
QUINTIC = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: lifts every singular value towards 1


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is left intact."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and, over the last `decay` of the run, linear decay to zero.

    `muon`: parameters of two or more axes whose name this regular expression finds are updated by Muon instead (the
    momentum is orthogonalised, scaled to AdamW's size). Source: Jordan et al. 2024; scaling 2502.16982.
    """

    lr: float = 1e-4
    only: str = ""  # train only parameters whose name this regular expression finds; the others stay as they are
    muon: str = ""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 0
    decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.decay <= 1:
            raise ValueError(f"optim needs lr > 0 and 0 <= decay <= 1, got {self.lr} and {self.decay}")
        if self.clip <= 0 or self.warmup < 0 or self.weight_decay < 0 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(
                "optim needs clip > 0, warmup >= 0, weight_decay >= 0 and betas in [0, 1), got "
                f"{self.clip}, {self.warmup}, {self.weight_decay} and {self.betas}"
            )
        for name in ("only", "muon"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise ValueError(f"optim.{name} {getattr(self, name)!r} is no regular expression: {error}") from error

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the learning rate at `step`."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        tail = max(1.0, self.decay * steps)
        down = min(1.0, (steps - step) / tail) if self.decay else 1.0
        return up * down


def orthogonalised(x: Tensor) -> Tensor:
    """`x` [A, B] with all its singular values near 1, by five Newton-Schulz steps. Source: Jordan et al. 2024."""
    a, b, c = QUINTIC
    tall = x.shape[0] > x.shape[1]
    y = (x.T if tall else x).to(working_dtype("auto", x.device))
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.T if tall else y


class Muon(torch.optim.Muon):
    """torch's Muon, its Newton-Schulz steps in bfloat16 only where the hardware multiplies it.

    Elsewhere torch's own step emulates it, which took 85 % of a training step. Steps are as large as AdamW's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalised(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))
        return loss


class TrainState:
    """A network being trained: optimiser, learning-rate schedule, and optionally an averaged copy."""

    def __init__(
        self,
        net: nn.Module,
        cfg: OptimConfig,
        steps: int,
        ema: float = 0.0,
        ema_start: int = 0,
        ema_warmup: float = EMA_WARMUP,
    ) -> None:
        self.net, self.cfg, self.steps = net, cfg, steps
        self.decay, self.ema_start, self.ema_warmup = ema, ema_start, ema_warmup
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and bool(re.search(cfg.only, name)))
        named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"optim.only {cfg.only!r} leaves nothing to train")
        self.params = [p for _, p in named]
        matrix = [bool(cfg.muon and p.ndim > 1 and re.search(cfg.muon, n)) for n, p in named]
        plain = [p for p, m in zip(self.params, matrix, strict=True) if not m]
        self.optims: list[torch.optim.Optimizer] = []
        if plain:
            self.optims.append(
                torch.optim.AdamW(plain, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, foreach=True)
            )
        self.matrices = [p for p, m in zip(self.params, matrix, strict=True) if m]
        self.views = [nn.Parameter(p.data.flatten(1)) for p in self.matrices]  # Muon takes two axes; memory is shared
        assert all(v.data_ptr() == p.data_ptr() for v, p in zip(self.views, self.matrices, strict=True))
        if self.views:
            self.optims.append(Muon(self.views, lr=cfg.lr, weight_decay=cfg.weight_decay))
        self.average = [p.detach().clone() for p in self.params] if ema else []
        self.updates = 0

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.params:
            p.grad = None

    def clip(self, loss: float) -> float:
        """Clip the gradients and return their norm before; FloatingPointError unless it and `loss` are finite."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.params, self.cfg.clip))
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        return norm

    def step(self) -> None:
        """Step the optimisers along the gradients, and the average after them."""
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.cfg.lr * self.cfg.factor(self.updates, self.steps)
            optim.step()
        self.updates += 1
        if self.average:
            self.update_ema()

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the average: a copy up to `ema_start` updates, then by (1 + n) / (warmup + n), `ema` at most."""
        if self.updates <= self.ema_start:
            for a, p in zip(self.average, self.params, strict=True):
                a.copy_(p)
        else:
            decay = min(self.decay, (1 + self.updates) / (self.ema_warmup + self.updates))
            torch._foreach_lerp_(self.average, self.params, 1 - decay)

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Exchange live and averaged weights; without an average nothing."""
        for a, p in zip(self.average, self.params, strict=bool(self.average)):
            held = p.detach().clone()
            p.copy_(a)
            a.copy_(held)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of this learner under `prefix`."""
        tensors = {f"{prefix}.net.{n}": t for n, t in self.net.state_dict().items()}
        tensors.update({f"{prefix}.ema.{i}": t for i, t in enumerate(self.average)})
        for i, (optim, p) in enumerate(self.optimizer_params()):
            tensors.update({f"{prefix}.optim.{i}.{k}": v for k, v in optim.state.get(p, {}).items()})
        return tensors

    def state_template(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that lie as those of `state` do; an optimiser's as their parameter, their own name left out."""
        tensors: dict[str, Tensor] = {f"{prefix}.net.{n}": t for n, t in self.net.state_dict().items()}
        tensors.update({f"{prefix}.ema.{i}": t for i, t in enumerate(self.average)})
        tensors.update({f"{prefix}.optim.{i}": p for i, (_, p) in enumerate(self.optimizer_params())})
        return tensors

    def optimizer_params(self) -> list[tuple[torch.optim.Optimizer, nn.Parameter]]:
        """Every parameter with the optimiser that holds its state, in a fixed order."""
        return [(o, p) for o in self.optims for group in o.param_groups for p in group["params"]]

    @torch.no_grad()
    def restore(self, prefix: str, tensors: dict[str, Tensor], updates: int) -> None:
        self.updates = updates
        own = {n: tensors[f"{prefix}.net.{n}"] for n in self.net.state_dict()}
        self.net.load_state_dict(own)
        for i, a in enumerate(self.average):
            a.copy_(tensors[f"{prefix}.ema.{i}"])
        for i, (optim, p) in enumerate(self.optimizer_params()):
            found = {k.rsplit(".", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{prefix}.optim.{i}.")}
            if any(t.ndim and t.shape != p.shape for t in found.values()):
                raise RuntimeError(f"{prefix}.optim.{i} is not of a parameter of {list(p.shape)}")
            if found:
                optim.state[p] = {k: t.clone() for k, t in found.items()}
