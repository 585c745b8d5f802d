"""What a bench is told to measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchConfig:
    """Rounds alternate between the student and what it is held against. In each, `chunks` chunks are timed once memory
    is full and `warmup_chunks` have passed, then `inputs` inputs are set at random moments.

    `gate_chunks` are compared with the rollout first (0: until memory has begun to forget). A teacher makes clips of
    `clip_frames` latents in `clip_steps` steps; `guidance` (None: its checkpoint's) doubles its evaluations unless it
    is 1. A student that takes audio is spoken to for `speech_s` seconds in real time. `growth_minutes`: also time
    `growth_chunks` chunks up to each of these minutes of one stream that walks, if it takes actions. It really runs for
    the first `growth_run` minutes; past that its clock is advanced, its memory as full as it is, and rows say so.
    `batch`: also time so many streams in one pass, beside one alone.
    """

    rounds: int = 5
    chunks: int = 12
    inputs: int = 6
    warmup_chunks: int = 3
    gate_chunks: int = 0
    seed: int = 0
    threads: int = 0  # 0: as torch is set
    pipelined: bool = True
    clip_frames: int = 21
    clip_steps: int = 50
    guidance: float | None = None
    speech_s: float = 6.0
    growth_minutes: tuple[float, ...] = ()
    growth_chunks: int = 50
    growth_run: float = 1.0
    batch: int = 1

    def __post_init__(self) -> None:
        least = dict.fromkeys(("rounds", "chunks", "clip_frames", "clip_steps", "growth_chunks", "batch"), 1)
        least |= dict.fromkeys(("inputs", "warmup_chunks", "gate_chunks", "threads", "growth_run"), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"bench.{name} must be at least {low}, got {getattr(self, name)}")
        if any(minutes <= 0 for minutes in self.growth_minutes):
            raise ValueError(f"bench.growth_minutes must be positive, got {list(self.growth_minutes)}")
