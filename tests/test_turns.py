"""Denoiser and decoder on few cores: one computes at a time, the decoder next, and nobody waits for ever."""

import threading
import time
from itertools import islice

import numpy as np

from vidistill.checkpoint import load_codec_of, load_student
from vidistill.stream import StreamConfig, StreamSession
from vidistill.stream.turns import Turns


def waiting(*threads):
    time.sleep(0.05)
    return [t.is_alive() for t in threads]


def test_one_computes_at_a_time_and_the_decoder_comes_first():
    turns, order = Turns(crowded=True), []

    def compute(name, decodes):
        turns.take(decodes)
        order.append(name)
        turns.leave()

    turns.take(decodes=False)
    denoiser = threading.Thread(target=compute, args=("denoiser", False))
    denoiser.start()
    assert waiting(denoiser) == [True]
    decoder = threading.Thread(target=compute, args=("decoder", True))
    decoder.start()
    assert waiting(denoiser, decoder) == [True, True] and not order
    turns.leave()
    for thread in (denoiser, decoder):
        thread.join(10)
    assert order == ["decoder", "denoiser"]


def test_only_who_computes_can_leave():
    turns = Turns(crowded=True)
    turns.take(decodes=False)
    other = threading.Thread(target=turns.leave)
    other.start()
    other.join(10)
    late = threading.Thread(target=turns.take, args=(False,), daemon=True)
    late.start()
    assert waiting(late) == [True]
    turns.leave()
    late.join(10)
    assert not late.is_alive()


def test_with_room_for_both_nobody_waits():
    turns = Turns(crowded=False)
    turns.take(decodes=False)
    turns.take(decodes=True)
    turns.leave()


def test_a_crowded_stream_can_be_left_in_the_middle_of_a_dream_and_begun_again(tiny_student_path, tiny_image):
    bundle, many = load_student(tiny_student_path), StreamConfig(threads=64, decode_threads=64)
    with StreamSession(bundle, load_codec_of(bundle), many, image=tiny_image) as session:
        first, second = session.latents(), session.latents()
        assert next(first).shape == next(second).shape
        assert len(list(islice(second, 3))) == 3


def test_a_crowded_stream_gives_the_frames_of_a_plain_one(tiny_student_path, tiny_image):
    bundle, made = load_student(tiny_student_path), []
    for cfg in (StreamConfig(pipelined=False), StreamConfig(threads=1, decode_threads=64)):
        with StreamSession(bundle, load_codec_of(bundle), cfg, image=tiny_image) as session:
            made.append(np.stack([frame.px for frame in islice(session.frames(), 40)]))
    assert np.array_equal(*made)
