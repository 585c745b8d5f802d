"""Messages that are right but for one change: each is answered or taken, and the stream goes on."""

import json
import struct
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ACTIONS
from fake_world import Browser, FakeWorld, png, served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidistill.serve import protocol
from vidistill.serve.app import load_world

VALID = [
    {"type": "set", "id": 1, "inputs": {"action": {"forward": 1, "turn_left": 0.5}}},
    {"type": "set", "id": 2, "inputs": {"prompt": "a red ring", "switch": "recache"}},
    {"type": "reset", "seed": 3, "start": "red"},
    {"type": "seen", "sequence": 0},
    {"type": "pause", "on": False},
    {"type": "record", "on": False},
    {"type": "show_history", "on": True},
    {"type": "return_to_start"},
    {"type": "say", "text": "hello"},
    {"type": "clear_audio"},
]
BYTES = [bytes([protocol.INPUT, 0]) + struct.pack("<4h", 1, 2, 3, 4), bytes([protocol.PICTURE]) + png(24, 24)]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=500),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from([*ACTIONS, "self", "switch", "__class__", ""]), st.floats(), max_size=3),
)
HITS: Counter[str] = Counter()


def places(message, at=()):
    """Every key of a message, as a path."""
    for key, value in message.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


@st.composite
def changed(draw):
    """The text of a valid message with one field changed, missing, added or renamed, or its bytes mutated."""
    if draw(st.integers(0, 4)) == 0:
        data = bytearray(draw(st.sampled_from(BYTES)))
        for _ in range(draw(st.integers(1, 3))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        HITS["bytes"] += 1
        return bytes(data[: draw(st.integers(0, len(data)))])
    message = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    path = draw(st.sampled_from(sorted(places(message))))
    inside = message
    for key in path[:-1]:
        inside = inside[key]
    match draw(st.sampled_from(["change", "remove", "add", "rename"])):
        case "change":
            inside[path[-1]] = draw(ODD)
        case "remove":
            del inside[path[-1]]
        case "add":
            inside[draw(st.text(max_size=9))] = draw(ODD)
        case "rename":
            inside[draw(st.sampled_from(["self", "id", "action", "prompt", "tokens", "on"]))] = inside.pop(path[-1])
    HITS[".".join(path)] += 1
    return json.dumps(message)


def survives(examples, fake):
    side = fake.world.size[0]
    with served(fake) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        browser = Browser(socket, side=side)
        browser.note("hello")
        numbers = iter(range(1000, 10**6))

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(changed())
        def answered(message):
            (browser.socket.send_bytes if isinstance(message, bytes) else browser.socket.send_text)(message)
            number = next(numbers)
            browser.say(type="pause", on=False)  # it may have paused
            browser.say(type=f"mark {number}")  # messages are answered in order
            while f"mark {number}" not in browser.note("error")["message"]:
                pass
            browser.frame()

        answered()
        assert app.get("/health").json()["viewers"] == 1
    for field, hits in sorted(HITS.items()):
        print(f"{hits:6d} {field}")


def test_a_message_with_one_change_never_ends_a_stream():
    survives(50, FakeWorld(prompts=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["fake", "talker", "shapes", "doom-relic"])
def test_a_thousand_messages_with_one_change_never_end_a_stream(name):
    survives(1000, FakeWorld(prompts=True) if name == "fake" else SimpleNamespace(world=load_world(name)))
