"""Groups handed to the trainer while others are sampled: the same rollouts, updates and errors."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.lab import NO_MISMATCH_LIMIT, Lab, cpu_placement, make_lab
from support.scripted import ScriptedEngine

from minidistill.envs.registry import load_environments
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.reporting.terminal import open_display
from minidistill.rollouts.collector import Collector
from minidistill.rollouts.stream_collector import (
    MAX_PARTS,
    RolloutStream,
    StreamCollector,
    split_into_parts,
)
from minidistill.trainer import trainer as trainer_module
from minidistill.types import Rollout

Configure = Callable[..., Any]
STEP = (
    "--orchestrator.batch_size", "24", "--orchestrator.env.0.args.num_train_examples", "16",
    "--orchestrator.rollouts_per_example", "3",
)  # fmt: skip


@dataclass
class Stream:
    """A lab, whose engine is scripted, and its collectors."""

    lab: Lab
    engine: ScriptedEngine
    collector: Collector
    streaming: StreamCollector

    def plain(self, step: int = 1) -> list[Rollout]:
        return self.collector.collect(self.engine, step, step - 1)[0]

    def start(self, step: int = 1) -> RolloutStream:
        return self.streaming.start(step, step - 1)

    def parts(self) -> list[list[Rollout]]:
        return [list(part) for part in self.start().rollouts.parts]


@contextmanager
def streaming(loaded: Any, steps: int = 1) -> Iterator[Stream]:
    lab = make_lab(loaded)
    engine = ScriptedEngine(lab.engine)
    environments = load_environments(loaded.config.orchestrator.env, "")
    collector = Collector(
        loaded.config, environments, lab.builder, cpu_placement(loaded), open_display()
    )
    for step in range(1, steps + 1):
        drawn = collector.draw(step)
        engine.prepare(drawn.requests, drawn.params)
    stream = StreamCollector(collector, engine, least_tokens=200)
    try:
        yield Stream(lab, engine, collector, stream)
    finally:
        engine.close()
        stream.close()


def shuffled(seed: int) -> Callable[[int], list[int]]:
    return lambda count: random.Random(seed).sample(range(count), count)


def test_a_step_has_few_parts_of_nearly_equal_numbers_of_groups() -> None:
    for groups, tokens in ((1, 10**6), (7, 10**6), (64, 10**6), (64, 1000), (64, 10)):
        parts = split_into_parts(groups, tokens, least=256)
        assert sum(parts) == groups
        assert len(parts) == max(1, min(groups, MAX_PARTS, tokens // 256))
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("scorer", ["trainer", "engine"])
def test_the_rollouts_are_the_plain_ones_whatever_ends_first(
    configure: Configure, scorer: str
) -> None:
    with streaming(configure(*STEP)) as stream:
        if scorer == "engine":
            placed = stream.collector.placement
            teacher = type(placed.teacher)(**{**vars_of(placed.teacher), "scorer": "engine"})
            stream.collector.placement = type(placed)(**{**vars_of(placed), "teacher": teacher})
        expected = stream.plain()
        assert (expected[0].teacher is not None) == (scorer == "engine")
        stream.engine.scored.clear()
        for seed in (1, 2):
            stream.engine.order = shuffled(seed)
            parts = stream.parts()
            assert [r for part in parts for r in part] == expected
            assert len(parts) == 8
        assert stream.engine.scored == ([3] * 16 if scorer == "engine" else [])


def test_groups_are_taken_as_the_engine_ends_them(configure: Configure) -> None:
    """If that order depends on no timing. The results are in the order of the prompts again."""
    with streaming(configure(*STEP)) as stream:
        expected = stream.plain()
        stream.engine.ends_in_order = True
        order = [*range(3, 21), 0, 1, 22, 23, 21, 2]  # group 1 ends first, group 0 last
        stream.engine.order = lambda count: order
        parts = stream.parts()
        assert [part[0].prompt.task.id for part in parts] == [
            expected[3 * group].prompt.task.id for group in (1, 2, 3, 4, 5, 6, 7, 0)
        ]
        started = stream.start()
        result = stream.lab.trainer.stream_step(started.rollouts, 1, lambda count: None)
        assert result.rollouts != expected
        again = started.by_number(result)
        assert again.rollouts == expected
        for rollout, tokens in zip(again.rollouts, again.tokens, strict=True):
            assert len(tokens.loss) == len(rollout.completion.token_ids)


def vars_of(instance: Any) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in instance.__dataclass_fields__}


def test_the_first_groups_are_trained_while_the_last_is_sampled(configure: Configure) -> None:
    with streaming(configure(*STEP)) as stream:
        stream.engine.held = 23  # the last completion
        started = stream.start()
        taken: list[int] = []

        def advance(count: int) -> None:
            taken.append(count)
            if sum(taken) == 21:  # all groups but the last are trained
                stream.engine.release.set()

        result = stream.lab.trainer.stream_step(started.rollouts, 1, advance)
        assert sum(taken) == 24
        assert result.rollouts == stream.plain()
        metrics = started.metrics(result.metrics)
        assert {"time/sample", "time/score", "time/train", "time/wait"} <= metrics.keys()
        assert 0 < metrics["perf/overlap"] <= 1
        assert metrics["env/errors"] == 0


def weights(lab: Lab) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lab.policy.parameters}


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "perf/"))}


def trained(
    loaded: Any, order: Callable[[int], Any] | None, steps: int = 3
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics and weights after some steps, plain without an `order`."""
    records = []
    with streaming(loaded, steps) as stream:
        for step in range(1, steps + 1):
            if order is None:
                result = stream.lab.trainer.step(stream.plain(step), step, lambda count: None)
            else:
                stream.engine.order = order
                rollouts = stream.start(step).rollouts
                result = stream.lab.trainer.stream_step(rollouts, step, lambda count: None)
            records.append(figures(result.metrics))
        return records, weights(stream.lab)


@pytest.mark.parametrize(
    "flags",
    [(), ("--trainer.packing",), ("--orchestrator.teacher_model.update", "ema")],
    ids=["padded", "packed", "averaged teacher"],
)
def test_the_update_is_the_plain_one_and_the_same_bits_every_time(
    configure: Configure, flags: tuple[str, ...]
) -> None:
    loaded = configure(*STEP, *flags, *NO_MISMATCH_LIMIT)
    plain, expected = trained(loaded, None)
    one, first = trained(loaded, shuffled(1))
    other, second = trained(loaded, shuffled(2))
    assert one == other
    assert all(torch.equal(first[name], second[name]) for name in first)
    for ours, theirs in zip(one, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5, abs=2e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_out_of_memory_repeats_the_step_from_the_rollouts_at_hand(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the fifth part, whose error the allocator's is: nothing is sampled again."""
    loaded = configure(*STEP)
    expected, moved = trained(loaded, shuffled(1), steps=1)
    original, passes = trainer_module.hidden_states, []

    def limited(policy: Any, tokens: Any, *states: Any) -> torch.Tensor:
        passes.append(len(tokens.segments))
        if len(passes) > 8 and passes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(policy, tokens, *states)

    monkeypatch.setattr(trainer_module, "hidden_states", limited)
    told: list[int] = []
    with streaming(loaded) as stream:
        generated, generate = [], stream.engine.generate
        stream.engine.generate = lambda *a, **k: (generated.append(1), generate(*a, **k))[1]  # type: ignore[method-assign]
        result = stream.lab.trainer.stream_step(stream.start().rollouts, 1, told.append)
        assert len(generated) == 1
        assert "out of memory" in caplog.messages[0]
        assert sum(told) == 24
        assert figures(result.metrics) == pytest.approx(expected[0], rel=5e-5, abs=2e-5)
        for name, tensor in weights(stream.lab).items():
            torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_an_error_of_the_sampling_is_raised_once(configure: Configure) -> None:
    with streaming(configure(*STEP)) as stream:
        before = weights(stream.lab)
        stream.engine.held, stream.engine.error = 12, UserError("it died", "there", "restart it")
        with pytest.raises(UserError, match="it died"):
            stream.lab.trainer.stream_step(stream.start().rollouts, 1, lambda count: None)
        assert all(torch.equal(before[n], t) for n, t in weights(stream.lab).items())


def test_a_sampler_with_other_weights_is_refused(configure: Configure) -> None:
    with streaming(configure(*STEP)) as stream:
        with torch.no_grad():
            for name, parameter in stream.lab.policy.parameters:
                if "lora_B" in name:
                    parameter.add_(0.1)
        before = weights(stream.lab)
        with pytest.raises(UserError, match="kl/sampler_mismatch") as caught:
            stream.lab.trainer.stream_step(stream.start().rollouts, 1, lambda count: None)
        assert caught.value.exit_code == EXIT_HEALTH
        assert all(torch.equal(before[n], t) for n, t in weights(stream.lab).items())
        assert all(p.grad is None for _, p in stream.lab.policy.parameters)


class Failing:
    """An environment that cannot score some completions."""

    def __init__(self, environment: Any, failing: set[int]) -> None:
        self.environment, self.failing, self.calls = environment, failing, 0
        self.train, self.eval = environment.train, environment.eval

    def score(self, task: Any, completion: str) -> Any:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise ValueError("no score")
        return self.environment.score(task, completion)


@pytest.mark.parametrize("failing", [{4}, {3, 4, 5}, set(range(24))], ids=["one", "a part", "all"])
def test_what_the_environment_fails_on_is_dropped(
    configure: Configure, failing: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A rollout, all of a part's, or so many that the run stops: as in a plain step."""
    with streaming(configure(*STEP, "--orchestrator.max_env_error_frac", "0.5")) as stream:
        (name, environment), *_ = stream.collector.environments.items()

        def break_it() -> None:
            stream.collector.environments = {name: Failing(environment, failing)}

        break_it()
        if len(failing) == 24:
            with pytest.raises(UserError, match="the environment failed on") as caught:
                stream.parts()
            assert caught.value.exit_code == EXIT_HEALTH
            return
        expected = stream.plain()
        break_it()
        started = stream.start()
        result = stream.lab.trainer.stream_step(started.rollouts, 1, lambda count: None)
        assert result.rollouts == expected
        assert len(result.tokens) == 24 - len(failing)
        assert started.metrics(result.metrics)["env/errors"] == len(failing)
        assert f"{len(failing)} rollouts dropped" in caplog.messages[-1]


def test_an_environment_that_exits_ends_the_step(configure: Configure) -> None:
    """Its failures pass the limit. A thread that swallows the exit leaves the trainer waiting."""
    with streaming(configure(*STEP)) as stream:
        (name, environment), *_ = stream.collector.environments.items()

        class Exiting(Failing):
            def score(self, task: Any, completion: str) -> Any:
                raise SystemExit("the judge gave up")

        stream.collector.environments = {name: Exiting(environment, set())}
        raised: list[BaseException] = []

        def train() -> None:
            try:
                stream.parts()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        thread.join(10)
        (error,) = raised
        assert isinstance(error, UserError)
        assert "sys.exit" in str(error)
