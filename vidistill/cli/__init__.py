"""The command line, one file a command."""

from vidistill.cli.main import main

__all__ = ["main"]
