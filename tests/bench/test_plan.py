"""The planner: bytes of passes are those of real ones, plans add up, and what does not fit says what would."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from vidistill.bench import cost, plan
from vidistill.cli.main import main
from vidistill.config import load_config
from vidistill.diffusion import LatentShape
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.models.lora import LoraConfig, add_lora
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.ops.attention import use_backend
from vidistill.training.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PLANNED = [p for p in sorted((CONFIGS / "wan").glob("*.yaml")) if "# Planned for" in p.read_text()]
STUDENT = StudentConfig(2, 0, MemoryConfig("full", frames=6, phase="absolute"))


def saved_on_the_cpu(p):
    """Bytes of storages that real forwards keep: what autograd saves, and what recomputed blocks are called with."""
    net, kept, held = VideoDiT(p.dit), {}, []
    student = CausalStudent(net, p.memory, LatentShape(p.frames, p.dit.channels, *p.size, p.dit.patch))
    x, sigma = torch.randn(1, p.frames, p.dit.channels, *p.size), torch.zeros(1, p.frames)
    cond = cost.blank_condition(p.dit, x)
    memories = [student.new_memory(1) for _ in range(p.count)]
    there = {t.untyped_storage()._cdata for t in (x, sigma, cond.tokens, *net.parameters()) if t is not None}

    def note(t):
        if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in there:
            held.append(t)
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    def called(block, args):
        for t in tree_leaves([args, [around.table for around in args if hasattr(around, "table")]]):
            note(t)

    for block in net.blocks if p.dit.checkpoint else ():
        block.register_forward_pre_hook(called)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), use_backend("sdpa"):
        held += [net(x, sigma, cond, memory=memory) for memory in memories]
    return sum(kept.values())


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("text", [0, 10])
@pytest.mark.parametrize(("width", "layers", "side", "count"), [(24, 2, 8, 1), (48, 3, 8, 2), (48, 4, 16, 3)])
def test_planned_bytes_are_those_that_real_passes_keep(recomputed, text, width, layers, side, count):
    dit = DiTConfig(4, width=width, layers=layers, heads=2, ffn=2 * width, freq_dim=32, text_dim=text)
    dit = replace(dit, checkpoint=recomputed)
    passes = plan.Passes(dit, (side, side), 2, count, STUDENT, precision="fp32")
    assert plan.kept_bytes(passes) == saved_on_the_cpu(passes)


@pytest.mark.parametrize("recomputed", [False, True])
def test_blocks_that_take_other_sites_are_counted_by_kind(recomputed):
    sites = {"hidden": SiteConfig(dim=6, hidden=8, layers=(2, 3, 4)), "modulation": SiteConfig(dim=5)}
    sites["qk"] = SiteConfig(dim=12, layers=(1, 2))
    dit = DiTConfig(4, width=24, layers=7, heads=2, ffn=48, freq_dim=32, sites=sites, checkpoint=recomputed)
    passes = plan.Passes(dit, (8, 8), 3, precision="fp32")
    assert plan.kept_bytes(passes) == plan.live_bytes(passes)[0]


def test_passes_beyond_the_second_cost_what_it_does():
    cfg = load_config(TrainConfig, CONFIGS / "doom" / "diagonal.yaml")
    roles = plan.roles_of(cfg)
    planner = plan.Planner(roles, plan.latent_size(cfg, roles["student"].dit))
    three = planner.passes(cfg, "student", 3, memory=cfg.student, count=3)
    assert planner.kept(three) == plan.kept_bytes(three)


def test_what_waits_on_the_host_is_not_on_the_device():
    dit = DiTConfig(4, width=48, layers=3, heads=2, ffn=96, freq_dim=32, checkpoint=True)
    here = plan.Passes(dit, (16, 16), 2, 1, STUDENT, precision="fp32")
    assert plan.kept_bytes(replace(here, offload=True)) < 0.2 * plan.kept_bytes(here)


def test_adapters_are_counted_as_peft_makes_them():
    pytest.importorskip("peft")
    dit, lora = DiTConfig(width=24, layers=2, heads=2, ffn=48, text_dim=8), LoraConfig(rank=3)
    net = add_lora(VideoDiT(dit), lora)
    assert plan.adapters(dit, lora) == sum(p.numel() for n, p in net.named_parameters() if "lora_" in n)


@pytest.fixture(scope="module")
def stage():
    """Self Forcing from prompts, of networks whose clips weigh more than they do."""
    dit = ["dit.width=128", "dit.layers=3", "dit.heads=4", "dit.ffn=256", "dit.text_dim=16"]
    small = ["init=null", "teacher=nowhere/teacher", "critic_init=null", "latent_size=[16,16]", "accumulate=1"]
    cfg = load_config(TrainConfig, CONFIGS / "wan" / "selfforcing.yaml", [*dit, *small])
    return cfg, plan.Planner(plan.roles_of(cfg), (16, 16))


def test_a_plan_takes_the_fewest_micro_batches_that_fit(stage):
    cfg, planner = stage
    whole = planner.plan(cfg, 8, 80)
    assert whole["fits"] and whole["accumulate"] == 1 and whole["clips_at_once"] == 8
    part = planner.plan(cfg, 8, 0.6 * whole["peak_bytes"] / 1e9)
    assert part["fits"] and part["accumulate"] > 1 and part["accumulate"] * part["clips_at_once"] == 8
    always = sum(v for name, v in part["state_bytes"].items() if name not in ("gathered", "optimiser step"))
    clip = max(sum(row.values()) for row in part["clip_bytes"].values())
    assert part["peak_bytes"] == always + part["state_bytes"]["gathered"] + part["clips_at_once"] * clip


def test_shards_and_shared_tokens_divide_what_they_divide(stage):
    cfg, planner = stage
    eight, two = planner.plan(cfg, 8, 80), planner.plan(cfg, 2, 80)
    assert two["state_bytes"]["teacher"] == pytest.approx(4 * eight["state_bytes"]["teacher"], rel=1e-3)
    assert two["state_bytes"]["gathered"] == eight["state_bytes"]["gathered"]
    shared = planner.plan(replace(cfg, sequence=2), 8, 80)
    for phase, row in eight["clip_bytes"].items():
        assert all(shared["clip_bytes"][phase][name] == size // 2 for name, size in row.items())
    whole = planner.plan(replace(cfg, parallel="replicate"), 8, 80)
    assert whole["state_bytes"]["student"] == pytest.approx(8 * eight["state_bytes"]["student"], rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "gpus", "message"),
    [({}, 12, "batch 64"), ({"sequence": 2}, 9, "sequence 2"), ({"sequence": 3}, 3, "sequence")],
)
def test_a_plan_that_cannot_be_split_is_refused(stage, changed, gpus, message):
    cfg, planner = stage
    with pytest.raises(ValueError, match=message):
        planner.plan(replace(cfg, **changed), gpus, 80)


def test_what_does_not_fit_says_what_would(stage, monkeypatch):
    cfg, planner = stage
    monkeypatch.setattr(plan, "Planner", lambda roles, size: planner)  # which has counted most of it
    least = planner.plan(replace(cfg, accumulate=8), 8, 1e-6)["peak_bytes"] / 1e9
    found = list(planner.remedies(cfg, 8, least))
    assert any("sequence=" in words for words in found) and any("on 16 GPUs" in words for words in found)
    with pytest.raises(ValueError, match=r"wan-selfforcing.*What fits: nothing"):
        plan.checked(cfg, planner.roles, 1, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_every_stage_fits_the_gpus_that_its_config_names(path):
    named = re.search(r"^# Planned for (\d+) GPUs of (\d+) GB(?:: (.*))?\.$", path.read_text(), re.MULTILINE)
    assert named, f"{path.name} does not say which GPUs it is planned for"
    gpus, memory, settings = named.groups()
    cfg = load_config(TrainConfig, path, (settings or "").split())
    roles = plan.roles_of(cfg)
    found = plan.Planner(roles, plan.latent_size(cfg, roles["student"].dit)).plan(cfg, int(gpus), float(memory))
    assert found["fits"] and found["accumulate"] == cfg.accumulate


def test_the_command_line_plans_and_refuses(capsys):
    path = str(CONFIGS / "doom" / "diagonal.yaml")
    assert main(["train", path, "--gpus", "2"]) == 1 and "--dry-run" in capsys.readouterr().err
    assert main(["train", path, "--dry-run", "--gpus", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["plan"]["fits"] and any(line.startswith("plan ") for line in out)
    assert main(["train", path, "--dry-run", "--gpus", "1", "--gpu-memory", "0.001"]) == 1
    assert "What fits" in capsys.readouterr().err
