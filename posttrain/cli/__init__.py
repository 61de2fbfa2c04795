"""The command line: train, evaluate, compare, diagnose, score, annotate, list, show, doctor."""

from posttrain.cli.main import main

__all__ = ["main"]
