"""Requests and WebSocket frames that are right but for one change: answered or cut off, and the server goes on."""

import contextlib
import json
import socket
import threading
import urllib.request
from collections import Counter

import pytest
from fake_world import FakeWorld, running, wait_until
from hostile import connected, message, upgraded
from hypothesis import given, settings
from hypothesis import strategies as st

from vidistill.serve.gate import Limits

pytestmark = pytest.mark.timeout(600)

HEADERS = {
    "Host": "localhost",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Origin": "http://localhost",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
    "Sec-WebSocket-Protocol": "chat",
    "Cookie": "vidistill_token=x",
    "Content-Length": "0",
}
LINE = ("GET", "/stream", "HTTP/1.1")
ODD = st.one_of(
    st.sampled_from(["", "*", "-1", "9" * 30, "chunked", "websocket, h2c", "[", "[::1", "%00", "/../../etc/passwd"]),
    st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=60),
    st.integers(0, 20_000).map(lambda n: "a" * n),
)


def few(examples):
    return settings(max_examples=examples, deadline=None, database=None, derandomize=True)


def show(hits):
    for field, number in sorted(hits.items(), key=str):
        print(f"{number:6d} {field}")


def health(address):
    with urllib.request.urlopen(address + "health", timeout=30) as answer:
        return json.load(answer)


def answer(stream):
    """The first bytes of what comes back; none where the connection ends."""
    stream.settimeout(20)
    try:
        return stream.recv(4096)
    except ConnectionError:
        return b""


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_request_with_one_change_is_answered_or_cut_off(examples):
    hits, fields = Counter(), [*HEADERS, "method", "path", "version"]
    with running(FakeWorld().world, Limits(request_s=0.5), max_viewers=2) as address:

        def change(field, value, how):
            line, headers = dict(zip(("method", "path", "version"), LINE, strict=True)), list(HEADERS.items())
            if field in line:
                line[field] = value
            elif how == "double":
                headers.append((field, value))
            else:
                kept = [] if how == "remove" else [(field, value)]
                headers = [(name, said) for name, said in headers if name != field] + kept
            text = " ".join(line.values()) + "\r\n" + "".join(f"{name}: {said}\r\n" for name, said in headers) + "\r\n"
            with connected(address) as stream, contextlib.suppress(ConnectionError):
                stream.sendall(text.encode("latin-1"))
                said = answer(stream)
                hits[field, said[9:12].decode() if said.startswith(b"HTTP/1.1 ") else "cut off"] += 1
                assert said[:9] in (b"HTTP/1.1 ", b"") and said[9:10] != b"5", said

        for field in fields:
            some = few(1 + examples // len(fields))
            some(given(st.just(field), ODD, st.sampled_from(["change", "remove", "double"]))(change))()
        assert health(address)["max_viewers"] == 2
    show(hits)
    assert {field for field, _ in hits} == set(fields)


def framed(first, length, mask, payload):
    """A frame of these very fields, right or not."""
    kind = 127 if length > 65_535 else 126 if length > 125 else length
    size = b"" if kind == length else length.to_bytes(8 if kind == 127 else 2, "big")
    return bytes([first, 0x80 * mask | kind]) + size + bytes(4 * mask) + payload


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_frame_with_one_change_ends_its_own_connection_at_most(examples):
    hits, payload = Counter(), json.dumps({"type": "pause", "on": False}).encode()
    with running(FakeWorld().world, max_viewers=2) as address, upgraded(address) as honest:
        came = []

        def read():
            with contextlib.suppress(OSError):  # closed at the end
                came.extend(iter(lambda: len(honest.recv(65_536)), 0))

        threading.Thread(target=read, daemon=True).start()

        @few(examples)
        @given(
            st.sampled_from(["opcode", "reserved", "fin", "mask", "length", "payload", "close", "ping"]),
            st.integers(0, 255),
            st.one_of(st.integers(0, 200), st.sampled_from([65_536, 2**31, 2**62])),
            st.binary(max_size=130),
        )
        def change(field, byte, length, data):
            first = {
                "opcode": 0x80 | byte & 15,
                "reserved": 0x81 | byte & 0x70,
                "fin": 0x01,
                "close": 0x88,
                "ping": 0x89,
            }
            body = data if field in ("payload", "close", "ping") else payload
            with upgraded(address) as stream, contextlib.suppress(OSError):
                size = length if field == "length" else len(body)
                stream.sendall(framed(first.get(field, 0x81), size, field != "mask", body))
                stream.sendall(message(type="pause", on=False))
                stream.shutdown(socket.SHUT_WR)
                stream.settimeout(20)
                while stream.recv(65_536):
                    pass
            hits[field] += 1

        change()
        assert health(address)["viewers"] >= 1
        before = len(came)
        wait_until(lambda: len(came) > before, 20)
    show(hits)
    assert len(hits) == 8
