"""Reductions against hand-derived numbers."""

import torch

from posttrain.reduction import divide, repeat_to_tokens, segment_mean, segment_sum, weighted_sum


def test_segments_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    lengths = torch.tensor([2, 3])
    assert segment_sum(values, lengths).tolist() == [3.0, 28.0]
    assert torch.allclose(segment_mean(values, lengths), torch.tensor([1.5, 28 / 3]))
    assert repeat_to_tokens(torch.tensor([5.0, 7.0]), lengths, 5).tolist() == [5.0, 5.0, 7.0, 7.0, 7.0]


def test_segment_gradient_is_the_sequence_s_own():
    values = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (segment_mean(values, torch.tensor([2, 3])) * torch.tensor([1.0, 10.0])).sum().backward()
    expected = torch.tensor([1 / 2, 1 / 2, 10 / 3, 10 / 3, 10 / 3], dtype=torch.float64)
    assert torch.allclose(values.grad, expected, rtol=1e-15)


def test_nothing_keeps_its_place_in_the_graph():
    values = torch.zeros(0, requires_grad=True)
    lengths = torch.zeros(0, dtype=torch.long)
    loss = divide(weighted_sum(segment_sum(values, lengths), None), torch.tensor(0))
    loss.backward()
    assert loss.item() == 0 and values.grad.shape == (0,)


def test_a_value_of_weight_zero_never_counts():
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")], requires_grad=True)
    numerator = weighted_sum(values, torch.tensor([2.0, 0.0, 1.0, 0.0]))
    numerator.backward()
    assert numerator.item() == 5.0 and values.grad.tolist() == [2.0, 0.0, 1.0, 0.0]


def test_divide_takes_counts_below_one():
    assert divide(torch.tensor(3.0), torch.tensor(0.5)).item() == 6.0
    assert divide(torch.tensor(0.0), torch.tensor(0)).item() == 0.0
