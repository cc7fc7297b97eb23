"""The kinds of engine that `inference.engine` may name.

To add one, write its module and add a line to `ENGINE_KINDS`. The module is named as a string and
imported by the launcher alone, so that the configuration imports neither torch nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How an engine relates to the rest of a run."""

    name: str
    module: str | None
    """Has `start(engine, config, sync_folder, *, teacher)`, which returns a list of `Engine`, one
    for each replica. None: the trainer's own model samples."""
    on_run_gpus: bool = False
    """It runs on GPUs of this machine, next to the trainer's."""

    @property
    def in_trainer(self) -> bool:
        return self.module is None


ENGINE_KINDS = {
    kind.name: kind
    for kind in (
        EngineKind("embedded", None),
        EngineKind("vllm", "minidistill.engines.vllm.engine", on_run_gpus=True),
    )
}
SERVER = EngineKind("server", "minidistill.engines.server.engine")
"""Taken with `server_urls`; `inference.engine` does not name it."""
