"""Attention and its memory form on a CPU: backends against the reference, masks, choice of backend, 8-bit entries."""

import logging

import pytest
import torch
import torch.nn.functional as F
from kernel_parity import masks
from torch.nn.attention.flex_attention import create_block_mask

from vidistill.ops import attention as ops
from vidistill.ops import fused, quant
from vidistill.ops.masks import FrameMask
from vidistill.ops.memory_attention import Segment, attend, attend_reference
from vidistill.ops.precision import _has_bfloat16, autocast, fast_float32, working_dtype
from vidistill.ops.rope import rope_table, rotate


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _own_choice():
    with ops.use_backend("auto"):
        yield


@pytest.fixture
def fast_library(monkeypatch):
    """float32 products as on a CPU whose matrix library `fast_float32` has chosen."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")


@pytest.mark.parametrize("name", [None, "block-causal", "window and sink", "teacher forcing"])
@pytest.mark.parametrize("backend", ["sdpa", "products", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_cpu_backend_equals_the_reference(backend, name):
    mask = None if name is None else FrameMask(masks(9, 3)[name], 7)
    q, k, v = (random(2, 63 if mask is None else mask.shape[0], 3, 20, seed=i) for i in range(3))
    torch.testing.assert_close(ops.BACKENDS[backend](q, k, v, mask), ops.reference(q, k, v, mask), rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, None) for b in ("sdpa", "flex", "xformers", "triton")]
    + [(b, m) for b in ("auto", "triton") for m in ("block-causal", "window and sink", "teacher forcing")],
)
def test_every_gpu_backend_equals_the_reference(backend, name):
    if backend == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed: pip install 'vidistill[cuda]'")
    mask = None if name is None else FrameMask(masks(9, 3)[name].cuda(), 16)
    length = 144 if mask is None else mask.shape[0]
    q, k, v = (random(2, length, 3, 64, seed=i).cuda().half() for i in range(3))
    wanted = ops.reference(q.float(), k.float(), v.float(), mask)
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.attention(q, k, v, mask).float(), wanted, rtol=5e-3, atol=5e-3)


def test_products_equal_the_reference_on_a_long_memory(fast_library):
    q, k, v = random(2, 515, 2, 8), random(2, 1031, 2, 8, seed=1), random(2, 1031, 2, 8, seed=2)
    assert q.shape[1] * k.shape[1] > ops.LONG
    torch.testing.assert_close(ops.products(q, k, v), ops.reference(q, k, v), rtol=1e-5, atol=1e-6)


def test_products_have_the_gradients_of_the_reference_in_several_pieces(fast_library):
    leaves = [random(5, s, 3, 8, seed=i).requires_grad_() for i, s in enumerate((301, 607, 607))]
    assert ops.KEPT < 15 * 301 * 607
    found = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (ops.products, ops.reference)]
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["block-causal", "window and sink", "teacher forcing"])
def test_products_leave_out_what_a_mask_hides_from_whole_runs(name, monkeypatch, fast_library):
    mask, sizes = FrameMask(masks(9, 3)[name], 48), []
    q, k, v = (random(1, s, 1, 8, seed=i).requires_grad_() for i, s in enumerate((mask.shape[0], *[mask.shape[1]] * 2)))
    with monkeypatch.context() as counting:
        counting.setattr(ops, "_piece", lambda q, k, v, bias: (sizes.append(q.shape[1] * k.shape[1]), q)[1])
        ops.products(q, k, v, mask)
    assert sum(sizes) == int(mask.dense.sum()) < mask.dense.numel()
    found = [torch.autograd.grad(f(q, k, v, mask).square().sum(), (q, k, v)) for f in (ops.products, ops.reference)]
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_fused_kernel_sees_no_keys_that_a_mask_hides_from_whole_runs(monkeypatch):
    mask, sizes, fused = FrameMask(masks(9, 3)["teacher forcing"], 48), [], F.scaled_dot_product_attention

    def counted(q, k, v, attn_mask):
        sizes.append(q.shape[2] * k.shape[2])
        return fused(q, k, v, attn_mask=attn_mask)

    monkeypatch.setattr(ops.F, "scaled_dot_product_attention", counted)
    q, k, v = (random(1, s, 1, 8, seed=i).requires_grad_() for i, s in enumerate((mask.shape[0], *[mask.shape[1]] * 2)))
    found = [torch.autograd.grad(f(q, k, v, mask).square().sum(), (q, k, v)) for f in (ops.sdpa, ops.reference)]
    assert sum(sizes) == int(mask.dense.sum()) < mask.dense.numel()
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_products_train_in_half_precision_as_exactly_as_sdpa_does():
    leaves = [random(2, 301, 3, 8, seed=i).requires_grad_() for i in range(3)]
    wanted = torch.autograd.grad(ops.reference(*leaves).square().sum(), leaves)
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]

    def errors(f):
        found = torch.autograd.grad(f(*halves).float().square().sum(), halves)
        return [float((g - w).norm() / w.norm()) for g, w in zip(found, wanted, strict=True)]

    for own, fused_ in zip(errors(ops.products), errors(ops.sdpa), strict=True):
        assert own < 1.5 * fused_ < 0.05


@pytest.mark.parametrize("name", [None, "block-causal"])
@pytest.mark.parametrize("backend", ["sdpa", "products"])
def test_a_cpu_backend_has_the_gradients_of_the_reference(backend, name):
    mask = None if name is None else FrameMask(masks(9, 3)[name], 7)
    leaves = [random(2, 63, 2, 12, seed=i).requires_grad_() for i in range(3)]
    found = [
        torch.autograd.grad(f(*leaves, mask).square().sum(), leaves) for f in (ops.BACKENDS[backend], ops.reference)
    ]
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_flex_says_that_it_has_no_backward_pass_on_a_cpu():
    q = random(1, 5, 1, 16).requires_grad_()
    with pytest.raises(ValueError, match=r"no backward.*CPU"):
        ops.flex(q, q, q)


def test_a_bool_tensor_is_a_mask_too():
    q, k = random(1, 21, 2, 16), random(1, 33, 2, 16, seed=1)
    dense = torch.rand(21, 33, generator=torch.Generator().manual_seed(0)) > 0.5
    torch.testing.assert_close(ops.attention(q, k, k, dense), ops.reference(q, k, k, dense), rtol=1e-5, atol=1e-6)


WIDE = (7, 7, 7, 2, 2, 1)  # tokens of key frames, some of them seen in compressed form


def compressed_mask() -> FrameMask:
    seen = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    return FrameMask(seen | (torch.arange(6) == 0), 7, WIDE)


@pytest.mark.parametrize("backend", sorted(set(ops.BACKENDS) - {"xformers", "triton"}))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_key_frames_of_several_widths_are_seen_as_the_mask_of_tokens_says(backend, fast_library):
    mask = compressed_mask()
    q, k, v = (random(2, s, 3, 20, seed=i) for i, s in enumerate((21, 26, 26)))
    columns = [f for f, width in enumerate(WIDE) for _ in range(width)]
    dense = torch.stack([mask.seen[row // 7][columns] for row in range(21)])
    assert mask.shape == (21, 26) and torch.equal(mask.dense, dense)
    torch.testing.assert_close(
        ops.BACKENDS[backend](q, k, v, mask), ops.reference(q, k, v, dense), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize(
    "mask",
    [
        *(FrameMask(seen, n) for seen in masks(9, 3).values() for n in (7, 64, 200)),
        FrameMask(masks(9, 3)["teacher forcing"], 40, tuple(range(30, 48))),
        FrameMask(torch.ones(2, 3, dtype=torch.bool), 128),
    ],
    ids=lambda mask: f"{mask.shape[0]}x{mask.shape[1]}",
)
def test_blocks_made_from_frames_are_those_made_from_tokens(mask):
    wanted = create_block_mask(lambda b, h, q, k: mask.dense[q, k], None, None, *mask.shape, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask.block, name), getattr(wanted, name)), name
    assert torch.equal(mask.block.to_dense(), wanted.to_dense()) and mask.block.seq_lengths == mask.shape
    rows, columns = (torch.arange(s) for s in mask.shape)
    assert torch.equal(mask.block.mask_mod(0, 0, rows[:, None], columns[None]), mask.dense)


AUTO = {(8, 0): "flex", (8, 6): "flex", (8, 9): "flex", (9, 0): "flex", (10, 0): "flex", (12, 0): "flex"}


@pytest.mark.parametrize(("capability", "masked"), AUTO.items())
def test_auto_skips_hidden_blocks_on_every_gpu_that_trains(capability, masked):
    assert ops.choose("auto", "cuda", "frames", capability)[0] == masked
    assert ops.choose("auto", "cuda", "none", capability)[0] == "sdpa"
    assert ops.choose("triton", "cuda", "frames", capability)[0] == "triton"
    assert {ops.choose("auto", "cpu", mask, capability)[0] for mask in ("none", "frames", "dense")} == {"products"}


@pytest.mark.parametrize("capability", [*AUTO, (7, 5)])
@pytest.mark.parametrize("backend", ["auto", *ops.BACKENDS])
def test_no_gpu_stores_a_mask_token_by_token(backend, capability):
    with pytest.raises(ValueError, match="FrameMask"):
        ops.choose(backend, "cuda", "dense", capability)
    if backend in ops.DENSE or (backend == "auto" and capability < (8, 0)):
        with pytest.raises(ValueError, match=r"backend=flex|\(8, 0\) or newer"):
            ops.choose(backend, "cuda", "frames", capability)


def test_a_mask_of_tokens_on_a_gpu_is_refused_by_attention_itself(monkeypatch):
    q, mask = random(1, 4, 1, 8).to("meta"), torch.ones(4, 4, dtype=torch.bool)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match="FrameMask"):
        ops.attention(q, q, q, mask)


def test_a_frame_mask_spreads_over_tokens_in_every_form():
    mask = FrameMask(masks(5, 2)["block-causal"], 3)
    q = random(2, 15, 4, 8)
    assert mask.shape == (15, 15) and mask.dense[:3, :6].all() and not mask.dense[:6, 6:].any()
    bias = mask.bias(q)
    assert bias.shape == (2, 4, 15, 15) and bias.stride(-2) % 8 == 0
    assert torch.equal(bias[0, 0] == 0, mask.dense) and torch.equal(
        bias == -torch.inf, ~mask.dense.expand(2, 4, 15, 15)
    )
    assert mask.dense is mask.dense and mask.block is mask.block  # built once
    with pytest.raises(ValueError, match="bool tensor"):
        FrameMask(torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"FrameMask.widths names 2.*frames.*3"):
        FrameMask(torch.ones(3, 3, dtype=torch.bool), 7, (7, 7))


def test_the_bias_for_xformers_masks_as_the_reference_does():
    mask = FrameMask(masks(9, 3)["window and sink"], 7)
    q, k, v = (random(2, 63, 3, 20, seed=i) for i in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 20**0.5 + mask.bias(q)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(out, ops.reference(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_the_choice_is_logged_once_with_its_reason(caplog):
    ops._resolve.cache_clear()
    q = random(1, 4, 1, 8)
    with caplog.at_level(logging.DEBUG, logger="vidistill"), ops.use_backend("reference"):
        ops.attention(q, q, q)
        ops.attention(q, q, q)
    assert [r.getMessage() for r in caplog.records] == ["attention backend on cpu: reference (asked for)"]
    assert (ops.chosen("cpu"), ops.chosen("cuda")) == ("products", "sdpa")
    ops._resolve.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [("flash", "unknown; choose"), ("xformers", "CUDA only.*choose.*auto"), ("triton", "TRITON_INTERPRET=1")],
)
def test_a_backend_that_cannot_run_says_what_to_do(name, message):
    q = random(1, 4, 1, 8)
    with pytest.raises(ValueError, match=message), ops.use_backend(name):
        ops.attention(q, q, q)


def test_attention_traces_without_a_break_and_follows_the_choice():
    mask = FrameMask(masks(3, 1)["block-causal"], 4)
    call = torch.compile(lambda q: ops.attention(q, q, q, mask), fullgraph=True, backend="eager")
    q = random(1, 12, 2, 16)
    for name in ("auto", "reference"):
        with ops.use_backend(name):
            torch.testing.assert_close(call(q), ops.reference(q, q, q, mask), rtol=1e-5, atol=1e-6)


# --- memory -----------------------------------------------------------------------------------------------------------


def stored(tokens: int, seed: int, *, table: bool = True) -> tuple[Segment, torch.Tensor, torch.Tensor]:
    """A segment turned at read, and the keys and values that it stands for."""
    k, v = random(2, tokens, 3, 24, seed=seed), random(2, tokens, 3, 24, seed=seed + 1)
    angles = rope_table(random(tokens, 3, seed=seed).abs() * 9, 24)
    return (Segment(k, v, angles), rotate(k, angles), v) if table else (Segment(k, v), k, v)


def test_segments_are_read_as_one_turned_memory():
    parts = [stored(63, 3), stored(13, 5, table=False)]
    q = random(2, 33, 3, 24)
    k, v = (torch.cat([p[i] for p in parts], 1) for i in (1, 2))
    wanted = ops.reference(q, k, v)
    for function in (attend, attend_reference):
        torch.testing.assert_close(function(q, [p[0] for p in parts]), wanted, rtol=1e-5, atol=2e-6)


def test_memory_attention_takes_one_or_two_segments():
    with pytest.raises(ValueError, match=r"1 or 2 segments.*got 3"):
        attend(random(2, 9, 3, 24), [stored(4, 1)[0]] * 3)


# --- 8-bit entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "dim"), [(4, 64), (6, 64), (12, 128), (8, 32)])
def test_int8_entries_keep_attention_within_one_percent_at_under_a_third_of_the_bytes(heads, dim):
    q, k, v = (random(1, s, heads, dim, seed=i) for i, s in enumerate((48, 336, 336)))
    angles = rope_table(random(336, 3).abs() * 20, dim)
    eight = Segment(quant.quantise(k), quant.quantise(v), angles)
    wanted = ops.reference(q, rotate(k, angles), v)
    error = (attend(q, [eight]) - wanted).norm() / wanted.norm()
    spent = eight.keys.bytes + eight.values.bytes
    assert error <= 1e-2
    assert spent <= 0.3 * (k.nbytes + v.nbytes) and spent == 2 * 336 * quant.entry_bytes(heads, dim)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantising_keeps_every_number_within_half_a_step(dtype):
    x = random(2, 63, 3, 20)
    x[:, 0] = 0
    entry = quant.quantise(x, dtype)
    step = entry.scale[..., None] if dtype == torch.int8 else x.abs() / 8 + entry.scale[..., None]
    assert ((entry.dequantise() - x).abs() <= 0.501 * step).all()
    assert not entry.dequantise()[:, 0].any()


def test_append_writes_only_the_named_tokens():
    store = quant.empty((2, 12, 3, 8))
    where = torch.tensor([7, 2, 3])
    quant.append(store, x := random(2, 3, 3, 8), where)
    torch.testing.assert_close(store.dequantise()[:, where], quant.quantise(x).dequantise())
    assert not store.dequantise()[:, [0, 1, 4, 5, 6, 8, 9, 10, 11]].any()


def test_an_unknown_8_bit_type_is_refused():
    with pytest.raises(ValueError, match="8-bit entries are"):
        quant.quantise(random(1, 1, 1, 4), torch.uint8)


# --- rotation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 96])
def test_rotation_by_complex_products_has_the_bits_of_the_plain_formula(dim, inverse):
    table = rope_table(random(63, 3) * 9, dim)
    found = []
    for function in (rotate, torch.compile(rotate, fullgraph=True, backend="eager")):  # traced: the plain formula
        x = random(2, 63, 3, dim).requires_grad_()
        y = function(x, table, inverse)
        found.append((y, *torch.autograd.grad(y, x, random(2, 63, 3, dim, seed=1))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dim", [6, 20, 56])
def test_rotation_by_complex_products_is_the_plain_formula_where_vectors_are_not_whole(dim, inverse):
    table, x = rope_table(random(63, 3) * 9, dim), random(2, 63, 3, dim)
    plain = torch.compile(rotate, fullgraph=True, backend="eager")  # traced: the plain formula
    torch.testing.assert_close(rotate(x, table, inverse), plain(x, table, inverse))


# --- between the products ---------------------------------------------------------------------------------------------


def test_fused_operators_on_a_cpu_are_their_references():
    q, k, w = random(1, 21, 40), random(1, 21, 40, seed=1), random(40)
    table = rope_table(random(21, 3).abs(), 20)
    for got, x in zip(fused.norm_rope(q, k, w, w, table, 2, 1e-6), (q, k)):
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
        torch.testing.assert_close(got, rotate(normed.unflatten(-1, (2, 20)), table))
    x, y, s = random(1, 3, 7, 40), random(1, 3, 7, 40, seed=1), random(1, 3, 1, 40)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(fused.modulated_norm(x, s, s, 1e-6), normed * (1 + s) + s)
    torch.testing.assert_close(fused.gated_sum(x, y, s), x + y * s)


def test_gelu_in_the_open_is_that_of_torch():
    x = (random(3, 2**15 + 7) * 6).requires_grad_()  # more than one piece
    ours, wanted = fused.gelu(x), torch.nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)
    slopes = (torch.autograd.grad(y, x, random(*x.shape, seed=1)) for y in (ours, wanted))
    assert torch.equal(*(s for (s,) in slopes))
    with torch.no_grad():
        assert torch.equal(fused.gelu(x), ours)  # recorded or not: a replayed rollout has the same bits


def test_fast_float32_is_float32():
    before = torch.get_float32_matmul_precision()
    try:
        fast_float32.__wrapped__()
        a, b = random(129, 100), random(100, 63, seed=1)
        torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


def test_fast_float32_leaves_mkl_on_a_cpu_of_its_maker(monkeypatch, caplog):
    caplog.set_level("DEBUG", "vidistill")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr("vidistill.ops.precision._maker", lambda: "vendor_id : GenuineIntel")
    before = torch.get_float32_matmul_precision()
    assert not fast_float32.__wrapped__() and torch.get_float32_matmul_precision() == before
    assert torch.cuda.is_available() or "MKL" in caplog.text


@pytest.mark.parametrize(("quick", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_auto_is_what_the_cpu_multiplies(monkeypatch, quick, wanted):
    _has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: quick)
    try:
        assert working_dtype("auto") == wanted
        with autocast("auto"):
            assert (random(3, 4) @ random(4, 5)).dtype == wanted
    finally:
        _has_bfloat16.cache_clear()
    assert (working_dtype("fp32"), working_dtype("bf16")) == (torch.float32, torch.bfloat16)
