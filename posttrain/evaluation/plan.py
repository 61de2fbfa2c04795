"""What an evaluation is asked to do, checked before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.evaluation import preference, vllm
from posttrain.evaluation.generation import Sampling
from posttrain.evaluation.inference import CausalLM
from posttrain.evaluation.rows import is_pair, is_scorable, is_verifiable
from posttrain.suggest import unknown

# Kind of metric -> whether a row allows it, and what it needs.
ACCEPTS = {
    "generation": (is_verifiable, "a prompt with answer or completion, or messages that end with the assistant"),
    "likelihood": (is_scorable, "prompt with completion, messages, or text"),
    "preference": (is_pair, preference.ACCEPTS),
}

_BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class Plan:
    """`evaluate`'s settings, checked."""

    metrics: tuple[str, ...]
    sampling: Sampling
    k: tuple[int, ...]
    max_length: int | None
    resamples: int
    level: float
    progress: bool
    backend: str
    checkpoint: str | None
    reference: Callable[[], CausalLM] | None
    beta: float | None

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if metric not in ACCEPTS:
                raise ValueError(unknown("entry of metrics", metric, ACCEPTS))
        if not self.metrics:
            raise ValueError(f"metrics is empty; name at least one of {', '.join(ACCEPTS)}.")
        if self.resamples < 1 or not 0 < self.level < 1:
            raise ValueError(
                f"resamples must be positive and level within (0, 1), found {self.resamples} and {self.level}."
            )
        if self.backend not in _BACKENDS:
            raise ValueError(unknown("backend", self.backend, _BACKENDS))
        if self.backend == "vllm":
            vllm.require()
            if self.checkpoint is None:
                raise ValueError(
                    "backend is 'vllm', which loads a saved model of its own; set it for `posttrain evaluate`, and "
                    "transformers for training."
                )
        samples = self.sampling.samples
        if "generation" in self.metrics and not (self.k and min(self.k) > 0 and max(self.k) <= samples):
            raise ValueError(f"k must lie between 1 and samples={samples}, found {list(self.k)}; raise samples.")
        if "generation" in self.metrics and self.sampling.temperature == 0 and samples > 1:
            raise ValueError(
                f"temperature 0 is greedy, so samples={samples} would all be the same; set samples to 1 and k to [1], "
                "or temperature above 0."
            )
