"""The bundled worlds: where their clips come from. To add one: its own file, and a line in WORLDS."""

from collections.abc import Mapping

from vidistill.worlds import doom, shapes, talker
from vidistill.worlds.spec import WorldSpec

WORLDS: Mapping[str, WorldSpec] = {"doom": doom.WORLD, "shapes": shapes.WORLD, "talker": talker.WORLD}  # by `source`
