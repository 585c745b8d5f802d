"""Where a stream goes and what it remembers of its path: a map, a way back, a history that can be switched off."""

from collections import deque
from typing import Any

from vidistill.conditioning.camera import MOVES, opposite, place_of, walk_of
from vidistill.conditioning.controls import Camera, ControlInput, LiveConditions
from vidistill.memory.cache import KVMemory

LONGEST_PATH = 4096  # chunks that can be walked back
LONGEST_TRAIL = 1024  # places that the map draws of the way
Step = tuple[tuple[float, ...], int]  # actions, and for how many latents they were held


class Navigator:
    """Follows one stream. `map` is replaced as a whole after every chunk and may be read from any thread."""

    def __init__(self, memory: KVMemory, inputs: LiveConditions) -> None:
        self._memory, self._inputs, self._camera = memory, inputs, inputs.find(Camera)
        self._path: deque[Step] = deque(maxlen=LONGEST_PATH)  # what the chunks so far did
        self._trail: deque[list[float]] = deque(maxlen=LONGEST_TRAIL)  # [x, y] after each
        self._return: list[Step] | None = None  # what is still to be undone on the way back, last one first
        self._return_id = 0  # number of the input that was set last on the way back
        self._noted = -1
        self.map: dict[str, Any] = {}

    @property
    def placed(self) -> bool:
        """Whether the stream knows where it is; its map is empty until the first chunk is made."""
        return self._camera is not None

    @property
    def remembers(self) -> bool:
        """Whether there is a history that can be switched off."""
        return self._memory.cfg.remembers

    def begin(self) -> None:
        """A new run: no path yet, nothing is remembered."""
        self._memory.reset()
        self._path.clear()
        self._trail.clear()
        if self._return is not None and self._inputs.control.id == self._return_id:  # nobody holds what led back
            self._stand_still()
        self._return, self._noted = None, -1
        self.update()

    def show_history(self, on: bool) -> None:
        """Let the next passes look at the compressed history, or at the window alone."""
        if not self.remembers:
            raise ValueError("this student's memory has no history to switch off")
        self._memory.show_history(on)

    def return_to_start(self) -> None:
        """From the next chunk on undo what was done, last things first, until the start; keys pressed meanwhile win."""
        if self._camera is None:
            raise ValueError("this student is not told where it goes, so it cannot be led back")
        names = self._inputs.net.actions
        for name in names:
            if name in MOVES and not any(opposite(names, [float(other == name) for other in names])):
                raise ValueError(f"this world has no way to undo {name!r}, so it cannot be led back")
        self._return = list(self._path)
        self._return_id = self._inputs.control.id

    def control(self, start: int, stop: int) -> ControlInput:
        """What a chunk of latents `start`..`stop` - 1 is made with: what is set, or the next step back."""
        if start > self._noted:
            self._noted = start
            held = stop - max(start, 1)  # the camera stands still through the first latent
            if self._return is not None:
                self._step_back(held)
            elif held:
                self._path.append((self._held, held))
        return self._inputs.control

    def _step_back(self, held: int) -> None:
        if self._inputs.control.id != self._return_id:  # somebody pressed a key
            self._return = None
            self._path.append((self._held, held))
        elif self._return:
            action, shorter = self._return.pop()
            undone = opposite(self._inputs.net.actions, action)
            self._return_id = self._inputs.set({"action": [min(1.0, shorter / held) * value for value in undone]})
            self._path.pop()
        else:
            self._return = None
            self._stand_still()

    @property
    def _held(self) -> tuple[float, ...]:
        return self._inputs.control.values.get("action", ())

    def _stand_still(self) -> None:
        self._inputs.set({"action": {}})

    def update(self) -> None:
        """Draw the map anew: here, the path, and each remembered frame with its factor as [x, y, heading, factor]."""
        if self._camera is None:
            return
        poses, cfg = self._memory.poses, self._camera.cfg
        stored = [[*place_of(poses[s.frame][0], cfg), s.factor] for s in self._memory.stored if s.frame in poses]
        pose = self._camera.pose
        here = [0.0, 0.0, 0.0] if pose is None else [round(float(v), 3) for v in walk_of(pose)[0, -1]]
        if not self._trail or self._trail[-1] != here[:2]:
            self._trail.append(here[:2])
        self.map = {
            "here": here,
            "path": list(self._trail),
            "stored": stored,
            "history": self._memory.history_shown,
            "home": self._return is not None,
        }
