"""Prompt switches in the middle of a stream: what they do to memory, steps and pictures."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import CODEC, DIT, SHAPE, random_dit

from vidistill.checkpoint import Bundle
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.condition import Condition
from vidistill.conditioning.script import Cue, parse_cues
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.rollout import chunk_noise, reencode, rollout
from vidistill.schedules import ScheduleConfig, endless, finite
from vidistill.streaming.session import StreamConfig, StreamSession, refused_switches

A, B = "a red circle moves left", "a blue ring moves up"
DIAGONAL = ScheduleConfig(levels=(1.0, 0.8, 0.6, 0.4), pattern="432", context="last_step", rewarm=2)
CLEAN = ScheduleConfig(levels=(1.0, 0.5))


def bundle(schedule, given=0, chunk=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = random_dit(replace(DIT, sites={}, text_dim=24))
    memory = MemoryConfig("window", frames=6)
    student = CausalStudent(net, StudentConfig(chunk=chunk, memory=memory), SHAPE).eval().requires_grad_(False)
    world, text = {"fps": 12.0, "temporal": 4}, {"kind": "ngrams", "dim": 8, "length": 6}
    record = {"dit": asdict(net.cfg), "world": world, "text": text, "schedule": asdict(schedule), "given_frames": given}
    return Bundle("tiny", "student", student, record)


def codec():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyCodec(CODEC).eval().requires_grad_(False)


def session(schedule, **kw):
    return StreamSession(bundle(schedule), None, StreamConfig(pipelined=False, seed=3, **kw))


def streamed(schedule, policy, chunks=5, at=3):
    """Chunks of a stream that is told B from chunk `at` on."""
    with session(schedule) as stream:
        stream.set(prompt=A)
        source = stream.latents()
        first = list(itertools.islice(source, at))
        if policy:
            stream.set(prompt=B, switch=policy)
        return first + list(itertools.islice(source, chunks - at))


def by_hand(schedule, policy, chunks=5, at=3):
    """The same without a session."""
    own = bundle(schedule)
    student, memory = own.net, own.net.new_memory(1, cfg=own.net.cfg.memory)
    encode = session(schedule).inputs.net.encode
    old, new = (Condition(encode([text])) for text in (A, B))
    rng, noise = torch.Generator().manual_seed(3), chunk_noise(student, 1, 3)
    kw = {"noise": noise, "memory": memory, "rng": rng}
    with torch.no_grad():
        first = list(rollout(student, finite(endless(schedule), at), cond=lambda *_: old, **kw))
        if policy == "cut":
            memory.reset(3 * at)
        if policy == "recache":
            tail = torch.cat(first, dim=1)[:, -6:]
            level = 0.4 if schedule.context == "last_step" else 0.0
            again = torch.Generator().manual_seed(3 * 1_000_003 + at)
            reencode(student, tail, new, memory, start=3 * at - 6, sigma=level, timestep=level, rng=again)
        passes = (p for p in finite(endless(schedule, at, (at,)), chunks))
        return first + list(rollout(student, passes, cond=lambda *_: new, **kw))


@pytest.mark.parametrize("schedule", [DIAGONAL, CLEAN], ids=["diagonal", "clean"])
@pytest.mark.parametrize("policy", ["keep", "recache", "cut"])
def test_a_switched_stream_equals_the_policy_done_by_hand(schedule, policy):
    for got, wanted in zip(streamed(schedule, policy), by_hand(schedule, policy), strict=True):
        assert torch.equal(got, wanted)


def test_policies_differ_after_the_switch_and_nothing_changes_before_it():
    runs = {policy: streamed(CLEAN, policy) for policy in ("", "keep", "recache", "cut")}
    for a, b in itertools.combinations(runs.values(), 2):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
        assert not torch.allclose(a[3], b[3])


def test_steps_are_rewarmed_from_the_switch_on(monkeypatch):
    with session(DIAGONAL) as stream:
        stream.set(prompt=A)
        counts, velocity = [], CausalStudent.velocity
        monkeypatch.setattr(CausalStudent, "velocity", lambda *a, **k: counts.append(k["start"]) or velocity(*a, **k))
        source = stream.latents()
        list(itertools.islice(source, 4))
        stream.set(prompt=B)
        list(itertools.islice(source, 4))
    assert [counts.count(3 * chunk) for chunk in range(8)] == [4, 3, 2, 2, 4, 3, 2, 2]


def test_a_cut_is_decoded_like_the_start_of_a_clip():
    with StreamSession(bundle(CLEAN), codec(), StreamConfig(pipelined=False)) as stream:
        frames = stream.record(9 + 12 + 9 + 12, cues=parse_cues([A, f"1 cut: {B}"]))
        assert stream._engine._scenes == [0, 2]
        assert frames.shape == (42, 16, 16, 3)
    with StreamSession(bundle(CLEAN), codec(), StreamConfig(queue_frames=5)) as stream:
        assert np.array_equal(stream.record(42, cues=parse_cues([A, f"1 cut: {B}"])), frames)


def test_an_action_after_a_prompt_does_not_undo_its_switch_and_a_repeated_prompt_may_cut():
    with session(CLEAN) as stream:
        stream.set(prompt=A)
        source = stream.latents()
        next(source)
        stream.set(prompt=A, switch="cut")
        next(source)
        assert stream._engine._scenes == [0, 1]


def test_a_reference_picture_inside_the_first_chunk_stays_in_every_pass(tiny_image):
    own = codec()
    with StreamSession(bundle(CLEAN, given=1), own, StreamConfig(pipelined=False), image=tiny_image) as stream:
        px = torch.from_numpy(tiny_image).permute(2, 0, 1)[None, None].float() / 255
        first = next(stream.latents())
        assert first.shape[1] == 3 and torch.allclose(first[:, :1], own.encode(px))
        assert torch.equal(torch.cat((first, next(stream.latents())), 1)[:, :3], stream.reference(1))
        with pytest.raises(ValueError, match="cannot cut"):
            stream.set(prompt=B, switch="cut")


def test_what_a_student_cannot_switch_to_is_known_before_it_streams():
    from_noise = bundle(CLEAN)
    assert not refused_switches(from_noise)
    assert refused_switches(bundle(CLEAN, given=1)).keys() == {"cut"}
    hears = replace(from_noise, record={**from_noise.record, "audio": {"kind": "mel"}})
    assert refused_switches(hears).keys() == {"cut"}
    rolling = replace(from_noise, record={**from_noise.record, "schedule": {"name": "rolling"}})
    assert refused_switches(rolling).keys() == {"cut", "recache"}


def test_cues_are_read_in_order_of_time_and_nonsense_is_refused():
    assert parse_cues(["9.5 cut: b: c", "a", "5: d"]) == [Cue(0, "a"), Cue(5, "d"), Cue(9.5, "b: c", "cut")]
    with pytest.raises(ValueError, match="says nothing"):
        parse_cues(["  "])
    with pytest.raises(ValueError, match=r"'a' and 'b'.*both.*0 s"):
        parse_cues(["a", "5: c", "b"])
    with session(CLEAN) as stream, pytest.raises(ValueError, match="recache, cut"):
        stream.set(prompt=A, switch="forget")
    rolling = ScheduleConfig(name="rolling", levels=(1.0, 0.5))
    with session(rolling) as stream, pytest.raises(ValueError, match=r"rolling.*keep"):
        stream.set(prompt=A, switch="recache")
