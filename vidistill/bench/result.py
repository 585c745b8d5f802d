"""What a bench found, for people and for machines."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

Progress = Callable[[float, str], None]  # part done, what is being done

SPREAD = 1.5  # p95 over p50 from which a run is called unsteady


@dataclass(frozen=True)
class BenchResult:
    """Medians over rounds; `ranges` holds the lowest and highest round. None: the run cannot know it."""

    name: str
    fps: float | None  # decoded frames a second, steady, decode included, consumer never blocks
    real_time_factor: float | None  # fps over the world's own
    first_frame_ms: float | None  # from set() on an idle session of a warm network to the first generated image
    chunk_ms_p50: float  # from one finished chunk to the next, on the host
    chunk_ms_p95: float
    input_to_frame_ms_p95: float | None  # from set() to the first image that used it, wait for the boundary included
    nfe_per_chunk: int  # network evaluations, context passes included
    latents_per_s: float
    memory_bytes: int  # KV memory
    peak_bytes: int  # highest resident size of the process (CUDA: allocated on the device) before a rival is loaded
    parts_ms: Mapping[str, float]  # medians a chunk: denoise, context, decode, host
    steady: bool  # chunk_ms_p95 <= 1.5 chunk_ms_p50; else the figures are of a disturbed machine
    matmul_peak_gflops: float  # best median of square float32 products, same threads
    model_flops_utilisation: float  # FLOPs that the passes need over their time, over that peak
    warmup_ms: float  # first chunks of the process, compilation included, not in any other figure
    ranges: Mapping[str, tuple[float, float]]
    env: Mapping[str, Any]
    audio_lookahead_ms: float | None = None  # sound after a frame that must be there before it is drawn
    audio_to_lip_ms_p95: float | None = None  # from sound, as it is spoken, to the picture shown with it
    vs: Mapping[str, Any] | None = None
    growth: Sequence[Mapping[str, Any]] | None = None
    profile: Mapping[str, float] | None = None  # share of the passes of a chunk that each kind of operator takes
    batch: Mapping[str, Any] | None = None  # several streams in one pass, beside one alone

    def to_json(self) -> str:
        """One line; floats rounded to four digits after the point."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for optional in ("audio_lookahead_ms", "audio_to_lip_ms_p95", "vs", "growth", "batch", "profile"):
            if values[optional] is None:
                del values[optional]
        return json.dumps(rounded(values))

    def table(self) -> Table:
        """The figures for people."""
        table = Table(title=f"{self.name}, {self.env['cpu']}, {self.env['threads']} threads", show_header=False)
        for label, text in self.rows():
            table.add_row(label, text)
        return table

    def rows(self) -> list[tuple[str, str]]:
        """What each row of the table is called, and says; rows of what was not measured are left out."""

        def spread(key: str, unit: str, digits: int) -> str:
            value = getattr(self, key)
            low, high = self.ranges.get(key, (0.0, 0.0))
            return "" if value is None else f"{value:.{digits}f} {unit}  ({low:.{digits}f} to {high:.{digits}f})"

        def p95(key: str, more: str = "") -> str:
            value = getattr(self, key)
            return "" if value is None else f"p95 {value:.0f} ms{more}"

        vs, mib = self.vs or {}, 2**20
        unsteady = "" if self.steady else f"  UNSTEADY: p95 is over {SPREAD} x p50"
        rows = [
            ("throughput", self.fps and f"{spread('fps', 'frames/s', 1)}, {self.real_time_factor:.2f} x real time"),
            ("latents", f"{self.latents_per_s:.1f} /s"),
            ("first frame", spread("first_frame_ms", "ms", 0)),
            ("chunk", f"p50 {self.chunk_ms_p50:.1f} ms, p95 {self.chunk_ms_p95:.1f} ms{unsteady}"),
            ("input to frame", p95("input_to_frame_ms_p95")),
            ("audio to lip", p95("audio_to_lip_ms_p95", f", {self.audio_lookahead_ms} ms of look-ahead among them")),
            ("warm-up", f"{self.warmup_ms:.0f} ms for the first chunks, in no other figure"),
            ("evaluations", f"{self.nfe_per_chunk} a chunk"),
            ("parts of a chunk", ", ".join(f"{k} {v:.1f} ms" for k, v in self.parts_ms.items())),
            ("memory", f"{self.memory_bytes / mib:.1f} MiB KV, {self.peak_bytes / mib:.0f} MiB peak"),
            (
                "passes run at",
                f"{self.model_flops_utilisation:.0%} of {self.matmul_peak_gflops:.0f} GFLOP/s (matrix products)",
            ),
            ("operators", ", ".join(f"{kind} {part:.0%}" for kind, part in (self.profile or {}).items() if part)),
            (
                "latents",
                "latents_difference" in vs and f"{vs['latents_difference']:.1e} (relative) from those of {vs['name']}",
            ),
            (f"against {vs.get('name')}", against(vs)),
        ]
        if b := self.batch:
            each = f"{b['chunk_ms']:.1f} ms a chunk of all, {b['one_chunk_ms']:.1f} ms of one alone"
            rows.append((f"{b['streams']} streams in one pass", f"{each}: {b['gain']:.2f} x chunks/s"))
        rows += [
            (
                f"after {row['minutes']:.1f} min" + ("" if row["ran"] else " (clock advanced)"),
                f"passes p50 {row['chunk_ms_p50']:.1f} ms ({row['beside_young']:.2f} x a young stream's), p95 "
                f"{row['chunk_ms_p95']:.1f} ms, {row['memory_bytes'] / mib:.1f} MiB KV, {row['rss_bytes'] / mib:.0f} "
                "MiB resident",
            )
            for row in self.growth or ()
        ]
        return [(label, text) for label, text in rows if text]


def against(vs: Mapping[str, Any]) -> str:
    """How much faster the student is than what it was timed beside."""
    if not vs:
        return ""
    if "chunk_ratio" in vs:
        low, high = vs["chunk_ratio_range"]
        return f"{vs['chunk_ratio']:.2f} x chunks/s ({low:.2f} to {high:.2f})"
    first, nfe = f"{vs['first_frame_ratio']:.1f} x sooner", f"{vs['nfe_ratio']:.1f} x fewer evaluations"
    return f"{vs['fps_ratio']:.2f} x frames/s, first frame {first}, {nfe}"


def rounded(value: Any) -> Any:
    """`value` as JSON holds it, floats cut to four digits after the point."""
    if isinstance(value, Mapping):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return [rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value
