"""How much a model still knows of what it was to forget, and how much it lost beside: suites `tofu`, `muse`, `audit`.

Every metric is a function of per-token statistics that one forward a data set gives (`tokens`), and of the answers
written.
"""

from posttrain.evaluation.unlearning.audit import AuditSuite, audit
from posttrain.evaluation.unlearning.muse import MuseSuite
from posttrain.evaluation.unlearning.questions import Question, read_questions
from posttrain.evaluation.unlearning.retain import RetainResults
from posttrain.evaluation.unlearning.tofu import TofuSuite
from posttrain.evaluation.unlearning.tokens import AnswerScorer, AnswerTokens

__all__ = [
    "AnswerScorer",
    "AnswerTokens",
    "AuditSuite",
    "MuseSuite",
    "Question",
    "RetainResults",
    "TofuSuite",
    "audit",
    "read_questions",
]
