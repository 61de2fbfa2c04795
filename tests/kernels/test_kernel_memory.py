"""Peak memory beyond inputs and gradients grows neither with the vocabulary nor with the tokens."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from posttrain.kernels import LMHead, map_logits, tiling, vocab_loss, vocab_statistics
from tests.kernels.live_bytes import LiveBytes

TILE = 1 << 13
EVERYTHING = ("logp", "entropy", "surprisal_variance", "log_sum_sq_probs", "ids_logp", "topk_logp", "reverse_kl", "jsd")
# Live at once beyond inputs and gradients: some tiles, and some numbers per token (incoming gradients, sums, picks).
TILES = 8
NUMBERS_PER_TOKEN = 160
WIDTH = 8


@pytest.fixture
def small_budget(monkeypatch):
    budget = tiling.Sizes(tile=TILE, rows=64, columns=TILE, weight=TILE, block=4 * TILE)
    monkeypatch.setattr(tiling, "_CPU", budget)


def peak_beyond(run, tokens, vocab, dtype=torch.float32):
    """Bytes beyond inputs and gradients at the peak of forward and backward."""
    hidden = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    weight = torch.randn(vocab, WIDTH).to(dtype).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64)
    counter = LiveBytes()
    counter.ignore(hidden, weight, targets)
    with counter:
        run(hidden, LMHead(weight), targets).backward()
    return counter.peak - hidden.grad.nbytes - weight.grad.nbytes


def logp(hidden, head, targets):
    return vocab_statistics(hidden, head, targets, ("logp",))["logp"].sum()


def everything(hidden, head, targets):
    teacher = (hidden.detach(), replace(head, weight=head.weight.detach(), scale=0.5))
    options = {"ids": targets[:, None], "k": 4, "teacher": teacher}
    values = vocab_statistics(hidden, head, targets, EVERYTHING, **options)
    return sum(value.sum() for value in values.as_dict().values())


def fused(hidden, head, targets):
    ones = torch.ones(targets.shape)
    return vocab_loss(hidden, head, targets, ("logp", "entropy"), lambda s: s.logp.exp() + s.entropy, ones)[0]


def mapped(hidden, head, targets):
    return map_logits(lambda z: z.logsumexp(1), hidden, head).sum()


RUNS = {"logp": (logp, 1), "everything": (everything, 1), "vocab_loss": (fused, 4), "map_logits": (mapped, 4)}


@pytest.mark.parametrize("name", RUNS)
def test_peak_does_not_grow(name, small_budget):
    run, tile = RUNS[name]
    small, wide, long = (peak_beyond(run, *shape) for shape in ((128, 1024), (128, 4096), (512, 1024)))
    limit = TILES * tile * TILE * 4
    # What autograd adds up block by block is one more gradient of the weight.
    again = 2 if name == "map_logits" else 0
    assert small <= limit + 128 * NUMBERS_PER_TOKEN * 4 + again * 1024 * WIDTH * 4
    assert wide - small <= TILE * 4 + again * (4096 - 1024) * WIDTH * 4, "beyond the weight gradient"
    assert long - small <= TILE * 4 + (512 - 128) * NUMBERS_PER_TOKEN * 4, "beyond the hidden gradient"
    assert long < 512 * 1024 * 4 / 2, "one tensor of tokens x vocabulary would not have fitted"


def test_a_weight_in_half_precision_is_never_copied_to_float32(small_budget):
    beyond = peak_beyond(logp, 64, 16384, torch.bfloat16)
    assert beyond <= TILES * TILE * 4 + 64 * NUMBERS_PER_TOKEN * 4 < 16384 * WIDTH * 4


def test_dense_would_be_noticed():
    def dense(hidden, head, targets):
        return vocab_statistics(hidden, head, targets, ("logp",), backend="dense")["logp"].sum()

    assert peak_beyond(dense, 256, 4096) > 256 * 4096 * 4


RESIDENT = """
import torch
from posttrain.kernels import LMHead, vocab_statistics

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def step(tokens, vocab):
    hidden, weight = torch.randn(tokens, 64).requires_grad_(), torch.randn(vocab, 64).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64)
    before = status("VmRSS")
    vocab_statistics(hidden, LMHead(weight), targets, ("logp", "entropy"))["entropy"].sum().backward()
    return status("VmHWM") - before - (hidden.grad.nbytes + weight.grad.nbytes) / 2**20

torch.set_num_threads(1)
step(64, 64)
print(step(512, 64000))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the resident size from /proc")
def test_resident_size_of_a_process():
    """At 512 tokens and 64000 entries logits would take 125 MiB, with softmax and gradient three times that."""
    result = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True, timeout=300)
    assert float(result.stdout) < 64
