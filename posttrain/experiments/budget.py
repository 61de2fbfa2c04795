"""Equal budgets in tokens: how many optimizer steps read that many."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from posttrain.experiments.grid import PlannedRun

# Rows whose tokens are counted; their mean stands for the rest.
SAMPLED_ROWS = 2000


class TokenCounter:
    """Tokens that one optimizer step of a run reads on average, prompts included and padding not; counted once a data
    set and tokenizer.

    Args:
        processes: of each run's launch.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._means: dict[str, float] = {}

    def steps(self, run: PlannedRun, tokens: int) -> int:
        """The optimizer steps, at least 1, that come nearest to the budget.

        Raises:
            ValueError: packing, which makes rows of a step vary; unlearning, whose rows are of two kinds; or as loading
                the tokenizer and rows does.
        """
        if run.tree.get("method") == "unlearning":
            raise ValueError("budget.tokens counts data.train, which unlearning has not; give budget.steps.")
        args = run.tree.get("trainer") or {}
        if args.get("packing"):
            raise ValueError("budget.tokens cannot be counted with trainer.packing; give budget.steps.")
        rows = int(args.get("per_device_train_batch_size", 8)) * int(args.get("gradient_accumulation_steps", 1))
        return max(1, round(tokens / (rows * self._processes * self._mean(run.tree))))

    def _mean(self, tree: Mapping[str, Any]) -> float:
        """Tokens of one row, on average over the first rows."""
        from datasets import disable_progress_bars

        from posttrain.config import from_tree
        from posttrain.config.values import expand
        from posttrain.evaluation.rows import scored_ids
        from posttrain.loading import load_rows, load_tokenizer

        config = from_tree(expand({key: value for key, value in tree.items() if key != "objective"}))
        assert config.data.train is not None
        disable_progress_bars()
        limit = config.trainer.get("max_length", 1024)
        # another seed of a task draws other rows of the same kind
        train = {**(tree["data"]["train"]), "seed": None}
        key = json.dumps([tree.get("tokenizer"), config.model.name_or_path, train, limit], sort_keys=True)
        if key not in self._means:
            tokenizer = load_tokenizer(config.tokenizer, config.model)
            rows = islice(iter(load_rows(config.data.train, tokenizer, key="data.train")), SAMPLED_ROWS)
            lengths = [len(scored_ids(tokenizer, row)[0]) for row in rows]
            self._means[key] = sum(min(length, limit or length) for length in lengths) / len(lengths)
        return self._means[key]
