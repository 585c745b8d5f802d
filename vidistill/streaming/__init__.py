"""Frames of a student in real time, from inputs that change while it runs."""
