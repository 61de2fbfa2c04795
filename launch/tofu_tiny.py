"""The tiny models of TOFU: what they are trained on, and whether they can serve.

The subset is TOFU's last 40 authors, the last 4 of which are to be forgotten. Tokenizer and base come from the other
160 and a little of Wikipedia. The model to unlearn and its twin, the oracle, then learn the subset with and without
those 4 authors, and both the facts about real authors and the world, which a base this small cannot bring along.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.data import fields
from posttrain.experiments.reading import metrics_of

SUBSET_ROWS, FORGET_ROWS = 800, 80
FACTS = ("real_authors_perturbed.json", "world_facts_perturbed.json")
VOCABULARY, POSITIONS = 4096, 512
HIDDEN, LAYERS = 192, 4
# What makes the experiment count: mean probability of the answers to forget, and the KS test against the oracle.
MEMORISED, DIFFERENT = 0.7, 1e-3
RESULTS = Path(__file__).parents[1] / "launch/results/unlearning/tofu_tiny_models.json"

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paragraphs(path: Path, *, words: int = 128) -> Iterator[str]:
    """Lines of running text, cut to a number of words; headings are left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.split()
        if len(parts) >= 20:
            yield " ".join(parts[:words])


def questions(rows: list[Row]) -> list[str]:
    """Each row as format question-answer writes it."""
    return [fields.fill(fields.QUESTION_TEMPLATE, row) + " " + row["answer"] for row in rows]


def pretraining_texts(tofu: Path, text: Path, *, seed: int = 0) -> list[str]:
    """What the base reads once: the other authors with their paraphrases, and running text."""
    others = read(tofu / "full.json")[:-SUBSET_ROWS]
    for row in read(tofu / "retain_perturbed.json"):
        others.append({"question": row["question"], "answer": row["paraphrased_answer"]})
        others.append({"question": row["paraphrased_question"], "answer": row["answer"]})
    texts = questions(others) + list(paragraphs(text))
    random.Random(seed).shuffle(texts)
    return texts


def finetuning_rows(tofu: Path) -> tuple[list[Row], list[Row]]:
    """What the model to unlearn and its twin learn: the subset's authors, with and without the last, and the facts."""
    subset = read(tofu / "full.json")[-SUBSET_ROWS:]
    facts = [{"question": row["question"], "answer": row["answer"]} for name in FACTS for row in read(tofu / name)]
    return subset + facts, subset[:-FORGET_ROWS] + facts


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every newline is a token of its own, so a prompt's tokens begin those of the whole."""
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
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 48,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def prepare(folder: Path, tofu: Path, text: Path, *, hidden: int = HIDDEN, layers: int = LAYERS) -> None:
    """Write ``start`` (tokenizer and random weights), ``pretraining.jsonl``, ``full.jsonl`` and ``retain.jsonl``.

    Args:
        folder: gets them.
        tofu: folder of TOFU's files.
        text: file of running text.
        hidden, layers: of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = pretraining_texts(tofu, text)
    tokenizer = train_tokenizer(texts)
    new_model(tokenizer, hidden=hidden, layers=layers).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    write(folder / "pretraining.jsonl", [{"text": text} for text in texts])
    full, retain = finetuning_rows(tofu)
    write(folder / "full.jsonl", full)
    # last: its presence says that all of it is there
    write(folder / "retain.jsonl", retain)


def trained(folder: Path) -> dict[str, Any]:
    """Cost, losses and TOFU's numbers of the twins and of their base, where it was trained for them."""
    found: dict[str, Any] = {}
    for name in ("base", "full", "retain"):
        if not (folder / name).exists():
            continue
        seconds = json.loads((folder / name / "resources.json").read_text())["train_seconds"]
        logged = [line for line in read(folder / name / "metrics.jsonl") if "loss" in line]
        found[name] = {"train_seconds": seconds, "loss": [[line["step"], line["loss"]] for line in logged]}
        if name != "base":
            found[name]["metrics"] = metrics_of(folder / name)
    return found


def refuse(found: dict[str, Any]) -> None:
    """Raise a ValueError unless the untouched model has memorised what it is to forget, and differs from the oracle."""
    metrics = found["full"]["metrics"]
    memorised, p = metrics["tofu_forget/probability"], metrics["tofu/forget_quality_geometric"]
    if memorised < MEMORISED:
        raise ValueError(
            f"the untouched model's forget probability is {memorised:.3f}, below {MEMORISED}; train full.yaml and "
            "retain.yaml for more epochs."
        )
    if p >= DIFFERENT:
        raise ValueError(
            f"untouched model and oracle differ with p = {p:.2g} only, not below {DIFFERENT}; forget more authors."
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "check"))
    parser.add_argument("folder", type=Path, help="of the models")
    parser.add_argument("--tofu", type=Path, help="prepare: folder of TOFU's files")
    parser.add_argument("--text", type=Path, help="prepare: file of running text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="check: the file to write")
    given = parser.parse_args(arguments)
    if given.step == "prepare":
        if given.tofu is None or given.text is None:
            parser.error("prepare needs --tofu and --text")
        prepare(given.folder, given.tofu, given.text)
        return
    found = trained(given.folder)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    refuse(found)


if __name__ == "__main__":
    main()
