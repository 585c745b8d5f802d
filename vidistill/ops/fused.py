"""What stands between the matrix products of a block, each as one operator: norm + rotation, modulation, gated sum.

The functions here are the specification and run everywhere (torch.compile fuses them). With backend `triton` each is
one kernel, forward and backward: experimental until they are timed against torch.compile on a GPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vidistill.ops.attention import choice, resolve
from vidistill.ops.rope import rotate

SLOPE = math.sqrt(2 / math.pi)
PIECE = 2**16  # numbers that stay in a core's cache from one operator to the next


def kernels(device: str) -> bool:
    """Whether these operators run as Triton kernels on `device` ("cpu", "cuda"): only where that is asked for."""
    return choice() == "triton" and resolve("triton", device) == "triton"


def wide(x: Tensor) -> Tensor:
    """`x` in float32 at least: norms and modulation are not computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _gelu(x: Tensor) -> Tensor:
    slope, out = x.new_full((), SLOPE), torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, y in zip(x.reshape(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
        torch.addcmul(slope, part, part, value=0.044715 * SLOPE, out=y)
        y.mul_(part).tanh_().add_(1).mul_(part).mul_(0.5)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU. On a CPU in the open: torch's own operator is half as fast there."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    out: Tensor = _Gelu.apply(x) if x.requires_grad and torch.is_grad_enabled() else _gelu(x)
    return out


def norm_rope_reference(x: Tensor, weight: Tensor, table: Tensor, heads: int, eps: float) -> Tensor:
    """RMS norm of `x` [B, S, D], split into `heads` and turned by `table` [2, S, 1, d / 2]: [B, S, h, d]."""
    y = F.rms_norm(wide(x), x.shape[-1:], weight.to(wide(x).dtype), eps).to(x.dtype)
    return rotate(y.unflatten(-1, (heads, -1)), table).to(x.dtype)


def modulated_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of `x` [B, F, n, D] without weights, times 1 + `scale`, plus `shift` (both [B, F, 1, D])."""
    return torch.addcmul(shift, F.layer_norm(wide(x), x.shape[-1:], eps=eps), 1 + scale).to(x.dtype)


def gated_sum_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x` + `y` * `gate`: [B, F, n, D] twice and [B, F, 1, D]."""
    return torch.addcmul(x, y, gate) if x.dtype == y.dtype == gate.dtype else x + (y * gate).to(x.dtype)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, S, D], normed and turned: twice [B, S, h, d]."""
    if kernels(q.device.type):
        from vidistill.ops.kernels.fused import norm_rope

        return norm_rope(q, k, q_weight, k_weight, table, heads, eps)
    return (
        norm_rope_reference(q, q_weight, table, heads, eps),
        norm_rope_reference(k, k_weight, table, heads, eps),
    )


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """See `modulated_norm_reference`."""
    if kernels(x.device.type):
        from vidistill.ops.kernels.fused import modulated_norm

        return modulated_norm(x, shift, scale, eps)
    return modulated_norm_reference(x, shift, scale, eps)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """See `gated_sum_reference`."""
    if kernels(x.device.type):
        from vidistill.ops.kernels.fused import gated_sum

        return gated_sum(x, y, gate)
    return gated_sum_reference(x, y, gate)
