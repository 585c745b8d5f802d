"""Importers: where clips come from that nobody here drew. A new one is a module and a line of `IMPORTERS`."""

from collections.abc import Mapping

# name -> what it brings in. The module of that name has `add_options(parser)` and `run(args)`, which returns what it
# did in a line; it is loaded only when it is asked for.
IMPORTERS: Mapping[str, str] = {
    "videos": "folders and lists of video files, with captions, actions, poses and sound",
    "gym": "episodes of any Gymnasium environment",
    "lerobot": "LeRobot data sets: a camera, actions and states, tasks as captions",
    "minari": "Minari data sets whose observations are pictures",
    "files": "clips that are there already, as mp4 with what lies beside them",
    "latents": "frames that are there already, encoded by a codec",
}
