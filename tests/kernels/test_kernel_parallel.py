"""A head whose vocabulary is spread over two processes gives the whole head's statistics and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from posttrain.kernels import DETACHED, STATISTICS, LMHead, VocabShard, map_logits, vocab_loss, vocab_statistics
from tests.kernels.problems import gradients, mixed_loss, problem, tiles

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
TOKENS, VOCAB, CUT = 6, 13, 5
PROBLEMS = {
    "plain": {"size": 2.0},
    "softcap": {"softcap": 5.0, "scale": 0.8, "temperature": 1.3, "bias": True, "rank": 2},
    "large": {"size": 1e4},
}
LOSS = ("logp", "entropy", "mean_logit", "jsd")


def case_of(name):
    return problem(TOKENS, VOCAB, 4, **PROBLEMS[name])


def sliced(head, rank, *, leaf):
    """The rank's slice of a head."""
    rows = slice(0, CUT) if rank == 0 else slice(CUT, VOCAB)

    def part(tensor):
        piece = tensor.detach()[rows].clone()
        return piece.requires_grad_() if leaf else piece

    low_rank = (
        None if head.low_rank is None else (head.low_rank[0].detach().clone().requires_grad_(), part(head.low_rank[1]))
    )
    bias = None if head.bias is None else part(head.bias)
    shard = VocabShard(rows.start, VOCAB)
    return replace(head, weight=part(head.weight), bias=bias, low_rank=low_rank, shard=shard), rows


def phi(values):
    return values.logp.square() + values.entropy * values.mean_logit + values.jsd


def leaves_of(hidden, head):
    return [t for t in (hidden, head.weight, head.bias, *(head.low_rank or ())) if t is not None]


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in PROBLEMS:
        case = case_of(name)
        head, _ = sliced(case.head, rank, leaf=True)
        teacher_hidden, teacher_head = case.options["teacher"]
        options = {**case.options, "teacher": (teacher_hidden, sliced(teacher_head, rank, leaf=False)[0]), "k": 6}
        hidden = case.hidden.detach().clone().requires_grad_()
        with tiles(4, 3):
            values = vocab_statistics(hidden, head, case.targets, STATISTICS, **options)
            found = gradients(mixed_loss(values), leaves_of(hidden, head))
            mask = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
            loss, one_pass = vocab_loss(hidden, head, case.targets, LOSS, phi, mask, **options)
            fused = gradients(loss, leaves_of(hidden, head))
        parts = (values.detach().as_dict(), found, loss.item(), one_pass.as_dict(), fused)
        torch.save(parts, f"{folder}/{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return {(name, rank): torch.load(folder / f"{name}-{rank}.pt") for name in PROBLEMS for rank in (0, 1)}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", PROBLEMS)
def test_two_slices_are_the_whole(name, rank, results):
    case = case_of(name)
    values, found, loss, one_pass, fused = results[name, rank]
    dense = case.statistics(*STATISTICS, backend="dense", k=6)
    scale = max(1.0, dense["max_logit"].abs().max().item())
    tolerance = {"rtol": 1e-10, "atol": 1e-13 * scale + 1e-12}
    for statistic, value in dense.as_dict().items():
        torch.testing.assert_close(values[statistic], value.detach(), msg=statistic, **tolerance)
    rows = sliced(case.head, rank, leaf=False)[1]
    mask = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    few = case.statistics(*LOSS, backend="dense")
    expected_loss = (mask * phi(few)).sum()
    torch.testing.assert_close(loss, expected_loss.item(), rtol=1e-9, atol=1e-9)
    for statistic, value in one_pass.items():
        torch.testing.assert_close(value, few[statistic].detach(), **tolerance)
    for got, whole in (
        (found, gradients(mixed_loss(dense), case.leaves)),
        (fused, gradients(expected_loss, case.leaves)),
    ):
        of_slices = [g[rows] if g.shape[0] == VOCAB else g for g in whole]
        for one, other in zip(got, of_slices, strict=True):
            size = max(1.0, other.abs().max().item())
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * size)


def test_both_ranks_agree_to_the_last_bit(results):
    for name in PROBLEMS:
        for statistic, value in results[name, 0][0].items():
            assert torch.equal(value, results[name, 1][0][statistic]), (name, statistic)


def test_detached_statistics_are_there_too(results):
    assert set(results["plain", 0][0]) == set(STATISTICS) >= DETACHED


def test_what_needs_the_whole_head_says_so():
    case = case_of("plain")
    shard = VocabShard(0, VOCAB + 7)
    head = LMHead(case.head.weight, shard=shard)
    for options in ({"backend": "dense"}, {"gradient_tolerance": 0.1}):
        with pytest.raises(ValueError, match="spread over processes has neither"):
            vocab_statistics(case.hidden, head, case.targets, ("logp",), **options)
    with pytest.raises(ValueError, match="full rows of logits"):
        map_logits(lambda z: z.sum(1), case.hidden, head)
    with pytest.raises(ValueError, match="same slices"):
        vocab_statistics(case.hidden, head, case.targets, ("forward_kl",), teacher=case.options["teacher"])
    with pytest.raises(ValueError, match="beyond its vocabulary"):
        wrong = LMHead(case.head.weight, shard=VocabShard(5, VOCAB))
        vocab_statistics(case.hidden, wrong, case.targets, ("logp",))
