"""Streams of training that are told another prompt on the way."""

import itertools
from dataclasses import asdict, replace
from random import Random

import pytest
import torch
from conftest import DIT, SHAPE, random_dit
from tiny_ranks import assert_same, result
from tiny_training import OPTIM, dmd_stage, rolled

from vidistill import checkpoint
from vidistill.checkpoint import Bundle
from vidistill.conditioning.condition import VIEW_SITE, Condition
from vidistill.data.shards import write_shards
from vidistill.data.types import Batch
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.schedules import ScheduleConfig
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.training.on_policy import LongRollout
from vidistill.training.trainer import Trainer

A, B = "a red circle moves left", "a blue ring moves up"
TEXT = {"kind": "ngrams", "dim": 8, "length": 6}
LISTENER = replace(DIT, sites={}, text_dim=24)
FRAMES, LONG = 9, 21  # six new latents a call: a stream of 9, 15 and 21
STUDENT = StudentConfig(chunk=3, memory=MemoryConfig("window", frames=6))
ADAMW = replace(OPTIM, muon="")


def stage(root, **settings):
    """Long tuning of a tiny student that listens."""
    if not (root / "told").is_dir():
        rng = torch.Generator().manual_seed(3)
        told = {"latents": torch.randn(6, 16, 4, 4, 4, generator=rng), "tokens": torch.randn(6, 6, 24, generator=rng)}
        told["images"] = told["latents"].clone()
        write_shards(root / "told", [(told, [{}] * 6)], {"fps": 12.0, "given": 0})
        shape = {"frames": FRAMES, "channels": 4, "height": SHAPE.height, "width": SHAPE.width}
        record = {"noise": {"shift": 2.0}, "shape": shape, "codec": None, "card": {}}
        checkpoint.export(root / "listener", random_dit(LISTENER), record, torch.float32)
    base = dmd_stage(root, teacher=str(root / "listener"), data=str(root / "told"), dit=replace(DIT, sites={}))
    long = {"frames": FRAMES, "student": STUDENT, "schedule": ScheduleConfig(levels=(1.0, 0.5)), "save_every": 50}
    long |= {"optim": ADAMW, "critic_optim": ADAMW, "long_frames": LONG, "prompt_switch": 1.0}
    return replace(base, **{**long, **settings})


@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_a_switch_in_training_is_the_switch_of_a_stream(context):
    schedule = ScheduleConfig(levels=(1.0,), context=context, exit="none")
    student = CausalStudent(random_dit(LISTENER), STUDENT, SHAPE).eval().requires_grad_(False)
    rollouts = LongRollout(student, schedule, 15, switching=1.0)
    record = {"dit": asdict(student.net.cfg), "world": {"fps": 12.0, "temporal": 4}, "text": TEXT, "given_frames": 0}
    own = Bundle("tiny", "student", student, {**record, "schedule": asdict(schedule)})
    with StreamSession(own, None, StreamConfig(pipelined=False)) as stream:
        encode, rng = stream.inputs.net.encode, torch.Generator().manual_seed(5)
        made = []
        for prompt in (A, B):
            batch = Batch(torch.zeros(1, FRAMES, 4, 4, 4), Condition(encode([prompt])))
            made.append(rollouts(batch, rng, grad=False).x0)
        stream.reset(seed=rollouts.seed)
        stream.set(prompt=A)
        source = stream.latents()
        first = torch.cat(list(itertools.islice(source, 3)), dim=1)
        stream.set(prompt=B, switch="recache")
        then = torch.cat(list(itertools.islice(source, 2)), dim=1)
    assert torch.equal(made[0], first)
    assert torch.equal(made[1][:, 3:], then) and torch.equal(made[1][:, :3], first[:, 6:])


def run_stream(trainer, calls=3):
    samples = []
    for trainer.step_count in range(calls):
        samples.append(rolled(trainer, grad=True))
    return samples


def test_windows_after_the_switch_are_of_the_new_prompt(tmp_path):
    told, kept = (Trainer(stage(tmp_path, prompt_switch=share)) for share in (1.0, 0.0))
    told.samplers[0].rollouts.draw_switch = lambda frames, draw: 15  # else this one, or the one before
    with_switch, without = run_stream(told), run_stream(kept)
    first, second, third = (told.batch(step).cond.tokens for step in range(3))
    tokens = [sample.batch.cond.tokens for sample in with_switch]
    assert torch.equal(tokens[0], first) and torch.equal(tokens[1], first) and torch.equal(tokens[2], third)
    assert not torch.equal(first, third) and not torch.equal(second, third)
    assert all(torch.equal(sample.batch.cond.tokens, first) for sample in without)
    assert torch.equal(with_switch[1].x0, without[1].x0)
    assert torch.equal(with_switch[2].x0[:, :3], without[2].x0[:, :3]), "what was shown stays"
    assert not torch.allclose(with_switch[2].x0[:, 3:], without[2].x0[:, 3:])


def test_the_camera_of_a_stream_goes_on_from_the_heading_it_has():
    rollouts = LongRollout(CausalStudent(random_dit(LISTENER), STUDENT, SHAPE), ScheduleConfig(levels=(1.0,)), 15)
    before, told = (torch.tensor([[0.0, 0.5, 1.5, 2.0]])[..., None] * k for k in (1.0, 10.0))
    rollouts.cond = Condition(per_frame={VIEW_SITE: before + 3.0})
    following = rollouts.next_condition(Condition(per_frame={VIEW_SITE: told + 7.0}), 3).per_frame[VIEW_SITE]
    assert following[0, :, 0].tolist() == [5.0 + turned for turned in (5.0, 15.0, 20.0)]  # it has turned by 2 from 3


@torch.no_grad()
def test_a_stream_that_goes_on_reads_its_prompt_with_the_weights_it_has_now(tmp_path):
    made = []
    for fresh in (False, True):
        trainer = Trainer(stage(tmp_path, prompt_switch=0.0))
        rolled(trainer)
        for p in trainer.roles.student.parameters():
            p.mul_(1.2)
        if fresh:
            trainer.samplers[0].rollouts.memory.clear_cache()
        trainer.step_count = 1
        made.append(rolled(trainer).x0)
    assert torch.equal(*made)


@pytest.mark.parametrize("replay", [False, True])
def test_gradient_after_a_switch_is_of_the_new_frames_alone(tmp_path, replay):
    trainer = Trainer(stage(tmp_path, long_frames=18, replay=replay))  # a stream of two calls, that must switch between
    run_stream(trainer, 1)
    rollouts = trainer.samplers[0].rollouts
    assert rollouts.switch_at == FRAMES
    keys, _, _ = rollouts.memory.entries(0)
    (_, sample) = run_stream(trainer, 2)
    again, _, _ = rollouts.memory.entries(0)
    assert not keys.requires_grad and not again.requires_grad and not rollouts.tail.requires_grad
    params = [p for p in trainer.roles.student.parameters() if p.requires_grad]
    if replay:
        sample.x0[:, :3].sum().backward()
        trainer.samplers[0].backward(0 * sample.x0.sum(), sample)
        assert all(p.grad is None or not p.grad.any() for p in params)
        return
    old = torch.autograd.grad(sample.x0[:, :3].sum(), params, retain_graph=True, allow_unused=True)
    new = torch.autograd.grad(sample.x0[:, 3:].sum(), params, allow_unused=True)
    assert all(g is None or not g.any() for g in old) and sum(g is not None and bool(g.any()) for g in new) > 10


def test_replayed_gradients_after_a_switch_are_those_of_the_graph(tmp_path):
    grads = []
    for replay in (False, True):
        trainer = Trainer(stage(tmp_path, long_frames=18, replay=replay))
        run_stream(trainer, 1)
        (_, sample) = run_stream(trainer, 2)
        trainer.samplers[0].backward((sample.x0**2).sum(), sample)
        grads.append({n: p.grad for n, p in trainer.roles.student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5)


def test_a_switching_batch_trains_the_same_in_parts(tmp_path):
    cfg = stage(tmp_path, name="whole", batch=4, schedule=ScheduleConfig(levels=(1.0, 0.5), context="last_step"))
    split = result(replace(cfg, name="parts", accumulate=2), 4, tmp_path / "parts")
    assert_same(split, result(cfg, 4, tmp_path / "whole"))


def test_streams_switch_as_often_as_asked_and_at_any_length_that_goes_on():
    student = CausalStudent(random_dit(LISTENER), STUDENT, SHAPE)
    rollouts, draw = LongRollout(student, ScheduleConfig(levels=(1.0,)), 240, switching=0.5), Random(0)
    at = [rollouts.draw_switch(21, draw) for _ in range(800)]
    assert set(at) == {None, *range(21, 220, 18)} and 300 < at.count(None) < 500


def test_switches_that_cannot_be_are_refused(tmp_path):
    for wrong in ({"prompt_switch": 1.5}, {"prompt_switch": -0.1}, {"long_frames": 0}, {"long_frames": FRAMES}):
        with pytest.raises(ValueError, match="prompt_switch"):
            stage(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"prompt_switch 0.5.*listen"):
        Trainer(dmd_stage(tmp_path, long_frames=16, prompt_switch=0.5))
