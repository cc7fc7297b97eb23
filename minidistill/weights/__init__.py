"""Weights from the trainer to the engines' processes, in memory: handles here, receivers there."""

from minidistill.weights.handles import CHUNK_BYTES, Entry, Outbox, chunked, opened

__all__ = ["CHUNK_BYTES", "Entry", "Outbox", "chunked", "opened"]
