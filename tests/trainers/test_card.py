"""A model card names the objectives and their paper."""

from posttrain.terms import Available, build_terms
from posttrain.trainers.card import card_of


def test_the_first_paper_that_is_declared():
    available = Available(columns=["score_margin"], roles=("chosen", "rejected"), reference=True, needs_role=True)
    terms = build_terms([{"name": "nll", "role": "chosen"}, "mmpo"], available)
    name, paper = card_of(terms)
    assert name == "posttrain: nll + mmpo" and paper["id"] == "2410.03145" and "mmpo" in paper["title"]


def test_no_paper():
    assert card_of(build_terms("nll", Available())) == ("posttrain: nll", {})
