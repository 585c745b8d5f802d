"""What a data folder says of itself: one dataclass, every value checked before it is used."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

from vidistill.conditioning.audio import AudioConfig
from vidistill.config import ConfigError, build
from vidistill.record import check_bounds, read_text_config

META = "meta.json"
PROMPTS = "prompts"  # of meta: how many there are in a folder of text alone; the prompts, in earlier versions
MAX_EPISODES = 2**31
MAX_SEED = 2**53


class DataError(ValueError):
    """A data folder that cannot be used; the message names the file or the setting."""


@dataclass(frozen=True)
class Shown:
    """Of data of pictures with prompts: latent frames a clip, and height and width of the pictures in pixels."""

    frames: int
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageTokens:
    """Of data whose pictures were encoded: by what, tokens a picture, numbers a token."""

    tokens: int
    width: int
    source: str | None = None


@dataclass(frozen=True)
class Meta:
    """The meta of a data folder: of recorded clips, of trajectories, or (where it has `prompts`) of text alone.

    Folders of text of earlier versions have `names` and no shards. `shards` and `described` (an entry an episode) say
    what lies beside it. None: it is not said, and what needs it is refused then. What recorders note beyond these
    fields is kept as it is.
    """

    fps: float
    episodes: int
    shards: int | None = None
    described: tuple[Mapping[str, Any], ...] | None = None
    source: str | None = None
    split: str | None = None
    config: Mapping[str, Any] | None = None  # of the world, which builds its own of it
    codec: str | None = None
    px_size: int | tuple[int, int] | None = None
    temporal: int | None = None
    given: int | None = None
    actions: tuple[str, ...] | None = None
    keys: Mapping[str, tuple[str, ...]] | None = None
    deterministic: bool | None = None
    fov: float | None = None
    text: Mapping[str, Any] | None = None
    audio: AudioConfig | None = None
    teacher: str | None = None
    clips: int | None = None
    frames: int | None = None
    seed: int | None = None
    sigmas: tuple[float, ...] | None = None
    levels: tuple[float, ...] | None = None
    guidance: float | None = None
    audio_guidance: float | None = None
    prompts: int | tuple[str, ...] | None = None
    per_shard: int | None = None
    names: tuple[str, ...] | None = None  # of the file of each prompt
    negative: str | None = None
    shown: Shown | None = None
    image: ImageTokens | None = None
    negative_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("fps", "px_size", "temporal", "frames", "guidance", "audio_guidance", "fov", "shown", "image"):
            check_bounds(getattr(self, name), name)
        for name, low, high in (
            ("episodes", 1, MAX_EPISODES),
            ("shards", 1, MAX_EPISODES),
            ("clips", 1, MAX_EPISODES),
            ("per_shard", 1, MAX_EPISODES),
            ("given", 0, 2**16),
            ("seed", 0, MAX_SEED),
        ):
            number = getattr(self, name)
            if number is not None and not low <= number <= high:
                raise ConfigError(f"{name} is {number!r:.24}; it must lie between {low} and {high}")
        for name in ("sigmas", "levels"):
            if wrong := [x for x in getattr(self, name) or () if not 0 <= x <= 1]:
                raise ConfigError(f"{name} holds {wrong[0]!r}; noise levels lie between 0 and 1")
        if self.actions and len(set(self.actions)) < len(self.actions):
            raise ConfigError(f"actions {list(self.actions)} holds one twice")
        if self.text is not None:
            read_text_config(self.text)
        if self.prompts is not None:
            self._check_prompts()
        if self.names is None:
            self._check_shards()

    def _check_shards(self) -> None:
        if self.shards is None or self.described is None:
            raise ConfigError(f"{'shards' if self.shards is None else 'described'} is missing")
        if len(self.described) != self.episodes:
            raise ConfigError(f"described has {len(self.described)} entries for {self.episodes} episodes")
        for k, clip in enumerate(self.described):
            check_clip(clip, f"described[{k}]")

    def _check_prompts(self) -> None:
        if not self.text or "length" not in self.text:
            raise ConfigError("text.length is missing, which prompts need")
        if self.names is None and self.per_shard is None:
            raise ConfigError("per_shard is missing, which prompts need")
        counts = [self.prompts if isinstance(self.prompts, int) else len(self.prompts or ())]
        counts += [] if self.names is None else [len(self.names)]
        if any(count != self.episodes for count in counts):
            raise ConfigError(f"prompts and names are {counts}, episodes {self.episodes}; they must be as many")
        if self.names is None:
            return
        for name in (*self.names, self.negative_name or ""):
            if name != PurePath(name).name or not name or "\0" in name:
                raise ConfigError(f"names or negative_name holds {name!r}, which is no file beside the others")


CLIP_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "seed": lambda x: type(x) is int and abs(x) <= MAX_SEED,
    "caption": lambda x: isinstance(x, str),
    "measures": lambda x: isinstance(x, dict) and all(type(n) in (int, float) and n == n for n in x.values()),
}


def check_clip(clip: Mapping[str, Any], where: str) -> None:
    """ConfigError unless what is read of a clip's description has its type."""
    for name, holds in CLIP_FIELDS.items():
        if name in clip and not holds(clip[name]):
            raise ConfigError(f"{where}.{name} cannot be {clip[name]!r:.60}")


class Said(dict[str, Any]):
    """What a file says; DataError names the file and the field where one is asked for that it lacks."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise DataError(f"{self.where} lacks {key}, which is needed here; make the data again")


def parse_meta(raw: Any, path: Path) -> Said:
    """The meta that was read from `path`, checked; DataError names the file and the field that is wrong."""
    try:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"it must hold keys and values, not a {type(raw).__name__}")
        known = {part.name for part in fields(Meta)}
        build(Meta, {key: value for key, value in raw.items() if key in known})
    except ConfigError as error:
        raise DataError(f"{path} cannot be used: {error}; make the data again") from error
    described = [Said(clip, f"{path}: described[{k}]") for k, clip in enumerate(raw.get("described") or ())]
    return Said({**raw, **({"described": described} if described else {})}, str(path))
