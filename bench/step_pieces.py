"""What the seconds of a step go to: timers around the public parts that a step calls.

Pieces are exclusive: the time of a piece within another one counts once, so all of them sum to the
step. `other` is what no timer is around: drawing prompts, batches, metrics and records.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from minidistill.driver.session import Session
from minidistill.types import Request, Role, SamplingParams

PIECES = (
    "prefill",
    "decode",
    "score",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "sync",
    "other",
)
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
TRAINING = ("score", "forward", "loss", "backward", "optimizer")


class Stopwatch:
    """Exclusive seconds of named pieces, which may be nested."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.clock = clock
        self._open: list[str] = []
        self._since = 0.0

    def _book(self) -> None:
        now = self.clock()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    def start(self, name: str) -> None:
        self._book()
        self._open.append(name)

    def stop(self) -> None:
        self._book()
        self._open.pop()

    @contextlib.contextmanager
    def piece(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.piece(name):
                return call(*args, **kwargs)

        return run


@dataclass(slots=True)
class Sampled:
    """The call of the engine that sampled the step."""

    requests: Sequence[Request]
    params: SamplingParams


@contextlib.contextmanager
def timers(session: Session, watch: Stopwatch) -> Iterator[list[Sampled]]:
    """Time what the session's steps call. Yields the calls of the engine, as they are made."""
    engine, trainer, policy = session.engine, session.trainer, session.policy
    generate, running_as = engine.generate, type(policy).running_as
    loss_function = trainer.estimator.loss_function
    calls: list[Sampled] = []

    def timed_generate(requests: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(Sampled(requests, params))
        with watch.piece("sample"):
            return generate(requests, params, *args, **kwargs)

    @contextlib.contextmanager
    def timed_running_as(self: Any, role: Role) -> Iterator[None]:
        scoring = watch.piece("score") if role is Role.TEACHER else contextlib.nullcontext()
        with scoring, running_as(self, role):
            yield

    def timed_loss_function(settings: Any) -> Any:
        return watch.timed(loss_function(settings), "loss")

    def forward_begins(module: Any, args: Any) -> None:
        if torch.is_grad_enabled():  # it is off while the teacher or an engine runs the model
            watch.start("forward")

    def forward_ends(module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            watch.stop()

    optimizer = trainer.optimizer
    with contextlib.ExitStack() as stack:
        for target, name, wrapped in (
            (engine, "generate", timed_generate),
            (engine, "sync", watch.timed(engine.sync, "sync")),
            (trainer, "step", watch.timed(trainer.step, "trainer")),
            (type(policy), "running_as", timed_running_as),
            (trainer.estimator, "loss_function", timed_loss_function),
            (torch.autograd, "backward", watch.timed(torch.autograd.backward, "backward")),
            (optimizer, "clip", watch.timed(optimizer.clip, "optimizer")),
            (optimizer, "step", watch.timed(optimizer.step, "optimizer")),
        ):
            stack.enter_context(mock.patch.object(target, name, wrapped))
        for hook in (
            policy.body.register_forward_pre_hook(forward_begins),
            policy.body.register_forward_hook(forward_ends),
        ):
            stack.callback(hook.remove)
        yield calls


@dataclass(frozen=True, slots=True)
class Parts:
    """Of one step, in seconds of a clock."""

    pieces: dict[str, float]
    """By `PIECES`. They sum to the step."""
    training: float
    """Of the trainer: `TRAINING`, and a part of `other`."""

    @property
    def step(self) -> float:
        return sum(self.pieces.values())


def take_apart(
    session: Session, step: Callable[[], Any], clock: Clock = time.perf_counter
) -> tuple[Parts, Any]:
    """The parts of one step, and what `step` returns.

    Sampling is divided by another call for the first token alone: its time is the prefill.
    """
    watch = Stopwatch(clock)
    with timers(session, watch) as calls, watch.piece("other"):
        result = step()
    seconds = dict.fromkeys(PIECES, 0.0) | watch.seconds
    sampling, trainer = seconds.pop("sample", 0.0), seconds.pop("trainer", 0.0)
    began = clock()
    for call in calls:
        first_token = replace(call.params, max_tokens=1)
        session.engine.generate(call.requests, first_token, Role.STUDENT)
    prefill = min(clock() - began, sampling)
    seconds |= {"prefill": prefill, "decode": sampling - prefill}
    seconds["other"] += trainer
    return Parts(seconds, trainer + sum(seconds[name] for name in TRAINING)), result
