"""Independent truths: many-digit decimals, dense softmax rows, and gradients by name."""

from collections.abc import Callable
from decimal import Decimal, getcontext

import torch
from torch import Tensor

getcontext().prec = 250
ONE = Decimal(1)
DTYPES = (torch.float32, torch.float64)


def probabilities(logp: float) -> tuple[Decimal, Decimal]:
    """p and 1 - p of the very number that the tensor holds."""
    p = Decimal(logp).exp()
    return p, ONE - p


def log_of(p: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-probabilities that ask for gradients."""
    return torch.tensor(p, dtype=dtype).log().requires_grad_()


def gradient(values: Tensor, of: Tensor) -> Tensor:
    """Of the sum of the values; zeros where nothing depends on ``of``."""
    (found,) = torch.autograd.grad(values.sum(), of, allow_unused=True, retain_graph=True)
    return torch.zeros_like(of) if found is None else found


class Rows:
    """Logit rows with everything that a loss may ask of them, by plain torch in float64.

    Args:
        tokens, vocab: shape of the logits.
        seed: of the random logits and targets.
        scale: standard deviation of the logits.
    """

    def __init__(self, tokens: int = 7, vocab: int = 11, seed: int = 0, scale: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.z = (scale * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,), generator=generator)
        self.vocab = vocab

    @property
    def s(self) -> Tensor:
        return self.z.detach().softmax(1)

    @property
    def e(self) -> Tensor:
        return torch.nn.functional.one_hot(self.targets, self.vocab).double()

    @property
    def logp(self) -> Tensor:
        return self.z.log_softmax(1).gather(1, self.targets[:, None])[:, 0]

    def logits_gradient(self, loss: Callable[[], Tensor]) -> Tensor:
        """d sum(loss) / dz."""
        return gradient(loss(), self.z)
