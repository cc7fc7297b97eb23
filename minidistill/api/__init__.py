"""What Python uses: `from minidistill import bake, run, load_config, Run`."""

from minidistill.api.run_object import Run
from minidistill.api.training import bake, load_config, run
from minidistill.config import LoadedConfig
from minidistill.errors import UserError

__all__ = ["LoadedConfig", "Run", "UserError", "bake", "load_config", "run"]
