"""Distil bidirectional video diffusion models into causal students that stream in real time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidistill.checkpoint import load_codec, load_student, load_teacher
    from vidistill.memory.policies import MemoryConfig
    from vidistill.rollout import rollout
    from vidistill.schedules import Pass, ScheduleConfig
    from vidistill.streaming.session import StreamConfig, StreamSession
    from vidistill.training.trainer import train

__version__ = "0.1.0"

PUBLIC = {  # public name -> where it is defined; loaded when it is first asked for, so that importing costs nothing
    "load_student": "checkpoint",
    "load_codec": "checkpoint",
    "load_teacher": "checkpoint",
    "StreamSession": "streaming.session",
    "StreamConfig": "streaming.session",
    "rollout": "rollout",
    "Pass": "schedules",
    "ScheduleConfig": "schedules",
    "MemoryConfig": "memory.policies",
    "train": "training.trainer",
}
__all__ = [
    "MemoryConfig",
    "Pass",
    "ScheduleConfig",
    "StreamConfig",
    "StreamSession",
    "load_codec",
    "load_student",
    "load_teacher",
    "rollout",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'vidistill' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"vidistill.{PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
