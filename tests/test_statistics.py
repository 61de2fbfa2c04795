"""The grammar of statistics, by example."""

import pytest

from posttrain.kernels.table import STATISTICS
from posttrain.statistics import ROLES, parse, signature


@pytest.mark.parametrize(
    ("name", "role", "reference", "reduction", "kernel", "unit"),
    [
        ("logp", "", False, "", "logp", "tokens"),
        ("sum_logp", "", False, "sum", "logp", "sequences"),
        ("mean_logp", "", False, "mean", "logp", "sequences"),
        ("mean_logit", "", False, "", "mean_logit", "tokens"),
        ("sum_mean_logit", "", False, "sum", "mean_logit", "sequences"),
        ("mean_square_logit", "", False, "", "mean_square_logit", "tokens"),
        ("chosen_logratio", "chosen", False, "", "logratio", "sequences"),
        ("rejected_reference_sum_logp", "rejected", True, "sum", "logp", "sequences"),
        ("chosen_head_sum_logp", "chosen", False, "head_sum", "logp", "sequences"),
        ("reference_tail_sum_logp", "", True, "tail_sum", "logp", "sequences"),
        ("sequence_logp", "", False, "", "sequence_logp", "sequences"),
        ("refusal_mean_probability", "refusal", False, "mean", "probability", "sequences"),
        ("length", "", False, "", "length", "sequences"),
    ],
)
def test_names_parse(name, role, reference, reduction, kernel, unit):
    statistic = parse(name)
    assert statistic is not None
    found = (statistic.role, statistic.reference, statistic.reduction, statistic.kernel, statistic.unit)
    assert found == (role, reference, reduction, kernel, unit)


@pytest.mark.parametrize("name", ["score_margin", "advantage", "chosen", "sum_", "reference", "logpp", "teacher_ids"])
def test_other_names_are_left_for_columns(name):
    assert parse(name) is None


def test_every_kernel_statistic_parses_with_every_role():
    for kernel in STATISTICS:
        for role in ROLES:
            statistic = parse(f"{role}_{kernel}")
            assert statistic is not None and (statistic.role, statistic.kernel) == (role, kernel)


def test_signature_sorts_parameters():
    def objective(logp, mean_logp=None, *, alpha, beta=2.0):
        return logp

    read = signature(objective)
    assert (read.required, read.optional) == (("logp",), ("mean_logp",))
    assert read.hyperparameters["beta"] == 2.0 and set(read.hyperparameters) == {"alpha", "beta"}


def test_signature_refuses_what_names_no_statistic():
    with pytest.raises(ValueError, match="keyword-only if it is a hyper-parameter"):
        signature(lambda logp, alpha=1.0: logp)
    with pytest.raises(ValueError, match="write its statistics out by name"):
        signature(lambda *statistics: statistics[0])
