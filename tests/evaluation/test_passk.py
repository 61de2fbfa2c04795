from itertools import combinations

import numpy as np
import pytest

from posttrain.evaluation.passk import maj_at_k, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    hits = np.array([[index < count for index in range(samples)] for count in range(samples + 1)])
    for k in range(1, samples + 1):
        subsets = list(combinations(range(samples), k))
        expected = [sum(any(row[i] for i in subset) for subset in subsets) / len(subsets) for row in hits]
        np.testing.assert_allclose(pass_at_k(hits, k), expected, rtol=1e-12, atol=1e-15)


def test_pass_at_k_stays_exact_where_binomials_overflow():
    # c = 1 of n: the one correct sample is among k of n with probability k / n.
    hits = np.zeros((1, 4000), dtype=bool)
    hits[0, 17] = True
    np.testing.assert_allclose(pass_at_k(hits, 1000), [0.25], rtol=1e-10)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} with 3 samples"):
        pass_at_k(np.ones((2, 3), dtype=bool), k)
    with pytest.raises(ValueError, match=f"k={k} with 3 samples"):
        maj_at_k([["a"] * 3] * 2, np.ones((2, 3), dtype=bool), k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [True, True, False], 1.0),
        (["7", "3", "3"], [True, False, False], 0.0),
        (["7", "3", "5"], [True, False, False], 1 / 3),  # three answers tie, one of them is right
        (["7", "7", "3", "3"], [True, True, False, False], 0.5),
        ([None, None, "7"], [False, False, True], 1.0),  # unread answers do not vote
        ([None, None, None], [False, False, False], 0.0),
        (["7", "7", "3"], [True, False, False], 0.5),  # one answer judged both ways
    ],
)
def test_majority_vote_by_hand(answers, correct, expected):
    assert maj_at_k([answers], [correct], len(answers)) == pytest.approx([expected])


def test_only_the_first_k_samples_vote():
    answers, correct = ["3", "7", "7", "7"], [False, True, True, True]
    assert [float(maj_at_k([answers], [correct], k)[0]) for k in (1, 2, 3, 4)] == [0.0, 0.5, 1.0, 1.0]


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="both be"):
        maj_at_k([["a"]], np.ones((1, 2), dtype=bool), 1)
    with pytest.raises(ValueError, match=r"\(items, samples\)"):
        pass_at_k([True, False], 1)
