"""Serves a world and opens it in your browser: python demos/play.py [NAME] [--port 8000]"""

import argparse
import webbrowser

from vidistill.serve.app import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="doom", help="a bundled student, or the path of one")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    args = parser.parse_args()

    def ready(address: str) -> None:
        print(f"{args.name} is at {address} - stop with Ctrl-C", flush=True)
        webbrowser.open(address)

    try:
        serve(args.name, port=args.port, ready=ready)
    except (ValueError, OSError, ImportError) as error:  # CheckpointError is a ValueError
        parser.error(str(error))


if __name__ == "__main__":
    main()
