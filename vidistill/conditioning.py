"""Conditions as the network sees them, and the encoders that make them from actions, text, images and audio."""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.audio import AudioConfig, Track
from vidistill.poses import (
    CameraConfig,
    Pose,
    integrate,
    latent_rate,
    moves,
    numbers,
    pose_of,
    relative,
    walk_of,
    wanted,
)

Encode = Callable[[Sequence[str]], Tensor]  # prompts -> tokens [B, L, D]

SITES = ("modulation", "hidden", "qk", "view")
ACTION_SITE = "modulation"
MOVE_SITE, POSE_SITE = "hidden", "qk"  # relative and absolute camera motion. Source: RELIC 2512.04040
VIEW_SITE = "view"  # heading of the camera in radians, which turns queries and keys: `ops.rope.Panorama`
AUDIO_SITE = "hidden"  # Source: OmniAvatar 2506.18866


@dataclass(frozen=True)
class Condition:
    """What a network is told beside noise: three kinds of tensors, each optional.

    tokens [B, L, D]: cross-attended (text, image features). per_frame {site: [B, F, D]}: one vector a latent frame
    (actions, camera, audio); sites are those of SITES. channels [B, F, C', H, W]: concatenated to the latents
    (reference image, mask). `negative` [B, L, D]: tokens of the unconditional counterpart (a negative prompt); None:
    zeros.
    """

    tokens: Tensor | None = None
    per_frame: Mapping[str, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None
    negative: Tensor | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.per_frame) - set(SITES))
        if unknown:
            raise ValueError(f"Condition.per_frame has no site {unknown}; sites are {SITES}")

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """A condition with `fn` applied to every tensor."""
        return Condition(
            None if self.tokens is None else fn(self.tokens),
            {site: fn(x) for site, x in self.per_frame.items()},
            None if self.channels is None else fn(self.channels),
            None if self.negative is None else fn(self.negative),
        )

    def frames(self, start: int, stop: int) -> "Condition":
        """The condition of latent frames start..stop-1; tokens hold for the whole clip."""
        return Condition(
            self.tokens,
            {site: x[:, start:stop] for site, x in self.per_frame.items()},
            None if self.channels is None else self.channels[:, start:stop],
            self.negative,
        )

    def to(self, device: torch.device | str) -> "Condition":
        return self.map(lambda x: x.to(device))

    def null(self) -> "Condition":
        """The unconditional counterpart: `negative` or zero tokens, zero vectors.

        Channels and headings stay: they are given, and say where things are, not what happens.
        """
        zeros = None if self.tokens is None else torch.zeros_like(self.tokens)
        return Condition(
            zeros if self.negative is None else self.negative,
            {site: x if site == VIEW_SITE else torch.zeros_like(x) for site, x in self.per_frame.items()},
            self.channels,
        )

    def mute(self, keep: Tensor | None = None) -> "Condition":
        """Without its audio: everywhere, or where `keep` [B] is False."""
        heard = self.per_frame.get(AUDIO_SITE)
        if heard is None:
            return self
        silent = torch.zeros_like(heard) if keep is None else heard * keep.view(-1, 1, 1).to(heard)
        return replace(self, per_frame={**self.per_frame, AUDIO_SITE: silent})

    def drop(self, keep: Tensor) -> "Condition":
        """Null condition where `keep` [B] is False (condition dropout for guidance)."""

        def pick(x: Tensor, null: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (x.ndim - 1)).to(x.device), x, null)

        null = self.null()
        return Condition(
            None if self.tokens is None or null.tokens is None else pick(self.tokens, null.tokens),
            {site: pick(x, null.per_frame[site]) for site, x in self.per_frame.items()},
            self.channels,
            self.negative,
        )


def branches(cond: Condition, scale: float, audio_scale: float = 0.0) -> tuple[list[Condition], list[float]]:
    """Null conditions and their scales for `sampling.guided`: nothing for scale 1; one for text and audio alike.

    An `audio_scale` of its own: v = u + scale (t - u) + audio_scale (c - t), where t knows the text alone.
    Source: LiveTalk 2512.23576, authors' code for unequal scales.
    """
    if not audio_scale or audio_scale == scale:
        return ([], []) if scale == 1.0 else ([cond.null()], [scale])
    return [cond.mute(), cond.null()], [audio_scale, scale]


def reference_channels(image: Tensor, start: int, stop: int) -> Tensor:
    """Channels [B, F, C + 1, H, W] of latent frames start..stop-1 of a clip that begins with `image` [B, 1, C, H, W].

    The picture again at every frame, and a mask that is 0 where the frame itself is the picture and 1 elsewhere.
    Source: OmniAvatar 2506.18866.
    """
    b, _, _, h, w = image.shape
    mask = (torch.arange(start, stop, device=image.device) > 0).to(image)[None, :, None, None, None]
    return torch.cat((image.expand(-1, stop - start, -1, -1, -1), mask.expand(b, -1, -1, h, w)), dim=2)


def concat(conditions: list[Condition], dim: int = 0) -> Condition:
    """Conditions joined along the batch (dim 0) or along frames (dim 1; tokens of the first are kept)."""
    first = conditions[0]

    def join(xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, dim=dim)

    tokens = None
    if first.tokens is not None:
        tokens = join([c.tokens for c in conditions if c.tokens is not None]) if dim == 0 else first.tokens
    return Condition(
        tokens,
        {site: join([c.per_frame[site] for c in conditions]) for site in first.per_frame},
        None if first.channels is None else join([c.channels for c in conditions if c.channels is not None]),
    )


def pack_actions(actions: Tensor, factor: int) -> Tensor:
    """Actions at latent rate [B, F, factor * A + 1] from one action a pixel frame [B, 1 + factor * (F - 1), A].

    Latent i holds the actions that led to its `factor` pixel frames; latent 0 holds the single first frame. The last
    entry is 1: it tells "standing still" from "no condition", which is all zeros.
    """
    b, t, a = actions.shape
    if (t - 1) % factor:
        raise ValueError(f"actions must cover 1 + {factor} * k pixel frames, got {t}")
    padded = torch.cat((actions.new_zeros(b, factor - 1, a), actions), dim=1)
    packed = padded.reshape(b, -1, factor * a)
    return torch.cat((packed, packed.new_ones(*packed.shape[:2], 1)), dim=-1)


def pack_audio(features: Tensor, factor: int) -> Tensor:
    """Audio features at latent rate [B, F, factor * D] from one vector a pixel frame [B, 1 + factor * (F - 1), D].

    The first vector is repeated in front, so that latent 0 holds the single first frame `factor` times.
    """
    b, t, d = features.shape
    if (t - 1) % factor:
        raise ValueError(f"audio features must cover 1 + {factor} * k pixel frames, got {t}")
    return torch.cat((features[:, :1].expand(-1, factor - 1, -1), features), dim=1).reshape(b, -1, factor * d)


def pack_camera(moved: Tensor, pose: Pose, cfg: CameraConfig, factor: int) -> dict[str, Tensor]:
    """What a network is told of a camera [B, F] at the sites that `cfg` tells, from moves and poses at latent rate."""
    told = {
        MOVE_SITE: lambda: relative(moved, cfg, factor),
        POSE_SITE: lambda: numbers(pose, cfg),
        VIEW_SITE: lambda: walk_of(pose)[..., 2:].float(),
    }
    return {site: told[site]() for site in cfg.tells}


def walked(poses: Tensor, cfg: CameraConfig, factor: int) -> dict[str, Tensor]:
    """The same from recorded poses [B, F, 3 or 12] at latent rate, seen from the first of them: see `pose_of`."""
    moved = moves(pose_of(poses))
    return pack_camera(moved, integrate(moved), cfg, factor)


def hold_action(action: Tensor, start: int, stop: int, factor: int) -> Tensor:
    """Packed actions [1, stop - start, factor * A + 1] of latents start..stop-1 while `action` [A] is held.

    Latent 0 is the picture before anything was done: its actions are zero, as in recorded clips.
    """
    px = action.expand(1, 1 + factor * (stop - start), -1)
    packed = pack_actions(px, factor)[:, 1:]
    if start == 0:
        packed[:, 0, :-1] = 0.0
    return packed


KEPT_POSES = 64  # latent frames whose pose a stream can go on from


@dataclass(frozen=True)
class Wish:
    """What the user asked for in `set` number `id`."""

    id: int
    action: tuple[float, ...]
    tokens: Tensor | None  # [1, L, D]
    switch: str = "keep"  # what a stream does to its memory when it meets these tokens


class Inputs:
    """The conditions a network takes, from what the user asks for: `wish` is the latest, replaced as a whole.

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
        self.wish = Wish(0, (0.0,) * len(self.actions), tokens)
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, record: Mapping[str, Any], factor: int, device: torch.device | str, encode: Encode | None = None
    ) -> "Inputs":
        """Inputs of the network a checkpoint's `record` describes; ValueError if it needs what cannot be held."""
        dit = record["dit"]
        if dit["extra_channels"] and dit["extra_channels"] != dit["channels"] + 1:
            raise ValueError(
                f"this network needs {dit['extra_channels']} condition channels; inputs give a reference picture and a "
                f"mask, {dit['channels'] + 1}"
            )
        sites = {name: site["dim"] for name, site in dit["sites"].items()}
        world = record["world"]
        camera = CameraConfig.of(world["camera"]) if world.get("camera") else None
        audio = AudioConfig(**record["audio"]) if record.get("audio") else None
        pictured = dit["extra_channels"] > 0
        return cls(sites, dit["text_dim"], world.get("actions", ()), factor, device, encode, camera, audio, pictured)

    def speed_up(self, gain: float) -> None:
        """From now on an action goes `gain` times as far; ValueError for a network that is not told where it goes."""
        if gain != 1 and (self.camera is None or not {MOVE_SITE, POSE_SITE} & set(self.camera.tells)):
            raise ValueError("this student is not told how far its camera goes, so gain has no effect: leave it 1")
        self.gain = gain

    def begin(self, given: Tensor | None) -> None:
        """A stream begins with latents `given` [1, F, C, H, W]; ValueError if the network is to be told a picture."""
        if self.pictured and given is None:
            raise ValueError("this network is told the picture a stream begins with: start from an `image`")
        self._image = given[:, :1] if given is not None else None
        if self.track is not None:
            self.track.reset()

    def hear(self, pcm: np.ndarray) -> None:
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
            self.wish = replace(self.wish, id=self.wish.id + 1, **changed)
            return self.wish.id

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

    def condition(self, wish: Wish, start: int, stop: int) -> Condition:
        """`wish` held through latent frames start..stop-1; sites without an input are null."""
        per_frame = {
            site: torch.zeros(1, stop - start, dim, device=self.device)
            for site, dim in self.sites.items()
            if site != ACTION_SITE or not self.actions
        }
        if self.actions:
            action = torch.tensor(wish.action, device=self.device)
            per_frame[ACTION_SITE] = hold_action(action, start, stop, self.factor)
        if self.camera is not None:
            per_frame |= {k: v.to(self.device) for k, v in self.go_on(wish, start, stop).items() if k in self.sites}
        if self.track is not None and AUDIO_SITE in self.sites:
            per_frame[AUDIO_SITE] = self.heard(start, stop)
        channels = None if self._image is None or not self.pictured else reference_channels(self._image, start, stop)
        return Condition(wish.tokens, per_frame, channels)

    def px_frames(self, start: int, stop: int) -> tuple[int, int]:
        """First px frame of latents start..stop-1, and the one after their last."""
        return max(0, self.factor * (start - 1) + 1), self.factor * (stop - 1) + 1

    def heard(self, start: int, stop: int) -> Tensor:
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

    def stay(self, frames: int) -> None:
        """Let so many latent frames pass with the camera where it is."""
        self._path = {f + frames: pose for f, pose in self._path.items()}

    def go_on(self, wish: Wish, start: int, stop: int) -> dict[str, Tensor]:
        """Move the camera as `wish` says through latent frames start..stop-1; asked again, it starts there again."""
        assert self.camera is not None
        if start and start - 1 not in self._path:
            raise ValueError(f"the camera has not been where latent frame {start} starts; ask for chunks in order")
        action = torch.tensor(wish.action, dtype=torch.float64).expand(1, self.factor * (stop - start), -1).clone()
        if start == 0:
            action[:, : self.factor] = 0.0
        asked = wanted(action, self.actions, self.camera, self.gain)
        moved, pose = latent_rate(asked, self.factor, self._path[start - 1] if start else None)
        for i in range(stop - start):
            self._path[start + i] = Pose(pose.position[:, i : i + 1], pose.rotation[:, i : i + 1])
        self._path = {f: p for f, p in self._path.items() if start - KEPT_POSES <= f < stop}
        return pack_camera(moved, pose, self.camera, self.factor)


Script = Sequence[tuple[Mapping[str, float], int]]  # actions and for how many px frames they are held


def parse_script(text: str) -> Script:
    """The script that "forward:20,turn_left+forward:16,still:4" spells; ValueError for another form."""
    script = []
    for part in filter(None, text.replace(" ", "").split(",")):
        names, _, frames = part.partition(":")
        if not names or not frames.isdigit() or not int(frames):
            raise ValueError(f"{part!r} is not ACTION:FRAMES or ACTION+ACTION:FRAMES, as in forward:20,still:4")
        script.append(({name: 1.0 for name in names.split("+") if name != "still"}, int(frames)))
    return script


def scripted(script: Script, frame: int) -> Mapping[str, float]:
    """What a script, repeated for ever, holds at px frame `frame`."""
    left = frame % sum(frames for _, frames in script)
    for action, frames in script:
        left -= frames
        if left < 0:
            return action
    raise AssertionError("a script is as long as its parts")


@dataclass(frozen=True)
class Cue:
    """A prompt of a story: when it is said, and what it does to memory (None: the stream's own policy)."""

    seconds: float
    prompt: str
    switch: str | None = None


CUE = re.compile(r"(?:(?P<seconds>\d+(?:\.\d+)?)s?(?:\s+(?P<switch>[a-z]+))?\s*:)?\s*(?P<prompt>.*\S)\s*")


def parse_cues(lines: Sequence[str]) -> list[Cue]:
    """The cues that lines like "a red ball", "5: a blue ball" and "9.5 cut: a green ball" spell, in order of time.

    ValueError for a line that says nothing, and for two at one time.
    """
    cues = []
    for line in lines:
        found = CUE.fullmatch(line)
        if found is None:
            raise ValueError(f"{line!r} says nothing; a cue is a prompt, or SECONDS: prompt, or SECONDS POLICY: prompt")
        cues.append(Cue(float(found["seconds"] or 0), found["prompt"], found["switch"]))
    cues.sort(key=lambda cue: cue.seconds)
    for cue, later in pairwise(cues):
        if cue.seconds == later.seconds:
            both = f"{cue.prompt!r} and {later.prompt!r}"
            raise ValueError(f"{both} are both said at {cue.seconds:g} s; give times, as in '5: {later.prompt}'")
    return cues
