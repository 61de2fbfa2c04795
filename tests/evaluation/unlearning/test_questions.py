"""Reading rows, what is wrong with them, and that training sees the same text as the evaluation."""

import pytest
from datasets import Dataset, disable_progress_bars

from posttrain.data import formats
from posttrain.evaluation.rows import scored_ids
from posttrain.evaluation.unlearning import AnswerScorer, read_questions
from posttrain.evaluation.unlearning.questions import fingerprint, score_questions, shared
from tests import tiny

ROW = {"question": "ab", "answer": "12", "paraphrased_answer": "21", "perturbed_answer": ["3", "45"]}


def read(rows, template="{question}=", chat=False):
    return read_questions(rows, template=template, chat=chat, key="evaluation.tofu.forget")


def test_a_row_is_read_with_the_default_template_and_a_space() -> None:
    (found,) = read([ROW], template=None)
    assert found.prompt == "Question: ab\nAnswer:"
    assert found.row(found.answer) == {"prompt": found.prompt, "completion": " 12"}
    assert (found.paraphrase, found.perturbed) == ("21", ("3", "45"))


def test_no_space_behind_white_space_and_none_in_a_chat() -> None:
    assert read([ROW], template="{question}\n")[0].row("12")["completion"] == "12"
    (chat,) = read([ROW], template=None, chat=True)
    assert chat.row("12") == {
        "prompt": [{"role": "user", "content": "ab"}],
        "completion": [{"role": "assistant", "content": "12"}],
    }


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", [None, "{question}\n", "{question}="])
def test_training_by_the_format_question_answer_sees_the_tokens_that_are_measured(chat_tokenizer, chat, template):
    disable_progress_bars()
    tokenizer = chat_tokenizer if chat else tiny.tokenizer()
    rows = formats.prepare(Dataset.from_list([ROW]), format="question-answer", template=template, chat=chat)
    trained = {"prompt": rows[0]["prompt"], "completion": rows[0]["completion"]}
    (found,) = read([ROW], template=template, chat=chat)
    assert trained == found.row(found.answer)
    assert scored_ids(tokenizer, trained) == scored_ids(tokenizer, found.row(found.answer))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"question": "a", "reply": "b"}], r"'answer'.*not there"),
        ([ROW, {**ROW, "answer": " "}], "row 1: answer is empty"),
        ([ROW, {**ROW, "question": None}], "row 1: question is missing"),
        ([ROW, {**ROW, "perturbed_answer": None}], "row 1: perturbed_answer is missing, and other rows have it"),
        ([ROW, {**ROW, "perturbed_answer": []}], "row 1: perturbed_answer is missing, and other rows have it"),
        ([{**ROW, "paraphrased_answer": None}, ROW], "row 0: paraphrased_answer is missing, and other rows have it"),
        ([{**ROW, "perturbed_answer": ["3", ""]}], "row 0: perturbed_answer is"),
    ],
)
def test_bad_rows_are_named(rows, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(rows)
    assert "evaluation.tofu.forget" in str(error.value)


def test_a_template_names_the_columns_there_are() -> None:
    with pytest.raises(ValueError, match="'query'"):
        read([ROW], template="{query}=")


def test_shared_rows_are_counted_and_a_fingerprint_sees_every_part() -> None:
    one, other = read([ROW, {**ROW, "answer": "9"}]), read([{**ROW, "perturbed_answer": ["7"]}])
    assert shared(one, other) == 1
    prints = {fingerprint(read([{**ROW, **change}])) for change in (
        {}, {"question": "b"}, {"answer": "9"}, {"paraphrased_answer": "9"}, {"perturbed_answer": ["9"]},
    )}  # fmt: skip
    assert len(prints | {fingerprint(read([ROW], template="{question}+"))}) == 6


def test_every_answer_gets_its_own_statistics() -> None:
    """Of answers scored together, in whatever order, each has the NLL that it has alone."""
    rows = [ROW, {"question": "c", "answer": "1", "paraphrased_answer": "234", "perturbed_answer": ["5", "67", "89"]}]
    questions = read(rows)
    scorer = AnswerScorer(tiny.model().eval(), tiny.tokenizer(), batch_size=3)

    def alone(question, text):
        return scorer.rows([question.row(text)], "row").mean_nll[0]

    found = score_questions(scorer, questions, "rows")
    for index, (question, row) in enumerate(zip(questions, rows, strict=True)):
        assert found.answer.mean_nll[index] == pytest.approx(alone(question, row["answer"]), rel=1e-5)
        assert found.paraphrase.mean_nll[index] == pytest.approx(alone(question, row["paraphrased_answer"]), rel=1e-5)
        expected = [alone(question, text) for text in row["perturbed_answer"]]
        assert found.perturbed_nll[index].tolist() == pytest.approx(expected, rel=1e-5)
    bare = score_questions(scorer, questions, "rows", answers_only=True)
    assert bare.paraphrase is None and bare.perturbed is None and bare.perturbed_nll is None
