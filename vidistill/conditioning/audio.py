"""Sound as a network hears it: features of every pixel frame, causal but for a bounded look-ahead."""

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vidistill.io import may_download, not_found

FLOOR = 1e-5  # power of silence: what is softer is not heard
KEPT = 256  # px frames whose features a stream may ask for again
LOUD = 6.0  # log power of speech above the floor at which features are 0


@dataclass(frozen=True)
class AudioConfig:
    """How sound of `rate` samples a second becomes one vector a pixel frame of `fps` a second.

    Features are made `block` px frames at a time from their own sound, `context` px frames before and `lookahead` px
    frames after it; nothing else can change them. `kind`: `mel` (log-mel energies in `bands` bands, `hops` times a
    frame: no weights) or `wav2vec2` (all hidden states of the transformers checkpoint `source`; OmniAvatar's features).
    """

    kind: str = "mel"
    rate: int = 16_000
    fps: float = 16.0
    block: int = 1
    context: int = 1
    lookahead: int = 1
    bands: int = 16
    hops: int = 2
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in FEATURES:
            raise ValueError(f"audio.kind {self.kind!r} is unknown; choose one of {', '.join(FEATURES)}")
        if self.rate <= 0 or self.fps <= 0 or self.rate % self.fps:
            raise ValueError(f"audio.rate {self.rate} must be whole samples for each of {self.fps:g} frames a second")
        if min(self.block, self.bands, self.hops) < 1 or min(self.context, self.lookahead) < 0:
            raise ValueError(f"audio needs block, bands, hops >= 1 and context, lookahead >= 0, got {self}")
        if (self.kind == "wav2vec2") != bool(self.source):
            raise ValueError("audio.source names the checkpoint of kind wav2vec2, and of no other kind")
        if self.samples % self.hops:
            raise ValueError(f"audio.hops {self.hops} must divide the {self.samples} samples of a frame")

    @property
    def samples(self) -> int:
        """Samples of a px frame."""
        return round(self.rate / self.fps)

    @property
    def wait(self) -> int:
        """Px frames of sound after a frame that must be there before it can be drawn, at most."""
        return self.block - 1 + self.lookahead

    @property
    def lookahead_ms(self) -> float:
        return 1000 * self.wait / self.fps


@lru_cache(maxsize=8)
def mel_filters(bands: int, rate: int, size: int) -> np.ndarray:
    """Triangles [bands, size // 2 + 1] evenly spaced on the mel scale from 60 Hz to 7.6 kHz, each of sum 1."""

    def mel(hz: float) -> float:
        return 2595 * math.log10(1 + hz / 700)

    edges = 700 * (10 ** (np.linspace(mel(60), mel(min(7600, rate / 2)), bands + 2) / 2595) - 1)
    at = np.fft.rfftfreq(size, 1 / rate)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.clip(np.minimum((at - low) / (mid - low), (high - at) / (high - mid)), 0, None)
    sums = triangles.sum(1, keepdims=True)
    nearest = np.abs(at - mid) == np.abs(at - mid).min(1, keepdims=True)
    return np.where(sums > 0, triangles / np.maximum(sums, 1e-12), nearest)


def log_mel(pcm: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    """Features [block, (1 + lookahead) * hops * bands] of sound [(context + block + lookahead) * samples].

    A frame has the energies of its own hops and of those it may look ahead to; each is taken over a window of two hops
    that ends with it. Silence is -1, loud speech near 1.
    """
    hop = cfg.samples // cfg.hops
    padded = np.pad(pcm.astype(np.float64), (hop, 0))
    ends = hop + cfg.context * cfg.samples + hop * np.arange(1, (cfg.block + cfg.lookahead) * cfg.hops + 1)
    window = np.hanning(2 * hop)
    power = np.abs(np.fft.rfft(np.stack([padded[end - 2 * hop : end] for end in ends]) * window)) ** 2
    filters = mel_filters(cfg.bands, cfg.rate, 2 * hop)
    energy = np.stack([(row * filters).sum(-1) for row in power / (window**2).sum()])
    rows = ((np.log(energy + FLOOR) - math.log(FLOOR)) / LOUD - 1).astype(np.float32)
    span = (1 + cfg.lookahead) * cfg.hops
    return np.stack([rows[i * cfg.hops : i * cfg.hops + span].ravel() for i in range(cfg.block)])


HEARING = threading.Lock()  # an encoder is shared by streams, and hooked while it listens to one


@lru_cache(maxsize=2)
def wav2vec2(source: str) -> Any:
    """A published wav2vec 2.0 encoder: a folder, or a hub id, which is downloaded where `io.may_download` says so."""
    try:
        from transformers import Wav2Vec2Model
    except ImportError as error:
        raise ImportError("wav2vec2 features need transformers: pip install 'vidistill[audio]'") from error
    offline = not may_download()
    try:
        net = Wav2Vec2Model.from_pretrained(source.removeprefix("hf://"), local_files_only=offline)
    except OSError as error:
        raise not_found(source, "the audio encoder", error, offline) from error
    return net.eval().requires_grad_(False)


@torch.no_grad()
def hidden_states(pcm: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    """Features [block, (layers + 2) * width]: the last and all hidden states, convolutions resampled to px frames.

    Source: OmniAvatar 2506.18866, as LiveTalk 2512.23576 uses it; here of a bounded piece of sound.
    """
    net = wav2vec2(cfg.source)
    x = torch.from_numpy(pcm.astype(np.float32))
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-7).sqrt()
    maps = net.feature_extractor(x[None])
    frames = cfg.context + cfg.block + cfg.lookahead
    maps = torch.nn.functional.interpolate(maps, size=frames, mode="linear", align_corners=True)
    states, _ = net.feature_projection(maps.transpose(1, 2))
    with HEARING:
        last, heard = encoded(net.encoder, states)
    return torch.cat((last, *heard), dim=-1)[0, cfg.context : cfg.context + cfg.block].numpy()


def encoded(encoder: Any, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The last hidden state [1, T, D], and what goes into each layer, then what comes out of the last one."""
    heard: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: heard.append(args[0])) for layer in encoder.layers]
    hooks.append(encoder.layers[-1].register_forward_hook(lambda _, args, out: heard.append(_first(out))))
    try:
        return encoder(states)[0], heard
    finally:
        for hook in hooks:
            hook.remove()


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


FEATURES: dict[str, Callable[[np.ndarray, AudioConfig], np.ndarray]] = {"mel": log_mel, "wav2vec2": hidden_states}


def block_features(pcm: np.ndarray, first: int, cfg: AudioConfig) -> np.ndarray:
    """Features [block, D] of px frames first..first+block-1 of sound `pcm` [S] from frame 0 on, silence around it."""
    start = (first - cfg.context) * cfg.samples
    stop = (first + cfg.block + cfg.lookahead) * cfg.samples
    heard = pcm[max(0, start) : max(0, stop)]
    before = max(0, -start)
    return FEATURES[cfg.kind](np.pad(heard, (before, stop - start - before - len(heard))), cfg)


def clip_features(pcm: np.ndarray, frames: int, cfg: AudioConfig) -> np.ndarray:
    """Features [frames, D] of a whole clip of sound [S] that begins with px frame 0."""
    parts = [block_features(pcm, first, cfg) for first in range(0, frames, cfg.block)]
    return np.concatenate(parts)[:frames]


class Track:
    """The sound of a stream: what was pushed plays as soon as it can, silence where there is none.

    What `take` has returned features for never changes. Times of arrival travel with the sound.
    """

    def __init__(self, cfg: AudioConfig) -> None:
        self.cfg = cfg
        self._queue: deque[tuple[np.ndarray, float]] = deque()  # (samples, when they came) not placed yet
        self._waiting = 0  # samples in it
        self._lock = threading.Lock()  # sound comes from one thread and is taken by another
        self.reset()

    def reset(self) -> None:
        """Begin at px frame 0 again; what waits is kept."""
        self._held, self._start = np.zeros(0, np.float32), 0  # placed sound, and the sample it begins with
        self._features: dict[int, np.ndarray] = {}  # px frame -> its features
        self._came: deque[tuple[int, int, float]] = deque()  # (first sample, last sample + 1, when it came)

    @property
    def waiting(self) -> int:
        """Samples that were pushed and have no place yet."""
        return self._waiting

    def push(self, pcm: np.ndarray, when: float) -> None:
        """Add sound, float32 [S] in [-1, 1]; it follows what was pushed before.

        Pieces shorter than a px frame are joined, so that the number of pieces is bounded by that of samples.
        """
        if not len(pcm):
            return
        with self._lock:
            self._waiting += len(pcm)
            if self._queue and len(self._queue[-1][0]) < self.cfg.samples:
                last, when = self._queue.pop()
                pcm = np.concatenate((last, pcm))
            self._queue.append((pcm.astype(np.float32), when))

    def clear_audio(self) -> None:
        """Drop what has no place yet: whoever speaks is interrupted."""
        with self._lock:
            self._queue.clear()
            self._waiting = 0

    def _place(self, stop: int) -> None:
        """Place sound up to sample `stop`."""
        parts, end = [self._held], self._start + len(self._held)
        while end < stop:
            with self._lock:
                if not self._queue:
                    parts.append(np.zeros(stop - end, np.float32))
                    break
                pcm, when = self._queue.popleft()
                used = pcm[: stop - end]
                self._waiting -= len(used)
                if len(pcm) > len(used):
                    self._queue.appendleft((pcm[len(used) :], when))
            self._came.append((end, end + len(used), when))
            parts.append(used)
            end += len(used)
        self._held = np.concatenate(parts)

    def take(self, first: int, stop: int) -> np.ndarray:
        """Features [stop - first, D] of px frames first..stop-1; may be asked again while they are recent."""
        cfg = self.cfg
        for block in range(first // cfg.block, -(-stop // cfg.block)):
            at = block * cfg.block
            if at not in self._features:
                self._place((at + cfg.block + cfg.lookahead) * cfg.samples)
                before = self._start // cfg.samples  # px frames whose sound is forgotten
                assert not before or before <= at - cfg.context, "px frames are asked for in order"
                rows = block_features(self._held, at - before, cfg)
                self._features.update({at + i: rows[i] for i in range(cfg.block)})
        found = np.stack([self._features[f] for f in range(first, stop)])
        self._forget(first - KEPT)
        return found

    def _forget(self, frame: int) -> None:
        """Let go of what lies far before px frame `frame`."""
        cut = (frame - self.cfg.context - self.cfg.block) * self.cfg.samples
        if cut - self._start > 16 * self.cfg.samples:
            self._held, self._start = self._held[cut - self._start :], cut
            self._features = {f: x for f, x in self._features.items() if f >= frame}
            while self._came and self._came[0][1] <= cut:
                self._came.popleft()

    def sound(self, frame: int) -> np.ndarray:
        """The samples [samples] that sound while px frame `frame` is shown; silence where none was placed."""
        at = frame * self.cfg.samples - self._start
        here = self._held[max(0, at) : max(0, at + self.cfg.samples)]
        return np.pad(here, (0, self.cfg.samples - len(here)))

    def came_at(self, frame: int) -> float | None:
        """When the first pushed sound of px frame `frame` came; None for silence."""
        low, high = frame * self.cfg.samples, (frame + 1) * self.cfg.samples
        return next((when for start, stop, when in self._came if start < high and stop > low), None)


def from_pcm16(pcm: np.ndarray) -> np.ndarray:
    """Float32 sound of int16 samples."""
    return pcm.astype(np.float32) / 32768


def to_pcm16(pcm: np.ndarray) -> np.ndarray:
    """Int16 samples of float sound in [-1, 1]."""
    return np.round(np.clip(pcm, -1, 1) * 32767).astype("<i2")
