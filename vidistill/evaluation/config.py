"""What every protocol of an evaluation says."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from vidistill.ops.precision import PRECISIONS

MAY_BE_ZERO = ("long_seconds", "seed", "first_seed", "draws", "threads", "allow_pickle", "unfiltered")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Settings that every suite has, whatever it looks at."""

    seed: int = 0
    seeds: int = 3  # of rollout noise that a student is judged with
    teacher_seeds: int = 1
    draws: int = 200  # of rooms, for an interval
    first_seed: int = 0  # the first room of the split
    cache: str = "data/teacher-samples"  # of a teacher's samples, and of what is half judged
    out: str = "out/eval"
    probe: str | None = None  # None: the bundled one
    precision: str = "auto"
    metrics: Mapping[str, str] = field(default_factory=dict)  # published ones: name -> path of local weights
    allow_pickle: bool = False  # of those weights


@dataclass(frozen=True)
class SuiteConfig(JudgeConfig):
    """What every protocol says; smaller runs (`clips`, `streams`, `long_seconds`) are for a first look.

    Samples of the teacher are kept in `cache` under a hash of everything they depend on (empty: sample anew).
    """

    clips: int = 256
    batch: int = 32
    streams: int = 16
    long_seconds: float = 60.0  # 0: no long stream
    steps: int = 50
    guidance: float | None = None  # None: what the teacher's record says, else 1

    def __post_init__(self) -> None:
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self) if f.name not in MAY_BE_ZERO):
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"eval.{name} must be positive, got {value}")
        if self.clips < 2:
            raise ValueError(f"eval.clips must be at least 2 for a distance of two sets, got {self.clips}")
        if self.long_seconds and self.long_seconds < 2 * self.span:
            raise ValueError(f"eval.long_seconds is {self.long_seconds}; needed is 0 or at least 2 x {self.span}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"eval.precision {self.precision!r} is unknown; choose one of {PRECISIONS}")

    @property
    def span(self) -> float:
        """Seconds at both ends of a long stream that are compared."""
        raise NotImplementedError
