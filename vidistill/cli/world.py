"""What the clips of a data folder show: sizes, conditions, and how long what moves their world is held."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vidistill.conditioning.camera import MOVES, STATIC, CameraConfig, moves, pose_of, relative
from vidistill.conditioning.condition import MOVE_SITE
from vidistill.data.clips import Clips
from vidistill.data.shards import META, DataError

SHORT = 7  # latents of a clip, at least: most of a teacher's steps
LOOKED_AT = 64  # episodes from which it is seen how a world is moved
FULL, FASTEST = 0.95, 0.999  # quantiles of a camera's paces: a full move, and the fastest that is no mistake
FAINT, SELDOM, STANDS = 0.1, 0.002, 1e-6  # share of a move that is none; of frames, too few; the pace of standing


@dataclass(frozen=True)
class World:
    """What the data show. `size`: px; `length`: px frames of the longest episode; `held`: px frames an action is;
    `text_dim`, `audio`: numbers of a token, and of sound a px frame; `camera`: how it moves, where nothing else acts.
    """

    data: Path
    splits: tuple[str, ...]
    size: tuple[int, int]
    fps: float
    episodes: int
    px_frames: int
    length: int
    actions: tuple[str, ...]
    text_dim: int
    given: int
    held: float
    audio: int = 0
    camera: CameraConfig | None = None
    idle_poses: bool = False  # there are poses, and nothing is told of them

    @property
    def names(self) -> tuple[str, ...]:
        """What can be held: actions, or moves of the camera."""
        return self.actions or (self.camera.moves if self.camera else ())

    @property
    def factor(self) -> int:
        """Px frames of a latent: four, where the video is quick enough for an eye not to see them."""
        return 4 if self.fps >= 8 else 2

    @property
    def spatial(self) -> int:
        """Pixels along the side of a latent."""
        return 4 if max(self.size) <= 96 else 8

    @property
    def latent(self) -> tuple[int, int]:
        return self.size[0] // self.spatial, self.size[1] // self.spatial

    @property
    def longest(self) -> int:
        """Latents of the longest episode."""
        return 1 + (self.length - 1) // self.factor

    @property
    def conditions(self) -> list[str]:
        """What a network is conditioned on beside pictures."""
        kind = "actions" if self.actions else "camera"
        named = [f"{kind} {', '.join(self.names)}"] * bool(self.names) + ["captions"] * bool(self.text_dim)
        return named + ["sound"] * bool(self.audio) + ["nothing of the poses"] * self.idle_poses

    @property
    def per_frame_dims(self) -> dict[str, int]:
        """Numbers a latent of the per-frame conditions, as data holds them packed."""
        actions = self.factor * len(self.actions) + 1 if self.actions else 0
        return {name: dim for name, dim in {"actions": actions, "audio": self.factor * self.audio}.items() if dim}

    @property
    def guidance(self) -> dict[str, float]:
        """Scales at which a teacher is asked: of text and, where there is sound beside it, of sound; 1 is none."""
        if self.text_dim and self.audio:
            return {"guidance": 1.5, "audio_guidance": 2.0}
        return {"guidance": 2.0 if self.text_dim or self.audio else 1.0}

    @property
    def drops(self) -> dict[str, float]:
        """Shares of clips whose conditions a teacher does not see; sound alone, too, where its scale is its own."""
        return {"drop": 0.1, **({"drop_audio": 0.1} if "audio_guidance" in self.guidance else {})}


def look(data: Path) -> World:
    """What the frames of a data folder (or of a folder with its splits) show; DataError where no stage takes them."""
    splits = tuple(sorted(p.parent.name for p in data.glob(f"*/{META}")))
    if not (data / META).is_file() and "train" not in splits:
        raise FileNotFoundError(f"--data {data}: no clips there; make some with `vidistill data videos` or `data gym`")
    clips = Clips(data if (data / META).is_file() else data / "train")
    if clips.kind != "frames":
        raise DataError(
            f"{clips.folder} holds {clips.kind}; `new` trains a codec first and needs frames: leave out --codec"
        )
    height, width = clips.parts[0]["frames"].shape[-3:-1]
    lengths = clips.lengths("frames")
    actions = tuple(clips.meta.get("actions", ())) if clips.width_of("actions") else ()
    camera = None if actions or clips.width_of("audio") else camera_of(clips)  # sound is told where moves are
    world = World(
        data=data,
        splits=splits if clips.folder != data else (),
        size=(height, width),
        fps=clips.meta["fps"],
        episodes=len(clips),
        px_frames=sum(lengths),
        length=max(lengths),
        actions=actions,
        text_dim=clips.width_of("tokens"),
        given=clips.given,
        held=held_frames(clips, camera),
        audio=clips.width_of("audio"),
        camera=camera,
        idle_poses=bool(clips.width_of("poses")) and camera is None,
    )
    if height % world.spatial or width % world.spatial:
        raise DataError(
            f"{clips.folder} has frames of {height}x{width}; sides must be multiples of "
            f"{world.spatial}: make the data with another --size"
        )
    if world.longest < SHORT:
        needed = 1 + world.factor * (SHORT - 1)
        raise DataError(
            f"{clips.folder} has no episode longer than {world.length} frames; {needed} are needed: cut longer clips"
        )
    return world


def camera_of(clips: Clips) -> CameraConfig | None:
    """How a filmed camera moves: a full move is the pace that 95 of 100 frames in which it goes, or turns, stay below;
    names are those of moves that are seen. None without poses, and for a camera that stands still."""
    if not clips.width_of("poses"):
        return None
    moved = torch.cat([moves(pose_of(clips.episode("poses", k)))[1:] for k in looked_at(clips)])
    units = [full_pace(part.abs().amax(-1)) for part in moved.split(3, -1)]  # of positions, of angles
    seen = moved / torch.tensor([units[0]] * 3 + [units[1]] * 3)
    names = [n for n, (axis, sign) in MOVES.items() if (sign * seen[:, axis] > FAINT).double().mean() > SELDOM]
    if not names:
        return None
    return CameraConfig(float(f"{units[0]:.3g}"), float(f"{units[1]:.3g}"), (*names, STATIC), sites=(MOVE_SITE,))


def looked_at(clips: Clips) -> list[int]:
    """Episodes, spread over all, from which it is seen how a world is moved."""
    count = min(len(clips), LOOKED_AT)
    return [k * len(clips) // count for k in range(count)]


def full_pace(paces: Tensor) -> float:
    """The pace of a full move, of those [T] of frames; 1 where nothing moves."""
    fastest = float(paces.quantile(FASTEST)) if len(paces) else 0.0
    return float(paces[paces > FAINT * fastest].quantile(FULL)) if fastest > STANDS else 1.0


def held_frames(clips: Clips, camera: CameraConfig | None) -> float:
    """Px frames for which an action, or a move of the camera, is held, in the middle; 0 without either."""
    if not clips.width_of("actions") and camera is None:
        return 0.0
    runs = list[int]()
    for k in looked_at(clips):
        if camera is None:
            held = clips.episode("actions", k)[1:]
        else:  # half of a full move, or more
            held = (relative(moves(pose_of(clips.episode("poses", k))), camera, 1)[1:] > 0.5).float()
        changed = held.diff(dim=0).abs().amax(-1) > 0.05
        edges = torch.cat((torch.tensor([-1]), changed.nonzero()[:, 0], torch.tensor([len(changed)])))
        runs += edges.diff().tolist()
    return float(torch.tensor(runs, dtype=torch.float64).median()) if runs else 0.0
