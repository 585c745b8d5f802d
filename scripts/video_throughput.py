"""How fast videos are read beside the codec that encodes them, and whether memory grows with their number.

    python scripts/video_throughput.py 10000 OUT

Writes as many little videos into OUT, imports them by `vidistill data videos`, and prints one JSON object.
"""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from vidistill import checkpoint
from vidistill.cli.main import main
from vidistill.data.importers.decode import frames_of, rgb
from vidistill.data.importers.write import Clip, shard_of
from vidistill.data.shards import latent_shard
from vidistill.io import write_video

FRAMES, SIDE, TIMED = 17, 64, 64


def written(folder: Path, count: int) -> None:
    """Videos of textures that move, no two alike."""
    for k in range(count):
        path = folder / f"{k // 1000:03d}" / f"{k:06d}.mp4"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(k)
            wall = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            write_video(path, np.stack([wall[t : t + SIDE, t : t + SIDE] for t in range(FRAMES)]), 16.0)


def rates(folder: Path) -> dict[str, float]:
    """Clips a second that are decoded here in one process, and that a codec encodes."""
    paths = sorted(folder.rglob("*.mp4"))[:TIMED]
    began = time.perf_counter()
    clips = [Clip(np.stack([rgb(f.raw, (SIDE, SIDE)) for f in frames_of(path)])) for path in paths]
    decoded = time.perf_counter() - began
    codec = checkpoint.load("doom-codec", "codec").net
    began = time.perf_counter()
    latent_shard(shard_of(clips[:16]), codec)
    encoded = time.perf_counter() - began
    return {"decoded_per_s": len(clips) / decoded, "encoded_per_s": len(clips[:16]) / encoded}


def measured(count: int, out: Path) -> dict[str, float]:
    """What the import of so many videos takes."""
    written(out / "videos", count)
    held, done, process = list[float](), threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.2):
            held.append(process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    code = main(["data", "videos", str(out / "data"), "--from", str(out / "videos"), "--size", f"{SIDE}x{SIDE}"])
    spent = time.perf_counter() - began
    done.set()
    watcher.join()
    tenth = max(1, len(held) // 10)
    memory = {"mib_second_tenth": max(held[tenth : 2 * tenth]), "mib_last_tenth": max(held[-tenth:])}
    return {"clips": count, "code": code, "import_s": spent, **memory, **rates(out / "videos")}


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]), Path(sys.argv[2]))))
