"""The adapters of one run on one server. Each version has a name and is kept while it is in use.

vLLM's prefix cache is keyed by an adapter's name and path, so no version reads another's keys and
values. vLLM keeps only as many adapters in memory as it has slots, and may read one's files again
at any time, so the files are deleted last.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from minidistill.engines.vllm.engine import NAMES
from minidistill.system.files import remove, writing
from minidistill.trainer.policy import Policy, Weights

PREFIX = "minidistill"


def remove_leftovers(folder: Path) -> None:
    """Remove the adapters of a run that was killed. The folder is the run's, which has one owner.

    Call it before the run writes its first adapter there.
    """
    for path in folder.glob(f"{PREFIX}-*"):
        remove(path)


@dataclass(eq=False, slots=True)
class Adapter:
    """One version of an adapter, as plain PEFT in a folder."""

    weights: Weights
    version: int
    path: Path
    requests: int = 0
    """Requests in flight that name it."""

    @property
    def name(self) -> str:
        """What the server calls it."""
        return self.path.name


class Adapters:
    """The versions that exist. Thread-safe: one thread samples, another syncs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex[:8]  # runs that share a server use different names
        self._lock = threading.Lock()
        self._current: dict[Weights, Adapter] = {}
        self._old: list[Adapter] = []

    @property
    def current(self) -> list[Adapter]:
        return list(self._current.values())

    @property
    def all(self) -> list[Adapter]:
        return [*self._current.values(), *self._old]

    def name(self, *parts: object) -> str:
        return "-".join(map(str, (PREFIX, self._mark, *parts)))

    def write(self, policy: Policy, weights: Weights, version: int) -> Adapter:
        """Write one of the policy's adapters to disk; `version` must be new.

        Raises UserError (exit code 3) if it cannot be written. Nothing of it is left then.
        """
        path = (self.folder / self.name(NAMES[weights], f"v{version}")).resolve()
        with policy.lock:
            tensors = {n: p.detach().cpu().contiguous() for n, p in policy.adapter(weights)}
            settings = copy.copy(policy.model.peft_config[Weights.STUDENT.value])
            settings.inference_mode = True
            with writing(path, needed=sum(tensor.nbytes for tensor in tensors.values())):
                path.mkdir(parents=True, exist_ok=False)
                try:
                    save_file(tensors, path / "adapter_model.safetensors")
                    settings.save_pretrained(str(path))
                except BaseException:
                    remove(path)
                    raise
        return Adapter(weights, version, path)

    def switch(self, adapter: Adapter) -> None:
        """From now on requests for these weights name this version."""
        with self._lock:
            old = self._current.get(adapter.weights)
            self._old += [old] if old else []
            self._current[adapter.weights] = adapter

    @contextmanager
    def using(self, weights: Weights) -> Iterator[Adapter | None]:
        """The current adapter for one request, which keeps it alive; None for the base."""
        with self._lock:
            adapter = self._current.get(weights)
            if adapter is not None:
                adapter.requests += 1
        try:
            yield adapter
        finally:
            if adapter is not None:
                with self._lock:
                    adapter.requests -= 1

    def take_idle(self) -> list[Adapter]:
        """Remove and return the old versions that no request uses any more."""
        with self._lock:
            idle = [adapter for adapter in self._old if not adapter.requests]
            self._old = [adapter for adapter in self._old if adapter.requests]
        return idle

    def delete(self) -> None:
        """Delete all versions from the disk."""
        self._current.clear()
        self._old.clear()
        for path in self.folder.glob(self.name("*")):
            remove(path)
        with suppress(OSError):  # another server's adapters are there
            self.folder.rmdir()
