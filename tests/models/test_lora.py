"""LoRA of students and critics: starts as nothing, trains alone, merges into plain weights that stream."""

from dataclasses import replace

import pytest
import torch
from conftest import DIT, SHAPE, STUDENT, random_dit
from tiny_ranks import assert_same, result, together
from tiny_training import OPTIM, dmd_stage, flow_stage

from vidistill import checkpoint
from vidistill.conditioning.condition import Condition
from vidistill.models.lora import LoraConfig, add_lora, merge_lora
from vidistill.models.student import CausalStudent
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import endless, finite
from vidistill.training.trainer import Trainer, train

pytest.importorskip("peft")

LORA = LoraConfig(rank=2, alpha=4.0)
FRAMES = 7


def shaken(net, cfg=LORA):
    """`net` with a LoRA whose both matrices are random."""
    add_lora(net, cfg)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=rng))
    return net


def clip(frames=FRAMES):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, frames, SHAPE.channels, SHAPE.height, SHAPE.width, generator=rng)
    actions = torch.rand(1, frames, DIT.sites["modulation"].dim, generator=rng)
    return x, torch.full((1, frames), 0.6), Condition(per_frame={"modulation": actions})


@torch.no_grad()
def streamed(student, schedule):
    """The latents of three chunks that a student makes from one picture, cached frames and all."""
    x, _, cond = clip()
    chunks = rollout(
        student,
        finite(endless(schedule), 3),
        noise=chunk_noise(student, 1, 7, x[:, :1]),
        cond=cond.frames,
        memory=student.new_memory(1),
        rng=torch.Generator().manual_seed(2),
    )
    return torch.cat(list(chunks), dim=1)


def test_a_fresh_lora_changes_nothing_and_no_rank_is_no_lora():
    net, x = random_dit(DIT), clip()
    before = net(*x)
    assert add_lora(net, LoraConfig()) is net and all(p.requires_grad for p in net.parameters())
    assert torch.equal(add_lora(net, LORA)(*x), before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in net.named_parameters())


def test_a_merged_network_equals_the_adapted_one_and_is_plain_again():
    plain, net, x = random_dit(DIT), shaken(random_dit(DIT)), clip()
    adapted = net(*x)
    assert (adapted - plain(*x)).abs().max() > 0.1
    merge_lora(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(net(*x), adapted, rtol=1e-4, atol=1e-5)


def test_impossible_loras_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lora.rank"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match="regular expression"):
        LoraConfig(targets="(")
    with pytest.raises(ValueError, match=r"lora.targets .*no linear"):
        add_lora(random_dit(DIT), LoraConfig(rank=2, targets="blocks.*attention"))
    with pytest.raises(ValueError, match="no blocks"):
        flow_stage(tmp_path, objective="codec", lora=LORA)


def test_training_moves_the_adapters_of_student_and_critic_alone(tmp_path):
    cfg = dmd_stage(tmp_path, lora=LORA, critic_lora=replace(LORA, rank=3), optim=replace(OPTIM, muon=""))
    trainer = Trainer(cfg)
    nets = trainer.roles.student, trainer.roles.critic
    before = [{n: p.clone() for n, p in net.named_parameters()} for net in nets]
    for _ in range(4):
        trainer.step()
    for net, old in zip(nets, before, strict=True):
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, old[n])}
        assert moved == {n for n in old if "lora_" in n}
    assert len(trainer.student_state.average) == len(trainer.student_state.params) == 2 * 2 * 6


def test_a_trained_lora_resumes_exactly(tmp_path):
    cfg = dmd_stage(tmp_path, lora=LORA, critic_lora=LORA)
    whole, first = Trainer(replace(cfg, name="whole")), Trainer(replace(cfg, name="halves"))
    rows = [whole.step() for _ in range(4)]
    for _ in range(2):
        first.step()
    first.save()
    second = Trainer(replace(cfg, name="halves"))
    second.resume()
    assert [second.step() for _ in range(2)] == rows[2:]
    a, b = whole.student_state.state("x"), second.student_state.state("x")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_trained_lora_is_exported_merged_and_streams_as_it_was_trained(tmp_path):
    cfg = dmd_stage(tmp_path, lora=LORA, steps=3, optim=replace(OPTIM, lr=0.03, muon=""))
    trainer = Trainer(cfg)
    path = trainer.run()
    bundle = checkpoint.load_student(path)
    trainer.student_state.swap_ema()  # what was exported is the average
    want = streamed(trainer.roles.student, cfg.schedule)
    got = streamed(bundle.net, bundle.schedule)
    untrained = streamed(CausalStudent(checkpoint.load(cfg.teacher).net, STUDENT, bundle.shape), cfg.schedule)
    moved = (want - untrained).abs().max()
    assert moved > 0.05 and (got - want).abs().max() < 0.1 * moved  # weights are stored in half precision
    merged = trainer.weights()
    torch.testing.assert_close(streamed(merged, cfg.schedule), want, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p.half().float(), q) for p, q in zip(merged.parameters(), bundle.net.parameters()))


@pytest.mark.timeout(600)
def test_two_processes_train_a_sharded_lora_as_one_does(tmp_path):
    adamw = replace(OPTIM, muon="")
    cfg = dmd_stage(tmp_path, batch=2, lora=LORA, critic_lora=LORA, optim=adamw, critic_optim=adamw, steps=3)
    one = result(replace(cfg, name="one"), 3, tmp_path / "one")
    two = replace(cfg, name="two", parallel="shard")
    assert_same(result(two, 3, tmp_path / "two", count=2), one)
    Trainer(replace(cfg, name="one")).run()
    together(2, train, two)
    a, b = (checkpoint.load(tmp_path / "runs" / name / name).net for name in ("one", "two"))
    assert all(torch.allclose(p, q, rtol=2e-3, atol=1e-4) for p, q in zip(a.parameters(), b.parameters(), strict=True))
