import pytest
import torch

from vidistill.shapes import LatentShape, check_shape


def test_tokens_follow_from_size_and_patch():
    shape = LatentShape(21, 16, 60, 104)
    assert shape.grid == (30, 52) and shape.tokens_per_frame == 1560 and shape.patch_dim == 64


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"frames": 0}, "frames"),
        ({"height": 5}, "multiple of the patch"),
        ({"patch": (2, 2, 2)}, r"patch\[0\]"),
    ],
)
def test_impossible_sizes_name_the_field(kw, message):
    with pytest.raises(ValueError, match=message):
        LatentShape(**{"frames": 1, "channels": 4, "height": 4, "width": 4, **kw})


def test_check_shape_says_what_was_expected_and_what_came():
    check_shape(torch.zeros(1, 2, 3, 4, 4), "B F C H W", C=3)
    with pytest.raises(ValueError, match="C=4"):
        check_shape(torch.zeros(1, 2, 3, 4, 4), "B F C H W", C=4)
    with pytest.raises(ValueError, match="got 2 axes"):
        check_shape(torch.zeros(1, 2), "B F C H W")
