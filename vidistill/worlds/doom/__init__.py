"""Rooms of the real Doom engine that a walker explores."""

from vidistill.worlds.doom.labels import TURNS, WALKS, doom_labels, walk_labels
from vidistill.worlds.doom.recorder import DoomConfig, record_many, seeds
from vidistill.worlds.spec import WorldSpec

WORLD = WorldSpec(
    ("quality", "memory", "minutes"),
    DoomConfig,
    record_many,
    seeds,
    heads={"turn": TURNS, "walk": WALKS},
    labels=doom_labels,
    asked=walk_labels,
    mirrored={"turn": (2, 1, 0)},
    balanced=("turn", "walk"),
    probe="probes/doom-probe",
)
