"""From a model and a context to a run: what `minidistill bake` and `minidistill.bake` do."""

from minidistill.baking.configuration import BakePlan, bake_configuration

__all__ = ["BakePlan", "bake_configuration"]
