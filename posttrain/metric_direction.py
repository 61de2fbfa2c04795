"""Which way a metric gets better; without imports, because commands that load no model ask too."""

LOWER_IS_BETTER = frozenset(
    {
        "nll",
        "perplexity",
        "expected_calibration_error",
        "margin_brier_score",
        "margin_calibration_error",
        "margin_nll",
        # of lm-evaluation-harness
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "brier_score",
        "ter",
        "wer",
        "likelihood_diff",
        "pct_stereotype",
        # of unlearning
        "forget_ks_geometric",
        "forget_ks_arithmetic",
    }
)
# Neither way: a model may be too sure or too unsure, a margin too small or too large, and one that stands out by what
# it has forgotten leaks that.
NO_DIRECTION = frozenset(
    {
        "entropy",
        "logratio_margin",
        "rejected_logp_change",
        "privleak",
        "privleak_to_half",
        "mia_loss_auc",
        "mia_min_k_auc",
        "mia_min_k_plus_plus_auc",
        "mia_zlib_auc",
        "mia_reference_auc",
        "mia_min_k",
    }
)


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is.

    On a source to be forgotten knowing less is wanted, but not without bound: only metrics made for forgetting, with
    ``forget`` or ``robustness`` in their own name, have a direction there.

    Args:
        metric: its name, with or without its source in front (``reverse_word/nll``).
    """
    source, _, name = metric.rpartition("/")
    # lm-evaluation-harness writes the filter of the answers behind the metric
    name = name.partition(",")[0]
    of_forgetting = "forget" in name or "robustness" in name
    if name in NO_DIRECTION or ("forget" in source and not of_forgetting):
        return 0
    return -1 if name in LOWER_IS_BETTER else 1
