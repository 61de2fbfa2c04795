"""Every test of this suite would see a read of memory that was never written."""

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_new_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    made: list[Tensor] = [
        torch.empty(4, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(2),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.ones(1, dtype=dtype).resize_(5)[1:],
    ]
    assert all(tensor.isnan().all() for tensor in made)
    assert (torch.empty(2, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_buffer_written_in_part_is_caught() -> None:
    logits = torch.empty(2, 5)
    torch.mm(torch.ones(2, 3), torch.ones(3, 4), out=logits[:, :4])
    assert logits.logsumexp(1).isnan().all() and logits[:, :4].logsumexp(1).isfinite().all()


def test_an_operation_without_a_deterministic_way_is_no_failure() -> None:
    total = torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2), accumulate=True)
    assert total.tolist() == [0.0, 2.0, 0.0]
