"""One viewer: messages in, paced frames out."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vidistill.serve import protocol
from vidistill.serve.gate import Budget
from vidistill.serve.outbox import Outbox
from vidistill.serve.player import Player
from vidistill.serve.protocol import MessageError
from vidistill.serve.recorder import Recorder, Recordings
from vidistill.streaming.session import StreamSession

log = logging.getLogger(__name__)

MAX_SLOW = 8  # prompts, texts and pictures that wait to be read
MESSAGES_S = 250  # messages a second on average; whoever sends more is read more slowly
MESSAGES_AT_ONCE = 500
MESSAGE_BYTES = 16 * 1024  # a longer message counts as several
COSTS = {protocol.Reset: 25, protocol.Say: 50, protocol.Picture: 50}  # how many messages these count as
TEXT_COST = 25  # and an input that an encoder reads
MAX_ERROR = 400  # characters of what is said of a message, which may quote it
MAX_QUEUED_AUDIO_S = 60  # seconds of audio that wait to be played


@dataclass(frozen=True)
class World:
    """What is served: its name, its picture size (height, width), and how a session opens.

    `starts`: pictures a run can begin from, uint8 [H, W, 3], the first one by default; the user may bring another.
    None: it begins from noise, and takes no picture. `given`: px frames it begins with; more than one: a still clip.
    `speak` makes audio of words; `about` says what is seen, where no model generates it. What else it takes, its
    sessions say.
    """

    name: str
    size: tuple[int, int]
    open: Callable[[int, np.ndarray | None], StreamSession]  # seed, start image
    starts: Mapping[str, np.ndarray] | None = None
    given: int = 1
    speak: Callable[[str], np.ndarray] | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if self.starts is not None and not self.starts:
            raise ValueError(f"{self.name} begins from a picture: give at least one start image (--starts FOLDER)")

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        return self.starts or {}

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


class Viewer:
    """One connection and the session it owns, from `run` until `run` returns."""

    def __init__(
        self, socket: Any, world: World, cfg: ViewerConfig, recordings: Recordings, decoding: asyncio.Lock
    ) -> None:
        self.world, self.cfg = world, cfg
        self._socket, self._out = socket, Outbox(socket, cfg.in_flight)
        self._recorder = Recorder(recordings, cfg.record_s, self._out.tell)
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._mapped = -1  # chunk of the map sent last
        self._active_at = self._loop.time()
        self._budget = Budget(MESSAGES_S, MESSAGES_AT_ONCE, self._loop.time)
        self._picture: np.ndarray | None = None
        self._png: bytes | None = None  # the newest picture that is not decoded yet
        self._decoding = decoding  # one picture at a time on the whole server
        self._slow: set[asyncio.Task] = set()  # what is read beside everything else, and starts that wait for it
        self._reading = asyncio.Lock()
        self._interruptions = 0
        self._actions: dict[type, Callable[[StreamSession, Any], None]] = {
            protocol.Set: self._set,
            protocol.Reset: self._reset,
            protocol.Pause: self._pause,
            protocol.Record: lambda session, message: self._recorder.switch(message.on, session.fps),
            protocol.ReturnToStart: lambda session, message: session.navigator.return_to_start(),
            protocol.ShowHistory: lambda session, message: session.navigator.show_history(message.on),
            protocol.Say: self._say,
            protocol.ClearAudio: self._clear_audio,
            protocol.Picture: self._upload,
        }
        image = world.still(next(iter(world.pictures.values()), None))
        self.player = Player(lambda: world.open(0, image), self._look)

    async def run(self) -> None:
        """Serves until the browser leaves, is idle for too long, or the stream fails."""
        tasks = [asyncio.create_task(part()) for part in (self._receive, self._pace, self._out.run, self._report)]
        try:
            done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in rest:
                task.cancel()
            if rest:
                await asyncio.wait(rest)
            errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
            if errors:
                log.debug("a viewer's connection broke: %r", errors[0])
            elif bye := next((bye for task in done if (bye := task.result())), None):
                await self.part(self._socket, bye)
        finally:
            for task in (*tasks, *self._slow):
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

    # from the browser

    async def _receive(self) -> Bye | None:
        while True:
            left = self._active_at + self.cfg.idle_s - self._loop.time()
            try:
                async with asyncio.timeout(max(left, 0.0)):
                    event = await self._socket.receive()
            except TimeoutError:
                if not self._recorder.on:
                    minutes = self.cfg.idle_s / 60
                    return Bye("idle", f"Nothing was pressed for {minutes:.3g} minutes, so the stream was stopped.")
                self._active_at = self._loop.time()
                continue
            if event["type"] == "websocket.disconnect":
                return None
            cost = 1 + len(event.get("text") or event.get("bytes") or "") / MESSAGE_BYTES
            try:
                cost += self._obey(event)
            except ValueError as error:  # a MessageError, or the session says what it cannot do
                self._out.tell("error", message=str(error)[:MAX_ERROR])
            except Exception as error:  # an input may meet values that its author did not think of
                log.debug("a message could not be used", exc_info=True)
                self._out.tell("error", message=f"This could not be used: {type(error).__name__}")
            await asyncio.sleep(self._budget.take(cost))
            while self._out.crowded:
                await asyncio.sleep(0.05)

    def _obey(self, event: Mapping[str, Any]) -> int:
        """Do what a message asks for; returns how many messages that counts as."""
        session = self.player.session
        if (text := event.get("text")) is not None:
            message = protocol.parse_text(text)
        else:
            message = protocol.parse_bytes(event["bytes"], () if session is None else tuple(session.takes))
        if isinstance(message, protocol.Seen):
            self._out.acknowledge(message.sequence)
            return 0
        self._active_at = self._loop.time()
        if session is None:
            raise MessageError("the stream has not begun yet; wait for hello")
        self._actions[type(message)](session, message)
        if isinstance(message, protocol.Set) and any(isinstance(value, str) for value in message.inputs.values()):
            return TEXT_COST
        return COSTS.get(type(message), 0)

    def _set(self, session: StreamSession, message: protocol.Set) -> None:
        if unknown := sorted(message.inputs.keys() - session.takes.keys() - {"switch"}):
            raise MessageError(f"this world takes no {unknown[0]}; it takes {', '.join(session.takes) or 'nothing'}")
        kinds = {session.takes[name]["kind"] for name in message.inputs.keys() & session.takes.keys()}
        if "sound" in kinds:
            if self.player.paused:  # who is paused does not listen, and is not late afterwards
                return
            self._check_room(session)
        if "text" in kinds:  # an encoder takes its time
            self._read(self._set_slowly(session, message))
        else:
            self._out.know(session.set(**message.inputs), message.id)

    async def _set_slowly(self, session: StreamSession, message: protocol.Set) -> None:
        self._out.know(await asyncio.to_thread(lambda: session.set(**message.inputs)), message.id)

    @staticmethod
    def _check_room(session: StreamSession) -> None:
        if session.queued_audio_s > MAX_QUEUED_AUDIO_S:
            raise MessageError(f"more than {MAX_QUEUED_AUDIO_S} s of audio wait already: this was dropped")

    def _say(self, session: StreamSession, message: protocol.Say) -> None:
        if "audio" not in session.takes:
            raise MessageError("this world takes no audio")
        if self.world.speak is None:
            raise MessageError("words are spoken by espeak-ng, which is not here: pip install 'vidistill[audio]'")
        self._check_room(session)
        self._read(self._speak(session, self.world.speak, message.text, self._interruptions))

    async def _speak(self, session: StreamSession, speak: Callable[[str], np.ndarray], text: str, before: int) -> None:
        pcm = await asyncio.to_thread(speak, text)
        if before == self._interruptions:
            self._check_room(session)
            session.set(audio=pcm)

    def _clear_audio(self, session: StreamSession, message: protocol.ClearAudio) -> None:
        if "audio" not in session.takes:
            raise MessageError("this world takes no audio")
        self._interruptions += 1
        session.clear_audio()

    def _read(self, work: Coroutine[Any, Any, None]) -> None:
        """Do slow work beside everything else, one piece after the other; it ends with the viewer."""
        if len(self._slow) >= MAX_SLOW:
            work.close()
            raise MessageError("wait until what was sent before is read")
        task = asyncio.create_task(self._in_turn(work))
        self._slow.add(task)
        task.add_done_callback(self._slow.discard)

    async def _in_turn(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with self._reading:
                await work
        except ValueError as error:
            self._out.tell("error", message=str(error)[:MAX_ERROR])
        except Exception as error:  # whatever an encoder or a voice meets: a package or a file that is missing, ...
            log.exception("what a viewer sent could not be used")
            self._out.tell("error", message=f"This could not be used: {error}")
        finally:
            work.close()

    def _pause(self, session: StreamSession, message: protocol.Pause) -> None:
        self.player.pause(message.on)
        self._news.set()

    def _upload(self, session: StreamSession, message: protocol.Picture) -> None:
        if self.world.starts is None:
            raise MessageError("this world begins from noise and takes no picture")
        png, self._png = self._png, message.png
        if png is None:  # else a picture waits already, and this newer one takes its place
            self._read(self._decode())

    async def _decode(self) -> None:
        async with self._decoding:
            png, self._png = self._png, None
            assert png is not None
            px = await asyncio.to_thread(protocol.read_picture, png, self.world.size)
        self._picture = px
        self._out.tell("picture", width=px.shape[1], height=px.shape[0])

    def _reset(self, session: StreamSession, message: protocol.Reset) -> None:
        """Start again, under the prompts that came before."""
        image = self._image(message.start)

        async def begin() -> None:
            self.player.reset(message.seed, image)

        if self._slow:
            self._read(begin())
        else:
            self.player.reset(message.seed, image)

    def _image(self, start: str) -> np.ndarray | None:
        if self.world.starts is None and not start:
            return None
        if start == "upload" and self.world.starts and self._picture is None:
            raise MessageError("send a picture before starting from it")
        px = self._picture if start == "upload" else self.world.pictures.get(start)
        if px is None:
            raise MessageError(f"there is no start image {start[:40]!r}; choose one that the page shows")
        return self.world.still(px)

    # to the browser

    def _greet(self, session: StreamSession) -> None:
        height, width = self.world.size
        self._out.tell(
            "hello",
            protocol=protocol.VERSION,
            name=self.world.name,
            about=self.world.about,
            takes=session.takes,
            speaks=self.world.speak is not None,
            starts=None if self.world.starts is None else list(self.world.starts),
            width=width,
            height=height,
            fps=session.fps,
            nfe_per_chunk=session.nfe_per_chunk,
            frames_per_chunk=session.frames_per_chunk,
            memory_bytes=session.memory_bytes,
            has_map=session.navigator.placed,
            has_history=session.navigator.remembers,
            record_s=self.cfg.record_s,
            max_text=protocol.MAX_TEXT,
            max_picture=protocol.MAX_PICTURE,
            max_seed=protocol.MAX_SEED,
        )

    async def _pace(self) -> Bye | None:
        """Lets the frames go at the world's pace."""
        due, greeted = self._loop.time(), False
        while True:
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            self._news.clear()
            session = self.player.session
            if not greeted and session is not None:
                self._greet(session)
                greeted = True
            if self.player.finished:
                return Bye("failed", f"The stream stopped: {self.player.error}", 1011)
            shown = self.player.take() if greeted else None
            if shown is None or session is None:
                await self._news.wait()
                continue
            self._recorder.add(shown.frame.px, session.fps)
            self._map(session, shown.frame.chunk)
            self._out.show(shown, self._recorder.on)
            now, frame_s = self._loop.time(), self.player.frame_s
            due = (due if now - due < frame_s else now) + frame_s  # a short delay is made up for, a long one is not

    def _map(self, session: StreamSession, chunk: int) -> None:
        """Tell where the stream is, once a chunk."""
        if chunk != self._mapped and session.navigator.map and not self._out.noted:
            self._mapped = chunk
            self._out.tell("map", **session.navigator.map)

    async def _report(self) -> None:
        """Once a second: what the page cannot measure itself."""
        before, at = 0, self._loop.time()
        while True:
            await asyncio.sleep(1.0)
            session, now = self.player.session, self._loop.time()
            if session is not None and not self._out.noted:
                self._out.tell(
                    "stats",
                    fps=round((self._out.shown - before) / (now - at), 2),
                    dropped=self._out.dropped,
                    memory_bytes=session.memory_bytes,
                    nfe_per_chunk=session.nfe_per_chunk,
                    lips_ms=self._out.lips_ms(),
                )
            before, at = self._out.shown, now
