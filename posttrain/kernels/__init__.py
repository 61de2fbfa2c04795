"""Statistics of the next-token distribution, computed without ever holding tokens x vocabulary logits."""

from posttrain.kernels.dispatch import vocab_statistics
from posttrain.kernels.head import LMHead, VocabShard
from posttrain.kernels.loss import vocab_loss
from posttrain.kernels.mapping import map_logits
from posttrain.kernels.table import DETACHED, STATISTICS, TEACHER_STATISTICS, VocabStatistics
from posttrain.kernels.tolerance import Certificate, record_certificates

__all__ = [
    "DETACHED",
    "STATISTICS",
    "TEACHER_STATISTICS",
    "Certificate",
    "LMHead",
    "VocabShard",
    "VocabStatistics",
    "map_logits",
    "record_certificates",
    "vocab_loss",
    "vocab_statistics",
]
