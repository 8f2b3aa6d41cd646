"""The config: typed groups, and how they are read. Needs neither torch nor Ray."""

from ddil_ray.config.ablation import AblationConfig
from ddil_ray.config.chain import ChainConfig
from ddil_ray.config.groups import Role
from ddil_ray.config.load import ConfigTree, config_hash, deciding, flatten, load_config, preset_names, to_yaml
from ddil_ray.config.run import RunConfig
from ddil_ray.config.teacher import TeacherConfig
from ddil_ray.config.text_teacher import TextTeacherConfig, load_teacher_config, teacher_config

__all__ = [
    "AblationConfig",
    "ChainConfig",
    "ConfigTree",
    "Role",
    "RunConfig",
    "TeacherConfig",
    "TextTeacherConfig",
    "config_hash",
    "deciding",
    "flatten",
    "load_config",
    "load_teacher_config",
    "preset_names",
    "teacher_config",
    "to_yaml",
]
