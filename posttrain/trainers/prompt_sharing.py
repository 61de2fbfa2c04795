"""Whether the pairs of a micro-batch share their prompt's row: the setting ``shared_prefix``."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from posttrain.data.preference_collation import PairCollator
from posttrain.modeling import causal_lm, shared_prefix_obstacle, worthwhile

logger = logging.getLogger(__name__)


def check_setting(setting: bool | str) -> bool | str:
    """Raise a ValueError unless it is ``auto``, true or false."""
    if setting != "auto" and not isinstance(setting, bool):
        raise ValueError(f"shared_prefix is {setting!r}; give auto, true or false.")
    return setting


def prompt_sharing(setting: bool | str, models: Sequence[nn.Module]) -> Callable[..., bool] | None:
    """The collator's ``shares_prompts``; None where prompts are never shared.

    Args:
        setting: ``auto`` shares them in the micro-batches where that pays, if the models allow it.
        models: the policy first, then what else runs on the same batches.

    Raises:
        ValueError: true for a model that cannot share prompts exactly.
    """
    if setting is False:
        return None
    obstacle = next((found for found in map(shared_prefix_obstacle, models) if found is not None), None)
    if obstacle is not None:
        if setting is True:
            raise ValueError(obstacle)
        logger.info("shared_prefix is auto and not used. %s", obstacle)
        return None
    if setting is True:
        return always
    config = causal_lm(models[0]).config.get_text_config()
    return functools.partial(worthwhile, width=config.hidden_size, implementation=config._attn_implementation)


def separate_rows(collator: Any) -> Any:
    """The collator with a row for each completion.

    What is computed once and kept must not depend on a layout that the trial before the first step may refuse.
    """
    return dataclasses.replace(collator, shares_prompts=None) if isinstance(collator, PairCollator) else collator


def always(*lengths: Sequence[int]) -> bool:
    """For every micro-batch."""
    return True
