"""Training stages: exact resume, what stops a run, alternation, averages, rollouts that one graph cannot hold."""

import json
import multiprocessing
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import SHAPE, STUDENT, random_dit
from saved_bytes import SavedBytes
from tiny_training import (
    DIT,
    FRAMES,
    OPTIM,
    backward,
    codec_stage,
    dmd_stage,
    flow_stage,
    rolled,
    write_latents,
    write_teacher,
)
from torch import nn

from vidistill import checkpoint, distributed, tensors
from vidistill.checkpoint import read_tensors
from vidistill.data.prompts import Prompts
from vidistill.distributed import Part
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import StudentConfig
from vidistill.ops import attention
from vidistill.rollout import chunk_noise
from vidistill.training import optim as train_states
from vidistill.training import trainer as trainer_module
from vidistill.training.config import EXPORTS
from vidistill.training.interruption import Interruption
from vidistill.training.losses import Loss, LossConfig
from vidistill.training.on_policy import DataSampler
from vidistill.training.optim import OptimConfig, TrainState
from vidistill.training.run_folder import STATE
from vidistill.training.trainer import METRICS, Trainer, TrainingError, train

STAGES = {
    "flow": flow_stage,
    "codec": codec_stage,
    "dmd": dmd_stage,
    "dmd, replayed, all terms": lambda root: dmd_stage(
        root,
        replay=True,
        long_frames=16,
        save_every=3,
        loss=replace(dmd_stage(root).loss, motion=1.0, motion_head=1.0, regression=0.5, target_steps=2),
    ),
    "dmd, long streams": lambda root: dmd_stage(root, long_frames=16, save_every=3),
    "dmd, rollouts reused": lambda root: dmd_stage(root, critic_steps=4, critic_reuse=4),
    "sid": lambda root: dmd_stage(root, objective="sid"),
    "bf16": lambda root: dmd_stage(root, precision="bf16"),
}


@pytest.fixture
def root(tmp_path):
    return tmp_path


def state_of(trainer):
    trainer.save()
    return read_tensors(trainer.folder / STATE)[0]


def steps(trainer, num):
    return [trainer.step() for _ in range(num)]


@pytest.mark.parametrize("stage", STAGES)
def test_six_steps_equal_three_then_save_load_and_three(root, stage):
    cfg = STAGES[stage](root)
    whole = Trainer(replace(cfg, name="whole"))
    start = {k: v.clone() for k, v in whole.student_state.state("student").items()}
    rows = steps(whole, 6)
    first = Trainer(replace(cfg, name="halves"))
    steps(first, 3)
    first.save()
    second = Trainer(replace(cfg, name="halves"))
    second.resume()
    assert second.step_count == 3
    assert steps(second, 3) == rows[3:]
    a, b = state_of(whole), state_of(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])][:5]
    moved = [k for k in start if not torch.equal(start[k], a[k])]  # two runs that stand still agree as well
    assert len(moved) > 0.5 * len(start) and any(".ema." in k for k in moved)
    for role in {key.split("/")[0] for row in rows for key in row}:
        losses = [row[f"{role}/loss"] for row in rows if f"{role}/loss" in row]
        assert len(set(losses)) == len(losses), f"the {role} sees the same sample twice"


def test_compiled_blocks_train_the_same_networks_but_for_a_student_that_rolls_out(root, monkeypatch):
    compiled, compile_ = [], torch.compile

    def watch(function, **settings):
        compiled.append(function.__name__)
        return compile_(function, **{**settings, "mode": None, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", watch)
    plain, fast = (Trainer(dmd_stage(root, name=name, compile=name == "fast")) for name in ("plain", "fast"))
    blocks = sum(len(net.blocks) for net in (plain.roles.critic, plain.roles.teacher))
    assert sorted(compiled) == sorted(["before", "after"] * blocks)
    for a, b in zip(steps(plain, 3), steps(fast, 3), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_all_parts_of_a_state_are_saved(root):
    tensors = state_of(prepared := Trainer(STAGES["dmd, replayed, all terms"](root)))
    steps(prepared, 2)
    tensors = state_of(prepared)
    kinds = {name.split(".")[0] + "." + name.split(".")[1] for name in tensors}
    assert kinds == {f"{a}.{b}" for a in ("student", "critic", "motion") for b in ("net", "optim")} | {"student.ema"}


@pytest.mark.timeout(600)
def test_a_killed_run_is_readable_and_resumes(root):
    flow_stage(root)
    run = root / "runs" / "flow"
    child = multiprocessing.get_context("fork").Process(target=train_for_ever, args=(root,))
    child.start()
    try:
        wait_for(run / STATE, child)
        time.sleep(random.Random().uniform(0.0, 0.3))
    finally:
        child.kill()  # SIGKILL
        child.join()
    assert child.exitcode == -signal.SIGKILL
    _, info = read_tensors(run / STATE)
    with open(run / METRICS, "a") as file:
        file.write('{"step": 12')  # a row cut short
    done = info["step"]
    trainer = Trainer(flow_stage(root, steps=done + 2, save_every=1, log_every=1))
    path = trainer.run()
    assert checkpoint.load(path).kind == "teacher"
    rows = [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()]
    assert rows == list(range(1, done + 3))
    assert not list(run.glob(".*.tmp"))


def train_for_ever(root):
    torch.set_num_threads(1)  # a forked process has no thread pool
    Trainer(flow_stage(root, steps=10**6, save_every=1, log_every=1)).run()


def wait_for(path, child):
    deadline = time.time() + 100
    while not path.is_file():
        assert child.is_alive(), "the run ended by itself"
        assert time.time() < deadline, "the run did not save"
        time.sleep(0.01)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(root, monkeypatch):
    cfg = flow_stage(root, save_every=2)
    trainer = Trainer(cfg)
    fn = trainer.objective.student

    def spoiled(*args):
        loss = fn(*args)
        return Loss(loss.value * float("nan")) if trainer.step_count == 3 else loss

    monkeypatch.setattr(trainer, "objective", replace(trainer.objective, student=spoiled))
    steps(trainer, 2)
    trainer.save()
    trainer.step()
    before = {k: v.clone() for k, v in trainer.student_state.state("x").items()}
    with pytest.raises(TrainingError, match=r"not finite.*3 .*nothing was updated.*state.safetensors"):
        trainer.loop(FakeBar(), Interruption())
    after = trainer.student_state.state("x")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert read_tensors(trainer.folder / STATE)[1]["step"] == 2


class FakeBar:
    def update(self):
        pass


def test_a_gradient_that_is_not_finite_stops_before_any_update(root):
    trainer = Trainer(dmd_stage(root))
    with torch.no_grad():
        next(trainer.roles.critic.parameters()).fill_(float("inf"))
    before = [p.clone() for p in trainer.student_state.params]
    trainer.cfg = replace(trainer.cfg, objective="sid")
    with pytest.raises(FloatingPointError):
        trainer.step_count = 1  # the critic's turn
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.student_state.params))


@pytest.mark.parametrize("role", ["teacher", "critic"])
@pytest.mark.parametrize("weights", [{"motion": 0.0}, {"dmd": 0.0, "motion": 1.0}])
def test_a_score_that_is_not_finite_stops_the_student(root, role, weights):
    cfg = dmd_stage(root)
    trainer = Trainer(replace(cfg, loss=replace(cfg.loss, **weights)))
    with torch.no_grad():
        next(getattr(trainer.roles, role).parameters()).fill_(float("nan"))
    before = [p.clone() for p in trainer.student_state.params]
    with pytest.raises(FloatingPointError):
        trainer.step()  # the student's turn
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.student_state.params))


def test_a_stage_trains_with_the_attention_backend_it_names(root, monkeypatch):
    used = []
    monkeypatch.setattr(Trainer, "run", lambda self: used.append(attention.choice()))
    train(flow_stage(root, backend="sdpa"))
    assert used == ["sdpa"] and attention.choice() == "auto"
    with pytest.raises(ValueError, match="backend 'cudnn' is unknown"):
        flow_stage(root, backend="cudnn")


def test_a_full_disk_keeps_the_last_saved_state(root, monkeypatch):
    trainer = Trainer(flow_stage(root))
    trainer.step()
    trainer.save()

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    trainer.step()
    with pytest.raises(OSError, match=r"No space.*device.*untouched"):
        trainer.save()
    assert read_tensors(trainer.folder / STATE)[1]["step"] == 1
    assert not list(trainer.folder.glob(".*.tmp"))


def test_a_finished_run_exports_its_average_once_more_without_training(root):
    cfg = flow_stage(root, steps=2)
    path = Trainer(cfg).run()
    trainer = Trainer(cfg)
    assert trainer.run() == path and trainer.step_count == 2
    net = checkpoint.load(path, "teacher").net
    average = dict(zip((n for n, _ in trainer.roles.student.named_parameters()), trainer.student_state.average))
    assert all(torch.equal(p, average[n].half().float()) for n, p in net.named_parameters())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_finished_weights_have_the_type_that_is_asked_for(root, dtype):
    path = train(flow_stage(root, name=dtype, steps=1, export_dtype=dtype))
    assert {t.dtype for t in read_tensors(path)[0].values()} == {EXPORTS[dtype]}
    assert {p.dtype for p in checkpoint.load(path).net.parameters()} == {torch.float32}


def test_the_hours_of_a_run_are_those_of_all_its_processes(root):
    trainer = Trainer(flow_stage(root, steps=1))
    trainer.started -= 7200
    trainer.save()
    path = Trainer(flow_stage(root, steps=1)).run()
    assert checkpoint.load(path).record["card"]["hours"] == pytest.approx(2.0, abs=0.1)


def test_resuming_with_another_network_says_so(root):
    trainer = Trainer(flow_stage(root))
    trainer.save()
    with pytest.raises(TrainingError, match="other networks"):
        Trainer(flow_stage(root, dit=replace(DIT, layers=1))).resume()


def test_a_student_is_updated_once_in_six_steps_after_the_warm_up(root):
    trainer = Trainer(dmd_stage(root, critic_steps=5, critic_warmup=2))
    turns = "".join(trainer.cfg.turn(s, trainer.loss).role[0] for s in range(15))
    assert turns == "ccscccccsccccc" + "s"


def test_critic_updates_in_a_row_learn_from_one_rollout_until_the_student_moves(root):
    trainer, drawn = Trainer(dmd_stage(root, critic_steps=5, critic_warmup=3, critic_reuse=2)), []
    sampler = trainer.samplers[0]
    make, sampler.rollouts = sampler.rollouts, lambda *a, **k: drawn.append(trainer.step_count) or make(*a, **k)
    assert [trainer.cfg.turn(s, trainer.loss).drawn for s in range(10)] == [0, 0, 2, 3, 4, 4, 6, 6, 8, 9]
    rows = steps(trainer, 10)
    assert drawn == [0, 2, 3, 4, 6, 8, 9]
    assert rows[4]["critic/loss"] != rows[5]["critic/loss"]  # other noise


def test_learning_rates_end_at_zero_for_student_and_critic(root):
    trainer = Trainer(dmd_stage(root, steps=12, critic_steps=2))
    assert trainer.student_state.steps == 4 and trainer.critic.steps == 8


def test_learning_rates_rise_stay_and_fall_in_a_line():
    cfg = OptimConfig(warmup=3, decay=0.4)
    rates = [cfg.factor(step, 10) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert {OptimConfig(warmup=0, decay=0.0).factor(step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize(("when", "summed"), [("micro_batch", [True, True, True]), ("step", [False, False, True])])
def test_gradients_are_summed_over_processes_when_it_was_asked_for(root, monkeypatch, when, summed):
    cfg = flow_stage(root, batch=3, accumulate=3, gradient_sync=when)
    trainer, told = Trainer(cfg), []
    monkeypatch.setattr(distributed, "sync_gradients", lambda nets, now: told.append(now))
    trainer.step()
    assert told == summed


def test_a_row_of_the_log_says_how_long_the_rest_will_take(root, caplog):
    trainer = Trainer(flow_stage(root, steps=6))
    trainer.step_count = 2
    trainer.folder.mkdir(parents=True)
    with caplog.at_level("INFO", logger="vidistill"):
        trainer.write_log({"step": 2, "s_per_step": 45.0})
    assert "(3 min left)" in caplog.text


@pytest.mark.parametrize("warmup", [10.0, 1.0])
def test_the_average_follows_its_closed_form(warmup):
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    student_state = TrainState(net, OptimConfig(lr=1.0), steps=100, ema=0.5, ema_start=2, ema_warmup=warmup)
    want = 0.0
    for update in range(1, 8):
        nn.init.constant_(net.weight, float(update))
        student_state.updates = update
        student_state.update_ema()
        decay = 0.0 if update <= 2 else min(0.5, (1 + update) / (10 + update)) if warmup == 10 else 0.5
        want = decay * want + (1 - decay) * update
        assert student_state.average[0].item() == pytest.approx(want, rel=1e-6)


def test_muon_updates_only_the_matrices_it_is_asked_for():
    net = random_dit(DIT)
    student_state = TrainState(net, OPTIM, steps=10)
    names = {n for n, p in net.named_parameters() if any(p is m for m in student_state.matrices)}
    assert names and all(n.startswith("blocks.") and n.endswith("weight") for n in names)
    assert sum(len(g["params"]) for o in student_state.optims for g in o.param_groups) == len(student_state.params)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float32, 4e-3)])
def test_muon_is_torchs_in_the_precision_the_hardware_multiplies(monkeypatch, shape, dtype, tolerance):
    """torch rounds to bfloat16 on any hardware: there ours is the same to the bit, elsewhere it is more exact."""
    monkeypatch.setattr(train_states, "working_dtype", lambda precision, device: dtype)
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=rng)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optims = [
        train_states.Muon([ours], lr=0.1, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=rng)
        theirs.grad = ours.grad.clone()
        for optim in optims:
            optim.step()
    assert (theirs - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_a_decoder_trains_on_latents_that_stay_as_they_are(root, tiny_codec_path):
    optim = replace(OPTIM, only="^decoder", muon="")
    cfg = codec_stage(root, init=str(tiny_codec_path), optim=optim, steps=2)
    before = checkpoint.load(tiny_codec_path).net.state_dict()
    after = checkpoint.load(Trainer(cfg).run()).net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder") for name in changed)


def test_training_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves nothing"):
        TrainState(nn.Linear(2, 2), OptimConfig(only="^encoder"), 1)


def test_every_weight_of_the_student_gets_a_gradient_in_half_precision(root, monkeypatch):
    grads = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(dmd_stage(root, precision=precision, name=precision))
        trainer.step_count = 0
        monkeypatch.setattr(trainer.student_state, "step", lambda: None)
        assert trainer.step()["student/grad_norm"] > 0
        grads[precision] = [p.grad for p in trainer.student_state.params]
    for full, half in zip(grads["fp32"], grads["bf16"]):
        assert (full is None) == (half is None)
        if full is not None and full.norm() > 0:
            assert torch.cosine_similarity(full.flatten(), half.flatten().float(), dim=0) > 0.5


def test_replay_gives_the_gradient_of_the_whole_graph(root):
    schedule = dmd_stage(root).schedule
    pinned = {  # the picture lies in the first chunk that is trained, and motion reaches it
        "student": replace(STUDENT, first_chunk=0),
        "schedule": replace(schedule, given_chunks=0),
        "frames": 6,
        "loss": LossConfig(guidance=2.0, motion=1.0),
    }
    for settings in ({}, {"long_frames": 13}, {"schedule": replace(schedule, context="last_step")}, pinned):
        grads, values = [], []
        for replay in (False, True):
            trainer = Trainer(dmd_stage(root, replay=replay, **settings))
            for step in range(2 if settings.get("long_frames") else 1):  # the second step continues the stream
                trainer.step_count = step
                trainer.student_state.zero_grad()
                values.append(backward(trainer).value.detach())
            grads.append([p.grad for p in trainer.student_state.params])
        assert torch.equal(values[0], values[len(values) // 2])
        assert any(a is not None and a.norm() > 1e-6 for a in grads[0])
        for a, b in zip(*grads):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_replay_keeps_the_graph_of_one_chunk_only(root):
    peaks = {}
    for replay in (False, True):
        for frames in (4, 13):
            memory = MemoryConfig("window", frames=7, sinks=1)
            cfg = dmd_stage(root, replay=replay, frames=frames, student=replace(STUDENT, memory=memory))
            trainer = Trainer(cfg)
            with SavedBytes() as saved:
                backward(trainer)
            assert saved.now == 0
            peaks[replay, frames] = saved.peak
    assert peaks[False, 13] > 2.5 * peaks[False, 4]
    assert peaks[True, 13] < 1.7 * peaks[True, 4]


def test_a_long_stream_goes_on_from_step_to_step_and_starts_anew_where_it_should(root):
    trainer = Trainer(dmd_stage(root, long_frames=13, save_every=5, steps=20))
    lengths, firsts = [], []
    for step in range(7):
        trainer.step_count = step
        before = trainer.samplers[0].rollouts.tail
        sample = rolled(trainer, grad=True)
        lengths.append(trainer.samplers[0].rollouts.length)
        firsts.append(sample.batch.x[0, 0, 0, 0, 0].item())
        assert sample.x0.shape[1] == FRAMES and sample.batch.given == 1
        assert sample.batch.cond.per_frame["modulation"].shape[1] == FRAMES
        assert not sample.batch.cond.per_frame["modulation"][:, 0, :-1].any()
        if lengths[-1] > FRAMES:
            assert torch.equal(sample.x0[:, :4], before[:, 3:]), "the window overlaps what the stream showed before"
    assert lengths == [7, 10, 13, 7, 10, 7, 10]


def test_the_first_latent_of_a_continued_window_is_a_picture_of_the_codec(root, tiny_codec_path):
    trainer = Trainer(dmd_stage(root, long_frames=13, codec=str(tiny_codec_path)))
    codec = checkpoint.load(tiny_codec_path).net
    rolled(trainer, grad=False)
    tail = trainer.samplers[0].rollouts.tail
    trainer.step_count = 1
    sample = rolled(trainer, grad=False)
    want = codec.encode(codec.decode(tail[:, :4])[:, -1:])
    assert torch.equal(sample.x0[:, :1], want) and torch.equal(sample.x0[:, 1:4], tail[:, 4:])
    assert torch.equal(sample.batch.x, sample.x0)


def test_gradient_of_a_continued_stream_stays_in_its_new_frames(root):
    trainer = Trainer(dmd_stage(root, long_frames=13))
    rolled(trainer, grad=True)
    trainer.step_count = 1
    sample = rolled(trainer, grad=True)
    seen = torch.autograd.grad(sample.x0.sum(), sample.x0, retain_graph=True)[0]
    assert seen.abs().min() > 0 and sample.x0[:, 4:].requires_grad
    with pytest.raises(RuntimeError, match="require grad"):
        trainer.samplers[0].rollouts.tail.sum().backward()


def test_a_long_stream_equals_one_rollout_of_the_same_length(root):
    """With exit at the last step, continuing is what streaming does: the same memory, the same chunks."""
    cfg = dmd_stage(root, long_frames=10)
    cfg = replace(cfg, schedule=replace(cfg.schedule, exit="none", levels=(1.0,)))
    stream, whole = Trainer(cfg), Trainer(replace(cfg, frames=10, long_frames=0))
    batch = whole.batch(0)
    head = replace(batch, x=batch.x[:, :7], cond=batch.cond.frames(0, 7))
    tail = replace(batch, x=batch.x[:, 3:], cond=batch.cond.frames(6, 10))
    with torch.no_grad():
        first = rolled(stream, head)
        seed = stream.samplers[0].rollouts.seed
        stream.step_count = 1
        second = rolled(stream, replace(tail, x=batch.x[:, :7]))
        want = rolled(whole, batch)
    assert whole.samplers[0].rollouts.seed == seed
    assert torch.equal(first.x0, want.x0[:, :7])
    assert torch.equal(second.x0, want.x0[:, 3:])


def test_rollouts_of_rolling_windows_train(root):
    cfg = dmd_stage(root)
    row = Trainer(replace(cfg, schedule=replace(cfg.schedule, name="rolling"))).step()
    assert row["student/grad_norm"] > 0


def test_training_on_noised_real_latents_is_a_setting(root):
    trainer = Trainer(dmd_stage(root, on_policy=False))
    assert isinstance(trainer.samplers[0], DataSampler)
    assert trainer.step()["student/grad_norm"] > 0 and trainer.step()["critic/grad_norm"] > 0


def test_a_picture_that_fills_half_a_chunk_is_pinned(root):
    cfg = dmd_stage(root, frames=6)
    student = replace(STUDENT, first_chunk=0)
    trainer = Trainer(replace(cfg, student=student, schedule=replace(cfg.schedule, given_chunks=0)))
    batch = trainer.batch(0)
    sample = rolled(trainer, batch, grad=False)
    assert torch.equal(sample.x0[:, 0], batch.x[:, 0])
    assert not torch.equal(sample.x0[:, 1], batch.x[:, 1])


def test_a_schedule_that_does_not_start_from_the_given_picture_is_refused(root):
    cfg = dmd_stage(root)
    with pytest.raises(ValueError, match="given_chunks must be 1"):
        Trainer(replace(cfg, schedule=replace(cfg.schedule, given_chunks=0)))


def kept(policy, **memory):
    return StudentConfig(chunk=3, first_chunk=1, memory=MemoryConfig(policy, **memory))


TARGETS = LossConfig(regression=1.0)
COARSE = kept("compressed", frames=4, history=12, pattern=(2,), pool="reencode")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps.*1, got 0"),
        ({"batch": -1}, "batch.*1, got -1"),
        ({"frames": 0}, "frames.*least 1"),
        ({"episodes": -1}, "episodes.*0, got -1"),
        ({"seed": -1}, "seed.*0"),
        ({"ema": 1.0}, r"ema in \[0, 1\)"),
        ({"ema_warmup": 0.5}, "ema_warmup"),
        ({"export_dtype": "fp8"}, "export_dtype"),
        ({"name": ""}, "a name"),
        ({"objective": "gan"}, "'gan' is unknown"),
        ({"precision": "fp8"}, "'fp8' is unknown"),
        ({"objective": "dmd"}, "needs a `teacher`"),
        ({"replay": True}, "replay and long_frames need rollouts"),
        ({"objective": "dmd", "teacher": "t", "long_frames": 99}, "99 latents.*policy=window"),
        ({"objective": "dmd", "teacher": "t", "student": kept("full", frames=6)}, "7 latents"),
        ({"objective": "dmd", "teacher": "t", "student": kept("compressed", frames=3, history=3)}, "7 latents"),
        (
            {"objective": "dmd", "teacher": "t", "loss": TARGETS, "on_policy": False},
            "on_policy=true",
        ),
        ({"objective": "teacher_forcing", "student": COARSE}, "another pool"),
        ({"objective": "dmd", "teacher": "t", "student": COARSE, "loss": LossConfig(forcing=1.0)}, "another pool"),
        ({"objective": "dmd", "teacher": "t", "long_frames": 3}, "frames 7"),
        ({"objective": "dmd", "teacher": "t", "long_frames": 9, "frames": 3}, "longer.*3"),
    ],
)
def test_impossible_stages_are_refused(root, settings, message):
    with pytest.raises(ValueError, match=message):
        flow_stage(root, **settings)


def test_terms_of_another_objective_are_refused(root):
    with pytest.raises(ValueError, match="objective 'dmd'"):
        flow_stage(root, loss=replace(flow_stage(root).loss, motion=1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr > 0"),
        ({"clip": 0.0}, "clip > 0"),
        ({"betas": (0.9, 1.0)}, "betas in"),
        ({"muon": "("}, "regular expression"),
    ],
)
def test_impossible_optimisers_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_data_that_does_not_fit_the_network_is_refused(root):
    write_latents(root / "wide", channels=6)
    with pytest.raises(ValueError, match=r"dit.*4 channels .* holds 6 x 4 x 4"):
        Trainer(flow_stage(root, data=str(root / "wide")))
    with pytest.raises(ValueError, match="patches of"):
        Trainer(flow_stage(root, dit=replace(DIT, patch=(1, 3, 3))))
    site = replace(DIT.sites["modulation"], dim=5)
    with pytest.raises(ValueError, match="actions of 5 numbers"):
        Trainer(flow_stage(root, dit=replace(DIT, sites={"modulation": site})))
    with pytest.raises(ValueError, match="latents, frames"):
        Trainer(codec_stage(root, data=str(root / "latents"))).step()
    with pytest.raises(ValueError, match="episodes of 16"):
        Trainer(flow_stage(root, frames=17)).step()


def test_the_teachers_sample_starts_from_the_noise_of_the_new_frames(root):
    trainer = Trainer(dmd_stage(root, long_frames=13))
    for step in range(2):
        trainer.step_count = step
        sample = rolled(trainer, grad=False)
        noise = trainer.samplers[0].rollouts.noise_of(sample, trainer.cfg.turn(9, trainer.loss).rng())
        assert noise.shape == sample.x0.shape
    whole = chunk_noise(trainer.roles.student, 2, trainer.samplers[0].rollouts.seed)
    assert torch.equal(noise[:, -3:], whole(3)) and sample.first == 7 and sample.skipped == 3


def test_batches_are_read_ahead_until_a_run_goes_on_somewhere_else(root, monkeypatch):
    begun, read_ahead = [], trainer_module.read_ahead

    def counted(read, steps, workers):
        begun.append(True)
        return read_ahead(read, steps, workers)

    monkeypatch.setattr(trainer_module, "read_ahead", counted)
    trainer = Trainer(flow_stage(root))
    for trainer.step_count in (0, 1, 2):
        assert torch.equal(trainer.next_batch().x, trainer.batch(trainer.step_count).x)
    assert len(begun) == 1
    trainer.step_count = 7
    assert torch.equal(trainer.next_batch().x, trainer.batch(7).x) and len(begun) == 2


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_process_reads_all_rows_only_where_rollouts_are_judged_beside_them(root, weight, monkeypatch):
    monkeypatch.setattr(trainer_module.distributed, "parts", lambda *_: [Part(2, 4), Part(3, 4)])
    trainer = Trainer(dmd_stage(root, batch=4, accumulate=2, loss=LossConfig(guidance=2.0, invalid_weight=weight)))
    assert trainer.rows == (slice(2, 4) if weight == 1 else slice(None))


@pytest.mark.parametrize("loss", [{"forcing": 1.0}, {"invalid_weight": 0.5}])
def test_losses_that_read_recorded_clips_are_refused_where_there_are_only_prompts(root, loss, monkeypatch):
    monkeypatch.setattr(trainer_module, "open_data", lambda *_: object.__new__(Prompts))
    with pytest.raises(ValueError, match="prompts alone"):
        Trainer(dmd_stage(root, loss=LossConfig(guidance=2.0, **loss)))


def test_a_turn_draws_what_it_drew_in_every_version(root):
    """A run goes on with the clips and the noise that it would have had."""
    turn = flow_stage(root, seed=7).turn(3, LossConfig())
    drawn = torch.randint(10**6, (3,), generator=turn.rng()).tolist()
    assert drawn == torch.randint(10**6, (3,), generator=turn.rng(3)).tolist()
    assert drawn == [558_822, 514_836, 820_735]


def test_a_teacher_of_another_world_is_refused(root):
    write_latents(root / "wide", channels=6)
    write_teacher(root / "teacher")
    with pytest.raises(ValueError, match=r"teacher.*4 channels"):
        Trainer(dmd_stage(root, data=str(root / "wide")))


def test_an_exported_student_can_be_streamed_again(root):
    path = Trainer(dmd_stage(root, steps=1, codec="doom-codec")).run()
    bundle = checkpoint.load_student(path)
    assert bundle.shape == replace(SHAPE, frames=FRAMES) and bundle.schedule.given_chunks == 1
    assert bundle.record["world"]["fps"] == 17.5 and bundle.record["codec"] == "doom-codec"


def test_a_codec_that_goes_on_may_be_normalised_anew(root, tiny_codec_path):
    settings = {"init": str(tiny_codec_path), "steps": 2}
    old = checkpoint.load(tiny_codec_path, "codec").net
    kept = checkpoint.load(train(codec_stage(root, name="kept", **settings)), "codec").net
    anew = checkpoint.load(train(codec_stage(root, name="anew", renormalise=True, **settings)), "codec").net
    assert torch.equal(kept.latent_std, old.latent_std) and not torch.equal(anew.latent_std, old.latent_std)
    px = torch.cat(list(Trainer(codec_stage(root, name="anew", renormalise=True, **settings)).normalisation_clips()))
    assert anew.encode(px).std() == pytest.approx(1.0, abs=0.1)
