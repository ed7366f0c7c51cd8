"""The typed configuration: a tree of sections, read from YAML and flags, and checked before anything costly starts."""

from tidar_megatron.config.checks import check_config, check_world_size
from tidar_megatron.config.reader import (
    FIELDS,
    SECTIONS,
    build_config,
    flag,
    load_config,
    load_resolved_config,
    parse_config,
)
from tidar_megatron.config.sections import DraftConfig, HealthConfig, ModelConfig, ParallelConfig, TiDARConfig
from tidar_megatron.config.tree import Config, ResolvedConfig

CONFIG_FILE = "resolved_config.yaml"  # the resolved configuration, in the run's folder

__all__ = [
    "CONFIG_FILE",
    "FIELDS",
    "SECTIONS",
    "Config",
    "DraftConfig",
    "HealthConfig",
    "ModelConfig",
    "ParallelConfig",
    "ResolvedConfig",
    "TiDARConfig",
    "build_config",
    "check_config",
    "check_world_size",
    "flag",
    "load_config",
    "load_resolved_config",
    "parse_config",
]
