"""Recordings: what a viewer was shown, as mp4."""

import asyncio
import logging
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vidistill.io import write_video
from vidistill.serve.protocol import MessageError

log = logging.getLogger(__name__)

MAX_RECORDINGS = 16  # files kept; the oldest goes first
RECORD_BYTES = 256 * 1024 * 1024  # frames of one recording, uncompressed
VIDEO_SIDE = 512  # pixels an mp4 is enlarged to, about


class Recordings:
    """Finished videos in a temporary folder, each under a name that cannot be guessed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vidistill-recordings-", ignore_cleanup_errors=True)
        self._videos: dict[str, Path] = {}

    def path(self, name: str) -> Path | None:
        return self._videos.get(name)

    def write(self, frames: list[np.ndarray], fps: float) -> str:
        """Writes the frames as mp4 and returns its name."""
        clip = np.stack(frames)
        clip = clip[:, : clip.shape[1] // 2 * 2, : clip.shape[2] // 2 * 2]  # H.264 wants even sides
        name = f"{secrets.token_urlsafe(12)}.mp4"
        path = Path(self._folder.name) / name
        write_video(path, clip, fps, scale=max(1, VIDEO_SIDE // max(clip.shape[1:3])))
        self._videos[name] = path
        while len(self._videos) > MAX_RECORDINGS:
            oldest = next(iter(self._videos))
            self._videos.pop(oldest).unlink(missing_ok=True)
        return name

    def close(self) -> None:
        self._folder.cleanup()


class Recorder:
    """One viewer's recording: at most one at a time, saved in a thread."""

    def __init__(self, recordings: Recordings, longest_s: float, tell: Callable[..., None]) -> None:
        self._recordings, self._longest_s, self._tell = recordings, longest_s, tell
        self._clip: list[np.ndarray] | None = None
        self._saving: asyncio.Task | None = None

    @property
    def on(self) -> bool:
        return self._clip is not None

    def switch(self, on: bool, fps: float) -> None:
        """Begin to record, or end and save."""
        if on == self.on:
            raise MessageError("it is being recorded already" if on else "nothing is being recorded")
        if on and self._saving is not None and not self._saving.done():
            raise MessageError("the last recording is still being saved")
        if on:
            self._clip = []
            self._tell("record", state="on")
        else:
            self._finish(fps, "")

    def add(self, px: np.ndarray, fps: float) -> None:
        """A picture that is shown."""
        if self._clip is None:
            return
        self._clip.append(px)
        if len(self._clip) >= min(self._longest_s * fps, RECORD_BYTES // px.nbytes):
            self._finish(fps, "The recording reached its longest length.")

    def _finish(self, fps: float, note: str) -> None:
        clip, self._clip = self._clip, None
        if not clip:
            self._tell("record", state="off", message="Nothing was shown, so nothing was recorded.")
            return
        self._tell("record", state="saving", message=note)
        self._saving = asyncio.create_task(self._save(clip, fps))

    async def _save(self, clip: list[np.ndarray], fps: float) -> None:
        said: dict[str, Any] = {"state": "ready", "seconds": round(len(clip) / fps, 1)}
        try:
            said["url"] = f"recordings/{await asyncio.to_thread(self._recordings.write, clip, fps)}"
        except Exception as error:  # whatever a full disk or an encoder comes up with: the stream goes on
            log.exception("a recording was not written")
            said = {"state": "off", "message": f"The recording could not be written: {error}"}
        self._tell("record", **said)
