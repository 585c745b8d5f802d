"""Tiny random checkpoints that every test may stream, sample and time; the files are written once a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodec, TinyCodecConfig
from vidistill.diffusion import LatentShape
from vidistill.memory.policies import MemoryConfig
from vidistill.models.dit import VideoDiT
from vidistill.models.layers import DiTConfig, SiteConfig
from vidistill.models.student import CausalStudent, StudentConfig

ACTIONS = ("turn_left", "turn_right", "forward", "backward")
SLOW_S = 3600
SIDE = 16  # px; 4x4 latents of 4 channels, one for 4 px frames
WORLD = {"fps": 17.5, "actions": list(ACTIONS), "px_size": SIDE, "temporal": 4}
CODEC = TinyCodecConfig(latent_channels=4, encoder_widths=(6, 8, 8), decoder_widths=(8, 8, 6))
SHAPE = LatentShape(22, 4, SIDE // 4, SIDE // 4)
DIT = DiTConfig(
    channels=4, width=24, layers=2, heads=2, ffn=48, freq_dim=32, sites={"modulation": SiteConfig(4 * len(ACTIONS) + 1)}
)
STUDENT = StudentConfig(chunk=3, first_chunk=1, memory=MemoryConfig("window", frames=10, sinks=1))
SCHEDULE = {"levels": [1.0, 0.8, 0.5], "given_chunks": 1}


def random_dit(cfg: DiTConfig, seed: int = 0) -> VideoDiT:
    """A network whose head is not zero, so that what goes in shows in what comes out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = VideoDiT(cfg)
        torch.nn.init.normal_(net.head.head.weight, std=0.3)
    return net


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests have an hour, unless they say otherwise: the limit of all others ends them on a busy machine."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny random checkpoints: codec, teacher, student."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = TinyCodec(CODEC)
    checkpoint.export(folder / "codec", codec, {"card": {}})
    net = random_dit(DIT)
    record = {
        "noise": {"shift": 2.0},
        "schedule": SCHEDULE,
        "codec": str(folder / "codec"),
        "world": WORLD,
        "card": {"commit": None, "data": {"source": "doom"}},
    }
    shape = {"frames": 22, "channels": 4, "height": SHAPE.height, "width": SHAPE.width}
    checkpoint.export(folder / "teacher", net, {**record, "shape": shape, "guidance": 2.0})
    checkpoint.export(folder / "student", CausalStudent(net, STUDENT, SHAPE), record)
    return folder


@pytest.fixture(scope="session")
def tiny_codec_path(checkpoints: Path) -> Path:
    return checkpoints / "codec"


@pytest.fixture(scope="session")
def tiny_teacher_path(checkpoints: Path) -> Path:
    return checkpoints / "teacher"


@pytest.fixture(scope="session")
def tiny_student_path(checkpoints: Path) -> Path:
    """A student of the tiny teacher: chunks of 1, 3, 3, ... latents, the first given by a start picture."""
    return checkpoints / "student"


@pytest.fixture(scope="session")
def tiny_image() -> np.ndarray:
    """A start picture, uint8 [16, 16, 3]."""
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
