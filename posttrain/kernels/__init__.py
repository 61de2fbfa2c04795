"""Statistics of the next-token distribution, computed without ever holding tokens x vocabulary logits."""

from posttrain.kernels.head import LMHead
from posttrain.kernels.table import DETACHED, STATISTICS, TEACHER_STATISTICS, VocabStatistics

__all__ = ["DETACHED", "STATISTICS", "TEACHER_STATISTICS", "LMHead", "VocabStatistics"]
