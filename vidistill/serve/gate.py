"""What stands before the web server: limits on a connection that count before anything it sends is understood."""

import asyncio
import ipaddress
import logging
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

PIECE = 4096  # bytes that are parsed at once; of the smallest frames they cost milliseconds
LINGER_S = 5.0  # after a connection is closed, how long what was written waits to be taken
WATCH_S = 0.25  # how often a connection that is not read is asked whether somebody is still there
POLLRDHUP = getattr(select, "POLLRDHUP", 0)  # of Linux; elsewhere the first write that fails tells


@dataclass(frozen=True)
class Limits:
    """What connections may cost. A connection from this machine counts towards no address.

    `connections` in all, where the oldest without a request makes room, and `per_address`. `request_s`: from one
    answer to the next complete request. `head_bytes` of a request, its address included. `fragments` of a WebSocket's
    message, which are kept until its last one comes. `share` of the event loop's time that parsing may take, of all
    connections together.
    """

    connections: int = 256
    per_address: int = 32
    request_s: float = 10.0
    head_bytes: int = 16 * 1024
    fragments: int = 1024
    share: float = 0.1


class Budget:
    """`rate` a second on average, `burst` at once; what is over is late, not lost."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def take(self, cost: float = 1.0) -> float:
        """Seconds to wait after this."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - cost
        self._at = now
        return max(0.0, -self._left / self._rate)


def address_of(host: str) -> str | None:
    """Whom a connection counts towards: an IPv4 address or an IPv6 network; None: this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return None
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def hung_up(socket: Any) -> bool:
    """Whether the other end has closed, even if not all that it sent was read."""
    if not POLLRDHUP or socket.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(socket.fileno(), POLLRDHUP)
    return bool(poll.poll(0))


class Fragments:
    """Follows the frames of a WebSocket by their headers. Source: RFC 6455, section 5.2."""

    def __init__(self) -> None:
        self.count = 0  # of the message that is not complete yet
        self._head, self._payload = bytearray(), 0  # of the next frame, as far as it has come; bytes left of this one

    def see(self, data: bytes) -> int:
        """Take in what comes next; returns the most fragments that a message had meanwhile."""
        at, most = 0, self.count
        while at < len(data):
            if self._payload:
                taken = min(self._payload, len(data) - at)
                self._payload, at = self._payload - taken, at + taken
                continue
            self._head.append(data[at])
            at += 1
            if len(self._head) < 2:
                continue
            extended = {126: 2, 127: 8}.get(self._head[1] & 127, 0)
            if len(self._head) == 2 + extended + 4 * (self._head[1] >> 7):  # with the mask, if there is one
                long = int.from_bytes(self._head[2 : 2 + extended], "big")
                self._payload = long if extended else self._head[1] & 127
                if not self._head[0] & 8:  # pings may come between fragments
                    self.count = 0 if self._head[0] & 128 else self.count + 1
                    most = max(most, self.count)
                self._head.clear()
        return most


class Gates:
    """All connections of a server, in the order they came; called by it for each new one as a protocol class is."""

    def __init__(
        self, limits: Limits, inner: Callable[..., Any], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.limits, self.clock, self._inner = limits, clock, inner
        self.open: dict[Gate, str | None] = {}  # and whom each counts towards
        self.busy: set[Gate] = set()  # those of which something waits to be parsed

    def __call__(self, config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> "Gate":
        return Gate(self, self._inner(config=config, server_state=server_state, app_state=app_state, _loop=_loop))

    def admit(self, gate: "Gate", address: str | None) -> bool:
        if address is not None and sum(one == address for one in self.open.values()) >= self.limits.per_address:
            return False
        if len(self.open) >= self.limits.connections:
            oldest = next((one for one in self.open if not one.upgraded), None)
            if oldest is None:
                return False
            self.open.pop(oldest)
            oldest.drop()
        self.open[gate] = address
        return True


class Gate(asyncio.Protocol):
    """One connection: hands what comes to the protocol behind it a little at a time, and closes what idles."""

    def __init__(self, gates: Gates, inner: Any) -> None:
        self._gates, self._inner, self._loop = gates, inner, asyncio.get_running_loop()
        self._waiting = bytearray()  # not parsed yet: no more than one read, as reading stops until it is
        self._holds: set[str] = set()  # why no more is parsed for now
        self._admitted = self.upgraded = False
        self._fragments = Fragments()
        self._next: asyncio.TimerHandle | None = None  # when to look again
        self._ready_at = 0.0  # when the next piece may be parsed
        self._due: asyncio.TimerHandle | None = None  # when a request must have been answered
        self._closing: asyncio.TimerHandle | None = None  # when it is over

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        host = (transport.get_extra_info("peername") or ("",))[0]
        self._admitted = self._gates.admit(self, address_of(host))
        if not self._admitted:
            transport.abort()
            return
        self.expect()
        self._inner.connection_made(Through(self))

    def data_received(self, data: bytes) -> None:
        if not self._admitted:
            return
        self._waiting += data
        self._gates.busy.add(self)
        self.transport.pause_reading()
        if self._next is None:
            self._go_on()

    def _go_on(self) -> None:
        """Parse a piece if it is time, then look again; read more once nothing waits."""
        self._next = None
        if self.transport.is_closing():
            return
        if not self._holds and self._loop.time() >= self._ready_at:
            if not self._waiting:
                self._gates.busy.discard(self)
                return self.transport.resume_reading()
            self._parse()
        if hung_up(self.transport.get_extra_info("socket")):  # who has left is not read to the end
            return self.drop()
        wait = WATCH_S if self._holds else min(WATCH_S, self._ready_at - self._loop.time())
        self._next = self._loop.call_later(max(0.0, wait), self._go_on)

    def _parse(self) -> None:
        piece = bytes(self._waiting[:PIECE])
        del self._waiting[:PIECE]
        began = self._gates.clock()
        if self.upgraded and self._fragments.see(piece) > self._gates.limits.fragments:
            return self.drop()
        try:
            self._inner.data_received(piece)
        except Exception:
            log.exception("a connection was dropped: what it sent could not be parsed")
            self.drop()
        # A connection waits longer where others wait too: all of them together keep to the share.
        spent = (self._gates.clock() - began) * len(self._gates.busy)
        self._ready_at = self._loop.time() + spent * (1 / self._gates.limits.share - 1)

    def hold(self, why: str) -> None:
        """Parse no more for now."""
        self._holds.add(why)

    def release(self, why: str) -> None:
        """Go on, unless it is held for another reason."""
        self._holds.discard(why)
        if not self._holds and self._next is not None:
            self._next.cancel()
            self._next = self._loop.call_at(self._ready_at, self._go_on)

    def expect(self) -> None:
        """From now on a request must be complete, and answered, before long."""
        if self._due is not None:
            self._due.cancel()
        if not self.upgraded:
            self._due = self._loop.call_later(self._gates.limits.request_s, self.drop)

    def upgrade(self, inner: Any) -> None:
        """A WebSocket once it is answered; from then on its own protocol asks for signs of life."""
        self._inner, self.upgraded = inner, True

    def drop(self) -> None:
        self.transport.abort()

    def close(self) -> None:
        """Close once what was written is taken, or after a while: it is kept in memory until then."""
        self.transport.close()
        if self._closing is None:
            self._closing = self._loop.call_later(LINGER_S, self.drop)

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._next, self._due, self._closing):
            if timer is not None:
                timer.cancel()
        self._gates.open.pop(self, None)
        self._gates.busy.discard(self)
        if self._admitted:
            self._inner.connection_lost(error)

    def eof_received(self) -> Any:
        return self._inner.eof_received() if self._admitted else None

    def pause_writing(self) -> None:
        self.hold("answers")  # nobody takes them: what would be answered to more waits as well
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()
        self.release("answers")


class Through:
    """The transport of a gate, as the protocol behind it sees it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gate.transport, name)

    def write(self, data: bytes) -> None:
        self._gate.expect()
        self._gate.transport.write(data)

    def close(self) -> None:
        self._gate.close()

    def pause_reading(self) -> None:
        self._gate.hold("messages")

    def resume_reading(self) -> None:
        self._gate.release("messages")

    def set_protocol(self, protocol: Any) -> None:
        self._gate.upgrade(protocol)
