"""The networks: CARN and those it is compared with, one a file, and one table of their names."""

from carn.models.table import (
    MODELS,
    ModelConfig,
    ModelEntry,
    ModelName,
    build_model,
    config_from_dict,
    config_to_dict,
)

__all__ = [
    "MODELS",
    "ModelConfig",
    "ModelEntry",
    "ModelName",
    "build_model",
    "config_from_dict",
    "config_to_dict",
]
