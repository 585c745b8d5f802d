"""A kind of input that nothing but its own class knows reaches the network from a browser."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import DIT, SHAPE, SIDE, STUDENT, random_dit
from fake_world import Browser, served

from vidistill.checkpoint import Bundle, load_codec, load_student
from vidistill.conditioning.condition import Condition
from vidistill.conditioning.controls import MODALITIES, Modality
from vidistill.models.layers import SiteConfig
from vidistill.models.student import CausalStudent
from vidistill.serve.viewer import World
from vidistill.streaming.session import StreamConfig, StreamSession

SEASONS = ("summer", "winter")


class Season(Modality):
    """How much of each season there is, two numbers a latent."""

    keys = ("season",)

    def __init__(self, net):
        self.net = net

    @property
    def described(self):
        return {"kind": "numbers", "names": list(SEASONS), "low": 0, "high": 1}

    def initial(self):
        return (0.0, 0.0)

    def read(self, value):
        if not all(0 <= value[name] <= 1 for name in SEASONS):
            raise ValueError(f"season must be numbers from 0 to 1, got {value}")
        return tuple(value[name] for name in SEASONS)

    def condition(self, values, start, stop):
        return Condition(per_frame={"hidden": torch.tensor(values["season"]).expand(1, stop - start, 2)})


@pytest.fixture
def seasonal(tiny_student_path, monkeypatch):
    """A student of the new input that starts from noise, and what is served of it."""
    monkeypatch.setitem(MODALITIES, Season, lambda net: "hidden" in net.sites)
    dit = replace(DIT, sites={"hidden": SiteConfig(2)})
    student = CausalStudent(random_dit(dit), replace(STUDENT, first_chunk=0), SHAPE).eval().requires_grad_(False)
    described = {"sites": {"hidden": {"dim": 2}}, "text_dim": 0, "channels": dit.channels, "extra_channels": 0}
    record = {"dit": described, "schedule": {"levels": [1.0, 0.5]}, "world": {"fps": 8}}
    bundle, codec = Bundle("seasons", "student", student, record), load_codec(load_student(tiny_student_path))

    sessions = []

    def opened(seed, image):
        sessions.append(StreamSession(bundle, codec, StreamConfig(seed=seed, queue_frames=0)))
        return sessions[-1]

    return SimpleNamespace(sessions=sessions, world=World("seasons", (SIDE, SIDE), opened))


def test_a_new_input_is_told_to_the_page_and_set_from_it(seasonal):
    with served(seasonal) as app, app.websocket_connect("ws://localhost:8000/stream") as socket:
        browser = Browser(socket, side=SIDE)
        assert browser.note("hello")["takes"] == {
            "season": {"kind": "numbers", "names": list(SEASONS), "low": 0, "high": 1}
        }
        browser.set(5, season={"summer": 1, "winter": 0.5})
        browser.frame(lambda header: header["input_id"] == 5)
        inputs = seasonal.sessions[0].inputs
        assert inputs.condition(inputs.control, 3, 6).per_frame["hidden"].tolist() == [[[1.0, 0.5]] * 3]
        browser.set(6, season={"summer": 7, "winter": 0})
        assert "season must be numbers" in browser.note("error")["message"]
        browser.set(7, season=[1])
        assert "could not be used" in browser.note("error")["message"]
        browser.frame(lambda header: header["index"] > 30)
