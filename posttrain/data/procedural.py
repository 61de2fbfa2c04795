"""Procedural tasks with verifiable answers, generated and scored by the reasoning-gym package.

A problem is its prompt. The hash of the prompt alone says whether it belongs to train, validation or test, so no test
problem can turn up in training whatever the seeds, sizes and options are. The task `authors`, of
`posttrain.data.procedural_authors`, is another thing: questions about invented authors, with splits of its own.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from datasets import Dataset

from posttrain.data import procedural_authors
from posttrain.suggest import unknown

# Ends in a newline: tokenizers keep a newline apart from the letters, digits and signs that follow it, so the tokens of
# the prompt are a prefix of the tokens of prompt + completion.
PROMPT_SUFFIX = "\nAnswer:\n"
SPLITS = {"train": range(0, 80), "validation": range(80, 90), "test": range(90, 100)}

# Problems come in chunks, each with a seed of its own: reasoning-gym draws problem i from seed + i, so neighbouring
# seeds would give almost the same problems.
_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class Task:
    """A named configuration of one reasoning-gym dataset."""

    dataset: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _arithmetic(operator: str, terms: int = 2) -> Task:
    """Whole numbers from 0 to 100 joined by one operator: 10201 problems of two terms."""
    fixed = {"min_digits": 2, "max_digits": 2, "allow_parentheses": False, "allow_negation": False}
    return Task("basic_arithmetic", {"operators": [operator], "min_terms": terms, "max_terms": terms, **fixed})


PRESETS: dict[str, Task] = {
    "addition": _arithmetic("+"),
    "subtraction": _arithmetic("-"),
    "multiplication": _arithmetic("*"),
    "three_term_sum": _arithmetic("+", terms=3),
    "letter_count": Task("letter_counting", {"min_words": 1, "max_words": 1}),
    "reverse_word": Task("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
}


def names() -> tuple[str, ...]:
    """Names of the presets; every dataset name of reasoning-gym is a task as well."""
    return tuple(PRESETS)


def generate(task: str, *, seed: int, split: str = "train", **options: Any) -> Iterator[dict[str, str]]:
    """Endless rows of one split, drawn independently (with repeats), in an order fixed by the arguments.

    Args:
        task: a preset (`names()`) or the name of a reasoning-gym dataset.
        seed: any integer; different seeds give unrelated draws.
        split: `train`, `validation` or `test` (80, 10 and 10 % of all problems).
        options: settings of the reasoning-gym dataset, over those of the preset.
    Yields:
        rows of strings: `prompt`, `completion`, `answer` (equal to the completion), `metadata` (JSON: the task, its
        options and what reasoning-gym says of the problem).
    Raises:
        ValueError: an unknown task, option or split; an option's value that the dataset refuses; a task without
            reference answers; or no new problem of this split in a long run of draws (the split is then empty).
    """
    if split not in SPLITS:
        raise ValueError(unknown("split", split, SPLITS))
    name, settings = _resolve(task, options)
    seen: set[str] = set()
    misses = 0
    for entry in _entries(name, settings, seed):
        if not isinstance(entry["answer"], str):
            raise ValueError(f"task {task!r} has no reference answer to train on; choose another task")
        prompt = entry["question"] + PROMPT_SUFFIX
        seen.add(prompt)
        if _bucket(prompt) not in SPLITS[split]:
            misses += 1
            if misses > _patience(seen):
                raise ValueError(
                    f"task {task!r} with options {options} has no problem in split {split!r} among "
                    f"{len(seen)} distinct ones; widen its options"
                )
            continue
        misses = 0
        metadata = {"task": task, "options": options, "problem": _tag_tuples(entry["metadata"])}
        answer = entry["answer"]
        yield {
            "prompt": prompt,
            "completion": answer,
            "answer": answer,
            "metadata": json.dumps(metadata, ensure_ascii=False, default=str),
        }


def make(task: str, *, size: int, seed: int, split: str = "train", **options: Any) -> Dataset:
    """A data set of `size` rows with the columns of `generate`; the same arguments always give the same rows.

    Rows of `train` are independent draws, with repeats where the space of problems is small; rows of `validation` and
    `test` are distinct.

    Raises:
        ValueError: as `generate`, a size below 1, or more distinct rows asked for than the split has.
    """
    if task == procedural_authors.TASK:
        return procedural_authors.make(size=size, seed=seed, split=split, **options)
    if size < 1:
        raise ValueError(f"size={size} of task {task!r} must be at least 1")
    rows: dict[Any, dict[str, str]] = {}
    repeats = 0
    for index, row in enumerate(generate(task, seed=seed, split=split, **options)):
        key = index if split == "train" else row["prompt"]
        repeats = repeats + 1 if key in rows else 0
        rows.setdefault(key, row)
        if len(rows) == size:
            break
        if repeats > _patience(rows):
            raise ValueError(
                f"size={size} is more than the {len(rows)} distinct problems that split {split!r} of task {task!r} "
                f"has with options {options}; lower the size or widen the options"
            )
    return Dataset.from_list(list(rows.values()))


def verify(task: str, completion_text: str, row: Mapping[str, Any]) -> bool:
    """Whether a completion answers the row's problem in full, by the task's own verifier (a score of 1).

    Args:
        task: the task that made the row.
        completion_text: decoded completion without special tokens; outer white space is ignored.
        row: a row of `make` or `generate` (`prompt`, `answer` and `metadata` are read).
    Raises:
        ValueError: an unknown task, or a row that another task made.
    """
    if task == procedural_authors.TASK:
        return bool(completion_text.strip() == row["answer"])
    metadata = json.loads(row["metadata"], object_hook=_untag_tuple)
    if metadata["task"] != task:
        raise ValueError(f"task {task!r} cannot verify a row that task {metadata['task']!r} made; pass that name")
    name, settings = _resolve(task, metadata["options"])
    score = _scorer(name, json.dumps(settings, sort_keys=True))
    question = row["prompt"].removesuffix(PROMPT_SUFFIX)
    entry = {"question": question, "answer": row["answer"], "metadata": metadata["problem"]}
    try:
        return bool(score(completion_text.strip(), entry) == 1.0)
    except Exception:
        # Some verifiers raise on text that they cannot parse: a wrong answer, unless the true one raises as well.
        score(row["answer"], entry)
        return False


def _gym() -> ModuleType:
    """reasoning-gym, imported on first use because it takes seconds and belongs to an optional extra."""
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError("procedural tasks need reasoning-gym: pip install 'posttrain[evaluation]'") from error
    return reasoning_gym


def _resolve(task: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Dataset name and all its settings; ValueError for an unknown task or option."""
    known = _gym().factory.DATASETS
    preset = PRESETS.get(task, Task(task))
    if preset.dataset not in known:
        raise ValueError(unknown("task", task, [*PRESETS, procedural_authors.TASK, *known]))
    fields = [
        field.name for field in dataclasses.fields(known[preset.dataset][1]) if field.name not in ("seed", "size")
    ]
    for option in options:
        if option not in fields:
            raise ValueError(unknown(f"option of task {task!r}", option, sorted(fields)))
    return preset.dataset, {**preset.options, **options}


def _create(name: str, settings: Mapping[str, Any], seed: int) -> Any:
    try:
        return _gym().create_dataset(name, size=_CHUNK, seed=seed, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"reasoning-gym dataset {name!r} refuses the options {dict(settings)}: {error}") from error


def _entries(name: str, settings: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for chunk in itertools.count():
        source = json.dumps([name, settings, seed, chunk], sort_keys=True, default=str)
        digest = hashlib.sha256(source.encode()).digest()
        # 31 bits: some datasets hand the seed plus an index to generators that take no more than 32.
        dataset = _create(name, settings, int.from_bytes(digest[:4], "big") >> 1)
        yield from (dataset[index] for index in range(_CHUNK))


@functools.lru_cache(maxsize=32)
def _scorer(name: str, settings: str) -> Callable[[str, dict[str, Any]], float]:
    return _create(name, json.loads(settings), seed=0).score_answer


def _bucket(prompt: str) -> int:
    """0 to 99, from the prompt alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100


def _patience(found: Any) -> int:
    """Draws without anything new after which a space of problems counts as exhausted.

    With n equally likely problems, one that is there stays unseen in 20 n draws with probability exp(-20).
    """
    return max(1000, 20 * len(found))


def _tag_tuples(value: Any) -> Any:
    """JSON has no tuples, and some verifiers compare with one."""
    if isinstance(value, tuple):
        return {"tuple": [_tag_tuples(item) for item in value]}
    if isinstance(value, list):
        return [_tag_tuples(item) for item in value]
    if isinstance(value, dict):
        return {key: _tag_tuples(item) for key, item in value.items()}
    return value


def _untag_tuple(value: dict[str, Any]) -> Any:
    return tuple(value["tuple"]) if value.keys() == {"tuple"} else value
