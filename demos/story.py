"""Turns timed prompts into a video: python demos/story.py [STORY] [--name shapes] [-o story.mp4]

A line of STORY is `SECONDS [POLICY]: prompt`; POLICY is keep, recache or cut. `#` begins a comment.
"""

import argparse
from pathlib import Path

from vidistill.checkpoint import load_codec, load_student, takes_prompts
from vidistill.cli.options import clip_seconds, non_negative_int, print_anything, scale_factor
from vidistill.conditioning.script import parse_cues
from vidistill.io import check_video, contact_sheet, read_text, save_png, write_video
from vidistill.streaming.session import StreamConfig, StreamSession


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("story", nargs="?", type=Path, default=Path(__file__).with_name("story.txt"))
    parser.add_argument("--name", default="shapes", help="a bundled student that listens to text, or the path of one")
    parser.add_argument("-o", "--out", type=Path, default=Path("story.mp4"))
    parser.add_argument("--last", type=clip_seconds, default=5.0, help="seconds after the last prompt")
    parser.add_argument("--switch", default="recache", help="what a prompt does to memory where the story does not say")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--scale", type=scale_factor, default=8, help="enlarge pixels by this factor")
    print_anything()
    args = parser.parse_args()
    try:
        tell(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def tell(args: argparse.Namespace) -> None:
    """The story as a video and a contact sheet."""
    check_video(args.out, reads=[args.story])
    lines = [line.split("#")[0].strip() for line in read_text(args.story).splitlines()]
    cues = parse_cues([line for line in lines if line])
    if not cues:
        raise ValueError(f"{args.story} holds no prompts")
    if not takes_prompts(args.name):
        raise ValueError(f"{args.name} does not listen to text; shapes does")
    student = load_student(args.name)
    cfg = StreamConfig(seed=args.seed, switch=args.switch)
    with StreamSession(student, load_codec(student), cfg) as session:
        total = max(1, round((cues[-1].seconds + args.last) * session.fps))
        frames = session.record(total, cues=cues)
        write_video(args.out, frames, session.fps, scale=args.scale)
        save_png(
            args.out.with_suffix(".png"),
            contact_sheet([frames], every=max(1, round(session.fps)), scale=max(1, args.scale // 2)),
        )
    print(f"{args.out}: {len(frames)} frames, {len(cues)} prompts")


if __name__ == "__main__":
    main()
