"""One viewer: messages in, paced frames out, recordings; a slow browser gets fewer frames, never older ones."""

import asyncio
import logging
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidistill.conditioning.audio import to_pcm16
from vidistill.io import write_video
from vidistill.serve import protocol
from vidistill.serve.player import Player, Session, Shown

log = logging.getLogger(__name__)

MAX_NOTES = 32  # text messages that wait to be sent before no more are read
MAX_WORDS = 8  # prompts and texts that wait to be read
MAX_QUEUED_AUDIO_S = 60  # seconds of sound that wait to be heard
MAX_SOUNDS = 64  # pieces of sound, a picture's each, that wait to be sent; the oldest goes first
MAX_RECORDINGS = 16  # files kept; the oldest goes first
RECORD_BYTES = 256 * 1024 * 1024  # frames of one recording, uncompressed
FILM_SIDE = 512  # pixels an mp4 is enlarged to, about
SEND_S = 30.0  # a message that takes longer to send ends the connection


@dataclass(frozen=True)
class World:
    """What is served: its name, its keys, its picture size (height, width), and how a session opens.

    `starts`: pictures a dream can begin from, uint8 [H, W, 3], the first one by default; the user may bring another.
    None: it begins from noise, and takes no picture. `switches`: what its prompts may do to what is remembered, the
    default first; none: it takes no prompt. `given`: px frames it begins with; more than one: a still clip. `rate`:
    samples a second of the sound it moves its lips to, 0: it hears nothing; `speak` makes such sound of words.
    """

    name: str
    actions: tuple[str, ...]
    size: tuple[int, int]
    open: Callable[[int, np.ndarray | None], Session]  # seed, start image
    starts: Mapping[str, np.ndarray] | None = None
    given: int = 1
    switches: tuple[str, ...] = ()
    rate: int = 0
    speak: Callable[[str], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if self.starts is not None and not self.starts:
            raise ValueError(f"{self.name} begins from a picture: give at least one start image (--starts FOLDER)")

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        return self.starts or {}

    @property
    def choices(self) -> tuple[str, ...]:
        """What a reset may begin from."""
        return ("",) if self.starts is None else (*self.starts, "upload")

    def still(self, px: np.ndarray | None) -> np.ndarray | None:
        """What a session is given to begin from `px`: the picture, or it repeated [T, H, W, 3]."""
        return px if px is None or self.given == 1 else np.repeat(px[None], self.given, axis=0)


@dataclass(frozen=True)
class ViewerConfig:
    """Limits of one viewer. `in_flight`: frames sent and not yet drawn, beyond which frames are dropped."""

    in_flight: int = 6
    idle_s: float = 600.0
    record_s: float = 60.0

    def __post_init__(self) -> None:
        for name, value in (("in_flight", self.in_flight), ("idle_s", self.idle_s), ("record_s", self.record_s)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Bye:
    """Why a connection ends; the page shows `message` and acts on `reason`."""

    reason: str
    message: str
    code: int = 1000


class Recordings:
    """Finished films in a temporary folder, each under a name that cannot be guessed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vidistill-films-", ignore_cleanup_errors=True)
        self._films: dict[str, Path] = {}

    def path(self, name: str) -> Path | None:
        return self._films.get(name)

    def write(self, frames: list[np.ndarray], fps: float) -> str:
        """Writes the frames as mp4 and returns its name."""
        clip = np.stack(frames)
        clip = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]  # H.264 wants even sides
        name = f"{secrets.token_urlsafe(12)}.mp4"
        path = Path(self._folder.name) / name
        write_video(path, clip, fps, scale=max(1, FILM_SIDE // max(clip.shape[1:3])))
        self._films[name] = path
        while len(self._films) > MAX_RECORDINGS:
            oldest = next(iter(self._films))
            self._films.pop(oldest).unlink(missing_ok=True)
        return name

    def close(self) -> None:
        self._folder.cleanup()


class Viewer:
    """One connection and the session it owns, from `run` until `run` returns."""

    def __init__(self, socket: Any, world: World, cfg: ViewerConfig, films: Recordings) -> None:
        self.world, self.cfg = world, cfg
        self._socket, self._films = socket, films
        self._loop = asyncio.get_running_loop()
        self._news, self._wake = asyncio.Event(), asyncio.Event()  # for the pacer, for the sender
        self._notes: deque[dict[str, Any]] = deque()
        self._slot: Shown | None = None
        self._sounds: deque[bytes] = deque(maxlen=MAX_SOUNDS)
        self._lips: deque[float] = deque(maxlen=MAX_SOUNDS)  # ms from sound to the picture shown with it
        self._sent = self._seen = self._shown = self._dropped = 0
        self._mapped = -1  # chunk of the map sent last
        self._first = self._gap = False  # flags owed to the next frame sent
        self._active_at = self._loop.time()
        self._picture: np.ndarray | None = None
        self._clip: list[np.ndarray] | None = None
        self._films_made: set[asyncio.Task] = set()
        self._words: set[asyncio.Task] = set()  # prompts, texts to speak, and starts that wait for them
        self._reading = asyncio.Lock()
        self._hushes = 0  # interruptions so far
        image = world.still(next(iter(world.pictures.values()), None))
        self.player = Player(lambda: world.open(0, image), self._look)

    async def run(self) -> None:
        """Serves until the browser leaves, is idle for too long, or the stream fails."""
        tasks = [asyncio.create_task(part()) for part in (self._receive, self._pace, self._send, self._report)]
        try:
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest)
            errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
            if errors:
                log.info("a viewer's connection broke: %r", errors[0])
            elif bye := next((bye for task in done if (bye := task.result())), None):
                await self.part(self._socket, bye)
        finally:
            for task in (*tasks, *self._words):
                task.cancel()
            self.player.close()

    async def finished(self) -> None:
        """Returns when the session is closed and its memory free."""
        while not self.player.finished:
            self._news.clear()
            if not self.player.finished:
                await self._news.wait()

    @staticmethod
    async def part(socket: Any, bye: Bye) -> None:
        """Says why, and closes the connection."""
        try:
            async with asyncio.timeout(2):
                await socket.send_json({"type": "bye", "reason": bye.reason, "message": bye.message})
                await socket.close(bye.code)
        except Exception:  # whatever the transport raises for a browser that has gone
            log.debug("a viewer left before it could be told: %s", bye.message)

    def _look(self) -> None:
        """From the player's thread: there is something new."""
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:
            log.debug("the server has gone before its player")

    def _tell(self, kind: str, **fields: Any) -> None:
        self._notes.append({"type": kind, **fields})
        self._wake.set()

    def _greet(self, session: Session) -> None:
        height, width = self.world.size
        self._tell(
            "hello",
            protocol=protocol.VERSION,
            name=self.world.name,
            actions=self.world.actions,
            switches=self.world.switches,
            max_prompt=protocol.MAX_PROMPT,
            rate=self.world.rate,
            speaks=self.world.speak is not None,
            starts=None if self.world.starts is None else list(self.world.starts),
            width=width,
            height=height,
            fps=session.fps,
            nfe_per_chunk=session.nfe_per_chunk,
            frames_per_chunk=session.frames_per_chunk,
            memory_bytes=session.memory_bytes,
            places=session.navigator is not None and session.navigator.placed,
            remembers=session.navigator is not None and session.navigator.remembers,
            record_s=self.cfg.record_s,
            max_picture=protocol.MAX_PICTURE,
            max_seed=protocol.MAX_SEED,
        )

    # from the browser

    async def _receive(self) -> Bye | None:
        while True:
            left = self._active_at + self.cfg.idle_s - self._loop.time()
            try:
                async with asyncio.timeout(max(left, 0.0)):
                    event = await self._socket.receive()
            except TimeoutError:
                if self._clip is None:
                    minutes = self.cfg.idle_s / 60
                    return Bye("idle", f"Nobody pressed a key for {minutes:.3g} minutes, so the dream was let go.")
                self._active_at = self._loop.time()
                continue
            if event["type"] == "websocket.disconnect":
                return None
            try:
                self._obey(event)
            except ValueError as error:  # a MessageError, or the session says what it cannot do
                self._tell("error", message=str(error))
            while len(self._notes) >= MAX_NOTES:
                await asyncio.sleep(0.05)

    def _obey(self, event: Mapping[str, Any]) -> None:
        message: protocol.Message
        if (text := event.get("text")) is not None:
            message = protocol.parse_text(text, self.world.actions, self.world.choices)
        else:
            message = protocol.parse_bytes(event["bytes"], self.world.size)
            if isinstance(message, protocol.Picture) and self.world.starts is None:
                raise protocol.MessageError("this world begins from noise and takes no picture")
        if isinstance(message, protocol.Seen):
            if message.sequence > self._sent:
                raise protocol.MessageError(f"seen.sequence is {message.sequence}; {self._sent} frames were sent")
            self._seen = max(self._seen, message.sequence)
            self._wake.set()
            return
        self._active_at = self._loop.time()
        if self.player.session is None:
            raise protocol.MessageError("the stream has not begun yet; wait for hello")
        if isinstance(message, protocol.Keys):
            self.player.act(message.id, message.action)
        elif isinstance(message, protocol.Prompt):
            if message.switch not in self.world.switches:
                raise protocol.MessageError(f"this world takes no prompt with the switch {message.switch}")
            self._read(self._say(message))
        elif isinstance(message, protocol.Pause):
            self.player.pause(message.on)
            self._news.set()
        elif isinstance(message, protocol.Record):
            self._record(message.on)
        elif isinstance(message, protocol.Home | protocol.History):
            self._roam(message)
        elif isinstance(message, protocol.Say | protocol.ClearAudio | protocol.Speech):
            self._talk(self.player.session, message)
        elif isinstance(message, protocol.Picture):
            self._picture = message.px
            self._tell("picture", width=message.px.shape[1], height=message.px.shape[0])
        else:
            self._begin(message.seed, self._image(message.start))

    def _talk(self, session: Session, message: protocol.Say | protocol.ClearAudio | protocol.Speech) -> None:
        if not self.world.rate:
            raise protocol.MessageError("this world hears nothing")
        if isinstance(message, protocol.Speech):
            if session.queued_audio_s > MAX_QUEUED_AUDIO_S:
                raise protocol.MessageError(
                    f"more than {MAX_QUEUED_AUDIO_S} s of sound wait already: this was not heard"
                )
            if not self.player.paused:  # who is paused does not listen, and is not late afterwards
                session.set(audio=message.pcm)
        elif isinstance(message, protocol.ClearAudio):
            self._hushes += 1
            session.clear_audio()
        elif self.world.speak is None:
            raise protocol.MessageError(
                "words are spoken by espeak-ng, which is not here: pip install 'vidistill[audio]'"
            )
        else:
            self._read(self._speak(session, self.world.speak, message.text, self._hushes))

    def _read(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what has to do with words beside everything else, one after the other; it ends with the viewer."""
        if len(self._words) >= MAX_WORDS:
            work.close()
            raise protocol.MessageError("wait until the words before these are read")
        task = asyncio.create_task(self._in_turn(work))
        self._words.add(task)
        task.add_done_callback(self._words.discard)

    async def _in_turn(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with self._reading:
                await work
        except ValueError as error:
            self._tell("error", message=str(error))
        except Exception as error:  # whatever an encoder or a voice meets: a package or a file that is missing, ...
            log.exception("words could not be used")
            self._tell("error", message=f"These words could not be used: {error}")
        finally:
            work.close()

    async def _say(self, message: protocol.Prompt) -> None:
        await asyncio.to_thread(self.player.say, message.id, message.text, message.switch)

    async def _speak(self, session: Session, speak: Callable[[str], np.ndarray], text: str, hushes: int) -> None:
        pcm = await asyncio.to_thread(speak, text)
        if hushes == self._hushes:  # nobody interrupted meanwhile
            session.set(audio=pcm)

    def _begin(self, seed: int, image: np.ndarray | None) -> None:
        """Start again, under the words that came before."""

        async def begin() -> None:
            self.player.reset(seed, image)

        if self._words:
            self._read(begin())
        else:
            self.player.reset(seed, image)

    def _roam(self, message: protocol.Home | protocol.History) -> None:
        assert self.player.session is not None
        navigator = self.player.session.navigator
        if navigator is None:
            raise protocol.MessageError("this world knows no places")
        if isinstance(message, protocol.Home):
            navigator.return_to_start()
        else:
            navigator.show_history(message.on)

    def _image(self, start: str) -> np.ndarray | None:
        if start != "upload":
            return self.world.still(self.world.pictures.get(start))
        if self._picture is None:
            raise protocol.MessageError("send a picture before starting from it")
        return self.world.still(self._picture)

    # to the browser

    async def _pace(self) -> Bye | None:
        """Lets the frames go at the world's pace."""
        due, greeted = self._loop.time(), False
        while True:
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            self._news.clear()
            if not greeted and self.player.session is not None:
                self._greet(self.player.session)
                greeted = True
            if self.player.finished:
                return Bye("failed", f"The stream stopped: {self.player.error}", 1011)
            shown = self.player.take() if greeted else None
            if shown is None:
                await self._news.wait()
                continue
            self._show(shown)
            now, frame_s = self._loop.time(), self.player.frame_s
            due = (due if now - due < frame_s else now) + frame_s  # a short delay is made up for, a long one is not

    def _show(self, shown: Shown) -> None:
        if self._clip is not None:
            self._film(shown.frame.px)
        if self._slot is not None:  # the sender waits for the browser: this newer frame takes its place
            self._dropped, self._gap = self._dropped + 1, True
        navigator = None if self.player.session is None else self.player.session.navigator
        if navigator is not None and navigator.map and not self._notes and shown.frame.chunk != self._mapped:
            self._mapped = shown.frame.chunk
            self._tell("map", **navigator.map)
        if self.world.rate and shown.frame.sound is not None:
            self._sounds.append(protocol.pack_sound(to_pcm16(shown.frame.sound), index=shown.frame.index))
            if "audio_to_lip_ms" in shown.frame.stats:
                waited = 1000 * (time.perf_counter() - shown.frame.made_at)
                self._lips.append(shown.frame.stats["audio_to_lip_ms"] + waited)
        self._shown, self._first = self._shown + 1, self._first or shown.first
        self._slot = shown
        self._wake.set()

    async def _send(self) -> Bye | None:
        while True:
            self._wake.clear()
            if self._notes:
                async with asyncio.timeout(SEND_S):
                    await self._socket.send_json(self._notes.popleft())
            elif self._sounds:
                async with asyncio.timeout(SEND_S):
                    await self._socket.send_bytes(self._sounds.popleft())
            elif self._slot is not None and self._sent - self._seen < self.cfg.in_flight:
                async with asyncio.timeout(SEND_S):
                    await self._socket.send_bytes(self._pack(self._slot))
            else:
                await self._wake.wait()

    def _pack(self, shown: Shown) -> bytes:
        self._sent += 1
        frame, first, gap = shown.frame, self._first, self._gap
        self._slot, self._first, self._gap = None, False, False
        return protocol.pack_frame(
            frame.px,
            sequence=self._sent,
            index=frame.index,
            chunk=frame.chunk,
            input_id=shown.input_id,
            first=first,
            gap=gap,
            recording=self._clip is not None,
        )

    async def _report(self) -> Bye | None:
        """Once a second: what the page cannot measure itself."""
        before, at = 0, self._loop.time()
        while True:
            await asyncio.sleep(1.0)
            session, now = self.player.session, self._loop.time()
            if session is not None and not self._notes:
                self._tell(
                    "stats",
                    fps=round((self._shown - before) / (now - at), 2),
                    dropped=self._dropped,
                    memory_bytes=session.memory_bytes,
                    nfe_per_chunk=session.nfe_per_chunk,
                    lips_ms=round(float(np.percentile(self._lips, 95))) if self._lips else None,
                )
                self._lips.clear()
            before, at = self._shown, now

    # recording

    def _record(self, on: bool) -> None:
        if on == (self._clip is not None):
            raise protocol.MessageError("it is being recorded already" if on else "nothing is being recorded")
        if on:
            self._clip = []
            self._tell("record", state="on")
        else:
            self._finish_film("")

    def _film(self, px: np.ndarray) -> None:
        assert self._clip is not None and self.player.session is not None
        self._clip.append(px)
        most = min(self.cfg.record_s * self.player.session.fps, RECORD_BYTES // px.nbytes)
        if len(self._clip) >= most:
            self._finish_film("The recording reached its longest length.")

    def _finish_film(self, note: str) -> None:
        assert self.player.session is not None
        clip, self._clip = self._clip, None
        if not clip:
            self._tell("record", state="off", message="Nothing was shown, so nothing was recorded.")
            return
        self._tell("record", state="saving", message=note)
        task = asyncio.create_task(self._save(clip, self.player.session.fps))
        self._films_made.add(task)
        task.add_done_callback(self._films_made.discard)

    async def _save(self, clip: list[np.ndarray], fps: float) -> None:
        try:
            name = await asyncio.to_thread(self._films.write, clip, fps)
        except (OSError, ValueError, ImportError) as error:
            log.exception("a recording was not written")
            self._tell("record", state="off", message=f"The recording could not be written: {error}")
            return
        self._tell("record", state="ready", url=f"recordings/{name}", seconds=round(len(clip) / fps, 1))
