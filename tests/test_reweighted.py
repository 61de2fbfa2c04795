"""``reweight:`` under a term."""

from dataclasses import replace

import pytest
import torch

from posttrain import objectives
from posttrain.binding import bind
from posttrain.objectives import Loss
from posttrain.side import Block, Side
from posttrain.term import bound_inputs
from posttrain.terms import Available, build_terms


def plain(logp, *, power=1.0):
    return logp * power


def by_column(loss: Loss, importance, *, floor=0.0, sharp):
    return replace(loss, weight=(importance + floor) ** sharp)


def per_sequence(sum_logp):
    return Loss(sum_logp, weight=torch.ones_like(sum_logp))


AVAILABLE = Available(columns=["importance"], reference=True)


def one(term):
    (built,) = build_terms(term, AVAILABLE)
    return built


def test_the_names_of_both_are_bound_and_the_weight_is_counted():
    term = one({"name": "token_npo", "beta": 2.0, "reweight": {"name": "loreun", "tau": 0.5}})
    assert term.name == "token_npo" and term.hyperparameters == {"beta": 2.0, "alpha": 0.0}
    assert set(term.statistics) == {"logp", "reference_logp", "mean_logp"}
    assert term.counts_weight and term.needs_whole_step and not term.declaration.token_local
    assert term.declaration.unit == "tokens" and term.prepares and set(term.prepare_inputs) == {"mean_logp"}


@pytest.mark.parametrize(
    "setting",
    ["loreun", {"name": "loreun"}, "posttrain.objectives.reweighting:loreun"],
    ids=["name", "mapping", "path"],
)
def test_a_name_a_mapping_and_a_path(setting):
    term = one({"name": "npo", "reweight": setting})
    assert set(term.statistics) == {"logratio", "mean_logp"} and term.declaration.unit == "sequences"


def test_one_s_own_functions_and_columns():
    term = one({"name": plain, "power": 2.0, "reweight": {"name": by_column, "sharp": 1.0}})
    assert term.columns == ("importance",) and term.hyperparameters == {"power": 2.0}
    logp = torch.tensor([-1.0, -2.0])
    loss = term({"logp": logp, "importance": torch.tensor([0.5, 1.0])})
    assert loss.values.tolist() == [-2.0, -4.0] and loss.weight.tolist() == [0.5, 1.0]
    # a unit that nobody declares is found out first
    assert one({"name": per_sequence, "reweight": "loreun"}).declaration.unit == "sequences"


def side() -> Side:
    lengths = torch.tensor([2, 3, 1])
    return Side(
        target_index=torch.arange(6),
        targets=torch.arange(6),
        lengths=lengths,
        batch_row=torch.arange(3),
        row_number=torch.arange(3),
        sequence_columns={},
        token_columns={"reference_logp": torch.full((6,), -1.0)},
        num_tokens=6,
        rows=3,
        roles={"forget": Block(slice(0, 2), slice(0, 5)), "retain": Block(slice(2, 3), slice(5, 6))},
    )


def test_a_statistic_of_the_sequence_reaches_each_of_its_tokens():
    (term,) = build_terms(
        {"name": "gradient_ascent", "role": "forget", "reweight": "loreun"},
        Available(roles=("forget", "retain"), needs_role=True),
    )
    logp = torch.tensor([-1.0, -2.0, -3.0, -6.0, -3.0, -50.0])
    bound = bind(term, term.statistics, term.columns, {term.kernel_options: {"logp": logp}}, side())
    assert bound["mean_logp"].tolist() == [-1.5, -1.5, -4.0, -4.0, -4.0]
    prepared = term.prepare({"mean_logp": bound["mean_logp"]})
    loss = term(bound_inputs(term, {**bound, **prepared}))
    torch.testing.assert_close(loss.weight, (bound["mean_logp"] + 1.5).exp())


@pytest.mark.parametrize("reweight", objectives.reweightings())
@pytest.mark.parametrize("name", objectives.families()["unlearning"])
def test_it_goes_around_every_term_of_unlearning(name, reweight):
    available = Available(
        columns=["teacher_ids"],
        roles=("forget", "refusal", "retain", "retain_refusal"),
        reference=True,
        needs_role=True,
    )
    (term,) = build_terms({"name": name, "role": "forget", "reweight": reweight}, available)
    assert term.counts_weight and term.prepares and term.name == name


def test_what_an_objective_would_prepare_with_other_settings_is_no_obstacle():
    term = one({"name": "probability_threshold", "threshold": 0.2, "reweight": "loreun"})
    assert term.prepares and set(term.prepare_inputs) == {"mean_logp"}


def test_two_that_prepare_are_refused():
    with pytest.raises(ValueError, match="both prepare"):
        one({"name": "probability_threshold", "quantile": 0.5, "reweight": "loreun"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("loreum", "did you mean 'loreun'"),
        ({"tau": 1.0}, "no `name`"),
        ({"name": "loreun", "tua": 1.0}, "did you mean 'tau'"),
        ({"name": "loreun", "tau": -1.0}, r"tau is -1\.0"),
        ({"name": by_column}, "needs a value for sharp"),
        ("nll", "reweight"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(setting, message):
    with pytest.raises(ValueError, match=message):
        one({"name": "gradient_ascent", "reweight": setting})
