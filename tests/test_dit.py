from dataclasses import replace

import pytest
import torch
from tiny_nets import DIT, SITES, chunk_levels, clip, condition, tiny_dit, tiny_student

from vidistill.dit import DiTConfig, SiteConfig, VideoDiT
from vidistill.memory import MemoryConfig

MEMORIES = {
    "full": MemoryConfig("full", frames=9),
    "window": MemoryConfig("window", frames=6, phase="absolute"),
    "window with sinks": MemoryConfig("window", frames=6, sinks=1, phase="absolute"),
    "window with more sinks": MemoryConfig("window", frames=6, sinks=3, phase="absolute"),
}


def cached(student, x, sigma, cond):
    """The clip chunk by chunk through the student's memory, every chunk's pass kept."""
    memory, out, start = student.new_memory(x.shape[0]), [], 0
    for chunk in range(student.num_chunks(x.shape[1])):
        stop = student.first_frame(chunk + 1)
        part = cond.frames(start, stop)
        out.append(student.velocity(x[:, start:stop], sigma[:, start:stop], part, start=start, memory=memory))
        memory.commit()
        start = stop
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
@pytest.mark.parametrize("sites", [(), ("modulation", "hidden", "qk")], ids=["text", "all sites"])
def test_chunk_by_chunk_with_memory_equals_one_masked_forward(memory, sites):
    student = tiny_student(memory, sites={s: SITES[s] for s in sites})
    x, cond = clip(batch=2), condition(batch=2, sites=sites)
    sigma = chunk_levels(student, 9, batch=2)
    with torch.no_grad():
        full = student.net(x, sigma, cond, causal=student.causal_mask(9))
        assert (cached(student, x, sigma, cond) - full).abs().max() < 1e-5


def test_a_shorter_first_chunk_changes_nothing_about_that():
    student = tiny_student(MemoryConfig("window", frames=5, phase="absolute"), chunk=2, first=1)
    x, cond, sigma = clip(), condition(), chunk_levels(student, 9)
    with torch.no_grad():
        full = student.net(x, sigma, cond, causal=student.causal_mask(9))
        assert (cached(student, x, sigma, cond) - full).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_on_the_last_chunk_leaves_earlier_chunks_without_gradient(checkpointing):
    student = tiny_student(MEMORIES["window with sinks"], checkpoint=checkpointing)
    x, cond, sigma = clip().requires_grad_(), condition(), chunk_levels(student, 9)
    cached(student, x, sigma, cond)[:, 6:].square().sum().backward()
    assert x.grad[:, :6].abs().max() == 0 and x.grad[:, 6:].abs().max() > 0


def test_checkpointing_changes_no_gradient_even_when_frames_are_evicted():
    grads = []
    for checkpointing in (False, True):
        student = tiny_student(MemoryConfig("window", frames=4, sinks=1), checkpoint=checkpointing)
        x, cond, sigma = clip(), condition(), chunk_levels(student, 9)
        cached(student, x, sigma, cond).square().sum().backward()
        grads.append([p.grad for p in student.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_differences_of_time_matter():
    net, x, cond = tiny_dit(), clip(), condition()
    sigma = torch.full((1, 9), 0.5)
    with torch.no_grad():
        assert (net(x, sigma, cond) - net(x, sigma, cond, start=700)).abs().max() < 1e-4


def test_a_level_is_told_to_its_own_frame_only():
    net, x, cond = tiny_dit(replace(DIT, layers=1)), clip(2), condition(2)
    own = torch.eye(2, dtype=torch.bool)
    with torch.no_grad():
        a = net(x, torch.tensor([[0.2, 0.9]]), cond, causal=own)
        b = net(x, torch.tensor([[0.2, 0.1]]), cond, causal=own)
    assert torch.equal(a[:, 0], b[:, 0]) and not torch.allclose(a[:, 1], b[:, 1])


def test_a_fresh_network_predicts_zero_velocity():
    net = VideoDiT(DIT)
    assert net(clip(), torch.full((1, 9), 0.5), condition()).abs().max() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_other_precisions_run_and_agree(dtype, tolerance):
    net, x, cond = tiny_dit(), clip(), condition()
    sigma = torch.full((1, 9), 0.5)
    with torch.no_grad():
        want = net(x, sigma, cond)
        got = net.to(dtype)(x.to(dtype), sigma, cond.map(lambda t: t.to(dtype)))
    assert got.dtype == dtype and (got.double() - want.double()).abs().max() < tolerance * want.abs().max()


def test_the_audio_site_of_omniavatar_normalises_its_hidden_units():
    site = SiteConfig(6, hidden=4, layers=(1,), activation="norm")
    net = tiny_dit(replace(DIT, sites={"hidden": site}))
    assert {k for k in net.state_dict() if k.startswith("sites")} == {
        f"sites.hidden.{part}.{kind}" for part in ("embed.0", "embed.1", "project.0") for kind in ("weight", "bias")
    }


def test_image_tokens_come_first_and_text_tokens_after():
    cfg = replace(DIT, image_dim=5, image_tokens=3)
    net, x = tiny_dit(cfg), clip(2)
    tokens = torch.randn(1, 3 + 4, DIT.text_dim)
    sigma = torch.full((1, 2), 0.5)
    with torch.no_grad():
        a = net(x, sigma, condition(2).map(lambda t: tokens))
        padding = tokens.clone()
        padding[:, :3, 5:] = 9.0  # beyond the image features' width: not read
        assert torch.equal(a, net(x, sigma, condition(2).map(lambda t: padding)))
        padding[:, 0, 0] += 1.0
        assert not torch.equal(a, net(x, sigma, condition(2).map(lambda t: padding)))


def test_missing_conditions_are_named():
    sigma = torch.full((1, 9), 0.5)
    with pytest.raises(ValueError, match=r"Condition.tokens is missing"):
        tiny_dit()(clip(), sigma, replace(condition(), tokens=None))
    with pytest.raises(ValueError, match=r"Condition.channels with 2 channels"):
        tiny_dit(replace(DIT, extra_channels=2))(clip(), sigma, condition())


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"width": 25}, "dit.width 25"),
        ({"patch": (2, 2, 2)}, r"dit.patch\[0\]"),
        ({"sites": {"smell": SiteConfig(1)}}, "no site"),
    ],
)
def test_impossible_networks_say_what_is_wrong(kw, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{"width": 24, "heads": 2, **kw})


def test_impossible_sites_say_what_is_wrong():
    with pytest.raises(ValueError, match="place"):
        SiteConfig(1, place="behind")
    with pytest.raises(ValueError, match="activation"):
        SiteConfig(1, activation="relu6")
