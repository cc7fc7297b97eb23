"""Engines and a server that several files share.

A test finds them in any state: it sets the weights that it needs and syncs them as a new version.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.servers import ADAPTERS, serving
from support.vllm import Bench, make_bench, student_error

FEW = ("--orchestrator.env.0.args.num_train_examples", "8")


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server that takes two adapters."""
    with serving(tmp_path_factory.mktemp("server") / "log", *ADAPTERS) as (found, _):
        yield found


@pytest.fixture(scope="session")
def adapter_bench() -> Iterator[Bench]:
    """An engine that serves the base and an adapter on it."""
    bench = make_bench(*FEW)
    yield bench
    bench.engine.close()


@pytest.fixture(scope="session")
def weights_bench() -> Iterator[Bench]:
    """An engine whose model's every weight is trained."""
    bench = make_bench(*FEW, "--no-trainer.model.lora")
    try:
        assert student_error(bench) < 1e-4, "before the first step it has them from the disk"
        yield bench
    finally:
        bench.engine.close()
