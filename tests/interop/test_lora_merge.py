"""LoRAs of every trainer: each tensor has its exact effect, or is named in an error."""

import hashlib
import json
import math
import re
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import HEADS, publish, weights
from safetensors.torch import load_file, save_file

from vidistill.cli.convert import convert
from vidistill.interop.formats import read_student
from vidistill.interop.keys import to_diffusers_key, to_ours
from vidistill.interop.lora import Adapter, merge_lora

LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.2", "patch_embedding", "head.head")
RANK, ALPHA = 4, 2.0
KW = {"allow_pickle": True, "heads": HEADS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("base") / "base.pt", weights(), "generator")


def halves(layer, rank=RANK, seed=0):
    """(A, B) for a layer of the recorded network; the patch convolution has axes of its own."""
    rng = torch.Generator().manual_seed(seed + LAYERS.index(layer) if layer in LAYERS else seed)
    shape = weights()[f"{layer}.weight"].shape
    a = torch.randn(rank, *shape[1:], generator=rng)
    b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=rng)
    return a, b


def delta(layer, **kw):
    a, b = halves(layer, **kw)
    return b.flatten(1) @ a.flatten(1)


def pair(layer, name, down="lora_A", up="lora_B", middle="", **kw):
    a, b = halves(layer, **kw)
    return {f"{name}.{down}{middle}.weight": a, f"{name}.{up}{middle}.weight": b}


def moved(base, path, name="self-forcing", **kw):
    """What a LoRA file adds to each parameter it changes."""
    new, old = read_student(base, name, **KW, lora=path, **kw).state, to_ours(weights())
    return {key: new[key] - old[key] for key in new if not torch.equal(new[key], old[key])}


def check(found, want):
    assert found.keys() == want.keys()
    for key, x in want.items():
        torch.testing.assert_close(found[key], x.expand_as(found[key]), rtol=1e-4, atol=2e-5)


# --- layouts: who writes the file, how he calls a layer ---------------------------------------------------------------

DOTTED = {
    "wan": lambda layer: layer,
    "comfy": lambda layer: f"diffusion_model.{layer}",
    "peft of diffusers": lambda layer: "transformer." + to_diffusers_key(f"{layer}.weight").removesuffix(".weight"),
    "diffusers": lambda layer: to_diffusers_key(f"{layer}.weight").removesuffix(".weight"),
    "DiffSynth": lambda layer: f"pipe.dit.{layer}",
    "LightX2V": lambda layer: f"model.diffusion_model.{layer}",
    "LongLive": lambda layer: f"model._fsdp_wrapped_module.{layer}",
}
FLAT = {
    "kohya": lambda layer: "lora_unet_" + layer.replace(".", "_"),
    "musubi": lambda layer: "lora_unet__" + layer.replace(".", "_"),
    "kohya of diffusers": lambda layer: (
        "lora_unet_" + to_diffusers_key(f"{layer}.weight").removesuffix(".weight").replace(".", "_")
    ),
    "lycoris": lambda layer: "lycoris_" + layer.replace(".", "_"),
}
WORDS = {
    "A and B": {},
    "down and up": {"down": "lora_down", "up": "lora_up"},
    "dotted down and up": {"down": "lora.down", "up": "lora.up"},
    "named": {"middle": ".default"},
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("layout", {**DOTTED, **FLAT})
def test_every_layout_moves_the_same_layers_by_the_same_amount(base, tmp_path, layout, words):
    state = {}
    for layer in LAYERS:
        name = {**DOTTED, **FLAT}[layout](layer)
        state |= {**pair(layer, name, **WORDS[words]), f"{name}.alpha": torch.tensor(ALPHA)}
    save_file(state, tmp_path / "l.safetensors")
    want = {f"{layer}.weight": ALPHA / RANK * delta(layer) for layer in LAYERS}
    check(moved(base, tmp_path / "l.safetensors"), want)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float64, torch.bfloat16])
def test_an_alpha_is_read_in_any_type_of_number(base, tmp_path, kind):
    layer = LAYERS[0]
    save_file({**pair(layer, layer), f"{layer}.alpha": torch.tensor(2).to(kind)}, tmp_path / "l.safetensors")
    check(moved(base, tmp_path / "l.safetensors"), {f"{layer}.weight": 2 / RANK * delta(layer)})


@pytest.mark.parametrize("entry", ["state_dict", "generator_lora", "lora", ""])
def test_a_pickled_lora_is_read_from_its_entry(base, tmp_path, entry):
    layer = LAYERS[0]
    state = pair(layer, layer)
    torch.save({entry: state, "critic_lora": {}} if entry else state, tmp_path / "l.pt")
    check(moved(base, tmp_path / "l.pt"), {f"{layer}.weight": delta(layer)})


def test_a_base_under_diffusers_names_takes_every_lora(tmp_path):
    layer = LAYERS[0]
    theirs = {to_diffusers_key(key): x for key, x in weights().items()}
    base = publish(tmp_path / "base.safetensors", theirs, prefix="")
    save_file(pair(layer, f"diffusion_model.{layer}"), tmp_path / "l.safetensors")
    check(moved(base, tmp_path / "l.safetensors"), {f"{layer}.weight": delta(layer)})


# --- scales -----------------------------------------------------------------------------------------------------------


def peft_folder(folder, state, **config):
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(RANK)),
        ({"lora_alpha": 16, "alpha_pattern": {"self_attn.q": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"blocks.9.*": 2}, "rank_pattern": {"q": RANK}, "r": 99}, 4.0),
        ({"lora_alpha": 1, "bias": "none", "target_modules": ["q"], "lora_dropout": 0.5}, 0.25),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_pefts_settings_scale_its_adapter(base, tmp_path, config, scale, whole):
    layer = LAYERS[0]
    folder = peft_folder(tmp_path / "a", pair(layer, f"base_model.model.{layer}"), **config)
    path = folder if whole else folder / "adapter_model.safetensors"
    check(moved(base, path), {f"{layer}.weight": scale * delta(layer)})


def test_pefts_own_merge_gives_the_same_weights(tmp_path):
    """DoRA, biases, rank-stabilised scales and saved modules, merged by peft itself and by us."""
    peft = pytest.importorskip("peft")
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block()]), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.blocks[0].v(self.blocks[0].k(self.blocks[0].q(x))))

    for number, extra in enumerate(
        (
            {"use_dora": True, "modules_to_save": ["head"]},
            {"lora_bias": True, "use_rslora": True, "bias": "all"},
            {"rank_pattern": {"q": 2}, "alpha_pattern": {"blocks.0.q": 9}},
        )
    ):
        torch.manual_seed(number)
        net = Net()
        before = {key: x.clone() for key, x in net.state_dict().items()}
        config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["q", "k"], **extra)
        model = peft.get_peft_model(net, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p).abs() if "magnitude" in name else torch.randn_like(p))
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        said = json.loads((folder / "adapter_config.json").read_text())
        want = model.merge_and_unload().state_dict()
        got = merge_lora(before, Adapter(saved, said))
        assert got.keys() == want.keys()
        for key, x in want.items():
            torch.testing.assert_close(got[key], x, rtol=1e-4, atol=1e-5)


def test_longlives_adapters_are_scaled_by_1_and_pefts_others_say_their_alpha(base, tmp_path):
    layer = LAYERS[0]
    save_file(pair(layer, f"base_model.model.model.{layer}"), tmp_path / "l.safetensors")
    check(moved(base, tmp_path / "l.safetensors", "longlive"), {f"{layer}.weight": delta(layer)})
    with pytest.raises(ValueError, match="--lora-alpha"):
        moved(base, tmp_path / "l.safetensors")
    check(moved(base, tmp_path / "l.safetensors", lora_alpha=1.0), {f"{layer}.weight": delta(layer) / RANK})


def test_diffusers_settings_in_the_header_scale_its_adapter(base, tmp_path):
    layer = LAYERS[0]
    said = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": RANK})}
    save_file(pair(layer, f"transformer.{layer}"), tmp_path / "l.safetensors", metadata=said)
    check(moved(base, tmp_path / "l.safetensors"), {f"{layer}.weight": 2 * delta(layer)})


@pytest.mark.parametrize(("said", "alpha"), [("2.0", 2.0), ("8", 8.0), ("None", RANK)])
def test_kohyas_header_scales_layers_that_come_without_an_alpha(base, tmp_path, said, alpha):
    one, other = LAYERS[:2]
    state = {**pair(one, FLAT["kohya"](one)), **pair(other, FLAT["kohya"](other))}
    state[FLAT["kohya"](other) + ".alpha"] = torch.tensor(ALPHA)
    save_file(state, tmp_path / "l.safetensors", metadata={"ss_network_alpha": said, "ss_network_dim": "4"})
    want = {f"{one}.weight": alpha / RANK * delta(one), f"{other}.weight": ALPHA / RANK * delta(other)}
    check(moved(base, tmp_path / "l.safetensors"), want)


@pytest.mark.parametrize("name", ["diffusion_model.{}", "{}"])
def test_a_converted_file_that_keeps_kohyas_header_is_not_scaled_twice(base, tmp_path, name):
    state = {}
    for layer in LAYERS[:2]:
        state |= pair(layer, name.format(layer))
    save_file(state, tmp_path / "l.safetensors", metadata={"ss_network_alpha": "1", "ss_network_dim": "4"})
    check(moved(base, tmp_path / "l.safetensors"), {f"{layer}.weight": delta(layer) for layer in LAYERS[:2]})


@pytest.mark.parametrize("said", ["much", "nan", "0", "-1", ""])
def test_an_alpha_of_kohyas_header_that_scales_nothing_is_named(base, tmp_path, said):
    save_file(pair(L, FLAT["kohya"](L)), tmp_path / "l.safetensors", metadata={"ss_network_alpha": said})
    with pytest.raises(ValueError, match=r"l\.safetensors.*alpha"):
        moved(base, tmp_path / "l.safetensors")


def test_an_alpha_of_kohyas_header_is_not_overruled_in_silence(base, tmp_path):
    save_file(pair(L, FLAT["kohya"](L)), tmp_path / "l.safetensors", metadata={"ss_network_alpha": "2"})
    with pytest.raises(ValueError, match="--lora-alpha"):
        moved(base, tmp_path / "l.safetensors", lora_alpha=3.0)


# --- everything else that an adapter may hold -------------------------------------------------------------------------


def test_differences_biases_and_whole_parameters_have_their_effect(base, tmp_path):
    layer, name = LAYERS[0], f"diffusion_model.{LAYERS[0]}"
    state = {
        **pair(layer, name),
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.diff_b": torch.ones(64),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.full((64,), 2.0),
        "diffusion_model.blocks.1.diff_m": torch.full((1, 6, 64), 3.0),
        "diffusion_model.head.head.weight": torch.zeros(64, 64),
        "diffusion_model.text_embedding.0.bias": torch.zeros(64),
    }
    save_file(state, tmp_path / "l.safetensors")
    old = to_ours(weights())
    want = {
        f"{layer}.weight": delta(layer) / RANK,
        f"{layer}.bias": torch.ones(64),
        "blocks.1.self_attn.norm_q.weight": torch.full((64,), 2.0),
        "blocks.1.modulation": torch.full((1, 6, 64), 3.0),
        "head.head.weight": -old["head.head.weight"],
        "text_embedding.0.bias": -old["text_embedding.0.bias"],
    }
    check(moved(base, tmp_path / "l.safetensors"), want)


@pytest.mark.parametrize("rows", [True, False])
def test_magnitudes_set_the_norms_of_rows_or_columns(base, tmp_path, rows):
    layer = LAYERS[2]  # 64 x 160: rows and columns differ
    old = weights()[f"{layer}.weight"]
    size = torch.linspace(1, 2, 64)[:, None] if rows else torch.linspace(1, 2, 160)[None]
    save_file({**pair(layer, layer), f"{layer}.dora_scale": size}, tmp_path / "l.safetensors")
    new = old + delta(layer)
    want = new * size / new.norm(dim=1 if rows else 0, keepdim=True)
    check(moved(base, tmp_path / "l.safetensors"), {f"{layer}.weight": want - old})


def test_the_card_names_the_lora_and_its_hash(base, tmp_path):
    save_file(pair(LAYERS[0], LAYERS[0]), tmp_path / "style.safetensors")
    card = convert(base, "self-forcing", tmp_path / "o", size=(64, 64), lora=tmp_path / "style.safetensors", **KW)
    want = hashlib.sha256((tmp_path / "style.safetensors").read_bytes()).hexdigest()
    assert card["lora"] == {"file": "style.safetensors", "sha256": want}
    assert json.loads((tmp_path / "o.json").read_text())["card"]["lora"]["sha256"] == want


# --- named errors -----------------------------------------------------------------------------------------------------

L = LAYERS[0]
WRONG = {
    "another width": (
        {f"{L}.lora_A.weight": torch.ones(4, 9), f"{L}.lora_B.weight": torch.ones(9, 4)},
        L,
    ),
    "ranks that differ": ({f"{L}.lora_A.weight": torch.ones(3, 64), f"{L}.lora_B.weight": torch.ones(64, 4)}, L),
    "half a LoRA": ({f"{L}.lora_A.weight": torch.ones(4, 64)}, "half a LoRA"),
    "alpha alone": ({**pair(L, L), "blocks.1.self_attn.q.alpha": torch.tensor(1.0)}, r"blocks\.1\.self_attn\.q\.alpha"),
    "no number": ({**pair(L, L), f"{L}.alpha": torch.tensor(float("nan"))}, "alpha"),
    "no effect": ({**pair(L, L), f"{L}.alpha": torch.tensor(0)}, "alpha of .* is 0; it must be"),
    "a step back": ({**pair(L, L), f"{L}.alpha": torch.tensor(-1.0)}, "alpha of .* is -1; it must be"),
    "too much": ({**pair(L, L), f"{L}.alpha": torch.tensor(3e38)}, rf"with it {re.escape(L)}\.weight is not finite"),
    "infinite": ({f"{L}.diff_b": torch.full((64,), float("inf"))}, r"not finite: .*diff_b"),
    "not a number": (
        {**pair(L, L), "head.head.bias": torch.full((64,), float("nan"))},
        r"not finite: head\.head\.bias",
    ),
    "several adapters": (
        {**pair(L, L, middle=".a"), **pair(LAYERS[2], LAYERS[2], middle=".b")},
        "adapters, a, b",
    ),
    "one layer twice": ({**pair(L, L), **pair(L, f"diffusion_model.{L}")}, "mean the same"),
    "one parameter twice": (
        {"head.head.bias": torch.zeros(64), "head.head.modules_to_save.default.bias": torch.zeros(64)},
        "mean the same",
    ),
    "two moves": ({**pair(L, L), f"{L}.diff": torch.zeros(64, 64)}, "both move"),
    "a difference of another shape": ({f"{L}.diff_b": torch.zeros(65)}, r"diff_b is \[65\]"),
    "a parameter of another shape": ({"head.head.bias": torch.zeros(3)}, r"head\.head\.bias is \[3\]"),
    "magnitudes of another shape": ({**pair(L, L), f"{L}.dora_scale": torch.ones(7, 1)}, "dora_scale"),
    "a text encoder": ({"lora_te1_layers_0_mlp.lora_down.weight": torch.ones(4, 8)}, "text encoder"),
    "LoHa": ({f"{L}.hada_w1_a": torch.ones(4, 4)}, "LoHa"),
    "LoKr": ({"lycoris_blocks_0_self_attn_q.lokr_w1": torch.ones(4, 4)}, "LoKr"),
    "LoCon": ({**pair(L, L), f"{L}.lora_mid.weight": torch.ones(4, 4)}, "LoCon"),
    "no layer of it": ({**pair(L, "blocks.77.self_attn.q")}, r"blocks\.77"),
    "a stranger": ({**pair(L, L), "surprise": torch.ones(1)}, "surprise"),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named_with_its_file(base, tmp_path, what):
    state, said = WRONG[what]
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        moved(base, tmp_path / "odd.safetensors")
    assert "odd.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": 8, "r": 8}, "rank 4"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": 8, "fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"lora_alpha": 8, "use_dora": True}, "use_dora"),
        ({}, "--lora-alpha"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 8, "r": True}, "r is True"),
        ({"lora_alpha": 8, "alpha_pattern": {"(": 3}}, "regular expression"),
        ({"lora_alpha": 8, "alpha_pattern": [3]}, "alpha_pattern"),
        ({"lora_alpha": 8, "rank_pattern": {"q": "4"}}, "rank_pattern of 'q'"),
    ],
)
def test_settings_of_peft_that_mean_something_else_are_refused(base, tmp_path, config, said):
    folder = peft_folder(tmp_path / "a", pair(L, f"base_model.model.{L}"), **config)
    with pytest.raises(ValueError, match=said):
        moved(base, folder)


def test_alphas_that_contradict_each_other_are_refused(base, tmp_path):
    state = {**pair(L, L), f"{L}.alpha": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="alpha"):
        moved(base, peft_folder(tmp_path / "a", state, lora_alpha=8))
    save_file(state, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="--lora-alpha"):
        moved(base, tmp_path / "l.safetensors", lora_alpha=3.0)


def test_a_folder_of_several_adapters_asks_for_one(base, tmp_path):
    (tmp_path / "f").mkdir()
    for name in ("a", "b"):
        save_file(pair(L, L), tmp_path / "f" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors, b\.safetensors"):
        moved(base, tmp_path / "f")


# --- any change of a valid file ---------------------------------------------------------------------------------------


def valid():
    state = {}
    for layer in LAYERS:
        state |= {**pair(layer, f"diffusion_model.{layer}", "lora_down", "lora_up")}
        state[f"diffusion_model.{layer}.alpha"] = torch.tensor(ALPHA)
    state["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.ones(64)
    state["diffusion_model.blocks.1.self_attn.norm_q.diff"] = torch.ones(64)
    state["diffusion_model.text_embedding.0.bias"] = torch.ones(64)
    return state


ENDINGS = (
    "alpha",
    "lora_down.weight",
    "lora_up.weight",
    "diff",
    "diff_b",
    "dora_scale",
    "bias",
    "weight",
    "lora_mid",
    "x",
)


def mutated(data):
    """A valid adapter with one key renamed, dropped, doubled or given another tensor; and that key."""
    state = valid()
    key = data.draw(st.sampled_from(sorted(state)), label="key")
    change = data.draw(st.sampled_from(["drop", "rename", "double", "shape", "value", "dtype"]), label="change")
    x = state[key]
    if change == "drop":
        del state[key]
    elif change in ("rename", "double"):
        ending = data.draw(st.sampled_from(ENDINGS), label="ending")
        prefix = data.draw(st.sampled_from(["", "net.", "lora_unet_", "transformer.", "blocks.9."]), label="prefix")
        new = prefix + key.removeprefix("diffusion_model.").split(".lora_")[0].removesuffix(".alpha") + "." + ending
        if change == "rename":
            del state[key]
        state[new], key = x, new
    elif change == "shape":
        state[key] = torch.ones(data.draw(st.lists(st.integers(1, 5), max_size=3), label="shape"))
    elif change == "value":
        state[key] = x + 1
    else:
        state[key] = x.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int32]), label="dtype"))
    return state, key, change


def examined(data):
    """Every tensor of the adapter is used (without it, or with another value, the result differs), or is named."""
    state, key, change = mutated(data)
    old, source = to_ours(weights()), "mutated.safetensors"
    try:
        new = merge_lora(old, Adapter(state, source=source))
    except ValueError as error:
        assert source in str(error)
        return "named"
    if change == "drop":
        return "dropped"
    without = {name: x for name, x in state.items() if name != key}
    try:
        other = merge_lora(old, Adapter(without, source=source))
    except ValueError:
        return "needed"
    assert any(not torch.equal(new[name], other[name]) for name in new), key
    return "used"


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_key_of_a_changed_adapter_is_used_or_named(examples):
    hits = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def change(data):
        hits[examined(data)] += 1

    change()
    for outcome, number in sorted(hits.items()):
        print(f"{number:6d} {outcome}")
    assert {"used", "named", "dropped"} <= hits.keys()
