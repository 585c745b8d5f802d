"""Operators with a plain reference and faster backends behind one function each."""
