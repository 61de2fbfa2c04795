"""Evaluation: generation (pass@k, maj@k), likelihood and calibration, with bootstrap intervals over rows."""

from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.bootstrap import Estimate, Statistic, estimate, mean, paired_difference, ratio
from posttrain.evaluation.generation import Sampling, generate
from posttrain.evaluation.harness import HarnessTask
from posttrain.evaluation.likelihood import Likelihood, likelihood
from posttrain.evaluation.passk import maj_at_k, pass_at_k
from posttrain.evaluation.plots import plot_pass_at_k
from posttrain.evaluation.report import Report, compare, comparison_table
from posttrain.evaluation.suite import Source, evaluate

__all__ = [
    "Benchmark",
    "Estimate",
    "HarnessTask",
    "Likelihood",
    "Report",
    "Sampling",
    "Source",
    "Statistic",
    "compare",
    "comparison_table",
    "estimate",
    "evaluate",
    "generate",
    "likelihood",
    "maj_at_k",
    "mean",
    "paired_difference",
    "pass_at_k",
    "plot_pass_at_k",
    "ratio",
]
