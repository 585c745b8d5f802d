"""The rooms (seeds of a world) that an evaluation may open: those of one split, never of another.

Whatever chooses between checkpoints or settings opens "validation"; what is published is measured on "test".
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vidistill.data.clips import Clips
from vidistill.data.shards import frame_shards, write_shards
from vidistill.data.types import SPLITS, split_name
from vidistill.progress import track
from vidistill.worlds.spec import WorldSpec

FREE = ("num_frames", "supersample")  # settings of an engine that may differ: how long, and how finely drawn
FOLDERS: Mapping[str, str] = {"validation": "heldout"}  # how the folders of a split are named, where not as it is


@dataclass(frozen=True)
class Rooms:
    """Rooms of a split of a world, from its `first` on."""

    source: str
    world: WorldSpec
    split: str = "validation"
    first: int = 0

    def __post_init__(self) -> None:
        if split_name(self.split) not in SPLITS or self.split == "train":
            raise ValueError(f"split is {self.split!r}; nothing is judged but on validation or test")
        if self.first < 0:
            raise ValueError(f"first_seed is {self.first}; it counts the rooms of the split, from 0 on")

    def seeds(self, offset: int, count: int) -> list[int]:
        """The seeds of `count` rooms from the `offset`-th on; ValueError where the split has fewer."""
        start = self.first + offset
        return list(self.world.seeds(self.split, start + count))[start:]

    def folder(self, data: str, part: str) -> Path:
        """Where recordings lie: `{split}` in `data` is replaced; other first rooms have a folder of their own."""
        name = split_name(self.split)
        return Path(data.format(split=FOLDERS.get(name, name))) / (part + (f"-{self.first}" if self.first else ""))

    def episodes(self, data: str, part: str, made: tuple[int, int], need: tuple[int, int], offset: int = 0) -> Clips:
        """Recorded episodes, recorded now if they are missing.

        made, need: (episodes, frames) to record, and that suffice. ValueError for a folder of another split, of other
        rooms, of another engine, or of too few.
        """
        folder, wanted = self.folder(data, part), self.seeds(offset, made[0])
        if not folder.exists():
            cfg = self.world.config(num_frames=made[1])
            recording = track(self.world.record(cfg, wanted), f"recording {folder}", total=made[0], unit="episode")
            meta = {"source": self.source, "split": self.split, "config": asdict(cfg), "fps": cfg.fps}
            write_shards(folder, frame_shards(recording, 16), meta)
        clips = Clips(folder)
        self.check_recorded(folder, clips.meta)
        have, found = tuple(clips.tensors["frames"].shape[:2]), clips.meta["split"]
        if split_name(found) != split_name(self.split):
            raise ValueError(
                f"{folder} holds episodes of split {found!r}, {self.split!r} is judged here: name a folder of that "
                "split as eval.data, or one with {split} in its name"
            )
        if (first := clips.meta["described"][0]["seed"]) != wanted[0]:
            raise ValueError(f"{folder} begins with room {first}, asked for is {wanted[0]}: name another eval.data")
        if have[0] < need[0] or have[1] < need[1]:
            raise ValueError(
                f"{folder} holds {have[0]} episodes of {have[1]} frames, needed are {need[0]} of {need[1]}: "
                "remove it to record them, or name another eval.data"
            )
        return clips

    def check_recorded(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """ValueError for episodes of another source, rate or engine, as far as they say what made them."""
        cfg = self.world.config()
        here, own = {"source": self.source, "fps": cfg.fps, **asdict(cfg)}, meta.get("config") or {}
        there = {**(own if asdict(cfg).keys() <= own.keys() else {}), "fps": meta["fps"]}
        there |= {"source": meta["source"]} if meta.get("source") else {}
        for name in sorted(there.keys() & here.keys() - set(FREE)):
            if json.dumps(here[name]) != json.dumps(there[name]):  # a tuple here is a list there
                raise ValueError(
                    f"{folder} was recorded with {name} {there[name]!r}, rooms are judged with {here[name]!r}: remove "
                    "it to record them anew, or name another eval.data"
                )
