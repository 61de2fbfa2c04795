"""What `evaluate` takes beside row sets and tasks: data sets that are measured, and reported, together."""

from abc import ABC, abstractmethod
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.report import SourceReport


class Benchmark(ABC):
    """Several data sets with metrics of their own."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its numbers depend on beside model and rows; ready for JSON."""

    @abstractmethod
    def check(self, model: CausalLM) -> None:
        """Raise a ValueError where the model cannot be measured."""

    @abstractmethod
    def run(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        resamples: int,
        level: float,
        seed: int,
        progress: bool,
    ) -> dict[str, SourceReport]:
        """Measure a model, which comes back as it was.

        Returns:
            source name -> results; the names begin with the benchmark's own.
        """
