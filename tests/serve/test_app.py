import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from fake_world import (
    ACTIONS,
    CHUNK,
    FPS,
    SIZE,
    SPEED,
    Browser,
    FakeSession,
    FakeWorld,
    picture,
    png,
    running,
    served,
    wait_until,
    watching,
)
from PIL import Image

from vidistill.io import read_video, save_png
from vidistill.serve import protocol
from vidistill.serve.app import ServeConfig, create_app, host_allowed, load_world, origin_allowed, read_starts, run
from vidistill.serve.player import Player
from vidistill.serve.viewer import ViewerConfig, World

pytestmark = pytest.mark.timeout(60)

# --- the way of a key -------------------------------------------------------------------------------------------------


def test_hello_tells_the_page_what_it_shows():
    with served(FakeWorld()) as app, watching(app) as browser:
        hello = browser.receive()
    assert hello["type"] == "hello" and hello["takes"] == {"action": {"kind": "hold", "names": list(ACTIONS)}}
    assert hello["starts"] == ["blocks", "red"]
    assert (hello["width"], hello["height"], hello["fps"]) == (SIZE, SIZE, FPS)
    assert (hello["nfe_per_chunk"], hello["memory_bytes"], hello["frames_per_chunk"]) == (5, 1_234_567, CHUNK)


def test_a_key_turns_the_picture_and_its_id_comes_back():
    with served(FakeWorld()) as app, watching(app) as browser:
        header, _ = browser.frame()
        assert header["flags"] & protocol.FIRST and header["input_id"] == 0
        browser.set(7, action={"turn_left": 1})
        header, before = browser.frame(lambda header: header["input_id"] == 7)
        after_header, after = browser.frame()
        assert after_header["index"] == header["index"] + 1
        assert np.array_equal(after[:, SPEED:], before[:, :-SPEED])  # the picture moves to the right


def test_reset_begins_again_with_the_seed_and_picture_asked_for():
    fake = FakeWorld()
    with served(fake) as app, watching(app) as browser:
        _, px = browser.frame()
        assert np.array_equal(px, fake.starts["blocks"])
        for start, want in fake.starts.items():
            browser.say(type="reset", seed=5, start=start)
            _, px = browser.frame(lambda header: header["flags"] & protocol.FIRST)
            assert np.array_equal(px, want)
        browser.set(1, action={"turn_right": 1})
        _, px = browser.frame(lambda header: header["input_id"] == 1)
        assert np.array_equal(px[:, -SPEED:], FakeSession(5).panorama[:, SIZE : SIZE + SPEED])


def test_a_world_that_begins_from_noise_takes_no_picture():
    with served(FakeWorld(pictures=False)) as app, watching(app) as browser:
        assert browser.note("hello")["starts"] is None
        browser.say(type="reset", seed=3, start="")
        browser.frame(lambda header: header["flags"] & protocol.FIRST)
        browser.socket.send_bytes(bytes([protocol.PICTURE]) + png())
        assert "takes no picture" in browser.note("error")["message"]
        browser.say(type="reset", seed=3, start="upload")
        assert "no start image" in browser.note("error")["message"]


def test_a_world_that_begins_from_a_picture_needs_one():
    with pytest.raises(ValueError, match="--starts FOLDER"):
        World("fake", (SIZE, SIZE), FakeSession, {})


def test_keys_stay_held_through_a_reset():
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.note("hello")
        browser.set(1, action={"turn_left": 1})
        browser.frame(lambda header: header["input_id"] == 1)
        browser.say(type="reset", seed=5, start="blocks")
        browser.frame(lambda header: header["flags"] & protocol.FIRST)
        (_, one), (_, two) = browser.frame(), browser.frame()
        assert not np.array_equal(one, two)


def test_an_own_picture_is_cropped_resized_and_started_from():
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.frame()
        browser.say(type="reset", seed=0, start="upload")
        assert "send a picture" in browser.note("error")["message"]
        browser.socket.send_bytes(bytes([protocol.PICTURE]) + png(300, 100))
        assert browser.note("picture") == {"type": "picture", "width": SIZE, "height": SIZE}
        browser.say(type="reset", seed=0, start="upload")
        _, px = browser.frame(lambda header: header["flags"] & protocol.FIRST)
        assert np.array_equal(px, picture(10, 200, 30))


def test_a_hidden_tab_stops_the_work_and_going_on_resumes_where_it_was():
    fake = FakeWorld()
    with served(fake) as app, watching(app) as browser:
        browser.frame()
        browser.say(type="pause", on=True)
        wait_until(lambda: app.get("/health").status_code == 200)
        time.sleep(0.2)
        made = fake.sessions[0].made
        time.sleep(0.3)
        assert fake.sessions[0].made == made
        browser.say(type="pause", on=False)
        last = browser.frame()[0]["index"]
        for _ in range(10):
            index = browser.frame()[0]["index"]
            assert index == last + 1
            last = index


def test_a_real_student_is_served_from_its_files(tiny_student_path, tiny_image, tmp_path):
    save_png(tmp_path / "here.png", tiny_image)
    fake = FakeWorld()
    fake.world = load_world(str(tiny_student_path), tmp_path)
    with served(fake) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        browser = Browser(socket, side=len(tiny_image))
        hello = browser.note("hello")
        assert (
            hello["takes"]["action"]["names"] == list(ACTIONS)
            and hello["starts"] == ["here"]
            and hello["width"] == len(tiny_image)
        )
        browser.set(3, action={"forward": 1})
        _, walked = browser.frame(lambda header: header["input_id"] == 3)
        browser.say(type="reset", seed=7, start="here")
        header, _ = browser.frame(lambda header: header["flags"] & protocol.FIRST)
        assert header["index"] == 0 and header["chunk"] == 0
        header, other = browser.frame(lambda header: header["chunk"] == 1)
        assert header["input_id"] == 3 and not np.array_equal(walked, other)


def test_a_gain_is_for_students_that_are_told_how_far_they_go():
    world = load_world("doom-relic", gain=2.0)
    with world.open(0, next(iter(world.starts.values()))) as session:
        assert session.cfg.gain == 2.0
    with pytest.raises(ValueError, match=r"gain.*no effect"):
        load_world("doom", gain=2.0)


def test_a_student_that_begins_from_a_picture_says_when_there_is_none(tiny_student_path):
    with pytest.raises(ValueError, match="--starts FOLDER"):
        load_world(str(tiny_student_path))


# --- pace -------------------------------------------------------------------------------------------------------------


def test_frames_come_at_the_pace_of_the_world():
    with served(FakeWorld(fps=50.0)) as app, watching(app) as browser:
        browser.frame()
        began = time.perf_counter()
        for _ in range(25):
            browser.frame()
        assert 0.45 <= time.perf_counter() - began < 1.0


def test_a_session_runs_only_a_little_ahead_of_what_is_shown():
    session = FakeSession()
    player = Player(lambda: session, lambda: None)
    wait_until(lambda: session.made >= 1)
    time.sleep(0.2)
    assert session.made <= CHUNK
    for _ in range(10):
        wait_until(lambda: player.take() is not None)
    time.sleep(0.1)
    assert session.made <= 10 + CHUNK
    player.close()
    wait_until(lambda: player.finished)
    assert session.closed


def test_a_frame_is_made_shortly_before_it_is_shown_so_that_late_keys_count():
    session = FakeSession(fps=0.05)  # twenty seconds a frame
    player = Player(lambda: session, lambda: None)
    wait_until(lambda: session.made == 2)  # before the first is shown
    for _ in range(2):
        wait_until(lambda: player.take() is not None)
    time.sleep(0.2)
    assert session.made == 2
    player._taken_at -= 20  # as if these had passed
    player.pause(False)
    wait_until(lambda: session.made == 3)
    player.close()
    wait_until(lambda: player.finished)


def test_a_slow_machine_stretches_time_instead_of_stuttering():
    session = FakeSession(fps=100.0, chunk_s=0.2)  # 20 frames a second at best
    player = Player(lambda: session, lambda: None)
    for _ in range(8 * CHUNK):
        wait_until(lambda: player.take() is not None)
    assert 0.03 < player.frame_s < 0.07
    player.close()


def test_a_slow_browser_gets_newer_frames_instead_of_a_queue():
    with served(FakeWorld(fps=200.0), viewer=ViewerConfig(in_flight=3)) as app, watching(app, draws=False) as browser:
        first = [browser.frame()[0] for _ in range(3)]
        stats = browser.note("stats")  # a second later, nothing else was sent
        assert stats["dropped"] > 50
        browser.say(type="seen", sequence=3)
        header, _ = browser.frame()
        assert header["sequence"] == 4 and header["flags"] & protocol.GAP
        assert header["index"] - first[-1]["index"] > 50


# --- several viewers --------------------------------------------------------------------------------------------------


def test_every_viewer_has_a_session_and_one_too_many_is_told_so():
    fake = FakeWorld()
    with served(fake, max_viewers=2, patience_s=0.1) as app, watching(app) as one, watching(app) as two:
        one.frame()
        two.frame()
        assert len(fake.sessions) == 2 and app.get("/health").json()["viewers"] == 2
        with watching(app) as three:
            bye = three.receive()
            assert bye["type"] == "bye" and bye["reason"] == "full" and "room for 2 viewers" in bye["message"]
            assert three.receive() == {"type": "closed", "code": 1013}
        one.frame()
        assert len(fake.sessions) == 2


def test_a_viewer_who_leaves_closes_the_session_and_frees_the_place():
    fake = FakeWorld()
    with served(fake, max_viewers=1, patience_s=5.0) as app:
        for _ in range(3):
            with watching(app) as browser:
                browser.frame()
        wait_until(lambda: all(session.closed for session in fake.sessions))
        wait_until(lambda: app.get("/health").json()["viewers"] == 0)
    assert len(fake.sessions) == 3


def test_an_unattended_page_is_let_go():
    with served(FakeWorld(), viewer=ViewerConfig(idle_s=0.4)) as app, watching(app) as browser:
        browser.frame()
        assert browser.note("bye")["reason"] == "idle"
        wait_until(lambda: app.get("/health").json()["viewers"] == 0)


def test_a_stream_that_breaks_ends_its_viewer_only():
    fake = FakeWorld(limit=6)
    with served(fake, patience_s=5.0, max_viewers=1) as app:
        with watching(app) as browser:
            bye = browser.note("bye")
            assert bye["reason"] == "failed" and "out of dreams" in bye["message"]
        fake.options["limit"] = None
        with watching(app) as browser:
            browser.frame(lambda header: header["index"] > 10)


# --- bad messages -----------------------------------------------------------------------------------------------------

BAD = [
    ("{", "not JSON"),
    ("[" * 4000, "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"type": "fly"}', 'unknown message type "fly"; known are set'),
    ('{"type": ["set"]}', "unknown message type"),
    ("x" * 5000, "5000 characters; at most 4096"),
    ('{"type": "set", "id": 1}', "set needs the field inputs"),
    ('{"type": "set", "id": 1, "inputs": {"action": {}}, "extra": 1}', 'no field "extra"'),
    ('{"type": "set", "id": 0, "inputs": {"action": {}}}', "set.id is 0; allowed are whole numbers 1 to"),
    ('{"type": "set", "id": true, "inputs": {"action": {}}}', "set.id is true"),
    ('{"type": "set", "id": 1, "inputs": []}', "needed is an object"),
    ('{"type": "set", "id": 1, "inputs": {}}', "needed is an object"),
    ('{"type": "set", "id": 1, "inputs": {"self": 1}}', "takes no self; it takes action"),
    ('{"type": "set", "id": 1, "inputs": {"action": {}, "switch": ["cut"]}}', "set.inputs.switch"),
    ('{"type": "seen", "sequence": 4000000000}', "frames were sent"),
    ('{"type": "reset", "seed": -1, "start": ""}', "reset.seed is -1"),
    ('{"type": "reset", "seed": 1.5, "start": ""}', "reset.seed is 1.5"),
    ('{"type": "reset", "seed": 1, "start": "../secret"}', "no start image"),
    ('{"type": "reset", "seed": 1, "start": ["red"]}', "reset.start"),
    ('{"type": "pause", "on": 1}', "pause.on is 1; allowed are true and false"),
    ('{"type": "record", "on": false}', "nothing is being recorded"),
    (b"", "bytes must start with their kind"),
    (b"\x09sound", "bytes must start with their kind"),
    (b"\x02", "its place among action"),
    (b"\x02\x01sound", "its place among action"),
    (b"\x02\x00" + bytes(protocol.MAX_INPUT), "at most 1,048,576"),
    (b"\x01not a picture", "cannot be read as a PNG"),
    (b"\x01" + png()[:60], "cannot be read as a PNG"),
    (b"\x01" + png(5000, 10), "5000x10; at most 4096"),
    (b"\x01" + bytes(protocol.MAX_PICTURE), "at most 4,194,304"),
]


def test_bad_messages_are_answered_and_nothing_is_lost():
    fake = FakeWorld()
    with served(fake) as app, watching(app) as browser:
        browser.note("hello")
        browser.set(1, action={"turn_left": 1})
        for message, why in BAD:
            (browser.socket.send_bytes if isinstance(message, bytes) else browser.socket.send_text)(message)
            assert why in browser.note("error")["message"]
        browser.frame(lambda header: header["input_id"] == 1)  # the same session, the key still held
        assert len(fake.sessions) == 1 and not fake.sessions[0].closed
        browser.set(2, action={})
        browser.frame(lambda header: header["input_id"] == 2)


def test_a_flood_of_bad_messages_leaves_the_server_answering():
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.note("hello")
        for _ in range(200):
            browser.socket.send_text("nonsense")
        assert app.get("/health").json()["viewers"] == 1
        for _ in range(200):
            browser.note("error")
        browser.frame()


def test_a_huge_message_ends_its_own_connection_only():
    pytest.importorskip("websockets", reason="needs pip install 'vidistill[demo]'")
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import connect

    with running(FakeWorld().world) as address:
        stream = address.replace("http", "ws") + "stream"
        with pytest.raises(InvalidStatus, match="403"), connect(stream, origin="http://evil.example"):
            pass
        with connect(stream) as one, connect(stream) as two:
            assert json.loads(two.recv())["type"] == "hello"
            with pytest.raises(ConnectionClosed):
                one.send(bytes(5 * protocol.MAX_PICTURE))
                while one.recv(timeout=20):
                    pass
            two.send("nonsense")
            while not isinstance(said := two.recv(timeout=20), str) or json.loads(said)["type"] != "error":
                pass


# --- recording --------------------------------------------------------------------------------------------------------


def test_a_recording_is_a_film_of_what_was_shown():
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.frame()
        browser.say(type="record", on=True)
        assert browser.note("record")["state"] == "on"
        for _ in range(20):
            browser.frame(lambda header: header["flags"] & protocol.RECORDING)
        browser.say(type="record", on=False)
        states = [browser.note("record") for _ in range(2)]
        assert [said["state"] for said in states] == ["saving", "ready"]
        answer = app.get(f"/{states[1]['url']}")
        assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
        assert "attachment" in answer.headers["content-disposition"]
    frames, fps = film(answer.content)
    assert fps == pytest.approx(FPS, abs=0.1) and len(frames) >= 20 and frames.shape[1:] == (512, 512, 3)


def film(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        path.write_bytes(data)
        return read_video(path)


def test_a_recording_ends_by_itself_at_its_longest_length():
    with served(FakeWorld(), viewer=ViewerConfig(record_s=0.5)) as app, watching(app) as browser:
        browser.frame()
        browser.say(type="record", on=True)
        assert browser.note("record")["state"] == "on"
        saving = browser.note("record")
        assert saving["state"] == "saving" and "longest" in saving["message"]
        assert browser.note("record")["seconds"] == 0.5


def test_a_recording_that_cannot_be_written_is_said_and_the_stream_goes_on(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidistill.serve.recorder.write_video", full)
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.frame()
        browser.say(type="record", on=True)
        assert browser.note("record")["state"] == "on"
        browser.frame(lambda header: header["flags"] & protocol.RECORDING)
        browser.say(type="record", on=False)
        states = [browser.note("record") for _ in range(2)]
        assert states[1]["state"] == "off" and "No space left" in states[1]["message"]
        browser.frame()


# --- files and doors --------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere():
    with served(FakeWorld()) as app:
        page = app.get("/")
        assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        for path in ("/", "/page.js", "/page.css"):
            text = app.get(path).text.replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text and "https://" not in text
        for path in ("/docs", "/openapi.json", "/starts/none.png", "/recordings/none.mp4"):
            assert app.get(path).status_code == 404
        start = Image.open(io.BytesIO(app.get("/starts/red.png").content))
        assert start.size == (SIZE, SIZE) and start.getpixel((3, 3)) == (200, 30, 30)


def test_pages_of_other_sites_may_not_open_the_stream():
    starlette = pytest.importorskip("starlette.websockets", reason="needs pip install 'vidistill[test]'")
    with served(FakeWorld(), origins=("https://demo.example.org",)) as app:
        for origin in ("http://evil.example", "http://localhost:3000", "null"):
            with (
                pytest.raises(starlette.WebSocketDisconnect),
                app.websocket_connect("ws://localhost:8000/stream", headers={"origin": origin}),
            ):
                pass
        for origin in ("http://localhost:8000", "https://demo.example.org"):
            with app.websocket_connect("ws://localhost:8000/stream", headers={"origin": origin}) as socket:
                assert Browser(socket).receive()["type"] == "hello"


def test_a_foreign_name_that_points_here_is_not_answered():
    with served(FakeWorld()) as app:
        answer = app.get("/", headers={"host": "evil.example:8000"})
        assert answer.status_code == 403 and "--origin" in answer.text


@pytest.mark.parametrize(
    ("host", "bound", "allowed"),
    [
        ("localhost:8000", "127.0.0.1", True),
        ("[::1]:8000", "127.0.0.1", True),
        ("192.168.1.5:8000", "127.0.0.1", False),
        ("192.168.1.5:8000", "0.0.0.0", True),
        ("evil.example:8000", "0.0.0.0", False),
        ("demo.example.org", "127.0.0.1", True),
        ("box:8000", "box", True),
        ("", "127.0.0.1", False),
        ("[broken", "127.0.0.1", False),
    ],
)
def test_only_names_of_this_server_are_its_own(host, bound, allowed):
    assert host_allowed(host, ServeConfig(host=bound, origins=("https://demo.example.org",))) == allowed


def test_an_origin_is_a_host_however_it_is_written():
    cfg = ServeConfig(origins=("https://Demo.example.org/",))
    assert host_allowed("demo.example.org", cfg)
    for origin, allowed in (
        ("https://demo.example.org", True),
        ("http://demo.example.org", False),
        ("http://[", False),
    ):
        assert origin_allowed(origin, "localhost:8000", cfg) == allowed


def test_a_start_picture_may_not_be_called_as_the_visitors_own(tmp_path):
    save_png(tmp_path / "upload.png", picture(1, 2, 3))
    with pytest.raises(ValueError, match="choose another"):
        read_starts(tmp_path, (SIZE, SIZE))


def test_pictures_larger_than_the_page_sends_are_refused_before_they_are_read():
    assert protocol.read_picture(png(1000, 1000), (SIZE, SIZE)).shape == (SIZE, SIZE, 3)
    with pytest.raises(protocol.MessageError, match="2000x2000"):
        protocol.read_picture(png(2000, 2000), (SIZE, SIZE))
    assert protocol.read_picture(png(2000, 2000), (500, 500)).shape == (500, 500, 3)


def test_a_program_without_an_origin_may_open_the_stream():
    assert origin_allowed(None, "localhost:8000", ServeConfig())


@pytest.mark.parametrize(
    ("field", "value"), [("max_viewers", 0), ("port", 70000), ("port", -1), ("origins", ("example.org",))]
)
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match="origin" if field == "origins" else field):
        ServeConfig(**{field: value})


def test_a_taken_port_is_said_before_anything_starts():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        door.listen()
        port = door.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen.*127.0.0.1:{port}.*--port"):
            run(FakeWorld().world, ServeConfig(port=port))


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match=r"pip install 'vidistill\[demo\]'"):
        create_app(FakeWorld().world)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install 'vidistill\[demo\]'"):
        run(FakeWorld().world, ServeConfig())


def test_start_images_are_read_from_a_folder(tmp_path):
    (tmp_path / "b.png").write_bytes(png(100, 50))
    (tmp_path / "a.png").write_bytes(png())
    starts = read_starts(tmp_path, (SIZE, SIZE))
    assert list(starts) == ["a", "b"] and starts["b"].shape == (SIZE, SIZE, 3)
    (tmp_path / "c.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"c\.png.*cannot.*read"):
        read_starts(tmp_path, (SIZE, SIZE))
    with pytest.raises(ValueError, match="no folder"):
        read_starts(tmp_path / "none", (SIZE, SIZE))


def test_start_images_of_every_kind_and_spelling_are_read(tmp_path):
    phone, tag = Image.new("RGB", (SIZE, SIZE)), Image.Exif()
    phone.paste((255, 0, 0), (0, 0, SIZE // 2, SIZE))
    tag[0x0112] = 6  # what is left is to be above
    phone.save(tmp_path / "a.jpg", exif=tag)
    (tmp_path / "b.PNG").write_bytes(png())
    Image.new("RGBA", (20, 20)).save(tmp_path / "clear.webp")
    (tmp_path / "notes.txt").write_text("no picture")
    starts = read_starts(tmp_path, (SIZE, SIZE))
    assert list(starts) == ["a", "b", "clear"]
    assert starts["a"][5, 40, 0] > 200 and starts["a"][60, 5, 0] < 50 and (starts["clear"] == 255).all()


def test_start_images_that_cannot_be_told_apart_or_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"--starts .*no picture"):
        read_starts(tmp_path, (SIZE, SIZE))
    for name in ("a.png", "a.PNG"):
        (tmp_path / name).write_bytes(png())
    with pytest.raises(ValueError, match=r"a\.PNG and .*a\.png.*name"):
        read_starts(tmp_path, (SIZE, SIZE))


@pytest.mark.parametrize("name", [b"caf\xe9 \xff", "ein Bild #1 100%?&ü".encode(), b'"<b>\\', b"..."])
def test_start_images_of_odd_names_are_shown_and_started_from(tmp_path, name):
    (tmp_path / os.fsdecode(name + b".png")).write_bytes(png())
    fake = FakeWorld()
    fake.world = replace(fake.world, starts=read_starts(tmp_path, (SIZE, SIZE)))
    with served(fake) as app, watching(app) as browser:
        [shown] = browser.note("hello")["starts"]
        assert app.get(f"/starts/{quote(shown, safe='')}.png").status_code == 200
        browser.frame()
        browser.say(type="reset", seed=1, start=shown)
        browser.frame(lambda header: header["flags"] & protocol.FIRST)


def test_a_large_picture_is_sent_as_jpeg():
    px = np.zeros((256, 256, 3), np.uint8)
    data = protocol.pack_frame(px, sequence=1, index=2, chunk=0, input_id=3, first=True, gap=False, recording=True)
    header = protocol.HEADER.unpack_from(data)
    assert header == (protocol.VERSION, protocol.FRAME, protocol.JPEG, protocol.FIRST | protocol.RECORDING, 1, 2, 0, 3)
    assert Image.open(io.BytesIO(data[protocol.HEADER.size :])).size == (256, 256)


def test_words_reach_the_session_and_come_back_in_the_first_frame_that_heard_them():
    fake = FakeWorld(prompts=True)
    with served(fake) as app, watching(app) as browser:
        assert browser.note("hello")["takes"]["prompt"]["switches"] == ["keep", "recache"]
        browser.set(7, prompt="  a red   ring ", switch="recache")
        header, _ = browser.frame(lambda header: header["input_id"] == 7)
        assert header["index"] > 0 and fake.sessions[0].said == [("a red ring", "recache")]


def test_while_words_are_read_pictures_and_keys_go_on():
    reading, read = threading.Event(), threading.Event()

    class Reader(FakeSession):
        def set(self, *, prompt=None, **kw):
            if prompt is not None:
                reading.set()
                assert read.wait(10)
            return super().set(prompt=prompt, **kw)

    fake = FakeWorld(prompts=True)
    fake.session = Reader
    with served(fake) as app, watching(app) as browser:
        browser.note("hello")
        browser.set(7, prompt="a ring", switch="keep")
        assert reading.wait(5)
        browser.set(8, action={"turn_left": 1})
        browser.frame(lambda header: header["input_id"] == 8)
        browser.set(9, prompt="a box", switch="keep")
        read.set()
        browser.frame(lambda header: header["input_id"] == 9)
    assert [prompt for prompt, _ in fake.sessions[0].said] == [None, "a ring", "a box"]


class Reader(FakeSession):
    """Reads each prompt when it is told to."""

    go = threading.Semaphore(0)

    def set(self, *, prompt=None, **kw):
        if prompt is not None:
            assert self.go.acquire(timeout=10)
            if prompt == "bad":
                raise ImportError("no reader here")
        return super().set(prompt=prompt, **kw)

    def reset(self, **kw):
        super().reset(**kw)
        self.said.append(("RESET", None))


def reader():
    fake = FakeWorld(prompts=True)
    fake.session = type("Reader", (Reader,), {"go": threading.Semaphore(0)})
    return fake


def prompt(browser, number, text):
    browser.set(number, prompt=text, switch="keep")


def test_a_start_waits_for_the_words_before_it_and_words_that_fail_are_told():
    fake = reader()
    with served(fake) as app, watching(app) as browser:
        browser.note("hello")
        prompt(browser, 7, "a ring")
        browser.say(type="reset", seed=5, start="red")
        prompt(browser, 8, "bad")
        browser.frame()
        assert ("RESET", None) not in fake.sessions[0].said[1:]
        fake.session.go.release(2)
        assert "no reader here" in browser.note("error")["message"]
        wait_until(lambda: fake.sessions[0].said[1:] == [("a ring", "keep"), ("RESET", None)])


def test_words_beyond_a_few_are_refused_and_nobody_reads_for_one_who_left():
    fake = reader()
    with served(fake) as app:
        with watching(app) as browser:
            browser.note("hello")
            for number in range(1, 10):
                prompt(browser, number, f"word {number}")
            assert "wait until" in browser.note("error")["message"]
        fake.session.go.release(9)
        wait_until(lambda: fake.sessions[0].closed)
        time.sleep(0.1)
    assert len(fake.sessions[0].said) <= 2, "the start, and at most the word that was being read"


def test_a_world_that_does_not_listen_refuses_words():
    with served(FakeWorld()) as app, watching(app) as browser:
        browser.note("hello")
        browser.set(1, prompt="anything", switch="keep")
        assert "takes no prompt; it takes action" in browser.note("error")["message"]


@pytest.mark.parametrize("text", [" ", "x" * 401])
def test_a_prompt_is_bounded(text):
    said = {"type": "set", "id": 1, "inputs": {"prompt": "a ring", "switch": "keep"}}
    assert protocol.parse_text(json.dumps(said)) == protocol.Set(1, said["inputs"])
    with pytest.raises(protocol.MessageError, match=r"set\.inputs\.prompt"):
        protocol.parse_text(json.dumps({**said, "inputs": {"prompt": text}}))
