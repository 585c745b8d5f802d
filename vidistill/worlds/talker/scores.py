"""Scores that a training of talkers is validated by, see `training.validation.score_of`."""

from typing import Any

import torch
from torch import Tensor

from vidistill import metrics
from vidistill.worlds.talker.face import read_mouth


def sync(x: Tensor, held: Any, codec: Any) -> float:
    """How well the mouth that is read follows the true one, less what pictures flicker more, and mouths move less, than
    real ones do: a blurred mouth that hardly opens follows best."""
    if held.mouth is None or codec is None:
        raise ValueError("this score needs clips with a mouth and the `codec` of their latents")
    px, real = (codec.decode(v.float()).cpu() for v in (x, held.batch.x))
    read = torch.from_numpy(read_mouth(px.permute(0, 1, 3, 4, 2).numpy())[..., 0])
    own = held.mouth[..., 0]
    corr, offset = metrics.sync(read, own)
    flicker = metrics.ratio(float(metrics.flicker(px).mean()), float(metrics.flicker(real).mean()))
    still = max(0.0, 0.8 - metrics.pace(read, own))
    return corr - 0.1 * max(0, abs(offset) - 1) - 0.2 * max(0.0, flicker - 1.1) - still
