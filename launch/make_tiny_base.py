"""Trains the embedded base: a small Llama with its own BPE tokenizer, on a mixture of procedural tasks.

It must stand at three points of capability, because later comparisons rest on it: one task it does well, one in
between, one it cannot do. The mixture and the number of steps decide that.
"""

import argparse
import csv
import dataclasses
import datetime
import itertools
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.assets import tiny_base_path
from posttrain.data import procedural


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. `mixture` holds the share of rows of each task."""

    seed: int = 0
    steps: int = 2200
    batch_size: int = 64
    pool_batches: int = 16
    matrix_learning_rate: float = 5e-3
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay: float = 0.3
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    prompt_weight: float = 0.1
    initializer_range: float = 0.06
    vocab_size: int = 512
    tokenizer_rows: int = 20000
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    positions: int = 1024
    mixture: dict[str, float] = dataclasses.field(
        default_factory=lambda: {
            "addition": 0.45,
            "subtraction": 0.20,
            "reverse_word": 0.15,
            "letter_count": 0.08,
            "three_term_sum": 0.07,
            "multiplication": 0.05,
        }
    )


def training_text(recipe: Recipe) -> Iterator[dict[str, str]]:
    """Endless rows of the mixture, from the train splits only."""
    chooser = random.Random(recipe.seed)
    sources = {task: procedural.generate(task, seed=recipe.seed, split="train") for task in recipe.mixture}
    tasks, weights = list(recipe.mixture), list(recipe.mixture.values())
    while True:
        yield next(sources[chooser.choices(tasks, weights)[0]])


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit and every newline is a token of its own.

    No token is added to the text by itself, so a tokenised prompt is a prefix of the tokenised prompt + completion.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = itertools.islice(training_text(recipe), recipe.tokenizer_rows)
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=recipe.positions,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        initializer_range=recipe.initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def schedule(step: int, recipe: Recipe) -> float:
    """Factor of both learning rates: linear warm-up, 1, then linear decay over the last `decay` share of the steps."""
    decay_steps = recipe.decay * recipe.steps
    return min(1.0, step / recipe.warmup_steps, (recipe.steps + 1 - step) / decay_steps)


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices, AdamW for embeddings and norms; each with its peak learning rate.

    With AdamW alone, addition stays out of reach for several thousand steps.
    """
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = set(map(id, matrices))
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.matrix_learning_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, recipe.matrix_learning_rate), (adamw, recipe.learning_rate)]


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids and the weight of each as a target, (rows, length) both.

    A prompt's numbers and words are random, so its tokens weigh little beside the answer's. Documents of similar length
    go together (less padding); there is no attention mask, for causal attention never looks at padding behind the text.
    """
    documents = training_text(recipe)
    order = random.Random(recipe.seed)
    while True:
        pool = []
        for row in itertools.islice(documents, recipe.batch_size * recipe.pool_batches):
            prompt, completion = tokenizer([row["prompt"], row["completion"] + tokenizer.eos_token])["input_ids"]
            pool.append((prompt + completion, [recipe.prompt_weight] * len(prompt) + [1.0] * len(completion)))
        pool.sort(key=lambda document: len(document[0]))
        starts = list(range(0, len(pool), recipe.batch_size))
        order.shuffle(starts)
        for start in starts:
            ids, weights = zip(*pool[start : start + recipe.batch_size], strict=True)
            yield (
                pad_sequence(
                    [torch.tensor(row) for row in ids], batch_first=True, padding_value=tokenizer.pad_token_id
                ),
                pad_sequence([torch.tensor(row) for row in weights], batch_first=True),
            )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    log_every: int = 20,
    validate_every: int = 400,
) -> list[dict[str, float]]:
    """Next-token training on whole documents.

    Returns the curve: loss (nats per token, mean since the last entry) and, every `validate_every` steps, each task's
    greedy accuracy on 50 validation problems.
    """
    optimizers = new_optimizers(model, recipe)
    source = batches(tokenizer, recipe)
    curve: list[dict[str, float]] = []
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        factor = schedule(step, recipe)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * peak
        model.train()
        ids, weights = next(source)
        logits = model(input_ids=ids).logits[:, :-1]
        token_losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        target_weights = weights[:, 1:].flatten()
        loss = (token_losses * target_weights).sum() / target_weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm, error_if_nonfinite=True)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % log_every == 0 or step == recipe.steps:
            entry = {"step": step, "loss": round(sum(losses) / len(losses), 4), "schedule": round(factor, 4)}
            losses.clear()
            if step % validate_every == 0:
                for task in recipe.mixture:
                    entry[task] = success_rate(model, tokenizer, task, problems=50, split="validation")
            curve.append(entry)
            print(f"{time.perf_counter() - start:.0f} s", json.dumps(entry), flush=True)
    return curve


@torch.no_grad()
def success_rate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    *,
    problems: int,
    samples: int = 1,
    split: str = "test",
    seed: int = 0,
) -> float:
    """Share of verified completions: `samples` per problem at temperature 1, or the greedy one where `samples` is 1."""
    model.eval()
    torch.manual_seed(seed)
    rows = procedural.make(task, size=problems, seed=seed, split=split)
    batch = tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": False}
    if samples > 1:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": samples}
    output = model.generate(**batch, max_new_tokens=16, **sampling)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(procedural.verify(task, text, rows[i // samples]) for i, text in enumerate(texts)) / len(texts)


def wilson_interval(rate: float, count: int) -> list[float]:
    """95 % interval of a share of `count` problems (conservative where the share is a mean of several samples each)."""
    z = 1.959964
    centre = (rate + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return [round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)]


def capability(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, problems: int = 200, samples: int = 8
) -> list[dict[str, Any]]:
    """One row per task: pass@1 at temperature 1 and greedy accuracy on held-out test problems."""
    table = []
    for task in recipe.mixture:
        sampled = success_rate(model, tokenizer, task, problems=problems, samples=samples)
        greedy = success_rate(model, tokenizer, task, problems=problems)
        table.append(
            {
                "task": task,
                "pass@1": round(sampled, 4),
                "pass@1_interval": wilson_interval(sampled, problems),
                "greedy": round(greedy, 4),
                "greedy_interval": wilson_interval(greedy, problems),
                "problems": problems,
                "samples": samples,
            }
        )
        print(json.dumps(table[-1]), flush=True)
    return table


CARD = """---
library_name: transformers
tags: [procedural, llama]
---
# tiny-base

The base model that posttrain brings along: a Llama of {parameters:,} parameters with a byte-level BPE tokenizer of
{vocab} tokens, trained from nothing by `launch/make_tiny_base.sh` on procedurally generated problems of the
reasoning-gym package, and on their train splits only. It stands at several points of capability, so that objectives
can be compared where a base is strong, in between and weak. It is good for nothing else.

| task | pass@1 (temperature 1) | greedy |
|---|---|---|
{rows}

200 held-out problems a task, 8 samples each. Two-digit addition is the strong point, subtraction the one in between,
multiplication the weak one. Nine in ten answers of letter_count are "1", and always saying so would score as high as
the greedy column: that number stands for no skill. Three numbers are hardly ever added right although two are. Recipe,
loss curve and 95 % intervals: launch/results/tiny_base_*.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=tiny_base_path(), help="folder of weights and tokenizer")
    parser.add_argument(
        "--results", type=Path, default=Path("launch/results"), help="folder of recipe, curve and table"
    )
    parser.add_argument("--threads", type=int, default=1, help="more than 1 changes the rounding")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe()
    tokenizer = train_tokenizer(recipe)
    model = new_model(recipe, tokenizer)
    start = time.perf_counter()
    curve = train(model, tokenizer, recipe)
    seconds = time.perf_counter() - start
    table = capability(model, tokenizer, recipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    rows = "\n".join(f"| {row['task']} | {row['pass@1']:.3f} | {row['greedy']:.3f} |" for row in table)
    card = CARD.format(parameters=model.num_parameters(), vocab=recipe.vocab_size, rows=rows)
    (arguments.output / "README.md").write_text(card)
    arguments.results.mkdir(parents=True, exist_ok=True)
    fields = ["step", "loss", "schedule", *recipe.mixture]
    with (arguments.results / "tiny_base_curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(curve)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{arguments.threads} CPU thread(s), {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "reasoning-gym")},
        "training_seconds": round(seconds),
        "recipe": dataclasses.asdict(recipe),
        "capability": table,
    }
    (arguments.results / "tiny_base_capability.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
