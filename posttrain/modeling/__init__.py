"""Hugging Face causal LMs as hidden states and a head: everything the kernels need, through the model's own forward."""

from posttrain.modeling.check import HEAD_TOLERANCE, check_head, head_difference
from posttrain.modeling.engines import BackboneModules, backbone_modules, causal_lm
from posttrain.modeling.forward import attach, detach, is_attached
from posttrain.modeling.head import is_vision_model, logit_scale, logit_softcap, read_head, refuse_vision_model
from posttrain.modeling.request import StatisticsGroup, VocabOutput, VocabRequest

__all__ = [
    "HEAD_TOLERANCE",
    "BackboneModules",
    "StatisticsGroup",
    "VocabOutput",
    "VocabRequest",
    "attach",
    "backbone_modules",
    "causal_lm",
    "check_head",
    "detach",
    "head_difference",
    "is_attached",
    "is_vision_model",
    "logit_scale",
    "logit_softcap",
    "read_head",
    "refuse_vision_model",
]
