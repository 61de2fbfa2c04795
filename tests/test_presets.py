"""Published settings by name."""

import re

import pytest

from posttrain import objectives
from posttrain.cli import main
from posttrain.combination import Constraint, parse
from posttrain.config import from_tree
from posttrain.config.unlearning import AssistantConfig
from posttrain.presets import PRESETS, using
from posttrain.terms import Available, build_terms

ROLES = ("forget", "refusal", "retain", "retain_refusal")


@pytest.mark.parametrize("name", PRESETS)
def test_it_can_be_trained_and_names_its_source(name):
    parsed = parse({"preset": name})
    assert parsed == parse(PRESETS[name].objective)
    available = Available(columns=["teacher_ids"], roles=ROLES, reference=True, needs_role=True)
    assert len(build_terms(parsed.terms, available)) == len(PRESETS[name].terms)
    assert re.search(r"arXiv:\d{4}\.\d{5}", PRESETS[name].source)


def test_every_objective_of_the_family_is_published_somewhere():
    assert [name for name in objectives.families()["unlearning"] if not using(name)] == []


def test_the_settings_of_satimp_disagree():
    found = {}
    for name, _ in using("satimp"):
        forget, retain = parse({"preset": name}).terms
        found[name] = (forget["beta1"], forget["beta2"], forget["weight"], retain["weight"])
    assert found == {
        "satimp_yaml": (5.0, 1.0, 0.1, 1.0),
        "satimp_readme": (5.0, 1.0, 1.0, 0.1),
        "satimp_author": (5.0, 0.1, 1.0, 0.1),
    }


CONSTANTS = {
    "npo": ({"beta": 0.1}, 1.0, {}, 1.0),
    "idk_dpo": ({"beta": 0.1}, 1.0, {}, 1.0),
    "simnpo": ({"beta": 4.5, "delta": 0.0}, 0.125, {}, 1.0),
    "simnpo_author": ({"beta": 2.5, "delta": 0.0}, 0.1375, {}, 1.0),
    "wga": ({"beta": 1.0}, 1.0, {}, 1.0),
    "tnpo": ({"beta": 4.0}, 1.0),
    "wtnpo": ({"beta": 4.0, "alpha": 1.5}, 1.0),
    "ceu": ({}, 1.0),
    "undial": ({"beta": 10.0}, 1.0),
    "flat": ({"divergence": "tv"}, 1.0),
    "me_gd": ({}, 0.1, {}, 1.0),
    "idk_ap": ({}, 1.0, {"beta": 0.1}, 1.0),
    "ihl": ({"margin": 1.0}, 1.0, {}, 1.0),
    "jensun": ({}, 1.0, {"statistics": {"jsd_beta": 0.5}}, 1.0),
    "rmu": ({"scale": 2.0, "statistics": {"layer": 7}}, 1.0, {"statistics": {"layer": 7}}, 1.0),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_those_of_the_sources(name):
    found = []
    for term in parse({"preset": name}).terms:
        options = {key: value for key, value in term.items() if key not in ("name", "role", "weight")}
        found += [options, term["weight"]]
    assert tuple(found) == CONSTANTS[name]


def test_uld_is_told_with_its_assistant():
    forget, retain = parse({"preset": "uld"}).terms
    assert (forget["name"], retain["name"], retain["weight"]) == ("nll", "uniform_kl", 5.0)
    tree = {"method": "unlearning", "objective": {"preset": "uld"}, **PRESETS["uld"].beside}
    assert from_tree(tree).assistant == AssistantConfig(layers=8, alpha=0.8, filter=0.01)


@pytest.mark.parametrize("assistant", [False, True])
def test_a_preset_is_checked_against_what_is_trained(assistant):
    for name, preset in PRESETS.items():
        meant = "assistant" in preset.beside
        if meant == assistant:
            parse({"preset": name}).check_trained(assistant=assistant)
        else:
            with pytest.raises(ValueError, match=f"objective.preset is '{name}'"):
                parse({"preset": name}).check_trained(assistant=assistant)
    # terms of one's own are nobody's preset
    parse({"preset": "npo", "forget": "nll"}).check_trained(assistant=assistant)


def test_pdu_s_constraint():
    expected = Constraint(epsilon=0.3, step=5.0, initial=100.0, warmup_epochs=5)
    assert parse({"preset": "pdu"}).combination.constraint == expected
    muse = Constraint(epsilon=0.3, step=1.0, initial=50.0, warmup_epochs=3)
    assert parse({"preset": "pdu_muse"}).combination.constraint == muse


def test_what_stands_beside_the_name_replaces_that_part():
    parsed = parse({"preset": "npo", "retain": {"name": "kl"}, "combine": {"sum": {"retain": 3.0}}})
    assert [term["name"] for term in parsed.terms] == ["npo", "kl"]
    assert [term["weight"] for term in parsed.terms] == [1.0, 3.0]
    assert [term["name"] for term in parse({"preset": "npo"}).terms] == ["npo", "nll"]


def test_constants_beside_the_name_change_the_published_ones():
    def terms(objective):
        return {key: value for key, value in parse(objective).terms[0].items() if key not in ("role", "weight")}

    assert terms({"preset": "satimp_yaml", "forget": {"beta1": 2.0}}) == {"name": "satimp", "beta1": 2.0, "beta2": 1.0}
    expected = {"name": "representation_misdirection", "scale": 2.0, "statistics": {"layer": 3}}
    assert terms({"preset": "rmu", "forget": {"statistics": {"layer": 3}}}) == expected
    assert terms({"preset": "rmu"})["statistics"] == {"layer": 7}, "the table itself stays"
    bound = parse({"preset": "pdu", "combine": {"constraint": {"epsilon": 0.1}}}).combination.constraint
    assert bound == Constraint(epsilon=0.1, step=5.0, initial=100.0, warmup_epochs=5)
    summed = parse({"preset": "simnpo", "combine": {"sum": {"retain": 2.0}}}).combination
    assert (summed.forget, summed.retain) == (0.125, 2.0)
    assert parse({"preset": "pdu", "combine": {"sum": {}}}).combination.constraint is None, "another kind"
    with pytest.raises(ValueError, match=r"objective\.preset is 'npo'"):
        parse({"preset": "npo", "forget": {"beta": 0.5}}).check_trained(assistant=True)


def test_an_unknown_preset_is_refused_by_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'simnpo'"):
        parse({"preset": "simpno"})
    with pytest.raises(ValueError, match=r"did you mean 'objective\.forget'"):
        parse({"preset": "npo", "forgets": "nll"})


@pytest.mark.parametrize("name", PRESETS)
def test_show_prints_the_setting(name, capsys):
    assert main(["show", name]) == 0
    printed = capsys.readouterr().out
    assert PRESETS[name].source in printed and f"{{preset: {name}}}" in printed
    assert all(f"name: {term}" in printed for term in PRESETS[name].terms)
    assert all(f"\n  {key}:\n" in printed for key in PRESETS[name].beside)


def test_list_and_show_know_reweightings_and_presets(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in (*PRESETS, *objectives.reweightings()):
        assert re.search(rf"^  {name} ", printed, re.MULTILINE), name
    assert main(["show", "satimp"]) == 0
    assert "satimp_yaml, satimp_readme, satimp_author" in capsys.readouterr().out
    assert main(["show", "loreun_static"]) == 0
    printed = capsys.readouterr().out
    assert "statistic of the reference" in printed and "reweight:" in printed
