"""Distil bidirectional video diffusion models into causal students that stream in real time."""

__version__ = "0.1.0"
