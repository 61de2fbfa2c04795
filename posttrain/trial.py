"""One call of an objective on made-up numbers, before anything is trained."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posttrain.objectives import Declaration
from posttrain.statistics import TOKEN_COLUMNS, Statistic
from posttrain.term import Term, bound_inputs, prepare_inputs

_TOKENS, _LENGTH, _IDS, _WIDTH = 6, 2, 3, 4


def made_up(name: str, statistic: Statistic | None, tokens: int = _TOKENS, ids: int = _IDS) -> Tensor:
    """A plausible constant in the shape of a statistic or column of so many tokens, `_LENGTH` to a sequence."""
    if statistic and statistic.kernel == "hidden":
        return torch.full((tokens, _WIDTH), 0.5)
    if name in TOKEN_COLUMNS or (statistic and statistic.kernel in ("ids_logp", "topk_logp", "topk_ids")):
        if "ids_logp" not in name and "topk_logp" not in name:
            return torch.arange(ids).expand(tokens, ids)
        return torch.full((tokens, ids), -1.25)
    per_sequence = statistic is not None and statistic.unit == "sequences"
    value = -0.5 if name.endswith("logp") or name.endswith("log_sum_sq_probs") else 0.5
    if statistic is not None and statistic.kernel == "length":
        value = float(_LENGTH)
    return torch.full((tokens // _LENGTH if per_sequence else tokens,), value)


def dry_run(term: Term, name: str) -> Term:
    """Call the objective once on made-up numbers: bad hyper-parameters and shapes fail at start-up, not at step 1.

    It also tells what a plain function does not declare: its unit, and whether it returns a weight.
    """
    found = tuple(term.statistics.values())
    per_sequence = all(item.unit == "sequences" for item in found) and bool(found)
    per_token = hasattr(term.function, "declaration") and term.declaration.unit == "tokens"
    per_pair = any(item.role in ("chosen", "rejected") for item in found)

    def examples(statistics: Mapping[str, Statistic], columns: Collection[str]) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        for key, item in statistics.items():
            example = made_up(key, item)
            made[key] = example.repeat_interleave(_LENGTH, dim=0) if per_token and item.unit == "sequences" else example
        for column in columns:
            whole = made_up(column, None)
            short = per_sequence and not per_token and whole.dim() == 1
            made[column] = whole[: _TOKENS // _LENGTH] if short else whole
        return made

    inputs = examples(term.statistics, term.columns)
    try:
        state = term.new_state()
        remembered = state.tensors() if state else {}
        to_prepare = {**examples(term.prepare_inputs, term.prepare_columns), **remembered}
        prepared = term.prepare(prepare_inputs(term, to_prepare)) if term.prepares else {}
        loss = term(bound_inputs(term, {**inputs, **remembered, **prepared}))
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"objective {name!r} failed on a trial call with made-up statistics: {type(error).__name__}: {error}"
        ) from error
    roles = sorted({statistic.role for statistic in found if statistic.role})
    if roles and not term.role and loss.values.shape[0] == _TOKENS:
        raise ValueError(
            f"objective {name!r} returns one value per token of {' and '.join(roles)} completions; ask for the plain "
            f"statistics (logp instead of {roles[0]}_logp) and set `role: {roles[0]}` beside its name."
        )
    changes: dict[str, Any] = {"name": name}
    if loss.weight is not None:
        changes["counts_weight"] = True
    if not hasattr(term.function, "declaration"):
        units = {_TOKENS: "tokens", _TOKENS // _LENGTH: "pairs" if per_pair else "sequences"}
        if loss.values.shape[0] not in units:
            raise ValueError(
                f"objective {name!r} returned {loss.values.shape[0]} values for {_TOKENS} tokens in "
                f"{_TOKENS // _LENGTH} sequences; return one value per token or one per sequence or pair."
            )
        changes["declaration"] = Declaration(units[loss.values.shape[0]], "", "")  # type: ignore[arg-type]
    return replace(term, **changes)
