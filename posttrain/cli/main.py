"""Arguments to commands. Commands import what they need when they run, so that help and `list` start fast."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 after success, 2 after a mistake that one sentence on stderr explains (with POSTTRAIN_DEBUG=1, its traceback).
        Errors that are not ours propagate.
    """
    arguments = _arguments(argv)
    # trl reports which trainers are built, unless this is set before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    _log_to_stderr()
    # A console script does not look for modules here; `python -m` does. Objectives may be named by dotted path.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _run(arguments)
    except (ValueError, ImportError, FileExistsError) as error:
        if not _is_ours(error) or os.environ.get("POSTTRAIN_DEBUG") == "1":
            raise
        rank = os.environ.get("RANK")
        print(f"posttrain{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train":
        from posttrain.cli.train import train

        return train(arguments.config, arguments.overrides)
    if arguments.command == "compare":
        from posttrain.cli.compare import compare

        only, dry = arguments.report_only, arguments.dry_run
        return compare(arguments.config, arguments.overrides, report_only=only, dry_run=dry)
    if arguments.command == "list":
        from posttrain.cli.list_show import list_objectives

        list_objectives()
    elif arguments.command == "show":
        from posttrain.cli.list_show import show

        show(arguments.name)
    elif arguments.command == "doctor":
        from posttrain.cli.doctor import doctor

        doctor()
    elif arguments.command == "evaluate":
        from posttrain.cli.evaluate import evaluate

        evaluate(arguments.config, arguments.overrides, suites=arguments.suite)
    elif arguments.command == "diagnose":
        from posttrain.cli.diagnose import diagnose

        diagnose(arguments.config, arguments.overrides)
    elif arguments.command == "score":
        from posttrain.cli.score import score

        score(arguments.config, arguments.overrides)
    else:
        from posttrain.cli.annotate import annotate

        annotate(arguments.kind, arguments.config, arguments.overrides)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and behind the overrides, which argparse itself does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or not hasattr(arguments, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posttrain", description="LLM post-training objectives in Hugging Face trainers."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in (
        ("train", "post-train a model as a YAML file says"),
        ("evaluate", "measure a model on the file's evaluation data"),
        ("compare", "train objectives under one budget, evaluate them alike, and write a report"),
        ("diagnose", "look at a sample of the training data with the base, and recommend an objective"),
        ("score", "write what fine-tuning made likelier beside each row, to filter data by"),
        ("annotate", "write columns beside a data set, once"),
    ):
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if name == "annotate":
            command.add_argument("kind", metavar="KIND", help="what to write, such as teacher-topk")
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        command.add_argument(
            "overrides", metavar="KEY.SUB=VALUE", nargs="*", help="overrides keys of the file; the value is YAML"
        )
        if name == "evaluate":
            command.add_argument(
                "--suite",
                action="append",
                choices=("tofu", "muse", "audit"),
                help="this suite of the file alone; may be repeated",
            )
        if name == "compare":
            command.add_argument("--dry-run", action="store_true", help="check and list the runs, run nothing")
            command.add_argument("--report-only", action="store_true", help="write the report of what there is")
    commands.add_parser("list", help="all objectives by family")
    command = commands.add_parser("show", help="an objective's formula, inputs, hyper-parameters and an example")
    command.add_argument("name", metavar="NAME", help="an objective's name, or the dotted path of one's own")
    commands.add_parser("doctor", help="versions, devices, and what can be used on this machine")
    return parser


def _log_to_stderr() -> None:
    logger = logging.getLogger("posttrain")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    # the other processes of a launch say the same things
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, and not a library it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)
