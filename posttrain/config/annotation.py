"""``annotation:``: the columns that ``posttrain annotate`` writes beside a data set."""

import math
from dataclasses import dataclass, field
from typing import Any

from posttrain.config.inputs import DataSource, ModelConfig


@dataclass(kw_only=True)
class RewardModelConfig:
    """``annotation.reward:``: the reward model of ``reward-margins``.

    Args:
        model: the base it starts from, None for the run's own. One saved with a reward head (a sequence classifier of
            one label) is taken as trained: it scores, and nothing is trained.
        data: pairs to train it on, None for ``data.train``.
        trainer: keys of ``trl.RewardConfig``; with an ``output_dir`` the reward models are kept there.
        peft: None, or keys of ``peft.LoraConfig``, as in the run's own ``peft``.
        folds: 1 trains one model on the pairs and scores them all with it, as the MADPO paper does: its margins on the
            pairs that it was trained on are too large. From 2 on, each pair is scored by a model that saw neither the
            pair nor its prompt.
        holdout: with one fold, the share of the pairs that is not trained on, to measure the accuracy on.
        seed: of the split, and of the training unless ``trainer`` has one.

    Raises:
        ValueError: folds, or a share, that nothing can be split into.
    """

    model: ModelConfig | None = None
    data: DataSource | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    folds: int = 1
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 1:
            raise ValueError(f"annotation.reward.folds is {self.folds}; give 1, or a number of folds from 2 on.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"annotation.reward.holdout is {self.holdout}; give a share from 0 up to 1, without 1.")
        if self.folds > 1 and self.data is not None:
            raise ValueError(
                f"annotation.reward.folds is {self.folds} and annotation.reward.data is set; the margins of data.train "
                "need no folds where the reward model is trained on other pairs, so set folds to 1."
            )


@dataclass(kw_only=True)
class DensityConfig:
    """``annotation.density:``: the classifier of prompts of ``density-weights``.

    Args:
        model: an encoder or decoder whose last hidden states are averaged over the prompt; None takes the run's own.
        minimum, maximum: bounds of the weights.
        folds: of the cross-validation.
        sample: at most so many examples of a class to fit a classifier on; None takes all.
        seed: of folds and sample.

    Raises:
        ValueError: bounds that are not 0 < minimum <= maximum, or fewer than 2 folds.
    """

    model: ModelConfig | None = None
    minimum: float = 0.5
    maximum: float = 10.0
    folds: int = 5
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.maximum < math.inf:
            raise ValueError(
                f"annotation.density.minimum is {self.minimum} and maximum {self.maximum}; give positive bounds, the "
                "smaller one as minimum."
            )
        if self.folds < 2:
            raise ValueError(f"annotation.density.folds is {self.folds}; cross-validation needs 2 or more.")
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"annotation.density.sample is {self.sample}; give a number of at least 1, or null.")


@dataclass(kw_only=True)
class StepsConfig:
    """``annotation.steps:``: how ``step-rewards`` scores the steps of completions.

    Args:
        policy: the trained model, None for the one in ``trainer.output_dir``; the reference is the run's ``model``.
        beta: factor of the log-ratio; that of the training.
        separator: text between two steps, where the rows have no column ``steps``.

    Raises:
        ValueError: an empty separator, or a beta that is not above 0.
    """

    policy: ModelConfig | None = None
    beta: float = 0.05
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        if not self.separator:
            raise ValueError("annotation.steps.separator is empty; give the text that stands between two steps.")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"annotation.steps.beta is {self.beta}; give a number above 0.")


@dataclass(kw_only=True)
class AnnotationConfig:
    """``annotation:``: what ``posttrain annotate`` writes, and where.

    Args:
        output: .jsonl or .parquet file to write.
        k: entries per token of ``teacher-topk``.
        batch_size: rows per forward.
        reward, density, steps: settings of ``reward-margins``, ``density-weights`` and ``step-rewards``.
    """

    output: str | None = None
    k: int = 5
    batch_size: int = 8
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    density: DensityConfig = field(default_factory=DensityConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
