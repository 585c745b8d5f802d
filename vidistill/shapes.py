"""Latent geometry as a value.

Axis legend used everywhere: B batch, F latent frames, f frames in a chunk, C latent channels, H W latent size,
L condition tokens, D width, S memory tokens, h heads, d width of a head, n tokens of one latent frame.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentShape:
    """Size of a latent clip and of the patches a network cuts it into."""

    frames: int
    channels: int
    height: int
    width: int
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        for name in ("frames", "channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"LatentShape.{name} must be at least 1, got {getattr(self, name)}")
        t, h, w = self.patch
        if t != 1:
            raise ValueError(f"LatentShape.patch[0] must be 1 (causal chunks are whole latent frames), got {t}")
        if self.height % h or self.width % w:
            raise ValueError(
                f"LatentShape height x width {self.height}x{self.width} must be a multiple of the patch {h}x{w}: "
                "choose another patch or another frame size"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one latent frame."""
        return self.height // self.patch[1], self.width // self.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return self.channels * self.patch[1] * self.patch[2]
