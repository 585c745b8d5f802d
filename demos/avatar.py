"""Makes an avatar speak: python demos/avatar.py "Good morning." [--name talker] [--wav VOICE.wav] [-o avatar.mp4]

Words are spoken by espeak-ng (pip install 'vidistill[audio]'); --wav takes a recording instead, of any format.
"""

import argparse
from pathlib import Path

from vidistill.checkpoint import load_codec, load_student, start_pictures, takes_audio
from vidistill.cli.options import non_negative_int, print_anything
from vidistill.io import check_video, contact_sheet, read_image, save_png, write_video
from vidistill.sound import read_sound
from vidistill.streaming.session import StreamConfig, StreamSession
from vidistill.worlds.talker import speech


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="Hello. I listen, and I answer. How are you today?")
    parser.add_argument("--name", default="talker", help="a bundled student that hears, or the path of one")
    parser.add_argument("--wav", type=Path, help="a recording to speak instead of the text")
    parser.add_argument("--image", type=Path, help="who speaks (default: a bundled picture)")
    parser.add_argument("--prompt", default="a happy person talks in a lively way", help="how they speak")
    parser.add_argument("-o", "--out", type=Path, default=Path("avatar.mp4"))
    parser.add_argument("--seed", type=non_negative_int, default=0)
    print_anything()
    args = parser.parse_args()
    try:
        speak(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def speak(args: argparse.Namespace) -> None:
    """What was asked for, as a video with sound and a contact sheet."""
    check_video(args.out, reads=(args.wav, args.image))
    if not takes_audio(args.name):
        raise ValueError(f"{args.name} hears nothing; talker does")
    student = load_student(args.name)
    codec = load_codec(student)
    pcm = read_sound(args.wav, speech.RATE) if args.wav else speech.say(args.text).pcm
    size = (student.shape.height * codec.spatial_factor, student.shape.width * codec.spatial_factor)
    picture = args.image or next(iter(start_pictures(args.name)), None)
    if picture is None:
        raise ValueError(f"{args.name} has no start pictures; give one with --image")
    with StreamSession(student, codec, StreamConfig(seed=args.seed), image=read_image(picture, size)) as session:
        if "prompt" in session.takes:
            session.set(prompt=args.prompt)
        session.set(audio=pcm)
        frames = session.record(round((len(pcm) / speech.RATE + 1.0) * session.fps))
        write_video(args.out, frames, session.fps, scale=4, sound=pcm, rate=speech.RATE)
        save_png(args.out.with_suffix(".png"), contact_sheet([frames], every=8, scale=2))
    print(f"{args.out}: {len(frames)} frames")


if __name__ == "__main__":
    main()
