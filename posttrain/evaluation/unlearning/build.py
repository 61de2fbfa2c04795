"""The suites that a configuration names, with their data."""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from posttrain.config import DataSource, EvaluationConfig, ModelConfig
from posttrain.config.unlearning import AuditConfig, MuseConfig, TofuConfig
from posttrain.data import fields, sources
from posttrain.evaluation.benchmark import Benchmark
from posttrain.evaluation.unlearning import muse, tofu
from posttrain.evaluation.unlearning.audit import KEY as AUDIT
from posttrain.evaluation.unlearning.audit import AuditSuite
from posttrain.evaluation.unlearning.measured import DATA_SETS
from posttrain.evaluation.unlearning.overlap import require_rouge
from posttrain.evaluation.unlearning.questions import Question, fingerprint, read_questions
from posttrain.evaluation.unlearning.relearning import Relearning
from posttrain.evaluation.unlearning.retain import LoadModel, RetainResults, read_results
from posttrain.loading import load_model, location


def benchmarks(settings: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Benchmark]:
    """Name -> suite, for every suite that ``evaluation:`` has a block for.

    Raises:
        ValueError: a block without data, data that cannot be read, or a model that is not there.
        ImportError: rouge-score is not installed and answers are to be written.
    """
    found: dict[str, Benchmark] = {}
    if settings.tofu is not None:
        found["tofu"] = tofu_suite(settings.tofu, tokenizer)
    if settings.muse is not None:
        found["muse"] = muse_suite(settings.muse, tokenizer)
    if settings.audit is not None:
        found["audit"] = audit_suite(settings.audit, tokenizer)
    return found


def tofu_suite(config: TofuConfig, tokenizer: PreTrainedTokenizerBase) -> tofu.TofuSuite:
    """The suite with its questions read and its models found, but not loaded."""
    if config.generate:
        require_rouge()
    data = {
        name: _questions(getattr(config, name), config.template, tokenizer, f"{tofu.KEY}.{name}")
        for name in DATA_SETS
        if getattr(config, name) is not None
    }
    if not data:
        raise ValueError(f"{tofu.KEY} names no data; give at least one of {', '.join(DATA_SETS)}.")
    prints = {f"tofu_{name}": fingerprint(data[name]) for name in ("forget", "holdout") if name in data}
    return tofu.TofuSuite(
        data,
        retain=_retain(config, "tofu", prints),
        reference=_model(config.reference_model, f"{tofu.KEY}.reference_model"),
        generate=config.generate,
        max_new_tokens=config.max_new_tokens,
        min_k=config.min_k,
        cache=config.cache,
        described=_described(config, ("template", "retain_model", "reference_model")),
    )


def muse_suite(config: MuseConfig, tokenizer: PreTrainedTokenizerBase) -> muse.MuseSuite:
    """The suite with its texts cut and its questions read."""
    require_rouge()
    length = config.prefix_tokens + config.continuation_tokens
    passages = {}
    for name in ("forget", "holdout"):
        source = getattr(config, name)
        if source is None:
            continue
        texts, key = _texts(source, f"{muse.KEY}.{name}"), f"{muse.KEY}.{name}"
        shortest = config.prefix_tokens + 1
        cut = muse.cut_passages(tokenizer, texts, length=length, shortest=shortest, most=config.passages)
        if not cut:
            raise ValueError(
                f"{key} has no text of {shortest} tokens; lower {muse.KEY}.prefix_tokens, or give longer texts."
            )
        passages[name] = cut
    questions = {
        name: _questions(getattr(config, name), config.template, tokenizer, f"{muse.KEY}.{name}")
        for name in ("forget_qa", "retain_qa")
        if getattr(config, name) is not None
    }
    if not passages and not questions:
        raise ValueError(f"{muse.KEY} names no data; give at least one of forget, holdout, forget_qa, retain_qa.")
    examples: list[Question] = []
    if config.examples is not None:
        examples = _questions(config.examples, config.template, tokenizer, f"{muse.KEY}.examples")
    prints = {f"muse_{name}": muse.passages_fingerprint(one) for name, one in passages.items()}
    return muse.MuseSuite(
        passages,
        questions,
        examples,
        retain=_retain(config, "muse", prints),
        prefix_tokens=config.prefix_tokens,
        continuation_tokens=config.continuation_tokens,
        answer_tokens=config.answer_tokens,
        min_k=config.min_k,
        cache=config.cache,
        described=_described(config, ("template", "retain_model")),
    )


def audit_suite(config: AuditConfig, tokenizer: PreTrainedTokenizerBase) -> AuditSuite:
    """The suite with its rows read and its models found, but not loaded."""
    if config.forget is None:
        raise ValueError(f"{AUDIT}.forget is missing; name the rows that were to be forgotten.")
    rows = {
        name: [one.row(one.answer) for one in _questions(source, config.template, tokenizer, f"{AUDIT}.{name}")]
        for name in ("forget", "retain")
        if (source := getattr(config, name)) is not None
    }
    groups: list[Any] | None = None
    if config.group_size is not None:
        groups = [index // config.group_size for index in range(len(rows["forget"]))]
    elif config.group is not None:
        given = sources.load(config.forget, key=f"{AUDIT}.forget")
        fields.require(config.group, sources.columns_of(given), f"{AUDIT}.forget", "a row with its group")
        groups = [row[config.group] for row in given]
    return AuditSuite(
        rows["forget"],
        rows.get("retain", ()),
        groups=groups,
        original=_model(config.original, f"{AUDIT}.original"),
        retrained=_model(config.retrained, f"{AUDIT}.retrained"),
        relearning=Relearning(
            config.relearn_epochs, config.relearn_share, config.relearn_learning_rate, config.relearn_batch_size
        ),
        neighbours=config.neighbours,
        described=_described(config, ("template", "original", "retrained", "group", "group_size")),
    )


def _questions(
    source: DataSource, template: str | None, tokenizer: PreTrainedTokenizerBase, key: str
) -> list[Question]:
    for name in ("format", "template"):
        if getattr(source, name) != getattr(DataSource(), name):
            suite = key.rpartition(".")[0]
            raise ValueError(f"{key}.{name} is set, and {suite} reads question and answer; set {suite}.template.")
    rows = sources.load(source, key=key)
    return read_questions(rows, template=template, chat=tokenizer.chat_template is not None, key=key)


def _texts(source: DataSource, key: str) -> list[str]:
    path = Path(source.path or "").expanduser()
    if path.suffix == ".txt":
        if not path.is_file():
            raise ValueError(f"{key}.path is {source.path!r}, and there is no such file; check the path.")
        if source.limit is not None:
            raise ValueError(f"{key}.limit counts rows, and a .txt file is one; set {muse.KEY}.passages.")
        return [path.read_text(encoding="utf-8")]
    rows = sources.load(source, key=key)
    fields.require("text", sources.columns_of(rows), key, "a set of texts")
    found = [row["text"] for row in rows]
    strange = next((index for index, text in enumerate(found) if not isinstance(text, str)), None)
    if strange is not None:
        raise ValueError(f"{key}, row {strange}: text is {found[strange]!r}; expected text.")
    return found


def _retain(
    config: TofuConfig | MuseConfig, suite: str, fingerprints: dict[str, str]
) -> LoadModel | RetainResults | None:
    given, key = config.retain_model, f"evaluation.{suite}.retain_model"
    if given is not None and given.name_or_path.endswith(".json"):
        return read_results(given.name_or_path, suite, fingerprints, f"{key}.name_or_path", min_k=config.min_k)
    return _model(given, key)


def _model(config: ModelConfig | None, key: str) -> LoadModel | None:
    """What loads the model when it is needed, which may be after hours of training: that it is there is seen now."""
    if config is None:
        return None
    place = location(config.name_or_path)
    if not (Path(place) / "adapter_config.json").is_file():
        common = ("revision", "token", "trust_remote_code")
        known = {name: config.options[name] for name in common if name in config.options}
        try:
            AutoConfig.from_pretrained(place, **known)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{key}.name_or_path is {config.name_or_path!r}, which is no model: {reason}") from error
    return partial(load_model, config, key=key)


def _described(config: TofuConfig | MuseConfig | AuditConfig, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in names}
    return {name: one.name_or_path if isinstance(one, ModelConfig) else one for name, one in values.items()}
