"""Which way a metric gets better; without imports, because commands that load no model ask too."""

LOWER_IS_BETTER = frozenset({"nll", "perplexity", "expected_calibration_error"})
# Neither way: a model may be too sure or too unsure.
NO_DIRECTION = frozenset({"entropy"})
