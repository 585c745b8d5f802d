"""A text encoder that needs no download: words as hashed character n-grams, each seen with its neighbours."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

log = logging.getLogger("vidistill")

GRAMS = (3, 4)  # characters of an n-gram; a word counts as one, too
END, EDGE = "<", ">"  # mark the beginning and the end of a word, so that a syllable knows its place


@dataclass(frozen=True)
class NgramConfig:
    """`dim` numbers a word (a multiple of 8); `length` words are read, shorter prompts are filled up with zeros."""

    dim: int = 32
    length: int = 16

    def __post_init__(self) -> None:
        if self.dim < 8 or self.dim % 8 or self.length < 1:
            raise ValueError(
                f"text.dim must be a multiple of 8 and text.length at least 1, got {self.dim}, {self.length}"
            )

    @property
    def width(self) -> int:
        """Numbers of a token: the word, the one before and the one after it."""
        return 3 * self.dim


@lru_cache(maxsize=4096)
def word_vector(word: str, dim: int) -> Tensor:
    """A unit vector [dim] of `word`, similar for words that share letters. Source: Bojanowski et al. 1607.04606."""
    marked = f"{END}{word}{EDGE}"
    grams = {marked} | {marked[i : i + n] for n in GRAMS for i in range(len(marked) - n + 1)}
    total = torch.zeros(dim)
    for gram in sorted(grams):
        bits = int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=dim // 8).digest(), "little")
        total += torch.tensor([2.0 * (bits >> i & 1) - 1 for i in range(dim)])
    return total / total.norm().clamp_min(1e-6)


@lru_cache(maxsize=256)
def say_what_is_cut(length: int, rest: str) -> None:
    """Say once that a prompt is longer than its encoder reads."""
    log.warning("a prompt has more words than the %d its text encoder reads; left out: %s", length, rest[:80])


class Ngrams:
    """Tokens [B, length, 3 dim] of prompts; the same letters give the same numbers on every machine.

    A token holds its word between its neighbours: cross-attention has no order, yet "red" next to "ball" and "red" next
    to "background" must differ.
    """

    def __init__(self, cfg: NgramConfig = NgramConfig()) -> None:
        self.cfg = cfg

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self.tokens(prompt) for prompt in prompts])

    def tokens(self, prompt: str) -> Tensor:
        """Tokens [length, 3 dim] of one prompt; words beyond `length` are not read, which is said.

        ValueError for a prompt of signs alone.
        """
        cfg = self.cfg
        words = "".join(c if c.isalnum() else " " for c in prompt.casefold()).split()
        if prompt.strip() and not words:
            raise ValueError(f"prompt {prompt[:40]!r} has no letters: this text encoder reads words alone")
        if len(words) > cfg.length:
            say_what_is_cut(cfg.length, " ".join(words[cfg.length :]))
            words = words[: cfg.length]
        vectors = torch.zeros(cfg.length + 2, cfg.dim)
        for i, word in enumerate(words, 1):
            vectors[i] = word_vector(word, cfg.dim)
        out = torch.cat((vectors[1:-1], vectors[:-2], vectors[2:]), dim=1) * (cfg.dim / 2) ** 0.5
        out[len(words) :] = 0.0
        return out
