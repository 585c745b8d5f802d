"""Several processes, micro-batches and recomputed blocks train the same network as one process on the whole batch."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ACTIONS
from tiny_nets import clip, tiny_dit, tiny_ltx
from tiny_ranks import assert_same, first_gradients, result, same_ranks, together
from tiny_talker import talker_stage
from tiny_training import DIT, OPTIM, codec_stage, dmd_stage, flow_stage
from torch import nn

from vidistill import checkpoint, distributed
from vidistill.checkpoint import read_tensors, save_tensors
from vidistill.conditioning.condition import Condition
from vidistill.data.prompts import open_data
from vidistill.data.shards import write_shards
from vidistill.diffusion import RowGenerator, decide, draw, randn_like
from vidistill.distributed import Part, parts
from vidistill.teachers.ltx import LTX
from vidistill.teachers.wan import Experts
from vidistill.training.run_folder import STATE, newest_state
from vidistill.training.trainer import METRICS, Trainer, train

ADAMW = replace(OPTIM, muon="")
STAGES = {
    "flow": lambda root, **kw: flow_stage(root, **{"batch": 4, "optim": ADAMW, **kw}),
    "dmd": lambda root, **kw: dmd_stage(root, **{"batch": 4, "optim": ADAMW, "critic_optim": ADAMW, **kw}),
}
MORE = {
    "codec": lambda root, **kw: codec_stage(root, **{"batch": 4, "optim": ADAMW, **kw}),
    "everything": lambda root, **kw: everything(root, **kw),
    "invalid": lambda root, **kw: broken_stage(root, **kw),
    "avatar": lambda root, **kw: talker_stage(root, **{"batch": 4, "critic_optim": ADAMW, **kw}),
    "sid": lambda root, **kw: STAGES["dmd"](root, objective="sid", **kw),
}


def everything(root, **settings):
    """Distribution matching with every term, replayed, on continued streams."""
    loss = replace(dmd_stage(root).loss, motion=1.0, motion_head=1.0, regression=0.5, target_steps=2)
    return STAGES["dmd"](root, replay=True, long_frames=13, save_every=3, loss=loss, **settings)


def broken_stage(root, **settings):
    """Distribution matching that learns little from rollouts far from the recorded clips, which differ in size."""
    loss = replace(dmd_stage(root).loss, invalid_weight=0.25)
    meta = {"fps": 17.5, "actions": list(ACTIONS), "px_size": 16}
    data = open_data(root / "latents")
    tensors = {name: data.parts[0][name] for name in ("latents", "images", "actions")}
    size = torch.tensor([1.0, 30.0]).repeat(3).view(-1, 1, 1, 1, 1)
    tensors["latents"], tensors["images"] = (size * tensors[n].float() for n in ("latents", "images"))
    write_shards(root / "sizes", [(tensors, [{"seed": k} for k in range(6)])], meta)
    return STAGES["dmd"](root, data=str(root / "sizes"), loss=loss, **settings)


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with same_ranks():
        yield


@pytest.fixture
def root(tmp_path):
    return tmp_path


def drawn(rng, rows):
    """What stages draw for so many rows: a decision, then levels, noise and choices."""
    size = (rows, 3)
    numbers = [
        draw(torch.rand, (rows,), rng),
        randn_like(torch.zeros(rows, 2, 5), rng),
        draw(torch.randint, size, rng, 9),
    ]
    return [decide(2**31, rng), *numbers, draw(torch.randn, (2 * rows, 2), rng)]


def test_rows_draw_the_same_numbers_however_a_batch_is_split():
    def generator(first, count):
        return RowGenerator(torch.Generator().manual_seed(1), first, count)

    whole = drawn(generator(0, 4), 4)
    for x in whole[1:]:
        assert len({tuple(row.flatten().tolist()) for row in x}) == len(x), "two rows draw the same"
    assert abs(float(draw(torch.randn, (4, 10_000), generator(0, 4)).std()) - 1) < 0.02
    for index, part in [(k, Part(k, 4)) for k in range(4)] + [(2 * k, Part(k, 2)) for k in range(2)]:
        seen = drawn(generator(index, 4 // part.count), 4 // part.count)
        assert seen[0] == whole[0] and all(
            torch.equal(a, part.rows(b)) for a, b in zip(seen[1:], whole[1:], strict=True)
        )
    assert not torch.equal(whole[1], drawn(generator(4, 4), 4)[1])


def test_a_draw_that_is_not_for_the_rows_is_refused():
    with pytest.raises(ValueError, match="not for 2 rows"):
        draw(torch.rand, (3,), RowGenerator(torch.Generator(), 0, 2))


def test_draws_of_the_whole_batch_give_a_part_its_rows():
    rng = torch.Generator().manual_seed(1)
    whole = drawn(rng, 4)
    for index in range(4):
        part, rng = Part(index, 4), torch.Generator().manual_seed(1)
        with part.draws(1):
            seen = drawn(rng, 1)
            torch.randn(3)  # no generator was passed: not a part of the training's randomness
        assert seen[0] == whole[0]
        assert all(torch.equal(a, part.rows(b)) for a, b in zip(seen[1:], whole[1:], strict=True))


def test_a_run_of_whole_batch_draws_goes_on_with_them(root):
    cfg = STAGES["flow"](root, steps=2, draws="batch", name="kept")
    Trainer(cfg).run()
    row = Trainer(replace(cfg, steps=4, draws="row"))
    row.run()
    assert row.cfg.draws == "batch"
    once = Trainer(replace(cfg, steps=4, name="once"))
    once.run()
    kept, whole = (checkpoint.load(str(root / "runs" / n / n)).net.state_dict() for n in ("kept", "once"))
    assert all(torch.equal(x, whole[name]) for name, x in kept.items())


@pytest.mark.parametrize("stage", [*STAGES, "codec"])
def test_batches_that_are_read_ahead_train_the_same(root, stage):
    make = {**STAGES, **MORE}[stage]
    assert_same(
        result(make(root, name="ahead", loader_workers=1), 3, root / "ahead"), result(make(root), 3, root / "asked")
    )


def test_a_process_reads_its_own_rows(root):
    cfg = STAGES["flow"](root, accumulate=2)
    trainer = Trainer(cfg)
    whole = trainer.batch(0)
    trainer.parts = [Part(1, 4)]
    own = trainer.next_batch()
    assert torch.equal(own.x, whole.x[1:2]) and len(whole.x) == 4


@pytest.mark.timeout(600)
def test_four_processes_in_two_copies_of_two_shards_equal_one(root):
    make = STAGES["dmd"]
    one = result(make(root, name="one"), 3, root / "one")
    cfg = make(root, name="four", parallel="shard", shard_group=2)
    four = result(cfg, 3, root / "four", count=4)
    assert_same(four, one)
    more = result(cfg, 2, root / "more", count=2)  # one copy of two shards goes on
    once = result(make(root, name="one"), 2, root / "once")
    assert_same(more, once)
    with pytest.raises(AssertionError):  # every process ends with the error
        result(make(root, name="odd", parallel="shard", shard_group=3), 1, root / "odd", count=2)


def test_alone_a_run_has_one_part_and_no_group():
    assert parts(3, 1) == [Part()] and Part().rows(x := torch.ones(3)) is x
    assert not distributed.launched() and distributed.rank() == 0 and distributed.world_size() == 1
    with distributed.group():
        assert distributed.mean([row := {"loss": 0.1}]) is row


def test_a_batch_that_cannot_be_split_is_refused(root):
    with pytest.raises(ValueError, match=r"batch 4.*among 1 processes x 3 micro-batches"):
        Trainer(STAGES["flow"](root, accumulate=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "accumulate.*1"),
        ({"parallel": "magic"}, "'magic' is unknown"),
        ({"gather": "bf16"}, "precision=bf16"),
        ({"gradient_sync": "never"}, "gradient_sync"),
        ({"parallel": "shard", "optim": OPTIM}, "clear optim.muon"),
        ({"parallel": "shard", "objective": "codec"}, "for transformers"),
        ({"sequence": 0}, "sequence.*least 1"),
        ({"sequence": 2, "objective": "codec"}, "set sequence=1"),
        ({"shard_group": 2}, "parallel=shard"),
        ({"draws": "none"}, "draws"),
        ({"offload": True}, "dit.checkpoint=true"),
    ],
)
def test_impossible_ways_of_sharing_are_refused(root, settings, message):
    with pytest.raises(ValueError, match=message):
        STAGES["flow"](root, **settings)


@pytest.mark.parametrize("stage", [*STAGES, "codec", "everything", "invalid"])
def test_micro_batches_equal_the_whole_batch(root, stage):
    make = {**STAGES, **MORE}[stage]
    whole = result(make(root, name="whole"), 3, root / "whole")
    for accumulate in (2, 4):
        split = result(make(root, name=f"split{accumulate}", accumulate=accumulate), 3, root / "split")
        assert_same(split, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_blocks_give_the_same_training(root, stage):
    cfg = STAGES[stage](root, name="kept")
    again = replace(cfg, name="recomputed", dit=replace(cfg.dit, checkpoint=True))
    assert Trainer(again).student_state.net.state_dict().keys() == Trainer(cfg).student_state.net.state_dict().keys()
    assert_same(result(again, 3, root / "recomputed"), result(cfg, 3, root / "kept"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [*STAGES, "sid", "avatar"])
def test_two_processes_equal_one_on_the_same_global_batch(root, stage):
    make = {**STAGES, **MORE}[stage]
    one = result(make(root, name="one"), 3, root / "one")
    for parallel in distributed.PARALLEL:
        two = result(make(root, name=parallel, parallel=parallel), 3, root / parallel, count=2)
        assert_same(two, one)


@pytest.mark.parametrize("stage", [*STAGES, "sid"])
@pytest.mark.parametrize(("count", "settings"), [(2, {}), (2, {"parallel": "shard"}), (4, {"parallel": "shard"})])
def test_processes_that_share_tokens_train_as_one_does(root, stage, count, settings):
    make = {**STAGES, **MORE}[stage]
    one = result(make(root, name="one"), 3, root / "one")
    more = result(make(root, name="more", sequence=2, **settings), 3, root / "more", count=count)
    assert_same(more, one)


def test_what_waits_on_the_host_for_its_backward_pass_changes_nothing(root, monkeypatch):
    cfg = STAGES["dmd"](root, name="here")
    cfg = replace(cfg, dit=replace(cfg.dit, checkpoint=True))
    here, waited, wait = result(cfg, 3, root / "here"), [], torch.autograd.graph.save_on_cpu

    class Counted(wait):
        def __init__(self, **how):
            super().__init__(**how)
            pack = self.pack_hook
            self.pack_hook = lambda x: (waited.append(tuple(x.shape)), pack(x))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    there = result(replace(cfg, name="there", offload=True), 3, root / "there")
    assert there[1] == here[1] and all(torch.equal(there[0][name], x) for name, x in here[0].items())
    inputs = [shape for shape in waited if len(shape) == 4 and shape[-1] == cfg.dit.width]
    assert len(inputs) >= cfg.dit.layers  # [B, F, n, D] of every block


def experts():
    nets = [tiny_dit(seed=k).requires_grad_(False) for k in range(2)]
    return Experts(*nets, 0.9), Condition(torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)))


def ltx():
    pytest.importorskip("diffusers")
    return LTX(tiny_ltx(4, 8, layers=2).requires_grad_(False)), Condition(torch.ones(1, 6, 8))


def test_a_foreign_teacher_in_half_precision_takes_latents_in_full():
    net, cond = ltx()
    x, sigma = clip(), torch.full((1, 9), 0.5)
    full, half = net.velocity(x, sigma, cond), net.bfloat16().velocity(x, sigma, cond)
    assert half.dtype == torch.float32 and 0 < (half - full).norm() < 0.1 * full.norm()


def velocity_in_shards(make, out):
    net, cond = make()
    if distributed.world_size() > 1:
        distributed.shard(net, net.units)
    v = net.velocity(clip(), torch.full((1, 9), 0.5), cond)
    if distributed.rank() == 0:
        save_tensors(out, {"v": v}, {})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("make", [experts, ltx])
def test_teachers_of_several_networks_or_of_another_library_are_sharded_too(tmp_path, make):
    velocity_in_shards(make, tmp_path / "one")
    together(2, velocity_in_shards, make, tmp_path / "two")
    one, two = (read_tensors(tmp_path / name)[0]["v"] for name in ("one", "two"))
    torch.testing.assert_close(two, one)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [{}, {"replay": True}, {"objective": "teacher_forcing", "teacher": None}])
@pytest.mark.parametrize("recompute", [False, True])
def test_shards_get_every_gradient_in_half_precision(root, settings, recompute):
    cfg = STAGES["dmd"](root, precision="bf16", **settings)
    cfg = replace(cfg, dit=replace(cfg.dit, checkpoint=recompute))
    first_gradients(cfg, root / "one")
    together(2, first_gradients, replace(cfg, parallel="shard"), root / "two")
    one, two = (read_tensors(root / name)[0] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all((one[n] - two[n]).norm() < 0.05 * one[n].norm() + 1e-6 for n in one)


def watched_step(cfg, out):
    """A student step; says how often gradients were summed, and in which type a layer's weights were gathered."""
    name = "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    summed, dtypes, scatter = [], set(), getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        summed.append(1)
        return scatter(*args, **kwargs)

    trainer = Trainer(cfg)
    layer = next(m for n, m in trainer.roles.student.named_modules() if n.endswith("blocks.0.ffn.0"))
    layer.register_forward_pre_hook(lambda module, args: dtypes.add(str(module.weight.dtype)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, name, counted)
        trainer.step()
    if distributed.rank() == 0:
        save_tensors(out, {}, {"summed": len(summed), "dtypes": sorted(dtypes)})


@pytest.mark.timeout(600)
def test_gradients_of_shards_are_summed_once_a_step_where_asked(root):
    found = {}
    for sync in ("micro_batch", "step"):
        for stage, settings in (("flow", {}), ("dmd", {"replay": True})):
            cfg = STAGES[stage](root, parallel="shard", accumulate=2, gradient_sync=sync, **settings)
            together(2, watched_step, cfg, root / "seen")
            found[stage, sync] = read_tensors(root / "seen")[1]["summed"]
    assert 0 < 2 * found["flow", "step"] == found["flow", "micro_batch"]
    assert found["dmd", "step"] < found["dmd", "micro_batch"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("replay", [False, True])
def test_gradients_summed_once_a_step_are_those_of_one_process(root, replay):
    one = result(STAGES["dmd"](root, name="one", replay=replay), 3, root / "one")
    cfg = STAGES["dmd"](root, name="two", replay=replay, parallel="shard", accumulate=2, gradient_sync="step")
    assert_same(result(cfg, 3, root / "two", count=2), one)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [{}, {"replay": True}, {"gradient_sync": "step", "accumulate": 2}])
def test_weights_gathered_in_half_precision_train_as_whole_ones(root, settings):
    cfg = STAGES["dmd"](root, precision="bf16", **settings)
    first_gradients(cfg, root / "one")
    cfg = replace(cfg, parallel="shard", gather="bf16")
    together(2, first_gradients, cfg, root / "two")
    one, two = (read_tensors(root / name)[0] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(g.dtype == torch.float32 for g in two.values())
    assert all((one[n] - two[n]).norm() < 0.1 * one[n].norm() + 1e-6 for n in one)
    together(2, watched_step, cfg, root / "seen")
    assert read_tensors(root / "seen")[1]["dtypes"] == ["torch.bfloat16"]


@pytest.mark.timeout(600)
def test_two_processes_with_whole_networks_may_use_muon(root):
    one = result(STAGES["flow"](root, name="one", optim=OPTIM), 3, root / "one")
    assert_same(result(STAGES["flow"](root, name="two", optim=OPTIM), 3, root / "two", count=2), one)


@pytest.mark.timeout(600)
def test_two_processes_with_every_option_equal_one_with_none(root):
    one = result(everything(root, name="one"), 4, root / "one")
    cfg = everything(root, name="two", parallel="shard", accumulate=2)
    cfg = replace(cfg, dit=replace(cfg.dit, checkpoint=True))
    assert_same(result(cfg, 4, root / "two", count=2), one)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", distributed.PARALLEL)
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(root, parallel, first, then):
    whole = result(STAGES["dmd"](root, name="whole"), 4, root / "whole")
    cfg = STAGES["dmd"](root, name="halves", parallel=parallel)
    result(cfg, 2, root / "first", count=first)
    sharded = [path.name for path in (root / "runs" / "halves").glob("state-*")]
    assert sharded == (["state-00000002"] if parallel == "shard" and first == 2 else [])
    assert (root / "runs" / "halves" / STATE).is_file() == (not sharded)
    rest = result(cfg, 2, root / "then", count=then)
    assert_same(rest, (whole[0], whole[1][2:]))


@pytest.mark.timeout(600)
def test_shards_of_another_network_are_refused(root):
    cfg = STAGES["flow"](root, parallel="shard")
    result(cfg, 1, root / "out", count=2)
    with pytest.raises(RuntimeError, match="other networks"):
        Trainer(replace(cfg, dit=replace(DIT, ffn=64))).resume()


@pytest.mark.timeout(600)
def test_a_sharded_run_writes_its_log_and_its_export_once(root):
    settings = {"steps": 2, "log_every": 1, "save_every": 1}
    one = train(STAGES["flow"](root, name="one", **settings))
    together(2, train, STAGES["flow"](root, name="two", parallel="shard", **settings))
    folder = root / "runs" / "two"
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "state-00000002",
        "two.json",
        "two.safetensors",
    ]
    a, b = checkpoint.load(one, "teacher").net, checkpoint.load(folder / "two", "teacher").net
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-3, atol=1e-4, msg=name)


def test_the_complete_state_of_most_steps_is_read(tmp_path):
    assert newest_state(tmp_path) is None
    for step in (3, 12, 40):
        (folder := tmp_path / f"state-{step:08d}").mkdir()
        if step < 40:  # the last one was being written when the run was killed
            (folder / "info.json").write_text("{}")
    (odd := tmp_path / "state-x").mkdir()
    (odd / "info.json").write_text("{}")
    assert newest_state(tmp_path).name == "state-00000012"
    for step, name in ((11, "state-00000012"), (13, STATE)):  # killed before the other one was removed
        save_tensors(tmp_path / STATE, {}, {"step": step})
        os.utime(tmp_path / STATE, (0, 0))  # clocks do not count
        assert newest_state(tmp_path).name == name


def test_gradients_of_plain_and_scaled_parameters_become_means():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([2.0, 4.0])
    distributed.mean_gradients([p, nn.Parameter(torch.zeros(1))], 2)
    assert p.grad.tolist() == [1.0, 2.0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_torchrun_trains_from_the_command_line(root):
    cfg = STAGES["flow"](root)
    stage = {"name": "cli", "objective": "flow", "data": cfg.data, "steps": 2, "batch": 4, "frames": cfg.frames}
    text = json.dumps({**stage, "parallel": "shard", "out": cfg.out, "dit": {"channels": 4, "width": 24, "heads": 2}})
    (root / "cli.yaml").write_text(text)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "vidistill", "train", str(root / "cli.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(root / "runs" / "cli" / "cli.safetensors")
    assert checkpoint.load(root / "runs" / "cli" / "cli").kind == "teacher"
