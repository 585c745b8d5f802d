"""Linear layers of a finished network, made cheaper: weights in oneDNN's own layout, in bfloat16, or in 8 bits."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("vidistill")
DTYPES = (torch.float32, torch.bfloat16)


def multiplied(x: Tensor, packed: Tensor, bias: Tensor | None, width: int, gelu: bool) -> Tensor:
    """`x` [..., n] times a packed weight, plus `bias`: [..., width]; `gelu` follows in the same kernel."""
    then: tuple[str, list, str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, *then)
    return y


# torch.compile knows the operator inside and lowers it for weights that are constants of its graph, which ours are not.
packed_linear = torch.library.custom_op("vidistill::packed_linear", multiplied, mutates_args=())


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, width: int, gelu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


class PackedLinear(nn.Module):
    """A linear layer that multiplies by a packed copy of its weight; the weight itself stays for whoever reads it.

    Input and output keep their dtype. While autograd records, it is the plain layer. Later changes of the weight do not
    reach the packed copy. `gelu`: the tanh approximation of GELU follows, in the same kernel.
    """

    def __init__(self, linear: nn.Linear, rows: int, dtype: torch.dtype, gelu: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.dtype, self.gelu = dtype, gelu
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
        self._packed_bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            plain = F.linear(x, self.weight, self.bias)
            return F.gelu(plain, approximate="tanh") if self.gelu else plain
        multiply = packed_linear if torch.compiler.is_compiling() else multiplied
        y: Tensor = multiply(x.to(self.dtype), self._packed, self._packed_bias, len(self.weight), self.gelu)
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
        after = parent[int(name) + 1 : int(name) + 2] if isinstance(parent, nn.Sequential) else []
        gelu = [a for a in after if isinstance(a, nn.GELU) and a.approximate == "tanh"]
        parent.register_module(name, PackedLinear(child, rows, dtype, bool(gelu)))
        if gelu:
            parent.register_module(str(int(name) + 1), nn.Identity())
    logger.debug("packed %d linear layers in %s for passes of %d tokens (oneDNN)", len(found), dtype, rows)
    return len(found)


def _torchao() -> Any:
    try:
        import torchao.quantization as quantization
    except ImportError as error:
        raise ValueError("8-bit linear layers need torchao: pip install 'vidistill[int8]'") from error
    return quantization


def int8_linears(net: nn.Module, rows: int) -> None:
    """Weights of linear layers in int8, one scale a row, in place."""
    quantization = _torchao()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())


def fp8_linears(net: nn.Module, rows: int) -> None:
    """Weights and inputs of linear layers in fp8 (e4m3), in place; ValueError without a GPU that multiplies it."""
    device = next(net.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"linears 'fp8' needs an NVIDIA GPU of compute capability 8.9 or newer and the network is on {device}: "
            "choose int8, packed or plain"
        )
    quantization = _torchao()
    quantization.quantize_(net, quantization.Float8DynamicActivationFloat8WeightConfig())


# kind -> what it does in place to a network whose passes have so many rows of tokens
LINEARS: dict[str, Callable[[nn.Module, int], object]] = {
    "plain": lambda net, rows: None,
    "packed": pack_linears,
    "bf16": partial(pack_linears, dtype=torch.bfloat16),
    "int8": int8_linears,
    "fp8": fp8_linears,
}


def convert_linears(net: nn.Module, kind: str, rows: int) -> None:
    """Make the linear layers of `net` what `kind`, a key of LINEARS, says, in place; for networks that only run."""
    if kind not in LINEARS:
        raise ValueError(f"linears {kind!r} is unknown; choose one of {', '.join(LINEARS)}")
    LINEARS[kind](net, rows)
