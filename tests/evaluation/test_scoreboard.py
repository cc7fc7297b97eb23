"""The scoreboard against an independent computation, and its interval in simulation."""

import numpy as np
import pytest

from minidistill.evaluation.scoreboard import RESAMPLES, build, compare, pooled


def reference(
    before: list[float], teacher: list[float], student: list[float], seed: int
) -> dict[str, float]:
    """One resample at a time, with plain Python sums and the same random indices."""
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, len(before), size=(RESAMPLES, len(before)))
    differences, ratios = [], []
    for row in indices.tolist():
        base = sum(before[i] for i in row)
        difference = sum(teacher[i] for i in row) - base
        differences.append(difference / len(row))
        if difference:
            ratios.append((sum(student[i] for i in row) - base) / difference)

    def bounds(values: list[float]) -> list[float]:
        ordered, at = sorted(values), [q * (len(values) - 1) for q in (0.025, 0.975)]
        return [
            ordered[int(a)] + (a - int(a)) * (ordered[int(a) + 1] - ordered[int(a)]) for a in at
        ]

    total = sum(teacher) - sum(before)
    return {
        "baseline_student": sum(before) / len(before),
        "baseline_teacher": sum(teacher) / len(teacher),
        "baseline_diff": total / len(before),
        "baseline_diff_low": bounds(differences)[0],
        "baseline_diff_high": bounds(differences)[1],
        "student": sum(student) / len(student),
        "gap_closed": (sum(student) - sum(before)) / total,
        "gap_closed_low": bounds(ratios)[0],
        "gap_closed_high": bounds(ratios)[1],
    }


def draw(seed: int, *means: float, tasks: int = 24) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [list(map(float, rng.random(tasks) < mean)) for mean in means]


@pytest.mark.parametrize("means", [(0.1, 0.9, 0.7), (0.1, 0.9, 0.1), (0.2, 0.7, 1.0)])
def test_values_match_the_reference(means: tuple[float, ...]) -> None:
    before, teacher, student = draw(3, *means)
    board = compare(before, teacher, student, student[::-1], seed=11)
    expected = reference(before, teacher, student, seed=11)
    assert {key: board[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert board["student_with_context"] == board["student"]
    assert board["eval_tasks"] == 24
    assert board["verdict"].startswith(f"{expected['gap_closed']:.0%} of the gap closed (95 %")


def test_values_computed_by_hand() -> None:
    board = compare([0] * 8, [1] * 8, [1, 1, 1, 0] * 2, None, seed=0)
    assert (board["baseline_diff"], board["gap_closed"]) == (1.0, 0.75)
    assert (board["baseline_diff_low"], board["baseline_diff_high"]) == (1.0, 1.0)
    # of 8 draws at 3/4, 3 or fewer succeed in 2.7 % of cases
    assert (board["gap_closed_low"], board["gap_closed_high"]) == (0.375, 1.0)
    assert board["verdict"] == "75% of the gap closed (95 % interval 38% to 100%)"
    assert board["student_with_context"] is None


@pytest.mark.parametrize("tasks", [1, 7])
def test_too_few_tasks_for_an_interval(tasks: int) -> None:
    board = compare([0.0] * tasks, [1.0] * tasks, [1.0] * tasks, None, seed=0)
    assert (board["baseline_student"], board["baseline_teacher"], board["student"]) == (0, 1, 1)
    missing = ("gap_closed", "gap_closed_low", "gap_closed_high", "baseline_diff_low")
    assert [board[key] for key in missing] == [None] * 4
    assert board["verdict"] == f"{tasks} tasks are too few for an interval: evaluate 8"


@pytest.mark.parametrize(
    ("before", "teacher"),
    [([0.0] * 9, [0.0] * 9), ([1.0, 0.0] * 5, [0.0, 1.0] * 5), ([0.0] * 9, [1.0] + [0.0] * 8)],
)
def test_no_gap(before: list[float], teacher: list[float]) -> None:
    board = compare(before, teacher, teacher, None, seed=0)
    assert board["verdict"].startswith("no gap")
    assert board["gap_closed"] is board["gap_closed_low"] is board["gap_closed_high"] is None
    assert board["student"] == np.mean(teacher)


def test_a_context_that_harms() -> None:
    board = compare([1.0] * 8, [0.0] * 8, [0.25] * 8, None, seed=0)
    assert board["baseline_diff"] == -1
    assert board["gap_closed"] == 0.75
    assert board["verdict"] == "the context makes the model worse on this task"


def test_an_unfinished_run() -> None:
    board = compare([0.0] * 8, [1.0] * 8, None, None, seed=0)
    assert board["student"] is board["gap_closed"] is None
    assert board["verdict"] == "not finished"


def test_the_interval_depends_on_the_seed() -> None:
    before, teacher, student = np.random.default_rng(0).random((3, 24)) * [[1], [4], [2]]
    one, again, other = (compare(before, teacher, student, None, s) for s in (1, 1, 2))
    assert one == again
    assert one["gap_closed_low"] != other["gap_closed_low"]
    assert one["gap_closed"] == other["gap_closed"]


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered, trials, tasks = 0, 120, 80
    for trial in range(trials):
        # tasks differ in difficulty, so the rewards of student and teacher are correlated
        teacher = (rng.random(tasks) < 0.8).astype(float)
        before = teacher * (rng.random(tasks) < 0.25)  # mean 0.2
        student = teacher * (rng.random(tasks) < 0.625)  # mean 0.5: half of the gap
        board = compare(before.tolist(), teacher.tolist(), student.tolist(), None, trial)
        covered += board["gap_closed_low"] <= 0.5 <= board["gap_closed_high"]
        assert board["gap_closed_low"] <= board["gap_closed"] <= board["gap_closed_high"]
    assert 0.88 <= covered / trials <= 0.99


def test_environments_are_pooled_by_task() -> None:
    a_before, a_teacher, a_student = draw(1, 0.1, 0.9, 0.6, tasks=10)
    b_before, b_teacher, b_student = draw(2, 0.3, 0.8, 0.7, tasks=30)
    rewards = {
        "a": {"baseline_student": a_before, "baseline_teacher": a_teacher, "student": a_student},
        "b": {"baseline_student": b_before, "baseline_teacher": b_teacher, "student": b_student},
    }
    board = build(rewards, seed=5)
    pooled_rewards = (a_before + b_before, a_teacher + b_teacher, a_student + b_student)
    assert board.pop("env") == "a+b"
    per_env = board.pop("per_env")
    assert board == compare(*pooled_rewards, None, 5)
    assert per_env["a"] == {"env": "a", **compare(a_before, a_teacher, a_student, None, 5)}
    assert set(per_env) == {"a", "b"}
    assert "per_env" not in build({"a": rewards["a"]}, seed=5)


def test_rewards_are_pooled_in_the_order_of_environments() -> None:
    rewards = {"b": {"student": [1.0, 2.0]}, "a": {"student": [3.0], "other": [4.0]}}
    assert pooled(rewards, "student") == [1.0, 2.0, 3.0]
    assert pooled(rewards, "other") is None
    assert pooled({}, "student") is None


def test_without_a_baseline() -> None:
    board = build({"a": {"student": [1.0, 0.0], "student_with_context": [1.0, 1.0]}}, seed=0)
    assert board["verdict"] == "no baseline was evaluated"
    assert (board["student"], board["student_with_context"]) == (0.5, 1.0)
    assert board["gap_closed"] is board["baseline_diff"] is board["baseline_teacher"] is None
    no_teacher = build({"a": {"baseline_student": [0.0, 1.0], "student": [1.0, 1.0]}}, seed=0)
    assert no_teacher["verdict"] == "no baseline was evaluated"
    assert build({}, seed=0)["student"] is None
