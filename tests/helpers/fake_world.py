"""A world that costs nothing, the app that serves it, and the other end of a connection."""

import contextlib
import io
import json
import socket
import threading
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vidistill.serve import protocol
from vidistill.serve.app import ServeConfig, create_app, server_config
from vidistill.serve.viewer import World
from vidistill.streaming.session import Frame

ACTIONS = ("turn_left", "turn_right", "forward", "backward")
SIZE, CHUNK, FPS, SPEED = 64, 4, 40.0, 4  # px, frames a chunk, frames a second, px a frame


class FakeSession:
    """A panorama of blocks that turns with the keys: each seed has its own, and it begins with the start image."""

    nfe_per_chunk, memory_bytes, frames_per_chunk, queued_audio_s = 5, 1_234_567, CHUNK, 0.0

    def __init__(self, seed=0, image=None, *, fps=FPS, chunk_s=0.0, limit=None):
        self.fps, self.chunk_s, self.limit = fps, chunk_s, limit
        self.closed, self.made, self.inputs, self.said = False, 0, 0, []
        self.navigator = SimpleNamespace(placed=False, remembers=False, map={})
        self.takes = {"action": {"kind": "hold", "names": list(ACTIONS)}}
        self.action = dict.fromkeys(ACTIONS, 0.0)
        self.picture = np.zeros((SIZE, SIZE, 3), np.uint8)
        self.reset(seed=seed, image=image)

    def set(self, *, action=None, prompt=None, switch=None):
        if action is not None:
            self.action = {name: float(action.get(name, 0.0)) for name in ACTIONS}
        self.inputs += 1
        self.said.append((prompt, switch))
        return self.inputs

    def reset(self, *, seed, image):
        rng = np.random.default_rng(seed)
        self.panorama = blocks(rng, 64)
        if image is not None:
            assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
            self.picture = image
        self.panorama[:, :SIZE] = self.picture
        self.heading = 0

    def frames(self):
        for chunk in count():
            action, input_id = self.action, self.inputs
            time.sleep(self.chunk_s)
            for i in range(CHUNK):
                if self.limit is not None and self.made >= self.limit:
                    raise RuntimeError("out of dreams")
                self.heading += round(SPEED * (action["turn_right"] - action["turn_left"]))
                columns = np.arange(self.heading, self.heading + SIZE) % self.panorama.shape[1]
                self.made += 1
                px = self.panorama[:, columns]
                yield Frame(px, chunk * CHUNK + i, chunk, input_id, 0, time.perf_counter(), {})

    def close(self):
        self.closed = True


class FakeWorld:
    """Opens fake sessions and remembers them."""

    session = FakeSession

    def __init__(self, pictures=True, prompts=False, keys=None, **options):
        self.sessions, self.options, self.prompts, self.keys = [], options, prompts, keys
        self.starts = {"blocks": blocks(np.random.default_rng(9), 8), "red": picture(200, 30, 30)} if pictures else None
        self.world = World("fake", (SIZE, SIZE), self.open, self.starts)

    def open(self, seed, image):
        self.sessions.append(self.session(seed, image, **self.options))
        if self.keys:
            self.sessions[-1].takes["action"]["keys"] = self.keys
        if self.prompts:
            self.sessions[-1].takes["prompt"] = {"kind": "text", "switches": ["keep", "recache"]}
        return self.sessions[-1]


def picture(*colour):
    return np.full((SIZE, SIZE, 3), colour, np.uint8)


def blocks(rng, columns):
    """Coloured blocks under a sky, uint8 [SIZE, 8 * columns, 3]."""
    coarse = rng.integers(20, 235, (8, columns, 3), dtype=np.uint8)
    coarse[:3] = coarse[:3] // 6 + np.array([60, 110, 170], np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def png(width=SIZE, height=SIZE, colour=(10, 200, 30)):
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def wait_until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Browser:
    """The other end of a test connection: draws every frame at once, unless told to be slow."""

    def __init__(self, socket, draws=True, side=SIZE):
        self.socket, self.draws, self.side = socket, draws, side

    def say(self, **message):
        self.socket.send_text(json.dumps(message))

    def set(self, number, **inputs):
        self.say(type="set", id=number, inputs=inputs)

    def receive(self):
        """A note as dict, or a frame as (header fields, px)."""
        event = self.socket.receive()
        if event["type"] == "websocket.close":
            return {"type": "closed", "code": event["code"]}
        if (text := event.get("text")) is not None:
            return json.loads(text)
        data = event["bytes"]
        version, kind, encoding, flags, sequence, index, chunk, input_id = protocol.HEADER.unpack_from(data)
        if kind == protocol.SOUND:
            return self.receive()
        assert (version, kind, encoding) == (protocol.VERSION, protocol.FRAME, protocol.RAW)
        if self.draws:
            self.say(type="seen", sequence=sequence)
        header = {"flags": flags, "sequence": sequence, "index": index, "chunk": chunk, "input_id": input_id}
        return header, np.frombuffer(data, np.uint8, offset=protocol.HEADER.size).reshape(self.side, self.side, 3)

    def note(self, kind):
        """The next note of a kind; frames and other notes on the way are passed over."""
        for _ in range(500):
            got = self.receive()
            if isinstance(got, dict) and got["type"] == kind:
                return got
        raise AssertionError(f"no {kind} came")

    def frame(self, where=lambda header: True):
        for _ in range(500):
            got = self.receive()
            if isinstance(got, tuple) and where(got[0]):
                return got
        raise AssertionError("no such frame came")


@contextlib.contextmanager
def served(fake, address="127.0.0.1", **options):
    client = pytest.importorskip("starlette.testclient", reason="needs pip install 'vidistill[test]'").TestClient
    app = create_app(fake.world, ServeConfig(**options))
    with client(app, base_url="http://localhost:8000", client=(address, 50_000)) as app:
        yield app


@contextlib.contextmanager
def running(world, limits=None, **options):
    """The address of a world on a real server at a free port."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs pip install 'vidistill[demo]'")
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        server = uvicorn.Server(server_config(create_app(world, ServeConfig(patience_s=0.5, **options)), limits))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def watching(app, draws=True):
    with app.websocket_connect("ws://localhost:8000/stream") as connection:
        yield Browser(connection, draws)
