"""Weights from the trainer to the engines' processes, in memory: handles here, receivers there."""

from minidistill.weights.handles import Entry, Outbox, opened

__all__ = ["Entry", "Outbox", "opened"]
