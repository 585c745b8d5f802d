"""A training watched on held-out clips: where its quality peaks, where distillation helps and where it hurts."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vidistill.data.clips import Clips
from vidistill.data.types import Batch, split_name
from vidistill.models.student import CausalStudent
from vidistill.rollout import roll_out
from vidistill.schedules import ScheduleConfig
from vidistill.training.losses import LossConfig, Roles, score_difference

log = logging.getLogger("vidistill")
MAX_SEED = 2**53  # JSON keeps whole numbers below it exactly


@dataclass(frozen=True)
class ValidationConfig:
    """`clips` held-out clips of the latents in `data`, looked at every so many steps; 0: never.

    `every`: score the student's averaged weights (`score`, one of SCORES or MODULE:FUNCTION; higher is better).
    The best checkpoint is what a run ends with, and after `patience` judgements without a better one it ends early (0:
    never).
    `diagnose_every`: log the gradient of distillation by chunk and noise level (`levels`), see `diagnose`.
    """

    data: str = ""
    clips: int = 16
    every: int = 0
    score: str = "error"
    patience: int = 0
    diagnose_every: int = 0
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.every, self.patience, self.diagnose_every, self.seed) < 0 or self.clips < 1:
            raise ValueError(f"validation needs clips >= 1, and every, patience, diagnose_every, seed >= 0; got {self}")
        if self.seed >= MAX_SEED:
            raise ValueError(f"validation.seed must be below 2**53, got {self.seed}")
        if (self.every or self.diagnose_every) and not self.data:
            raise ValueError("validation.data names the held-out latents that a training is watched on; set it")
        score_of(self.score)
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise ValueError(f"validation.levels lie between 0 and 1, got {list(self.levels)}")


@dataclass
class EarlyStopping:
    """The best judgement so far, and how many there were since."""

    score: float = -math.inf
    step: int = 0
    since: int = 0

    def update(self, score: float, step: int) -> bool:
        """Whether a judgement is the best one."""
        if score > self.score:
            self.score, self.step, self.since = score, step, 0
            return True
        self.since += 1
        return False

    def done(self, patience: int) -> bool:
        return 0 < patience <= self.since


@dataclass(frozen=True)
class HeldOut:
    """Clips a training is watched on: latents with what is told of them, the mouth [B, T, 2] if there is one, and where
    they come from."""

    batch: Batch
    mouth: Tensor | None
    seed: int
    origin: Mapping[str, Any] = field(default_factory=dict)


def held_out(clips: Clips, cfg: ValidationConfig, frames: int, device: torch.device) -> HeldOut:
    """`cfg.clips` windows of `frames` latents on `device`, the same ones every time; ValueError for those of a test."""
    clips.need("latents")
    split = split_name(clips.meta.get("split", ""))
    if split == "test":
        raise ValueError(
            "validation.data holds clips of the split test, on which nothing is chosen; give validation ones"
        )
    picked = clips.windows(cfg.clips, frames, cfg.seed, 0, "latents")
    mouth = None
    if clips.width_of("mouth"):
        factor = (clips.parts[0]["mouth"].shape[1] - 1) // (clips.parts[0]["latents"].shape[1] - 1)
        mouth = torch.stack(
            [clips.episode("mouth", e)[factor * s : factor * (s + frames - 1) + 1].float() for e, s in picked]
        )
    seeds = sorted({clips.meta["described"][e].get("seed") for e, _ in picked} - {None})
    origin = {"data": cfg.data, "split": split or None, "seeds": [seeds[0], seeds[-1]] if seeds else None}
    return HeldOut(clips.gather(picked, frames).to(device), mouth, cfg.seed, origin)


@torch.no_grad()
def roll(student: CausalStudent, schedule: ScheduleConfig, held: HeldOut) -> Tensor:
    """The student's own rollouts [B, F, C, H, W] for held-out conditions and first pictures, as it streams."""
    batch = held.batch
    given = batch.x[:, : batch.given] if batch.given else None
    return roll_out(student, schedule, batch.cond, (batch.x.shape[0], batch.x.shape[1]), seed=held.seed, given=given)


def error_score(x: Tensor, held: HeldOut, codec: Any) -> float:
    """The squared error of latents against the recorded ones, negated."""
    given = held.batch.given
    return -float((x - held.batch.x)[:, given:].square().mean())


Score = Callable[[Tensor, HeldOut, Any], float]  # latents of a student, held-out clips, their codec -> higher is better
SCORES: Mapping[str, Score] = {"error": error_score}


def score_of(name: str) -> Score:
    """The score that `validation.score` names: one of SCORES, or the function MODULE:FUNCTION of a world."""
    if name in SCORES:
        return SCORES[name]
    module, _, function = name.partition(":")
    try:
        found: Score = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"validation.score {name!r} is neither one of {', '.join(SCORES)} nor a function MODULE:FUNCTION ({error})"
        ) from error
    return found


def judge(student: CausalStudent, schedule: ScheduleConfig, held: HeldOut, codec: Any, score: str) -> float:
    """The score of a student on held-out clips."""
    return score_of(score)(roll(student, schedule, held), held, codec)


@torch.no_grad()
def diagnose(
    roles: Roles, schedule: ScheduleConfig, held: HeldOut, loss: LossConfig, levels: Sequence[float]
) -> dict[str, Any]:
    """Where distillation helps: figures by noise level (rows) and chunk (columns) of the student's own rollouts.

    `norm`: root mean square of the gradient that distribution matching sends to a chunk, before it is normalised.
    `gap`: of critic and teacher, relative to how far the sample is from the teacher's prediction. `cosine`: of that
    gradient with the gradient of regression to the recorded clip; below 0 distillation moves the sample away from it.
    After "Unmasking On-Policy Distillation".
    """
    student, batch = roles.student, held.batch
    x, given = roll(student, schedule, held), batch.given
    chunk = student.chunk_of_frames(x.shape[1])
    chunks = sorted({int(c) for c in chunk[given:]})
    tables: dict[str, list[list[float]]] = {"norm": [], "gap": [], "cosine": []}
    for k, level in enumerate(levels):
        timestep = torch.full(x.shape[:2], level, device=x.device)
        timestep[:, :given] = 0.0
        rng = torch.Generator().manual_seed(held.seed + k)
        score = score_difference(roles, x, replace(batch, x=x), loss, rng, timestep)
        pulled, wanted = score["fake"] - score["real"], x - batch.x
        rows: dict[str, list[float]] = {name: [] for name in tables}
        for c in chunks:
            own = [f for f in range(given, x.shape[1]) if int(chunk[f]) == c]
            a, b, away = (v[:, own].double().flatten(1) for v in (pulled, wanted, x - score["real"]))
            rows["norm"].append(float(a.square().mean().sqrt()))
            rows["gap"].append(float(a.norm(dim=1).mean() / away.norm(dim=1).mean().clamp_min(1e-9)))
            rows["cosine"].append(float(torch.nn.functional.cosine_similarity(a, b).mean()))
        for name, row in rows.items():
            tables[name].append(row)
    return {"levels": list(levels), "chunks": chunks, **tables}


def plateau(losses: Sequence[float]) -> float:
    """Relative fall of a loss from the third to the last quarter of a run: near 0 once it has converged."""
    quarter = len(losses) // 4
    if not quarter:
        return math.inf
    before, after = (sum(part) / quarter for part in (losses[-2 * quarter : -quarter], losses[-quarter:]))
    return (before - after) / abs(before) if before else 0.0


def settled_part(losses: Sequence[float], card: Mapping[str, Any]) -> list[float]:
    """The losses of the steps at the full rate with clips of their last length: a loss also stands still because the
    rate falls, and jumps where clips get longer. A run may have ended before the steps that were planned."""
    train, count = card.get("train") or {}, len(losses)
    planned = train.get("steps") or card.get("steps") or count
    done, first = card.get("steps") or planned, (train.get("curriculum") or [[0, 0]])[-1][0]
    last = planned - round(train.get("optim", {}).get("decay", 0.0) * planned)
    return [loss for k, loss in enumerate(losses) if k * done >= first * count and (k + 1) * done <= last * count]


def check_plateau(name: str, card: Mapping[str, Any], limit: float) -> None:
    """Raise ValueError unless the loss of a checkpoint had stopped falling when its training ended; logs its fall."""
    losses = card.get("losses")
    if not losses:
        raise ValueError(f"init_plateau asks how {name} converged, which its card does not say; set init_plateau=0")
    settled = settled_part(losses, card)
    if len(settled) < 4:
        raise ValueError(
            f"{name} does not show that it had converged: {len(settled)} of its {len(losses)} logged losses were taken "
            "at the full rate with clips of their last length, and a loss also stands still because the rate falls; "
            "train it with a smaller optim.decay, an earlier last length in its curriculum or a smaller log_every, or "
            "set init_plateau=0"
        )
    fall = plateau(settled)
    if fall > limit:
        raise ValueError(
            f"{name} was still learning: its loss fell by {fall:.1%} from the third to the last quarter of its steps "
            f"at the full rate, more than init_plateau {limit:.1%}; train it longer, or raise init_plateau"
        )
    log.info("%s had converged: its loss fell by %.2g over its last quarter (at most %.2g)", name, fall, limit)
