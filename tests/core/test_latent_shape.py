import pytest

from vidistill.diffusion import LatentShape


def test_tokens_follow_from_size_and_patch():
    shape = LatentShape(21, 16, 60, 104)
    assert shape.grid == (30, 52) and shape.tokens_per_frame == 1560 and shape.patch_dim == 64


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"frames": 0}, "frames"),
        ({"height": 5}, "5x4.*2x2"),
        ({"patch": (2, 2, 2)}, r"patch\[0\]"),
    ],
)
def test_impossible_sizes_name_the_field(kw, message):
    with pytest.raises(ValueError, match=message):
        LatentShape(**{"frames": 1, "channels": 4, "height": 4, "width": 4, **kw})
