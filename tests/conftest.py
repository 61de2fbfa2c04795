"""What holds in every test: memory that nobody has written reads as NaN, and logging as imported."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# On a GPU the mode below would have cuBLAS complain without it; it is read when cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Without a GPU Triton's kernels run interpreted; whoever imports triton first (transformers does) decides for all.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """The mode below is wanted for what it fills, not for determinism: an operation that has none is no failure."""
    config.addinivalue_line("filterwarnings", "ignore:.* does not have a deterministic implementation:UserWarning")


@pytest.fixture(scope="session", autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """`torch.empty` and its kin and `resize_` give NaN (the largest integer, True) where they gave whatever lay there.

    That covers `out=` buffers made by `torch.empty`; not covered are untyped storages and the inside of operators. It
    holds for the whole session, so for fixtures of wider scope than a test too, but not in processes that tests start.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def logging_as_imported() -> None:
    """The command line gives the project's logger a level and a handler, which no test is to find."""
    logger = logging.getLogger("posttrain")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()
    logger.propagate = True
