"""What a hostile sender sends, by plain sockets."""

import json
import random
import socket
import zlib

from fake_world import png

TEXT, BINARY, PING = 0x1, 0x2, 0x9


def connected(address):
    """A plain connection to http://HOST:PORT/."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def upgraded(address):
    """A connection that became a WebSocket."""
    stream = connected(address)
    host = address.removeprefix("http://").rstrip("/")
    stream.sendall(
        f"GET /stream HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    assert stream.recv(4096).startswith(b"HTTP/1.1 101")
    return stream


def frame(payload, kind=TEXT, last=True):
    """A WebSocket frame, masked with zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0xFF]) + size.to_bytes(8, "big")
    return bytes([0x80 * last | kind]) + length + bytes(4) + payload


def message(**fields):
    return frame(json.dumps(fields).encode())


def chunk(kind, data=b""):
    """A chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bloated_png(chunks=340_000):
    """A PNG of so many chunks that hold nothing."""
    head = chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"aaaa") * chunks + chunk(b"IEND")


def broken_pictures(count=40):
    """Small PNGs, each with a few bytes changed."""
    drawn, whole = random.Random(5), png(24, 24)
    pictures = []
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(3):
            data[drawn.randrange(8, len(data))] = drawn.randrange(256)
        pictures.append(bytes(data))
    return pictures
