"""Talking faces: drawn people who say sentences."""

from vidistill.worlds.spec import WorldSpec
from vidistill.worlds.talker.face import likeness, read_mouth
from vidistill.worlds.talker.recorder import TalkerConfig, record_many, seeds

WORLD = WorldSpec(("lip_sync",), TalkerConfig, record_many, seeds, readers={"mouth": read_mouth, "looks": likeness})
