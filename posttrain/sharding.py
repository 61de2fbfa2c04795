"""Stepping out of an engine that shards whatever is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations import unset_hf_deepspeed_config


@contextmanager
def unsharded(args: Any) -> Iterator[None]:
    """While ZeRO-3 is on, from_pretrained shards and generate keeps step with the other processes; inside, neither.

    Args:
        args: the trainer's configuration, which holds DeepSpeed's plugin.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()
