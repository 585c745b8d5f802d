"""Talking faces: drawn people who say sentences."""

from vidistill.worlds.spec import WorldSpec
from vidistill.worlds.talker.face import read_mouth
from vidistill.worlds.talker.recorder import TalkerConfig, record_many, seeds

WORLD = WorldSpec(
    ("lip_sync",), TalkerConfig, record_many, seeds, probe="probes/talker-face", readers={"mouth": read_mouth}
)
