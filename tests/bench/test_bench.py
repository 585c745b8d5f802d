"""The bench: its figures are of the stream itself, its gate comes first, its counts are the network's own."""

import io
import itertools
import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ACTIONS, DIT, WORLD, random_dit
from rich.console import Console
from safetensors.torch import save_file
from tiny_relic import CAMERA
from tiny_talker import write_talker

from vidistill.bench import bench as bench_module
from vidistill.bench import cost, machine, random_weights, timers
from vidistill.bench.bench import baseline_of, bench
from vidistill.bench.config import BenchConfig
from vidistill.bench.growth import growth_rows, walk
from vidistill.bench.random_weights import RandomConfig, random_bench
from vidistill.bench.result import BenchResult
from vidistill.bench.timers import ConsistencyError, StreamTimer
from vidistill.checkpoint import load, load_codec, load_student
from vidistill.cli.main import main
from vidistill.conditioning.condition import Condition
from vidistill.diffusion import LatentShape, add_noise, x0_from_v
from vidistill.memory.policies import MemoryConfig
from vidistill.models.layers import SiteConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.streaming.runtime import SpeedConfig
from vidistill.streaming.session import StreamSession

SHORT = BenchConfig(rounds=2, chunks=2, inputs=1, warmup_chunks=0, gate_chunks=2, clip_frames=5, clip_steps=2)
KEYS = {"fps", "real_time_factor", "first_frame_ms", "chunk_ms_p50", "chunk_ms_p95", "input_to_frame_ms_p95"}
KEYS |= {"nfe_per_chunk", "memory_bytes", "peak_bytes", "parts_ms", "env"}
SMALL = RandomConfig(
    dim=24, layers=2, heads=2, ffn=32, text="5x8", latent="4x4x6", chunk=2, chunks=3, steps=2, rounds=2
)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(machine, "MATMUL_SIZES", (64,))


@pytest.fixture(scope="module")
def student(tiny_student_path):
    return load_student(tiny_student_path)


@pytest.fixture(scope="module")
def timed(student) -> BenchResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "MATMUL_SIZES", (64,))
        return bench(student, replace(SHORT, growth_minutes=(0.02, 0.1), growth_chunks=3))


def test_a_bench_gives_every_promised_figure(timed):
    values = json.loads(timed.to_json())
    assert set(values) >= KEYS and "vs" not in values and "\n" not in timed.to_json()
    numbers = [values[key] for key in KEYS - {"parts_ms", "env"}] + list(values["parts_ms"].values())
    assert all(number > 0 for number in numbers)
    assert set(values["parts_ms"]) == {"denoise", "context", "decode", "host"}


def test_figures_belong_together(timed, student):
    assert timed.nfe_per_chunk == 4
    assert timed.real_time_factor == pytest.approx(timed.fps / 17.5)
    assert timed.fps == pytest.approx(4 * timed.latents_per_s)
    assert timed.chunk_ms_p50 <= timed.chunk_ms_p95
    assert timed.steady == (timed.chunk_ms_p95 <= 1.5 * timed.chunk_ms_p50)
    assert timed.memory_bytes == student.net.new_memory(1).memory_bytes
    assert timed.ranges["fps"][0] <= timed.fps <= timed.ranges["fps"][1]
    assert timed.env["threads"] == torch.get_num_threads() and timed.env["bench"]["rounds"] == 2


def test_growth_is_measured_where_the_stream_really_ran(timed):
    assert [round(row["minutes"], 1) for row in timed.growth] == [0.0, 0.1]
    assert len({row["memory_bytes"] for row in timed.growth}) == 1
    assert all(row["chunk_ms_p50"] > 0 and row["rss_bytes"] > 0 for row in timed.growth)
    assert all(0 < row["beside_young"] < math.inf for row in timed.growth)


def test_past_the_first_minutes_the_clock_is_advanced_and_rows_say_so(student):
    cfg = replace(SHORT, rounds=1, inputs=0, growth_minutes=(0.1, 30.0), growth_chunks=3, growth_run=0.1, batch=2)
    result = bench(student, cfg)
    near, far = result.growth
    assert near["ran"] and not far["ran"] and far["minutes"] == pytest.approx(30, abs=0.2)
    assert near["memory_bytes"] == far["memory_bytes"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert "after 30.0 min (clock advanced)" in text and "2 streams in one pass" in text
    assert result.batch["gain"] == pytest.approx(2 * result.batch["one_chunk_ms"] / result.batch["chunk_ms"])


@pytest.mark.parametrize("chunk", [1, 3])
def test_an_avatar_is_timed_alone_and_with_others_and_beside_its_teacher(tmp_path, chunk):
    """Its picture is a chunk of its own, or, as in LiveTalk, pinned inside the first whole one."""
    write_talker(tmp_path)
    avatar = load_student(tmp_path / "student")
    memory = MemoryConfig("window", frames=9, sinks=3)
    net = CausalStudent(avatar.net.net, StudentConfig(chunk=3, first_chunk=chunk % 3, memory=memory), avatar.net.shape)
    schedule = {**avatar.record["schedule"], "given_chunks": chunk % 3}
    avatar = replace(avatar, net=net, record={**avatar.record, "given_frames": 1, "schedule": schedule})
    teacher = load(tmp_path / "teacher")
    result = bench(avatar, replace(SHORT, rounds=1, batch=2, speech_s=1.0), vs=teacher)
    assert result.batch["chunk_ms"] > 0 and result.vs["fps"] > 0 and result.audio_to_lip_ms_p95 > 0


def test_an_old_stream_is_timed_in_turn_with_a_young_one():
    """Only chunks that count have a partner; twice as slow a stream is told from a machine that slows down."""

    class Stream:
        fps, frames_per_chunk, memory_bytes, actions = 4.0, 4, 1, ()

        def __init__(self, cost: float) -> None:
            self.cost, self.made = cost, []

        def chunks(self):
            for index in itertools.count():
                self.made.append(index)
                clock[0] += 1
                yield SimpleNamespace(index=index, stats={"chunk_ms": self.cost * clock[0]})

    clock, old, young = [1000], Stream(2.0), Stream(1.0)
    cfg = replace(SHORT, growth_minutes=(0.5,), growth_chunks=5)
    (row,) = growth_rows(old, young, 3, cfg, lambda *_: None)
    assert old.made[-1] == 30 and len(young.made) == 3 + 5
    assert row["beside_young"] == pytest.approx(2.0, rel=0.01)


def test_old_and_young_stream_walk_alike():
    class Stream:
        fps, frames_per_chunk, memory_bytes, actions = 4.0, 4, 1, ACTIONS

        def __init__(self) -> None:
            self.held, self.done = None, []

        def set(self, action) -> None:
            self.held = action

        def advance(self, minutes) -> None:
            pass

        def chunks(self):
            for index in itertools.count():
                self.done.append(self.held)
                yield SimpleNamespace(index=index, stats={"chunk_ms": 1.0})

    def walked(seed):
        old, young = Stream(), Stream()
        growth_rows(old, young, 3, replace(SHORT, seed=seed, growth_minutes=(1.0,), growth_chunks=20), lambda *_: None)
        assert old.done[-20:] == young.done[3:]
        return old.done

    way = walked(0)
    assert {name for action in way for name in action} == {"forward", "turn_left", "turn_right"}
    assert way == walked(0) != walked(1)
    assert max(len(list(same)) for _, same in itertools.groupby(way)) >= 4


def test_a_walker_gets_somewhere_while_it_grows(student):
    world = {**WORLD, "camera": asdict(CAMERA)}
    timer = StreamTimer(replace(student, record={**student.record, "world": world}), load_codec(student), SHORT, None)
    with timer.open(pipelined=False) as old, timer.open(pipelined=False) as young:
        cfg = replace(SHORT, growth_minutes=(0.1,), growth_chunks=3)
        growth_rows(old, young, timer.fill, cfg, lambda *_: None)
        assert all(len({tuple(place) for place in session.navigator.map["path"]}) > 2 for session in (old, young))


def test_a_student_whose_actions_are_its_own_does_them():
    told = []
    session = SimpleNamespace(actions=("jump",), set=lambda action: told.append(action))
    walk(session, 0, 5)
    walk(SimpleNamespace(actions=()), 0, 5)
    assert told == [{"jump": 1.0}]


def test_as_many_minutes_as_were_asked_for_really_run_before_the_clock_is_advanced(student, monkeypatch):
    made, advanced = [], []
    chunks, advance = StreamSession.chunks, StreamSession.advance

    def watched(session):
        for chunk in chunks(session):
            made.append(chunk.index)
            yield chunk

    def advance_after(session, minutes):
        advanced.append(made[-1])
        return advance(session, minutes)

    monkeypatch.setattr(StreamSession, "chunks", watched)
    monkeypatch.setattr(StreamSession, "advance", advance_after)
    timer = StreamTimer(student, load_codec(student), SHORT, None)
    with timer.open(pipelined=False) as old, timer.open(pipelined=False) as young:
        cfg = replace(SHORT, growth_minutes=(5.0,), growth_chunks=3, growth_run=0.2)
        (row,) = growth_rows(old, young, timer.fill, cfg, lambda *_: None)
    assert not row["ran"] and row["minutes"] == pytest.approx(5, abs=0.1)
    assert advanced == [int(0.2 * 60 * student.record["world"]["fps"] / timer.frames_per_chunk)]


def test_people_get_a_table(timed):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(timed.table())
    text = console.export_text()
    assert "x real time" in text and "4 a chunk" in text and "after 0.1" in text
    assert f"{timed.warmup_ms:.0f} ms for the first chunks" in text


def test_the_first_chunks_are_the_warm_up_and_the_rival_comes_after_the_peak(
    tiny_student_path, tiny_teacher_path, monkeypatch
):
    order = []

    def note(place, name):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kw: order.append(name) or original(*args, **kw))

    for name in ("load", "peak_bytes"):
        note(bench_module, name)
    for name in ("warm_up", "gate", "round"):
        note(StreamTimer, name)
    bench(tiny_student_path, replace(SHORT, rounds=1, inputs=0), vs=tiny_teacher_path)
    assert order == ["warm_up", "gate", "peak_bytes", "load", "round"]


def test_a_rival_that_is_nowhere_is_told_before_anything_runs(student, monkeypatch):
    monkeypatch.setattr(StreamTimer, "warm_up", lambda timer: pytest.fail("ran"))
    with pytest.raises(ValueError, match="no checkpoint 'nobody'"):
        bench(student, SHORT, vs="nobody")


def test_a_teacher_is_timed_in_the_same_run(tiny_student_path, tiny_teacher_path, monkeypatch):
    clips = []
    sample = timers.sample
    monkeypatch.setattr(timers, "sample", lambda *a, **kw: clips.append((a, kw)) or sample(*a, **kw))
    result = bench(tiny_student_path, SHORT, vs=tiny_teacher_path)
    vs = json.loads(result.to_json())["vs"]
    assert vs["name"] == "teacher"
    assert vs["nfe_ratio"] == 2 * 2 / 4  # two guided steps against three and a context pass
    assert vs["fps_ratio"] > 0 and vs["first_frame_ratio"] > 0
    assert len(clips) == 1 + SHORT.rounds
    (_, noise, sigmas, cond), kw = clips[-1]
    assert noise.shape == (1, 6, 4, 4, 4) and len(sigmas) == 2 and kw["scales"] == [2.0]
    assert kw["given"].shape == (1, 1, 4, 4, 4) and cond.per_frame["modulation"].shape == (1, 6, 17)


def test_guidance_of_one_is_one_evaluation_a_step(student, tiny_teacher_path):
    result = bench(student, replace(SHORT, guidance=1.0, rounds=1, inputs=0), vs=load(tiny_teacher_path))
    assert result.vs["nfe_ratio"] == 2 / 4 and result.input_to_frame_ms_p95 is None


def test_two_students_are_held_against_each_other(student):
    fewer = replace(student, record={**student.record, "schedule": {"levels": [1.0], "given_chunks": 1}})
    result = bench(fewer, replace(SHORT, pipelined=False), vs=student)
    assert result.nfe_per_chunk == 2 and result.vs["nfe_ratio"] == 2.0 and result.vs["name"] == "student"


def test_a_rival_is_computed_as_the_student_is(student, tiny_teacher_path):
    fewer = replace(student, record={**student.record, "schedule": {"levels": [1.0], "given_chunks": 1}})
    once, packed = replace(SHORT, rounds=1, inputs=0), SpeedConfig(linears="packed")
    for vs, name in ((fewer, "student (packed)"), (load(tiny_teacher_path), "teacher (packed)")):
        result = bench(student, once, vs=vs, speed=packed)
        assert result.name == "student (packed)" and result.vs["name"] == name
        assert result.env["speed"] == result.vs["speed"] == asdict(packed)


def test_a_student_beside_itself_shows_what_a_speed_setting_gains(student):
    result = bench(student, replace(SHORT, rounds=1, inputs=0), vs=student, speed=SpeedConfig(linears="packed"))
    assert result.vs["name"] == "student" and result.vs["speed"]["linears"] == "plain"
    assert 0 <= result.vs["latents_difference"] < 1e-3


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_network_and_decoder_of_a_rival_are_compiled_too(student, tiny_teacher_path, kind, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compiled.append(function) or function)
    fewer = replace(student, record={**student.record, "schedule": {"levels": [1.0], "given_chunks": 1}})
    own = StreamTimer(student, load_codec(student), SHORT, None, SpeedConfig(compile=True))
    ours = [function.__name__ for function in compiled]
    compiled.clear()
    vs = fewer if kind == "student" else load(tiny_teacher_path)
    other = baseline_of(own, vs, SHORT, None)
    assert [function.__name__ for function in compiled] == ours and other.speed.compile
    decode, clips = other.codec.decode_stream, []
    monkeypatch.setattr(other.codec, "decode_stream", lambda *args: clips.append(args) or decode(*args))
    other.warm_up()
    assert clips


def test_a_rival_that_cannot_run_alike_is_refused(student, tiny_teacher_path):
    teacher = replace(load(tiny_teacher_path), net=torch.nn.Linear(1, 1))
    own = StreamTimer(student, load_codec(student), SHORT, None, SpeedConfig(linears="packed"))
    with pytest.raises(ValueError, match=r"teacher.*Linear.*--compile.*--linears"):
        baseline_of(own, teacher, SHORT, None)


def test_a_codec_is_no_opponent(student, tiny_codec_path, monkeypatch):
    with pytest.raises(ValueError, match=r"codec.*held against"):
        bench(student, SHORT, vs=load(tiny_codec_path))
    monkeypatch.setattr(StreamTimer, "warm_up", lambda timer: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"codec.*held against"):
        bench(student, SHORT, vs=tiny_codec_path)


def test_nothing_is_timed_when_the_stream_differs_from_its_rollout(student, monkeypatch):
    reference = StreamSession.reference
    monkeypatch.setattr(StreamSession, "reference", lambda self, chunks: reference(self, chunks) + 1e-6)
    monkeypatch.setattr(StreamTimer, "round", lambda self, number: pytest.fail("timed"))
    with pytest.raises(ConsistencyError, match=r"rollout.*timed"):
        bench(student, SHORT)


def test_the_gate_sees_memory_forget(student, monkeypatch):
    seen = []
    reference = StreamSession.reference
    monkeypatch.setattr(StreamSession, "reference", lambda self, n: seen.append(n) or reference(self, n))
    StreamTimer(student, load_codec(student), replace(SHORT, gate_chunks=0), None).gate()
    assert student.net.first_frame(seen[0]) > student.net.cfg.memory.frames


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 0}, "bench.rounds.*least 1, got 0"),
        ({"inputs": -1}, "bench.inputs.*least 0, got -1"),
        ({"growth_minutes": (1.0, 0.0)}, "growth_minutes.*positive"),
        ({"growth_run": math.nan}, "bench.growth_run.*least 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**changed)


# --- cost accounting --------------------------------------------------------------------------------------------------


TEXT = replace(DIT, layers=3, sites={}, text_dim=10)
SHAPE = LatentShape(3, DIT.channels, 4, 4)


@pytest.mark.parametrize(
    "dit",
    [
        TEXT,
        replace(TEXT, image_dim=6, image_tokens=4),
        replace(DIT, extra_channels=2, sites={"hidden": SiteConfig(7, layers=(1,)), "qk": SiteConfig(5, hidden=9)}),
    ],
)
@pytest.mark.parametrize("output", [True, False])
def test_two_layers_say_what_all_of_them_cost(dit, output):
    counted = cost.counted_flops(dit, SHAPE, 3, text=13, prompt=True, output=output)
    assert cost.pass_flops(dit, SHAPE, 3, seen=12, text=13, output=output) == counted


def test_memory_adds_attention_alone():
    one, two = (cost.pass_flops(DIT, SHAPE, 3, seen=seen) for seen in (12, 32))
    assert sum(two.values()) - sum(one.values()) == 2 * DIT.layers * 2 * 12 * 20 * DIT.width
    assert {part for part in one if one[part] != two[part]} == {"self_attention"}


def test_what_a_prompt_is_read_as_is_counted_once():
    fresh, read = (sum(cost.pass_flops(TEXT, SHAPE, 3, seen=12, text=5, prompt=p).values()) for p in (True, False))
    embedded = 5 * (TEXT.text_dim + TEXT.width) * TEXT.width
    assert fresh - read == 2 * (embedded + TEXT.layers * 2 * 5 * TEXT.width**2)


def test_a_profile_shares_out_the_time_of_what_ran():
    a = torch.randn(300, 300)
    shares = machine.profile(lambda: [a @ a for _ in range(20)])
    assert sum(shares.values()) == pytest.approx(1.0) and shares["attention products"] > 0.5


def test_the_matmul_peak_is_a_speed():
    assert 0 < machine.matmul_peak_gflops(repeats=2) < 1e6


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with machine.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- random weights ---------------------------------------------------------------------------------------------------


def test_random_weights_of_any_shape_are_timed():
    values = json.loads(random_bench(SMALL).to_json())
    assert set(values) >= KEYS
    assert values["fps"] is None and values["nfe_per_chunk"] == 3
    assert len(values["env"]["chunk_ms"]) == 3 and all(ms > 0 for ms in values["env"]["chunk_ms"])
    assert values["model_flops_utilisation"] > 0
    assert values["memory_bytes"] == 2 * 2 * 6 * 6 * 24 * 4  # keys and values, layers, frames, tokens, width, float32
    Console(file=io.StringIO()).print(random_bench(replace(SMALL, text="", rounds=1)).table())


def test_given_weights_are_timed_instead_of_random_ones():
    bundle = SMALL.bundle()
    bundle.net.net.load_state_dict(random_dit(bundle.net.net.cfg).state_dict())
    assert random_bench(replace(SMALL, rounds=1), replace(bundle, name="given")).name == "given"


def test_a_faster_network_is_timed_beside_the_plain_one_and_its_error_is_told():
    result = random_bench(replace(SMALL, rounds=1), speed=SpeedConfig(linears="packed"), batch=2, profiled=True)
    assert result.name == "random weights (packed)" and result.vs["name"] == "random weights"
    assert result.vs["chunk_ratio"] > 0 and result.vs["model_flops_utilisation"] > 0
    assert 0 <= result.vs["latents_difference"] < 1e-4
    assert result.batch["streams"] == 2 and result.profile["linear layers"] > 0
    Console(file=io.StringIO()).print(result.table())


def test_random_weights_at_a_speed_setting_are_timed_beside_plain_ones(monkeypatch):
    peaks = iter([1000, 2000])
    monkeypatch.setattr(bench_module, "peak_bytes", lambda device: next(peaks))
    result = random_bench(replace(SMALL, rounds=1), speed=SpeedConfig(linears="packed"))
    assert result.name == "random weights (packed)" and result.vs["name"] == "random weights"
    assert result.env["speed"]["linears"] == "packed" and result.vs["speed"]["linears"] == "plain"
    assert result.peak_bytes == 1000


@pytest.mark.parametrize("memory", [{"sinks": 2}, {"history": 4}, {"history": 4, "entries": "int8"}])
def test_every_bounded_memory_of_random_weights_grows_no_bytes(memory):
    cfg = replace(SMALL, rounds=1, growth_chunks=2, **memory)
    session_bytes = random_bench(cfg, growth=True)
    assert len({row["memory_bytes"] for row in session_bytes.growth}) == 1
    assert [row["ran"] for row in session_bytes.growth] == [True, False, False]


def test_random_numbers_from_a_file_make_the_latents_that_they_make_elsewhere(tmp_path):
    cfg, path = replace(SMALL, noise=str(tmp_path / "noise.safetensors")), tmp_path / "noise.safetensors"
    student, size = SMALL.bundle().net, [int(n) for n in SMALL.latent.split("x")]
    rng = torch.Generator().manual_seed(5)
    text = torch.randn(5, student.net.cfg.text_dim, generator=rng)
    noise, fresh = torch.randn(SMALL.chunk, *size, generator=rng), torch.randn(1, SMALL.chunk, *size, generator=rng)
    save_file({"noise": noise, "fresh": fresh, "text": text}, path)
    session = StreamTimer(cfg.bundle(), None, BenchConfig(), drawn=cfg.drawn()).open()
    got = next(session.latents())
    x, cond, memory = noise[None], Condition(text[None]), student.new_memory(1)
    for sigma, after in ((1.0, 0.5), (0.5, 0.0)):  # by hand
        level = torch.full((1, SMALL.chunk), sigma, dtype=torch.float64)
        x0 = x0_from_v(x, student.velocity(x, level, cond, memory=memory), level)
        x = add_noise(x0, fresh, after) if after else x0
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    assert torch.equal(session.reference(2)[:, : SMALL.chunk], got)
    assert not torch.equal(session.reference(2)[:, SMALL.chunk :], got)  # drawn, past the end of the file
    for wrong, message in (({"fresh": fresh}, "has no `noise`"), ({"noise": fresh}, r"noise is \[1, ")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=message):
            cfg.recorded()
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match="whole safetensors"):
        cfg.recorded()


def test_weights_that_do_not_fit_the_shape_name_the_shape_they_have():
    net = random_dit(SMALL.bundle().net.net.cfg)
    assert torch.equal(SMALL.bundle(net).net.net.head.head.weight, net.head.head.weight)
    with pytest.raises(ValueError, match=r"layers 2.*shape.*3.*dim=24 layers=2"):
        replace(SMALL, layers=3).bundle(net)


def test_a_shape_is_read_from_the_command_line():
    read = RandomConfig.parse(["dim=24", "text=", "latent=4x4x6", "steps=2", "growth_run=0.5"])
    assert read == RandomConfig(dim=24, text="", latent="4x4x6", steps=2, growth_run=0.5)
    assert RandomConfig.parse([]) == RandomConfig()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("depth=3", r"random_weights\.depth"),
        ("dim", "'dim'"),
        ("dim=big", r"random_weights\.dim.*got 'big'"),
        ("layers=0", "layers.*1, got 0"),
        ("growth_run=long", r"random_weights\.growth_run.*number.*'long'"),
        ("growth_run=-1", "growth_run.*negative.*-1.0"),
        ("latent=16x16", "latent.*CHANNELSxHEIGHTxWIDTH, got '16x16'"),
        ("text=512x0", "text.*TOKENSxWIDTH"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(item, message):
    with pytest.raises(ValueError, match=message):
        RandomConfig.parse([item])


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["doom", "--weights", "w.safetensors", "--profile"], "--weights, --profile would be ignored without --random"),
        (["doom", "--family", "self-forcing"], "--family would be ignored without --random-weights"),
        (["doom", "--vs", "doom-teacher", "--random-weights", "dim=24"], "name, --vs would be ignored by --random"),
        (["--allow-pickle", "--random-weights"], "--allow-pickle would be ignored without --weights"),
        (["doom", "--growth-run", "2"], "--growth-run would be ignored without --growth"),
        ([], "name a student, or give --random-weights"),
    ],
)
def test_options_that_would_be_ignored_are_refused(args, message, capsys):
    assert main(["bench", *args]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["--growth-run", "2.5"]])
def test_the_command_line_says_how_long_a_stream_really_runs(args, tiny_student_path, monkeypatch, timed):
    seen = []
    monkeypatch.setattr(bench_module, "bench", lambda name, cfg, **kw: seen.append((cfg, kw)) or timed)
    monkeypatch.setattr(random_weights, "random_bench", lambda cfg, *_, **kw: seen.append((cfg, kw)) or timed)
    assert main(["bench", str(tiny_student_path), "--growth", "--linears", "packed", *args]) == 0
    assert main(["bench", "--growth", "--linears", "packed", *args, "--random-weights", "dim=24", "heads=2"]) == 0
    assert [cfg.growth_run for cfg, _ in seen] == [2.5 if args else BenchConfig().growth_run] * 2
    assert all(kw["speed"] == SpeedConfig("packed") and kw["growth"] for _, kw in seen)
