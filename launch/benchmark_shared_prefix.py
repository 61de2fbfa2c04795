"""Time of a DPO step with shared prompts, with a row for every completion, and with TRL's DPOTrainer.

    python -m launch.benchmark_shared_prefix [--device cpu] [--rounds 7] [--smoke]

Pairs of about 512 tokens a sequence, with prompt to completion as 4:1, 1:1 and 1:4, on a random Llama in float32; the
reference's log-probabilities are given to all alike. One step is what a trainer's ``compute_loss`` does, and the
backward. The trainers take turns, A B C A B C, after one step each that is not timed but whose gradient is compared
with TRL's. Set OMP_NUM_THREADS to the cores that nothing else uses. Shared prompts run with sdpa on a CPU and with
FlexAttention on a GPU. Writes launch/results/shared_prefix_cpu.{csv,md}, on a GPU shared_prefix_gpu.{csv,md}
(--smoke: runs/benchmark/).
"""

import argparse
import copy
import csv
import datetime
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from launch.benchmark.measure import synchronize
from launch.benchmark.results import ROOT, processor, spread
from posttrain import Loss, PreferenceTrainer, declare
from posttrain.modeling import worthwhile
from posttrain.run_record import git_state, hardware, versions

RATIOS = {"4:1": 0.8, "1:1": 0.5, "1:4": 0.2}
TRL, SEPARATE, SHARED = "TRL DPOTrainer", "separate rows", "shared prompts"
BETA = 0.1
MARGIN = "reference_margin"
COLUMNS = (
    "prompt_to_completion", "trainer", "pairs", "positions", "median_s", "quartile_1_s", "quartile_3_s",
    "ratio_to_trl", "ratio_to_separate", "auto", "gradient_difference", "times_s",
)  # fmt: skip


@declare(unit="pairs", formula="-log sigmoid(beta * (chosen - rejected - reference))", paper="arXiv:2305.18290, eq. 7")
def dpo_of_given_reference(
    chosen_sum_logp: Tensor, rejected_sum_logp: Tensor, reference_margin: Tensor, *, beta: float = BETA
) -> Loss:
    """DPO with the reference's difference of log-probabilities in a data column."""
    margin = chosen_sum_logp - rejected_sum_logp - reference_margin
    return Loss(-torch.nn.functional.logsigmoid(beta * margin), {})


@dataclass(frozen=True)
class Size:
    """Of the model and the micro-batch."""

    width: int
    layers: int
    vocab: int
    pairs: int
    length: int


SIZE = Size(width=384, layers=6, vocab=16_000, pairs=2, length=512)
SMOKE = Size(width=32, layers=2, vocab=500, pairs=2, length=40)


@dataclass
class Contender:
    """One trainer with its micro-batch."""

    trainer: Any
    batch: dict[str, Any]
    times: list[float] = field(default_factory=list)

    def step(self) -> float:
        """Seconds of loss and backward; the gradients stay on the model."""
        model = self.trainer.model
        model.zero_grad()
        gc.collect()
        device = next(model.parameters()).device
        synchronize(device)
        start = time.perf_counter()
        self.trainer.compute_loss(model, self.batch).backward()
        synchronize(device)
        return time.perf_counter() - start

    def gradient(self) -> Tensor:
        """All parameters' as one vector."""
        return torch.cat([p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None])


def model(size: Size, implementation: str) -> LlamaForCausalLM:
    """Random and seeded, with tied embeddings and two query heads to a key."""
    torch.manual_seed(0)
    heads = max(size.width // 64, 2)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=4 * size.length,
        tie_word_embeddings=True,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config)


def pairs(size: Size, prompt_share: float, seed: int = 0) -> list[dict[str, Any]]:
    """Token ids of prompts and completions whose lengths scatter by a tenth, and made-up reference sums."""
    draw = random.Random(seed)

    def ids(mean: float) -> list[int]:
        return [draw.randrange(3, size.vocab) for _ in range(max(round(mean * draw.uniform(0.9, 1.1)), 1))]

    rows = []
    for number in range(size.pairs):
        row: dict[str, Any] = {"prompt_ids": ids(size.length * prompt_share), "row_number": number}
        for role in ("chosen", "rejected"):
            row[f"{role}_ids"] = ids(size.length * (1 - prompt_share))
            # near what a random model says, so that the loss is not saturated
            reference = -len(row[f"{role}_ids"]) * float(torch.tensor(float(size.vocab)).log())
            row[f"ref_{role}_logps"] = reference
        row[MARGIN] = row["ref_chosen_logps"] - row["ref_rejected_logps"]
        rows.append(row)
    return rows


def trainers(size: Size, device: str, folder: str) -> dict[str, Any]:
    """Each with its own copy of the model, all in one dtype and without dropout."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "posttrain/assets/tiny_base")
    # the rows that are timed come as token ids; these only let the trainers be built
    text = Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3", MARGIN: 0.0}])
    settings: dict[str, Any] = {
        "use_cpu": device == "cpu", "bf16": False, "report_to": "none", "beta": BETA, "gradient_checkpointing": False,
        "activation_checkpointing": False, "disable_tqdm": True, "per_device_train_batch_size": 1,
    }  # fmt: skip
    flex = device == "cuda"
    own = {"train_dataset": text, "processing_class": tokenizer}
    base = model(size, "sdpa")
    args = DPOConfig(f"{folder}/trl", precompute_ref_log_probs=True, **settings)
    found: dict[str, Any] = {TRL: DPOTrainer(copy.deepcopy(base), args=args, **own)}
    del settings["beta"]
    for name, shared in ((SEPARATE, False), (SHARED, True)):
        copied = copy.deepcopy(base)
        copied.set_attn_implementation("flex_attention" if shared and flex else "sdpa")
        found[name] = PreferenceTrainer(
            copied,
            args=DPOConfig(f"{folder}/{shared}", **settings),
            objective=dpo_of_given_reference,
            reference="none",
            shared_prefix=shared,
            **own,
        )
    return found


def measure(size: Size, device: str, rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row of the table for each ratio and trainer.

    Raises:
        RuntimeError: a gradient differs from TRL's.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        everyone = trainers(size, device, folder)
        for ratio, share in RATIOS.items():
            examples = pairs(size, share)
            lengths = [[len(one[f"{part}_ids"]) for one in examples] for part in ("prompt", "chosen", "rejected")]
            implementation = "flex_attention" if device == "cuda" else "sdpa"
            pays = worthwhile(*lengths, width=size.width, implementation=implementation)
            contenders: dict[str, Contender] = {}
            for name, trainer in everyone.items():
                trainer.model.train()
                contenders[name] = Contender(trainer, trainer._prepare_inputs(trainer.data_collator(examples)))
            differences = _compare(contenders)
            for _ in range(rounds):
                for one in contenders.values():
                    one.times.append(one.step())
            for name, one in contenders.items():
                rows.append(_row(ratio, name, one, contenders, pays) | {"gradient_difference": differences[name]})
                progress(f"{ratio} {name}: {statistics.median(one.times):.3f} s")
    return rows


def _compare(contenders: dict[str, Contender]) -> dict[str, float]:
    gradients = {}
    for name, one in contenders.items():
        one.step()
        gradients[name] = one.gradient()
    truth = gradients[TRL]
    found = {name: float((gradient - truth).norm() / truth.norm()) for name, gradient in gradients.items()}
    wrong = {name: difference for name, difference in found.items() if not difference < 1e-3}
    if wrong:
        raise RuntimeError(f"gradients differ from TRL's, relative to their norm: {wrong}; nothing was timed.")
    return found


def _row(ratio: str, name: str, one: Contender, all_of_them: dict[str, Contender], pays: bool) -> dict[str, Any]:
    def median_ratio(other: str) -> float:
        # round by round, so that a machine that slows down slows both
        pairs_of_times = zip(one.times, all_of_them[other].times, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs_of_times)

    times = spread(one.times)
    return {
        "prompt_to_completion": ratio,
        "trainer": name,
        "pairs": len(one.batch["input_ids"]) if name == SHARED else len(one.batch["input_ids"]) // 2,
        "positions": one.batch["input_ids"].numel(),
        "median_s": times["time_s"],
        "quartile_1_s": times["time_q1_s"],
        "quartile_3_s": times["time_q3_s"],
        "ratio_to_trl": median_ratio(TRL),
        "ratio_to_separate": median_ratio(SEPARATE),
        "auto": ("shared" if pays else "separate") if name != TRL else "",
        "times_s": " ".join(f"{seconds:.6g}" for seconds in one.times),
    }


def report(rows: Sequence[dict[str, Any]], size: Size, device: str, rounds: int, parameters: int) -> str:
    """The table with what it was measured on."""
    git, machine = git_state(ROOT), hardware()
    used = {name: version for name, version in versions().items() if version}
    processors = f"{processor()}, {machine['cores']} cores of which {torch.get_num_threads()} compute"
    where = torch.cuda.get_device_name() if device == "cuda" else processors
    lines = [
        f"# A DPO step with shared prompts ({device})",
        "",
        f"{datetime.date.today()}, {where}, {machine['memory_bytes'] / 2**30:.0f} GiB.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in used.items())}; "
        f"commit {git['commit'][:12] if git else 'unknown'}{' with changes' if git and git['modified'] else ''}.",
        f"`python -m launch.benchmark_shared_prefix --device {device} --rounds {rounds}`",
        "",
        f"Random Llama of {parameters / 1e6:.1f} million parameters (width {size.width}, {size.layers} layers, "
        f"vocabulary {size.vocab}), float32, {size.pairs} pairs, about {size.length} tokens a sequence, loss and "
        f"backward, reference log-probabilities given. Medians (and quartiles) of {rounds} rounds, in which the "
        "trainers take turns; ratios are medians over the rounds.",
        "",
        "| prompt:completion | trainer | positions | s | time / TRL's | time / separate rows | `auto` takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['prompt_to_completion']} | {row['trainer']} | {row['positions']} | {row['median_s']:.3f} "
            f"({row['quartile_1_s']:.3f}-{row['quartile_3_s']:.3f}) | {row['ratio_to_trl']:.2f} | "
            f"{row['ratio_to_separate']:.2f} | {row['auto']} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark_shared_prefix", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, results under runs/benchmark/")
    given = parser.parse_args(arguments)
    size = SMOKE if given.smoke else SIZE
    folder = ROOT / ("runs/benchmark" if given.smoke else "launch/results")
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"shared_prefix_{'gpu' if given.device == 'cuda' else 'cpu'}.csv"
    rows = measure(size, given.device, given.rounds, print)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    parameters = sum(p.numel() for p in model(size, "sdpa").parameters())
    path.with_suffix(".md").write_text(report(rows, size, given.device, given.rounds, parameters), encoding="utf-8")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
