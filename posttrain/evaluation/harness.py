"""Tasks of lm-evaluation-harness, run through its own Python interface on the model in memory."""

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from posttrain.evaluation.harness_results import Leaf, report_of
from posttrain.evaluation.inference import CausalLM, evaluation_mode, max_positions
from posttrain.evaluation.report import SourceReport
from posttrain.suggest import unknown

KEY = "evaluation.harness"


@dataclass(frozen=True, eq=False)
class HarnessTask:
    """What the harness reports as one thing: a task, or a group whose numbers run over several tasks.

    Args:
        name: of the task or group.
        tasks: the harness's own objects; their data are loaded.
        by_size: metrics of a group in which every task weighs alike, whatever its number of items -> False.
        limit: at most this many items of each task; below 1 a share.
        apply_chat_template: write prompts by the tokenizer's chat template.
    """

    name: str
    tasks: tuple[Any, ...]
    by_size: Mapping[str, bool]
    limit: float | None = None
    apply_chat_template: bool = False


def load(
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str],
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    seed: int = 0,
) -> dict[str, HarnessTask]:
    """Find tasks, load their data and write one prompt of each, so that what cannot work fails here.

    A group that the harness gives numbers of its own is one entry; other groups and tags stand for their tasks.

    Args:
        tokenizer: of the model to be measured.
        tasks: names of tasks, groups or tags.
        include_path: folder of task YAMLs; they win over the harness's own.
        limit, num_fewshot, apply_chat_template, confirm_run_unsafe_code: the harness's own settings.
        seed: of the choice of examples in the prompt.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: an unknown task, data that cannot be loaded, a task that a text model cannot do, a chat template
            asked for and not there, or a setting out of range.
    """
    manager = _manager(tasks, include_path)
    if limit is not None and limit <= 0:
        raise ValueError(f"{KEY}.limit is {limit}; give a number of items, a share below 1, or null for all.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"{KEY}.num_fewshot is {num_fewshot}; give a number of examples from 0, or null.")
    if apply_chat_template and tokenizer.chat_template is None:
        raise ValueError(
            f"{KEY}.apply_chat_template is true, and the tokenizer has no chat template; set it to false, or set "
            "tokenizer.chat_template."
        )
    found: dict[str, HarnessTask] = {}
    with _seeded(seed), _quiet():
        for name in tasks:
            for one in _load(manager, name):
                if one.name in found:
                    raise ValueError(f"{KEY}.tasks leads to {one.name!r} twice; name it once.")
                found[one.name] = replace(one, limit=limit, apply_chat_template=apply_chat_template)
        for task in (task for one in found.values() for task in one.tasks):
            if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
                raise ValueError(
                    f"{KEY}.tasks: {task.task_name!r} runs code that the model writes; leave it out, or set "
                    f"{KEY}.confirm_run_unsafe_code to true where that does no harm."
                )
            _set_fewshot(task, num_fewshot, seed)
            _write_one_prompt(task, tokenizer, apply_chat_template)
    return found


def check(source: HarnessTask, model: CausalLM) -> None:
    """Raise a ValueError where the model has too few positions for what a task lets it write."""
    positions = max_positions(model)
    for task in source.tasks:
        longest = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", _DEFAULT_NEW_TOKENS)
        if task.OUTPUT_TYPE == "generate_until" and positions is not None and longest >= positions:
            raise ValueError(
                f"{KEY}.tasks: {task.task_name!r} lets the model write {longest} tokens, and the model has {positions} "
                "positions in all; set generation_kwargs.max_gen_toks in the task's YAML, or leave the task out."
            )


# What the harness takes where a task's generation_kwargs name no max_gen_toks.
_DEFAULT_NEW_TOKENS = 256


def run(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: HarnessTask,
    *,
    batch_size: int,
    resamples: int,
    level: float,
    seed: int,
) -> SourceReport:
    """Run a task and turn its logged samples into a `SourceReport`; model, tokenizer and random state are left alone.

    Raises:
        ValueError: as `check`.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    check(source, model)
    with _quiet(), evaluation_mode(model), _seeded(seed):
        # it picks a padding token and turns the padding side
        own: Any = copy.deepcopy(tokenizer)
        answers = evaluator.evaluate(
            lm=HFLM(pretrained=model, tokenizer=own, batch_size=batch_size),
            task_dict={"tasks": {task.task_name: task for task in source.tasks}, "groups": {}},
            limit=source.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=source.apply_chat_template,
            fewshot_as_multiturn=source.apply_chat_template,
            # asked about when it was loaded
            confirm_run_unsafe_code=True,
        )
        assert answers is not None
        samples = answers["samples"]
        # still here, because asking a task for its name draws a random number
        leaves = [
            Leaf(name, task.aggregation(), samples[name], len(task.eval_docs))
            for name, task in ((task.task_name, task) for task in source.tasks)
        ]
    return report_of(leaves, source.by_size, resamples=resamples, level=level, seed=seed)


def _manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """The harness's index of tasks: one's own alone where that is enough, for indexing all takes seconds."""
    if not tasks:
        raise ValueError(f"{KEY}.tasks is empty; name at least one task of lm-evaluation-harness, or leave it out.")
    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise ValueError(f"{KEY}.include_path is {include_path!r}, which is no folder here; check the path.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"{KEY} needs lm-eval, which is not installed: pip install 'posttrain[evaluation]'."
        ) from error
    with _quiet():
        folder = None if include_path is None else str(Path(include_path).expanduser())
        manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folder)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ValueError(unknown(f"entry of {KEY}.tasks", name, manager.all_tasks))
    return manager


def _load(manager: Any, name: str) -> Iterator[HarnessTask]:
    try:
        loaded = manager.load([name])
    except Exception as error:
        # the harness and the data sets library raise many types here
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{KEY}.tasks: {name!r} cannot be loaded: {reason}") from error
    group = loaded.get("groups", {}).get(name)
    if group is not None and group.has_aggregation:
        weighting = {one.metric: one.weight_by_size for one in group.aggregate_metric_list}
        yield HarnessTask(name, tuple(loaded["tasks"].values()), weighting)
        return
    for task_name, task in loaded["tasks"].items():
        yield HarnessTask(task_name, (task,), {})


def _set_fewshot(task: Any, num_fewshot: int | None, seed: int) -> None:
    """As the harness does it: a task that says 0 keeps 0, and one that says nothing has none."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


def _write_one_prompt(task: Any, tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"{KEY}.tasks: {task.task_name!r} shows images or plays sounds; posttrain's models read text.")
    if not (task.has_test_docs() or task.has_validation_docs()):
        raise ValueError(f"{KEY}.tasks: {task.task_name!r} has neither a test nor a validation split to measure on.")

    def as_chat(history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    template: Callable[..., Any] | None = as_chat if chat else None
    try:
        task.build_all_requests(limit=1, apply_chat_template=chat, fewshot_as_multiturn=chat, chat_template=template)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{KEY}.tasks: no prompt of {task.task_name!r} can be written: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on defaults, which it makes for every task and metric."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that the harness samples from, seeded, and put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
