"""What a user asks of a running stream: one class a kind of input, and the conditions that a network gets for them."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vidistill.conditioning.audio import Track, from_pcm16
from vidistill.conditioning.camera import MOVES, CameraConfig, Pose, latent_rate, move_keys, wanted
from vidistill.conditioning.condition import (
    ACTION_SITE,
    AUDIO_SITE,
    MOVE_SITE,
    POSE_SITE,
    Condition,
    Encode,
    before_text,
    hold_action,
    is_shown,
    pack_audio,
    pack_camera,
    reference_channels,
    shown_channels,
)

KEPT_POSES = 64  # latent frames whose pose a stream can go on from

Values = Mapping[str, Any]


class DiT(Protocol):
    """What is asked of a network's architecture here: its latent and its condition channels."""

    @property
    def channels(self) -> int: ...

    @property
    def extra_channels(self) -> int: ...


class Modality(Protocol):
    """One kind of input of a stream: what `set` takes of it, and what the network gets.

    A new one is a subclass and a line in MODALITIES: sessions, the server and its page go by what it says here. The
    defaults are those of a kind that nobody sets, such as the picture a stream begins with.
    """

    keys: tuple[str, ...] = ()  # what `set` calls it; values are held, and pages ask for it, under the first name
    queued: bool = False  # values play one after the other instead of replacing each other

    @property
    def described(self) -> Mapping[str, Any]:
        """How a page asks for it: `kind` of its control (hold, numbers, text or sound), and that control's bounds."""
        return {}

    def initial(self) -> Any:
        """What is held before anything is set."""
        return None

    def read(self, value: Any) -> Any:
        """A value as it is held or queued; ValueError for one that cannot be used."""
        return None

    def push(self, value: Any) -> None:
        """Queue a value that was read."""
        return None

    def begin(self, given: Tensor | None) -> None:
        """A stream begins, with latents `given` [1, F, C, H, W]; ValueError if it cannot begin so."""
        return None

    def skip(self, frames: int) -> None:
        """Let latent frames pass unseen."""
        return None

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        """What the network gets for latent frames start..stop-1 while `values` are held, of every kind by its name."""
        raise NotImplementedError

    def example(self, number: int) -> Any:
        """Some value to set, another one for the next number; None where there is nothing to try."""
        return None


M = TypeVar("M", bound=Modality)


@dataclass(frozen=True)
class Network:
    """What a network takes, by the `Record` of its checkpoint: widths of its sites and tokens, px frames a latent."""

    record: Any
    factor: int
    device: torch.device | str
    encode: Encode | None = None

    @property
    def sites(self) -> dict[str, int]:
        return {name: site.dim for name, site in self.record.dit.sites.items()}

    @property
    def text_dim(self) -> int:
        return self.record.dit.text_dim

    @property
    def actions(self) -> tuple[str, ...]:
        return held_names(self.record.played, self.sites)

    def px_frames(self, start: int, stop: int) -> tuple[int, int]:
        """First px frame of latents start..stop-1, and the one after their last."""
        return max(0, self.factor * (start - 1) + 1), self.factor * (stop - 1) + 1


def held_names(played: "WorldConfig", sites: Iterable[str]) -> tuple[str, ...]:
    """What can be held: the actions of a world, or the moves of its camera where a network is told nothing else."""
    if ACTION_SITE in sites:
        return played.actions
    named = tuple(name for name in played.actions if name in MOVES)
    return (named or played.camera.moves) if played.camera else ()


def held_values(value: Mapping[str, float] | Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """One value in [0, 1] for each of the named actions; those a mapping leaves out are 0. ValueError for others."""
    if isinstance(value, Mapping):
        if unknown := [name for name in value if name not in names]:
            raise ValueError(f"action {unknown[0]!r} is unknown; actions are {', '.join((*names, 'still'))}")
        values = [value.get(name, 0.0) for name in names]
    elif isinstance(value, Iterable):
        values = list(value)
    else:
        raise ValueError(f"action must be an object of names and numbers, got {value!r}")
    if len(values) != len(names):
        raise ValueError(f"action has {len(values)} values, one is needed for each of {list(names)}")
    for name, number in zip(names, values, strict=True):
        if not isinstance(number, int | float | np.number) or not 0 <= number <= 1:  # NaN is neither
            raise ValueError(f"action {name!r} must be a number from 0 to 1, got {number!r}")
    return tuple(float(v) for v in values)


class Actions(Modality):
    """Named actions, each held at 0 to 1."""

    keys = ("action",)

    def __init__(self, net: Network) -> None:
        self.net, self.names = net, net.actions
        needed = net.factor * len(self.names) + 1
        if net.sites.get(ACTION_SITE, needed) != needed:
            raise ValueError(
                f"the network takes {net.sites[ACTION_SITE]} numbers a latent at site {ACTION_SITE!r}; "
                f"{len(self.names)} actions of {net.factor} px frames and a flag are {needed}: student and codec do "
                "not belong together"
            )

    @property
    def described(self) -> Mapping[str, Any]:
        keys = {name: list(keys) for name, keys in self.net.record.played.keys.items()}
        if ACTION_SITE not in self.net.sites:
            used = {key for held in keys.values() for key in held}
            keys = {name: key for name, key in move_keys(self.names).items() if not used.intersection(key)} | keys
        return {"kind": "hold", "names": list(self.names), **({"keys": keys} if keys else {})}

    def initial(self) -> tuple[float, ...]:
        return (0.0,) * len(self.names)

    def read(self, value: Mapping[str, float] | Sequence[float]) -> tuple[float, ...]:
        """One value in [0, 1] per action; those a mapping leaves out are 0."""
        return held_values(value, self.names)

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        if ACTION_SITE not in self.net.sites:  # they move the camera, which is told
            return Condition()
        action = torch.tensor(values["action"], device=self.net.device)
        return Condition(per_frame={ACTION_SITE: hold_action(action, start, stop, self.net.factor)})

    def example(self, number: int) -> list[float]:
        return [float((number + i) % 2) for i in range(len(self.names))]


class Prompt(Modality):
    """Tokens that the network cross-attends, or the text they are read from."""

    keys = ("prompt", "tokens")

    def __init__(self, net: Network) -> None:
        self.net = net

    @property
    def described(self) -> Mapping[str, Any]:
        return {"kind": "text"} if self.net.encode else {}

    def initial(self) -> Tensor:
        return torch.zeros(1, 1, self.net.text_dim, device=self.net.device)

    def read(self, value: str | Tensor) -> Tensor:
        """Tokens [1, L, D] on the network's device, from text or from tokens [L, D]."""
        if isinstance(value, str):
            if self.net.encode is None:
                raise ValueError("this student takes no prompt: it has no text encoder")
            value = self.net.encode([value])[0]
        width = self.net.text_dim
        if not isinstance(value, Tensor):
            raise ValueError(f"prompt must be text, or tokens [L >= 1, {width}], got {value!r}")
        if value.ndim != 2 or value.shape[1] != width or not len(value):
            raise ValueError(f"tokens must be [L >= 1, {width}], got {tuple(value.shape)}")
        return value[None].to(self.net.device, torch.float32)

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        return Condition(values["prompt"])

    def example(self, number: int) -> Tensor:
        return torch.full((1, self.net.text_dim), float(number % 2))


class Camera(Modality):
    """Where the held actions lead: motion `gain` times as far as they ask for, integrated from the stream's start."""

    def __init__(self, net: Network) -> None:
        self.net, self.gain = net, 1.0
        self.cfg = net.record.played.camera
        self._path: dict[int, Pose] = {}  # latent frame -> pose [1, 1] after it, of the newest frames

    @property
    def pose(self) -> Pose | None:
        """Where the camera is after the newest latent; None before the first."""
        return self._path[max(self._path)] if self._path else None

    def skip(self, frames: int) -> None:
        """The camera stays where it is."""
        self._path = {f + frames: pose for f, pose in self._path.items()}

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        """Moves the camera through these frames; asked again, it starts from the same place again."""
        factor = self.net.factor
        if start and start - 1 not in self._path:
            raise ValueError(f"the camera has not been where latent frame {start} starts; ask for chunks in order")
        held = torch.tensor(values.get("action", ()), dtype=torch.float64)
        action = held.expand(1, factor * (stop - start), -1).clone()
        if start == 0:
            action[:, :factor] = 0.0  # the first latent is the picture before anything was done
        asked = wanted(action, self.net.actions, self.cfg, self.gain)
        moved, pose = latent_rate(asked, factor, self._path[start - 1] if start else None)
        for i in range(stop - start):
            self._path[start + i] = Pose(pose.position[:, i : i + 1], pose.rotation[:, i : i + 1])
        self._path = {f: p for f, p in self._path.items() if start - KEPT_POSES <= f < stop}
        return Condition(per_frame=pack_camera(moved, pose, self.cfg, factor))


class Audio(Modality):
    """Sound, which plays in the order it came; silence where there is none."""

    keys, queued = ("audio",), True

    def __init__(self, net: Network) -> None:
        self.net, self.track = net, Track(net.record.audio)

    @property
    def described(self) -> Mapping[str, Any]:
        cfg = self.track.cfg
        return {"kind": "sound", "rate": cfg.rate, "lookahead_ms": cfg.lookahead_ms}

    def read(self, value: np.ndarray | bytes) -> np.ndarray:
        """Float samples [S] in [-1, 1] at the track's rate, or the bytes of 16-bit ones."""
        if isinstance(value, bytes):
            if len(value) % 2:
                raise ValueError(f"audio must be whole 16-bit samples, got {len(value):,} bytes")
            return from_pcm16(np.frombuffer(value, "<i2"))
        pcm, rate = np.asarray(value), self.track.cfg.rate
        if pcm.ndim != 1 or not np.issubdtype(pcm.dtype, np.floating) or not np.isfinite(pcm).all():
            raise ValueError(f"audio must be finite floats [S] at {rate} Hz, got {pcm.dtype} {pcm.shape}")
        return pcm

    def push(self, value: np.ndarray) -> None:
        self.track.push(value, time.perf_counter())

    def begin(self, given: Tensor | None) -> None:
        self.track.reset()

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        width = self.net.sites.get(AUDIO_SITE)
        if width is None:
            return Condition()
        found = torch.from_numpy(self.track.take(*self.net.px_frames(start, stop)))[None]
        packed = pack_audio(found, self.net.factor) if start == 0 else found.reshape(1, stop - start, -1)
        if packed.shape[-1] != width:
            raise ValueError(
                f"the network takes {width} numbers a latent at site {AUDIO_SITE!r}, its audio gives "
                f"{packed.shape[-1]}: record, codec and network do not belong together"
            )
        return Condition(per_frame={AUDIO_SITE: packed})


@dataclass(frozen=True)
class Picture:
    """What an image-to-video network is shown of the picture a stream begins with: `latents` [1, n, C, H, W] of a clip
    as `shown_clip` gives it and, for one that is told them, CLIP's `tokens` [1, M, D]."""

    latents: Tensor
    tokens: Tensor | None = None


class StartPicture(Modality):
    """The picture a stream begins with, which an image-to-video network makes itself."""

    def __init__(self, net: Network) -> None:
        self._picture: Picture | None = None
        self._tokens: tuple[Tensor, Tensor] | None = None  # tokens of the newest prompt, and with those of the picture

    def show(self, picture: Picture | None) -> None:
        """A stream begins with `picture`; ValueError without one."""
        if picture is None:
            raise ValueError("this network is shown the picture a stream begins with: start from an `image`")
        self._picture, self._tokens = picture, None

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        assert self._picture is not None, "a stream begins before it is asked for"
        channels = shown_channels(self._picture.latents, start, stop)
        if self._picture.tokens is None:
            return Condition(channels=channels)
        prompt = values["prompt"]
        if self._tokens is None or self._tokens[0] is not prompt:  # a memory knows tokens it has read by the object
            self._tokens = prompt, before_text(self._picture.tokens, prompt)
        return Condition(self._tokens[1], channels=channels)


class Reference(Modality):
    """The picture a stream began with, at every frame."""

    def __init__(self, net: Network) -> None:
        self._image: Tensor | None = None  # latent [1, 1, C, H, W]
        extra, needed = net.record.dit.extra_channels, net.record.dit.channels + 1
        if extra != needed:
            raise ValueError(
                f"this network needs {extra} condition channels; inputs give a reference picture and a mask, {needed}"
            )

    def begin(self, given: Tensor | None) -> None:
        if given is None:
            raise ValueError("this network is told the picture a stream begins with: start from an `image`")
        self._image = given[:, :1]

    def condition(self, values: Values, start: int, stop: int) -> Condition:
        return Condition(channels=None if self._image is None else reference_channels(self._image, start, stop))


def shows_picture(dit: DiT) -> bool:
    """Whether a network is an image-to-video one, which makes the picture it is shown."""
    return is_shown(dit.channels, dit.extra_channels)


# Each kind, and whether a network takes it. What later ones give a site replaces what earlier ones give it; the tokens
# are those of the first that gives some.
MODALITIES: dict[Callable[[Network], Modality], Callable[[Network], bool]] = {
    StartPicture: lambda net: shows_picture(net.record.dit),
    Actions: lambda net: bool(net.actions),
    Prompt: lambda net: bool(net.text_dim),
    Camera: lambda net: net.record.played.camera is not None,
    Audio: lambda net: net.record.audio is not None,
    Reference: lambda net: net.record.dit.extra_channels > 0 and not shows_picture(net.record.dit),
}


@dataclass(frozen=True)
class WorldConfig:
    """The world a network was trained on: px frames a second and of one latent, what can be done, px a side, camera.

    `keys`: which of a keyboard are held, together, for an action, by its name: a letter, or a code such as ArrowLeft.
    """

    fps: float | None = None
    actions: tuple[str, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    px_size: int | tuple[int, int] | None = None
    temporal: int | None = None
    camera: CameraConfig | None = None

    def __post_init__(self) -> None:
        if len(set(self.actions)) < len(self.actions):
            raise ValueError(f"world.actions names one twice: {', '.join(self.actions)}")
        if unknown := sorted(self.keys.keys() - set(self.actions)):
            raise ValueError(f"world.keys names {unknown[0]!r}; actions are {', '.join(self.actions) or 'none'}")


@dataclass(frozen=True)
class ControlInput:
    """What is held since `set` number `id`, by the first name of its kind."""

    id: int
    values: Values
    switch: str = "keep"  # what a stream does to its memory when it meets this prompt


class LiveConditions:
    """The conditions a network takes, from what the user asks for: `control` is the latest, replaced as a whole.

    Nothing asked for yet: actions are zero (standing still), everything else is null.
    """

    def __init__(self, net: Network) -> None:
        self.net = net
        self.parts = [kind(net) for kind, taken_by in MODALITIES.items() if taken_by(net)]
        self._by_key = {key: part for part in self.parts for key in part.keys}
        held = {part.keys[0]: part.initial() for part in self.parts if part.keys and not part.queued}
        self.control = ControlInput(0, held)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, record: Any, factor: int, device: torch.device | str, encode: Encode | None = None) -> "LiveConditions":
        """Inputs of the network that a `Record` describes; ValueError if it needs what cannot be held."""
        return cls(Network(record, factor, device, encode))

    def find(self, kind: type[M]) -> M | None:
        """The part of a kind, if the network takes it."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    @property
    def takes(self) -> dict[str, Mapping[str, Any]]:
        """What a page may set: name -> how it asks for it."""
        return {part.keys[0]: part.described for part in self.parts if part.keys and part.described}

    def speed_up(self, gain: float) -> None:
        """From now on an action goes `gain` times as far; ValueError for a network that is not told where it goes."""
        camera = self.find(Camera)
        if gain != 1 and (camera is None or not {MOVE_SITE, POSE_SITE} & set(camera.cfg.sites)):
            raise ValueError("this student is not told how far its camera goes, so gain has no effect: leave it 1")
        if camera is not None:
            camera.gain = gain

    def begin(self, given: Tensor | None, picture: Picture | None = None) -> None:
        """A stream begins with latents `given` [1, F, C, H, W], or is shown a picture; ValueError if one is missing."""
        for part in self.parts:
            part.begin(given)
        if start := self.find(StartPicture):
            start.show(picture)

    def read(self, inputs: Values) -> dict[str, Any]:
        """Inputs as they are held, by the first name of their kind, None left out; ValueError for what is not taken."""
        read: dict[str, Any] = {}
        for key, value in inputs.items():
            if value is None:
                continue
            if (part := self._by_key.get(key)) is None:
                raise ValueError(f"this student takes no {key}; it takes {', '.join(self._by_key) or 'nothing'}")
            if part.keys[0] in read:
                raise ValueError(f"{' and '.join(part.keys)} are one input: set one of them")
            read[part.keys[0]] = part.read(value)
        if not read:
            raise ValueError(f"there is nothing to set; give one of {', '.join(self._by_key) or 'nothing'}")
        return read

    def set(self, inputs: Values, switch: str = "keep") -> int:
        """Replace what is given, keep the rest; returns the number of what is held now. `switch` goes with a prompt."""
        read = self.read(inputs)
        held = {name: value for name, value in read.items() if not self._by_key[name].queued}
        for name in read.keys() - held.keys():
            self._by_key[name].push(read[name])
        with self._lock:
            if held:
                switch = switch if "prompt" in held else self.control.switch
                self.control = ControlInput(self.control.id + 1, {**self.control.values, **held}, switch)
            return self.control.id

    def example(self, number: int) -> dict[str, Any]:
        """Something to set, another thing for the next number; empty for a network that takes nothing."""
        every = ((part.keys[0], part.example(number)) for part in self.parts if part.keys)
        return next(({name: value} for name, value in every if value is not None), {})

    def condition(self, control: ControlInput, start: int, stop: int) -> Condition:
        """`control` held through latent frames start..stop-1; sites without an input are null."""
        gave = [part.condition(control.values, start, stop) for part in self.parts]
        given = {site: x for one in gave for site, x in one.per_frame.items() if site in self.net.sites}
        null = {
            site: torch.zeros(1, stop - start, dim, device=self.net.device)
            for site, dim in self.net.sites.items()
            if site not in given
        }
        return Condition(
            next((one.tokens for one in gave if one.tokens is not None), None),
            null | {site: x.to(self.net.device) for site, x in given.items()},
            next((one.channels for one in gave if one.channels is not None), None),
        )

    def skip(self, frames: int) -> None:
        """Let latent frames pass unseen."""
        for part in self.parts:
            part.skip(frames)
