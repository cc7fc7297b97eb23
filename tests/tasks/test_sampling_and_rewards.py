"""Sampling of tasks, rewards, the limit of failed rewards, and advantages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs.outcomes import ScoringError
from minidistill.envs.protocol import take_tasks
from minidistill.envs.registry import load_environments
from minidistill.envs.sokoban import SokobanEnv
from minidistill.errors import EXIT_HEALTH, EXIT_USAGE, UserError
from minidistill.system.foreign import Interrupted
from minidistill.tasks.rewards import check_errors, score, with_advantages
from minidistill.tasks.sampling import TaskSampler
from minidistill.types import Advance, Completion, Prompt, Reward, Rollout, Task

MANY = settings(deadline=None, derandomize=True, max_examples=80)


class Env:
    """`size` tasks and any scoring function."""

    def __init__(self, size: int, scoring: Callable[[str], Any] = float) -> None:
        self.train = [Task(f"train/{i}", ()) for i in range(size)]
        self.eval: list[Task] = []
        self.scoring = scoring

    def score(self, task: Task, completion: str) -> Any:
        return self.scoring(completion)


def rollout(prompt: Prompt, text: str = "", reward: float | None = None) -> Rollout:
    scored = None if reward is None else Reward(reward)
    return Rollout(prompt, 0, Completion((1,), (0.0,), "eos"), text, scored)


def prompt(env: str = "a", id: str = "t") -> Prompt:
    return Prompt(env, Task(id, ()), "", "", (), ())


# -- sampling -----------------------------------------------------------------------------------


@MANY
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_an_epoch_has_every_task_once(sizes: list[int], count: int, seed: int) -> None:
    environments = {f"env{i}": Env(size) for i, size in enumerate(sizes)}
    sampler = TaskSampler(environments, seed)
    total = len(sampler)
    assert total == sum(sizes)
    drawn = [pair for step in range(1, total * 2 + 1) for pair in sampler.draw(step, count)]
    all_tasks = {(n, t.id) for n, env in environments.items() for t in env.train}
    for epoch in range(2 * count):
        tasks = drawn[epoch * total : (epoch + 1) * total]
        assert Counter((n, t.id) for n, t in tasks) == Counter(all_tasks)


def test_a_steps_tasks_do_not_depend_on_earlier_steps() -> None:
    environments = {"a": Env(7), "b": Env(5)}
    sampler = TaskSampler(environments, seed=3)
    steps = {step: sampler.draw(step, 5) for step in range(1, 30)}
    for step in (29, 1, 14, 2):
        assert TaskSampler(environments, seed=3).draw(step, 5) == steps[step]
        assert sampler.draw(step, 5) == steps[step]


def test_epochs_and_seeds_differ() -> None:
    environments = {"a": Env(40)}
    orders = [
        [task.id for _, task in TaskSampler(environments, seed).draw(step, 40)]
        for seed in (0, 1)
        for step in (1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order, key=orders[0].index) for order in orders[1:])


class MadeTogether(Sequence[Task]):
    """A split that notes which tasks are made together."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("made alone")

    def make_tasks(self, indices: Sequence[int], advance: Advance) -> list[Task]:
        self.made.append(list(indices))
        advance(len(indices))
        return [Task(f"train/{i}", ()) for i in indices]


def test_a_steps_tasks_are_made_together() -> None:
    one_by_one, together = Env(8), Env(8)
    together.train = MadeTogether()  # type: ignore[assignment]
    plain = {"a": Env(5), "b": one_by_one}
    expected = TaskSampler(plain, seed=3)
    sampler = TaskSampler({"a": plain["a"], "b": together}, seed=3)
    for step in range(1, 5):
        drawn = sampler.draw(step, 6)
        assert drawn == expected.draw(step, 6)
        made = together.train.made[step - 1]  # type: ignore[attr-defined]
        assert [f"train/{i}" for i in made] == [task.id for name, task in drawn if name == "b"]


def test_tasks_are_taken_with_progress() -> None:
    advanced: list[int] = []
    tasks = Env(5).train
    assert take_tasks(tasks, [4, 0, 4], advanced.append) == [tasks[4], tasks[0], tasks[4]]
    assert advanced == [1, 1, 1]
    together = MadeTogether()
    assert [t.id for t in take_tasks(together, range(2), advanced.append)] == ["train/0", "train/1"]
    assert advanced == [1, 1, 1, 2]


def test_no_tasks_are_an_error() -> None:
    with pytest.raises(UserError, match="no training tasks") as caught:
        TaskSampler({"a": Env(0)}, seed=0)
    assert caught.value.exit_code == EXIT_USAGE


def test_environments_are_loaded_by_name() -> None:
    args = {"num_train_examples": 3, "num_eval_examples": 1}
    configs = [EnvConfig(id="sokoban-env", name=name, args=args) for name in ("y", "x")]
    loaded = load_environments(configs, "orchestrator.env")
    assert list(loaded) == ["y", "x"]
    assert all(isinstance(env, SokobanEnv) for env in loaded.values())
    with pytest.raises(UserError) as caught:
        load_environments([*configs, EnvConfig(id="none")], "orchestrator.env")
    assert caught.value.where == "orchestrator.env.2"


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        load_environments([EnvConfig(id="builtins:dict")], "orchestrator.env")
    assert caught.value.what.endswith("returned {}, which has no train and no eval and no score")
    assert caught.value.where == "orchestrator.env.0"


# -- scoring ------------------------------------------------------------------------------------


def failing(text: str) -> Reward:
    if text == "raise":
        raise KeyError("absent")
    if text == "none":
        return None  # type: ignore[return-value]
    if text == "word":
        return Reward(1.0, {"verdict": "good"})  # type: ignore[dict-item]
    value = np.float32(text)
    return Reward(value, {"copy": value, "flag": True})  # type: ignore[arg-type]


def test_failures_are_counted_and_named() -> None:
    texts = ["1", "raise", "nan", "0.5", "-inf", "none", "word"]
    rollouts = [rollout(prompt(id=f"t{i}"), text) for i, text in enumerate(texts)]
    ticks: list[int] = []
    rewards, errors = score({"a": Env(1, failing), "b": Env(1)}, rollouts, ticks.append)
    assert rewards == [
        Reward(1.0, {"copy": 1.0, "flag": 1.0}),
        None,
        None,
        Reward(0.5, {"copy": 0.5, "flag": 1.0}),
        None,
        None,
        None,
    ]
    assert {type(v) for r in rewards if r for v in (r.value, *r.metrics.values())} == {float}
    assert ticks == [1] * 7
    assert errors[0] == "task t1 of a: KeyError: 'absent'"
    assert errors[1] == "task t2 of a: the reward is nan, which is not finite"
    assert [e.split(":")[0] for e in errors] == [f"task t{i} of a" for i in (1, 2, 4, 5, 6)]


def test_each_environment_scores_its_rollouts() -> None:
    environments = {"a": Env(1, lambda _: Reward(1.0)), "b": Env(1, lambda _: Reward(2.0))}
    rollouts = [rollout(prompt(env=name)) for name in "abba"]
    rewards, errors = score(environments, rollouts, lambda _: None)
    assert [r.value for r in rewards if r] == [1.0, 2.0, 2.0, 1.0]
    assert errors == []


def test_slow_failures_are_checked_at_once() -> None:
    def hang(_: str) -> Reward:
        raise ScoringError("it took longer", slow=True)

    checked: list[list[str]] = []

    def check(errors: Sequence[str]) -> None:
        checked.append(list(errors))
        if len(errors) == 2:
            raise UserError("too many")

    rollouts = [rollout(prompt(id=str(i))) for i in range(5)]
    ticks: list[int] = []
    with pytest.raises(UserError, match="too many"):
        score({"a": Env(1, hang)}, rollouts, ticks.append, check)
    assert checked == [
        ["task 0 of a: it took longer"],
        ["task 0 of a: it took longer", "task 1 of a: it took longer"],
    ]
    assert len(ticks) == 2
    checked.clear()
    score(
        {"a": Env(1, failing)},
        [rollout(prompt(), text) for text in ("raise", "1")],
        ticks.append,
        check,
    )
    assert checked == [["task t of a: KeyError: 'absent'"]]


def test_an_interrupt_is_not_a_failure() -> None:
    def interrupted(_: str) -> Reward:
        raise Interrupted

    with pytest.raises(Interrupted):
        score({"a": Env(1, interrupted)}, [rollout(prompt())], lambda _: None)


@pytest.mark.parametrize(
    ("failed", "total", "limit", "stops"),
    [
        (0, 10, 0.0, False),
        (1, 10, 0.0, True),
        (1, 10, 0.1, False),
        (2, 10, 0.1, True),
        (29, 100, 0.29, False),  # 0.29 * 100 is less than 29
        (30, 100, 0.29, True),
        (9, 10, 1.0, False),
        (10, 10, 1.0, True),  # nothing is left to train on
        (0, 0, 0.1, False),
    ],
)
def test_the_limit_of_failed_rewards(failed: int, total: int, limit: float, stops: bool) -> None:
    errors = [f"error {i}" for i in range(failed)]
    if not stops:
        check_errors(errors, total, limit)
        return
    with pytest.raises(UserError, match=f"{failed} of {total} rollouts, first: error 0") as caught:
        check_errors(errors, total, limit)
    assert caught.value.exit_code == EXIT_HEALTH


# -- advantages ---------------------------------------------------------------------------------


@MANY
@given(
    st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=1, max_size=5),
    st.booleans(),
)
def test_advantages(groups: list[list[float]], std_norm: bool) -> None:
    prompts = [prompt() for _ in groups]  # equal, but not identical: separate groups
    rollouts = [
        rollout(p, reward=r) for p, group in zip(prompts, groups, strict=True) for r in group
    ]
    expected = []
    for group in groups:
        mean, spread = fmean(group), pstdev(group)
        scale = spread if std_norm and spread > 1e-8 else 1.0
        expected += [(r - mean) / scale for r in group]
    scored = with_advantages(rollouts, std_norm)
    assert [r.advantage for r in scored] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert [(r.prompt, r.reward) for r in scored] == [(r.prompt, r.reward) for r in rollouts]


def test_advantages_by_hand() -> None:
    one, other, alone = prompt(), prompt(), prompt()
    rewards = [(one, 1.0), (one, 0.0), (one, 0.0), (one, 1.0), (other, 3.0), (other, 3.0)]
    rollouts = [rollout(p, reward=r) for p, r in [*rewards, (alone, 5.0)]]
    plain = [r.advantage for r in with_advantages(rollouts, std_norm=False)]
    assert plain == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0]
    scaled = [r.advantage for r in with_advantages(rollouts, std_norm=True)]
    assert scaled == [1.0, -1.0, -1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(map(math.isfinite, scaled))


def test_advantages_without_rewards_are_zero() -> None:
    same = prompt()
    scored = with_advantages([rollout(same), rollout(same)], std_norm=True)
    assert [r.advantage for r in scored] == [0.0, 0.0]
    assert with_advantages([], std_norm=True) == []


@pytest.mark.parametrize("std_norm", [False, True])
def test_rewards_whose_mean_is_not_finite_stop_the_run(std_norm: bool) -> None:
    group = prompt()
    rewards = [rollout(group, reward=value) for value in (1.7e308, 1.7e308, 1.0)]
    with pytest.raises(UserError, match=r"too large for their mean: 1\.7e\+308") as caught:
        with_advantages(rewards, std_norm)
    assert caught.value.exit_code == EXIT_HEALTH


def test_rewards_whose_deviation_is_not_finite_stop_the_run() -> None:
    """Divided by infinity they would all be 0, and the step would teach nothing."""
    group = prompt()
    rewards = [rollout(group, reward=value) for value in (1e200, -1e200)]
    with pytest.raises(UserError, match=r"too large for their mean: 1e\+200") as caught:
        with_advantages(rewards, std_norm=True)
    assert caught.value.exit_code == EXIT_HEALTH


def test_advantages_that_the_loss_cannot_hold_stop_the_run() -> None:
    """The loss has them in fp32. It would be NaN, and the learning rate be blamed."""
    group = prompt()
    rewards = [rollout(group, reward=value) for value in (1e39, -1e39)]
    with pytest.raises(UserError, match=r"too large for their mean: 1e\+39"):
        with_advantages(rewards, std_norm=False)
    assert [r.advantage for r in with_advantages(rewards, std_norm=True)] == [1.0, -1.0]


def test_a_share_of_failures_that_is_no_number_is_too_large() -> None:
    with pytest.raises(UserError):
        check_errors(["failed"], 10, math.nan)
