"""Hidden states between the blocks of a backbone."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def block_at(backbone: nn.Module, layer: int) -> nn.Module:
    """The block of this number, counted from 0 as in the names of a Hugging Face model's modules, or from the end.

    Raises:
        ValueError: the backbone has no list of blocks, or none of this number.
    """
    config: Any = backbone.config
    count = config.get_text_config().num_hidden_layers
    lists = (module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    blocks = next(lists, None)
    if blocks is None:
        raise ValueError(f"{type(backbone).__name__} has no list of {count} blocks; leave statistics.layer out.")
    if not -count <= layer < count:
        raise ValueError(f"statistics.layer is {layer} and the model has {count} blocks; give a number below {count}.")
    return blocks[layer]


@contextmanager
def outputs_of_blocks(backbone: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states, (rows, length, width), that these blocks return in the forward within."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    with ExitStack() as stack:
        for layer in set(layers):
            stack.callback(block_at(backbone, layer).register_forward_hook(keep(layer)).remove)
        yield found
