"""Talking faces: people drawn at random who speak sentences that espeak-ng says, and listen in between."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vidistill.conditioning.audio import AudioConfig, from_pcm16, to_pcm16
from vidistill.data.types import HELD_OUT_SEED, Talk, in_order, split_seeds
from vidistill.io import save_png
from vidistill.worlds.talker.face import IDENTITY, MOODS, Pose, draw, read_mouth
from vidistill.worlds.talker.speech import RATE, REST, TRACK, VOICES, Speaker, Voice, speaker

HELD_OUT_EVERY = 8  # one identity and one sentence in so many are never trained on
MANNERS = {"lively": 1.5, "quiet": 0.6}  # how much a head moves
CAPTIONS = (
    "a {mood} person talks in a {manner} way",
    "{manner} and {mood}, someone speaks to the camera",
    "a person who looks {mood} speaks, {manner}",
)
WORDS: Mapping[str, tuple[str, ...]] = {
    "who": ("my brother", "our neighbour", "the baker", "a young woman", "the whole team", "nobody", "my old teacher"),
    "does": ("wants", "found", "brought", "remembers", "painted", "borrowed", "would buy", "forgot", "saw"),
    "what": (
        "a yellow boat",
        "five apples",
        "the wrong map",
        "some warm bread",
        "a piano",
        "two small dogs",
        "my book",
    ),
    "where": ("by the river", "in the garden", "at home", "on the bridge", "behind the church", "above the shop"),
    "when": ("this morning", "last winter", "every evening", "before lunch", "on Thursday", "right now", "long ago"),
    "ask": ("could you", "will they", "why did you", "how do we", "shall I", "when did she"),
    "act": ("open the window", "move the table", "follow the path", "read a poem", "save the files", "make tea"),
}
SENTENCES = (
    "{who} {does} {what} {where}.",
    "{when}, {who} {does} {what}.",
    "{ask} {act} {when}?",
    "Yes, {who} {does} {what}, {where}.",
    "{ask} {act} {where}, or {act} {when}?",
)
FAULTS = ("dark", "blurred", "muted", "mismatched")  # what may be wrong with a clip, as in collected video
NOISE = 0.002  # of every recording


@dataclass(frozen=True)
class TalkerConfig:
    """How a clip is made: `size` in pixels; seconds of listening before, between and after sentences (least, most).

    `faults`: share of clips with something wrong: a dark or blurred picture, no sound, the sound of another sentence.
    """

    size: int = 64
    fps: float = 16.0
    num_frames: int = 161
    pause: tuple[float, float] = (0.2, 1.6)
    speed: tuple[int, int] = (140, 180)
    faults: float = 0.0
    audio: AudioConfig = field(default_factory=AudioConfig)

    def __post_init__(self) -> None:
        if self.size < 16 or self.num_frames < 2 or not 0 <= self.faults <= 1:
            raise ValueError(
                f"a talker needs size >= 16, num_frames >= 2, faults in [0, 1]; got {self.size}, {self.num_frames}, "
                f"{self.faults}"
            )
        if self.audio.rate != RATE or self.audio.fps != self.fps:
            raise ValueError(f"talker.audio must have rate {RATE} and fps {self.fps:g}")
        if not 0 < self.speed[0] < self.speed[1]:
            raise ValueError(f"talker.speed must rise from above 0, got {self.speed}")
        if not 0 <= self.pause[0] <= self.pause[1] or self.pause[1] <= 0:
            raise ValueError(f"talker.pause must rise from 0 or more, got {self.pause}")

    @property
    def seconds(self) -> float:
        return (self.num_frames + max(2, self.audio.wait)) / self.fps


def seeds(split: str, num: int) -> range:
    """The first seeds of a split; neither people nor sentences of training ever meet those of the others."""
    return split_seeds(split, num)


def is_held_out(look: Mapping[str, str]) -> bool:
    """Whether a person belongs to the held-out split."""
    return sum(words.index(look[name]) for name, words in IDENTITY.items()) % HELD_OUT_EVERY == 0


def is_held_out_sentence(text: str) -> bool:
    return zlib.crc32(text.encode()) % HELD_OUT_EVERY == 0


def describe(seed: int) -> tuple[dict[str, str], str]:
    """What there is to say of a seed, and its caption, which leaves the identity to a picture."""
    rng = np.random.default_rng([seed, 0])
    while True:
        look = {name: words[rng.integers(len(words))] for name, words in IDENTITY.items()}
        if is_held_out(look) == (seed >= HELD_OUT_SEED):
            break
    mood, manner = list(MOODS)[rng.integers(len(MOODS))], list(MANNERS)[rng.integers(len(MANNERS))]
    words = CAPTIONS[rng.integers(len(CAPTIONS))].format(mood=mood, manner=manner)
    return {**look, "mood": mood, "manner": manner}, words


def sentence(rng: np.random.Generator, held_out: bool) -> str:
    """A sentence of a split."""
    while True:
        form = SENTENCES[rng.integers(len(SENTENCES))]
        text = form.format(**{name: words[rng.integers(len(words))] for name, words in WORDS.items()})
        if is_held_out_sentence(text) == held_out:
            return text[0].upper() + text[1:]


def voice_of(rng: np.random.Generator, cfg: TalkerConfig) -> Voice:
    return Voice(VOICES[rng.integers(len(VOICES))], int(rng.integers(*cfg.speed)), int(rng.integers(30, 71)))


def talk(cfg: TalkerConfig, seed: int, someone: Speaker, part: int = 1) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sound [S], mouth [T', 2] at TRACK, and the sentences said, with passages of listening between them."""
    rng, voice_rng = np.random.default_rng([seed, part]), np.random.default_rng([seed, 4])
    voice = voice_of(voice_rng, cfg)
    gain = rng.uniform(0.5, 1.0)
    pieces, mouths, said, seconds = [], [], [], 0.0
    while seconds < cfg.seconds:
        idle = round(rng.uniform(*cfg.pause) * TRACK)
        text = sentence(rng, seed >= HELD_OUT_SEED)
        spoken = someone.say(text, voice)
        count = len(spoken.pcm) // (RATE // TRACK)
        pieces += [np.zeros(idle * RATE // TRACK, np.float32), spoken.pcm[: count * RATE // TRACK]]
        mouths += [np.tile(np.array(REST, np.float32), (idle, 1)), spoken.mouth[:count]]
        said.append(text)
        seconds += (idle + count) / TRACK
    pcm = gain * np.concatenate(pieces)
    pcm = pcm + NOISE * rng.uniform(0.2, 1.0) * rng.standard_normal(len(pcm))
    return pcm.astype(np.float32), np.concatenate(mouths), said


def mouth_at_frames(track: np.ndarray, cfg: TalkerConfig) -> np.ndarray:
    """Mouth shapes [T, 2] in the middle of every px frame."""
    at = (np.arange(cfg.num_frames) + 0.5) / cfg.fps * TRACK
    return np.stack([np.interp(at, np.arange(len(track)), track[:, i]) for i in (0, 1)], axis=1).astype(np.float32)


def pose_of(cfg: TalkerConfig, seed: int, manner: str, mouth: np.ndarray) -> Pose:
    """A head that sways and nods a little, and eyes that blink every few seconds."""
    rng = np.random.default_rng([seed, 2])
    t = np.arange(cfg.num_frames) / cfg.fps
    lively = MANNERS[manner]

    def sway(size: float) -> np.ndarray:
        speeds, phases = rng.uniform(0.12, 0.5, 3), rng.uniform(0, 2 * np.pi, 3)
        return size * lively * np.sin(2 * np.pi * speeds * t[:, None] + phases).mean(1)

    nod = np.convolve(np.pad(mouth[:, 0], 4, mode="edge"), np.ones(9) / 9, "valid")
    head = np.stack((sway(2.6), sway(1.6) + 0.8 * lively * nod), axis=1)
    lids, at = np.zeros(cfg.num_frames), rng.uniform(0.5, 3.0)
    while at < t[-1]:
        lids = np.maximum(lids, np.clip(1.6 - np.abs(t - at) * cfg.fps / 1.2, 0, 1))
        at += rng.uniform(1.8, 4.5)
    return Pose(head.astype(np.float32), sway(0.07).astype(np.float32), lids.astype(np.float32), mouth)


def record(cfg: TalkerConfig, seed: int) -> Talk:
    """The clip of a seed; the same seed gives the same bytes."""
    labels, words = describe(seed)
    rng = np.random.default_rng([seed, 5])
    fault = FAULTS[rng.integers(len(FAULTS))] if rng.random() < cfg.faults else ""
    with speaker(seed) as someone:
        pcm, track, said = talk(cfg, seed, someone)
        if fault == "mismatched":
            pcm = talk(cfg, seed, someone, part=6)[0]
    mouth = mouth_at_frames(track, cfg)
    frames = draw(labels, labels["mood"], pose_of(cfg, seed, labels["manner"], mouth), seed, cfg.size)
    pcm = pcm[: (cfg.num_frames + cfg.audio.wait) * cfg.audio.samples]
    if fault == "muted":
        pcm = np.zeros_like(pcm)
    elif fault == "dark":
        frames = (frames * 0.12).astype(np.uint8)
    elif fault == "blurred":
        frames = blurred(frames)
    labels = {**labels, "said": " ".join(said), "fault": fault}
    return Talk(frames, to_pcm16(pcm), mouth, words, labels, seed)


def blurred(frames: np.ndarray, reach: int = 4) -> np.ndarray:
    """Frames averaged over boxes of 2 `reach` + 1 pixels a side."""
    px = frames.astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        wide = np.pad(px, pad, mode="edge")
        px = np.mean([np.take(wide, range(k, k + px.shape[axis]), axis) for k in range(2 * reach + 1)], axis=0)
    return np.round(px).astype(np.uint8)


def record_many(cfg: TalkerConfig, seeds: Iterable[int], workers: int = 1) -> Iterator[Talk]:
    """The clip of every seed, in order; `workers` processes draw them."""
    if workers == 1:
        yield from (record(cfg, seed) for seed in seeds)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from in_order(pool, (partial(record, cfg, seed) for seed in seeds), 4 * workers)


def measures(clip: Talk, cfg: TalkerConfig) -> dict[str, float]:
    """What can be seen and heard of a clip without knowing how it was made: what curation goes by.

    brightness and sharpness (of edges) 0 to 1, speech (share of frames louder than noise), sync (correlation of the
    mouth that is read with how loud it sounds, best within two frames).
    """
    px = clip.frames.astype(np.float32) / 255
    n = len(px)
    grey = px.mean(-1)
    sound = from_pcm16(clip.pcm[: n * cfg.audio.samples]).reshape(n, -1)
    loud = np.sqrt((sound**2).mean(1))
    level = np.log(np.convolve(np.pad(loud, 1, mode="edge"), (0.25, 0.5, 0.25), "valid") + 3e-3)
    opening = read_mouth(px)[:, 0]
    shifts = [correlation(opening[2 : n - 2], level[2 + k : n - 2 + k]) for k in range(-2, 3)]
    return {
        "brightness": float(grey.mean()),
        "sharpness": float(np.quantile(np.abs(np.diff(grey[::4], axis=2)), 0.98)),
        "speech": float((loud > 0.01).mean()),
        "sync": max(shifts),
    }


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one of both does not change."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 1e-9 else 0.0


def write_starts(folder: Path, count: int) -> None:
    """The first pictures of held-out people as PNG files in `folder`: what a stream can begin from."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in record_many(TalkerConfig(num_frames=2), seeds("held_out", count)):
        save_png(
            folder / f"{clip.labels['mood']}-{clip.labels['hair']}-{clip.seed - HELD_OUT_SEED}.png", clip.frames[0]
        )
