"""Where a stream goes and what it remembers of the way: a map, a way home, a history that can be switched off."""

from collections import deque
from typing import Any

from vidistill.conditioning.camera import opposite, place_of, walk_of
from vidistill.conditioning.controls import ControlInput, LiveConditions
from vidistill.memory.cache import KVMemory

LONGEST_PATH = 4096  # chunks that can be walked back
LONGEST_TRAIL = 1024  # places that the map draws of the way
Step = tuple[tuple[float, ...], int]  # actions, and for how many latents they were held


class Navigator:
    """Follows one stream. `map` is replaced as a whole after every chunk and may be read from any thread."""

    def __init__(self, memory: KVMemory, inputs: LiveConditions) -> None:
        self._memory, self._inputs = memory, inputs
        self._path: deque[Step] = deque(maxlen=LONGEST_PATH)  # what the chunks so far did
        self._trail: deque[list[float]] = deque(maxlen=LONGEST_TRAIL)  # [x, y] after each
        self._return: list[Step] | None = None  # what is still to be undone on the way home, last one first
        self._return_id = 0  # number of the wish that was set last on the way home
        self._noted = -1
        self.map: dict[str, Any] = {}

    @property
    def placed(self) -> bool:
        """Whether the stream knows where it is; its map is empty until the first chunk is made."""
        return self._inputs.camera is not None

    @property
    def remembers(self) -> bool:
        """Whether there is a history that can be switched off."""
        return self._memory.cfg.remembers

    def begin(self) -> None:
        """A new dream: nothing was walked yet, nothing is remembered."""
        self._memory.reset()
        self._path.clear()
        self._trail.clear()
        if self._return is not None and self._inputs.control.id == self._return_id:  # nobody holds what led home
            self._inputs.set((0.0,) * len(self._inputs.actions), None, None)
        self._return, self._noted = None, -1
        self.update()

    def show_history(self, on: bool) -> None:
        """Let the next passes look at the compressed history, or at the window alone."""
        if not self.remembers:
            raise ValueError("this student's memory has no history to switch off")
        self._memory.show_history(on)

    def return_to_start(self) -> None:
        """From the next chunk on undo what was done, last things first, until the start; keys pressed meanwhile win."""
        if self._inputs.camera is None:
            raise ValueError("this student is not told where it goes, so it cannot be led back")
        self._return = list(self._path)
        self._return_id = self._inputs.control.id

    def control(self, start: int, stop: int) -> ControlInput:
        """What a chunk of latents `start`..`stop` - 1 is made with: the wish that is set, or the next step home."""
        if start > self._noted:
            self._noted = start
            held = stop - max(start, 1)  # the camera stands still through the first latent
            if self._return is not None:
                self._step_back(held)
            elif held:
                self._path.append((self._inputs.control.action, held))
        return self._inputs.control

    def _step_back(self, held: int) -> None:
        if self._inputs.control.id != self._return_id:  # somebody pressed a key
            self._return = None
            self._path.append((self._inputs.control.action, held))
        elif self._return:
            action, shorter = self._return.pop()
            undone = opposite(self._inputs.actions, action)
            self._return_id = self._inputs.set([min(1.0, shorter / held) * value for value in undone], None, None)
            self._path.pop()
        else:
            self._return = None
            self._inputs.set((0.0,) * len(self._inputs.actions), None, None)

    def update(self) -> None:
        """Draw the map anew: here, the way, and each remembered frame with its factor as [x, y, heading, factor]."""
        camera = self._inputs.camera
        if camera is None:
            return
        poses = self._memory.poses
        stored = [[*place_of(poses[s.frame][0], camera), s.factor] for s in self._memory.stored if s.frame in poses]
        pose = self._inputs.pose
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
