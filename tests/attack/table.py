"""What each attack costs an honest viewer, as a table. Not a test: run it by hand on a quiet machine.

    python tests/attack/table.py [--name talker] [--seconds 6] [--only TEXT]

The rate of an honest viewer while the sender floods the server stands beside its rate while the same sender floods a
sink that reads and forgets, so that what the sender itself costs the machine counts on both sides. Where the sender
takes a seat, a quiet second viewer has it meanwhile. Loopback only.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
import websockets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from hostile import BINARY, PING, bloated_png, connected, frame, message, upgraded  # noqa: E402

PICTURE, AUDIO = bytes([1]), bytes([2, 1])  # kinds of bytes to the server; audio is the talker's second input
MUCH = 64 * 1024


def forever(*pieces: bytes) -> Callable[[socket.socket], None]:
    """Sends the pieces in turn, many at once where they are short."""
    whole = b"".join(pieces)
    whole *= max(1, MUCH // len(whole))

    def flood(stream: socket.socket) -> None:
        while True:
            stream.sendall(whole)

    return flood


def leave(stream: socket.socket) -> None:
    """Goes at once; the sender comes back."""


def slowly(piece: bytes) -> Callable[[socket.socket], None]:
    def drip(stream: socket.socket) -> None:
        while True:
            stream.sendall(piece)
            time.sleep(1)

    return drip


@dataclass(frozen=True)
class Attack:
    """How a sender floods one connection; `head` is sent first, `streams` connections at once."""

    flood: Callable[[socket.socket], None]
    seat: bool = True
    head: bytes = b""
    streams: int = 1


SAY = {"type": "say", "text": "hello there " * 30}
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ATTACKS = {
    "audio, one sample a message": Attack(forever(frame(AUDIO + b"\x01\x00", BINARY))),
    "audio, 512 KB a message": Attack(forever(frame(AUDIO + bytes(512 * 1024), BINARY))),
    "inputs": Attack(forever(message(type="set", id=1, inputs={"prompt": "a smile"}))),
    "words to speak": Attack(forever(message(**SAY))),
    "resets": Attack(forever(message(type="reset", seed=1, start="calm-black-0"))),
    "nonsense": Attack(forever(frame(b"x"))),
    "pictures of 340,000 chunks": Attack(forever(frame(PICTURE + bloated_png(), BINARY))),
    "messages of 15 MB": Attack(forever(frame(bytes(15 * 2**20), BINARY))),
    "pings": Attack(forever(frame(b"", PING))),
    "a message of empty fragments": Attack(forever(frame(b"", 0, last=False)), head=frame(b"", last=False)),
    "an endless header": Attack(forever(b"a" * MUCH), False, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "),
    "an endless address": Attack(forever(b"a" * MUCH), False, b"GET /"),
    "an endless body": Attack(forever(b"1\r\nx\r\n"), False, POST),
    "1,400 dripping requests": Attack(slowly(b"a"), False, b"GET / HTTP/1.1\r\nX: ", 1400),
    "requests without end": Attack(forever(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"), False),
    "connections that come and go": Attack(leave, False, streams=8),
    "32 streams that come and go": Attack(leave, streams=32),
}


def send(attack: Attack, address: str) -> None:
    """Floods until it is killed; a connection that ends is opened again."""

    def drain(stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while stream.recv(1 << 20):
                pass

    def one() -> None:
        while True:
            try:
                with upgraded(address) if attack.seat else connected(address) as stream:
                    threading.Thread(target=drain, args=(stream,), daemon=True).start()
                    time.sleep(1.0 if attack.seat else 0.0)  # until the session is there
                    stream.sendall(attack.head)
                    attack.flood(stream)
            except (OSError, AssertionError):
                time.sleep(0.05)

    for _ in range(attack.streams):
        threading.Thread(target=one, daemon=True).start()
    time.sleep(3600)


def sink() -> None:
    """Answers like a WebSocket server, reads and forgets. Prints its port."""
    door = socket.create_server(("127.0.0.1", 0), backlog=2000)
    print(door.getsockname()[1], flush=True)

    def swallow(stream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            stream.recv(65536)
            stream.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            while stream.recv(1 << 20):
                pass

    while True:
        threading.Thread(target=swallow, args=(door.accept()[0],), daemon=True).start()


@contextlib.contextmanager
def child(*args: str) -> Iterator[subprocess.Popen]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass
class Honest:
    """A viewer that acknowledges every frame; `came` are the times of its frames."""

    came: list[float] = field(default_factory=list)

    async def watch(self, address: str) -> None:
        async with websockets.connect(address.replace("http", "ws") + "stream", max_size=None) as stream:
            async for said in stream:
                if isinstance(said, bytes) and said[1] == 1:
                    self.came.append(time.monotonic())
                    number = int.from_bytes(said[4:8], "little")
                    await stream.send(json.dumps({"type": "seen", "sequence": number}))


async def rate(honest: Honest, seconds: float) -> tuple[float, float]:
    """Frames a second from now on, and the longest time between two."""
    start = len(honest.came)
    await asyncio.sleep(seconds)
    came = honest.came[start:]
    gaps = [b - a for a, b in pairwise(came)]
    return len(came) / seconds, max(gaps, default=seconds)


def viewers(address: str) -> int:
    with urllib.request.urlopen(address + "health", timeout=30) as answer:
        return json.load(answer)["viewers"]


async def measure(name: str, address: str, null: str, server: psutil.Process, honest: Honest, seconds: float) -> str:
    attack, me = ATTACKS[name], str(Path(__file__))
    quiet = asyncio.create_task(Honest().watch(address)) if attack.seat else None
    await asyncio.sleep(2.5 if attack.seat else 0.5)
    with child(me, "--send", name, null):
        await asyncio.sleep(2)
        beside, _ = await rate(honest, seconds)
    if quiet is not None:
        quiet.cancel()
        while await asyncio.to_thread(viewers, address) > 1:
            await asyncio.sleep(0.1)
    before = server.memory_info().rss
    with child(me, "--send", name, address):
        await asyncio.sleep(2)
        under, gap = await rate(honest, seconds)
        grown, files = server.memory_info().rss - before, server.num_fds()
    left, seat = time.monotonic(), "-"
    if attack.seat:
        while await asyncio.to_thread(viewers, address) > 1:
            await asyncio.sleep(0.05)
        seat = f"{time.monotonic() - left:.1f}"
    await asyncio.sleep(1)
    share = f"{100 * under / beside:.0f}" if beside else "-"
    return f"| {name} | {beside:.1f} | {under:.1f} | {share} | {gap:.2f} | {grown / 2**20:+.0f} | {files} | {seat} |"


async def table(args: argparse.Namespace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    serve = ("-m", "vidistill", "serve", args.name, "--port", str(port), "--max-viewers", "3")
    with child(*serve) as server, child(str(Path(__file__)), "--sink") as other:
        assert server.stdout and other.stdout
        server.stdout.readline()
        address, null = f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{int(other.stdout.readline())}/"
        honest = Honest()
        watching = asyncio.create_task(honest.watch(address))
        await asyncio.sleep(4)
        print("| attack | frames/s, sink | frames/s, server | % | longest gap, s | RSS, MB | files | seat free, s |")
        print("|---|---|---|---|---|---|---|---|")
        for name in ATTACKS:
            if args.only in name:
                print(await measure(name, address, null, psutil.Process(server.pid), honest, args.seconds), flush=True)
        watching.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="talker", help="student that is served (default: talker, which takes audio)")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement (default: 6)")
    parser.add_argument("--only", default="", help="attacks whose names contain this")
    parser.add_argument("--send", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sink", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sink:
        sink()
    elif args.send:
        send(ATTACKS[args.send[0]], args.send[1])
    else:
        asyncio.run(table(args))


if __name__ == "__main__":
    main()
