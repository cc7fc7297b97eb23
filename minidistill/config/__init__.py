"""The configuration: schema, TOML files, command-line overrides, errors with file and line."""

from minidistill.config.load import LoadedConfig, load_config
from minidistill.config.schema import Config

__all__ = ["Config", "LoadedConfig", "load_config"]
