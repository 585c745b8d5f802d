"""A tiny talker: random networks and data that hear, see a reference picture and read captions."""

from dataclasses import asdict, replace

import torch
from conftest import CODEC, DIT, SCHEDULE, SHAPE, STUDENT, random_dit
from tiny_training import OPTIM, dmd_stage

from vidistill import checkpoint
from vidistill.codecs.tiny import TinyCodec
from vidistill.conditioning.audio import AudioConfig
from vidistill.data.shards import write_shards
from vidistill.models.layers import SiteConfig
from vidistill.models.student import CausalStudent
from vidistill.training.config import TrainConfig

AUDIO = AudioConfig(bands=4)  # 16 numbers a px frame, 64 a latent
TEXT = {"kind": "ngrams", "dim": 8, "length": 6}
WORLD = {"fps": 16.0, "px_size": 16, "temporal": 4}
CARD = {"losses": [1.0] * 8, "data": {"source": "talker"}}
TALKER = replace(DIT, sites={"hidden": SiteConfig(64, hidden=8)}, text_dim=24, extra_channels=SHAPE.channels + 1)
RECORD = {
    "noise": {"shift": 2.0},
    "audio": asdict(AUDIO),
    "text": TEXT,
    "world": WORLD,
    "card": {"losses": [1.0] * 8, "data": {"source": "talker"}},
}


def write_talker(folder):
    """Codec, teacher and student under their names in `folder`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.export(folder / "codec", TinyCodec(CODEC), {"card": {}})
    net = random_dit(TALKER)
    shape = {"frames": 7, "channels": SHAPE.channels, "height": SHAPE.height, "width": SHAPE.width}
    record = {**RECORD, "codec": str(folder / "codec")}
    scales = {"guidance": 2.0, "audio_guidance": 3.0}
    checkpoint.export(folder / "teacher", net, {**record, **scales, "shape": shape}, torch.float32)
    student = {**record, "schedule": SCHEDULE}
    checkpoint.export(folder / "student", CausalStudent(net, STUDENT, SHAPE), student, torch.float32)
    return folder


def write_talks(folder, episodes=6, length=10):
    """Random latents with audio, captions, a reference and a mouth; every third clip is dark."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(episodes, length, SHAPE.channels, SHAPE.height, SHAPE.width, generator=rng)
    tensors = {
        "latents": latents.half(),
        "images": latents.half(),
        "audio": torch.randn(episodes, length, 64, generator=rng).half(),
        "mouth": torch.rand(episodes, 4 * (length - 1) + 1, 2, generator=rng),
        "tokens": torch.randn(episodes, 6, 24, generator=rng).half(),
    }
    described = [{"seed": k, "measures": {"brightness": 0.1 if k % 3 == 0 else 0.5}} for k in range(episodes)]
    write_shards(folder, [(tensors, described)], {**WORLD, "audio": asdict(AUDIO), "text": TEXT})
    return folder


def talker_stage(root, **settings):
    """On-policy distillation of a tiny talker; data and networks are written on first use."""
    if not (root / "talks").is_dir():
        write_talks(root / "talks")
        write_talker(root)
    base: TrainConfig = dmd_stage(root)
    own = {
        "data": str(root / "talks"),
        "init": str(root / "student"),
        "teacher": str(root / "teacher"),
        "codec": str(root / "codec"),
        "reference": True,
        "dit": TALKER,
        "optim": replace(OPTIM, muon=""),
    }
    return replace(base, **{**own, **settings})
