"""The page in a real browser. Pictures of it are left in out/."""

import base64
import contextlib
import io
import os
import shutil
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_world import FakeWorld, png, running
from PIL import Image

from vidistill.checkpoint import zoo_names
from vidistill.cli.main import parser
from vidistill.conditioning.audio import to_pcm16
from vidistill.data.clips import Clips
from vidistill.serve.app import load_world
from vidistill.serve.environment import Real
from vidistill.worlds.talker.face import read_mouth
from vidistill.worlds.talker.speech import RATE, say

OUT = Path(__file__).resolve().parents[2] / "out"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WORLDS = {"fake": lambda: FakeWorld(fps=16.0, chunk_s=0.05).world}
if "doom" in zoo_names():
    WORLDS["doom"] = lambda: load_world("doom")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
WATCH = """() => {
  const canvas = document.getElementById("canvas"), pen = canvas.getContext("2d");
  window.seen = [];
  canvas.addEventListener("frame", ({ detail }) => {
    const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
    const grey = [];
    for (let i = 0; i < data.length; i += 4) grey.push((data[i] + 2 * data[i + 1] + data[i + 2]) >> 2);
    window.seen.push({ index: detail.index, input: detail.input, grey: btoa(String.fromCharCode(...grey)) });
  });
}"""


def missing(reason):
    """Skips, or fails where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def launch():
    """Starts a browser with more flags."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("needs playwright: pip install 'vidistill[test]'")
    named = os.environ.get("VIDISTILL_BROWSER")
    path = next(filter(None, map(shutil.which, [named] if named else BROWSERS)), None)
    if path is None:
        missing(f"no browser found (tried {named or ', '.join(BROWSERS)}); name one with VIDISTILL_BROWSER")
    with sync_playwright() as playwright, contextlib.ExitStack() as stack:

        def started(*flags):
            one = playwright.chromium.launch(executable_path=path, args=[*FLAGS, *flags], timeout=60_000)
            stack.callback(one.close)
            return one

        yield started


@pytest.fixture(scope="module")
def browser(launch):
    return launch()


@contextlib.contextmanager
def opened(browser, address, **options):
    """A page that must not complain; waits until the first picture is drawn."""
    page = browser.new_page(**{"viewport": {"width": 1180, "height": 860}, **options})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.set_default_timeout(30_000)
    try:
        page.goto(address)
        yield page
        assert not complaints
    finally:
        page.close()


def wait(page, true, seconds=30.0):
    """Until an expression holds. (wait_for_function would need a page that allows eval.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(true):
        assert time.monotonic() < end, f"it never came true: {true}"
        page.wait_for_timeout(50)


def wait_for_pictures(page):
    page.wait_for_selector("#overlay", state="hidden")
    wait(page, "Number(document.getElementById('fps').textContent) > 1")


def held(page, key, num=16):
    """The pictures [T, H, W] that the browser drew while a key was held, from the first one that heard it."""
    before = page.evaluate("window.seen.length ? window.seen.at(-1).input : 0")
    page.evaluate("window.seen.length = 0")
    page.keyboard.down(key)
    wait(page, f"window.seen.filter((frame) => frame.input > {before}).length >= {num}", 60.0)
    frames, heard = page.evaluate(
        f"[window.seen.filter((frame) => frame.input > {before}).map((frame) => frame.grey), window.seen.at(-1).input]"
    )
    page.keyboard.up(key)
    wait(page, f"window.seen.at(-1).input > {heard}", 60.0)  # or the next key would see pictures that stand still
    width, height = page.evaluate("[canvas.width, canvas.height]")
    return np.stack([np.frombuffer(base64.b64decode(frame), np.uint8).reshape(height, width) for frame in frames])


def flow(frames):
    """Pixels [T - 1] each picture moved to the right since the one before, by phase correlation."""
    x = frames - frames.mean((1, 2), keepdims=True)
    f = np.fft.fft2(x * np.hanning(x.shape[1])[:, None] * np.hanning(x.shape[2]))
    cross = f[1:] * f[:-1].conj()
    peaks = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-9)).real
    reach = x.shape[2] // 4
    shifts = np.arange(-reach, reach + 1)
    rows = np.concatenate((peaks[:, -1:], peaks[:, :2]), axis=1).max(axis=1)  # up to one row up or down
    return shifts[rows[:, shifts].argmax(axis=1)]


def test_the_flow_of_a_known_turn_is_measured():
    world = np.random.default_rng(0).integers(0, 255, (64, 256))
    frames = np.stack([world[:, 100 - 5 * t : 164 - 5 * t] for t in range(6)])
    assert flow(frames).tolist() == [5] * 5 and flow(frames[::-1]).tolist() == [-5] * 5


@pytest.mark.parametrize("name", WORLDS)
def test_left_and_right_turn_the_picture_opposite_ways(browser, name):
    with running(WORLDS[name]()) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        page.evaluate(WATCH)
        left, right = flow(held(page, "ArrowLeft")), flow(held(page, "KeyD"))
        wait(page, "Number(document.getElementById('latency').textContent) > 0")
        page.keyboard.down("ArrowUp")
        page.wait_for_timeout(400)
        OUT.mkdir(exist_ok=True)
        page.screenshot(path=OUT / f"play-{name}.png")
        figures = {id: page.inner_text(f"#{id}") for id in ("fps", "latency", "memory", "nfe")}
    assert np.median(left) > 0 > np.median(right), (left, right)
    assert all(float(figure) > 0 for figure in figures.values()), figures


def test_keys_that_a_world_names_hold_its_actions(browser):
    keys = {"turn_left": ["d"], "turn_right": ["ArrowLeft"], "forward": ["w", "d"]}
    with running(FakeWorld(fps=16.0, chunk_s=0.05, keys=keys).world) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        page.evaluate(WATCH)
        left, right = flow(held(page, "ArrowRight")), flow(held(page, "KeyA"))
        places = page.eval_on_selector_all(
            ".pad [data-action]", "(all) => all.map((b) => b.style.gridArea.split(' ')[0])"
        )
    assert np.median(left) > 0 > np.median(right), (left, right)
    assert places == ["right", "left", "down"]  # what two keys hold together has no place of its own


CHORDS = [  # keys of a world that has names for some of them together
    ("down", "ArrowUp", ["up"]),
    ("down", "ArrowRight", ["upright"]),
    ("down", "Space", ["uprightfire"]),
    ("up", "ArrowUp", ["right", "fire"]),
    ("down", "KeyW", ["uprightfire"]),
    ("up", "ArrowRight", ["up", "fire"]),
    ("up", "Space", ["up"]),
    ("up", "KeyW", []),
]


def test_keys_held_together_hold_the_action_of_their_chord(browser):
    args = parser().parse_args(["serve", "--env", "tiny_env:Tiny-v0", "--option", "kind=ways"])
    args.policy = "random"
    holding = "[...document.querySelectorAll('.held')].map((button) => button.dataset.action).join()"
    real = Real.of(args, None)
    with running(real.world()) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        (session,), names = real.open, real.named.names
        for turn, key, on in CHORDS:
            getattr(page.keyboard, turn)(key)
            wait(page, f"{holding} === '{','.join(on)}'")
            end = time.monotonic() + 30.0
            while [name for name, value in zip(names, session._held, strict=True) if value] != on:
                assert time.monotonic() < end, (turn, key, session._held)
                page.wait_for_timeout(20)
        page.hover("[data-action=upright]")
        page.mouse.down()
        wait(page, f"{holding} === 'upright'")


def test_a_world_that_remembers_draws_its_map_and_leads_back(browser):
    drawn = """() => {
      const sheet = document.getElementById("map"), pen = sheet.getContext("2d");
      const { data } = pen.getImageData(0, 0, sheet.width, sheet.height);
      return data.filter((value, i) => i % 4 === 0 && value > 200).length;
    }"""
    with running(load_world("doom-relic")) as address, opened(browser, address) as page:
        page.wait_for_selector("#overlay", state="hidden")
        assert page.is_visible("#map")
        page.keyboard.down("ArrowUp")
        wait(page, f"({drawn})() > 0")
        page.keyboard.up("ArrowUp")
        page.wait_for_timeout(1500)
        page.click("#home")
        wait(page, "document.getElementById('home').getAttribute('aria-pressed') === 'true'")
        page.screenshot(path=OUT / "play-doom-relic.png")


def spoken(path):
    """A sound file in which somebody speaks."""
    pcm = say("Whatever happens now, everybody wants to buy a yellow boat by the river.").pcm
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(to_pcm16(pcm).tobytes())
    return path


def mouth(page, pictures):
    """How far the mouth on the page was open in so many of its pictures, as the judge of talkers reads it."""
    shown = []
    for _ in range(pictures):
        url = page.evaluate("document.getElementById('canvas').toDataURL('image/png')")
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
        shown.append(np.asarray(image, np.float32) / 255)
        page.wait_for_timeout(60)
    return read_mouth(np.stack(shown))[:, 0]


def test_lips_follow_the_microphone(launch, tmp_path):
    flags = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    browser = launch(*flags, f"--use-file-for-fake-audio-capture={spoken(tmp_path / 'voice.wav')}")
    with running(load_world("talker")) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        silent = mouth(page, 20)
        page.click(".mic")
        wait(page, "Number(document.getElementById('lips').textContent) > 0")
        page.wait_for_timeout(1000)
        speaking = mouth(page, 60)
        page.screenshot(path=OUT / "play-talker.png")
    assert speaking.std() > 2 * silent.std(), (silent, speaking)


def test_a_picture_of_ones_own_a_seed_and_a_recording(browser, tmp_path):
    (tmp_path / "green.png").write_bytes(png(200, 120, (10, 200, 30)))
    with running(WORLDS["fake"]()) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        page.set_input_files("#file", tmp_path / "green.png")
        wait(page, "document.querySelectorAll('#starts img').length == 3")
        wait(page, "canvas.getContext('2d').getImageData(9, 9, 1, 1).data.join() == '10,200,30,255'")
        page.click("#starts button:nth-child(2)")
        wait(page, "canvas.getContext('2d').getImageData(9, 9, 1, 1).data.join() == '200,30,30,255'")
        page.fill("#seed", "-3")
        page.click("#restart")
        assert "0 to 2147483647" in page.inner_text("#toast")
        page.keyboard.press("KeyN")
        assert int(page.input_value("#seed")) >= 0
        page.keyboard.press("KeyV")
        page.wait_for_selector("#recording", state="visible")
        page.wait_for_timeout(500)
        page.keyboard.press("KeyV")
        with page.expect_download() as download:
            page.click("#videos a")
        assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"


def test_a_hidden_tab_pauses_and_comes_back(browser):
    fake = FakeWorld(fps=40.0)
    with running(fake.world) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        hide = "(hidden) => {{ Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }});"
        turn = hide + " document.dispatchEvent(new Event('visibilitychange')); }}"
        page.evaluate(turn.format("true"))
        time.sleep(0.5)
        made = fake.sessions[0].made
        time.sleep(0.5)
        assert fake.sessions[0].made == made
        page.evaluate(turn.format("false"))
        wait_for_pictures(page)
        assert fake.sessions[0].made > made and len(fake.sessions) == 1


def test_one_viewer_too_many_reads_why_and_can_try_again(browser):
    with running(WORLDS["fake"](), max_viewers=1) as address, opened(browser, address) as first:
        wait_for_pictures(first)
        with opened(browser, address) as second:
            second.wait_for_selector("#overbutton", state="visible")
            assert "All seats are taken" in second.inner_text("#overlay")
            assert "room for 1 viewer" in second.inner_text("#overlay")
            first.goto("about:blank")
            second.wait_for_timeout(300)
            second.click("#overbutton")
            wait_for_pictures(second)


def test_fingers_walk_on_a_phone(browser):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with running(WORLDS["fake"]()) as address, opened(browser, address, **phone) as page:
        wait_for_pictures(page)
        page.evaluate(WATCH)
        box = page.locator("[data-action=turn_left]").bounding_box()
        page.mouse.move(box["x"] + 9, box["y"] + 9)
        page.mouse.down()
        wait(page, "window.seen.filter((frame) => frame.input > 0).length >= 6")
        assert "held" in page.get_attribute("[data-action=turn_left]", "class")
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        page.mouse.up()
        wait(page, "!document.querySelector('.held')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    OUT.mkdir(exist_ok=True)
    picture.save(OUT / "play-phone.png")


def test_a_real_environment_is_driven_by_its_page_and_kept(browser, tmp_path):
    options = ["--env", "ale_py:ALE/Pong-v5", "--option", "frameskip=1", "--size", "96x72", "--crop", "34,16,0,0"]
    args = parser().parse_args(["serve", *options, "--record", str(tmp_path / "out"), "--resize", "stretch"])
    args.policy = "random"
    real = Real.of(args, args.record)
    with running(real.world()) as address, opened(browser, address) as page:
        wait_for_pictures(page)
        assert "no model" in page.inner_text("#tagline").lower()
        page.evaluate(WATCH)
        up = page.locator("[data-action=right]")  # what Pong calls moving the paddle up
        up.hover()
        page.mouse.down()
        wait(page, "window.seen.filter((frame) => frame.input > 0).length >= 24", 60.0)
        OUT.mkdir(exist_ok=True)
        page.screenshot(path=OUT / "play-environment.png")
        page.mouse.up()
        page.click("#restart")
        wait(page, "window.seen.at(-1).index < 10")
    real.finish()
    clips = Clips(tmp_path / "out" / "train")
    held_up = clips.episode("actions", 0)[:, clips.meta["actions"].index("right")]
    frames = clips.episode("frames", 0).int()
    green = (frames[..., 1] > frames[..., 0] + 20).float().sum(2)  # of the paddle, by row
    rows = (green * torch.arange(96)).sum(1) / green.sum(1)
    assert held_up.sum() >= 20
    assert rows[held_up.nonzero()[-1]] < rows[held_up.nonzero()[0]] - 10
