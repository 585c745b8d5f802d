"""Linear layers of a finished network on a CPU: weights in oneDNN's own layout, in float32 or bfloat16."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("vidistill")
DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A linear layer that multiplies by a packed copy of its weight; the weight itself stays for whoever reads it.

    Input and output keep their dtype. While autograd records, it is the plain layer. Later changes of the weight do not
    reach the packed copy.
    """

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype = dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
        self._packed_bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, self._packed_bias, "none", [], "")
        return y.to(x.dtype)


def pack_linears(net: nn.Module, rows: int, dtype: torch.dtype = torch.float32) -> int:
    """Replace the linear layers of `net` by packed ones, in place; returns how many.

    `rows`: tokens of a usual pass, the layout is chosen for it. float32 changes results by rounding; bfloat16 halves
    what is read of the weights and costs about three digits. Raises ValueError off a CPU or without bfloat16 products.
    """
    if dtype not in DTYPES:
        raise ValueError(f"packed linear layers are {' or '.join(map(str, DTYPES))}, got {dtype}")
    if any(p.device.type != "cpu" for p in net.parameters()):
        raise ValueError("packed linear layers are for a CPU: move the network there first, or leave it as it is")
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError("this CPU has no bfloat16 products: pack the linear layers in float32")
    if not torch.backends.mkldnn.is_available():
        logger.warning("linear layers stay as they are: this torch has no oneDNN")
        return 0
    found = [
        (parent, name, child)
        for parent in net.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in found:
        parent.register_module(name, PackedLinear(child, rows, dtype))
    logger.info("packed %d linear layers in %s for passes of %d tokens (oneDNN)", len(found), dtype, rows)
    return len(found)
