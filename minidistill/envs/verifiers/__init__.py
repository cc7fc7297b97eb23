"""`verifiers`: installed environments of the package verifiers, by their ids."""

from minidistill.envs.verifiers.loading import load

__all__ = ["load"]
