"""Rooms of the Doom engine, recorded."""
