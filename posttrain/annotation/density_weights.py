"""``density-weights``: BCO's underlying distribution matching, from embedded prompts."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich.progress import track
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedTokenizerBase

from posttrain.annotation.rows import device, rows_to_annotate, with_columns
from posttrain.annotation.texts import max_length, prompt_ids, written_prompt
from posttrain.annotation.writing import write
from posttrain.config import ModelConfig, RunConfig, TokenizerConfig
from posttrain.config.annotation import DensityConfig
from posttrain.config.schema import without_secrets
from posttrain.loading import load_model, load_tokenizer
from posttrain.modeling.engines import backbone_modules
from posttrain.run_record import version_of, versions

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Of the fitting; more than enough for standardised features.
MAX_ITERATIONS = 1000


def annotate_density_weights(config: RunConfig) -> Path:
    """Write BCO's ``density_weight`` (arXiv:2404.04656) beside prompts, completions and labels; see `density_weights`.

    Raises:
        ValueError: as in `posttrain.annotation.rows.rows_to_annotate`, `density_weights` and `embed`; an embedding
            model with an encoder and a decoder.
        ImportError: scikit-learn is not installed.
        FileExistsError: the output is there already.
    """
    settings, output = config.annotation.density, config.annotation.output
    needed = ("prompt", "completion", "label")
    rows, tokenizer = rows_to_annotate(
        config, "density-weights", method="binary_feedback", needed=needed, written=("density_weight",)
    )
    prompts = [written_prompt(tokenizer, row) for row in rows]
    texts, first, prompt = np.unique(np.array(prompts, dtype=object), return_index=True, return_inverse=True)
    model, ids = _embedding_model(config, rows.select(first), tokenizer)
    embeddings = embed(model, ids, batch_size=config.annotation.batch_size)
    desirable = np.array(rows["label"], dtype=bool)
    weights, found = density_weights(embeddings[prompt], desirable, prompt, settings)
    _warn(found, desirable, prompt)
    about = {
        "annotation": "density-weights",
        "paper": "arXiv:2404.04656",
        "embedding": (settings.model or config.model).name_or_path,
        "prompts": len(texts),
        **found,
        "density": without_secrets(dataclasses.asdict(settings)),
        "rows": len(rows),
        "versions": {**versions(), "scikit-learn": version_of("scikit-learn")},
    }
    return write(with_columns(rows, {"density_weight": weights.tolist()}), str(output), about)


def density_weights(
    embeddings: Array, desirable: Array, prompt: Array, settings: DensityConfig
) -> tuple[Array, dict[str, float]]:
    """Weights that make the prompts of undesirable examples count as those of desirable ones would.

    A logistic regression tells, from standardised embeddings and with both classes counting alike, the probability p
    that a prompt comes from a desirable example. The odds p / (1 - p) estimate the ratio of the two densities; the
    weight of an undesirable row is clip(p / (1 - p + 1e-8), minimum, maximum), that of a desirable one 1. Each p is
    predicted by a classifier that was fitted without the prompt: one that has seen it would tell the classes apart
    even where there is nothing to tell.

    Args:
        embeddings: (rows, width).
        desirable: (rows,) bool.
        prompt: (rows,) numbers; equal ones stand for one prompt, which stays in one fold.
        settings: bounds, folds, sample and seed.

    Returns:
        (rows,) weights; and the cross-validated ``auc`` with its standard error under chance, the
        ``balanced_accuracy``, and the mean weight of undesirable rows, which is about 1 (but for the bounds) where the
        classifier's probabilities are right and far above it where it is too sure of itself.

    Raises:
        ValueError: only one class, or too few prompts for the folds.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    except ImportError as error:
        raise ImportError(
            "annotate density-weights needs scikit-learn; install posttrain with the extra `evaluation`."
        ) from error
    counts = int(desirable.sum()), int((~desirable).sum())
    if min(counts) == 0:
        missing = "desirable" if counts[0] == 0 else "undesirable"
        raise ValueError(f"data.train has no {missing} example; density weights compare the prompts of two classes.")
    p = _out_of_fold(embeddings, desirable, prompt, settings)
    weights = np.where(desirable, 1.0, np.clip(p / (1 - p + 1e-8), settings.minimum, settings.maximum))
    return weights, {
        "auc": float(roc_auc_score(desirable, p)),
        "auc_standard_error": math.sqrt((len(p) + 1) / (12 * counts[0] * counts[1])),
        "balanced_accuracy": float(balanced_accuracy_score(desirable, p > 0.5)),
        "mean_undesirable_weight": float(weights[~desirable].mean()),
    }


def _out_of_fold(embeddings: Array, desirable: Array, prompt: Array, settings: DensityConfig) -> Array:
    """(rows,) probability of the desirable class, by the classifier that was not fitted on the row's prompt."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fewest = min(len(np.unique(prompt[desirable])), len(np.unique(prompt[~desirable])))
    if fewest < settings.folds:
        raise ValueError(
            f"annotation.density.folds is {settings.folds}, and one of the classes has only {fewest} different "
            "prompts; lower it."
        )
    rng = np.random.default_rng(settings.seed)
    p = np.empty(len(desirable))
    folds = StratifiedGroupKFold(settings.folds, shuffle=True, random_state=settings.seed)
    for inside, outside in folds.split(embeddings, desirable, prompt):
        fitted = np.concatenate([_sample(inside[desirable[inside] == one], settings.sample, rng) for one in (0, 1)])
        classifier = make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS)
        )
        classifier.fit(embeddings[fitted], desirable[fitted])
        p[outside] = classifier.predict_proba(embeddings[outside])[:, 1]
    return p


def _sample(rows: Array, size: int | None, rng: np.random.Generator) -> Array:
    return rows if size is None or size >= len(rows) else rng.choice(rows, size, replace=False)


def _warn(found: dict[str, float], desirable: Array, prompt: Array) -> None:
    shared = float(np.isin(prompt[~desirable], prompt[desirable]).mean())
    if shared > 0.5:
        logger.warning(
            "%.0f %% of the undesirable examples have a prompt that a desirable example has too, as in pairs; the "
            "density of their prompts is the same, and weights other than 1 are noise.",
            100 * shared,
        )
    if found["auc"] < 0.5 + 2 * found["auc_standard_error"]:
        logger.warning(
            "The prompts of desirable and undesirable examples cannot be told apart (cross-validated AUC %.3f, chance "
            "is 0.5 ± %.3f); density weights will do nothing but add noise.",
            found["auc"],
            2 * found["auc_standard_error"],
        )


def _embedding_model(
    config: RunConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> tuple[nn.Module, list[list[int]]]:
    """The model that embeds, and each row's prompt in its tokens: the policy's as it reads them, another's as text."""
    given = config.annotation.density.model
    if given is None:
        length = max_length(config)
        model: nn.Module = backbone_modules(load_model(config.model)).backbone
        ids = [prompt_ids(tokenizer, row)[:length] for row in rows]
    else:
        model, ids = _other_model(given, [_plain(row["prompt"]) for row in rows])
    return model.to(device(config)).eval(), ids


def _other_model(given: ModelConfig, texts: Sequence[str]) -> tuple[nn.Module, list[list[int]]]:
    model = load_model(given, key="annotation.density.model", kind=AutoModel)
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"annotation.density.model {given.name_or_path!r} has an encoder and a decoder; take a model that is one "
            "of the two."
        )
    tokenizer = load_tokenizer(TokenizerConfig(), given)
    length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    options = {"truncation": True, "max_length": min(length, tokenizer.model_max_length)}
    return model, tokenizer(list(texts), **options)["input_ids"]


def _plain(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"] or "") for message in prompt)


@torch.no_grad()
def embed(model: nn.Module, prompts: Sequence[Sequence[int]], *, batch_size: int, progress: bool = True) -> Array:
    """Mean of the last hidden states over each prompt's tokens.

    Args:
        model: an encoder or a decoder's backbone, in eval mode.
        prompts: token ids.

    Returns:
        (prompts, width) float64.

    Raises:
        ValueError: a prompt without a token.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} of the different prompts of data.train is empty; drop its rows.")
    found: list[Array] = []
    place = next(model.parameters()).device
    for start in track(range(0, len(prompts), batch_size), description="Embedding prompts", disable=not progress):
        ids = [torch.tensor(one) for one in prompts[start : start + batch_size]]
        mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True).to(place)
        hidden = model(input_ids=pad_sequence(ids, batch_first=True).to(place), attention_mask=mask)[0].double()
        found.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy())
    return np.concatenate(found)
