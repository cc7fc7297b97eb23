"""One copy of the weights for several processes, which are replaced here by readers of handles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from minidistill.engines.vllm.client import EngineDied, EngineFailed
from minidistill.engines.vllm.weights_buffer import open_buffer, views
from minidistill.engines.vllm.weights_send import Receiver, WeightSender
from minidistill.trainer.policy import Policy
from minidistill.types import Role

CPU = torch.device("cpu")


class Reader:
    """A process with two workers. It reads the weights only when it is asked for its answer, as
    late as a real one may, and ends or fails at its `fails_at`-th answer."""

    def __init__(self, fails_at: int = 0, error: Exception | None = None) -> None:
        self.fails_at, self.error = fails_at, error
        self.methods: list[str] = []
        self.answers = 0
        self.found: list[dict[str, torch.Tensor]] = [{}, {}]

    def start_command(self, method: str, **arguments: Any) -> Callable[[], None]:
        self.methods.append(method)

        def answer() -> None:
            self.answers += 1
            if self.error is not None and self.answers == self.fails_at:
                raise self.error
            if "entries" in arguments:
                for rank, found in enumerate(self.found):
                    buffer = open_buffer(arguments["handle"], CPU, rank)
                    read = views(buffer, arguments["entries"])
                    found.update({name: tensor.clone() for name, tensor in read.items()})

        return answer


def receiver(reader: Reader) -> Receiver:
    options: Any = SimpleNamespace(adapter={}, gpu_ids=(), workers=2)
    process: Any = reader
    return Receiver(process, options)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{n}.weight": torch.randn(n + 1, 8, generator=generator) for n in range(9)}


def sender_of(readers: list[Reader]) -> WeightSender:
    model = nn.Module()
    head = nn.Linear(2, 2)
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    policy = Policy(model, None, frozenset(), CPU)
    return WeightSender(policy, (Role.STUDENT,), [receiver(r).options for r in readers])


def test_each_weight_is_gathered_once_for_all(weights: dict[str, torch.Tensor]) -> None:
    gathered: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            gathered.append(name)
            yield name, tensor

    readers = [Reader(), Reader(), Reader()]
    sender = sender_of(readers)
    sender.chunk_bytes = 500
    sender.take_weights(7, gather)
    assert sender.send([receiver(r) for r in readers]) == {}
    assert gathered == list(weights)
    assert sender.bytes_packed == sum(t.numel() * 4 for t in weights.values())
    for reader in readers:
        assert reader.methods[0] == "start_update"
        assert reader.methods[-1] == "finish_update"
        assert reader.methods.count("update_weights") > 2
        for found in reader.found:
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[n], t) for n, t in weights.items())


@pytest.mark.parametrize("error", [EngineDied("SIGKILL"), EngineFailed("no memory")])
def test_one_that_fails_does_not_keep_the_weights_from_the_others(
    weights: dict[str, torch.Tensor], error: Exception
) -> None:
    readers = [Reader(), Reader(fails_at=3, error=error), Reader()]
    sender = sender_of(readers)
    sender.chunk_bytes = 500
    sender.take_weights(1, lambda: weights.items())
    failures: Any = sender.send([receiver(r) for r in readers])
    assert failures == {readers[1]: error}
    assert readers[1].methods == ["start_update", "update_weights", "update_weights"]
    for reader in (readers[0], readers[2]):
        assert all(torch.equal(reader.found[1][n], t) for n, t in weights.items())
