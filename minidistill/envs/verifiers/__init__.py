"""`verifiers`: installed environments of the package verifiers, by their ids."""

from minidistill.envs.verifiers.load import load

__all__ = ["load"]
