"""Statistics against hand-computed values, closed forms and simulated comparisons."""

import math
from pathlib import Path

import numpy as np
import pytest

from posttrain.experiments.results import RunResult
from posttrain.experiments.statistics import (
    Difference,
    cohens_d,
    compare,
    correct,
    corrected,
    over_seeds,
    paired_items,
    paired_seeds,
    rank_biserial,
)
from posttrain.experiments.verdicts import number, outcome, verdict


def run(objective: str, seed: int, metrics: dict[str, float], items: dict[str, list[float]] | None = None) -> RunResult:
    return RunResult(
        name=f"{objective}-{seed}",
        objective=objective,
        base="tiny",
        data="task",
        seed=seed,
        folder=Path("runs"),
        status="done",
        metrics=metrics,
        items={"test": items} if items else {},
    )


def test_interval_over_seeds_is_students() -> None:
    # t(0.975, 2) = 4.30265, standard error of 1, 2, 3 is 1/sqrt(3)
    found = over_seeds([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.value, found.n) == (2.0, 3)
    assert found.low == pytest.approx(2 - half) and found.high == pytest.approx(2 + half)


def test_equal_seeds_have_an_interval_without_width() -> None:
    found = over_seeds([0.5, 0.5, 0.5])
    assert (found.low, found.high) == (0.5, 0.5)


def test_one_seed_has_no_interval() -> None:
    found = over_seeds([0.25])
    assert (found.value, found.low, found.high, found.n) == (0.25, None, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_means_over_seeds_refuse_what_is_no_number(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        over_seeds(values)


def test_holm_by_hand() -> None:
    # ordered 0.01, 0.03, 0.04 times 3, 2, 1 = 0.03, 0.06, 0.04, made monotone
    assert correct([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert correct([0.9, 0.6]) == [1.0, 1.0]


def test_benjamini_hochberg_by_hand() -> None:
    # 0.01*3/1, 0.03*3/2, 0.04*3/3, monotone from above
    assert correct([0.04, 0.01, 0.03], "benjamini-hochberg") == pytest.approx([0.04, 0.03, 0.04])


def test_correction_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="holm"):
        correct([0.1], "bonferoni")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        correct([1.5])
    assert correct([]) == []


def test_untested_differences_do_not_count_as_comparisons() -> None:
    gap = Difference("m", "a", "b", gap="b did not measure it")
    one = Difference("m", "a", "b", value=1.0, low=0.0, high=2.0, p=0.02, corrected_p=0.02)
    found = corrected([gap, one, one])
    assert [each.corrected_p for each in found] == [None, 0.04, 0.04]


def test_effect_sizes_by_hand() -> None:
    assert cohens_d([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert cohens_d([1.0, 1.0]) is None
    # |d| ranks 1, 2, 3; the -2 is of rank 2: (1 + 3 - 2) / 6; the zero is left out
    assert rank_biserial([1.0, -2.0, 3.0, 0.0]) == pytest.approx(1 / 3)
    assert rank_biserial([0.0, 0.0]) == 0.0


def test_paired_items_match_the_normal_interval_of_many_items() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=2000)
    found = paired_items([base + rng.normal(0.1, 1, 2000)], [base])
    difference = found["value"]
    assert difference == pytest.approx(0.1, abs=0.05)
    assert found["high"] - difference == pytest.approx(1.96 / math.sqrt(2000), rel=0.1)
    assert found["p"] < 0.001


def test_seed_noise_widens_the_interval_as_students_does() -> None:
    # every item shifts by its seed's effect alone, so all variance lies between seeds: the t interval of the effects
    effects = np.array([0.1, 0.2, 0.6])
    base = np.random.default_rng(1).normal(size=(3, 40))
    found = paired_items(base + effects[:, None], base, resamples=99_999)
    truth = over_seeds(effects.tolist())
    assert found["value"] == pytest.approx(0.3)
    assert found["low"] == pytest.approx(truth.low, abs=0.05) and found["high"] == pytest.approx(truth.high, abs=0.05)


def test_weighted_items_give_the_mean_over_tokens() -> None:
    found = paired_items([[1.0, 2.0, math.nan]], [[0.0, 0.0, 0.0]], weights=[1.0, 3.0, 5.0], resamples=99)
    assert found["value"] == pytest.approx(7 / 4)
    assert found["items"] == 2


def test_equal_items_cannot_be_told_apart() -> None:
    found = paired_items([[0.0, 1.0, 1.0]], [[0.0, 1.0, 1.0]], resamples=99)
    assert (found["value"], found["low"], found["high"], found["p"]) == (0.0, 0.0, 0.0, 1.0)
    assert (found["cohens_d"], found["rank_biserial"]) == (None, 0.0)


def test_paired_items_need_one_shape_and_two_items() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_items([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="two items"):
        paired_items([[1.0, math.nan]], [[1.0, 2.0]])


@pytest.mark.parametrize("between_seeds", [0.0, 0.05, 0.2])
def test_intervals_cover_the_truth_whatever_the_seeds_do(between_seeds: float) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        seeds, items, rest = rng.normal(size=(3, 1)), rng.normal(size=(1, 60)), rng.normal(size=(3, 60))
        difference = 0.3 + between_seeds * seeds + 0.3 * items + 0.3 * rest
        found = paired_items(difference, np.zeros_like(difference), resamples=499)
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.9 <= covered / 200 <= 0.99


def test_paired_seeds_are_a_paired_t_test() -> None:
    # differences 1, 2, 3: t = 2 / (1/sqrt 3) = 3.4641 with 2 degrees of freedom, p = 0.0742
    found = paired_seeds([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found["p"] == pytest.approx(0.07418, abs=1e-5)
    assert (found["value"], found["seeds"]) == (2.0, 3)
    assert paired_seeds([1.0, 2.0], [1.0, 2.0])["p"] == 1.0


def test_runs_are_paired_by_seed_and_item() -> None:
    ours = [run("focal", seed, {"test/nll": 1.0}, {"nll": [1.0, 1.0], "tokens": [1, 3]}) for seed in (0, 1, 2)]
    theirs = [run("nll", seed, {"test/nll": 1.0}, {"nll": [2.0, 1.0], "tokens": [1, 3]}) for seed in (1, 2, 3)]
    found = compare("test/nll", ours, theirs, resamples=99)
    assert (found.seeds, found.items, found.gap) == (2, 2, None)
    assert found.value == pytest.approx(-0.25), "nll is a mean over tokens"


def test_metrics_without_items_are_compared_over_seeds() -> None:
    ours = [run("focal", seed, {"test/ece": value}) for seed, value in enumerate([0.1, 0.2, 0.3])]
    theirs = [run("nll", seed, {"test/ece": 0.5}) for seed in range(3)]
    found = compare("test/ece", ours, theirs)
    assert found.value == pytest.approx(-0.3) and found.items == 0 and found.seeds == 3
    assert found.p is not None and found.cohens_d is None


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ([run("a", 0, {})], [run("b", 0, {"test/m": 1.0})], "a did not measure it"),
        ([run("a", 0, {})], [run("b", 0, {})], "a and b did not measure it"),
        ([run("a", 0, {"test/m": 1.0})], [run("b", 1, {"test/m": 1.0})], "no seed finished in both"),
        ([run("a", 0, {"test/m": 1.0})], [run("b", 0, {"test/m": 1.0})], "one seed and no values per item"),
        ([run("a", 0, {"test/m": math.inf})], [run("b", 0, {"test/m": 1.0})], "a value is not finite"),
        (
            [run("a", 0, {"test/m": 1.0}, {"m": [1.0, 1.0]})],
            [run("b", 0, {"test/m": 1.0}, {"m": [1.0, 1.0, 1.0]})],
            "they were tested on different items",
        ),
    ],
)
def test_what_cannot_be_compared_is_a_gap_in_words(ours: list[RunResult], theirs: list[RunResult], words: str) -> None:
    found = compare("test/m", ours, theirs)
    assert found.gap == words
    assert found.p is None and outcome(found) == "untested"
    assert verdict(found) == f"a and b cannot be compared: {words}"


def told(metric: str, value: float, p: float, seeds: int = 3) -> Difference:
    return Difference(metric, "a", "b", value, value - 0.02, value + 0.02, p, p, items=50, seeds=seeds)


def test_verdicts_say_better_in_the_metrics_own_direction() -> None:
    assert verdict(told("test/pass@1", 0.05, 0.01)) == "a is better than b by 0.050 [0.030, 0.070]"
    assert verdict(told("test/pass@1", -0.05, 0.01)) == "a is worse than b by 0.050 [0.030, 0.070]"
    assert verdict(told("test/nll", -0.05, 0.01)) == "a is better than b by 0.050 [0.030, 0.070]"
    assert verdict(told("test/entropy", -0.05, 0.01)) == "a is lower than b by 0.050 [0.030, 0.070]"


def test_verdicts_say_when_nothing_can_be_said() -> None:
    words = verdict(told("test/pass@1", 0.01, 0.4))
    assert words == "a and b cannot be told apart: difference +0.010 [-0.010, +0.030]"


def test_verdicts_of_one_seed_say_so() -> None:
    assert "one seed" in verdict(told("test/pass@1", 0.05, 0.01, seeds=1))


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.5, "0.500"), (-12.34567, "-12.346"), (0.00012345, "0.00012")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
