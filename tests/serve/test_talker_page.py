"""An avatar over the wire: sound in, pictures with their sound out, words spoken, interruptions."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from conftest import SIDE
from fake_world import FakeWorld, served, watching
from tiny_talker import write_talker

from vidistill.conditioning.audio import to_pcm16
from vidistill.io import save_png
from vidistill.serve import protocol
from vidistill.serve.app import load_world

pytestmark = pytest.mark.timeout(60)


AUDIO = bytes([protocol.INPUT, 1])  # the talker takes a prompt and audio


class Talker:
    """Something that is served: a world, as `fake_world.served` takes it."""

    def __init__(self, world):
        self.world = world


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    folder = write_talker(tmp_path_factory.mktemp("talker"))
    (folder / "starts").mkdir()
    save_png(folder / "starts" / "anna.png", np.full((SIDE, SIDE, 3), 120, np.uint8))
    return Talker(load_world(str(folder / "student"), folder / "starts"))


def listen(socket, where, count=2000):
    """Events of a connection as (kind, payload) until one fits; pictures are acknowledged."""
    for _ in range(count):
        event = socket.receive()
        if (text := event.get("text")) is not None:
            got = json.loads(text)["type"], json.loads(text)
        else:
            data = event["bytes"]
            _, kind, _, _, sequence, index, *_ = protocol.HEADER.unpack_from(data)
            if kind == protocol.FRAME:
                socket.send_text(json.dumps({"type": "seen", "sequence": sequence}))
            got = kind, (index, np.frombuffer(data, "<i2", offset=protocol.HEADER.size))
        if where(*got):
            return got[1]
    raise AssertionError("it did not come")


def speech(seconds, level=0.4):
    return to_pcm16(np.full(round(seconds * 16_000), level, np.float32))


def loud(kind, got):
    return kind == protocol.SOUND and abs(got[1]).max() > 1000


def silent(kind, got):
    return kind == protocol.SOUND and not got[1].any()


def send(socket, **message):
    socket.send_text(json.dumps(message))


def test_sound_that_is_sent_comes_back_with_its_pictures_and_its_delay_is_told(talker):
    with served(talker) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        hello = listen(socket, lambda kind, got: kind == "hello")
        assert hello["takes"]["audio"]["rate"] == 16_000
        index, samples = listen(socket, silent)
        assert len(samples) == 1000
        socket.send_bytes(AUDIO + speech(3.0).tobytes())
        later, samples = listen(socket, loud)
        assert later > index and samples.max() == pytest.approx(0.4 * 32767, abs=2)
        stats = listen(socket, lambda kind, got: kind == "stats" and got["lips_ms"])
        assert stats["lips_ms"] > 0


def test_an_interruption_ends_what_is_said_and_the_dream_goes_on(talker):
    with served(talker) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        listen(socket, lambda kind, got: kind == "hello")
        socket.send_bytes(AUDIO + speech(20.0).tobytes())
        spoken, _ = listen(socket, loud)
        send(socket, type="clear_audio")
        quiet, _ = listen(socket, silent)
        assert 0 < quiet - spoken < 60  # twenty seconds are 320 pictures
        socket.send_bytes(AUDIO + speech(1.0).tobytes())
        assert listen(socket, loud)[0] > quiet


def test_sound_is_bounded_and_not_heard_while_paused(talker, monkeypatch):
    monkeypatch.setattr("vidistill.serve.viewer.MAX_QUEUED_AUDIO_S", 5)
    with served(talker) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        listen(socket, lambda kind, got: kind == "hello")
        for _ in range(2):
            socket.send_bytes(AUDIO + speech(20.0).tobytes())
        assert "wait already" in listen(socket, lambda kind, got: kind == "error")["message"]
        send(socket, type="clear_audio")
        send(socket, type="pause", on=True)
        socket.send_bytes(AUDIO + speech(2.0).tobytes())
        send(socket, type="pause", on=False)
        listen(socket, silent)
        heard = [listen(socket, lambda kind, got: kind == protocol.SOUND)[1] for _ in range(40)]
        assert not any(samples.any() for samples in heard[12:])  # what was made before the interruption is shown


def test_words_are_spoken_in_turn_and_an_interruption_reaches_those_that_are_not_spoken_yet(talker):
    began, go, said = threading.Event(), threading.Event(), []

    def speak(text):
        said.append(text)
        began.set()
        assert go.wait(10)
        return np.full(16_000, 0.4, np.float32)

    world = Talker(replace(talker.world, speak=speak))
    with served(world) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        listen(socket, lambda kind, got: kind == "hello")
        send(socket, type="say", text="first")
        send(socket, type="say", text="second")
        assert began.wait(5)
        send(socket, type="clear_audio")
        listen(socket, silent)
        assert said == ["first"]
        go.set()
        for _ in range(30):
            assert listen(socket, lambda kind, got: kind == protocol.SOUND)[1].max() == 0
        assert said == ["first", "second"]


def test_words_are_spoken(talker):
    pytest.importorskip("espeakng_loader")
    with served(talker) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        assert listen(socket, lambda kind, got: kind == "hello")["speaks"]
        send(socket, type="say", text="hello there, how are you today")
        listen(socket, loud)


def test_half_a_sample_is_refused(talker):
    with served(talker) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        listen(socket, lambda kind, got: kind == "hello")
        socket.send_bytes(AUDIO + b"abc")
        assert "16-bit" in listen(socket, lambda kind, got: kind == "error")["message"]


def test_a_world_without_audio_says_so():
    with served(FakeWorld()) as app, watching(app) as browser:
        assert "audio" not in browser.note("hello")["takes"]
        browser.say(type="clear_audio")
        assert "takes no audio" in browser.note("error")["message"]
        browser.say(type="say", text="")
        assert "say.text" in browser.note("error")["message"]
