"""Guards over the course of training, and the checks of a single step: NaN is never fine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidistill.config.health import HealthConfig
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.reporting.run_directory import finite
from minidistill.trainer.guards import refusal
from minidistill.trainer.health import GUARDS, NAMES, Health

GOOD = {
    "loss/total": 1.0,
    "optim/grad_norm": 1.0,
    "teacher_kl": 1.0,
    "entropy/student": 1.0,
    "entropy/teacher": 1.0,
    "completions/length_mean": 10.0,
    "completions/truncated_frac": 0.1,
    "advantage/zero_frac": 0.5,
    "kl/sampler_mismatch": 1e-9,
    "ratio/masked_frac": 0.0,
}
# What makes each guard apply, after three good steps
BAD: dict[str, list[dict[str, float]]] = {
    "no_gradient": [{"optim/grad_norm": 0.0}],
    "entropy_collapse": [
        {"entropy/student": 0.05},
        {"entropy/student": 0.009, "entropy/teacher": 0.02},
    ],
    "length_explosion": [
        {"completions/length_mean": 31.0},
        {"completions/truncated_frac": 0.6},
    ],
    "kl_explosion": [{"teacher_kl": 4.1}],
    "equal_rewards": [{"advantage/zero_frac": 1.0}],
}
# What is as near to that as a run that is well comes
FINE: dict[str, list[dict[str, float]]] = {
    "no_gradient": [{"optim/grad_norm": 1e-12}, {"optim/grad_norm": 0.0, "teacher_kl": 0.0}],
    "entropy_collapse": [
        {"entropy/student": 0.1},
        {"entropy/student": 0.005, "entropy/teacher": 0.01},  # as sure as the teacher
    ],
    "length_explosion": [
        {"completions/length_mean": 30.0, "completions/truncated_frac": 0.5},
        {"completions/length_mean": 3.0, "completions/truncated_frac": 0.0},
    ],
    "kl_explosion": [{"teacher_kl": 4.0}, {"teacher_kl": -0.1}],
    "equal_rewards": [{"advantage/zero_frac": 0.99}],
}


def health(patience: int = 3, **actions: str) -> Health:
    values = {guard.name: "off" for guard in GUARDS} | actions
    return Health(HealthConfig.model_validate({"patience": patience, **values}), Path("rollouts"))


def take(guards: Health, steps: list[dict[str, Any]]) -> list[UserError | None]:
    return [guards.take(step, GOOD | values) for step, values in enumerate(steps, 1)]


def cases(table: dict[str, list[dict[str, float]]]) -> list[tuple[str, dict[str, float]]]:
    return [(name, values) for name, rows in table.items() for values in rows]


def test_each_guard_is_a_key_and_is_tested() -> None:
    names = {guard.name for guard in GUARDS}
    assert names == set(BAD) == set(FINE) == set(HealthConfig.model_fields) - {"patience"}


@pytest.mark.parametrize(("name", "bad"), cases(BAD))
def test_a_guard_warns_once_for_each_episode(
    name: str, bad: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    steps = [{}] * 3 + [bad] * 5 + [{}] + [bad] * 2 + [{}] + [bad] * 3
    assert take(health(**{name: "warn"}), steps) == [None] * 15
    assert len(caplog.messages) == 2
    for message, step in zip(caplog.messages, (6, 15), strict=True):
        assert message.startswith(f"step {step}: ")
        assert "for 3 steps in a row (rollouts/step_" in message


@pytest.mark.parametrize(("name", "bad"), cases(BAD))
def test_a_guard_stops_the_run_where_that_is_asked_for(
    name: str, bad: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    results = take(health(**{name: "stop"}), [{}] * 3 + [bad] * 4)
    assert results[:5] == [None] * 5
    for step, error in ((6, results[5]), (7, results[6])):  # resuming does not pass it
        assert isinstance(error, UserError)
        assert error.exit_code == EXIT_HEALTH
        assert error.what.startswith(f"step {step}: ")
        assert error.where == f"health.{name}"
        assert f"rollouts/step_{step:06d}.jsonl" in error.fix
        assert f"The checkpoint of step {step} is saved" in error.fix
    assert caplog.messages == []


@pytest.mark.parametrize(("name", "fine"), cases(FINE))
def test_a_guard_leaves_a_run_that_is_well(
    name: str, fine: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    steps = [{}] * 3 + [fine] * 9
    assert take(health(**{name: "stop"}), steps) == [None] * 12
    assert take(health(**{name: "off"}), [{}] * 3 + [BAD[name][0]] * 9) == [None] * 12
    assert caplog.messages == []


MEASURES = {
    "no_gradient": ["optim/grad_norm"],
    "entropy_collapse": ["entropy/student"],
    "length_explosion": ["completions/length_mean", "completions/truncated_frac"],
    "kl_explosion": ["teacher_kl"],
    "equal_rewards": ["advantage/zero_frac"],
}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    ("name", "metric"), [(name, metric) for name, row in MEASURES.items() for metric in row]
)
def test_what_is_not_a_number_is_not_fine(name: str, metric: str, value: float | None) -> None:
    for good_first in (3, 0):  # also as the start that later steps are compared with
        steps: list[dict[str, Any]] = [{}] * good_first + [{metric: value}] * 7
        assert isinstance(take(health(**{name: "stop"}), steps)[-1], UserError)


def test_without_rewards_none_are_equal() -> None:
    guards = health(equal_rewards="stop")
    metrics = {name: value for name, value in GOOD.items() if name != "advantage/zero_frac"}
    assert [guards.take(step, metrics) for step in range(1, 9)] == [None] * 8


def test_a_teacher_of_unknown_entropy_is_judged_by_the_kl() -> None:
    """An engine scored it. A student that is close to it may be as sure as that."""
    metrics = {name: value for name, value in GOOD.items() if name != "entropy/teacher"}
    for kl, stops in ((0.05, False), (0.06, True)):
        guards = health(entropy_collapse="stop")
        sure = metrics | {"entropy/student": 0.001, "teacher_kl": kl}
        last = [guards.take(step, m) for step, m in enumerate([metrics] * 3 + [sure] * 3, 1)][-1]
        assert (last is not None) == stops


VALUES = st.sampled_from([0.0, 1e-3, 0.04, 0.3, 1.0, 3.0, 40.0, math.nan])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, VALUES)), min_size=4, max_size=24),
    st.data(),
)
def test_a_resumed_run_has_the_state_of_an_uninterrupted_one(
    steps: list[dict[str, float]], data: st.DataObject
) -> None:
    """From the records as they are written, among those of evaluations."""
    actions = {guard.name: data.draw(st.sampled_from(["warn", "stop"])) for guard in GUARDS}
    whole = health(2, **actions)
    expected = [str(error) for error in take(whole, steps)]
    split = data.draw(st.integers(0, len(steps)))
    resumed = health(2, **actions)
    records: list[dict[str, Any]] = []
    for number, values in enumerate(steps[:split], 1):
        records.append({"step": number, **GOOD, **values})
        records.append({"step": number, "eval/heldout_kl": 1.0})
    lines = [json.dumps({k: finite(v) for k, v in record.items()}) for record in records]
    resumed.replay(map(json.loads, lines))
    rest = [
        str(resumed.take(number, GOOD | values))
        for number, values in enumerate(steps[split:], split + 1)
    ]
    assert rest == expected[split:]


# -- a single step -----------------------------------------------------------------------------


def test_a_good_step_is_applied() -> None:
    assert refusal(GOOD, 1, 1e-6) is None
    assert refusal(GOOD | {"kl/sampler_mismatch": math.inf}, 1, math.inf) is None
    assert refusal(GOOD | {"ratio/masked_frac": 0.99}, 1, 1e-6) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "metric", ["loss/total", "optim/grad_norm", "teacher_kl", "entropy/student"]
)
def test_a_step_with_a_figure_that_is_not_finite_is_refused(metric: str, value: float) -> None:
    error = refusal(GOOD | {metric: value}, 7, math.inf)
    assert error is not None
    assert error.exit_code == EXIT_HEALTH
    assert error.what.startswith("step 7: ")
    assert str(value) in error.what


@pytest.mark.parametrize("limit", [1e-6, math.inf])
def test_a_mismatch_that_is_no_number_is_refused_also_without_a_limit(limit: float) -> None:
    error = refusal(GOOD | {"kl/sampler_mismatch": math.nan}, 7, limit)
    assert error is not None
    assert "kl/sampler_mismatch is nan" in error.what


@pytest.mark.parametrize("share", [1.0, math.nan])
def test_a_step_without_a_token_to_train_on_is_refused(share: float) -> None:
    error = refusal(GOOD | {"ratio/masked_frac": share}, 7, math.inf)
    assert error is not None
    assert error.exit_code == EXIT_HEALTH
    assert "every token was masked" in error.what


def test_a_patience_that_no_run_reaches_says_nothing() -> None:
    patient = health(patience=10**30)
    assert patient.take(1, GOOD | BAD["equal_rewards"][0]) is None
