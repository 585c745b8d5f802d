"""Scripts of actions and timed prompts, as people write them on a command line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

Script = Sequence[tuple[Mapping[str, float], int]]  # actions and for how many px frames they are held


def parse_script(text: str) -> Script:
    """The script that "forward:20,turn_left+forward:16,still:4" spells; ValueError for another form."""
    script = []
    for part in filter(None, text.replace(" ", "").split(",")):
        names, _, frames = part.partition(":")
        if not names or not frames.isdigit() or not int(frames):
            raise ValueError(f"{part!r} is not ACTION:FRAMES or ACTION+ACTION:FRAMES, as in forward:20,still:4")
        script.append(({name: 1.0 for name in names.split("+") if name != "still"}, int(frames)))
    return script


def scripted(script: Script, frame: int) -> Mapping[str, float]:
    """What a script, repeated for ever, holds at px frame `frame`."""
    left = frame % sum(frames for _, frames in script)
    for action, frames in script:
        left -= frames
        if left < 0:
            return action
    raise AssertionError("a script is as long as its parts")


@dataclass(frozen=True)
class Cue:
    """A prompt of a story: when it is said, and what it does to memory (None: the stream's own policy)."""

    seconds: float
    prompt: str
    switch: str | None = None


CUE = re.compile(r"(?:(?P<seconds>\d+(?:\.\d+)?)s?(?:\s+(?P<switch>[a-z]+))?\s*:)?\s*(?P<prompt>.*\S)\s*")


def parse_cues(lines: Sequence[str]) -> list[Cue]:
    """The cues that lines like "a red ball", "5: a blue ball" and "9.5 cut: a green ball" spell, in order of time.

    ValueError for a line that says nothing, and for two at one time.
    """
    cues = []
    for line in lines:
        found = CUE.fullmatch(line)
        if found is None:
            raise ValueError(f"{line!r} says nothing; a cue is a prompt, or SECONDS: prompt, or SECONDS POLICY: prompt")
        cues.append(Cue(float(found["seconds"] or 0), found["prompt"], found["switch"]))
    cues.sort(key=lambda cue: cue.seconds)
    for cue, later in pairwise(cues):
        if cue.seconds == later.seconds:
            both = f"{cue.prompt!r} and {later.prompt!r}"
            raise ValueError(f"{both} are both said at {cue.seconds:g} s; give times, as in '5: {later.prompt}'")
    return cues
