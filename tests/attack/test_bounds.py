"""What a hostile sender cannot do: counts of what waits, of what is done, and where it is done. Loopback only."""

import asyncio
import contextlib
import gc
import json
import logging
import threading
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_world import FakeSession, FakeWorld, png, running, served, wait_until, watching
from hostile import PING, TEXT, bloated_png, broken_pictures, connected, frame, upgraded

from vidistill.conditioning.audio import AudioConfig, Track
from vidistill.serve import protocol
from vidistill.serve.app import REQUESTS_AT_ONCE, REQUESTS_S, Seats, ServeConfig, run
from vidistill.serve.gate import LINGER_S, PIECE, WATCH_S, Budget, Fragments, Gates, Limits, address_of
from vidistill.serve.log import LINES, Few
from vidistill.serve.outbox import MAX_NOTES
from vidistill.serve.player import Player
from vidistill.serve.recorder import Recordings
from vidistill.serve.viewer import COSTS, MESSAGES_AT_ONCE, MESSAGES_S, Viewer, ViewerConfig

pytestmark = pytest.mark.timeout(60)


# --- sound --------------------------------------------------------------------------------------------------------


def test_sound_in_the_smallest_pieces_is_kept_in_few_of_them():
    cfg, one = AudioConfig(), np.full(1, 0.25, np.float32)
    track = Track(cfg)
    for i in range(20_000):
        track.push(one * (i % 3), float(i))
        assert track.waiting == i + 1
    assert len(track._queue) <= 1 + 20_000 // cfg.samples
    track.take(0, 4)
    assert np.array_equal(track.sound(1), 0.25 * (np.arange(cfg.samples, 2 * cfg.samples) % 3).astype(np.float32))
    placed = 20_000 - track.waiting
    assert placed == (4 + cfg.lookahead) * cfg.samples and track.came_at(0) == 0.0
    track.clear_audio()
    assert track.waiting == 0


# --- resets -----------------------------------------------------------------------------------------------------------


class Slow(FakeSession):
    """Starts again only when it may, and counts how often."""

    def __init__(self, *args, **kw):
        self.starts, self.may = [], threading.Event()
        self.may.set()
        super().__init__(*args, **kw)

    def reset(self, *, seed, image):
        assert self.may.wait(20)
        self.starts.append(seed)
        super().reset(seed=seed, image=image)


def test_of_many_resets_the_newest_is_done_and_no_other():
    session = Slow()
    player = Player(lambda: session, lambda: None)
    wait_until(lambda: session.made > 0)
    session.may.clear()
    player.reset(1, None)
    wait_until(lambda: player._start is None)  # the first one is being done
    for seed in range(2, 3000):
        player.reset(seed, None)
    session.may.set()
    wait_until(lambda: session.starts[-1] == 2999)
    assert session.starts == [0, 1, 2999]
    player.close()
    wait_until(lambda: player.finished)


def test_a_player_that_closes_does_not_begin_what_was_asked_for_before():
    session = Slow()
    player = Player(lambda: session, lambda: None)
    wait_until(lambda: session.made > 0)
    session.may.clear()
    player.reset(1, None)
    wait_until(lambda: player._start is None)
    player.reset(2, None)
    player.close()
    session.may.set()
    wait_until(lambda: player.finished)
    assert session.starts == [0, 1] and session.closed


def test_memory_of_a_session_is_free_when_its_viewer_has_gone_without_a_collection():
    fake, alive = FakeWorld(), []

    def opened(seed, image):
        session = FakeSession(seed, image)
        alive.append(weakref.ref(session))
        return session

    fake.world = replace(fake.world, open=opened)
    gc.collect()
    gc.disable()
    try:
        with served(fake) as app:
            for _ in range(3):
                with watching(app) as browser:
                    browser.frame()
            wait_until(lambda: app.get("/health").json()["viewers"] == 0)
            wait_until(lambda: not any(session() for session in alive))
    finally:
        gc.enable()
    assert len(alive) == 3


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_decoded_one_at_a_time_beside_the_event_loop_and_the_newest_wins(monkeypatch):
    fake, go, seen, at_once = FakeWorld(), threading.Event(), [], []
    decode = protocol.read_picture

    def watched(data, size):
        seen.append(threading.current_thread().name)
        at_once.append(sum(1 for _ in seen) - done[0])
        assert go.wait(20)
        done[0] += 1
        return decode(data, size)

    done = [0]
    monkeypatch.setattr(protocol, "read_picture", watched)
    with served(fake, max_viewers=2) as app, watching(app) as one, watching(app) as two:
        for browser in (one, two):
            browser.note("hello")
            for _ in range(50):
                browser.socket.send_bytes(bytes([protocol.PICTURE]) + png())
        one.frame(lambda header: header["index"] > 20)  # frames go on
        go.set()
        for browser in (one, two):
            browser.note("picture")
        wait_until(lambda: done[0] == len(seen))
    assert len(seen) <= 4 and set(at_once) == {1}, "one that is decoded and the newest after it, of each viewer"
    assert all(name.startswith("asyncio_") for name in seen), seen


def test_a_picture_of_endless_chunks_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda *args, **kw: pytest.fail("it was decoded"))
    with pytest.raises(protocol.MessageError, match="more than"):
        protocol.read_picture(bloated_png(), (64, 64))


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError, ZeroDivisionError])
def test_whatever_a_decoder_raises_is_answered(monkeypatch, error):
    monkeypatch.setattr("PIL.Image.open", lambda *args, **kw: (_ for _ in ()).throw(error("inside")))
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.note("hello")
        browser.socket.send_bytes(bytes([protocol.PICTURE]) + png())
        assert "read" in browser.note("error")["message"]
        browser.frame(lambda header: header["index"] > 8)


@pytest.mark.parametrize("picture", broken_pictures(), ids=lambda data: f"{len(data)} bytes")
def test_broken_pictures_are_message_errors(picture):
    with contextlib.suppress(protocol.MessageError):
        protocol.read_picture(picture, (64, 64))


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_budget_lets_a_burst_through_and_spreads_the_rest():
    now = [0.0]
    budget = Budget(10.0, 5.0, lambda: now[0])
    assert [budget.take() for _ in range(5)] == [0.0] * 5
    assert [round(budget.take(), 6) for _ in range(3)] == [0.1, 0.2, 0.3]
    now[0] = 100.0
    assert budget.take(5.0) == 0.0 and budget.take(20.0) == 2.0


class Deaf:
    """A connection that sends without end and takes nothing; counts what was read of it."""

    def __init__(self, **event):
        self.event, self.read = {"type": "websocket.receive", **event}, 0

    async def receive(self):
        self.read += 1
        return self.event

    async def send_json(self, note):
        await asyncio.Event().wait()

    send_bytes = send_json


def flooded(fake, socket, seconds=0.5):
    """The viewer of a connection, after so long."""

    async def serve():
        viewer = Viewer(socket, fake.world, ViewerConfig(), Recordings(), asyncio.Lock())
        task = asyncio.create_task(viewer.run())
        await asyncio.sleep(seconds)
        viewer.player.close()
        task.cancel()
        await asyncio.wait([task])
        return viewer

    return asyncio.run(serve())


def test_notes_that_nobody_reads_stay_few_and_so_does_what_is_read_for_them():
    socket = Deaf(text="nonsense")
    viewer = flooded(FakeWorld(), socket)
    assert len(viewer._out._notes) <= MAX_NOTES + 2 and socket.read <= MAX_NOTES + 2


def test_messages_are_read_at_a_bounded_rate_and_long_ones_count_for_more():
    for event, most in (({"text": '{"type": "seen", "sequence": 0}'}, 1), ({"bytes": bytes(2**19)}, 32)):
        socket = Deaf(**event)
        flooded(FakeWorld(), socket)
        assert 0 < socket.read <= (MESSAGES_AT_ONCE + 2 * MESSAGES_S) / most + 2


def test_resets_are_read_at_the_rate_of_a_hand():
    socket = Deaf(text='{"type": "reset", "seed": 1, "start": "red"}')
    flooded(FakeWorld(), socket, 1.0)
    assert socket.read <= (MESSAGES_AT_ONCE + 2 * MESSAGES_S) / COSTS[protocol.Reset] + 20  # some come before the hello


def test_recordings_of_one_viewer_are_saved_one_at_a_time(monkeypatch):
    go, saving = threading.Event(), []
    monkeypatch.setattr(Recordings, "write", lambda self, clip, fps: saving.append(len(clip)) or go.wait(20) or "x.mp4")
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.note("hello")
        browser.say(type="record", on=True)
        browser.frame(lambda header: header["flags"] & protocol.RECORDING)
        browser.say(type="record", on=False)
        browser.say(type="record", on=True)
        assert "still being saved" in browser.note("error")["message"] and len(saving) == 1
        go.set()


# --- connections ------------------------------------------------------------------------------------------------------


class Transport:
    """Of a connection from `host`; remembers what was done to it."""

    def __init__(self, host="127.0.0.1"):
        self.host, self.reading, self.gone, self.closed = host, True, False, False

    def get_extra_info(self, name):
        return {"peername": (self.host, 1), "socket": SimpleNamespace(fileno=lambda: -1)}.get(name)

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def is_closing(self):
        return self.gone

    def abort(self):
        self.gone = True

    def close(self):
        self.closed = True


class Loop:
    """An event loop whose time passes when it is told to."""

    def __init__(self):
        self.now, self.due = 0.0, []

    def time(self):
        return self.now

    def call_at(self, when, call):
        self.due.append(SimpleNamespace(when=when, call=call))
        self.due[-1].cancel = lambda one=self.due[-1]: one in self.due and self.due.remove(one)
        return self.due[-1]

    def call_later(self, delay, call):
        return self.call_at(self.now + delay, call)

    def run(self, until):
        while ready := [one for one in self.due if one.when <= until]:
            first = min(ready, key=lambda one: one.when)
            self.due.remove(first)
            self.now = max(self.now, first.when)
            first.call()
        self.now = max(self.now, until)


class Inner:
    """A protocol that takes `cost` seconds for each piece."""

    def __init__(self, loop, cost):
        self.loop, self.cost, self.pieces = loop, cost, []

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.loop.now += self.cost
        self.pieces.append(len(data))

    def connection_lost(self, error):
        pass

    def pause_writing(self):
        pass

    resume_writing = pause_writing


@pytest.fixture
def gated(monkeypatch):
    """Opens connections from hosts, of one server; returns its loop and (gate, transport) of each."""
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)

    def opened(limits, hosts, cost=0.0):
        gates = Gates(limits, lambda **kw: Inner(loop, cost), loop.time)
        connections = [(gates(None, None, None), Transport(host)) for host in hosts]
        for gate, transport in connections:
            gate.connection_made(transport)
        return loop, connections

    return opened


def test_a_flood_is_parsed_for_its_share_of_the_time_and_nothing_is_read_meanwhile(gated):
    loop, [(gate, transport)] = gated(Limits(share=0.1, request_s=1e9), ["127.0.0.1"], cost=0.01)
    gate.data_received(bytes(10 * PIECE))
    for piece in range(1, 10):
        assert gate._inner.pieces == [PIECE] * piece and not transport.reading
        loop.run(0.1 * piece + 1e-6)
    loop.run(2.0)
    assert gate._inner.pieces == [PIECE] * 10 and transport.reading


def test_several_floods_share_what_one_would_have(gated):
    loop, connections = gated(Limits(share=0.1, request_s=1e9), ["127.0.0.1"] * 4, cost=0.01)
    for gate, _ in connections:
        gate.data_received(bytes(100 * PIECE))
    loop.run(4.0)
    assert 30 <= sum(len(gate._inner.pieces) for gate, _ in connections) <= 50  # 10 ms each: a tenth of 4 s


def test_a_protocol_that_takes_no_more_is_given_no_more(gated):
    loop, [(gate, transport)] = gated(Limits(request_s=1e9), ["127.0.0.1"])
    gate._inner.transport.pause_reading()
    gate.data_received(bytes(3 * PIECE))
    loop.run(5.0)
    assert not gate._inner.pieces and not transport.reading
    gate._inner.transport.resume_reading()
    loop.run(5.1)
    assert len(gate._inner.pieces) == 3 and transport.reading


@pytest.mark.parametrize("step", [1, 3, 5, 100_000])
def test_fragments_are_counted_however_they_come(step):
    first, more, last = frame(b"a", TEXT, False), frame(bytes(70_000), 0, False), frame(b"", 0, True)
    sent = frame(b"x" * 200) + first + more + frame(b"", PING) + more + last + first
    fragments, counts = Fragments(), []
    for at in range(0, len(sent), step):
        counts.append(fragments.see(sent[at : at + step]))
    assert max(counts) == 3 and fragments.count == 1


@pytest.mark.parametrize("whole", [True, False])
def test_a_message_of_endless_fragments_ends_its_connection(gated, whole):
    """Many messages do not, and pings between the fragments do not help."""
    loop, [(gate, transport)] = gated(Limits(share=0.99, request_s=1e9, fragments=50), ["127.0.0.1"])
    gate.upgrade(gate._inner)
    gate.data_received(frame(b"", TEXT, whole))
    for _ in range(200):
        gate.data_received(frame(b"", 0, False) * (not whole) + frame(b"", PING) + frame(b"") * whole)
        loop.run(loop.now + 1)
    assert transport.gone is not whole


def test_a_server_ends_a_message_of_endless_fragments():
    fake = FakeWorld()
    with running(fake.world) as address, upgraded(address) as stream:
        wait_until(lambda: fake.sessions)
        with contextlib.suppress(OSError):
            stream.sendall(frame(b"a", TEXT, False))
            for _ in range(40):
                stream.sendall(frame(b"", 0, False) * 100)
                time.sleep(0.02)
        assert ends(stream)


def test_who_takes_no_answers_is_not_read(gated):
    loop, [(gate, transport)] = gated(Limits(request_s=1e9), ["127.0.0.1"])
    gate.pause_writing()
    gate.data_received(bytes(3 * PIECE))
    gate._inner.transport.pause_reading()
    gate._inner.transport.resume_reading()  # of messages there are few
    loop.run(5.0)
    assert not gate._inner.pieces and not transport.reading
    gate.resume_writing()
    loop.run(5.1)
    assert len(gate._inner.pieces) == 3 and transport.reading


def test_what_nobody_takes_from_a_closed_connection_is_thrown_away(gated):
    loop, [(gate, transport)] = gated(Limits(request_s=1e9), ["127.0.0.1"])
    gate._inner.transport.close()
    loop.run(LINGER_S - 0.1)
    assert transport.closed and not transport.gone
    loop.run(LINGER_S + 0.1)
    assert transport.gone


def test_who_has_left_is_not_read_to_the_end(gated, monkeypatch):
    loop, [(gate, transport)] = gated(Limits(request_s=1e9), ["127.0.0.1"], cost=0.01)
    gate.data_received(bytes(100 * PIECE))
    monkeypatch.setattr("vidistill.serve.gate.hung_up", lambda socket: True)
    loop.run(WATCH_S)
    assert transport.gone and len(gate._inner.pieces) <= 2


def test_a_request_must_be_answered_before_long_and_a_stream_need_not(gated):
    loop, [(asks, lost), (answered, kept), (stream, watched)] = gated(Limits(request_s=10.0), ["127.0.0.1"] * 3)
    for transport in (kept, watched):
        transport.write = lambda data: None
    stream._inner.transport.set_protocol(stream._inner)
    stream._inner.transport.write(b"HTTP/1.1 101")
    for second in range(1, 12):
        loop.run(float(second))
        asks.data_received(b"G")  # a drip is no request
        if second == 9:
            answered._inner.transport.write(b"HTTP/1.1 200")
    assert (lost.gone, kept.gone, watched.gone) == (True, False, False)


def test_a_stream_that_is_never_answered_is_ended():
    """One HTTP parser takes this header, the next one does not, and says nothing."""
    with running(FakeWorld().world, Limits(request_s=0.5)) as address, connected(address) as stream:
        stream.sendall(
            b"GET /stream HTTP/1.1\r\nHost: localhost\x08\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert ends(stream)


def test_one_address_has_few_connections_and_this_machine_as_many_as_there_are(gated):
    limits = Limits(connections=20, per_address=4)
    _, far = gated(limits, ["10.0.0.1"] * 6 + ["10.0.0.2"])
    assert [transport.gone for _, transport in far] == [False] * 4 + [True] * 2 + [False]
    _, network = gated(limits, [f"2001:db8::{i}" for i in range(6)])  # one IPv6 network
    assert sum(transport.gone for _, transport in network) == 2
    _, near = gated(limits, ["127.0.0.1", "::1", "::ffff:127.0.0.1"] * 8)
    assert [transport.gone for _, transport in near] == [True] * 4 + [False] * 20  # the oldest made room


def test_streams_do_not_make_room_for_new_connections(gated):
    _, seated = gated(Limits(connections=2), ["127.0.0.1"] * 2)
    for gate, _ in seated:
        gate.upgrade(gate._inner)
    late, transport = seated[0][0]._gates(None, None, None), Transport()
    late.connection_made(transport)
    assert transport.gone and not any(transport.gone for _, transport in seated)


def ends(stream, seconds=10.0):
    """Whether the server ends a connection."""
    stream.settimeout(seconds)
    try:
        while stream.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /"], ids=["header", "address"])
def test_an_endless_request_ends_its_connection(head):
    with running(FakeWorld().world) as address, connected(address) as stream:
        with contextlib.suppress(ConnectionError):
            stream.sendall(head)
            for _ in range(64):
                stream.sendall(b"a" * 16 * 1024)
        assert ends(stream)


def test_a_request_that_does_not_get_done_is_ended():
    with (
        running(FakeWorld().world, Limits(request_s=0.5)) as address,
        connected(address) as stream,
        connected(address) as body,
    ):
        body.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            stream.sendall(b"G")
            time.sleep(0.1)
        assert ends(stream) and ends(body)


def test_the_seat_of_a_flooder_who_left_is_free_soon():
    """Also where what was sent is still waiting to be read: the end of the connection does not wait behind it."""
    fake = FakeWorld()
    fake.session = Slow
    with running(fake.world, max_viewers=1) as address:
        with upgraded(address) as stream:
            wait_until(lambda: fake.sessions)
            time.sleep(0.2)
            stream.settimeout(1)
            reset = json.dumps({"type": "reset", "seed": 1, "start": "red"}).encode()
            with contextlib.suppress(OSError):
                for _ in range(30_000):
                    stream.sendall(frame(reset))
        wait_until(lambda: fake.sessions[0].closed, 10)
    assert len(fake.sessions[0].starts) < 2000


def test_requests_that_do_not_wait_for_answers_are_answered_at_a_bounded_rate():
    """Of two connections that send 20,000 requests each, and of what another one asks for meanwhile."""
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answers, began = [0, 0], time.monotonic()

    def count(stream, which):
        with contextlib.suppress(OSError):
            while said := stream.recv(65536):
                answers[which] += said.count(b"HTTP/1.1 200")

    def flood(stream):
        with contextlib.suppress(OSError):
            stream.sendall(ask * 20_000)

    with running(FakeWorld().world) as address, connected(address) as one, connected(address) as two:
        for which, stream in enumerate((one, two)):
            threading.Thread(target=flood, args=(stream,), daemon=True).start()
            threading.Thread(target=count, args=(stream, which), daemon=True).start()
        wait_until(lambda: sum(answers) > REQUESTS_AT_ONCE, 20)
        with connected(address) as honest:
            honest.sendall(ask)
            assert b"200" in honest.recv(4096)
        assert sum(answers) <= REQUESTS_AT_ONCE + REQUESTS_S * (time.monotonic() - began) + 10
        assert min(answers) > REQUESTS_AT_ONCE / 4, answers


# --- the log ----------------------------------------------------------------------------------------------------------


def test_few_records_of_a_place_are_written_and_the_next_says_how_many_were_not(caplog):
    now = [0.0]
    few, log = Few(lambda: now[0]), logging.getLogger("few")
    caplog.handler.addFilter(few)
    try:
        for i in range(1000 + LINES):
            now[0] = 61.0 * (i >= 500 + LINES)
            log.warning("broken by %s", i)
        log.warning("something else")
    finally:
        caplog.handler.removeFilter(few)
    said = [record.getMessage() for record in caplog.records]
    assert said[LINES - 1 :] == [
        f"broken by {LINES - 1}",
        f"broken by {500 + LINES} (and 500 more like it)",
        "something else",
    ]


def test_connections_that_are_refused_all_day_do_not_fill_the_log(caplog):
    disconnected = pytest.importorskip("starlette.websockets").WebSocketDisconnect
    with served(FakeWorld()) as app:
        for _ in range(3 * LINES):
            with (
                pytest.raises(disconnected),
                app.websocket_connect("ws://localhost:8000/stream", headers={"origin": "http://elsewhere"}),
            ):
                pass
    assert sum("refused a connection" in record.getMessage() for record in caplog.records) == LINES


def test_what_breaks_a_connection_again_and_again_does_not_fill_the_log(caplog, monkeypatch):
    from uvicorn.protocols.http.h11_impl import H11Protocol

    def breaks(self, data):
        raise RuntimeError("inside")

    monkeypatch.setattr(H11Protocol, "data_received", breaks)
    with running(FakeWorld().world) as address:
        for _ in range(3 * LINES):
            with connected(address) as stream:
                stream.sendall(b"GET / HTTP/1.1\r\n")
                assert ends(stream)
    assert len([record for record in caplog.records if record.exc_info]) == LINES


# --- strangers --------------------------------------------------------------------------------------------------------


def test_one_address_does_not_take_every_seat():
    async def take():
        seats = Seats(limit=3, per_address=2)
        assert [await seats.take("10.0.0.1", 0.01) for _ in range(3)] == [True, True, False]
        assert await seats.take("10.0.0.2", 0.01)
        await seats.give_back("10.0.0.1")
        assert await seats.take("10.0.0.1", 0.01)
        assert not await seats.take("10.0.0.3", 0.01) and seats.taken == 3

    asyncio.run(take())


def test_this_machine_counts_towards_no_address():
    assert [address_of(host) for host in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == [None] * 3
    assert address_of("2001:db8::1") == address_of("2001:db8::2") != address_of("2001:db8:0:1::1")


def test_a_token_opens_the_page_its_files_and_the_stream():
    starlette = pytest.importorskip("starlette.websockets", reason="needs pip install 'vidistill[test]'")
    with served(FakeWorld(), token="open, sesame") as app:
        for path in ("/", "/page.js", "/health", "/?token=wrong", "/starts/red.png"):
            assert app.get(path).status_code == 403
        with pytest.raises(starlette.WebSocketDisconnect), watching(app):
            pass
        assert app.get("/", params={"token": "open, sesame"}).status_code == 200  # and a cookie for the rest
        assert app.get("/page.js").status_code == 200
        with watching(app) as browser:
            browser.frame()


@pytest.mark.parametrize(
    ("host", "token", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", "word", False), ("127.0.0.1", "", False)]
)
def test_a_server_that_others_reach_without_a_token_is_warned_of(monkeypatch, caplog, host, token, warned):
    uvicorn = pytest.importorskip("uvicorn", reason="needs pip install 'vidistill[demo]'")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    run(FakeWorld().world, ServeConfig(host=host, port=0, token=token))
    assert ("--token" in caplog.text) == warned
