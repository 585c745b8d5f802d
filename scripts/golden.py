"""Recordings of the original implementations: what was given, what they made of it, and the comparison with ours."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-4


class Golden:
    """One folder: what was given, what the original made of it, and the comparison with ours."""

    def __init__(self, folder: Path, tolerance: float | None = None, device: str = "cpu") -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.io = load_file(folder / "io.safetensors", device)
        weights = folder / "weights.safetensors"
        self.weights = load_file(weights, device) if weights.exists() else {}
        self.tolerance = tolerance or float(self.config.get("tolerance", self.config.get("atol", TOLERANCE)))
        self.results: dict[str, tuple[str, float, str]] = {}  # output -> outcome, max abs, reason

    def given(self, name: str) -> Tensor:
        return self.io[f"in.{name}"]

    def wanted(self, prefix: str = "") -> list[str]:
        """Names of recorded outputs that start with `prefix`, without the leading `out.`."""
        names = [key.removeprefix("out.") for key in self.io if not key.startswith("in.")]
        return sorted(name for name in names if name.startswith(prefix))

    def want(self, name: str) -> Tensor:
        return self.io.get(f"out.{name}", self.io.get(name))

    def draws(self, prefix: str) -> "Draws":
        """Recorded Gaussians `prefix.0`, `prefix.1`, ..., handed out in order."""
        found, i = [], 0
        while (key := f"in.{prefix}.{i}") in self.io:
            found.append(self.io[key])
            i += 1
        return Draws(found)

    def compare(self, name: str, ours: Tensor | float | list) -> None:
        """Record how far `ours` is from the recorded output; outputs that were not recorded are skipped."""
        want = self.want(name)
        if want is None:
            return
        got = torch.as_tensor(ours)
        if got.shape != want.shape:
            self.results[name] = ("differs", math.inf, f"shape {list(got.shape)} != {list(want.shape)}")
            return
        worst = float((got.detach().cpu().double() - want.cpu().double()).abs().max()) if got.numel() else 0.0
        good = worst <= self.tolerance  # False for nan
        self.results[name] = ("ok" if good else "differs", worst, "")

    def decline(self, name: str, reason: str) -> None:
        if self.want(name) is not None and name not in self.results:
            self.results[name] = ("declined", 0.0, reason)

    @contextlib.contextmanager
    def guarded(self, prefix: str) -> Iterator[None]:
        """An error in here is a difference of those outputs `prefix*` that nothing was compared with yet."""
        try:
            yield
        except Exception as error:
            for name in self.wanted(prefix):
                self.results.setdefault(name, ("differs", math.inf, f"{type(error).__name__}: {error}"))

    def each_variant(self, run: Callable[["Golden", str, dict[str, Any]], None]) -> None:
        """Run every variant; one that fails does not hide the others."""
        for name, variant in self.config["variants"].items():
            with self.guarded(f"{name}."):
                run(self, name, variant)

    def finish(self) -> None:
        """Every recorded output that nothing was compared with counts as different."""
        for name in self.wanted():
            self.results.setdefault(name, ("differs", math.inf, "not computed"))


class Draws:
    """Recorded noise in place of a generator: each call returns the next tensor, in the shape it is asked for."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.used = tensors, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.used += 1
        return self.tensors[self.used - 1].reshape(x.shape).to(x.dtype)
