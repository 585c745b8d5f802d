"""Scripts of actions and timed prompts, as people write them on a command line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_HELD = 10**8  # px frames that an action is held for, at most
Script = Sequence[tuple[Mapping[str, float], int]]  # actions and for how many px frames they are held


def parse_script(text: str) -> Script:
    """The script that "forward:20,turn_left+forward:16,still:4" spells; ValueError for another form."""
    script = []
    for part in filter(None, text.replace(" ", "").split(",")):
        names, _, frames = part.partition(":")
        if not names or not frames.isdecimal() or not 0 < int(frames[:10]) <= MAX_HELD or len(frames) > 9:
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


TIME = re.compile(r"[+-]?[\d.,]*\d[\d.,]*(?:e[+-]?\d+)?s?|[+-]?(?:nan|inf|infinity)", re.IGNORECASE)  # looks like one
SECONDS = re.compile(r"\d+(?:\.\d+)?s?")  # is one
SWITCH_NAMES = ("keep", "recache", "cut")  # what a cue may do to memory
GRAMMAR = "a cue is a prompt, or SECONDS: prompt, or SECONDS POLICY: prompt, as in '6 recache: a red ring'"
MAX_SECONDS = 24 * 3600


def parse_cue(line: str) -> Cue:
    """The cue in a line; ValueError for one that begins like a time and is none, and for one without words."""
    head, colon, rest = line.partition(":")
    words = head.split()
    if not colon or not 1 <= len(words) <= 2 or not TIME.fullmatch(words[0]):
        seconds, switch, prompt = 0.0, None, " ".join(line.split())
    else:
        if not SECONDS.fullmatch(words[0]) or rest[:1].isdigit():  # 12:30 is a time of day
            raise ValueError(f"{line!r} begins like a time that cannot be read; {GRAMMAR}")
        seconds, prompt = float(words[0].removesuffix("s")), " ".join(rest.split())
        switch = words[1] if len(words) == 2 else None
        if switch not in (None, *SWITCH_NAMES):
            raise ValueError(f"{line!r} has the policy {switch!r}; choose one of {', '.join(SWITCH_NAMES)}")
        if seconds > MAX_SECONDS:
            raise ValueError(f"{line!r} comes after {seconds:g} s; {MAX_SECONDS} s is the latest")
    if not prompt:
        raise ValueError(f"{line!r} says nothing; {GRAMMAR}")
    return Cue(seconds, prompt, switch)


def parse_cues(lines: Sequence[str]) -> list[Cue]:
    """The cues that lines like "a red ball", "5: a blue ball" and "9.5 cut: a green ball" spell, in order of time.

    ValueError for a line that cannot be read, and for two at one time.
    """
    cues = [parse_cue(line) for line in lines]
    cues.sort(key=lambda cue: cue.seconds)
    for cue, later in pairwise(cues):
        if cue.seconds == later.seconds:
            both = f"{cue.prompt!r} and {later.prompt!r}"
            raise ValueError(f"{both} are both said at {cue.seconds:g} s; give times, as in '5: {later.prompt}'")
    return cues
