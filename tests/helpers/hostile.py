"""What a hostile sender sends."""

import zlib

import numpy as np
from fake_world import png


def chunk(kind, data=b""):
    """A chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bloated_png(chunks=340_000):
    """A PNG of so many chunks that hold nothing."""
    head = chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"aaaa") * chunks + chunk(b"IEND")


def broken_pictures(count=40):
    """Small PNGs, each with a few bytes changed."""
    rng, whole = np.random.default_rng(5), np.frombuffer(png(24, 24), np.uint8)
    pictures = []
    for _ in range(count):
        data = whole.copy()
        data[rng.integers(8, len(data), 3)] = rng.integers(0, 256, 3)
        pictures.append(data.tobytes())
    return pictures
