"""Unlearning methods as published: a name for each objective with its constants.

``objective: {preset: npo}`` stands for the whole setting; ``forget: {beta: 0.2}`` beside it changes a constant, and a
term with a ``name`` of its own takes the place of that part. OU is open-unlearning at d3d7cf9; learning rates and
epochs belong to ``trainer`` and are told for whoever wants to repeat a publication.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.suggest import unknown


@dataclass(frozen=True)
class Preset:
    """A published method.

    Args:
        objective: as `posttrain.combination.parse` reads it.
        source: paper, and where the constants stand.
        beside: other keys of the configuration that belong to the method; with ``assistant`` among them it is not the
            model itself that is trained.
    """

    objective: Mapping[str, Any]
    source: str
    beside: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the objectives, that of the forget side first."""
        return tuple(self.objective[side]["name"] for side in ("forget", "retain") if side in self.objective)


def _sum(forget: float = 1.0, retain: float = 1.0) -> dict[str, Any]:
    return {"sum": {"forget": forget, "retain": retain}}


_NLL = {"name": "nll"}
_RMU = {"statistics": {"layer": 7}}

PRESETS: dict[str, Preset] = {
    "gradient_ascent": Preset({"forget": {"name": "gradient_ascent"}}, "arXiv:2401.06121; OU GradAscent"),
    "grad_diff": Preset(
        {"forget": {"name": "gradient_ascent"}, "retain": _NLL, "combine": _sum()},
        "arXiv:2401.06121 (gradient difference); OU GradDiff",
    ),
    "kl_min": Preset(
        {"forget": {"name": "gradient_ascent"}, "retain": {"name": "kl"}, "combine": _sum()},
        "arXiv:2401.06121 (KL minimisation); its code counts prompt and padding in the KL, which is not repeated",
    ),
    "npo": Preset(
        {"forget": {"name": "npo", "beta": 0.1}, "retain": _NLL, "combine": _sum()}, "arXiv:2404.05868; OU NPO"
    ),
    "idk_dpo": Preset(
        {"forget": {"name": "preference_refusal", "beta": 0.1}, "retain": _NLL, "combine": _sum()},
        "arXiv:2401.06121; OU IdkDPO. With model-written alternates as data.refusal it is AltPO, arXiv:2409.13474",
    ),
    "idk_nll": Preset(
        {"forget": {"name": "refusal_nll"}, "retain": _NLL, "combine": _sum()}, "arXiv:2401.06121; arXiv:2506.12618"
    ),
    "simnpo": Preset(
        {"forget": {"name": "simnpo", "beta": 4.5, "delta": 0.0}, "retain": _NLL, "combine": _sum(0.125)},
        "arXiv:2410.07163; OU SimNPO (its YAML)",
    ),
    "simnpo_author": Preset(
        {"forget": {"name": "simnpo", "beta": 2.5, "delta": 0.0}, "retain": _NLL, "combine": _sum(0.1375)},
        "arXiv:2410.07163; the authors' TOFU forget05 configuration",
    ),
    "wga": Preset(
        {"forget": {"name": "weighted_gradient_ascent", "beta": 1.0}, "retain": _NLL, "combine": _sum()},
        "arXiv:2502.19301; OU WGA (learning rate 1e-5, 5 epochs)",
    ),
    "tnpo": Preset(
        {"forget": {"name": "token_npo", "beta": 4.0}},
        "arXiv:2502.19301; the authors' code, tnpo; with the retain term kl it is tnpo_kl",
    ),
    "wtnpo": Preset(
        {"forget": {"name": "token_npo", "beta": 4.0, "alpha": 1.5}}, "arXiv:2502.19301; the authors' code, wtnpo"
    ),
    "satimp_yaml": Preset(
        {"forget": {"name": "satimp", "beta1": 5.0, "beta2": 1.0}, "retain": _NLL, "combine": _sum(0.1, 1.0)},
        "arXiv:2505.11953; OU SatImp (its YAML)",
    ),
    "satimp_readme": Preset(
        {"forget": {"name": "satimp", "beta1": 5.0, "beta2": 1.0}, "retain": _NLL, "combine": _sum(1.0, 0.1)},
        "arXiv:2505.11953; OU SatImp (its README, and the defaults of its class)",
    ),
    "satimp_author": Preset(
        {"forget": {"name": "satimp", "beta1": 5.0, "beta2": 0.1}, "retain": _NLL, "combine": _sum(1.0, 0.1)},
        "arXiv:2505.11953; the authors' README (beta1, beta2) and code (forget + 0.1 retain)",
    ),
    "ceu": Preset(
        {"forget": {"name": "unlikelihood"}},
        "arXiv:2503.01224; OU CE-U (learning rate 1e-5), which leaves out each answer's first token",
    ),
    "undial": Preset(
        {"forget": {"name": "undial", "beta": 10.0}},
        "arXiv:2402.10052; OU UNDIAL (no retain term, learning rate 1e-4, 10 epochs; the authors train LoRA of rank 8)",
    ),
    "pdu": Preset(
        {
            "forget": {"name": "margin_flattening"},
            "retain": _NLL,
            "combine": {"constraint": {"epsilon": 0.3, "step": 5.0, "initial": 100.0, "warmup_epochs": 5}},
        },
        "arXiv:2506.05314; OU PDU (run.sh for TOFU; learning rate 1e-5, 10 epochs at 1B)",
    ),
    "pdu_muse": Preset(
        {
            "forget": {"name": "margin_flattening"},
            "retain": _NLL,
            "combine": {"constraint": {"epsilon": 0.3, "step": 1.0, "initial": 50.0, "warmup_epochs": 3}},
        },
        "arXiv:2506.05314; OU PDU (run.sh for MUSE)",
    ),
    "flat": Preset(
        {"forget": {"name": "flat", "divergence": "tv"}}, "arXiv:2410.11143; the authors' default, total variation"
    ),
    "me_gd": Preset(
        {"forget": {"name": "uniform_kl"}, "retain": _NLL, "combine": _sum(0.1)},
        "arXiv:2410.08109; the authors' ME+GD, which trains the whole sequence (prompt included) on TOFU",
    ),
    "idk_ap": Preset(
        {
            "forget": {"name": "refusal_nll"},
            "retain": {"name": "preference_retention", "beta": 0.1},
            "combine": _sum(),
        },
        "arXiv:2410.08109; the authors' IDK+AP",
    ),
    "ihl": Preset(
        {"forget": {"name": "inverted_hinge", "margin": 1.0}, "retain": _NLL, "combine": _sum()},
        "arXiv:2408.06621; the authors' TOFU code, IHL with a retain term",
    ),
    "jensun": Preset(
        {
            "forget": {"name": "jensen_refusal"},
            "retain": {"name": "jsd", "statistics": {"jsd_beta": 0.5}},
            "combine": _sum(),
        },
        "arXiv:2509.02820; the authors' code",
        {"data": {"refusal_template": "No idea"}},
    ),
    "rmu": Preset(
        {
            "forget": {"name": "representation_misdirection", "scale": 2.0, **_RMU},
            "retain": {"name": "representation_retention", **_RMU},
            "combine": _sum(),
        },
        "arXiv:2403.03218; OU RMU (layer 7 of a 1B model; the paper trains three layers' down projections alone)",
    ),
    "loreun": Preset(
        {
            "forget": {"name": "gradient_ascent", "reweight": {"name": "loreun", "tau": 1.0}},
            "retain": _NLL,
            "combine": _sum(),
        },
        "arXiv:2507.22499, dynamic weights; the paper is about images, so tau and the loss under it are ours",
    ),
    "loreun_static": Preset(
        {
            "forget": {"name": "gradient_ascent", "reweight": {"name": "loreun_static", "tau": 1.0}},
            "retain": _NLL,
            "combine": _sum(),
        },
        "arXiv:2507.22499, weights of the initial model; tau and the loss under it are ours",
    ),
    "uld": Preset(
        {"forget": _NLL, "retain": {"name": "uniform_kl"}, "combine": _sum(1.0, 5.0)},
        "arXiv:2406.08607; the authors' code (learning rate 1e-3, 10 epochs; paraphrases join the rows to forget, "
        "perturbed answers those to retain, where prompt and padding count)",
        {"assistant": {"layers": 8, "alpha": 0.8, "filter": 0.01}, "peft": {"r": 16, "lora_alpha": 32}},
    ),
}


def expand(objective: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's objective, with what stands beside its name merged into it.

    A term with a ``name``, or another kind of combination, takes the place of the preset's; without, its constants do.

    Args:
        objective: with the key ``preset``.

    Raises:
        ValueError: no preset of this name; the nearest one is suggested.
    """
    name = objective["preset"]
    if name not in PRESETS:
        raise ValueError(unknown("objective.preset", str(name), list(PRESETS)))
    published = PRESETS[name].objective
    given = {key: value for key, value in objective.items() if key != "preset"}
    for side in ("forget", "retain"):
        if changes_constants(given.get(side)):
            given[side] = _merged(published.get(side, {}), given[side])
    combine = given.get("combine")
    if isinstance(combine, Mapping) and combine.keys() == published.get("combine", {}).keys():
        given["combine"] = _merged(published["combine"], combine)
    return {**published, **given}


def changes_constants(given: Any) -> bool:
    """Whether what stands beside a preset is constants for its term, not a term of its own."""
    return isinstance(given, Mapping) and bool(given) and "name" not in given


def _merged(tree: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(tree[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping)
    }
    return {**tree, **given, **nested}


def using(name: str) -> tuple[tuple[str, str], ...]:
    """The presets in which an objective takes part, each with the side where it stands."""
    return tuple(
        (preset, side)
        for preset, found in PRESETS.items()
        for side in ("forget", "retain")
        if found.objective.get(side, {}).get("name") == name
    )
