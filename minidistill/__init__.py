"""Reverse-KL on-policy context distillation."""

__version__ = "0.1.0"
