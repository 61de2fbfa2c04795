"""An objective of two sides, and the dual variable of a constraint."""

import pytest
import torch

from posttrain.combination import Constraint, DualVariable, parse
from posttrain.objectives import Loss, declare


@declare(unit="tokens", formula="", paper="", role="refusal")
def of_refusals(logp):
    return Loss(-logp)


def test_terms_have_the_role_of_their_side_and_its_weight():
    objective = {
        "forget": ["nll", {"name": of_refusals, "weight": 3}],
        "retain": {"name": "nll", "weight": 0.5},
        "combine": {"sum": {"forget": 2.0, "retain": 4.0}},
    }
    found = parse(objective)
    assert [(term["role"], term["weight"]) for term in found.terms] == [("forget", 2), ("refusal", 6), ("retain", 2)]
    assert found.forgets == 2 and found.combination.constraint is None
    assert objective["retain"] == {"name": "nll", "weight": 0.5}, "what was given stays as it was"


@pytest.mark.parametrize("alone", ["nll", {"name": "nll"}, of_refusals])
def test_a_term_alone_is_to_forget(alone):
    found = parse(alone)
    assert (len(found.terms), found.forgets) == (1, 1)


def test_a_constraint_is_read():
    given = {"epsilon": 0.3, "step": 5.0, "initial": 100.0, "warmup_epochs": 5}
    found = parse({"forget": "nll", "retain": "nll", "combine": {"constraint": given}})
    assert found.combination.constraint == Constraint(**given)


REFUSED = {
    "no forget term": ({"retain": "nll"}, r"\['retain'\] and no `forget`"),
    "an empty list": ({"forget": []}, "objective.forget names no loss"),
    "nothing": ({"forget": None}, "objective.forget names no loss"),
    "a part of a term": ({"forget": {"beta": 0.2}}, r"objective.forget has the keys \['beta'\]"),
    "a part of none": ({"preset": "tnpo", "retain": {"weight": 2.0}}, r"objective.retain has the keys \['weight'\]"),
    "a list": ([{"name": "npo"}, "nll"], "objective is a list"),
    "a preset's name": ("pdu", r"write objective: \{preset: pdu\}"),
    "a preset's name to retain": ({"forget": "npo", "retain": "kl_min"}, r"objective\.retain is 'kl_min'"),
    "a strange key": ({"forget": "nll", "retian": "nll"}, "objective.retain"),
    "a strange combination": ({"forget": "nll", "combine": "sum"}, r"\{constraint: \{epsilon: 0\.3\}\}\."),
    "two combinations": ({"forget": "nll", "combine": {"sum": {}, "constraint": {}}}, "objective.combine is"),
    "an empty combination": ({"forget": "nll", "combine": {"constraint": None}}, "objective.combine is"),
    "a strange weight": ({"forget": "nll", "combine": {"sum": {"forgot": 1.0}}}, "forget"),
    "a weight that is text": ({"forget": "nll", "combine": {"sum": {"forget": "1"}}}, "combine.sum.forget is '1'"),
    "a term's weight that is text": ({"forget": {"name": "nll", "weight": "1"}}, "forget.weight is '1'"),
    "no bound": ({"forget": "nll", "retain": "nll", "combine": {"constraint": {}}}, "epsilon is missing"),
    "nothing to bound": ({"forget": "nll", "combine": {"constraint": {"epsilon": 1}}}, "objective.retain is missing"),
    "a negative bound": ({"forget": "nll", "combine": {"constraint": {"epsilon": -1}}}, "epsilon is -1"),
    "no number": ({"forget": "nll", "combine": {"constraint": {"epsilon": float("nan")}}}, "epsilon is nan"),
    "a strange setting": ({"forget": "nll", "combine": {"constraint": {"epsilom": 1}}}, "epsilon"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused(what):
    objective, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        parse(objective)


def test_the_dual_variable_climbs_by_the_violation_and_stops_at_zero():
    dual = DualVariable(Constraint(epsilon=0.5, step=2.0, initial=1.0, warmup_epochs=1.5))
    losses = [(9.0, 0.0), (9.0, 1.0), (1.0, 1.5), (0.25, 2.0), (-2.0, 2.5), (0.75, 3.0)]
    values = []
    for loss, epoch in losses:
        dual.update(torch.tensor(loss), epoch)
        values.append(float(dual.value))
    assert values == [1.0, 1.0, 2.0, 1.5, 0.0, 0.5]
    again = DualVariable(dual.constraint)
    again.load_state_dict(dual.state_dict())
    assert torch.equal(again.value, dual.value) and again.value.dtype == torch.float64
