"""Streams: they equal the rollout, listen at chunk boundaries, start again, cost the same for ever, and end cleanly."""

import gc
import itertools
import logging
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ACTIONS, DIT, SHAPE, STUDENT, random_dit
from tiny_talker import write_talker

from vidistill.checkpoint import Bundle, load, load_codec, load_student
from vidistill.conditioning.controls import LiveConditions, WorldConfig
from vidistill.conditioning.script import parse_script, scripted
from vidistill.io import to_uint8
from vidistill.memory.policies import MemoryConfig, say_that_full_ends
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.models.student import CausalStudent
from vidistill.record import Record
from vidistill.schedules import endless
from vidistill.streaming.engine import Frame
from vidistill.streaming.runtime import SpeedConfig, for_inference
from vidistill.streaming.session import StreamConfig, StreamSession

INLINE = StreamConfig(pipelined=False)


@pytest.fixture(scope="module")
def bundle(tiny_student_path):
    return load_student(tiny_student_path)


@pytest.fixture(scope="module")
def codec(bundle):
    return load_codec(bundle)


@pytest.fixture
def session(bundle, codec, tiny_image):
    """Opens sessions of the tiny student and closes them."""
    opened = []

    def open_session(cfg: StreamConfig = INLINE, **changed) -> StreamSession:
        opened.append(StreamSession(with_record(bundle, **changed), codec, cfg, image=tiny_image))
        return opened[-1]

    yield open_session
    for one in opened:
        one.close()


def with_record(bundle: Bundle, **changed) -> Bundle:
    return replace(bundle, record={**bundle.record, **changed})


def noise_bundle(dit: DiTConfig, **record) -> Bundle:
    """A student that starts from noise."""
    student = CausalStudent(random_dit(dit), replace(STUDENT, first_chunk=0), SHAPE).eval().requires_grad_(False)
    sites = {name: {"dim": site.dim} for name, site in dit.sites.items()}
    described = {
        "sites": sites,
        "text_dim": dit.text_dim,
        "channels": dit.channels,
        "extra_channels": dit.extra_channels,
    }
    base = {"dit": described, "schedule": {"levels": [1.0, 0.5]}, "world": {"fps": 8}}
    return Bundle("noise", "student", student, {**base, **record})


def take(source, count: int) -> list:
    return list(itertools.islice(source, count))


def take_chunks(session: StreamSession, count: int) -> list[Frame]:
    """The frames of the first `count` chunks: one of the start picture, then as many for each."""
    return take(session.frames(), 1 + (count - 1) * session.frames_per_chunk)


def pictures(frames: list[Frame]) -> np.ndarray:
    return np.stack([f.px for f in frames])


# --- one rollout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "32", "21"])
@pytest.mark.parametrize("context", ["clean", "noised", "last_step"])
def test_stream_latents_equal_the_rollout_bit_for_bit(session, pattern, context):
    schedule = {"levels": [1.0, 0.8, 0.5], "given_chunks": 1, "pattern": pattern, "context": context}
    stream = session(schedule={**schedule, "context_sigma": 0.1 if context != "last_step" else 0.0})
    stream.set(action={"forward": 1.0, "turn_left": 0.5})
    streamed = torch.cat(take(stream.latents(), 6), dim=1)
    assert streamed.shape == (1, 16, 4, 4, 4)
    assert torch.equal(streamed, stream.reference(6))


def test_a_rolling_schedule_streams_what_it_rolls_out(session):
    rolling = {"name": "rolling", "levels": [1.0, 0.5], "given_chunks": 1}
    stream = session(schedule=rolling)
    assert torch.equal(torch.cat(take(stream.latents(), 5), dim=1), stream.reference(5))
    assert stream.nfe_per_chunk == 3


def test_a_finite_rollout_is_the_prefix_of_the_stream(session):
    stream = session()
    streamed = torch.cat(take(stream.latents(), 6), dim=1)
    for chunks in (1, 2, 5):
        expected = stream.reference(chunks)
        assert torch.equal(streamed[:, : expected.shape[1]], expected)


def test_frames_are_the_decoded_latents(session, codec):
    stream = session()
    state, expected = None, []
    for latents in stream.reference(4).split([1, 3, 3, 3], dim=1):
        px, state = codec.decode_stream(latents, state)
        expected.append(to_uint8(px[0]))
    frames = take_chunks(stream, 4)
    assert np.array_equal(pictures(frames), np.concatenate(expected))
    assert [f.index for f in frames] == list(range(37))
    assert [f.chunk for f in frames] == [0] + [c for c in (1, 2, 3) for _ in range(12)]


@pytest.mark.parametrize("queue", [None, 0, 1, 5, 100])
def test_a_pipelined_stream_shows_the_same_pictures(session, queue):
    plain = take_chunks(session(), 8)
    ahead = take_chunks(session(StreamConfig(queue_frames=queue)), 8)
    assert np.array_equal(pictures(plain), pictures(ahead))
    assert [(f.index, f.chunk, f.run) for f in plain] == [(f.index, f.chunk, f.run) for f in ahead]


def test_without_a_queue_a_chunk_takes_what_is_set_until_it_is_asked_for(session):
    stream = session(StreamConfig(queue_frames=0))
    take_chunks(stream, 2)
    threading.Event().wait(0.2)  # a worker that did not wait would begin
    wanted = stream.set(action={stream.actions[0]: 1.0})
    assert next(stream.frames()).input_id == wanted


def test_the_first_picture_is_the_decoded_start_picture(session, codec, tiny_image):
    frame = next(session().frames())
    px = torch.from_numpy(tiny_image).permute(2, 0, 1)[None, None].float() / 255
    assert np.array_equal(frame.px, to_uint8(codec.decode(codec.encode(px)))[0, 0])
    assert frame.px.shape == (16, 16, 3) and frame.px.dtype == np.uint8


def test_the_pictures_of_a_chunks_first_latent_do_not_wait_for_the_others(session):
    frames = [f for f in take_chunks(session(), 3) if f.chunk == 2]
    assert [f.made_at for f in frames] == [frames[0].made_at] * 4 + [frames[4].made_at] * 8
    assert frames[0].made_at < frames[4].made_at
    assert frames[0].stats["decode_ms"] < frames[4].stats["decode_ms"]  # what was spent so far


def test_stats_count_what_a_chunk_cost(session):
    frame = take_chunks(session(StreamConfig()), 3)[-1]
    assert set(frame.stats) == {"denoise_ms", "context_ms", "chunk_ms", "decode_ms", "host_ms"}
    assert all(value > 0 for value in frame.stats.values())
    assert frame.stats["chunk_ms"] == frame.stats["denoise_ms"] + frame.stats["context_ms"]


# --- inputs ----------------------------------------------------------------------------------------------------


def test_an_input_changes_the_next_chunk_and_none_before(session):
    still, moved = session(), session()
    expected = take_chunks(still, 4)
    source = moved.frames()
    before = take(source, 1 + 12)
    assert moved.set(action={"turn_left": 1.0}) == 1
    after = take(source, 24)
    assert np.array_equal(pictures(before), pictures(expected[:13]))
    assert [f.input_id for f in before + after] == [0] * 13 + [1] * 24
    assert not np.array_equal(pictures(after[:12]), pictures(expected[13:25]))


def test_an_input_in_the_middle_of_a_chunk_waits_for_its_end(session):
    plain, moved = session(), session()
    expected = take_chunks(plain, 4)
    source = moved.frames()
    early = take(source, 1 + 5)
    moved.set(action=[0, 0, 1, 0])
    rest = take(source, 31)
    assert np.array_equal(pictures(early + rest[:7]), pictures(expected[:13]))
    assert [f.input_id for f in rest] == [0] * 7 + [1] * 24


def test_every_input_of_a_pipelined_stream_can_be_replayed(session):
    ahead = session(StreamConfig())
    frames, values = [], {0: [0.0] * 4}
    for i, frame in enumerate(ahead.frames()):
        frames.append(frame)
        if i % 9 == 4:
            action = [float(i % 2), 0.0, 0.5, (i % 5) / 5]
            values[ahead.set(action=action)] = action
        if i == 96:
            break
    replayed, taken = session(), []
    source = replayed.frames()
    for chunk, group in itertools.groupby(frames, lambda f: f.chunk):
        group = list(group)
        assert len({f.input_id for f in group}) == 1
        if chunk:
            replayed.set(action=values[group[0].input_id])
        taken += take(source, len(group))
    assert np.array_equal(pictures(frames), pictures(taken))
    assert max(f.input_id for f in frames) > 2


def test_actions_by_name_and_by_order_are_the_same(session):
    named, listed = session(), session()
    named.set(action={"backward": 0.25, "turn_right": True})
    listed.set(action=np.array([0, 1, 0, 0.25]))
    assert np.array_equal(pictures(take_chunks(named, 2)), pictures(take_chunks(listed, 2)))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"jump": 1.0}, "'jump' is unknown; actions are turn_left"),
        ({"forward": 1.5}, "'forward'.*number.*0 to 1, got 1.5"),
        ({"forward": float("nan")}, "from 0 to 1, got nan"),
        ({"forward": "1"}, "from 0 to 1, got '1'"),
        ({"forward": None}, "from 0 to 1, got None"),
        ([1.0, 0.0], "has 2 values"),
    ],
)
def test_a_wrong_action_is_refused_and_changes_nothing(session, action, message):
    stream = session()
    with pytest.raises(ValueError, match=message):
        stream.set(action=action)
    assert stream.set(action={"forward": 1.0}) == 1


def test_inputs_a_student_does_not_know_are_refused(session):
    stream = session()
    with pytest.raises(ValueError, match=r"nothing.*action"):
        stream.set()
    with pytest.raises(ValueError, match="no prompt"):
        stream.set(prompt="a red ball")
    with pytest.raises(ValueError, match="no tokens"):
        stream.set(tokens=torch.zeros(2, 8))


@pytest.mark.parametrize("cfg", [INLINE, StreamConfig()])
def test_a_script_is_followed_chunk_by_chunk(session, cfg):
    recorded = session(cfg).record(37, parse_script("turn_left:13, forward+turn_right:12, still:12"))
    by_hand, expected = session(), []
    source = by_hand.frames()
    expected += take(source, 1)
    for action in ({"turn_left": 1.0}, {"forward": 1.0, "turn_right": 1.0}, {"forward": 0.0}):
        by_hand.set(action=action)
        expected += take(source, 12)
    assert np.array_equal(recorded, pictures(expected))


def test_a_script_begins_again_at_its_end():
    script = parse_script("forward:2,still:1")
    assert [dict(scripted(script, frame)) for frame in range(5)] == [
        {"forward": 1.0}, {"forward": 1.0}, {}, {"forward": 1.0}, {"forward": 1.0},
    ]  # fmt: skip
    assert not parse_script("")


@pytest.mark.parametrize("text", ["forward", "forward:0", ":3", "forward:x"])
def test_a_script_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="is not ACTION:FRAMES"):
        parse_script(text)


def test_a_script_of_unknown_actions_is_refused(session):
    with pytest.raises(ValueError, match="'jump' is unknown"):
        session().record(3, parse_script("jump:3"))


def test_tokens_switch_at_a_chunk_boundary():
    bundle = noise_bundle(replace(DIT, text_dim=8, sites={}))
    plain, told = (StreamSession(bundle, None, INLINE) for _ in range(2))
    expected = take(plain.chunks(), 3)
    source = told.chunks()
    first = next(source)
    told.set(tokens=torch.ones(5, 8))
    second = next(source)
    assert torch.equal(first.latents, expected[0].latents)
    assert not torch.equal(second.latents, expected[1].latents)
    assert (first.input_id, second.input_id) == (0, 1)
    with pytest.raises(ValueError, match=r"tokens.*\[L >= 1, 8\], got \(5, 7\)"):
        told.set(tokens=torch.ones(5, 7))
    with pytest.raises(ValueError, match="no action"):
        told.set(action={"forward": 1.0})


def conditions(sites: dict[str, int]) -> LiveConditions:
    """What a network of these sites, without text, takes in a world of two actions."""
    dit = DiTConfig(sites={name: SiteConfig(dim) for name, dim in sites.items()})
    return LiveConditions.of(Record("student", dit=dit, world=WorldConfig(actions=("left", "right"))), 4, "cpu")


def test_a_site_without_an_input_is_null():
    inputs = conditions({"hidden": 6, "modulation": 9})
    cond = inputs.condition(inputs.control, 0, 3)
    assert not cond.per_frame["hidden"].any() and cond.per_frame["hidden"].shape == (1, 3, 6)
    assert torch.equal(cond.per_frame["modulation"][0, :, -1], torch.ones(3))


def test_a_held_action_is_packed_as_recorded_actions_are():
    inputs = conditions({"modulation": 9})
    inputs.set({"action": {"left": 1.0, "right": 0.5}})
    packed = inputs.condition(inputs.control, 0, 2).per_frame["modulation"][0]
    assert packed[0].tolist() == [0.0] * 8 + [1.0]
    assert packed[1].tolist() == [1.0, 0.5] * 4 + [1.0]
    assert torch.equal(inputs.condition(inputs.control, 7, 8).per_frame["modulation"][0, 0], packed[1])


# --- starting again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [INLINE, StreamConfig(), StreamConfig(queue_frames=1), StreamConfig(queue_frames=0)])
def test_a_reset_dreams_the_same_dream_again(session, cfg):
    stream = session(cfg)
    first = take_chunks(stream, 5)
    stream.reset()
    again = take_chunks(stream, 5)
    assert np.array_equal(pictures(first), pictures(again))
    assert [f.index for f in again] == list(range(49))
    assert {f.run for f in first} == {0} and {f.run for f in again} == {1}


@pytest.mark.parametrize("cfg", [INLINE, StreamConfig()])
def test_a_reset_in_the_middle_of_a_chunk_drops_what_was_not_taken(session, cfg):
    stream = session(cfg)
    source = stream.frames()
    first = take(source, 30)
    for number in (1, 2, 3):
        stream.reset()
        again = take(source, 7)
        assert [(f.index, f.run) for f in again] == [(i, number) for i in range(7)]
        assert np.array_equal(pictures(first[:7]), pictures(again))


def test_resets_from_many_threads_are_dreams_of_their_own(session):
    stream = session()
    begun, begin = [], stream._engine.begin
    stream._engine.begin = lambda dream: begun.append(dream.number) or begin(dream)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: stream.reset(), range(64)))
    assert sorted(begun) == list(range(1, 65))


def test_a_student_of_half_the_bytes_streams_nearly_the_same(bundle, codec, tiny_image):
    half = for_inference(bundle, SpeedConfig(device="cpu", precision="bf16"))
    assert half.name == "student (bf16 weights)" and bundle.net.net.dtype == torch.float32
    with (
        StreamSession(half, codec, INLINE, image=tiny_image) as session,
        StreamSession(bundle, codec, INLINE, image=tiny_image) as plain,
    ):
        assert 2 * session.memory_bytes == plain.memory_bytes
        made, wanted = session.reference(5), plain.reference(5)
        assert torch.equal(torch.cat(list(itertools.islice(session.latents(), 5)), dim=1), made)
    assert made.dtype == torch.float32 and 0 < (made - wanted).norm() < 0.1 * wanted.norm()


def test_an_avatar_of_half_the_bytes_reads_hears_and_is_told_its_picture(tmp_path, tiny_image):
    write_talker(tmp_path)
    avatar = load_student(tmp_path / "student")
    half = for_inference(avatar, SpeedConfig(device="cpu", precision="bf16"))
    films = []
    for made_with in (avatar, half, half):
        with StreamSession(made_with, load_codec(avatar), INLINE, image=tiny_image) as session:
            session.set(audio=np.full(16_000, 0.1 * len(films), np.float32), prompt="a smile")
            films.append(session.record(20))
    assert not np.array_equal(films[1], films[2])


def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="auto, cpu"):
        SpeedConfig(device="cuda:99")
    with pytest.raises(ValueError, match="precision 'fp4' is unknown"):
        SpeedConfig(precision="fp4")


def test_another_seed_or_picture_dreams_another_dream(session, tiny_image):
    stream = session()
    first = pictures(take_chunks(stream, 3))
    stream.reset(seed=1)
    other_seed = pictures(take_chunks(stream, 3))
    stream.reset(image=255 - tiny_image)
    other_image = pictures(take_chunks(stream, 3))
    assert np.array_equal(first[0], other_seed[0]) and not np.array_equal(first, other_seed)
    assert not np.array_equal(other_seed[0], other_image[0])
    stream.reset(seed=0, image=tiny_image)
    assert np.array_equal(first, pictures(take_chunks(stream, 3)))


def test_inputs_outlive_a_reset(session):
    stream = session()
    stream.set(action={"turn_left": 1.0})
    first = take_chunks(stream, 3)
    stream.reset()
    assert np.array_equal(pictures(first), pictures(take_chunks(stream, 3)))


# --- for ever ----------------------------------------------------------------------------------------------------


def test_a_stream_of_200_chunks_costs_what_a_short_one_costs(session):
    quick = {"levels": [1.0], "context": "last_step", "given_chunks": 1}
    stream = session(StreamConfig(seed=3), schedule=quick)
    source = stream.frames()
    take(source, 20 * 12)
    started, frames_known = stream.memory_bytes, len(stream._engine._taken)
    tracemalloc.start()
    try:
        take(source, 20 * 12)
        gc.collect()
        early = tracemalloc.get_traced_memory()[0]
        last = take(source, 160 * 12)[-1]
        gc.collect()
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert last.chunk >= 199 and last.index == 200 * 12 - 1
    assert stream.memory_bytes == started and len(stream._engine._taken) == frames_known
    assert late - early < 200_000, f"{late - early} bytes more after 160 chunks"


def test_a_full_memory_becomes_a_window_and_the_stream_goes_on(session, caplog):
    say_that_full_ends.cache_clear()  # it is said once a process, and another test may have heard it
    with caplog.at_level(logging.DEBUG, "vidistill"):
        stream = session(replace(INLINE, memory=MemoryConfig("full", frames=7)))
    assert "keeps a window of 7 frames" in caplog.text
    assert stream.memory_config == MemoryConfig("window", frames=7)
    assert torch.equal(torch.cat(take(stream.latents(), 9), dim=1), stream.reference(9))


def test_until_it_is_full_a_window_remembers_as_a_full_memory_does(session):
    window = session(replace(INLINE, memory=MemoryConfig("full", frames=16)))
    memory = window._engine.student.new_memory(1, cfg=MemoryConfig("full", frames=16))
    assert memory.memory_bytes == window.memory_bytes
    wide = session(replace(INLINE, memory=MemoryConfig("window", frames=40)))
    assert torch.equal(torch.cat(take(window.latents(), 5), dim=1), torch.cat(take(wide.latents(), 5), dim=1))


# --- ends ----------------------------------------------------------------------------------------------------


def threads_of_streams() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in ("vidistill-denoise", "vidistill-decode")]


def test_a_consumer_that_stops_in_the_middle_leaves_no_thread(session, monkeypatch):
    monkeypatch.setattr("vidistill.streaming.session.cores", lambda: 1024)  # room for both workers
    with session(StreamConfig()) as stream:
        for frame in stream.frames():
            if frame.index == 20:
                break
        assert len(threads_of_streams()) == 2
        assert next(stream.frames()).index == 21
    assert not threads_of_streams()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream.frames())


def test_a_forgotten_session_stops_its_threads(bundle, codec, tiny_image):
    stream = StreamSession(bundle, codec, image=tiny_image)
    gone = weakref.ref(stream)
    assert next(stream.frames()).index == 0
    del stream
    gc.collect()
    assert gone() is None and not threads_of_streams()


def test_closing_ends_a_consumer_that_waits(session):
    stream = session(StreamConfig())
    taken = []
    some = threading.Event()

    def consume() -> None:
        for frame in stream.frames():
            taken.append(frame.index)
            some.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert some.wait(60)
    stream.close()
    consumer.join(10)
    assert not consumer.is_alive()
    assert taken == list(range(len(taken)))


class Broken(Exception):
    pass


@pytest.mark.parametrize("cfg", [INLINE, StreamConfig()])
@pytest.mark.parametrize("part", ["decode_stream", "velocity"])
def test_an_error_of_a_worker_reaches_the_consumer(session, bundle, codec, monkeypatch, cfg, part):
    owner = codec if part == "decode_stream" else bundle.net
    whole, calls = type(owner).__dict__[part], itertools.count()

    def fails(self, *args, **kw):
        if next(calls) >= 4:
            raise Broken(part)
        return whole(self, *args, **kw)

    monkeypatch.setattr(type(owner), part, fails)
    stream = session(cfg)
    with pytest.raises(Broken, match=part):
        take(stream.frames(), 1000)
    with pytest.raises(RuntimeError, match="failed before"):
        next(stream.frames())
    stream.close()
    assert not threads_of_streams()


def test_the_consumer_sets_the_pace(session, monkeypatch):
    begun = []
    stream = session(StreamConfig(queue_frames=24))
    take_inputs = stream._engine._take_inputs
    monkeypatch.setattr(stream._engine, "_take_inputs", lambda p: begun.append(p.chunk) or take_inputs(p))
    source = stream.frames()
    frames = take(source, 1 + 12)
    assert frames[-1].chunk == 1
    stream.close()
    assert max(begun) <= 3


# --- bad sessions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "pass `image`"),
        (np.zeros((16, 8, 3), np.uint8), r"uint8 \[16, 8, 3\]; needed is uint8 \[1, 16, 16, 3\]"),
        (np.zeros((16, 16, 3), np.float32), "float32"),
        (np.zeros((2, 16, 16, 3), np.uint8), r"\[2, 16, 16, 3\]"),
    ],
)
def test_a_start_picture_that_does_not_fit_is_refused(bundle, codec, image, message):
    with pytest.raises(ValueError, match=message):
        StreamSession(bundle, codec, INLINE, image=image)


def test_a_student_from_noise_takes_no_picture(codec, tiny_image):
    with pytest.raises(ValueError, match="from noise"):
        StreamSession(noise_bundle(replace(DIT, sites={})), codec, INLINE, image=tiny_image)


def test_a_session_without_codec_has_latents_but_no_frames():
    stream = StreamSession(noise_bundle(replace(DIT, sites={})), None, INLINE)
    with pytest.raises(ValueError, match="no frames"):
        next(stream.frames())
    assert next(stream.latents()).shape == (1, 3, 4, 4, 4)


def test_frames_and_latents_are_not_mixed(session):
    stream = session()
    next(stream.frames())
    with pytest.raises(ValueError, match="gives frames"):
        next(stream.latents())


def test_a_new_iterator_over_latents_begins_again(session):
    stream = session()
    first = torch.cat(take(stream.latents(), 3), dim=1)
    assert torch.equal(first, torch.cat(take(stream.latents(), 3), dim=1))


def test_what_cannot_stream_says_why(bundle, codec, tiny_teacher_path, tiny_image):
    def opening(other: Bundle, cfg: StreamConfig = INLINE):
        return StreamSession(other, codec, cfg, image=tiny_image)

    with pytest.raises(ValueError, match="student streams"):
        opening(load(tiny_teacher_path))
    with pytest.raises(ValueError, match=r"world\.fps"):
        opening(with_record(bundle, world={}))
    with pytest.raises(ValueError, match="belong together"):
        opening(with_record(bundle, world={"fps": 10, "actions": ["left", "right"]}))
    with pytest.raises(ValueError, match="condition channels"):
        opening(noise_bundle(replace(DIT, extra_channels=4)))
    with pytest.raises(ValueError, match=r"cannot hold 2.*chunk.*3"):
        opening(bundle, replace(INLINE, memory=MemoryConfig("window", frames=4, sinks=2)))
    wide = noise_bundle(replace(DIT, sites={"modulation": SiteConfig(5)}))
    assert not StreamSession(wide, None, INLINE).takes


@pytest.mark.parametrize("name", ["queue_frames", "threads", "decode_threads"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"stream.{name}.*got -1"):
        StreamConfig(**{name: -1})


def test_threads_without_workers_are_refused():
    with pytest.raises(ValueError, match="pipelined"):
        StreamConfig(pipelined=False, threads=1)


def test_keys_are_named_for_actions_that_there_are(session, bundle):
    keys = {ACTIONS[0]: ["a"]}
    assert session(world={**bundle.record["world"], "keys": keys}).takes["action"]["keys"] == keys
    with pytest.raises(ValueError, match=r"world\.keys"):
        WorldConfig(actions=("left",), keys={"right": ("d",)})


def test_a_session_tells_its_numbers(session):
    stream = session()
    assert stream.fps == 17.5
    assert stream.takes == {"action": {"kind": "hold", "names": list(ACTIONS)}}
    assert stream.frames_per_chunk == 12
    assert stream.nfe_per_chunk == 4
    expected = STUDENT.memory.bytes(layers=2, width=24, tokens_per_frame=4)
    assert stream.memory_bytes == expected
    assert len(take(endless(stream._engine.schedule), 9)) == 9


@pytest.mark.parametrize("linears", ["packed", "bf16", "int8"])
def test_a_stream_with_other_linear_layers_equals_its_own_rollout_and_leaves_the_student_as_it_was(
    bundle, codec, tiny_image, linears
):
    if linears == "int8":
        pytest.importorskip("torchao")
    if linears != "int8" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if linears == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no bfloat16 products")
    fast = for_inference(bundle, SpeedConfig(linears=linears))
    first = bundle.net.net.blocks[0].ffn[0]
    assert type(first) is torch.nn.Linear and fast.name == f"student ({linears})"
    assert for_inference(bundle, SpeedConfig()) is bundle
    with (
        StreamSession(fast, codec, INLINE, image=tiny_image) as session,
        StreamSession(bundle, codec, INLINE, image=tiny_image) as plain,
    ):
        made = torch.cat(list(itertools.islice(session.latents(), 5)), dim=1)
        assert torch.equal(made, session.reference(5))
        error = float((made - (wanted := plain.reference(5))).norm() / wanted.norm())
    assert error < {"packed": 1e-4, "bf16": 0.1, "int8": 0.1}[linears]


@pytest.mark.parametrize("cfg", [INLINE, StreamConfig(queue_frames=0)], ids=["inline", "a worker that waits"])
def test_a_stream_that_advances_goes_on_at_a_later_chunk(session, cfg):
    s = session(cfg)
    frames = s.frames()
    next(f for f in frames if f.chunk == 4)
    passed = s.advance(10.0)
    later = next(f for f in frames if f.chunk > 5)
    assert passed == pytest.approx(10, abs=0.1)
    assert later.chunk == 5 + round(passed * 60 * s.fps / s.frames_per_chunk)
    assert s.memory_bytes == s._engine.student.new_memory(1, cfg=s.memory_config).memory_bytes
    assert next(f for f in frames if f.chunk == later.chunk + 3).px.any()
