"""Clips drawn from shards, in an order that needs no state to resume."""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.conditioning.camera import CameraConfig
from vidistill.conditioning.condition import (
    ACTION_SITE,
    AUDIO_SITE,
    Condition,
    reference_channels,
    walked,
)
from vidistill.data.meta import META, DataError
from vidistill.data.shards import read_meta, read_shards
from vidistill.data.types import ENDS, Batch, count_episodes, row_lengths, unpack_rows

EVERY = slice(None)  # rows of a batch
Ranges = Mapping[str, tuple[float, float]]  # measure of a clip -> what it may be


def filter_clips(
    described: Sequence[Mapping[str, Any]], ranges: Ranges, where: str
) -> tuple[list[int], dict[str, int]]:
    """Numbers of the clips whose `measures` lie in all ranges, and how many others there are by their first reason.

    `where` the clips are from, for messages. ValueError for a measure that clips lack, and where none is left.
    Source: LiveTalk 2512.23576, condition curation; its filters look at other things.
    """
    kept, dropped = [], dict.fromkeys((f"{name} {side}" for name in ranges for side in ("below", "above")), 0)
    for k, clip in enumerate(described):
        measures = clip.get("measures", {})
        if missing := sorted(set(ranges) - set(measures)):
            known = ", ".join(measures) or "none"
            raise ValueError(f"clips of {where} have no measure {missing[0]!r} to curate by; they have {known}")
        faults = [
            f"{name} {'below' if measures[name] < low else 'above'}"
            for name, (low, high) in ranges.items()
            if not low <= measures[name] <= high
        ]
        if faults:
            dropped[faults[0]] += 1
        else:
            kept.append(k)
    if not kept:
        raise ValueError(f"curation leaves no clip of {where}: {dropped}; widen the ranges")
    return kept, {reason: count for reason, count in dropped.items() if count}


class Clips:
    """Episodes on disk, drawn as random windows; batch number `step` depends on (seed, step) alone.

    Shards are mapped, not read: only what is drawn comes into memory. Beside frames, latents or states an episode may
    have `actions` (one a latent) and `tokens` [L, D] of its prompt. Episodes may differ in length: every window that
    fits one of them is then as likely as any other.
    """

    def __init__(
        self,
        folder: str | Path,
        names: Iterable[str] | None = None,
        episodes: int = 0,
        camera: CameraConfig | None = None,
        reference: bool = False,
        curate: Ranges | None = None,
    ) -> None:
        """`episodes`: how many to use, from the first (rounded up to whole shards); 0 uses all.

        `camera`: latents also come with what this camera did, from the recorded poses (of either layout of
        `poses.pose_of`). `reference`: with their first picture as channels. `curate`: only clips whose measures lie in
        these ranges are drawn, see `dropped`.
        """
        self.camera, self.reference = camera, reference
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.parts: list[dict[str, Tensor]] = []
        self.ends: list[int] = []  # episodes up to and with each part
        for part in read_shards(folder, names):
            self.parts.append(part)
            self.ends.append(count_episodes(part) + (self.ends[-1] if self.ends else 0))
            if episodes and self.ends[-1] >= episodes:
                break
        described = self.meta["described"][: len(self)]
        if len(described) < len(self) or (not episodes and self.meta["episodes"] != len(self)):
            said = self.meta["episodes"]
            raise DataError(f"{self.folder} holds {len(self)} episodes, its {META} says {said}; make the data again")
        self._lengths: dict[str, list[int]] = {}
        self.kept, self.dropped = filter_clips(described, curate or {}, str(folder))  # episodes drawn; others by reason

    def __len__(self) -> int:
        return self.ends[-1]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything in memory, shards joined; DataError where episodes differ in length."""
        if self.ragged:
            raise DataError(f"{self.folder} holds episodes of several lengths, which make no one tensor; use `episode`")
        return {name: torch.cat([p[name] for p in self.parts]) for name in self.parts[0]}

    def episode(self, name: str, k: int) -> Tensor:
        """Tensor `name` of episode `k`, mapped."""
        i = bisect.bisect_right(self.ends, k)
        return unpack_rows(self.parts[i], name, k - (self.ends[i - 1] if i else 0))

    @cached_property
    def ragged(self) -> bool:
        """Whether episodes differ in length."""
        name = {"frames": "frames", "latents": "latents", "trajectories": "states"}[self.kind]
        return any(name + ENDS in p for p in self.parts) or len({p[name].shape[1] for p in self.parts}) > 1

    def lengths(self, name: str) -> list[int]:
        """Rows of tensor `name` in every episode."""
        return [length for part in self.parts for length in row_lengths(part, name)]

    @property
    def given(self) -> int:
        """Latents at the start of a clip that are known: 1, the picture it starts from, unless the data says so."""
        return self.meta.get("given", 1)

    def _check_given(self, length: int) -> None:
        """DataError for clips that are known from the start: there is nothing to learn from them."""
        if self.given >= length:
            raise DataError(f"{self.folder} says given {self.given}, all of a clip of {length} latents; ask for more")

    @property
    def factor(self) -> int:
        """Px frames of a latent: what the data says, or what its packed actions show."""
        if temporal := self.meta.get("temporal"):
            return int(temporal)
        if not (names := self.meta.get("actions")) or self.width_of("actions") <= len(names):
            raise DataError(f"{self.folder} does not say how many frames a latent holds (`temporal`); make it again")
        return (self.width_of("actions") - 1) // len(names)

    @property
    def kind(self) -> str:
        """What an episode is: `frames` (pixels), `latents`, or `trajectories` of a teacher."""
        if "states" in self.parts[0]:
            return "trajectories"
        return "latents" if "latents" in self.parts[0] else "frames"

    def need(self, kind: str) -> None:
        """Raise DataError unless the episodes are of this kind."""
        if self.kind != kind:
            raise DataError(f"{self.folder} holds {self.kind}, {kind} are needed here: `vidistill data --help`")

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        if self.kind == "frames":
            self.need("latents")
        channels, height, width = self.parts[0]["states" if self.kind == "trajectories" else "latents"].shape[-3:]
        return channels, height, width

    def width_of(self, name: str) -> int:
        """Numbers in a row of `actions` or `tokens`; 0 if episodes have none."""
        return self.parts[0][name].shape[-1] if name in self.parts[0] else 0

    @property
    def channels(self) -> int:
        """Condition channels that come with a clip: a reference picture and its mask, or what the data holds."""
        if self.reference:
            return self.latent_size[0] + 1
        return self.parts[0]["channels"].shape[2] if "channels" in self.parts[0] else 0

    def condition(self, windows: Iterable[tuple[int, int]], length: int) -> Condition:
        """What (episode, first latent) windows of `length` latents are told."""
        picked, tokens, per_frame = list(windows), None, {}
        if self.width_of("actions"):
            rows = [self.episode("actions", e)[s : s + length] for e, s in picked]
            per_frame[ACTION_SITE] = torch.stack(rows).float()
        if self.camera is not None:
            poses = self.poses(picked, length)
            if poses is None:
                raise DataError(f"{self.folder} has no poses, which a camera is told from; record it again")
            per_frame |= walked(poses, self.camera, self.factor)
        if self.width_of("audio"):
            per_frame[AUDIO_SITE] = torch.stack([self.episode("audio", e)[s : s + length] for e, s in picked]).float()
        if self.width_of("tokens"):
            tokens = torch.stack([self.episode("tokens", e) for e, _ in picked]).float()
        channels = None
        if self.width_of("channels"):
            channels = torch.stack([self.episode("channels", e)[s : s + length] for e, s in picked]).float()
        return Condition(tokens, per_frame, channels)

    def poses(self, windows: Iterable[tuple[int, int]], length: int) -> Tensor | None:
        """Recorded poses [B, length, 3 or 12] of windows; None where episodes have none."""
        if not self.width_of("poses"):
            return None
        return torch.stack([self.episode("poses", e)[s : s + length] for e, s in windows])

    def windows(
        self, batch: int, length: int, seed: int, step: int, name: str, stride: int = 1
    ) -> list[tuple[int, int]]:
        """(episode, first frame) of `batch` windows of `length` entries of tensor `name`, starts on `stride`."""
        rng, total = np.random.default_rng((seed, step)), self.longest(name)
        if length > total:
            raise DataError(f"clips of {length} frames do not fit episodes of {total}; record longer ones")
        if self.ragged:
            ends = np.cumsum([max(0, (rows - length) // stride + 1) for rows in self.kept_lengths(name)])
            places = rng.integers(0, ends[-1], size=batch)
            found = np.searchsorted(ends, places, side="right")
            first = (places - np.concatenate(([0], ends))[found]) * stride
            return [(self.kept[k], int(s)) for k, s in zip(found, first, strict=True)]
        starts = rng.integers(0, (total - length) // stride + 1, size=batch) * stride
        drawn = [self.kept[k] for k in rng.integers(0, len(self.kept), size=batch)]
        return list(zip(drawn, starts.tolist(), strict=True))

    def kept_lengths(self, name: str) -> list[int]:
        """Rows of tensor `name` in the episodes that are drawn."""
        if name not in self._lengths:
            every = self.lengths(name)
            self._lengths[name] = [every[k] for k in self.kept]
        return self._lengths[name]

    def longest(self, name: str) -> int:
        """Rows of tensor `name` in the longest episode that is drawn."""
        return max(self.kept_lengths(name))

    def begun(self, cond: Condition, x: Tensor) -> Condition:
        """`cond` of clips [B, F, C, H, W], told their first picture where a reference is asked for."""
        return replace(cond, channels=reference_channels(x[:, :1], 0, x.shape[1])) if self.reference else cond

    def frames(self, batch: int, length: int, seed: int, step: int, rows: slice = EVERY) -> Tensor:
        """Pixels [B, length, 3, H, W] in [0, 1] of random windows of a frame dataset, of which only `rows` are read."""
        self.need("frames")
        windows = self.windows(batch, length, seed, step, "frames")[rows]
        picked = [self.episode("frames", e)[s : s + length] for e, s in windows]
        return torch.stack(picked).permute(0, 1, 4, 2, 3).float() / 255

    def latents(self, batch: int, length: int, seed: int, step: int, rows: slice = EVERY) -> Batch:
        """Windows of a latent dataset that start from a picture: latent 0 is the codec's latent of one frame.

        Only `rows` of the batch are read. Where the data are trajectories the teacher's samples are the clips.
        """
        if self.kind == "trajectories":
            whole = self.trajectories(batch, seed, step, rows)
            if whole.x.shape[2] != length:
                raise DataError(f"{self.folder} holds clips of {whole.x.shape[2]} latents, not {length}")
            return replace(whole, x=whole.x[:, -1])
        self.need("latents")
        self._check_given(length)
        return self.gather(self.windows(batch, length, seed, step, "latents")[rows], length)

    def trajectories(self, batch: int, seed: int, step: int, rows: slice = EVERY) -> Batch:
        """Teacher trajectories: x [B, K + 1, F, C, H, W] holds the states at K levels, falling, then the sample."""
        self.need("trajectories")
        drawn = np.random.default_rng((seed, step)).integers(0, len(self.kept), size=batch)[rows]
        picked = [self.kept[k] for k in drawn]
        states = torch.stack([self.episode("states", k) for k in picked]).float()
        self._check_given(states.shape[2])
        cond = self.condition(((k, 0) for k in picked), states.shape[2])
        return Batch(states, self.begun(cond, states[:, -1]), self.given)

    def gather(self, windows: Iterable[tuple[int, int]], length: int) -> Batch:
        """The batch of (episode, first latent) windows of `length` latents."""
        latents, picked = [], list(windows)
        for e, s in picked:
            clip = self.episode("latents", e)[s : s + length]
            latents.append(torch.cat((self.episode("images", e)[s : s + 1].float(), clip[1:].float())))
        x = torch.stack(latents)
        return Batch(x, self.begun(start_of_clip(self.condition(picked, length)), x), self.given)


def start_of_clip(cond: Condition) -> Condition:
    """`cond` whose first frame is the picture before anything was done: its actions are zero, not null."""
    per_frame = {site: x.clone() for site, x in cond.per_frame.items()}
    if ACTION_SITE in per_frame:
        per_frame[ACTION_SITE][:, 0, :-1] = 0.0
    return Condition(cond.tokens, per_frame, cond.channels, cond.negative)
