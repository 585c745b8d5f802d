"""What goes to a browser; a slow one gets fewer frames, never older ones."""

import asyncio
import time
from collections import deque
from typing import Any

import numpy as np

from vidistill.conditioning.audio import to_pcm16
from vidistill.serve import protocol
from vidistill.serve.player import Shown

MAX_NOTES = 32  # text messages that wait to be sent before no more are read
MAX_SOUNDS = 64  # pieces of sound, a picture's each, that wait to be sent; the oldest goes first
MAX_IDS = 256  # inputs whose browser id is remembered
SEND_S = 30.0  # a message that takes longer to send ends the connection


class Outbox:
    """What waits to be sent to one browser: notes in their order, then sound, then the newest frame alone.

    `in_flight`: frames sent and not yet drawn, beyond which frames are dropped.
    """

    def __init__(self, socket: Any, in_flight: int) -> None:
        self._socket, self._in_flight = socket, in_flight
        self._wake = asyncio.Event()
        self._notes: deque[dict[str, Any]] = deque()
        self._sounds: deque[bytes] = deque(maxlen=MAX_SOUNDS)
        self._slot: tuple[Shown, bool] | None = None  # and whether it is being recorded
        self._ids: dict[int, int] = {}  # id of the session -> id of the browser
        self._newest = 0  # of the browser
        self._lips: deque[float] = deque(maxlen=MAX_SOUNDS)  # ms from sound to the picture shown with it
        self._sent = self._seen = self.shown = self.dropped = 0
        self._first = self._gap = False  # flags owed to the next frame sent

    @property
    def crowded(self) -> bool:
        """Whether so many notes wait that nothing should make more of them."""
        return len(self._notes) >= MAX_NOTES

    @property
    def noted(self) -> bool:
        """Whether a note waits: others that will be told again anyway may be left out."""
        return bool(self._notes)

    def tell(self, kind: str, **fields: Any) -> None:
        self._notes.append({"type": kind, **fields})
        self._wake.set()

    def know(self, input_id: int, browser_id: int) -> None:
        """Frames made with `input_id` answer the browser's `browser_id`; 0: they answer the one before it too."""
        self._newest = browser_id or self._newest
        self._ids[input_id] = self._newest
        while len(self._ids) > MAX_IDS:
            del self._ids[next(iter(self._ids))]

    def acknowledge(self, sequence: int) -> None:
        if sequence > self._sent:
            raise protocol.MessageError(f"seen.sequence is {sequence}; {self._sent} frames were sent")
        self._seen = max(self._seen, sequence)
        self._wake.set()

    def show(self, shown: Shown, recording: bool) -> None:
        """Send this frame, unless a newer one comes before the browser has drawn enough of those before it."""
        if self._slot is not None:
            self.dropped, self._gap = self.dropped + 1, True
        frame = shown.frame
        if frame.sound is not None:
            self._sounds.append(protocol.pack_sound(to_pcm16(frame.sound), index=frame.index))
            if "audio_to_lip_ms" in frame.stats:
                self._lips.append(frame.stats["audio_to_lip_ms"] + 1000 * (time.perf_counter() - frame.made_at))
        self.shown, self._first = self.shown + 1, self._first or shown.first
        self._slot = (shown, recording)
        self._wake.set()

    def lips_ms(self) -> int | None:
        """95th percentile of sound to picture since it was last asked for."""
        late = round(float(np.percentile(self._lips, 95))) if self._lips else None
        self._lips.clear()
        return late

    async def run(self) -> None:
        """Sends for ever; TimeoutError or an error of the transport for a browser that has gone."""
        while True:
            self._wake.clear()
            if self._notes:
                sending = self._socket.send_json(self._notes.popleft())
            elif self._sounds:
                sending = self._socket.send_bytes(self._sounds.popleft())
            elif self._slot is not None and self._sent - self._seen < self._in_flight:
                sending = self._socket.send_bytes(self._pack(*self._slot))
            else:
                await self._wake.wait()
                continue
            async with asyncio.timeout(SEND_S):
                await sending

    def _pack(self, shown: Shown, recording: bool) -> bytes:
        self._sent += 1
        frame, first, gap = shown.frame, self._first, self._gap
        self._slot, self._first, self._gap = None, False, False
        return protocol.pack_frame(
            frame.px,
            sequence=self._sent,
            index=frame.index,
            chunk=frame.chunk,
            input_id=self._ids.get(frame.input_id, 0),
            first=first,
            gap=gap,
            recording=recording,
        )
