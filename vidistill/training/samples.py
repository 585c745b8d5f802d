"""Looking at a run: clips of the network as it is now, as a video and a contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.conditioning.condition import branches
from vidistill.data.types import Batch
from vidistill.diffusion import NoiseSchedule
from vidistill.io import contact_sheet, save_png, to_uint8, write_video
from vidistill.models.student import CausalStudent
from vidistill.rollout import roll_out
from vidistill.sampling import sample as sample_teacher
from vidistill.training.config import TrainConfig

FPS = 16.0  # where the data say no rate
CLIPS = 4  # at most
STEPS = 20  # of a bidirectional network's sampler
SHEET_FRAMES = 8


@torch.no_grad()
def sample_clips(net: Any, cfg: TrainConfig, batch: Batch) -> Tensor:
    """Clips [B, F, C, H, W] for the conditions and given frames of `batch`, the same noise every time.

    A student streams them; a bidirectional network is sampled in STEPS steps, guided as its record will say.
    """
    given = batch.x[:, : batch.given] if batch.given else None
    if isinstance(net, CausalStudent):
        return roll_out(net, cfg.schedule, batch.cond, (batch.x.shape[0], batch.x.shape[1]), seed=cfg.seed, given=given)
    noise: NoiseSchedule = cfg.loss.noise
    rng = torch.Generator().manual_seed(cfg.seed)
    start = torch.randn(batch.x.shape, generator=rng).to(batch.x.device)
    nulls, scales = branches(batch.cond, cfg.loss.guidance, cfg.loss.audio_guidance)
    return sample_teacher(net, start, noise.steps(STEPS), batch.cond, given=given, nulls=nulls, scales=scales)


@torch.no_grad()
def write_samples(folder: Path, step: int, latents: Tensor, codec: Any, fps: float) -> tuple[Path, Path]:
    """Decode latents [B, F, C, H, W] and write them side by side as FOLDER/step-N.mp4, with a sheet; returns both."""
    clips = [to_uint8(codec.decode(clip[None].float())[0]) for clip in latents]
    video, sheet = (folder / f"step-{step:08d}{suffix}" for suffix in (".mp4", ".png"))
    folder.mkdir(parents=True, exist_ok=True)
    wide = np.concatenate(clips, axis=2)
    write_video(video, wide[:, : wide.shape[1] // 2 * 2, : wide.shape[2] // 2 * 2], fps)
    save_png(sheet, contact_sheet(clips, every=max(1, len(clips[0]) // SHEET_FRAMES)))
    return video, sheet
