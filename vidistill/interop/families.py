"""The published student families: their steps, chunks, memory and licence. What their checkpoints do not say."""

from collections.abc import Sequence
from dataclasses import dataclass

from vidistill.interop.tables import GRID, TableSchedule, diagonal_steps
from vidistill.memory.policies import MemoryConfig
from vidistill.schedules import ScheduleConfig

TRAINED_FRAMES = 21  # latent frames of an 81-frame clip, what most of them were trained on
NON_COMMERCIAL = "CC BY-NC-SA 4.0 (non-commercial, share alike)"
WAN = "Wan-AI/Wan2.1-T2V-1.3B: Apache-2.0"
SELF_FORCING = "guandeh17/Self-Forcing: Apache-2.0"
LAYOUT = "layout only"  # of a card: names and shapes are known to fit, numbers were compared with no recording
RECORDED = "recorded outputs of the original"
EMA_FIRST = ("generator_ema", "generator", "model", "state_dict")
LIVE_FIRST = ("generator", "generator_ema", "model", "state_dict")  # where the published command reads those


@dataclass(frozen=True)
class Family:
    """How a published student is run.

    `ancestry`: what its weights were made from, nearest first, each with its licence. `entry`: names of the weights in
    its files, the first that exists is read.
    """

    name: str
    source: str
    licence: str
    shift: float = 5.0
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warped: bool = True
    chunk: int = 3
    first_chunk: int = 0
    window: int = -1  # latent frames a chunk looks at, sinks included; -1: all
    sinks: int = 0
    phase: str = "absolute"
    diagonal: bool = False
    rolling: bool = False
    entry: tuple[str, ...] = EMA_FIRST
    ancestry: tuple[str, ...] = (WAN,)
    pinned_first_frame: bool = False  # the reference image replaces latent frame 0 in every pass
    channels: int = 16  # latent channels; 0: any
    frames: int = TRAINED_FRAMES  # latent frames of its clips
    lora_alpha_is_rank: bool = False  # its adapters are published without their alpha
    checked: str = LAYOUT
    notes: str = ""

    @property
    def table(self) -> TableSchedule:
        return TableSchedule(shift=self.shift)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The step list told to the network, in 0..1000."""
        return self.table.warp_steps(self.steps) if self.warped else tuple(map(float, self.steps))

    def schedule(self, given_chunks: int = 0) -> ScheduleConfig:
        """Noise levels on the family's table, told levels as published where they differ."""
        lists = diagonal_steps(self.timesteps) if self.diagonal else (self.timesteps,)
        noise = tuple(tuple(float(self.table.sigma(t)) for t in steps) for steps in lists)
        timesteps = tuple(tuple(t / GRID for t in steps) for steps in lists)
        return ScheduleConfig(
            name="rolling" if self.rolling else "chunkwise",
            levels=noise[-1],
            steps=noise,
            timesteps=() if close(timesteps, noise) else timesteps,
            context="last_step" if self.diagonal else "clean",
            given_chunks=given_chunks,
        )

    def memory(self, frames: int = 0) -> MemoryConfig:
        """Memory of the family; `frames` is the length of a clip where it looks at everything (0: the family's)."""
        if self.window < 0:
            return MemoryConfig(policy="full", frames=frames or self.frames, phase=self.phase)
        return MemoryConfig(policy="window", frames=self.window, sinks=self.sinks, phase=self.phase)


def close(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
    """Whether told and noise levels are the same up to the rounding of float32."""
    return all(abs(x - y) < 1e-6 for u, v in zip(a, b, strict=True) for x, y in zip(u, v, strict=True))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("self-forcing", "guandeh17/Self-Forcing", "Apache-2.0", checked=RECORDED),
        Family("causvid", "tianweiy/CausVid", NON_COMMERCIAL, shift=8.0, steps=(1000, 757, 522), warped=False),
        Family(
            "longlive",
            "NVlabs/LongLive (1.0)",
            "Apache-2.0 code; see the model card for the weights",
            window=12,
            sinks=3,
            ancestry=(SELF_FORCING, WAN),
            lora_alpha_is_rank=True,
            checked=RECORDED,
            notes="publishes a base (`generator`) and a LoRA (`generator_lora`), which is merged into it",
        ),
        Family(
            "longlive-infinity",
            "NVlabs/LongLive (1.0, relative positions)",
            "Apache-2.0 code; see the model card for the weights",
            window=12,
            sinks=3,
            phase="relative",
            ancestry=(SELF_FORCING, WAN),
            lora_alpha_is_rank=True,
            checked=RECORDED,
        ),
        Family(
            "longlive2",
            "NVlabs/LongLive (2.0, 5B)",
            "see the model card",
            chunk=8,
            frames=32,
            window=32,
            sinks=8,
            channels=48,
            ancestry=("Wan-AI/Wan2.2-TI2V-5B: Apache-2.0",),
            lora_alpha_is_rank=True,
            notes="704x1280 at 24 fps; its sinks of several shots are not kept apart, FP4 weights are not read",
        ),
        Family(
            "krea",
            "krea/krea-realtime-video (14B)",
            "see the model card",
            window=6,
            ancestry=("Wan-AI/Wan2.1-T2V-14B: Apache-2.0",),
            notes="its published sampler encodes its window again for each chunk; here frames stay as written",
        ),
        Family(
            "rcm",
            "NVlabs/rcm and thu-ml/TurboDiffusion (TurboWan2.1)",
            "see the model card",
            steps=(1000, 934, 853, 609),
            warped=False,
            chunk=TRAINED_FRAMES,
            notes="not causal: one chunk is the whole clip; its first step is told 0.988 there, 1 here",
        ),
        Family(
            "diagonal",
            "Sphere-AI-Lab/diagdistill",
            "Apache-2.0; its training starts from LongLive's weights",
            steps=(1000, 100),
            window=12,
            sinks=3,
            diagonal=True,
            checked=RECORDED,
            ancestry=("NVlabs/LongLive (1.0): see the model card", SELF_FORCING, WAN),
        ),
        Family(
            "livetalk",
            "GAIR-NLP/LiveTalk",
            NON_COMMERCIAL,
            window=15,
            sinks=9,
            pinned_first_frame=True,
            checked=RECORDED,
            ancestry=("OmniAvatar-1.3B: see the model card", WAN),
            notes="33 input channels (latents, reference image, mask); audio enters before blocks 2 .. layers / 2",
        ),
        Family("causal-forcing", "thu-ml/Causal-Forcing", "Apache-2.0", entry=LIVE_FIRST),
        Family(
            "causal-forcing-frame",
            "thu-ml/Causal-Forcing (frame-wise)",
            "Apache-2.0",
            chunk=1,
            notes="starts from an image natively: latent frame 0 is an image latent",
        ),
        Family(
            "rolling-forcing",
            "TencentARC/RollingForcing",
            "see the model card",
            steps=(1000, 800, 600, 400, 200),
            window=24,
            sinks=3,
            phase="relative",
            rolling=True,
            notes="joint denoising of a window of 5 chunks; its cache length is a setting here, not measured parity",
        ),
    )
}


# Families whose weights would load and then run on another memory than theirs.
REFUSED = {
    "reward-forcing": "its sinks are an average of what has left the window (EMA sink), which is no memory policy here",
    "memflow": "it retrieves what it remembers by the prompt, which is no memory policy here",
    "longlive-rag": "it retrieves what it remembers, which is no memory policy here",
    "matrix-game": "its action modules are not read",
}


def family(name: str) -> Family:
    """A family by name; raises ValueError with the known names."""
    if name in REFUSED:
        raise ValueError(f"students of family {name!r} are not read: {REFUSED[name]}")
    if name not in FAMILIES:
        raise ValueError(f"no student family is called {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
