"""What holds for each declared objective, so that a new one is checked by existing."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

from posttrain import combination, objectives
from posttrain.config import load
from posttrain.objectives import Loss
from posttrain.statistics import TOKEN_COLUMNS, parse, signature
from posttrain.terms import Available, build_terms
from tests.objectives.truth import DTYPES, gradient

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = objectives.names()
LETTERS = {"alpha", "beta", "gamma", "epsilon", "tau", "lam", "n", "c_min", "c_max", "label_smoothing"}
WORDS = {"desirable_weight", "undesirable_weight", "threshold", "quantile", "keep", "inner", "gradient"}
WORDS |= {"divergence", "form", "delta", "rho", "decay", "seed", "shift", "beta1", "beta2", "margin", "scale"}
# data columns that an objective may ask for, one number a unit
COLUMNS = {"chosen_win_probability", "rejected_win_probability", "score_margin", "preference_probability"}
COLUMNS |= {"reward_margin", "desirable", "density_weight"}
# optional columns that stand in for others
ALTERNATIVES = {"mmpo": "preference_probability"}
# statistics that an objective holds constant somewhere, so that the value's own slope is not its gradient
HELD = {
    "direct_coverage": {"mean_logp"},
    "tdpo": {"chosen_sum_forward_kl"},
    "aot_unpaired": {"rejected_logratio"},
    "wpo": {f"{role}_mean_{kernel}" for role in ("chosen", "rejected") for kernel in ("logp", "log_sum_sq_probs")},
}
# objectives that hold a token's weight constant on purpose: the value's own slope is not the gradient
CONSTANT_WEIGHT = {"dft", "weighted_gradient_ascent", "satimp"}
# what an objective needs to be called at all, beyond its defaults
NEEDED = {"probability_threshold": {"quantile": 0.5}, "direct_coverage": {"n": 8}}
UNITS = {"tokens": 12, "sequences": 4, "pairs": 4}


def options(name):
    return NEEDED.get(name, {})


def made_up(name, dtype=torch.float64, units=None, seed=0):
    """Inputs of plausible size by the names in the signature, prepared and remembered ones included."""
    declaration = objectives.get(name).declaration
    count = UNITS[declaration.unit] if units is None else units
    generator = torch.Generator().manual_seed(seed)
    read = signature(objectives.get(name))
    inputs = {}
    for parameter in (*read.required, *read.optional):
        if parameter == ALTERNATIVES.get(name):
            continue
        if parameter in COLUMNS:
            inputs[parameter] = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)
        elif parse(parameter) or parameter in TOKEN_COLUMNS:
            inputs[parameter] = made_up_statistic(parameter, count, generator).to(dtype).requires_grad_()
    remembered = {key: value for key, value in state(name).items() if key in read.required}
    return inputs | remembered | ({} if declaration.prepare is None else prepare(name, inputs))


def made_up_statistic(parameter, count, generator):
    shape = (count, 3) if "ids_logp" in parameter or parameter.endswith("hidden") else (count,)
    values = 0.05 + 3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    # no logit lies above it
    values = values + 3 if parameter == "logsumexp" else values
    return -values if parameter.endswith("logp") else values


def state(name):
    """The tensors of the objective's state as it starts."""
    cls = objectives.get(name).declaration.state
    return {} if cls is None else cls(**accepted(cls, name)).tensors()


def accepted(function, name):
    """Those of the objective's hyper-parameters that a function takes."""
    merged = {**signature(objectives.get(name)).hyperparameters, **options(name)}
    return {key: value for key, value in merged.items() if key in signature(function).hyperparameters}


def prepare(name, inputs):
    """What the objective's own ``prepare`` makes of the inputs, taken as the whole step."""
    function = objectives.get(name).declaration.prepare
    first = next(iter(inputs.values()))
    generator = torch.Generator().manual_seed(1)
    given = {}
    for key in signature(function).required:
        if key in inputs:
            given[key] = inputs[key].detach()
        elif parse(key):
            given[key] = made_up_statistic(key, first.shape[0], generator).to(first.dtype)
    remembered = {key: value for key, value in state(name).items() if key in signature(function).required}
    return function(**given, **remembered, **accepted(function, name))


def differentiable(inputs):
    return [key for key, value in inputs.items() if value.requires_grad and key not in TOKEN_COLUMNS]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_declared_in_full(name):
    declaration = objectives.get(name).declaration
    assert declaration.unit in UNITS
    assert declaration.formula and "\n" not in declaration.formula
    assert name == "nll" or re.search(r"arXiv:\d{4}\.\d{4,5}", declaration.paper)
    assert declaration.prepare is None or declaration.prepare.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_says_what_goes_in_and_out(name):
    function = objectives.get(name)
    text = inspect.getdoc(function)
    assert text.splitlines()[0].endswith((".", ":"))
    for part in ("Args:", "Returns:", "radient", f"({function.declaration.unit},)"):
        assert part in text, part
    read = signature(function)
    if read.hyperparameters or len(read.required) > 1:
        assert "Raises:" in text
    for parameter in (*read.required, *read.optional, *read.hyperparameters):
        assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), parameter


@pytest.mark.parametrize("name", NAMES)
def test_its_parameters_are_statistics_and_hyperparameters(name):
    function = objectives.get(name)
    read = signature(function)
    assert set(read.hyperparameters) <= LETTERS | WORDS
    prepared = set() if function.declaration.prepare is None else set(prepare(name, made_up(name)))
    others = prepared | set(state(name)) | COLUMNS | set(TOKEN_COLUMNS)
    for parameter in (*read.required, *read.optional):
        assert parse(parameter) or parameter in others, parameter
    hints = inspect.signature(function).parameters.values()
    assert all(parameter.annotation is not parameter.empty for parameter in hints)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_per_unit_metrics_detached_inputs_untouched(name, dtype):
    function = objectives.get(name)
    inputs = made_up(name, dtype)
    before = {key: value.detach().clone() for key, value in inputs.items()}
    loss = function(**inputs, **options(name))
    count = UNITS[function.declaration.unit]
    assert isinstance(loss, Loss)
    assert loss.values.shape == (count,) and loss.values.dtype == dtype and loss.values.requires_grad
    for metric in loss.metrics.values():
        assert metric.shape in ((count,), ()) and not metric.requires_grad and metric.isfinite().all()
    assert (loss.weight is not None) == function.declaration.model_weight
    if loss.weight is not None:
        assert loss.weight.shape == (count,) and not loss.weight.requires_grad and (loss.weight >= 0).all()
    assert all(torch.equal(before[key], value) for key, value in inputs.items())
    again = function(**inputs, **options(name))
    assert torch.equal(again.values, loss.values)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONSTANT_WEIGHT])
def test_its_gradient_is_that_of_finite_differences(name):
    inputs = made_up(name)
    keys = [key for key in differentiable(inputs) if key not in HELD.get(name, ())]

    def values(*changed):
        return objectives.get(name)(**{**inputs, **dict(zip(keys, changed, strict=True))}, **options(name)).values

    assert torch.autograd.gradcheck(values, tuple(inputs[key] for key in keys))


@pytest.mark.parametrize("name", NAMES)
def test_units_do_not_see_each_other(name):
    inputs = made_up(name)
    loss = objectives.get(name)(**inputs, **options(name))
    part = {key: value[1:3] if value.dim() else value for key, value in inputs.items()}
    torch.testing.assert_close(objectives.get(name)(**part, **options(name)).values, loss.values[1:3])


def varies(key):
    """A statistic of the model; a length stays as it is, lest a ratio of sum and length does too."""
    statistic = parse(key)
    return statistic is not None and statistic.kernel != "length"


@pytest.mark.parametrize("name", NAMES)
def test_token_local_is_declared_where_it_holds_and_nowhere_else(name):
    """One token's statistics change: its own value alone may follow, and no weight."""
    declaration = objectives.get(name).declaration
    plain = made_up(name)
    loss = objectives.get(name)(**plain, **options(name))
    others = torch.arange(UNITS[declaration.unit]) != 2
    local = declaration.unit == "tokens"
    for factor in (1e-3, 50.0):
        changed = {key: value.detach().clone() for key, value in plain.items() if varies(key)}
        for value in changed.values():
            value[2] *= factor
        prepared = plain if declaration.prepare is None else prepare(name, changed)
        found = objectives.get(name)(**{**plain, **prepared, **changed}, **options(name))
        local &= torch.equal(found.values[others], loss.values[others])
        local &= loss.weight is None or torch.equal(found.weight, loss.weight)
        assert not torch.equal(found.values[2], loss.values[2])
    assert declaration.token_local == local


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_unit_has_no_loss_and_a_finite_gradient(name):
    inputs = made_up(name, units=0)
    loss = objectives.get(name)(**inputs, **options(name))
    assert loss.values.shape == (0,)
    for key in differentiable(inputs):
        assert gradient(loss.values, inputs[key]).numel() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if len(differentiable(made_up(name))) > 1])
def test_shapes_that_would_broadcast_are_refused(name):
    inputs = made_up(name)
    for key in differentiable(inputs):
        with pytest.raises(ValueError, match=key):
            objectives.get(name)(**{**inputs, key: inputs[key][:1]}, **options(name))


def lines_of(path):
    """Lines of a YAML file that set something."""
    return [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("name", NAMES)
def test_its_example_is_complete_and_commented(name):
    (path,) = CONFIGS.glob(f"*/{name}.yaml")
    config = load(path)
    objective = combination.parse(config.objective).terms if config.method == "unlearning" else config.objective
    terms = objective if isinstance(objective, list) else [objective]
    terms = [{"name": term} if isinstance(term, str) else term for term in terms]
    (mine,) = (term for term in terms if term["name"] == name)
    assert set(signature(objectives.get(name)).hyperparameters) <= set(mine)
    methods = {"preference": {"roles": ("chosen", "rejected")}, "binary_feedback": {"roles": ("mismatched",)}}
    columns = {*TOKEN_COLUMNS, *COLUMNS} - {ALTERNATIVES.get(name)}
    available = {"columns": columns, "teacher": config.teacher is not None}
    if config.method in methods:
        available |= {"reference": True, **methods[config.method]}
    if config.method == "unlearning":
        sides = [role for role in ("forget", "retain") if getattr(config.data, role) is not None]
        refusals = ["refusal", "retain_refusal"] if config.data.refusal is not None else []
        available |= {"reference": True, "roles": (*sides, *refusals), "needs_role": True}
    built = build_terms(objective, Available(**available))
    assert name in [term.name for term in built] and all(math.isfinite(term.weight) for term in built)
    assert config.trainer["output_dir"] == f"runs/{name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_its_example_is_commented(name):
    (path,) = CONFIGS.glob(f"*/{name}.yaml")
    for line in lines_of(path):
        section = line.rstrip().endswith(":")
        assert section or re.search(r"\s# \S", line), line
