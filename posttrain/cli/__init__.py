"""The command line: train, evaluate, annotate, list, show, doctor."""

from posttrain.cli.main import main

__all__ = ["main"]
