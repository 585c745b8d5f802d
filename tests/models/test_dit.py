from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_nets import DIT, SITES, VIEW, cached, chunk_levels, clip, condition, tiny_dit, tiny_student
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT, extend
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.rollout import chunk_noise, rollout
from vidistill.schedules import ScheduleConfig, endless, finite

MEMORIES = {
    "full": MemoryConfig("full", frames=9),
    "window": MemoryConfig("window", frames=6, phase="absolute"),
    "window with sinks": MemoryConfig("window", frames=6, sinks=1, phase="absolute"),
    "window with more sinks": MemoryConfig("window", frames=6, sinks=3, phase="absolute"),
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
@pytest.mark.parametrize("sites", [(), ("modulation", "hidden", "qk")], ids=["text", "all sites"])
def test_chunk_by_chunk_with_memory_equals_one_masked_forward(memory, sites):
    student = tiny_student(memory, sites={s: SITES[s] for s in sites})
    x, cond = clip(batch=2), condition(batch=2, sites=sites)
    sigma = chunk_levels(student, 9, batch=2)
    with torch.no_grad():
        full = student.net(x, sigma, cond, causal=student.causal_mask(9))
        assert (cached(student, x, sigma, cond) - full).abs().max() < 1e-5


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES.keys())
def test_chunk_by_chunk_equals_one_masked_forward_where_tokens_have_directions(memory):
    student = tiny_student(memory, **VIEW)
    x, cond = clip(batch=2), condition(batch=2, sites=tuple(VIEW["sites"]))
    sigma = chunk_levels(student, 9, batch=2)
    with torch.no_grad():
        full = student.net(x, sigma, cond, causal=student.causal_mask(9))
        assert (cached(student, x, sigma, cond) - full).abs().max() < 1e-5


def test_headings_count_only_against_each_other_and_come_back_after_a_full_turn():
    net, cond = tiny_dit(replace(DIT, **VIEW)), condition(sites=tuple(VIEW["sites"]))
    x, sigma, heading = clip(), torch.full((1, 9), 0.5), cond.per_frame["view"]

    def told(view):
        return net(x, sigma, replace(cond, per_frame={**cond.per_frame, "view": view}))

    around = heading.clone()
    around[:, 4:] += 2 * torch.pi
    with torch.no_grad():
        plain = told(heading)
        torch.testing.assert_close(told(heading + 1.3), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(told(around), plain, rtol=1e-4, atol=1e-5)
        assert (told(2 * heading) - plain).abs().max() > 1e-2


def test_a_direction_needs_a_grid_and_a_heading():
    for changes in ({"fov": 84.0}, {**VIEW, "grid": (0, 0)}, {**VIEW, "fov": 0.0}):
        with pytest.raises(ValueError, match=r"dit\.fov goes with"):
            replace(DIT, **changes)


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


@pytest.mark.parametrize("sites", [{}, VIEW], ids=["plain", "view"])  # with a view sinks are kept by another path
def test_checkpointing_changes_no_gradient_even_when_frames_are_evicted(sites):
    grads = []
    for checkpointing in (False, True):
        student = tiny_student(MemoryConfig("window", frames=5, sinks=2), checkpoint=checkpointing, **sites)
        cond = condition(sites=tuple(student.net.cfg.sites))
        x, sigma = clip(), chunk_levels(student, 9)
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


# --- cheap passes -----------------------------------------------------------------------------------------------------

STREAMED = {
    **MEMORIES,
    "relative sinks": MemoryConfig("window", frames=6, sinks=1),
    "dense history": MemoryConfig("endless", frames=6, history=4, pattern=(1, 2)),
    "8-bit history": MemoryConfig("endless", frames=6, history=4, pattern=(1, 2), entries="int8"),
}


@pytest.mark.parametrize("name", [name for name in STREAMED if name != "full"])
@torch.no_grad()
def test_a_pass_without_output_writes_the_same_memory_for_less(name):
    student, cond = tiny_student(STREAMED[name], sites=SITES), condition(3, sites=tuple(SITES))
    whole, quick = student.new_memory(1), student.new_memory(1)
    for start in range(0, 18, 3):
        x, sigma, flops = clip(3, seed=start), torch.zeros(1, 3), []
        for memory, output in ((whole, True), (quick, False)):
            with FlopCounterMode(display=False) as counter:
                v = student.velocity(x, sigma, cond, start=start, memory=memory, output=output)
            memory.commit()
            flops.append(counter.get_total_flops())
        assert not v.any() and flops[1] < flops[0]
    for layer in range(2):
        assert all(torch.equal(a, b) for a, b in zip(whole.past(layer), quick.past(layer), strict=True))


def streamed(student, chunks, cond, passes=None):
    """Latents of a stream told `cond`, and its memory."""
    memory = student.new_memory(1)
    made = rollout(
        student,
        passes or finite(endless(ScheduleConfig(levels=(1.0, 0.5))), chunks),
        noise=chunk_noise(student, 1, 0),
        cond=lambda start, stop: cond,
        memory=memory,
        rng=torch.Generator().manual_seed(0),
    )
    return torch.cat(list(made), 1)


@torch.no_grad()
def test_levels_prompt_and_conditions_are_embedded_once_and_change_nothing():
    cond = condition(3, sites=tuple(SITES))
    student = tiny_student(MEMORIES["window"], sites=SITES).eval()
    calls = {"time_embedding": 0, "text_embedding": 0, "sites": 0}

    def count(name, module):
        def hook(*_):
            calls[name] += 1

        module.register_forward_hook(hook)

    for name in ("time_embedding", "text_embedding"):
        count(name, getattr(student.net, name))
    count("sites", student.net.sites["qk"].project[0])
    got = streamed(student, 4, cond)
    assert calls == {"time_embedding": 3, "text_embedding": 1, "sites": 1}  # levels 1, 0.5 and 0
    wanted = streamed(student.train(), 4, cond)
    assert calls == {"time_embedding": 6, "text_embedding": 2, "sites": 2} and torch.equal(got, wanted)


class Record(TorchDispatchMode):
    """Names and shapes of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in STREAMED if name != "full"])
@torch.no_grad()
def test_passes_of_a_full_memory_run_the_same_operators_and_never_ask_the_host(name):
    student, cond = tiny_student(STREAMED[name]).eval(), condition(3)
    memory = student.new_memory(1)
    kept = memory._keys.data_ptr(), memory._values.data_ptr()
    level, x, seen = torch.zeros(1, 3, dtype=torch.float64), clip(3), []
    for start in range(0, 36, 3):
        student.velocity(x, level, cond, start=start, memory=memory)  # the first pass of a chunk makes room
        with Record() as record:
            student.velocity(x, level, cond, start=start, memory=memory)
        memory.commit()
        seen.append(record.seen)
    assert seen[-1] == seen[-3]  # slots come round every other chunk
    asks = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique")
    assert not [op for op, _ in seen[-1] if any(f"aten.{ask}" in op for ask in asks)]
    assert kept == (memory._keys.data_ptr(), memory._values.data_ptr())


@pytest.mark.parametrize("name", ["window with sinks", "dense history"])
@torch.no_grad()
def test_a_compiled_student_has_no_graph_breaks_and_makes_the_same_latents(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", lambda f, mode, c=torch.compile, **kw: c(f, **kw))  # eager knows no mode
    student, cond = tiny_student(STREAMED[name]).eval(), condition(3)
    wanted = streamed(student, 6, cond)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = student.for_inference("plain", True)
    torch.testing.assert_close(streamed(fast, 6, cond), wanted, rtol=1e-5, atol=1e-6)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 4


@torch.no_grad()
def test_a_whole_clip_is_one_graph():
    net, sigma = tiny_dit().eval(), torch.full((1, 9), 0.5)
    graph = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(clip(), sigma, condition()), net(clip(), sigma, condition()))


@pytest.mark.parametrize("text", [0, 10])
def test_a_network_grows_condition_channels_without_a_change(text):
    """A text-to-video network becomes one that is shown a picture, bit for bit the same until it is trained."""
    net, x, sigma = tiny_dit(replace(DIT, text_dim=text)), clip(batch=2), torch.full((2, 9), 0.6)
    grown = extend(net, replace(net.cfg, extra_channels=5))
    cond = replace(condition(batch=2), tokens=torch.randn(2, 7, text) if text else None)
    shown = replace(cond, channels=torch.randn(2, 9, 5, *x.shape[-2:]))
    with torch.no_grad():
        assert torch.equal(grown(x, sigma, shown), net(x, sigma, cond))
    grown(x, sigma, shown).square().sum().backward()
    new = grown.patch_embedding.weight.grad[:, net.patch_embedding.in_features :]
    assert new.abs().amax(0).min() > 0, "every new channel learns"
    assert extend(grown, replace(net.cfg, extra_channels=0)) is grown, "what a stage does not name stays"
