"""Worker threads of a stream: one does both jobs on few cores, and gives the same frames."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch

from vidistill.checkpoint import load_codec, load_student
from vidistill.streaming.session import StreamConfig, StreamSession


@pytest.mark.parametrize("threads", [1, 64], ids=["maybe a thread each", "one for both"])
def test_workers_give_the_frames_of_a_plain_stream(tiny_student_path, tiny_image, threads):
    bundle, made = load_student(tiny_student_path), []
    for cfg in (StreamConfig(pipelined=False), StreamConfig(threads=threads, decode_threads=1)):
        with StreamSession(bundle, load_codec(bundle), cfg, image=tiny_image) as session:
            made.append(np.stack([frame.px for frame in islice(session.frames(), 40)]))
    assert np.array_equal(*made)


@pytest.mark.parametrize(
    ("caller", "cores", "want"),
    [(2, 2, [1, 1]), (1, 2, [1, 1]), (8, 8, [6, 2]), (1, 1, [1]), (8, 4, [6])],
    ids=["two cores", "one thread asked for", "eight cores", "one core", "more threads than cores"],
)
def test_workers_share_the_threads_of_the_caller(tiny_student_path, tiny_image, monkeypatch, caller, cores, want):
    """Threads of the denoiser, and of the decoder where it has a worker of its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: caller)
    monkeypatch.setattr("vidistill.streaming.session.cores", lambda: cores)
    bundle, seen = load_student(tiny_student_path), []
    monkeypatch.setattr(threading, "Thread", lambda target, args, **_: seen.append(args[1]))
    StreamSession(bundle, load_codec(bundle), image=tiny_image)
    assert seen == want


def test_one_worker_begins_again_and_closes_in_the_middle_of_a_dream(tiny_student_path, tiny_image):
    bundle, cfg = load_student(tiny_student_path), StreamConfig(threads=64)
    with StreamSession(bundle, load_codec(bundle), cfg, image=tiny_image) as session:
        assert len(session._pipeline._workers) == 1
        frames = session.frames()
        next(frames)
        for dream in range(1, 4):
            session.reset()
            assert next(f for f in frames if f.run == dream).index == 0
    assert not any(worker.is_alive() for worker in session._pipeline._workers)
