"""Tiny data and networks of a student that remembers and knows its camera."""

from dataclasses import replace

import torch
from conftest import DIT, random_dit
from tiny_training import FRAMES, write_latents

from vidistill import checkpoint
from vidistill.conditioning.camera import CameraConfig
from vidistill.data.clips import Clips
from vidistill.data.shards import read_meta, write_shards
from vidistill.memory.policies import MemoryConfig
from vidistill.models.layers import SiteConfig
from vidistill.models.student import StudentConfig

CAMERA = CameraConfig(step=0.15, turn=0.1, wavelengths=(4.0, 16.0))
SITES = {
    **DIT.sites,
    "hidden": SiteConfig(CAMERA.action_dim, hidden=6, place="after_attention", zero_init=True),
    "qk": SiteConfig(CAMERA.pose_dim, hidden=6, zero_init=True),
}
POSED = replace(DIT, sites=SITES)
MEMORY = MemoryConfig("compressed", frames=3, history=13, pattern=(1, 2))
REMEMBERING = StudentConfig(chunk=3, first_chunk=1, memory=MEMORY)


def posed_data(folder, **kw):
    """Latents with the poses of a walk."""
    write_latents(folder / "plain", **kw)
    plain = Clips(folder / "plain")
    rng = torch.Generator().manual_seed(1)
    steps = torch.rand(*plain.tensors["latents"].shape[:2], 3, generator=rng) * 0.3
    tensors = {**plain.tensors, "poses": steps.cumsum(1)}
    write_shards(folder / "latents", [(tensors, [{"seed": k} for k in range(len(plain))])], read_meta(folder / "plain"))


def posed_teacher(root, camera=None):
    net = random_dit(POSED, 1)
    with torch.no_grad():
        for p in net.sites.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    shape = {"frames": FRAMES, "channels": 4, "height": 4, "width": 4}
    record = {"noise": {"shift": 2.0}, "shape": shape, "codec": None, "world": {"camera": camera}, "card": {}}
    checkpoint.export(root / "teacher", net, record, torch.float32)
