"""What a user asks of a running stream, and the conditions that a network is given for it."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.conditioning.audio import AudioConfig, Track
from vidistill.conditioning.camera import CameraConfig, Pose, latent_rate, wanted
from vidistill.conditioning.condition import (
    ACTION_SITE,
    AUDIO_SITE,
    MOVE_SITE,
    POSE_SITE,
    Condition,
    Encode,
    hold_action,
    pack_audio,
    pack_camera,
    reference_channels,
)
from vidistill.config import build

KEPT_POSES = 64  # latent frames whose pose a stream can go on from


@dataclass(frozen=True)
class ControlInput:
    """What the user asked for in `set` number `id`."""

    id: int
    action: tuple[float, ...]
    tokens: Tensor | None  # [1, L, D]
    switch: str = "keep"  # what a stream does to its memory when it meets these tokens


class LiveConditions:
    """The conditions a network takes, from what the user asks for: `control` is the latest, replaced as a whole.

    `sites` {site: D} and `text_dim` are the network's; `factor` px frames make a latent; `encode` reads prompts.
    Nothing asked for yet: actions are zero (standing still), everything else is null.
    With a `camera` the network is also told where it goes: what the held actions ask for, `gain` times as far, is
    integrated from the start of the stream. With `audio` it hears the sound of `track`, and with `pictured` it is told
    the picture the stream began with.
    """

    def __init__(
        self,
        sites: Mapping[str, int],
        text_dim: int,
        actions: Sequence[str],
        factor: int,
        device: torch.device | str,
        encode: Encode | None = None,
        camera: CameraConfig | None = None,
        audio: AudioConfig | None = None,
        pictured: bool = False,
    ) -> None:
        self.track = None if audio is None else Track(audio)
        self.pictured = pictured
        self._image: Tensor | None = None  # latent [1, 1, C, H, W] of the picture the stream began with
        self.encode = encode if text_dim else None
        self.camera, self.gain = camera, 1.0
        self._path: dict[int, Pose] = {}  # latent frame -> pose [1, 1] after it, of the newest frames
        self.sites, self.text_dim, self.factor, self.device = sites, text_dim, factor, device
        self.actions = tuple(actions) if ACTION_SITE in sites else ()
        needed = factor * len(self.actions) + 1
        if self.actions and sites[ACTION_SITE] != needed:
            raise ValueError(
                f"the network takes {sites[ACTION_SITE]} numbers a latent at site {ACTION_SITE!r}; {len(self.actions)} "
                f"actions of {factor} px frames and a flag are {needed}: student and codec do not belong together"
            )
        tokens = torch.zeros(1, 1, text_dim, device=device) if text_dim else None
        self.control = ControlInput(0, (0.0,) * len(self.actions), tokens)
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, record: Mapping[str, Any], factor: int, device: torch.device | str, encode: Encode | None = None
    ) -> "LiveConditions":
        """Inputs of the network a checkpoint's `record` describes; ValueError if it needs what cannot be held."""
        dit = record["dit"]
        if dit["extra_channels"] and dit["extra_channels"] != dit["channels"] + 1:
            raise ValueError(
                f"this network needs {dit['extra_channels']} condition channels; inputs give a reference picture and a "
                f"mask, {dit['channels'] + 1}"
            )
        sites = {name: site["dim"] for name, site in dit["sites"].items()}
        world = record["world"]
        camera = build(CameraConfig, world["camera"]) if world.get("camera") else None
        audio = build(AudioConfig, record["audio"]) if record.get("audio") else None
        pictured = dit["extra_channels"] > 0
        return cls(sites, dit["text_dim"], world.get("actions", ()), factor, device, encode, camera, audio, pictured)

    def speed_up(self, gain: float) -> None:
        """From now on an action goes `gain` times as far; ValueError for a network that is not told where it goes."""
        if gain != 1 and (self.camera is None or not {MOVE_SITE, POSE_SITE} & set(self.camera.sites)):
            raise ValueError("this student is not told how far its camera goes, so gain has no effect: leave it 1")
        self.gain = gain

    def begin(self, given: Tensor | None) -> None:
        """A stream begins with latents `given` [1, F, C, H, W]; ValueError if the network is to be told a picture."""
        if self.pictured and given is None:
            raise ValueError("this network is told the picture a stream begins with: start from an `image`")
        self._image = given[:, :1] if given is not None else None
        if self.track is not None:
            self.track.reset()

    def push_audio(self, pcm: np.ndarray) -> None:
        """Sound float [S] in [-1, 1] at the track's rate, to follow what was heard before; ValueError for other."""
        if self.track is None:
            raise ValueError("this student hears nothing: it takes no audio")
        if pcm.ndim != 1 or not np.issubdtype(pcm.dtype, np.floating) or not np.isfinite(pcm).all():
            raise ValueError(
                f"audio must be finite floats [S] at {self.track.cfg.rate} Hz, got {pcm.dtype} {pcm.shape}"
            )
        self.track.push(pcm, time.perf_counter())

    def set(
        self,
        action: Mapping[str, float] | Sequence[float] | None,
        prompt: str | None,
        tokens: Tensor | None,
        switch: str = "keep",
    ) -> int:
        """Replace what is given, keep the rest; returns the number of this wish. `switch` goes with a prompt."""
        if action is None and prompt is None and tokens is None:
            raise ValueError("set() needs an action, a prompt or tokens")
        if prompt is not None and tokens is not None:
            raise ValueError("set() takes a prompt or the tokens it is read as, not both")
        changed: dict[str, Any] = {}
        if prompt is not None:
            tokens = self.read_prompts([prompt])[0]
        if action is not None:
            changed["action"] = self.read_action(action)
        if tokens is not None:
            changed |= {"tokens": self.read_tokens(tokens), "switch": switch}
        with self._lock:
            self.control = replace(self.control, id=self.control.id + 1, **changed)
            return self.control.id

    def read_action(self, action: Mapping[str, float] | Sequence[float]) -> tuple[float, ...]:
        """One value in [0, 1] per action; those a mapping leaves out are 0. ValueError for anything else."""
        if not self.actions:
            raise ValueError("this student takes no actions")
        if isinstance(action, Mapping):
            if unknown := [name for name in action if name not in self.actions]:
                raise ValueError(f"action {unknown[0]!r} is unknown; actions are {', '.join((*self.actions, 'still'))}")
            values = [action.get(name, 0.0) for name in self.actions]
        else:
            values = list(action)
            if len(values) != len(self.actions):
                raise ValueError(f"action has {len(values)} values, one is needed for each of {list(self.actions)}")
        for name, value in zip(self.actions, values, strict=True):
            if not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
                raise ValueError(f"action {name!r} must be a number from 0 to 1, got {value!r}")
        return tuple(float(v) for v in values)

    def read_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Tokens [B, L, D] of prompts; ValueError if nothing reads them here."""
        if not prompts:
            return torch.zeros(0, 1, self.text_dim)
        if self.encode is None:
            raise ValueError("this student takes no prompt: it has no text encoder")
        return self.encode(prompts)

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens [L, D] as [1, L, D] on the network's device."""
        if not self.text_dim:
            raise ValueError("this student takes no tokens")
        if tokens.ndim != 2 or tokens.shape[1] != self.text_dim or not len(tokens):
            raise ValueError(f"tokens must be [L >= 1, {self.text_dim}], got {tuple(tokens.shape)}")
        return tokens[None].to(self.device, torch.float32)

    def condition(self, control: ControlInput, start: int, stop: int) -> Condition:
        """`control` held through latent frames start..stop-1; sites without an input are null."""
        per_frame = {
            site: torch.zeros(1, stop - start, dim, device=self.device)
            for site, dim in self.sites.items()
            if site != ACTION_SITE or not self.actions
        }
        if self.actions:
            action = torch.tensor(control.action, device=self.device)
            per_frame[ACTION_SITE] = hold_action(action, start, stop, self.factor)
        if self.camera is not None:
            per_frame |= {
                k: v.to(self.device) for k, v in self.advance_pose(control, start, stop).items() if k in self.sites
            }
        if self.track is not None and AUDIO_SITE in self.sites:
            per_frame[AUDIO_SITE] = self.audio_features(start, stop)
        channels = None if self._image is None or not self.pictured else reference_channels(self._image, start, stop)
        return Condition(control.tokens, per_frame, channels)

    def px_frames(self, start: int, stop: int) -> tuple[int, int]:
        """First px frame of latents start..stop-1, and the one after their last."""
        return max(0, self.factor * (start - 1) + 1), self.factor * (stop - 1) + 1

    def audio_features(self, start: int, stop: int) -> Tensor:
        """Packed audio [1, stop - start, factor * D] of latents start..stop-1."""
        assert self.track is not None
        found = torch.from_numpy(self.track.take(*self.px_frames(start, stop)))[None]
        packed = pack_audio(found, self.factor) if start == 0 else found.reshape(1, stop - start, -1)
        if packed.shape[-1] != self.sites[AUDIO_SITE]:
            raise ValueError(
                f"the network takes {self.sites[AUDIO_SITE]} numbers a latent at site {AUDIO_SITE!r}, its audio gives "
                f"{packed.shape[-1]}: record, codec and network do not belong together"
            )
        return packed.to(self.device)

    @property
    def pose(self) -> Pose | None:
        """Where the camera is after the newest latent; None before the first."""
        return self._path[max(self._path)] if self._path else None

    def hold_pose(self, frames: int) -> None:
        """Let so many latent frames pass with the camera where it is."""
        self._path = {f + frames: pose for f, pose in self._path.items()}

    def advance_pose(self, control: ControlInput, start: int, stop: int) -> dict[str, Tensor]:
        """Move the camera as `control` says through latent frames start..stop-1; asked again, it starts there again."""
        assert self.camera is not None
        if start and start - 1 not in self._path:
            raise ValueError(f"the camera has not been where latent frame {start} starts; ask for chunks in order")
        action = torch.tensor(control.action, dtype=torch.float64).expand(1, self.factor * (stop - start), -1).clone()
        if start == 0:
            action[:, : self.factor] = 0.0
        asked = wanted(action, self.actions, self.camera, self.gain)
        moved, pose = latent_rate(asked, self.factor, self._path[start - 1] if start else None)
        for i in range(stop - start):
            self._path[start + i] = Pose(pose.position[:, i : i + 1], pose.rotation[:, i : i + 1])
        self._path = {f: p for f, p in self._path.items() if start - KEPT_POSES <= f < stop}
        return pack_camera(moved, pose, self.camera, self.factor)
