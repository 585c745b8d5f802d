"""Text for Wan's networks: UMT5 embeddings, kept on disk by prompt so that nothing else needs UMT5 in memory."""

import hashlib
import html
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidistill.io import not_found, write_atomic

log = logging.getLogger("vidistill")


def clean(prompt: str) -> str:
    """`prompt` without HTML entities and doubled spaces, as Wan's pipelines feed it."""
    try:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    except ImportError:
        log.debug("ftfy is not installed: broken Unicode in prompts stays")
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def cache_folder() -> Path:
    """Where embeddings of streamed prompts stay: under the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidistill" / "text"


def padded(tokens: Tensor, length: int) -> Tensor:
    """`tokens` [l, D] with zeros behind, [length, D]."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))


class TextCache:
    """Embeddings of prompts [B, L, D], zero after the prompt's end. The encoder is loaded for a new prompt only.

    `source`: a diffusers folder or hub id (also as hf://ORG/NAME) that has `text_encoder` and `tokenizer`. `folder`:
    where embeddings stay, one safetensors file a prompt that holds `tokens` [l <= L, D] up to the prompt's end, named
    by a hash of source, length and prompt.
    """

    def __init__(
        self,
        source: str | Path,
        folder: str | Path,
        *,
        length: int = 512,
        offline: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.source, self.folder = str(source).removeprefix("hf://"), Path(folder)
        self.length, self.offline = length, offline
        self.device, self.dtype = device, dtype
        self._models: tuple[Any, Any] | None = None

    def path(self, prompt: str) -> Path:
        text = f"{self.source}\n{self.length}\n{clean(prompt)}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, D] (float32) of `prompts`; encodes and stores those that are not on disk yet."""
        for prompt in dict.fromkeys(prompts):
            if not self.path(prompt).is_file():
                self._store(prompt)
        return torch.stack([padded(self._kept(p).float(), self.length) for p in prompts])

    def _kept(self, prompt: str) -> Tensor:
        """An embedding from disk, made again if the file is damaged."""
        try:
            return load_file(self.path(prompt))["tokens"]
        except SafetensorError:
            self._store(prompt)
            return load_file(self.path(prompt))["tokens"]

    def release(self) -> None:
        """Forget the encoder; embeddings on disk stay usable."""
        self._models = None

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings [l <= L, D] of `prompts`, encoded together and not stored, as the encoder gives them, on a CPU."""
        tokenizer, encoder = self._models or self._load()
        texts = [clean(prompt) for prompt in prompts]
        batch = tokenizer(
            texts,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        for text in texts:
            if len(tokenizer(text).input_ids) > self.length:
                log.warning("a prompt is longer than the %d tokens that are read: %s...", self.length, text[:60])
        with torch.no_grad():
            hidden = encoder(batch.input_ids, batch.attention_mask).last_hidden_state.cpu()
        return [row[:length].contiguous() for row, length in zip(hidden, batch.attention_mask.sum(1), strict=True)]

    def _store(self, prompt: str) -> None:
        (tokens,) = self.embed([prompt])
        write_atomic(self.path(prompt), lambda p: save_file({"tokens": tokens}, p))

    def _load(self) -> tuple[Any, Any]:
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError as error:
            raise ImportError("encoding new prompts needs transformers: pip install 'vidistill[wan]'") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.source, subfolder="tokenizer", local_files_only=self.offline)
            encoder = UMT5EncoderModel.from_pretrained(
                self.source, subfolder="text_encoder", dtype=self.dtype, local_files_only=self.offline
            )
        except OSError as error:
            raise not_found(self.source, "the text_encoder and tokenizer of", error, self.offline) from error
        self._models = (tokenizer, encoder.to(self.device).eval())
        return self._models
