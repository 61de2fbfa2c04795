"""From a user's ``objective`` to checked terms."""

import pytest
import torch

from posttrain.objectives import Loss, declare
from posttrain.terms import Available, KernelOptions, build_terms


def one(objective, **available):
    (term,) = build_terms(objective, Available(**available))
    return term


def mixed(logp, *, power=1.0):
    return -logp * power


def test_names_callables_paths_and_lists():
    assert one("nll").name == "nll"
    assert one(mixed).declaration.unit == "tokens"
    assert one("tests.test_terms:mixed").function.__name__ == "mixed"
    terms = build_terms(
        [{"name": "nll", "weight": 2}, {"name": mixed, "power": 3.0, "statistics": {"temperature": 0.5}}, "nll"],
        Available(),
    )
    assert [term.name for term in terms] == ["nll", "mixed", "nll#2"]
    assert terms[0].weight == 2.0 and terms[1].hyperparameters == {"power": 3.0}
    assert terms[1].kernel_options == KernelOptions(temperature=0.5)


def test_a_plain_function_s_unit_and_weight_are_found_out():
    def per_sequence(sum_logp):
        return Loss(-sum_logp, weight=(sum_logp < 0).float())

    term = one(per_sequence)
    assert term.declaration.unit == "sequences" and term.counts_weight and term.needs_whole_step


def test_prepare_binds_only_when_it_is_needed():
    absolute = one({"name": "probability_threshold", "threshold": 0.2})
    quantile = one({"name": "probability_threshold", "quantile": 0.5})
    assert not absolute.prepares and absolute.counts_weight
    assert quantile.prepares


def test_columns_bind_by_name():
    def weighted(logp, token_weight, bonus=None):
        return Loss(-logp, weight=token_weight)

    term = one(weighted, columns=["token_weight", "other"])
    assert term.columns == ("token_weight",)
    assert one(weighted, columns=["token_weight", "bonus"]).columns == ("token_weight", "bonus")


def test_ids_logp_asks_for_the_column_of_ids():
    term = one("logits_finetuning", columns=["teacher_ids", "teacher_ids_logp"])
    assert set(term.columns) == {"teacher_ids", "teacher_ids_logp"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("nlll", "nll"),
        ({"name": "nll", "alpah": 1}, "alpah"),
        ({"name": "probability_power", "alpah": 1}, "alpha"),
        ({"weight": 1.0}, "no `name`"),
        ({"name": "nll", "weight": "much"}, "objective.weight of 'nll' is 'much'"),
        ({"name": "nll", "statistics": {"temprature": 2}}, "temperature"),
        ([], "empty list"),
        ("forward_kl", "no teacher"),
        ("logits_finetuning", "teacher_ids"),
        (lambda logp_, *, a=1: logp_, "neither a statistic nor a column"),
        (lambda chosen_logp: chosen_logp, "no chosen completions"),
        ({"name": "nll", "statistics": {"temperature": 0}}, "statistics.temperature is 0"),
        ({"name": "nll", "statistics": {"temperature": "2"}}, "statistics.temperature is '2'"),
        ({"name": "nll", "statistics": {"k": 0}}, "statistics.k is 0"),
        ({"name": "nll", "statistics": {"jsd_beta": 2}}, "statistics.jsd_beta is 2"),
        (lambda topk_logp: topk_logp.sum(-1), "give k as"),
        (lambda head_sum_logp: head_sum_logp, "does not bind"),
        (lambda sum_length: sum_length, "neither a statistic nor a column"),
        (lambda reference_logp: reference_logp, "no reference model"),
        (lambda logp: logp.mean(), "one unreduced value per token"),
        (lambda logp: logp[:5], "5 values for 6 tokens"),
        (lambda logp: logp @ torch.ones(3), "trial call"),
        ({"name": "direct_coverage", "n": 0}, "n"),
    ],
)
def test_mistakes_fail_at_start_up_with_their_name(objective, message):
    with pytest.raises(ValueError, match=message):
        build_terms(objective, Available(columns=["score"]))


def test_a_missing_column_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'scor'.*\['score'\]"):
        build_terms(lambda logp, scor: logp * scor, Available(columns=["score"]))


def test_declared_functions_of_users_keep_their_declaration():
    @declare(unit="sequences", formula="-s", paper="none")
    def mine(sum_logp):
        return Loss(-sum_logp)

    assert one(mine).declaration.formula == "-s"


def test_a_loss_per_token_of_a_role_is_told_the_cure():
    def own(chosen_logp):
        return Loss(-chosen_logp)

    available = Available(roles=("chosen", "rejected"), reference=True, needs_role=True)
    with pytest.raises(ValueError, match="role: chosen"):
        build_terms(own, available)
    assert build_terms({"name": "nll", "role": "chosen"}, available)[0].denominator == "chosen_tokens"
