import pytest
import torch

from posttrain.objectives.rewards import reward_metrics


def test_margin_and_accuracy_with_a_tie_at_one_half():
    chosen = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    found = reward_metrics(chosen, torch.tensor([0.5, 1.0, 0.5]))
    assert found["chosen_reward"].tolist() == [2.0, -1.0, 0.5]
    assert found["rejected_reward"].tolist() == [0.5, 1.0, 0.5]
    assert found["implicit_margin"].tolist() == [1.5, -2.0, 0.0]
    assert found["reward_accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert not any(value.requires_grad for value in found.values())


def test_different_numbers_of_pairs_are_refused():
    with pytest.raises(ValueError, match="rejected"):
        reward_metrics(torch.zeros(3), torch.zeros(1))
