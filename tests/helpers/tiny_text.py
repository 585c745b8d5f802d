"""A tiny world that listens: drawn clips, their latents, a teacher and a student of random weights."""

from dataclasses import asdict, replace

import torch
from conftest import CODEC, DIT, random_dit

from vidistill import checkpoint, cli
from vidistill.codecs.tiny import TinyCodec
from vidistill.diffusion import LatentShape
from vidistill.evaluation import probes
from vidistill.memory.policies import MemoryConfig
from vidistill.models.student import CausalStudent, StudentConfig

TEXT = {"kind": "ngrams", "dim": 8, "length": 12}
SCHEDULE = {"levels": [1.0, 0.8, 0.5], "pattern": "32", "context": "last_step", "rewarm": 1}
FRAMES = 9


def write_world(root):
    """Codec, teacher, student, a probe, and train latents under `root`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.export(root / "codec", TinyCodec(CODEC), {"card": {}})
        probe = probes.Probe(replace(probes.SHAPES_PROBE, widths=(8, 8), features=8))
        probes.save_probe(root / "probe", probe, {})
    net = random_dit(replace(DIT, sites={}, text_dim=24))
    shape = LatentShape(FRAMES, 4, 8, 8)
    record = {
        "noise": {"shift": 2.0},
        "schedule": SCHEDULE,
        "given_frames": 0,
        "codec": str(root / "codec"),
        "world": {"fps": 12.0, "px_size": 32},
        "text": TEXT,
        "card": {"parents": [str(root / "teacher")], "data": {"source": "shapes"}},
    }
    checkpoint.export(root / "teacher", net, {**record, "shape": asdict(shape), "guidance": 2.0})
    cfg = StudentConfig(chunk=3, memory=MemoryConfig("window", frames=6))
    checkpoint.export(root / "student", CausalStudent(net, cfg, shape), record)
    args = [
        "data",
        "shapes",
        str(root / "latents"),
        "--episodes",
        "4",
        "--frames",
        "45",
        "--codec",
        str(root / "codec"),
    ]
    assert cli.main([*args, "--text", "kind=ngrams", "dim=8", "length=12"]) == 0
    return root
