"""Write the LeRobot data sets that the importer is tested on, with LeRobot's own library.

Its torchvision does not fit the torch that is pinned here, so it runs in an environment of its own:

    pip install lerobot==0.4.4 && python scripts/golden_lerobot.py tests/goldens/lerobot/v3.0    # layout v3.0
    pip install lerobot==0.3.3 && python scripts/golden_lerobot.py tests/goldens/lerobot/v2.1    # layout v2.1

Both wrote what is there by `LeRobotDataset.create`, `add_frame` and `save_episode` (0.4.4: and `finalize`).
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS, LENGTHS, SIZE = 20, (22, 30, 18, 25, 9), (48, 64)
TASKS = ("push the block left", "push the block right")
JOINTS = ("shoulder.pos", "gripper.pos")


def picture(x: float, red: int) -> np.ndarray:
    """A block at `x` of a dim room, uint8 [H, W, 3]."""
    out = np.full((*SIZE, 3), 40, np.uint8)
    left = round(x * (SIZE[1] - 16))
    out[16:32, left : left + 16] = (red, 220, 60)
    return out


def main(out: Path) -> None:
    """Five episodes of two cameras, one of them stored as pictures; beside them what was put in."""
    vector = {"dtype": "float32", "shape": (2,), "names": list(JOINTS)}
    camera = {"shape": (*SIZE, 3), "names": ["height", "width", "channels"]}
    features = {
        "action": vector,
        "observation.state": vector,
        "observation.images.top": {"dtype": "video", **camera},
        "observation.images.wrist": {"dtype": "image", **camera},
    }
    made = LeRobotDataset.create("golden/blocks", FPS, features, root=out, robot_type="blocks", use_videos=True)
    v2 = made.meta.info["codebase_version"] == "v2.1"
    rng, told = np.random.default_rng(0), []
    for k, length in enumerate(LENGTHS):
        x, rows = 0.5, []
        for _ in range(length):
            move, grip = float(rng.uniform(-8, 4)), float(rng.uniform(20, 80))
            frame = {
                "action": np.array([move, grip], np.float32),
                "observation.state": np.array([90 * x, grip], np.float32),
                "observation.images.top": picture(x, 200),
                "observation.images.wrist": picture(x, 60),
            }
            task = TASKS[k % 2]
            made.add_frame(frame, task) if v2 else made.add_frame({**frame, "task": task})
            rows.append([float(v) for v in (*frame["action"], *frame["observation.state"], x)])
            x = float(np.clip(x + move / 100, 0, 1))
        made.save_episode()
        told.append({"task": TASKS[k % 2], "rows": rows})
    if not v2:
        made.finalize()
    shutil.rmtree(out / "images")  # what it kept of pictures before they went into its parquet files
    columns = ["action.move", "action.grip", "state.place", "state.grip", "x"]
    record = {"lerobot": version("lerobot"), "columns": columns, "episodes": told}
    (out / "put_in.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
