"""A stream that knows where it is: its map, the way home, the history switch, and their messages."""

import itertools
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ACTIONS, DIT, SCHEDULE, SHAPE, WORLD, random_dit
from fake_world import FakeWorld, served, watching
from tiny_relic import CAMERA, MEMORY, SITES

from vidistill import serve
from vidistill.checkpoint import Bundle
from vidistill.conditioning.camera import RELIC, move_keys, numbers, opposite, place_of, planar
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig
from vidistill.serve import protocol
from vidistill.streaming.session import StreamConfig, StreamSession


def session(memory=MEMORY, camera=CAMERA, gain=1.0, without=(), world=WORLD):
    sites = {name: site for name, site in (SITES if camera else DIT.sites).items() if name not in without}
    dit = replace(DIT, sites=sites)
    student = CausalStudent(random_dit(dit), StudentConfig(3, 0, memory), SHAPE).eval().requires_grad_(False)
    with torch.no_grad():
        for p in student.net.sites.parameters():
            p.add_(0.1)
    world = {**world, "camera": asdict(camera)} if camera else world
    described = {"sites": {n: {"dim": s.dim} for n, s in dit.sites.items()}, "text_dim": 0, "extra_channels": 0}
    record = {"dit": described, "schedule": {**SCHEDULE, "given_chunks": 0}, "world": world}
    return StreamSession(Bundle("roamer", "student", student, record), None, StreamConfig(pipelined=False, gain=gain))


def test_the_map_shows_here_and_what_is_kept_of_every_frame():
    with session() as stream:
        assert stream.navigator.placed and not stream.navigator.map
        stream.set(action={"forward": 1.0})
        latents = stream.latents()
        for _ in range(3):
            next(latents)
        shown = stream.navigator.map
        stored = shown["stored"]
        assert shown["history"] and not shown["home"]
        assert [s[3] for s in stored] == [1, 2, 1, 2, 1, 2]  # the chunk in flight is not kept yet
        assert all(a[0] < b[0] for a, b in itertools.pairwise(stored)) and stored[-1][0] < shown["here"][0]
        assert shown["here"][0] == pytest.approx(0.15 * 32, abs=0.01)  # 8 latents of 4 frames; the first stands still
        assert shown["path"][-1] == shown["here"][:2] and len(shown["path"]) == 4
        assert [x for x, _ in shown["path"]] == sorted(x for x, _ in shown["path"])


def test_a_camera_that_nothing_else_moves_goes_by_its_own_moves():
    filmed = {name: value for name, value in WORLD.items() if name not in ("actions", "keys")}
    with session(without=("modulation",), world=filmed) as stream:
        moves = ["forward", "backward", "left", "right", "turn_left", "turn_right"]
        assert list(stream.actions) == moves
        assert stream.takes["action"] == {"kind": "hold", "names": moves, "keys": {"left": ["q"], "right": ["e"]}}
        stream.navigator.return_to_start()
        stream.set(action={"right": 0.5})
        latents = stream.latents()
        for _ in range(2):
            next(latents)
        assert stream.navigator.map["here"] == pytest.approx([0, -0.5 * 0.15 * 20, 0], abs=0.01)  # the first stands
        told = stream.inputs.condition(stream.inputs.control, 6, 9).per_frame
        assert set(told) == {"hidden", "qk"}
        assert told["hidden"][0, :, CAMERA.actions.index("right")] == pytest.approx([0.5] * 3, abs=1e-4)
    flown = replace(CAMERA, actions=("left", "right", "up", "down", "static"))
    assert move_keys(flown.actions) == {
        "left": ["ArrowLeft"], "right": ["ArrowRight"], "up": ["ArrowUp"], "down": ["ArrowDown"]
    }  # fmt: skip
    with session(without=("modulation",)) as stream:  # the data named what was done
        assert list(stream.actions) == ["turn_left", "turn_right", "forward", "backward"]
    own = {"actions": ["w", "right"], "keys": {"right": ["q"]}}
    with session(without=("modulation",), world={**WORLD, **own}) as stream:
        assert stream.takes["action"] == {"kind": "hold", "names": ["right"], "keys": {"right": ["q"]}}
        with pytest.raises(ValueError, match="'right'"):
            stream.navigator.return_to_start()
    page = (Path(serve.__file__).parent / "page" / "page.js").read_text(encoding="utf-8")
    used = re.search(r"COMMANDS = {(.*?)}", page)[1]
    assert not [k for (k,) in move_keys(RELIC).values() if f"Key{k.upper()}" in used], "keys of the page itself"


def test_the_way_home_undoes_the_way_and_a_key_ends_it():
    with session() as stream:
        latents = stream.latents()
        for action in ({"forward": 1.0}, {"turn_left": 1.0}, {"forward": 1.0, "turn_right": 0.5}):  # from the first on
            stream.set(action=action)
            next(latents)
        there = stream.navigator.map["here"]
        stream.navigator.return_to_start()
        seen = []
        for _ in range(5):
            next(latents)
            seen.append(stream.navigator.map)
        assert np.hypot(*there[:2]) > 1 and np.hypot(*seen[2]["here"][:2]) < 0.2
        assert abs(seen[2]["here"][2]) < 1e-3 and seen[0]["home"] and not seen[3]["home"]
        stream.set(action={"forward": 1.0})
        next(latents)
        stream.navigator.return_to_start()
        stream.set(action={"backward": 1.0})
        next(latents)
        assert not stream.navigator.map["home"] and stream.navigator.map["here"][0] < seen[4]["here"][0] + 1


def test_who_is_led_home_stands_still_in_the_next_dream():
    with session() as stream:
        latents = stream.latents()
        stream.set(action={"forward": 1.0})
        for _ in range(3):
            next(latents)
        stream.set(action={})
        stream.navigator.return_to_start()
        next(latents)
        assert any(stream.inputs.control.values["action"])
        again = stream.latents()
        next(again)
        assert not any(stream.inputs.control.values["action"])
        stream.set(action={"forward": 1.0})  # but a key that is held goes on
        stream.navigator.return_to_start()
        stream.set(action={"turn_left": 1.0})
        next(again := stream.latents())
        assert stream.inputs.control.values["action"] == (1.0, 0.0, 0.0, 0.0)


def test_a_gain_scales_the_way():
    ends = []
    for gain in (1.0, 2.5):
        with session(gain=gain) as stream:
            stream.set(action={"forward": 1.0, "turn_left": 0.5})
            latents = stream.latents()
            for _ in range(2):
                next(latents)
            ends.append(np.array(stream.navigator.map["here"]))
    assert ends[1][:2] == pytest.approx(2.5 * ends[0][:2], abs=2e-3) and ends[1][2] == ends[0][2] != 0
    with pytest.raises(ValueError, match=r"gain.*no effect"):
        session(camera=None, gain=2.0)
    with pytest.raises(ValueError, match=r"stream\.gain"):
        StreamConfig(gain=0.0)


def test_history_is_switched_while_the_stream_goes_on():
    runs = {}
    for on in (True, False):
        with session() as stream:
            stream.set(action={"turn_left": 1.0})
            latents = stream.latents()
            first = [next(latents) for _ in range(2)]
            stream.navigator.show_history(on)
            runs[on] = torch.cat([*first, next(latents)], 1)
            assert stream.navigator.map["history"] == on
    assert torch.equal(runs[True][:, :6], runs[False][:, :6]) and not torch.allclose(runs[True], runs[False])


def test_what_a_student_cannot_do_is_said():
    with session(MemoryConfig("window", frames=6)) as stream, pytest.raises(ValueError, match="no history"):
        stream.navigator.show_history(False)
    with session(MemoryConfig("window", frames=6), camera=None) as stream:
        assert not stream.navigator.placed and not stream.navigator.map
        with pytest.raises(ValueError, match="led back"):
            stream.navigator.return_to_start()


def test_a_place_is_read_back_from_what_a_network_is_told():
    pose = planar(torch.tensor([[3.0, -2.0, 0.7]]))
    free = replace(CAMERA, actions=RELIC)
    assert CAMERA.planar and not free.planar
    for camera in (CAMERA, free):
        assert place_of(numbers(pose, camera)[0], camera) == pytest.approx([3, -2, 0.7], abs=1e-3)
    assert opposite(ACTIONS, (0.2, 0.0, 1.0, 0.0)) == (0.0, 0.2, 0.0, 1.0)


# --- messages -------------------------------------------------------------------------------------------------------


class FakeRoamer:
    def __init__(self):
        self.placed, self.remembers, self.calls = True, True, []
        self.map = {}  # as before the first chunk

    def return_to_start(self):
        self.calls.append("home")

    def show_history(self, on):
        self.calls.append(on)


def test_messages_home_and_history_are_checked():
    assert protocol.parse_text('{"type": "return_to_start"}') == protocol.ReturnToStart()
    assert protocol.parse_text('{"type": "show_history", "on": false}') == protocol.ShowHistory(False)
    history = '{"type": "show_history"'
    for text in ('{"type": "return_to_start", "on": true}', history + "}", history + ', "on": 1}'):
        with pytest.raises(protocol.MessageError):
            protocol.parse_text(text)


def test_the_page_gets_a_map_and_its_buttons_reach_the_roamer():
    fake = FakeWorld()
    navigator, plain_open = FakeRoamer(), fake.world.open

    def opened(seed, image):
        one = plain_open(seed, image)
        one.navigator = navigator
        return one

    fake.world = replace(fake.world, open=opened)
    with served(fake) as app, watching(app) as browser:
        hello = browser.note("hello")
        assert hello["has_map"] and hello["has_history"]
        navigator.map = {
            "here": [1.0, 2.0, 0.5],
            "path": [[0.0, 0.0]],
            "stored": [[0.0, 0.0, 0.0, 4]],
            "history": True,
            "home": False,
        }
        shown = browser.note("map")
        assert shown["here"] == [1.0, 2.0, 0.5] and shown["stored"] == [[0.0, 0.0, 0.0, 4]]
        browser.say(type="return_to_start")
        browser.say(type="show_history", on=False)
        browser.frame(lambda header: header["chunk"] >= 2)
        assert navigator.calls == ["home", False]
