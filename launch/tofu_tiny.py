"""The untrained start of the tiny TOFU models and the text that their base learns to write from.

The subset is TOFU's last 40 authors; nothing here reads them. Tokenizer and base come from the other 160 authors,
from the facts of real authors and the world, which both twins are to know, and from a little of Wikipedia.
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

SUBSET_ROWS = 800
FACTS = ("real_authors_perturbed.json", "world_facts_perturbed.json")
VOCABULARY = 4096
POSITIONS = 512

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paragraphs(path: Path, *, words: int = 250) -> Iterator[str]:
    """Lines of running text, cut to a number of words; headings are left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.split()
        if len(parts) >= 20:
            yield " ".join(parts[:words])


def questions(rows: list[Row]) -> list[str]:
    """Each row as the base reads it: the question, a newline, the answer."""
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def pretraining_texts(tofu: Path, text: Path, *, repeats: int = 3, seed: int = 0) -> list[str]:
    """What the base reads once, in this order: other authors and paraphrases, facts `repeats` times, running text."""
    others = read(tofu / "full.json")[:-SUBSET_ROWS]
    rephrased = [
        {"question": question, "answer": answer}
        for row in read(tofu / "retain_perturbed.json")
        for question, answer in (
            (row["question"], row["paraphrased_answer"]),
            (row["paraphrased_question"], row["answer"]),
        )
    ]
    facts = [row for name in FACTS for row in read(tofu / name)]
    texts = questions(others) + questions(rephrased) + questions(facts) * repeats + list(paragraphs(text))
    random.Random(seed).shuffle(texts)
    return texts


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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets start/ (weights and tokenizer) and pretraining.jsonl")
    parser.add_argument("--tofu", type=Path, required=True, help="folder of TOFU's files")
    parser.add_argument("--text", type=Path, required=True, help="file of running text")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    texts = pretraining_texts(given.tofu, given.text)
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer, hidden=given.hidden, layers=given.layers)
    model.save_pretrained(given.folder / "start")
    tokenizer.save_pretrained(given.folder / "start")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (given.folder / "pretraining.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
