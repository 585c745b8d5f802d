"""A run's folder: who holds it, what ends a run, and what a state or a log may say without harm."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_ranks import ends_of, together
from tiny_training import dmd_stage, flow_stage, write_latents

from vidistill import checkpoint, distributed
from vidistill import tensors as weights
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.training.interruption import Interruption
from vidistill.training.optim import TrainingError
from vidistill.training.run_folder import (
    LOCK,
    PREVIOUS,
    STATE,
    RunLock,
    RunState,
    newest_state,
    parse_state,
    read_holder,
)
from vidistill.training.trackers import MetricsLog, read_rows
from vidistill.training.trainer import METRICS, Trainer, train
from vidistill.training.validation import ValidationConfig


def started(job, *args):
    child = multiprocessing.get_context("fork").Process(target=job, args=args)
    child.start()
    return child


def train_for_ever(cfg):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
    train(replace(cfg, steps=10**6, save_every=10**6, log_every=1, threads=1))


def wait_until(there, child):
    deadline = time.monotonic() + 300
    while not there():
        assert child.is_alive(), "the run ended by itself"
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.01)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_says_so_in_the_exit_code(tmp_path, number, code):
    cfg = flow_stage(tmp_path)
    run = tmp_path / "runs" / "flow"
    child = started(train_for_ever, cfg)
    try:
        wait_until(lambda: len(read_rows(run / METRICS)) >= 2, child)
        os.kill(child.pid, number)
        child.join(120)
        assert child.exitcode == code
    finally:
        child.kill()
    step = checkpoint.read_tensors(run / STATE)[1]["step"]
    assert [row["step"] for row in read_rows(run / METRICS)] == list(range(1, step + 1))
    assert not (run / LOCK).exists()
    whole = Trainer(replace(cfg, name="whole", save_every=10**6, steps=10**6))
    for _ in range(step):
        whole.step()
    resumed = Trainer(replace(cfg, save_every=10**6, steps=10**6))
    resumed.resume()
    assert resumed.step() == whole.step()


def signal_twice():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.received == interruption.agreed() == signal.SIGTERM
        signal.raise_signal(signal.SIGHUP)
    os._exit(0)


def test_a_second_signal_ends_the_process_at_once():
    child = started(signal_twice)
    child.join(100)
    assert child.exitcode == -signal.SIGHUP


def test_signals_that_are_ignored_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    term = signal.getsignal(signal.SIGTERM)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.received and signal.getsignal(signal.SIGTERM) == interruption.note
        assert signal.getsignal(signal.SIGTERM) is term
    finally:
        signal.signal(signal.SIGHUP, before)


def ended_by_one_rank(cfg):
    trainer = Trainer(cfg)
    make = trainer.step

    def step():
        row = make()
        if distributed.rank() == 1 and trainer.step_count == 2:
            signal.raise_signal(signal.SIGTERM)
        return row

    trainer.step = step
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    assert ended.value.code == 143 and trainer.step_count == 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel", distributed.PARALLEL)
def test_all_processes_end_at_the_step_at_which_one_is_told_to(tmp_path, parallel):
    cfg = flow_stage(tmp_path, parallel=parallel, steps=9, optim=replace(flow_stage(tmp_path).optim, muon=""))
    together(2, ended_by_one_rank, cfg)
    trainer = Trainer(cfg)
    trainer.resume()
    assert trainer.step_count == 2


# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_second_trainer_is_refused_and_a_dead_ones_folder_is_taken_over(tmp_path):
    cfg = flow_stage(tmp_path, steps=1)
    lock = tmp_path / "runs" / "flow" / LOCK
    child = started(train_for_ever, cfg)
    try:
        wait_until(lambda: read_holder(lock), child)
        with pytest.raises(TrainingError, match=rf"process {child.pid} on .*name="):
            train(cfg)
        assert read_holder(lock)["pid"] == child.pid
    finally:
        child.kill()
        child.join()
    assert lock.exists()
    train(cfg)
    assert not lock.exists()


def test_a_number_that_another_process_has_by_now_does_not_hold_a_folder(tmp_path):
    lock = RunLock(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({**lock.mine, "start": "long ago", "token": "x"}))
    lock.acquire()
    assert read_holder(tmp_path / LOCK) == lock.mine
    lock.release()


@pytest.mark.parametrize("said", ['{"host": "elsewhere", "pid": 1, "start": "5"}', "", "[1]", '{"pid": "x"}'])
def test_a_holder_elsewhere_lives_as_long_as_it_gives_signs_of_life(tmp_path, said):
    path = tmp_path / LOCK
    path.write_text(said)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            os.utime(path)

    holder = threading.Thread(target=beat)
    holder.start()
    try:
        with pytest.raises(TrainingError, match="name="):
            RunLock(tmp_path, beat_s=2.0).acquire()
    finally:
        ended.set()
        holder.join()
    lock = RunLock(tmp_path, beat_s=0.05)
    lock.acquire()
    assert read_holder(path) == lock.mine and [p.name for p in tmp_path.iterdir()] == [LOCK]
    lock.release()
    assert not path.exists()


def test_a_holder_gives_signs_of_life(tmp_path):
    lock = RunLock(tmp_path, beat_s=0.02).acquire()
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 60
    while lock.touched() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_a_run_whose_folder_was_taken_over_writes_nothing(tmp_path):
    trainer = Trainer(flow_stage(tmp_path))
    trainer.lock = RunLock(trainer.folder).acquire()
    trainer.save()
    before = (trainer.folder / STATE).read_bytes()
    other = {**trainer.lock.mine, "pid": 1, "token": "another"}
    (trainer.folder / LOCK).write_text(json.dumps(other))
    trainer.step()
    with pytest.raises(TrainingError, match=r"taken over.*process 1"):
        trainer.save()
    trainer.lock.release()
    assert (trainer.folder / STATE).read_bytes() == before and read_holder(trainer.folder / LOCK) == other


# --- states and logs --------------------------------------------------------------------------------------------------

INFO = {
    "step": 3,
    "config": {"name": "x"},
    "student": 2,
    "critic": 1,
    "losses": [0.5, 0.25],
    "peak": {"score": 0.5, "step": 2, "since": 1},
    "seconds": 1.5,
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def changed_state(hits, field, value, removed):
    """A state with one field changed is read as what it says, or refused by the field's name."""
    info = {k: v for k, v in INFO.items() if k != field} | ({} if removed else {field: value})
    try:
        state = parse_state(json.loads(json.dumps(info)), STATE)
    except TrainingError as error:
        assert STATE in str(error) and "damaged" in str(error)
        hits[field, "refused"] += 1
        return
    hits[field, "read"] += 1
    assert state.step >= 0 and state.student >= 0 and state.seconds >= 0 and state.peak.since >= 0
    assert all(isinstance(loss, float) for loss in state.losses) and isinstance(dict(state.config), dict)
    json.dumps(state.info())


def changed_log(path, lines, step):
    """A log with any lines in it keeps its rows up to a step."""
    rows = [{"step": k, "student/loss": 0.5} for k in range(1, 5)]
    written = [json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join([*written[:2], *lines, *written[2:]]))
    MetricsLog(path).trim(step)
    kept = read_rows(path)
    assert [row for row in kept if row in rows] == [row for row in rows if row["step"] <= step]
    assert all(isinstance(row["step"], int) and row["step"] <= step for row in kept)


LINE = st.one_of(
    st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"").replace(b"\r", b"")),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    ANYTHING.map(lambda value: json.dumps({"step": value}).encode()),
)


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_a_state_or_a_log_says_it_is_checked_before_it_is_used(tmp_path, examples):
    hits, fields = Counter(), [*INFO, "unknown"]
    few = settings(max_examples=examples // len(fields), deadline=None, derandomize=True)
    for field in fields:

        @few
        @given(st.just(field), ANYTHING, st.booleans())
        def change_one(name, value, removed):
            changed_state(hits, name, value, removed)

        change_one()

    @settings(few, max_examples=examples)
    @given(st.lists(LINE, max_size=4), st.integers(0, 6))
    def change_log(lines, step):
        changed_log(tmp_path / METRICS, lines, step)

    change_log()
    print(dict(hits))
    assert {field for field, _ in hits} == set(fields)


def rewrite(path, change):
    """A state with other info, as somebody without our checksums would write it."""
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["vidistill"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"vidistill": json.dumps(change(info))})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda info: {k: v for k, v in info.items() if k != "step"}, "step"),
        (lambda info: {k: v for k, v in info.items() if k != "config"}, "config"),
        (lambda info: {**info, "step": "x"}, "step"),
        (lambda info: {**info, "step": -1}, "step"),
        (lambda info: {**info, "student": "x"}, "student"),
        (lambda info: {**info, "losses": "x"}, "losses"),
        (lambda info: {**info, "losses": ["x"]}, "losses"),
        (lambda info: {**info, "peak": {"score": 0.5, "odd": 1}}, "peak"),
        (lambda info: {**info, "seconds": None}, "seconds"),
        (lambda info: [1], "keys and values"),
    ],
)
def test_a_state_that_says_nonsense_is_refused_by_field(tmp_path, change, field):
    trainer = Trainer(flow_stage(tmp_path))
    trainer.save()
    rewrite(trainer.folder / STATE, change)
    with pytest.raises(TrainingError, match=rf"damaged .*{field}"):
        Trainer(flow_stage(tmp_path)).resume()


def test_a_state_without_a_checksum_loads_and_one_with_a_wrong_one_does_not(tmp_path):
    trainer = Trainer(flow_stage(tmp_path))
    trainer.step()
    trainer.save()
    path = trainer.folder / STATE
    whole = path.read_bytes()
    for at in (len(whole) - 40, whole.index(b"step") + len("step") + 5):  # of a tensor, of the step number
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            Trainer(flow_stage(tmp_path)).resume()
    path.write_bytes(whole)
    rewrite(path, lambda info: info)  # as earlier versions wrote it
    again = Trainer(flow_stage(tmp_path))
    again.resume()
    assert again.step_count == 1


def test_a_damaged_state_is_replaced_by_the_one_before_it_with_a_word(tmp_path, caplog):
    trainer = Trainer(flow_stage(tmp_path))
    for _ in range(3):
        trainer.step()
        trainer.save()
    path = trainer.folder / STATE
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    again = Trainer(flow_stage(tmp_path))
    again.resume()
    assert again.step_count == 2 and "damaged" in caplog.text and "at step 2" in caplog.text
    path.unlink()  # as where a save was cut off
    again = Trainer(flow_stage(tmp_path))
    again.resume()
    assert again.step_count == 2
    (trainer.folder / PREVIOUS).write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match=PREVIOUS):
        Trainer(flow_stage(tmp_path)).resume()


def test_a_state_that_is_not_what_was_meant_does_not_replace_the_one_before(tmp_path, monkeypatch):
    trainer = Trainer(flow_stage(tmp_path))
    trainer.save()
    before = (trainer.folder / STATE).read_bytes()

    def rotten(tensors, path, metadata=None):
        save_file(tensors, path, metadata=metadata)
        data = bytearray(path.read_bytes())
        data[-7] ^= 4
        path.write_bytes(data)

    monkeypatch.setattr(weights, "save_file", rotten)
    trainer.step()
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        trainer.save()
    assert (trainer.folder / STATE).read_bytes() == before


def save_once(cfg):
    trainer = Trainer(cfg)
    trainer.step()
    trainer.save()


@pytest.mark.timeout(600)
def test_damaged_shards_are_refused_by_file(tmp_path):
    cfg = flow_stage(tmp_path, parallel="shard", optim=replace(flow_stage(tmp_path).optim, muon=""))
    together(2, save_once, cfg)
    folder = tmp_path / "runs" / "flow" / "state-00000001"
    (shard, *_), info = sorted(folder.glob("*.safetensors")), folder / "info.json"
    whole, said = shard.read_bytes(), info.read_text()
    shard.write_bytes(whole[:-7] + bytes([whole[-7] ^ 4]) + whole[-6:])
    with pytest.raises(ValueError, match=shard.name):
        Trainer(cfg).resume()
    shard.write_bytes(whole)
    info.write_text(said.replace('"step": 1', '"step": 2'))
    with pytest.raises(ValueError, match="info"):
        Trainer(cfg).resume()
    info.write_text(json.dumps({k: v for k, v in json.loads(said).items() if k not in ("files", "checksum")}))
    trainer = Trainer(cfg)
    trainer.resume()
    assert trainer.step_count == 1


def killed_in(name, cfg):
    """Train a step, and end as a kill would where a save comes to the function `name`, on the first rank."""
    trainer = Trainer(cfg)
    trainer.resume()
    trainer.step()
    real = getattr(distributed, name)

    def end(*args, **settings):
        if distributed.rank() == 0:
            os._exit(0)
        return real(*args, **settings)

    setattr(distributed, name, end)
    try:
        trainer.save()
    except Exception:  # the first rank is gone
        os._exit(0)


SAVES = {"check_written": 1, "checksums": 1, "write_json": 1, "swap": 2, "drop_shards": 2}  # where; the step then found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAVES)
def test_a_sharded_state_stays_until_the_next_is_whole(tmp_path, name):
    cfg = flow_stage(tmp_path, parallel="shard", optim=replace(flow_stage(tmp_path).optim, muon=""))
    together(2, save_once, cfg)
    assert ends_of(2, killed_in, name, cfg) == [0, 0]
    trainer = Trainer(cfg)
    trainer.resume()
    assert trainer.step_count == SAVES[name]
    trainer.step()
    trainer.save()
    assert [p.name for p in trainer.folder.glob("state*")] == [STATE]


def save_again(cfg, break_it):
    trainer = Trainer(cfg)
    trainer.resume()
    real = dcp.save

    def save(*args, **settings):
        real(*args, **settings)
        if distributed.rank() == 0:
            break_it(sorted(trainer.folder.glob("*.next/*.safetensors")))
        dist.barrier()

    dcp.save = save
    with pytest.raises((OSError, RuntimeError), match=r"not whole|first process"):
        trainer.save()


def flip(files):
    data = bytearray(files[0].read_bytes())
    data[-7] ^= 4
    files[0].write_bytes(data)


def lose(files):
    files[-1].unlink()


def test_shards_that_go_while_they_are_read_are_not_whole(tmp_path, monkeypatch):
    tensors = {"w": torch.arange(6.0)}
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True))
    distributed.check_written(tmp_path, tensors)

    def gone(file, **_):  # safetensors has read the header, torch then maps what is no longer there
        file.unlink()
        return torch.UntypedStorage.from_file(str(file), False, 8)

    monkeypatch.setattr(distributed, "safe_open", gone)
    with pytest.raises(OSError, match="not whole"):
        distributed.check_written(tmp_path, tensors)


def sum_what_is_gone(folder):
    real = Path.glob

    def glob(path, pattern):  # one of them goes once they are listed, which the first process does
        found = sorted(real(path, pattern))
        found[-1].unlink()
        return found

    Path.glob = glob
    try:
        with pytest.raises(OSError, match=r"b\.safetensors|another process"):
            distributed.checksums(folder)
    finally:
        Path.glob = real


@pytest.mark.timeout(600)
def test_a_shard_that_is_gone_before_it_is_summed_ends_all_processes(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.safetensors").write_bytes(b"weights")
    together(2, sum_what_is_gone, tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("break_it", [flip, lose], ids=["another bit", "a file is gone"])
def test_shards_that_are_not_what_was_meant_do_not_replace_those_of_the_same_step(tmp_path, break_it):
    cfg = flow_stage(tmp_path, parallel="shard", optim=replace(flow_stage(tmp_path).optim, muon=""))
    together(2, save_once, cfg)
    folder = tmp_path / "runs" / "flow" / "state-00000001"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    together(2, save_again, cfg, break_it)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert newest_state(folder.parent) == folder


def test_a_state_that_was_whole_when_a_run_was_killed_wins_over_the_one_it_replaces(tmp_path):
    for name in ("state-00000003", "state-00000004", "state-00000004.next", "state-00000005.next"):
        (tmp_path / name).mkdir()
        if not name.startswith("state-00000005"):  # of which no file says that it is complete
            (tmp_path / name / "info.json").write_text("{}")
    assert newest_state(tmp_path).name == "state-00000004.next"


def test_rows_of_a_run_that_was_killed_before_its_first_save_are_not_repeated(tmp_path):
    cfg = flow_stage(tmp_path, steps=2, log_every=1, save_every=2)
    run = tmp_path / "runs" / "flow"
    run.mkdir(parents=True)
    (run / METRICS).write_text('{"step": 1}\n[1]\n7\n{"student/loss": 1}\n{"step": 2}\n')
    (run / ".state.safetensors.99999999999999999999.tmp").touch()
    train(cfg)
    assert [(row["step"], len(row) > 1) for row in read_rows(run / METRICS)] == [(1, True), (2, True)]


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path, monkeypatch):
    clock = iter(range(10**7, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    path = train(flow_stage(tmp_path, steps=2, log_every=1))
    assert 0 <= checkpoint.load(path).record["card"]["hours"] < 1
    assert all(row["s_per_step"] >= 0 for row in read_rows(path.parent / METRICS))


def test_a_state_keeps_what_it_said(tmp_path):
    state = RunState(**{**INFO, "losses": (0.5, 0.25), "peak": parse_state(INFO, STATE).peak})
    assert parse_state(json.loads(json.dumps(state.info())), STATE) == state and state.info().keys() == INFO.keys()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 2**53}, "seed"),
        ({"seed": 2**63 - 1}, "seed"),
        ({"sequence": 2, "objective": "codec"}, "sequence=1"),
        ({"name": "../esc"}, "name"),
        ({"name": "a/../../esc"}, "name"),
        ({"name": "/esc"}, "name"),
        ({"name": "a\0b"}, "name"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, change, field):
    with pytest.raises(ValueError, match=field):
        flow_stage(tmp_path, **change)


def test_the_seed_of_validation_is_bounded_as_the_others_are():
    assert ValidationConfig("clips", seed=2**53 - 1).seed
    with pytest.raises(ValueError, match=r"validation\.seed"):
        ValidationConfig("clips", seed=2**53)


def test_the_largest_seed_trains(tmp_path):
    assert Trainer(flow_stage(tmp_path, seed=2**53 - 1)).step()["student/loss"] > 0


def test_a_run_that_is_resumed_keeps_what_it_started_from(tmp_path):
    cfg = dmd_stage(tmp_path)
    Trainer(cfg).save()
    other = tmp_path / "other"
    for suffix in (".json", ".safetensors"):
        (tmp_path / f"other{suffix}").write_bytes((tmp_path / f"teacher{suffix}").read_bytes())
    for name in ("init", "critic_init"):
        with pytest.raises(ValueError, match=rf"{name} .* another name="):
            Trainer(replace(cfg, **{name: str(other)})).resume()


def world(path, **said):
    """What a checkpoint says of the data it was trained on."""
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, **said}))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"world": {"fps": 24.0}}, "fps"),
        ({"world": {"actions": ["right", "left"]}}, "actions"),
        ({"codec": "doom-codec"}, "codec"),
        ({"text": {"kind": "umt5", "source": "there"}}, "text"),
        ({"audio": {"kind": "wav2vec2", "source": "there"}}, "audio"),
    ],
)
def test_a_network_of_another_world_is_refused_by_what_differs(tmp_path, said, field):
    cfg = dmd_stage(tmp_path)
    meta = json.loads((tmp_path / "latents" / "meta.json").read_text())
    meta |= {"codec": "shapes-codec", "text": {"kind": "ngrams"}, "audio": {"kind": "mel", "rate": 16000}}
    (tmp_path / "latents" / "meta.json").write_text(json.dumps(meta))
    Trainer(cfg)
    world(tmp_path / "teacher", **said)
    with pytest.raises(ValueError, match=rf"teacher .*{field}"):
        Trainer(cfg)


def test_the_codec_of_a_stage_is_that_of_its_data(tmp_path):
    cfg = flow_stage(tmp_path)
    path = tmp_path / "latents" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "codec": "shapes-codec"}))
    Trainer(replace(cfg, codec="shapes-codec"))
    with pytest.raises(ValueError, match=r"codec 'doom-codec' .* codec=shapes-codec"):
        Trainer(replace(cfg, codec="doom-codec"))


def test_a_codec_with_another_decoder_or_in_another_place_is_the_same(tmp_path):
    small = TinyCodecConfig(latent_channels=4, encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))
    codec = TinyCodec(small)
    for name in ("first", "second", "third"):
        checkpoint.export(tmp_path / name, codec, {"card": {}})
        part = codec.decoder if name == "first" else codec.encoder  # changed before the next one is written
        for p in part.parameters():
            p.data.mul_(1.1)
    write_latents(tmp_path / "latents")
    path = tmp_path / "latents" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "codec": str(tmp_path / "first")}))
    Trainer(flow_stage(tmp_path, codec=str(tmp_path / "second")))
    with pytest.raises(ValueError, match="codec"):
        Trainer(flow_stage(tmp_path, codec=str(tmp_path / "third")))
    Trainer(flow_stage(tmp_path, codec="elsewhere/first"))  # not at hand: the name decides
