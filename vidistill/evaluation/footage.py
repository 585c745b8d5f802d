"""Held-out clips of any data folder: what `vidistill data` made of videos, environments or data sets.

A world that is not bundled has no engine to ask: what is judged on is what lies in the folder of a split.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidistill.checkpoint import Bundle
from vidistill.codecs import Codec
from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import ACTION_SITE, AUDIO_SITE, Condition, reference_channels, walked
from vidistill.conditioning.controls import shows_picture
from vidistill.config import build
from vidistill.data.clips import Clips, start_of_clip
from vidistill.data.shards import LATENT_RATE, META, DataError, read_meta
from vidistill.data.types import split_name
from vidistill.diffusion import derived_seed
from vidistill.evaluation.clips import Batch
from vidistill.evaluation.intervals import LEAST_ROOMS
from vidistill.io import to_float, to_uint8

log = logging.getLogger("vidistill")

Window = tuple[int, int]  # episode, first entry of its `kind`
TRAIN = "train"


@dataclass(frozen=True)
class Footage:
    """Episodes of one split, and the folder of those that its world was learned from."""

    folder: Path
    split: str

    @classmethod
    def open(cls, data: str | Path, split: str) -> "Footage":
        """The split in a folder of splits, or `data` itself; DataError where it is not there or is another split."""
        path = Path(data)
        if not (path / META).is_file():
            inside = {p.parent.name: p.parent for p in path.glob(f"*/{META}")}
            found = next((inside[name] for name in inside if split_name(name) == split), None)
            if found is None:
                held = f"splits there are {', '.join(sorted(inside))}" if inside else "there are no clips there"
                raise DataError(f"--data {data} has no {split} split ({held}); make one with `vidistill data`")
            path = found
        if split_name(own := str(read_meta(path).get("split"))) != split:
            raise DataError(f"--data {path} holds clips of split {own!r}; judged here is {split}: name that folder")
        return cls(path, split)

    @cached_property
    def clips(self) -> Clips:
        clips = Clips(self.folder)
        if clips.kind == "trajectories":
            raise DataError(f"--data {self.folder} holds samples of a teacher; name recorded frames or their latents")
        return clips

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.clips.meta

    @property
    def fps(self) -> float:
        return float(self.meta["fps"])

    @property
    def of_frames(self) -> bool:
        return self.clips.kind == "frames"

    @property
    def training(self) -> Path:
        """The clips that its world was learned from; DataError where they are not beside it."""
        folder = self.folder.parent / TRAIN
        if not (folder / META).is_file():
            raise DataError(f"{folder} is missing: features are learned from the training clips beside {self.folder}")
        return folder

    def length(self, latents: int, factor: int) -> int:
        """Entries of a clip of so many latents, in px frames or in latents."""
        return 1 + (latents - 1) * factor if self.of_frames else latents

    def rows(self, name: str, window: Window, length: int, factor: int) -> Tensor:
        """What is told of a window, at latent rate."""
        episode, start = window
        whole = self.clips.episode(name, episode)
        if name == "tokens":
            return whole.float()
        part = whole[start : start + length]
        return (LATENT_RATE[name](part, factor) if self.of_frames else part).float()

    def px(self, windows: Sequence[Window], length: int, codec: Codec) -> Tensor:
        """Real clips [B, T, 3, H, W]; those of latents as the codec shows them."""
        if self.of_frames:
            return to_float(torch.stack([self.clips.episode("frames", e)[s : s + length] for e, s in windows]).numpy())
        return codec.decode(self.clips.gather(windows, length).x)

    def actions(self, window: Window, length: int, factor: int) -> Tensor:
        """Actions [T, A] of every px frame of a window."""
        return unpacked(self.rows("actions", window, length, factor), factor)

    def windows(self, length: int, num: int) -> list[Window]:
        """At most `num` windows, as far apart as they can be: one of every episode before another of any.

        DataError where fewer episodes are long enough than an interval needs.
        """
        lengths = self.clips.lengths("frames" if self.of_frames else "latents")
        long = [k for k, rows in enumerate(lengths) if rows >= length]
        if len(long) < LEAST_ROOMS:
            noun = "frames" if self.of_frames else "latents"
            raise DataError(
                f"--data {self.folder} has {len(long)} episodes of at least {length} {noun} (of {len(lengths)}); "
                f"an interval needs at least {LEAST_ROOMS}: make more of them, or longer ones"
            )
        per = -(-num // len(long))
        starts = {k: spread(lengths[k] - length, per) for k in long}
        return [(k, starts[k][j]) for j in range(per) for k in long if j < len(starts[k])][:num]

    def condition(
        self, windows: Sequence[Window], length: int, bundle: Bundle, codec: Codec, given: Tensor | None
    ) -> Condition:
        """What a network is told of windows, of what it takes: actions, camera, sound, text and first picture."""
        dit = bundle.net.cfg if bundle.kind == "teacher" else bundle.net.net.cfg
        if shows_picture(dit):
            raise DataError(f"{bundle.name} makes clips of a picture it is shown; {self.folder} cannot judge those yet")
        factor, camera = codec.temporal_factor, bundle.record["world"].get("camera")

        def rows(name: str) -> Tensor:
            return torch.stack([self.rows(name, window, length, factor) for window in windows])

        per_frame: dict[str, Tensor] = {}
        if ACTION_SITE in dit.sites and self.clips.width_of("actions"):
            per_frame[ACTION_SITE] = rows("actions")
        if camera is not None:
            if not self.clips.width_of("poses"):
                raise DataError(f"{bundle.name} is told where its camera goes; {self.folder} holds no poses")
            per_frame |= walked(rows("poses"), build(CameraConfig, camera), factor)
        elif AUDIO_SITE in dit.sites and self.clips.width_of("audio"):
            per_frame[AUDIO_SITE] = rows("audio")
        tokens = rows("tokens") if dit.text_dim and self.clips.width_of("tokens") else None
        cond = start_of_clip(Condition(tokens, per_frame))
        if not dit.extra_channels or given is None:
            return cond
        frames = (
            next(iter(per_frame.values())).shape[1]
            if per_frame
            else 1 + (length - 1) // (factor if self.of_frames else 1)
        )
        return Condition(tokens, cond.per_frame, reference_channels(given, 0, frames))

    def episode(self, k: int, codec: Codec) -> Tensor:
        """All frames uint8 [T, H, W, 3] of an episode; those of latents as the codec shows them."""
        if self.of_frames:
            return self.clips.episode("frames", k)
        latents = self.clips.episode("latents", k).float()
        return torch.from_numpy(to_uint8(codec.decode(latents[None])[0]))


def spread(slack: int, per: int) -> list[int]:
    """At most `per` different starts between 0 and `slack`: one in the middle, else from end to end."""
    return [slack // 2] if per == 1 else sorted({slack * j // (per - 1) for j in range(per)})


def unpacked(packed: Tensor, factor: int) -> Tensor:
    """Actions [T, A] at px rate of packed ones [F, factor * A + 1], see `pack_actions`."""
    return packed[:, :-1].reshape(len(packed) * factor, -1)[factor - 1 :]


class Windows:
    """Batches of windows of held-out footage; fact `asked` [B, T, heads]: the classes of the actions of px frames."""

    def __init__(
        self, footage: Footage, codec: Codec, latents: int, clips: int, batch: int, seed: int, classes: Any
    ) -> None:
        self.footage, self.codec, self.batch, self.seed, self.classes = footage, codec, batch, seed, classes
        self.length = footage.length(latents, codec.temporal_factor)
        self.windows = footage.windows(self.length, clips)
        self.given = bool(footage.clips.given)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            few = self.windows[i * self.batch : (i + 1) * self.batch]
            rooms = torch.tensor([episode for episode, _ in few])
            px = self.footage.px(few, self.length, self.codec)
            asked = torch.stack([self.asked(window) for window in few]).expand(-1, px.shape[1], -1)
            condition = partial(self.footage.condition, few, self.length)
            facts = {"asked": asked, "episodes": rooms}
            yield Batch(px, condition, derived_seed(self.seed, i), self.given, rooms=rooms, facts=facts)

    def asked(self, window: Window) -> Tensor:
        if not self.footage.clips.width_of("actions"):
            return torch.zeros(1, 0, dtype=torch.long)
        return self.classes(self.footage.actions(window, self.length, self.codec.temporal_factor))


# --- whether a checkpoint can be judged on it -------------------------------------------------------------------------


def check_same(bundle: Bundle, footage: Footage, pairs: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError where a checkpoint and footage differ in one of `pairs`."""
    for name, (own, found) in pairs.items():
        if own != found:
            raise ValueError(
                f"{bundle.name} learned from {name} {own or 'unknown'}, {footage.folder} has {name} "
                f"{found or 'unknown'}: its clips say nothing about it; name held-out data of its own world"
            )


def check_world(bundle: Bundle, footage: Footage) -> None:
    """ValueError for a checkpoint that learned from another source, or another environment; a warning for files that
    came from another place, which may show another world."""
    metas = [bundle.record.get("card", {}).get("data") or {}, footage.meta]
    places = [str(meta["from"]) for meta in metas if meta.get("from")]
    if len(set(places)) > 1:
        log.warning(
            "%s learned from files of %s, judged are files of %s: figures mean little unless both show the same world",
            bundle.name,
            *places,
        )
    pairs = {"source": tuple(meta.get("source") for meta in metas)}
    pairs["environment"] = tuple((meta.get("config") or {}).get("env") for meta in metas)
    check_same(bundle, footage, pairs)


def check_fits(bundle: Bundle, codec: Codec, footage: Footage) -> None:
    """ValueError, which names both sides, for footage that a checkpoint cannot be shown."""
    meta, record, pairs = footage.meta, bundle.record, dict[str, tuple[Any, ...]]()
    if bundle.kind != "codec":
        height, width = (side * codec.spatial_factor for side in (bundle.shape.height, bundle.shape.width))
        pairs["size"] = (f"{height}x{width}", size_of(footage, codec))
        pairs["frames a second"] = (record["world"].get("fps"), meta.get("fps"))
        pairs["actions"] = tuple(", ".join(of.get("actions") or ()) or "none" for of in (record["world"], meta))
    if not footage.of_frames:
        codecs = record.get("codec") if bundle.kind != "codec" else bundle.name, meta.get("codec")
        pairs["codec"] = tuple(Path(str(name)).name for name in codecs)
    check_same(bundle, footage, pairs)


def size_of(footage: Footage, codec: Codec) -> str:
    """Height and width in pixels of what footage shows."""
    if footage.of_frames:
        height, width = footage.clips.parts[0]["frames"].shape[-3:-1]
        return f"{height}x{width}"
    _, height, width = footage.clips.latent_size
    return f"{height * codec.spatial_factor}x{width * codec.spatial_factor}"
