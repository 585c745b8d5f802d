"""Shell scripts whose `vidistill` commands run in this process: a start of Python each would take minutes."""

import os
import shlex
import subprocess
from pathlib import Path

from vidistill.cli.main import main

STUB = '#!/bin/sh\n{ printf "%s\\0" "$PWD" "$@"; printf "\\n"; } >> "$COMMANDS"\n'


def commands_of(script: Path, folder: Path, **env: str) -> list[list[str]]:
    """The commands that a script gives `vidistill`, each after the folder it is given in; all of them end well."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "vidistill").write_text(STUB)
    (tools / "vidistill").chmod(0o755)
    log = folder / "commands"
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "COMMANDS": str(log), **env}
    subprocess.run(["bash", str(script)], env=env, check=True, timeout=60, capture_output=True)
    return [line.strip("\0").split("\0") for line in log.read_text().split("\n") if line]


def run_all(commands: list[list[str]], monkeypatch) -> None:
    """Run commands one after the other, each in its folder; the first that fails fails the test."""
    for folder, *words in commands:
        monkeypatch.chdir(folder)
        assert main(words) == 0, shlex.join(words)
