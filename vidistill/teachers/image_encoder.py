"""Pictures for Wan 2.1's image-to-video networks: CLIP's tokens of the picture a clip starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidistill.io import not_found


class ImageEncoder:
    """Tokens [B, L, D] of pictures. The encoder is loaded for the first picture.

    `source`: a diffusers folder or hub id (also as hf://ORG/NAME) that has `image_encoder` and `image_processor`.
    """

    def __init__(self, source: str | Path, *, offline: bool = False, device: str = "cpu") -> None:
        self.source, self.offline, self.device = str(source).removeprefix("hf://"), offline, device
        self._models: tuple[Any, Any] | None = None

    @torch.no_grad()
    def encode(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Tokens (float32) of `pictures`, uint8 [H, W, 3]: the states before CLIP's last layer.

        Source: Wan's code, and `WanImageToVideoPipeline.encode_image` of diffusers.
        """
        processor, encoder = self._models or self._load()
        batch = processor(images=list(pictures), return_tensors="pt").to(self.device)
        tokens: Tensor = encoder(**batch, output_hidden_states=True).hidden_states[-2]
        return tokens

    @property
    def sizes(self) -> dict[str, int]:
        """How many `tokens` a picture has, and their `width`."""
        cfg = (self._models or self._load())[1].config
        return {"tokens": (cfg.image_size // cfg.patch_size) ** 2 + 1, "width": cfg.hidden_size}

    def _load(self) -> tuple[Any, Any]:
        try:
            from transformers import CLIPImageProcessor, CLIPVisionModel
        except ImportError as error:
            raise ImportError("reading pictures needs transformers: pip install 'vidistill[wan]'") from error
        where: dict[str, Any] = {"local_files_only": self.offline}
        try:
            processor = CLIPImageProcessor.from_pretrained(self.source, subfolder="image_processor", **where)
            encoder = CLIPVisionModel.from_pretrained(
                self.source, subfolder="image_encoder", dtype=torch.float32, **where
            )
        except OSError as error:
            raise not_found(self.source, "the image_encoder and image_processor of", error, self.offline) from error
        self._models = (processor, encoder.to(self.device).eval())
        return self._models
