"""What a network is told, packed at the rate of its latents."""

import pytest
import torch

from vidistill.conditioning.condition import hold_action, pack_actions


@pytest.mark.parametrize("factor", [1, 4])
def test_a_held_action_is_told_as_a_recorded_clip_of_it_would_be(factor):
    action = torch.tensor([1.0, -0.5])
    recorded = action.repeat(1, 1 + 4 * factor, 1)
    recorded[:, 0] = 0.0  # nothing led to the first picture
    whole = pack_actions(recorded, factor)
    assert torch.equal(hold_action(action, 0, 5, factor), whole)
    assert torch.equal(hold_action(action, 2, 5, factor), whole[:, 2:])
    assert whole[0, 0].tolist() == [0.0] * 2 * factor + [1.0]
