"""The web application: the page, its start images and recordings, and one WebSocket a viewer."""

import asyncio
import hmac
import io
import ipaddress
import logging
import os
import socket as sockets
from collections.abc import Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image

from vidistill.checkpoint import start_pictures
from vidistill.io import PICTURES, picture_files, read_image
from vidistill.serve import protocol
from vidistill.serve.gate import Budget, Gates, Limits, address_of
from vidistill.serve.log import few_lines
from vidistill.serve.recorder import Recordings
from vidistill.serve.viewer import Bye, Viewer, ViewerConfig, World
from vidistill.streaming.runtime import SpeedConfig, load_fast
from vidistill.streaming.session import StreamConfig, StreamSession, check_gain

log = logging.getLogger(__name__)

ASSETS = {
    "": ("index.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' ws: wss:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SESSIONS_S = 4  # sessions that are opened a second on average: whoever comes and goes costs the others little
REQUESTS_S = 100  # requests that are answered a second on average, of all connections: also of one that never waits
REQUESTS_AT_ONCE = 200
COOKIE = "vidistill_token"
OURSELVES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServeConfig:
    """Where and for whom the app runs. `token`: what the address of the page must carry; empty: nothing.

    `origins`: further web addresses the page may be opened under, such as "https://demo.example.org" behind a proxy.
    `patience_s`: how long a new viewer waits for a place before it is refused.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_viewers: int = 4
    origins: tuple[str, ...] = ()
    patience_s: float = 2.0
    token: str = ""
    viewer: ViewerConfig = field(default_factory=ViewerConfig)

    def __post_init__(self) -> None:
        if self.max_viewers < 1:
            raise ValueError(f"max_viewers is {self.max_viewers}; at least 1 is needed")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; allowed are 0 (any free one) to 65535")
        for origin in self.origins:
            if urlsplit(origin).scheme not in ("http", "https") or not urlsplit(origin).netloc:
                raise ValueError(f"origin {origin!r} is no web address; write it like https://demo.example.org")


def needs_extra(error: ImportError) -> ImportError:
    return ImportError(f"serving needs {error.name}: pip install 'vidistill[demo]'")


def host_allowed(host: str, cfg: ServeConfig) -> bool:
    """Whether a Host header names this server; else another site's name was pointed at it."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in (*OURSELVES, cfg.host.lower()) or any(urlsplit(o).netloc.lower() == host.lower() for o in cfg.origins):
        return True
    if cfg.host not in ("0.0.0.0", "::", ""):
        return False
    if name == sockets.gethostname().lower():
        return True
    try:
        return bool(ipaddress.ip_address(name))  # an address is nobody's to point elsewhere
    except ValueError:
        return False


def origin_allowed(origin: str | None, host: str, cfg: ServeConfig) -> bool:
    """Whether a WebSocket may be opened: by this very page, by a named origin, or by something that is no browser."""
    if origin is None:
        return True
    try:
        return bare(origin) in map(bare, cfg.origins) or urlsplit(origin).netloc == host
    except ValueError:  # no address at all
        return False


def knows_token(connection: Any, cfg: ServeConfig) -> bool:
    """Whether a request, or the opening of a WebSocket, carries the token in its address or in the page's cookie."""
    given = (connection.query_params.get("token", ""), connection.cookies.get(COOKIE, ""))
    return not cfg.token or any(hmac.compare_digest(one.encode(), cfg.token.encode()) for one in given)


def bare(origin: str) -> str:
    """A web address as browsers name it: without what follows the host, in small letters."""
    return "{0.scheme}://{0.netloc}".format(urlsplit(origin)).lower()


class Seats:
    """Counts viewers: at most `limit`, and `per_address` from elsewhere, each until its session is closed."""

    def __init__(self, limit: int, per_address: int) -> None:
        self.limit, self.per_address = limit, per_address
        self._taken: list[str | None] = []  # whom each counts towards
        self._free = asyncio.Condition()

    @property
    def taken(self) -> int:
        return len(self._taken)

    def free(self, address: str | None) -> bool:
        own = address is not None and self._taken.count(address) >= self.per_address
        return self.taken < self.limit and not own

    async def take(self, address: str | None, patience_s: float) -> bool:
        try:
            async with asyncio.timeout(patience_s), self._free:
                await self._free.wait_for(lambda: self.free(address))
                self._taken.append(address)
                return True
        except TimeoutError:
            return False

    async def give_back(self, address: str | None) -> None:
        async with self._free:
            self._taken.remove(address)
            self._free.notify_all()


def create_app(world: World, cfg: ServeConfig | None = None, ready: Callable[[], None] | None = None) -> Any:
    """The FastAPI application that serves `world`; `ready` is called when it is about to answer."""
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise needs_extra(error) from error
    cfg = cfg or ServeConfig()
    recordings, seats = Recordings(), Seats(cfg.max_viewers, max(1, cfg.max_viewers // 2))

    @asynccontextmanager
    async def lifespan(app: Any):
        with few_lines():
            if ready is not None:
                ready()
            yield
        recordings.close()

    app = FastAPI(title="vidistill", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    requests = Budget(REQUESTS_S, REQUESTS_AT_ONCE)
    _guard(app, cfg, requests)
    _add_files(app, world, recordings)
    _add_stream(app, world, cfg, recordings, seats, requests)
    return app


def _guard(app: Any, cfg: ServeConfig, requests: Budget) -> None:
    """Answers only to its own name, so many requests a second, and tells browsers to load nothing from elsewhere."""
    from fastapi import Request
    from fastapi.responses import PlainTextResponse

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Any:
        await asyncio.sleep(requests.take())
        host = request.headers.get("host", "")
        if not host_allowed(host, cfg):
            answer = PlainTextResponse(f"This server does not answer to {host!r}; name it with --origin.\n", 403)
        elif not knows_token(request, cfg):
            answer = PlainTextResponse("Open the address that `vidistill serve` printed, with its token.\n", 403)
        else:
            answer = await call_next(request)
            if cfg.token and request.url.path == "/":  # with it the page loads its files and opens its stream
                answer.set_cookie(COOKIE, cfg.token, httponly=True, samesite="strict")
        answer.headers.update(HEADERS)
        return answer


def _add_files(app: Any, world: World, recordings: Recordings) -> None:
    from fastapi import HTTPException
    from fastapi.responses import FileResponse, Response

    page = resources.files("vidistill.serve") / "page"
    assets = {path: ((page / name).read_bytes(), kind) for path, (name, kind) in ASSETS.items()}
    starts = {f"{name}.png": _png(px) for name, px in world.pictures.items()}

    def add(path: str, body: bytes, kind: str) -> None:
        app.get(f"/{path}")(lambda: Response(body, media_type=kind))

    for path, (body, kind) in assets.items():
        add(path, body, kind)

    @app.get("/starts/{name}")
    def start(name: str) -> Any:
        if name not in starts:
            raise HTTPException(404, "no such start image")
        return Response(starts[name], media_type="image/png")

    @app.get("/recordings/{name}")
    def recording(name: str) -> Any:
        path = recordings.path(name)
        if path is None:
            raise HTTPException(404, "no such recording; only the latest are kept")
        return FileResponse(path, media_type="video/mp4", filename=f"vidistill-{world.name}.mp4")


def _png(px: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(px).save(file, "PNG")
    return file.getvalue()


def _add_stream(
    app: Any, world: World, cfg: ServeConfig, recordings: Recordings, seats: Seats, requests: Budget
) -> None:
    from fastapi import WebSocket

    leaving: set[asyncio.Task] = set()
    decoding = asyncio.Lock()
    opening = Budget(SESSIONS_S, 2 * cfg.max_viewers)

    async def clear(viewer: Viewer, address: str | None) -> None:
        await viewer.finished()
        await seats.give_back(address)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"name": world.name, "viewers": seats.taken, "max_viewers": seats.limit}

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await asyncio.sleep(requests.take())
        host, origin = socket.headers.get("host", ""), socket.headers.get("origin")
        if not host_allowed(host, cfg) or not origin_allowed(origin, host, cfg):
            log.warning("refused a connection to %.80r from the page of %.80r; allow it with --origin", host, origin)
            return await socket.close(1008)
        if not knows_token(socket, cfg):
            return await socket.close(1008)
        await socket.accept()
        address = address_of(socket.client.host if socket.client else "")
        if not await seats.take(address, cfg.patience_s):
            people = "1 viewer" if seats.limit == 1 else f"{seats.limit} viewers"
            await Viewer.part(socket, Bye("full", f"This server has room for {people}, and it is full.", 1013))
            return
        try:
            await asyncio.sleep(opening.take())
            viewer = Viewer(socket, world, cfg.viewer, recordings, decoding)
        except BaseException:
            await seats.give_back(address)
            raise
        try:
            await viewer.run()
        finally:
            task = asyncio.create_task(clear(viewer, address))
            leaving.add(task)
            task.add_done_callback(leaving.discard)


def read_starts(folder: str | Path, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """The pictures of a folder as start images, uint8 [H, W, 3] of `size`, by file name without its suffix."""
    if not Path(folder).is_dir():
        raise ValueError(f"--starts {folder} is no folder of start images")
    if not (found := picture_files(folder)):
        raise ValueError(f"--starts {folder} holds no picture; put files there that end in {', '.join(PICTURES)}")
    return by_name(found, size)


def by_name(pictures: Iterable[Path], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Pictures, uint8 [H, W, 3] of `size`, by file name without its suffix; ValueError where two have one name."""
    files: dict[str, Path] = {}
    for path in pictures:
        name = os.fsencode(path.stem).decode(errors="replace")  # a name in another encoding cannot be sent
        if name == "upload":
            raise ValueError(f"{path}: that name is of the visitor's own picture; choose another")
        if name in files:
            raise ValueError(f"{files[name]} and {path} have one name on the page; rename one of them")
        files[name] = path
    return {name: read_image(path, size) for name, path in files.items()}


def load_world(
    name: str, starts: str | Path | None = None, speed: SpeedConfig | None = None, gain: float = 1.0
) -> World:
    """The world of a student by bundled name or path, computed as `speed` says.

    `starts`: a folder of pictures to begin from; by default what `checkpoint.start_pictures` finds. `gain`: how far a
    walker goes by the same action. ValueError for pictures to a student that begins from noise, and for a gain to one
    that is not told where it goes.
    """
    bundle, codec = load_fast(name, speed or SpeedConfig())
    size = (bundle.shape.height * codec.spatial_factor, bundle.shape.width * codec.spatial_factor)
    given = bundle.picture_frames  # latent frames a run begins with
    if starts is not None and not given:
        raise ValueError(f"--starts {starts}: {name} starts from noise and takes no picture; leave --starts out")

    check_gain(bundle, codec, gain)  # here rather than when somebody opens the page

    def open_session(seed: int, image: np.ndarray | None) -> Any:
        # no queue: the player says when a chunk begins, and it takes the latest keys
        return StreamSession(bundle, codec, StreamConfig(seed=seed, queue_frames=0, gain=gain), image=image)

    images = None
    if given and starts is not None:
        images = read_starts(starts, size)
    elif given:
        images = by_name(start_pictures(name), size)
    px_given = codec.px_frames(given) if given else 1
    audio = bundle.spec.audio
    return World(Path(name).stem, size, open_session, images, px_given, voice(audio.rate) if audio else None)


def voice(rate: int) -> Callable[[str], np.ndarray] | None:
    """What speaks words aloud, float32 [S] at `rate`; None where espeak-ng is not installed."""
    from vidistill.worlds.talker import speech

    try:
        speech.loader()
    except ImportError as error:
        log.info("no speech from text: %s", error)
        return None
    return lambda text: speech.resample(speech.say(text).pcm, speech.RATE, rate)


def serve(
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    speed: SpeedConfig | None = None,
    starts: str | Path | None = None,
    max_viewers: int = 4,
    origins: Sequence[str] = (),
    gain: float = 1.0,
    token: str = "",
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves the student `name` until interrupted. `ready` is called with the page's address once it answers."""
    cfg = ServeConfig(host=host, port=port, max_viewers=max_viewers, origins=tuple(origins), token=token)
    run(load_world(name, starts, speed, gain), cfg, ready)


def run(world: World, cfg: ServeConfig, ready: Callable[[str], None] | None = None) -> None:
    """Serves `world` until interrupted."""
    try:
        import uvicorn
        import websockets  # noqa: F401
    except ImportError as error:
        raise needs_extra(error) from error
    door = _bind(cfg.host, cfg.port)
    address = f"http://{_shown_host(cfg.host)}:{door.getsockname()[1]}/"
    if cfg.token:
        address += f"?token={quote(cfg.token)}"
    elif cfg.host != "localhost" and address_of(cfg.host) is not None:
        log.warning(
            "anyone who reaches %s may take a seat and the machine's time: give --token WORD, or bind to 127.0.0.1",
            address,
        )
    app = create_app(world, cfg, lambda: ready(address) if ready is not None else log.info("serving %s", address))
    uvicorn.Server(server_config(app)).run(sockets=[door])


def server_config(app: Any, limits: Limits | None = None) -> Any:
    """How uvicorn runs the app: bounded requests and messages, dead connections noticed, no compression of noise."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol  # httptools has no limit on the length of a request

    limits = limits or Limits()
    gates: Any = Gates(limits, H11Protocol)
    return uvicorn.Config(
        app,
        http=gates,
        h11_max_incomplete_event_size=limits.head_bytes,
        timeout_keep_alive=5,
        log_level="error",  # warnings are of single requests: whoever sends bad ones would fill the log
        ws_max_size=2 * protocol.MAX_PICTURE,  # below it a message too large is answered; above it the connection ends
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=3,
        server_header=False,
    )


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> sockets.socket:
    try:
        family = sockets.getaddrinfo(host or None, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE)[0][0]
        door = sockets.socket(family, sockets.SOCK_STREAM)
        try:
            door.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
            door.bind((host, port))
            door.listen()  # from here on a browser waits instead of being refused
        except OSError:
            door.close()
            raise
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
    return door
