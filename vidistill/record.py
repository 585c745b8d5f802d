"""The record of a checkpoint: what a network is, what it was trained on and how it is run, as one checked dataclass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from vidistill.codecs import CodecConfig, read_codec_config
from vidistill.conditioning.audio import AudioConfig
from vidistill.conditioning.controls import WorldConfig
from vidistill.conditioning.text import NgramConfig
from vidistill.config import ConfigError, build
from vidistill.diffusion import LatentShape, NoiseSchedule
from vidistill.models.layers import DiTConfig
from vidistill.models.student import StudentConfig
from vidistill.schedules import ScheduleConfig

FORMAT = 1
KINDS = ("codec", "teacher", "student")
NEEDED = {  # kind -> what its record cannot do without
    "codec": ("codec_config",),
    "teacher": ("dit",),
    "student": ("dit", "student", "shape", "noise", "schedule"),
}

MAX_RECORD = 2**24  # bytes
MAX_LIST, MAX_KEYS, MAX_TEXT, MAX_DEPTH = 4096, 2**16, 4096, 16  # entries of a list and a mapping, letters, levels
MAX_PIXELS = 2**22  # of a latent frame
MAX_MEMORY = 2**42  # bytes that a stream remembers
MAX_NUMBER = 1e9  # size of a number that BOUNDS does not name
BOUNDS: Mapping[str, tuple[float, float]] = {  # field -> what it may be; more would hang or fill any machine
    "layers": (0, 512),
    "heads": (1, 1024),
    "width": (1, 2**16),
    "ffn": (1, 2**18),
    "freq_dim": (1, 2**16),
    "text_dim": (0, 2**17),
    "image_dim": (0, 2**17),
    "image_tokens": (0, 2**16),
    "dim": (1, 2**18),
    "hidden": (0, 2**16),
    "channels": (1, 4096),
    "extra_channels": (0, 4097),
    "latent_channels": (1, 4096),
    "patch": (1, 64),
    "patch_size": (1, 64),
    "grid": (0, 4096),
    "eps": (1e-12, 0.1),
    "rope_theta": (1, 1e9),
    "fov": (0, 360),
    "ratio": (1e-3, 1e4),
    "slow": (1e-3, 1e4),
    "fast": (1e-3, 1e4),
    "smooth": (0, 10),
    "height": (1, 4096),
    "chunk": (1, 1024),
    "first_chunk": (0, 1024),
    "sinks": (0, 2**16),
    "history": (0, 2**20),
    "stretch": (1e-3, 1e3),
    "factors": (1, 64),
    "pattern": (1, 64),
    "shift": (1e-3, 1e3),
    "given_chunks": (0, 4096),
    "given_frames": (0, 2**16),
    "rewarm": (0, 4096),
    "guidance": (-1e3, 1e3),
    "audio_guidance": (-1e3, 1e3),
    "fps": (0.01, 1000),
    "px_size": (1, 2**14),
    "temporal": (1, 64),
    "rate": (1, 384_000),
    "block": (1, 1024),
    "context": (0, 4096),
    "lookahead": (0, 1024),
    "bands": (1, 1024),
    "hops": (1, 1024),
    "length": (1, 2**16),
    "tokens": (1, 2**16),
    "step": (1e-9, 1e6),
    "turn": (1e-9, 2 * math.pi),
    "wavelengths": (1e-6, 1e9),
    "encoder_widths": (1, 4096),
    "decoder_widths": (1, 4096),
    "encoder_width": (1, 4096),
    "decoder_width": (1, 4096),
    "width_multiples": (1, 64),
    "num_res_blocks": (0, 64),
    "encoder_blocks": (0, 64),
    "decoder_blocks": (0, 64),
    "frames": (1, 2**20),
}


@dataclass(frozen=True)
class Umt5Config:
    """UMT5 as a text encoder: a diffusers folder or hub id, and the tokens a prompt is padded to.

    `folder`: where embeddings are kept; honoured where the user says it, never where a checkpoint does.
    """

    source: str
    length: int = 512
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.source or self.length < 1:
            raise ValueError(f"text.source must name a text encoder and length be at least 1, got {self}")


@dataclass(frozen=True)
class ImageConfig:
    """CLIP as what reads a start picture: a diffusers folder or hub id, how many `tokens` it gives, and their width."""

    source: str
    tokens: int
    width: int


ENCODER_CONFIGS: Mapping[str, type] = {"ngrams": NgramConfig, "umt5": Umt5Config}


def read_text_config(described: Mapping[str, Any]) -> NgramConfig | Umt5Config:
    """The text encoder of a record; ConfigError for one of no known kind."""
    if not isinstance(described, Mapping):
        raise ConfigError(f"text must hold keys and values, got {described!r}")
    kind = described.get("kind")
    if not isinstance(kind, str) or kind not in ENCODER_CONFIGS:
        raise ConfigError(f"text.kind {kind!r} is an unknown text encoder; known: {', '.join(ENCODER_CONFIGS)}")
    rest = {key: value for key, value in described.items() if key != "kind"}
    cfg: NgramConfig | Umt5Config = build(ENCODER_CONFIGS[kind], rest, "text.")
    check_bounds(cfg, "text")
    return cfg


@dataclass(frozen=True)
class Origin:
    """Of a converted student: the family, the entry of its file, and the file's name of each of our parameters.

    `flat_patch`: the weight of the patch embedding is a matrix there.
    """

    family: str
    entry: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    flat_patch: bool = False


@dataclass(frozen=True)
class Record:
    """What a checkpoint's JSON says. `codec` and `text` name other files; what a kind does not have is None."""

    kind: str
    format: int = FORMAT
    dit: DiTConfig | None = None
    student: StudentConfig | None = None
    shape: LatentShape | None = None
    codec_config: Mapping[str, Any] | None = None  # see `geometry`
    noise: NoiseSchedule | None = None
    schedule: ScheduleConfig | None = None
    guidance: float = 1.0  # scales that a sampler should use
    audio_guidance: float = 0.0
    given_frames: int | None = None
    codec: str | None = None
    text: Mapping[str, Any] | None = None  # see `encoder`
    audio: AudioConfig | None = None
    image: ImageConfig | None = None  # of a network that is told tokens of its start picture
    world: WorldConfig | None = None
    card: Mapping[str, Any] | None = None
    published: Origin | None = None
    sha256: str | None = None  # of the tensors of its weights

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(f"it has format {self.format!r}; this version reads {FORMAT}")
        if self.kind not in KINDS:
            raise ConfigError(f"it is a {self.kind!r}; networks are {', '.join(KINDS)}")
        for part in fields(self):
            if part.name not in ("card", "published", "format"):
                check_bounds(getattr(self, part.name), part.name)
        _ = self.geometry, self.encoder
        if self.shape and self.dit and (self.shape.channels, self.shape.patch) != (self.dit.channels, self.dit.patch):
            raise ConfigError(
                f"shape has {self.shape.channels} channels and patch {list(self.shape.patch)}, dit {self.dit.channels} "
                f"and {list(self.dit.patch)}: they must be the same"
            )
        if self.shape and self.shape.height * self.shape.width > MAX_PIXELS:
            raise ConfigError(f"shape.height x width {self.shape.height}x{self.shape.width} is too large a frame")
        if self.shape and self.dit and self.student:
            check_student(self.dit, self.student, self.shape, self.schedule)
        if self.given_frames is not None and self.shape and self.given_frames > self.shape.frames:
            raise ConfigError(f"given_frames {self.given_frames} are more than the {self.shape.frames} of shape.frames")

    @property
    def geometry(self) -> CodecConfig | None:
        """Of a codec: its config."""
        if self.codec_config is None:
            return None
        cfg = read_codec_config(self.codec_config)
        check_bounds(cfg, "codec_config")
        return cfg

    @property
    def encoder(self) -> NgramConfig | Umt5Config | None:
        """The text encoder of the network's prompts."""
        return read_text_config(self.text) if self.text else None

    @property
    def played(self) -> WorldConfig:
        """The world, an empty one where the record has none."""
        return self.world or WorldConfig()


def read(raw: Any, needs: bool = True) -> Record:
    """The record in a JSON value; ConfigError names the field that is missing, unknown or impossible.

    needs: whether it must hold all that its kind cannot do without.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"it must hold keys and values, not a {type(raw).__name__}")
    if raw.get("format", FORMAT) != FORMAT:
        raise ConfigError(f"it has format {raw.get('format')!r}; this version reads {FORMAT}")
    if raw.get("kind") not in KINDS:
        raise ConfigError(f"it is a {raw.get('kind')!r}; networks are {', '.join(KINDS)}")
    missing = [name for name in NEEDED[raw["kind"]] if raw.get(name) is None]
    if needs and missing:
        raise ConfigError(f"{missing[0]} is missing, which a {raw['kind']} needs")
    for name, value in raw.items():
        if name != "card":
            check_bounds(value, str(name))  # before anything is built of it
    return build(Record, raw)


def check_bounds(value: Any, where: str, name: str = "", depth: int = 0) -> None:
    """ConfigError unless every number in `value` is one that a network can have, and everything has a sane length.

    `value`: plain values or dataclasses, called `where`; `name` is the field a number belongs to.
    """
    name = name or where.rpartition(".")[2]
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where} is nested too deeply")
    if is_dataclass(value):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, Mapping | tuple | list | str):
        most = MAX_KEYS if isinstance(value, Mapping) else MAX_TEXT if isinstance(value, str) else MAX_LIST
        if len(value) > most:
            raise ConfigError(f"{where} is {len(value)} long; at most {most} are read")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_bounds(inner, f"{where}.{key}", "", depth + 1)
    elif isinstance(value, tuple | list):
        for inner in value:
            check_bounds(inner, where, name, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        low, high = BOUNDS.get(name, (-MAX_NUMBER, MAX_NUMBER))
        if not low <= value <= high:
            raise ConfigError(f"{where} is {value!r:.24}; it must lie between {low:g} and {high:g}")


def check_student(dit: DiTConfig, student: StudentConfig, shape: LatentShape, schedule: ScheduleConfig | None) -> None:
    """ConfigError for a student whose memory fits no machine like this, or that is given all it could generate."""
    memory = student.memory
    total = memory.bytes(
        layers=dit.layers,
        width=dit.width,
        tokens_per_frame=shape.tokens_per_frame,
        grid=shape.grid,
        heads=dit.heads,
        itemsize=2,
    )
    if total > MAX_MEMORY:
        raise ConfigError(
            f"memory.frames {memory.frames} of {shape.height}x{shape.width} latents take {total / 2**30:,.0f} GiB"
        )
    given = schedule.given_chunks if schedule else 0
    frames = (student.first_chunk or student.chunk) + (given - 1) * student.chunk if given else 0
    if given and frames >= shape.frames:
        raise ConfigError(f"schedule.given_chunks {given} are {frames} frames, all of shape.frames {shape.frames}")
