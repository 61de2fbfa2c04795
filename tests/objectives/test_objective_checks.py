"""Every refusal names the setting, what was found and what to do; names lead to objectives."""

import math
import sys

import pytest
import torch

from posttrain import objectives
from posttrain.objectives import checks


@pytest.mark.parametrize("found", [0, -1.0, math.nan, math.inf, True, "1e-4", None])
def test_positive(found):
    with pytest.raises(ValueError, match=r"beta is .*above 0"):
        checks.check_positive(alpha=1, beta=found)


@pytest.mark.parametrize(
    ("low", "high", "found", "allowed"),
    [
        (0, 1, 1.5, "a number from 0 to 1"),
        (0, 1, math.nan, "from 0 to 1"),
        (-1, math.inf, -2, "at least -1"),
        (-math.inf, 3, 4, "at most 3"),
        (-math.inf, math.inf, math.inf, "a finite number"),
        (0, 1, False, "from 0 to 1"),
    ],
)
def test_in_range(low, high, found, allowed):
    with pytest.raises(ValueError, match=rf"tau is {found!r}; give .*{allowed}"):
        checks.check_in_range(low, high, tau=found)
    checks.check_in_range(low, high, tau=max(low, -5) if math.isinf(high) else high)


@pytest.mark.parametrize("found", [1, 1.0, -0.1, math.nan, False, "0.5"])
def test_below_one(found):
    with pytest.raises(ValueError, match=r"decay is .*from 0 to below 1"):
        checks.check_below_one(rho=0, decay=found)


@pytest.mark.parametrize("found", [0, 1.0, "8", True])
def test_integer(found):
    with pytest.raises(ValueError, match=r"n is .*whole number of at least 1"):
        checks.check_integer(1, n=found)


def test_choice_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"keep is 'abov'; did you mean 'above'\? Choose one of above, below\."):
        checks.check_choice(("above", "below"), keep="abov")
    with pytest.raises(ValueError, match=r"keep is 3\. Choose one of"):
        checks.check_choice(("above", "below"), keep=3)


def test_shapes():
    checks.check_same_shape(a=torch.zeros(3), b=torch.zeros(3), absent=None)
    with pytest.raises(ValueError, match=r"a has \(3,\), b has \(1,\)"):
        checks.check_same_shape(a=torch.zeros(3), b=torch.zeros(1))
    with pytest.raises(ValueError, match=r"a has \(3,\), b has \(2, 5\)"):
        checks.check_same_length(a=torch.zeros(3), b=torch.zeros(2, 5))


def test_names_families_and_paths_lead_to_the_same_functions():
    families = {"supervised", "confidence", "distillation", "preference", "binary_feedback", "unlearning"}
    assert set(objectives.families()) == families
    assert sorted(objectives.names()) == sorted(name for family in objectives.families().values() for name in family)
    assert len(set(objectives.names())) == len(objectives.names())
    nll = objectives.get("nll")
    assert nll is objectives.families()["supervised"]["nll"]
    assert objectives.get("posttrain.objectives.supervised:nll") is nll


def test_families_are_a_copy():
    objectives.families()["supervised"].clear()
    assert "nll" in objectives.names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nlll", r"'nlll'; did you mean 'nll'\?.*my_package\.losses:my_loss"),
        ("focl", "did you mean 'focal'"),
        ("no_such_package.losses:mine", "no module 'no_such_package'"),
        ("posttrain.no_such:mine", r"no module 'posttrain\.no_such'"),
        ("posttrain.objectives.maths:powr", "did you mean 'power'"),
        ("math:pi", "is a float"),
        (":mine", "no dotted path"),
    ],
)
def test_a_wrong_name_is_explained(name, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name)


def test_a_mistake_inside_a_user_s_module_keeps_its_own_message(tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        objectives.get("losses_of_mine:loss")
    sys.modules.pop("losses_of_mine", None)
