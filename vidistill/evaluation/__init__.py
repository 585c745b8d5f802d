"""Students judged beside their teachers and real video, each by the suite of the world it learned from."""

from collections.abc import Mapping
from typing import Any

from vidistill.evaluation import any_world, lip_sync, minutes, prompt_adherence, quality, spatial_memory
from vidistill.evaluation.suite import Suite, world_of

SUITES = {
    module.SUITE.name: module.SUITE
    for module in (quality, prompt_adherence, lip_sync, spatial_memory, minutes, any_world)
}


def suite_of(name: str, record: Mapping[str, Any]) -> Suite:
    """The suite that judges a checkpoint by its record; ValueError if it learned from a world that is not bundled."""
    return SUITES[world_of(name, record)[1].suites[0]]
