"""One YAML file a run: dataclasses, loading with overrides, and checks that name the nearest known key."""

from posttrain.config.annotation import AnnotationConfig
from posttrain.config.inputs import DataConfig, DataSource, EvaluationSource, ModelConfig, TokenizerConfig
from posttrain.config.load import from_tree, load
from posttrain.config.resolve import resolve
from posttrain.config.schema import DiagnosticsConfig, EvaluationConfig, HarnessConfig, KernelConfig, RunConfig
from posttrain.config.trainer import peft_config, trainer_config_class
from posttrain.config.unlearning import MuseConfig, TofuConfig

__all__ = [
    "AnnotationConfig",
    "DataConfig",
    "DataSource",
    "DiagnosticsConfig",
    "EvaluationConfig",
    "EvaluationSource",
    "HarnessConfig",
    "KernelConfig",
    "ModelConfig",
    "MuseConfig",
    "RunConfig",
    "TofuConfig",
    "TokenizerConfig",
    "from_tree",
    "load",
    "peft_config",
    "resolve",
    "trainer_config_class",
]
