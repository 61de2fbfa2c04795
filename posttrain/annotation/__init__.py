"""Columns written beside a data set once, so that training reads them instead of running another model."""

from posttrain.annotation.topk import annotate_teacher_topk, teacher_topk
from posttrain.annotation.writing import check_output, write

__all__ = ["annotate_teacher_topk", "check_output", "teacher_topk", "write"]
