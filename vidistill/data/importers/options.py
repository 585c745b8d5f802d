"""Options that several commands share; they are read without loading what they are for."""

from typing import Any


def add_world_options(p: Any, required: bool = False, frames: int = 321) -> None:
    """The options that say which environment, what is seen of it, and what can be done; `frames` of an episode."""
    p.add_argument("--env", required=required, help="id, e.g. CarRacing-v3, or PACKAGE:ID, e.g. ale_py:ALE/Breakout-v5")
    p.add_argument(
        "--option", nargs="+", default=[], metavar="key=value", help="options of the environment, e.g. frameskip=1"
    )
    p.add_argument("--frames", type="count", default=frames, help=f"frames of an episode at most (default: {frames})")
    p.add_argument("--min-frames", type="count", default=17, help="frames of an episode at least (default: 17)")
    p.add_argument("--restart", action="store_true", help="clips go on with another episode where one ends")
    p.add_argument(
        "--rate", type="rate", help="steps a second (default: what the environment says, which may be wrong)"
    )
    p.add_argument("--repeat", type="count", help="steps a frame (default: for 12 to 18 frames a second)")
    p.add_argument("--start", type="number", default=0, help="idle steps before the first frame (default: 0)")
    p.add_argument("--size", type="size", default=(64, 64), help="pixels of a frame (default: 64x64)")
    p.add_argument("--crop", type="numbers", default=(0, 0, 0, 0), help="pixels cut off first: TOP,BOTTOM,LEFT,RIGHT")
    ways = ("crop", "fit", "stretch")
    p.add_argument("--resize", choices=ways, default="stretch", help="into the size (default: stretch)")
    p.add_argument("--names", help="of actions, with commas: one an axis of a Box, one a value else")
    p.add_argument(
        "--keys", nargs="+", default=[], metavar="ACTION=KEY", help="keys of the page, e.g. steer_minus=ArrowLeft"
    )
