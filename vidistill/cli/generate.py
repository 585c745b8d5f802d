"""`vidistill generate`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vidistill.cli.options import (
    GAIN,
    SPEED,
    STUDENT,
    Arguments,
    add_command,
    clip_seconds,
    non_negative_int,
    scale_factor,
    speed_of,
)

ARGUMENTS: Arguments = {
    **STUDENT,
    "-o --out": {"type": Path, "default": Path("out.mp4"), "help": "video file (default: out.mp4)"},
    "--seconds": {"type": clip_seconds, "default": 10.0, "help": "length of the video (default: 10)"},
    "--seed": {"type": non_negative_int, "default": 0, "help": "seed of the noise (default: 0)"},
    "--image": {"type": Path, "help": "start picture; default: a bundled one"},
    "--action": {
        "default": "",
        "help": "what to do, e.g. forward:20,turn_left+forward:16,still:8 (frames), repeated to the end; "
        "`vidistill info NAME` lists a world's actions",
    },
    "--prompt": {
        "action": "append",
        "default": [],
        "metavar": "[SECONDS [POLICY]:] TEXT",
        "help": 'text, for students that take it; repeat it with times: "6 recache: a red ring moves up"; '
        "policies: keep, recache, cut",
    },
    "--scale": {"type": scale_factor, "default": 4, "help": "enlarge pixels by this factor (default: 4)"},
    **GAIN,
    **SPEED,
}


def add_generate(commands: Any) -> None:
    about = {
        "help": "stream a student to a video file",
        "description": "Stream a student to an mp4 and a contact sheet (PNG beside it).",
        "epilog": "example: vidistill generate doom -o walk.mp4 --seconds 10 --action forward:20,turn_left:16",
    }
    add_command(commands, "generate", run_generate, ARGUMENTS, **about)


def run_generate(args: argparse.Namespace) -> None:
    from vidistill import io
    from vidistill.conditioning.script import parse_cues, parse_script
    from vidistill.progress import Bar
    from vidistill.streaming.runtime import load_fast
    from vidistill.streaming.session import StreamConfig, StreamSession

    io.check_video(args.out, reads=[args.image])
    script, cues = parse_script(args.action), parse_cues(args.prompt)
    if late := next((cue for cue in cues if cue.seconds >= args.seconds), None):
        raise ValueError(
            f"--prompt {late.prompt!r} starts at {late.seconds:g} s, after the end of a video of {args.seconds:g} s: "
            "raise --seconds"
        )
    bundle, codec = load_fast(args.name, speed_of(args))
    if args.image and not bundle.picture_frames:
        raise ValueError(f"--image {args.image}: {args.name} starts from noise, takes no picture; leave --image out")
    image = bundle.start_image(codec, args.image)
    with StreamSession(bundle, codec, StreamConfig(seed=args.seed, gain=args.gain), image=image) as session:
        total = max(1, round(args.seconds * session.fps))
        if "audio" in session.takes:
            print("no audio given: the avatar stays silent (demos/avatar.py makes it speak)", file=sys.stderr)
        with Bar(total, "frames", "frame") as bar:
            frames = session.record(total, script, cues, bar.update)
        io.write_video(args.out, frames, session.fps, scale=args.scale)
        sheet = args.out.with_suffix(".png")
        io.save_png(sheet, io.contact_sheet([frames], every=max(1, total // 12), scale=2))
    print(f"{args.out} ({total} frames), {sheet}")
