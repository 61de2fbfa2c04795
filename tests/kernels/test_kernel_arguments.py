"""What is refused, and how the refusal reads."""

import pytest
import torch

from posttrain.kernels import DETACHED, STATISTICS, TEACHER_STATISTICS, LMHead, map_logits, vocab_loss, vocab_statistics
from tests.kernels.problems import problem

HIDDEN, WEIGHT, TARGETS = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 5])
HEAD = LMHead(WEIGHT)
TEACHER = (torch.randn(4, 2), LMHead(torch.randn(6, 2)))


def ask(hidden=HIDDEN, head=HEAD, targets=TARGETS, wanted=("logp",), **options):
    return vocab_statistics(hidden, head, targets, wanted, **options)


# Made when asked for, so that the module can be read under a type checker that refuses them on its own.
REFUSED = {
    "hidden rank": (lambda: {"hidden": HIDDEN[None]}, r"hidden must be \(tokens, width\), found \(1, 4, 3\)"),
    "hidden dtype": (
        lambda: {"hidden": torch.ones(4, 3, dtype=torch.int64)},
        "hidden must be floating point, found torch.int64",
    ),
    "weight rank": (lambda: {"head": LMHead(WEIGHT[0])}, r"width 3 of hidden \(4, 3\), found \(3,\)"),
    "weight dtype": (lambda: {"head": LMHead(WEIGHT.int())}, "head.weight must be floating point, found torch.int32"),
    "width": (lambda: {"head": LMHead(torch.randn(6, 2))}, r"width 3 of hidden \(4, 3\), found \(6, 2\)"),
    "empty vocabulary": (lambda: {"head": LMHead(torch.randn(0, 3))}, r"found \(0, 3\)"),
    "bias": (lambda: {"head": LMHead(WEIGHT, torch.zeros(5))}, r"head.bias must be \(vocab,\) = \(6,\), found \(5,\)"),
    "adapter": (
        lambda: {"head": LMHead(WEIGHT, low_rank=(torch.randn(3, 2), torch.randn(6, 2)))},
        r"tokens 4 and vocab 6, found \(3, 2\) and \(6, 2\)",
    ),
    "adapter rank": (
        lambda: {"head": LMHead(WEIGHT, low_rank=(torch.randn(4, 2), torch.randn(6, 3)))},
        r"\(4, 2\) and \(6, 3\)",
    ),
    "adapter device": (
        lambda: {"head": LMHead(WEIGHT, low_rank=(torch.ones(4, 2), torch.ones(6, 2, device="meta")))},
        r"head.low_rank\[1\] \(6, 2\) is on meta but hidden \(4, 3\) on cpu; move them together",
    ),
    "bias device": (
        lambda: {"head": LMHead(WEIGHT, torch.zeros(6, device="meta"))},
        r"head.bias \(6,\) is on meta but hidden \(4, 3\) on cpu",
    ),
    "softcap": (lambda: {"head": LMHead(WEIGHT, softcap=0.0)}, "softcap must be positive or None, found 0.0"),
    "weight device": (
        lambda: {"head": LMHead(WEIGHT.to("meta"))},
        r"head.weight \(6, 3\) is on meta but hidden \(4, 3\) on cpu",
    ),
    "temperature": (lambda: {"temperature": 0.0}, "temperature must be positive and finite, found 0.0"),
    "targets rank": (lambda: {"targets": TARGETS[:, None]}, r"targets must be \(tokens,\) = \(4,\), found \(4, 1\)"),
    "targets length": (lambda: {"targets": TARGETS[:3]}, r"= \(4,\), found \(3,\)"),
    "targets dtype": (lambda: {"targets": TARGETS.float()}, "targets must be integers, found torch.float32"),
    "targets device": (lambda: {"targets": TARGETS.to("meta")}, r"targets \(4,\) is on meta but hidden on cpu"),
    "ignored targets": (
        lambda: {"targets": torch.tensor([0, -100, 1, 2])},
        r"targets must lie in \[0, 6\), found values from -100",
    ),
    "large targets": (lambda: {"targets": torch.tensor([0, 6, 1, 2])}, r"found values from 0 to 6"),
    "unknown statistic": (lambda: {"wanted": ("entropie",)}, "unknown statistic 'entropie'; did you mean 'entropy'"),
    "a string": (lambda: {"wanted": "logp"}, r"found the string 'logp'; write \('logp',\)"),
    "unknown backend": (lambda: {"backend": "streaming"}, "unknown backend 'streaming'; did you mean 'streamed'"),
    "gradient_tolerance": (
        lambda: {"gradient_tolerance": 0.1, "backend": "dense"},
        "'dense' holds all logits and skips nothing, found gradient_tolerance 0.1 and budget None",
    ),
    "budget": (lambda: {"budget": 1, "backend": "dense"}, "found gradient_tolerance 0.0 and budget 1; leave them"),
    "no ids": (lambda: {"wanted": ("ids_logp",)}, "ids_logp needs ids="),
    "ids rank": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS},
        r"ids must be \(tokens, n\) with tokens = 4, found \(4,\)",
    ),
    "ids length": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS[:3, None]},
        r"ids must be \(tokens, n\) with tokens = 4, found \(3, 1\)",
    ),
    "ids dtype": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS[:, None].float()},
        "ids must be integers, found torch.float32",
    ),
    "ids device": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS[:, None].to("meta")},
        r"ids \(4, 1\) is on meta but hidden on cpu",
    ),
    "negative ids": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS[:, None] - 1},
        r"ids must lie in \[0, 6\), found values from -1 to 4",
    ),
    "ids range": (
        lambda: {"wanted": ("ids_logp",), "ids": TARGETS[:, None] + 1},
        r"ids must lie in \[0, 6\), found values from 1 to 6",
    ),
    "no k": (lambda: {"wanted": ("topk_logp",)}, "topk_ids need k="),
    "k": (lambda: {"wanted": ("topk_ids",), "k": 7}, "k must lie between 1 and the vocabulary size 6, found 7"),
    "no teacher": (lambda: {"wanted": ("logp", "jsd")}, r"jsd needs teacher=\(hidden, head\)"),
    "teacher tokens": (
        lambda: {"wanted": ("forward_kl",), "teacher": (torch.randn(3, 2), TEACHER[1])},
        "must have 4 tokens and 6 vocabulary entries like the student, found 3 and 6",
    ),
    "teacher vocabulary": (
        lambda: {"wanted": ("forward_kl",), "teacher": (TEACHER[0], LMHead(torch.randn(5, 2)))},
        "found 4 and 5",
    ),
    "teacher width": (
        lambda: {"wanted": ("forward_kl",), "teacher": (HIDDEN, TEACHER[1])},
        "teacher head.weight must be",
    ),
    "teacher device": (
        lambda: {"wanted": ("jsd",), "teacher": (TEACHER[0].to("meta"), LMHead(TEACHER[1].weight.to("meta")))},
        r"the teacher \(4, \d\) is on meta but hidden \(4, 3\) on cpu",
    ),
    "teacher dtype": (
        lambda: {"wanted": ("jsd",), "teacher": (TEACHER[0].int(), TEACHER[1])},
        "teacher hidden must be floating point, found torch.int32",
    ),
    "jsd_beta": (
        lambda: {"wanted": ("jsd",), "teacher": TEACHER, "jsd_beta": 1.5},
        r"jsd_beta must lie in \[0, 1\], found 1.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_sentence(case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ask(**arguments())


@pytest.mark.parametrize("case", REFUSED)
def test_a_loss_refuses_the_same(case):
    arguments, message = REFUSED[case]
    given = {"hidden": HIDDEN, "head": HEAD, "targets": TARGETS, "wanted": ("logp",), **arguments()}
    positional = [given.pop(name) for name in ("hidden", "head", "targets", "wanted")]
    with pytest.raises(ValueError, match=message):
        vocab_loss(*positional, lambda s: s.logp, torch.ones(4), **given)


def test_a_backend_that_cannot_run_here_names_the_one_that_can(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run here: .+ 'streamed'"):
        ask(backend="triton")
    assert torch.equal(ask(backend="auto")["logp"], ask(backend="streamed")["logp"])


def test_options_that_are_not_needed_are_not_looked_at():
    other = (HIDDEN, LMHead(torch.randn(5, 3)))
    assert ask(ids=TARGETS[:, None] + 1, teacher=other, k=99)["logp"].shape == (4,)
    assert ask(wanted=()).as_dict() == {}


def test_narrow_integers_are_taken():
    assert torch.equal(ask(targets=TARGETS.to(torch.int32))["logp"], ask()["logp"])


def test_the_container_tells_unknown_from_unasked():
    values = ask()
    with pytest.raises(KeyError, match="unknown statistic 'log_p'; did you mean 'logp'"):
        values["log_p"]
    with pytest.raises(KeyError, match="'entropy' was not computed"):
        values["entropy"]
    assert values.entropy is None


def test_the_names_of_the_table():
    assert len(STATISTICS) == 18 and set(STATISTICS) >= DETACHED | TEACHER_STATISTICS
    case = problem()
    values = case.statistics(*STATISTICS).as_dict()
    assert {name for name, value in values.items() if not value.requires_grad} == DETACHED


def test_loss_and_map_refuse_what_is_not_per_token():
    ones = torch.ones(4)
    with pytest.raises(ValueError, match=r"one value per token, \(4,\), found \(\)"):
        vocab_loss(HIDDEN, HEAD, TARGETS, ("logp",), lambda s: s.logp.mean(), ones)
    with pytest.raises(ValueError, match=r"weight must be \(tokens,\) = \(4,\), found \(4, 1\)"):
        vocab_loss(HIDDEN, HEAD, TARGETS, ("logp",), lambda s: s.logp, ones[:, None])
    with pytest.raises(ValueError, match=r"must have 4 entries, found shape \(3,\)"):
        vocab_loss(HIDDEN, HEAD, TARGETS, ("logp",), lambda s: s.logp, ones[:3])
    with pytest.raises(ValueError, match="a per-token tensor is on meta but hidden on cpu"):
        vocab_loss(HIDDEN, HEAD, TARGETS, ("logp",), lambda s: s.logp, ones.to("meta"))
    with pytest.raises(ValueError, match=r"must have 4 entries, found shape \(\)"):
        map_logits(lambda z, c: z.sum(1), HIDDEN, HEAD, torch.ones(()))
    with pytest.raises(ValueError, match=r"one entry per token of its block \(4\), found shape \(6,\)"):
        map_logits(lambda z: z.sum(0), HIDDEN, HEAD)
    with pytest.raises(ValueError, match="width 3"):
        map_logits(lambda z: z, HIDDEN, LMHead(torch.randn(6, 2)))
