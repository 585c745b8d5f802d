"""Where each condition enters a network: what it changes in a block, and what it must leave alone."""

from dataclasses import replace

import pytest
import torch
from tiny_nets import DIT, clip, condition, tiny_dit, tiny_student

from vidistill.memory.history import EntryRecorder
from vidistill.memory.policies import MemoryConfig
from vidistill.models.layers import SelfAttention, SiteConfig

QUERIES_KEYS = {"queries", "raw keys", "keys"}
AFTER = {"after self-attention", "to cross-attention", "out"}
ALL = {"in", *QUERIES_KEYS, "values", *AFTER}
POSED = {"grid": (2, 2), "fov": 84.0}
CASES = {  # site, what the network has -> what changes in block 0, in block 1, and whether the head is told
    "moves after attention, in block 1": (
        "hidden",
        {"sites": {"hidden": SiteConfig(5, layers=(1,), place="after_attention")}},
        (set(), {"to cross-attention", "out"}),
        False,
    ),
    "audio before block 1": ("hidden", {"sites": {"hidden": SiteConfig(5, layers=(1,))}}, (set(), ALL), False),
    "poses on queries and keys": (
        "qk",
        {"sites": {"qk": SiteConfig(5, layers=(0,))}},
        (QUERIES_KEYS | AFTER, ALL),
        False,
    ),
    "actions in the modulation": (
        "modulation",
        {"sites": {"modulation": SiteConfig(5)}},
        (ALL - {"in"}, ALL),
        True,
    ),
    "headings": ("view", {"sites": {"view": SiteConfig(1)}, **POSED}, (QUERIES_KEYS | AFTER, ALL), False),
}


def flow(net, cond, monkeypatch):
    """What goes through every block of a pass [{name: tensor}], and the time embedding that the head gets."""
    blocks, heads, project = [], [], SelfAttention.project

    def recorded(self, *args):
        made = project(self, *args)
        blocks[-1].update(zip(("queries", "raw keys", "keys", "values"), made, strict=True))
        return made

    for block in net.blocks:
        block.register_forward_pre_hook(lambda _m, args: blocks.append({"in": args[0]}))
        block.register_forward_hook(lambda _m, _a, out: blocks[-1].update(out=out))
        block.self_attn.o.register_forward_hook(lambda _m, _a, out: blocks[-1].update({"after self-attention": out}))
        block.norm3.register_forward_pre_hook(lambda _m, args: blocks[-1].update({"to cross-attention": args[0]}))
    net.head.register_forward_pre_hook(lambda _m, args: heads.append(args[1]))
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(SelfAttention, "project", recorded)
        net(clip(3), torch.full((1, 3), 0.5), cond, memory=EntryRecorder())
    return blocks, heads[0]


@pytest.mark.parametrize("case", CASES)
def test_a_condition_enters_where_its_site_says_and_nowhere_else(case, monkeypatch):
    site, more, changed, told = CASES[case]
    found = []
    for seed in (2, 3):
        cond = condition(3, sites=(site,))
        other = condition(3, seed=seed, sites=(site,)).per_frame
        found.append(flow(tiny_dit(replace(DIT, **more)), replace(cond, per_frame=other), monkeypatch))
    (one, first_head), (two, second_head) = found
    for layer, (a, b) in enumerate(zip(one, two, strict=True)):
        assert a.keys() == b.keys() == ALL
        assert {name for name in a if not torch.equal(a[name], b[name])} == changed[layer], f"block {layer}"
    assert torch.equal(first_head, second_head) != told


def test_a_prompt_enters_after_self_attention(monkeypatch):
    found = [flow(tiny_dit(), condition(3, seed=seed), monkeypatch)[0][0] for seed in (2, 3)]
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == {"out"}


def test_memory_gets_the_pose_of_every_frame_with_its_entries():
    student = tiny_student(MemoryConfig("endless", frames=3, history=3, pattern=(1, 2)), sites={"qk": SiteConfig(5)})
    memory, cond = student.new_memory(1), condition(6, sites=("qk",))
    with torch.no_grad():
        for start in (0, 3):
            part = cond.frames(start, start + 3)
            student.velocity(clip(3), torch.zeros(1, 3), part, start=start, memory=memory)
            memory.commit()
    assert list(memory.poses) == list(range(6))
    assert all(torch.equal(pose, cond.per_frame["qk"][:, frame]) for frame, pose in memory.poses.items())


def test_taking_down_what_a_network_makes_of_frames_changes_nothing():
    net, cond, recorder = tiny_dit(), condition(3), EntryRecorder()
    with torch.no_grad():
        plain, recorded = (net(clip(3), torch.full((1, 3), 0.5), cond, memory=m) for m in (None, recorder))
    torch.testing.assert_close(recorded, plain)
    assert list(recorder.entries) == list(range(len(net.blocks)))
