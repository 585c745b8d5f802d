"""Packed linear layers and float32 products."""

import sys

import pytest
import torch
from torch import nn

from vidistill.ops.linear import LINEARS, PackedLinear, convert_linears, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 63), nn.GELU(), nn.Sequential(nn.Linear(63, 9, bias=False)))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", [(1, 20), (129, 20), (2, 3, 7, 20)])
@torch.no_grad()
def test_packed_layers_compute_what_plain_ones_do(dtype, shape):
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16 products")
    net, x = network(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = net(x)
    assert pack_linears(net, rows=48, dtype=dtype) == 2
    got = net(x)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    assert (got - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


def test_packing_keeps_the_weights_and_their_gradients():
    net = network()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    pack_linears(net, rows=48)
    assert isinstance(net[0], PackedLinear)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    net(torch.randn(5, 20)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
def test_a_packed_layer_takes_the_gelu_behind_it_along():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 63), nn.GELU(approximate="tanh"), nn.Linear(63, 9)), torch.randn(129, 20)
    wanted = net(x)
    pack_linears(net, rows=129)
    assert net[0].gelu and not net[2].gelu and isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)
    with torch.enable_grad():
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_packed_layers_compile_into_one_graph():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(20, 63), nn.GELU(approximate="tanh"), nn.Linear(63, 9)), torch.randn(129, 20)
    pack_linears(net, rows=129)
    compiled = torch.compile(net, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_int8_weights_cost_less_than_one_percent():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).requires_grad_(False), torch.randn(129, 64)
    wanted = net(x)
    convert_linears(net, "int8", rows=129)
    error = float((net(x) - wanted).norm() / wanted.norm())
    assert 0 < error < 1e-2


def test_what_cannot_run_here_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"linears 'int4'.*unknown"):
        convert_linears(network(), "int4", rows=1)
    with pytest.raises(ValueError, match=r"'fp8' needs an NVIDIA GPU.*choose int8"):
        convert_linears(network(), "fp8", rows=1)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install 'vidistill\[int8\]'"):
        convert_linears(network(), "int8", rows=1)
    assert set(LINEARS) == {"plain", "packed", "bf16", "int8", "fp8"}


def test_an_impossible_packing_says_what_to_do():
    with pytest.raises(ValueError, match=r"torch.float32 or torch.bfloat16"):
        pack_linears(network(), rows=1, dtype=torch.float16)
    with pytest.raises(ValueError, match="for a CPU"):
        pack_linears(network().to("meta"), rows=1)
