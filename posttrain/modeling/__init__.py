"""Hugging Face causal LMs as hidden states and a head: everything the kernels need, through the model's own forward."""

from posttrain.modeling.check import HEAD_TOLERANCE, check_head, head_difference
from posttrain.modeling.engines import BackboneModules, backbone_modules, causal_lm
from posttrain.modeling.forward import attach, detach, is_attached, standalone_copy
from posttrain.modeling.head import is_vision_model, logit_scale, logit_softcap, read_head, refuse_vision_model
from posttrain.modeling.request import StatisticsGroup, VocabOutput, VocabRequest
from posttrain.modeling.shared_prefix import SharedPrefixLayout, shared_prefix_layout, worthwhile
from posttrain.modeling.shared_prefix_support import check_shared_prefix, refuse_shared_prefix, shared_prefix_obstacle

__all__ = [
    "HEAD_TOLERANCE",
    "BackboneModules",
    "SharedPrefixLayout",
    "StatisticsGroup",
    "VocabOutput",
    "VocabRequest",
    "attach",
    "backbone_modules",
    "causal_lm",
    "check_head",
    "check_shared_prefix",
    "detach",
    "head_difference",
    "is_attached",
    "is_vision_model",
    "logit_scale",
    "logit_softcap",
    "read_head",
    "refuse_shared_prefix",
    "refuse_vision_model",
    "shared_prefix_layout",
    "shared_prefix_obstacle",
    "standalone_copy",
    "worthwhile",
]
