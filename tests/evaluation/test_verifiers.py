import importlib.util
import itertools
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from posttrain.evaluation import verifiers
from posttrain.evaluation.verifiers import ExactVerifier, MathVerifier, final_answer, normalise

needs_math_verify = pytest.mark.skipif(
    not importlib.util.find_spec("math_verify"), reason="math-verify is not installed (extra evaluation)"
)


@pytest.fixture(scope="module")
def math():
    with MathVerifier(timeout=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,000 \nQuestion: and then?\n#### 8", "1,000"),
        ("####\n 5", "5"),
        ("####", ""),
        ("  no mark ", "no mark"),
    ],
)
def test_final_answer_follows_the_first_mark(text, answer):
    assert final_answer(text) == answer


def test_exact_compares_normalised_text():
    verifier = ExactVerifier()
    assert verifier(" The  CAT.\n", {"answer": "the cat"}) == ("the cat", True)
    assert verifier("the dog", {"completion": "the cat"}) == ("the dog", False)
    assert verifier("so\n#### 7", {"completion": "why\n#### 7"}) == ("7", True)
    assert verifier("  ", {"answer": "x"}) == (None, False)
    assert normalise("ﬁve .") == "five"
    with pytest.raises(ValueError, match=r"columns \['prompt'\]"):
        verifier("x", {"prompt": "p"})


@needs_math_verify
@pytest.mark.parametrize(
    ("reference", "completion", "correct", "answer"),
    [
        ("so 9 * 2 = $<<9*2=18>>18\n#### 18", "She makes <<9*2=18>>18.\n#### 18", True, "18"),
        ("#### 18", "#### $18.00", True, "18"),
        ("#### 18", "#### 17\nQuestion: ...\n#### 18", False, "17"),
        ("#### 70,000", "the profit is 70000", True, "70000"),
        ("#### 70,000", "#### 70", False, "70"),
        ("1/2", "The answer is 0.5", True, "1/2"),
        ("3 1/2", "3.5", True, "7/2"),
        ("3 1/2", "1", False, "1"),
        (r"\frac{1}{2}", r"Thus $x = \frac{2}{4}$", True, None),
        ("-3", "#### -3", True, "-3"),
        ("#### 5", "she said <<5*1=5>> nothing", False, None),
        ("#### 5", "", False, None),
        ("blue", "Blue.", True, "blue"),
    ],
)
def test_math_judges_value_and_reads_the_answer(math, reference, completion, correct, answer):
    verdict = math(completion, {"answer": reference})
    assert verdict.correct is correct
    if answer is not None:
        assert verdict.answer == answer


@needs_math_verify
def test_equal_values_are_one_vote(math):
    row = {"answer": "1/2"}
    assert {math(text, row).answer for text in ("0.5", "1/2", ".50", r"\boxed{\frac{1}{2}}", "2/4")} == {"1/2"}


@needs_math_verify
def test_math_works_outside_the_main_thread(math):
    found = []
    thread = threading.Thread(target=lambda: found.append(math("it is 12.0", {"answer": "12"})))
    thread.start()
    thread.join()
    assert found == [("12", True)]


@needs_math_verify
def test_an_answer_that_takes_too_long_is_counted_and_the_next_one_judged():
    with MathVerifier(timeout=1.5) as verifier:
        assert verifier("9**9**9**9", {"answer": "18"}).correct is False
        assert verifier.unjudged == 1
        assert verifier("18", {"answer": "18"}) == ("18", True)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(3)\n")
    monkeypatch.setattr("posttrain.evaluation.math_process._WORKER", broken)
    process = verifiers.MathProcess(timeout=1.0)
    with pytest.raises(RuntimeError, match="did not start"):
        process.ask("1", "1")


def test_task_verifier_asks_the_task():
    procedural = pytest.importorskip("posttrain.data.procedural")
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra evaluation)")
    rows = procedural.make("addition", size=3, seed=0)
    with verifiers.resolve("auto", rows) as verifier:
        assert verifier.name == "task"
        for row in rows:
            assert verifier(f" {row['answer']}\n", row) == (row["answer"], True)
            assert not verifier(row["answer"] + "1", row).correct


def test_task_verifier_needs_a_task():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra evaluation)")
    with pytest.raises(ValueError, match="needs a procedural task"):
        verifiers.resolve("task", [])("1", {"answer": "1"})


@needs_math_verify
@pytest.mark.parametrize(
    ("answers", "name"),
    [
        (["12", "$1,200.50", "3/4", "-7", "5%", ".5"], "math"),
        (["why\n#### 3"], "math"),
        ([r"\boxed{x}"], "math"),
        (["12", "twelve"], "exact"),
        (["1.2.3"], "exact"),
    ],
)
def test_auto_reads_the_references(answers, name):
    with verifiers.resolve("auto", [{"answer": answer} for answer in answers]) as verifier:
        assert verifier.name == name


def test_unknown_verifier_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        verifiers.resolve("exakt", [])


@pytest.mark.parametrize(("name", "module"), [("math", "math_verify"), ("task", "reasoning_gym")])
def test_missing_extra_is_named(monkeypatch, name, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=r"pip install posttrain\[evaluation\]"):
        verifiers.resolve(name, [{"answer": "1"}], task="addition")


@needs_math_verify
@pytest.mark.skipif("POSTTRAIN_DATA" not in os.environ, reason="POSTTRAIN_DATA is not set")
def test_gsm8k_references_verify_themselves(math):
    lines = Path(os.environ["POSTTRAIN_DATA"], "gsm8k", "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:200]]
    for row, other in itertools.pairwise(rows):
        assert math(row["answer"], row).correct
        same = final_answer(row["answer"]) == final_answer(other["answer"])
        assert math(other["answer"], row).correct is same
