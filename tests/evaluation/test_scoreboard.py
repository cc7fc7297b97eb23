"""The scoreboard against an independent computation, and its interval in simulation."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from minidistill.evaluation.intervals import NOTHING_TO_LEARN, RESAMPLES, PromptSums, kl_closed
from minidistill.evaluation.scoreboard import build, compare, pooled, teacher_kl
from minidistill.evaluation.verdict import grade, judge


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
    assert board["outcome"] == grade(
        *(expected[f"gap_closed{end}"] for end in ("", "_low", "_high"))
    )
    share, bounds = f"{expected['gap_closed']:.0%}", f"{expected['gap_closed_low']:.0%} to "
    assert f"{share} of the gap is closed (95% interval {bounds}" in board["verdict"]


def test_values_computed_by_hand() -> None:
    board = compare([0] * 8, [1] * 8, [1, 1, 1, 0] * 2, None, seed=0)
    assert (board["baseline_diff"], board["gap_closed"]) == (1.0, 0.75)
    # all tasks agree: a bootstrap has no width, and says nothing about other tasks
    assert (board["baseline_diff_low"], board["baseline_diff_high"]) == (None, None)
    # of 8 draws at 3/4, 3 or fewer succeed in 2.7% of cases
    assert (board["gap_closed_low"], board["gap_closed_high"]) == (0.375, 1.0)
    assert board["outcome"] == "partly"
    assert board["verdict"] == (  # and maybe all of it
        "The student learned at least part of what the context does: 75% of the gap is closed "
        "(95% interval 38% to 100%)."
    )
    assert board["student_with_context"] is None


@pytest.mark.parametrize("tasks", [1, 7])
def test_too_few_tasks_for_an_interval(tasks: int) -> None:
    board = compare([0.0] * tasks, [1.0] * tasks, [1.0] * tasks, None, seed=0)
    assert (board["baseline_student"], board["baseline_teacher"], board["student"]) == (0, 1, 1)
    missing = ("gap_closed", "gap_closed_low", "gap_closed_high", "baseline_diff_low")
    assert [board[key] for key in missing] == [None] * 4
    assert board["outcome"] == "too_few_tasks"
    assert board["verdict"].startswith(f"{tasks} held-out task")
    assert "too few to judge by: 8 give an interval" in board["verdict"]


def test_an_interval_without_width_is_none() -> None:
    board = compare([0.0] * 8, [1.0] * 8, [1.0] * 8, None, seed=0)
    assert board["gap_closed"] == 1
    bounds = ("baseline_diff_low", "baseline_diff_high", "gap_closed_low", "gap_closed_high")
    assert [board[key] for key in bounds] == [None] * 4
    assert board["outcome"] == "closed"
    assert "100% of the gap is closed (the same on each of the 8 tasks)" in board["verdict"]


@pytest.mark.parametrize(
    ("before", "teacher"),
    [([0.0] * 9, [0.0] * 9), ([1.0, 0.0] * 5, [0.0, 1.0] * 5), ([0.0] * 9, [1.0] + [0.0] * 8)],
)
def test_no_gap(before: list[float], teacher: list[float]) -> None:
    board = compare(before, teacher, teacher, None, seed=0)
    assert board["outcome"] == "no_gap"
    why = "the gain in score from the context is within chance"
    if np.mean(teacher) <= np.mean(before):
        why = "the context does not make the score better"
    assert board["verdict"].startswith(f"There is no gap to close: {why} (")
    assert board["gap_closed"] is board["gap_closed_low"] is board["gap_closed_high"] is None
    assert board["student"] == np.mean(teacher)


@pytest.mark.parametrize("teacher", [[0.0] * 8, [0.0] * 7 + [1.0]])
def test_a_context_that_harms(teacher: list[float]) -> None:
    board = compare([1.0] * 8, teacher, [0.25] * 8, None, seed=0)
    assert board["baseline_diff"] == np.mean(teacher) - 1
    assert board["gap_closed"] is board["gap_closed_low"] is board["gap_closed_high"] is None
    assert board["outcome"] == "context_harms"
    assert board["verdict"].startswith("The context makes the score worse (1 → ")
    assert board["verdict"].endswith("The student went from 1 to 0.25.")


@pytest.mark.parametrize(
    ("share", "outcome"),
    [
        ((0.9, 0.8, 1.0), "closed"),
        ((0.899, 0.85, 1.0), "partly"),
        ((0.95, 0.79, 1.1), "partly"),
        ((0.5, 0.01, 0.9), "partly"),
        ((0.5, 0.0, 1.1), "none"),
        ((-0.2, -0.4, 0.0), "none"),
        ((-0.2, -0.4, -0.1), "worse"),
        ((1.0, None, None), "closed"),
        ((0.0, None, None), "none"),
        ((-1.0, None, None), "worse"),
    ],
)
def test_outcomes(share: tuple[float, float | None, float | None], outcome: str) -> None:
    assert grade(*share) == outcome


def test_an_unfinished_run() -> None:
    board = compare([0.0] * 8, [1.0] * 8, None, None, seed=0)
    assert board["student"] is board["gap_closed"] is None
    assert board["outcome"] == "not_finished"


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
    assert board["outcome"] == "no_baseline"
    assert (board["student"], board["student_with_context"]) == (0.5, 1.0)
    assert board["gap_closed"] is board["baseline_diff"] is board["baseline_teacher"] is None
    no_teacher = build({"a": {"baseline_student": [0.0, 1.0], "student": [1.0, 1.0]}}, seed=0)
    assert no_teacher["outcome"] == "no_baseline"
    assert build({}, seed=0)["student"] is None


def prompt_kl(sums: list[float], tokens: list[int]) -> PromptSums:
    return PromptSums(sum(sums) / sum(tokens), sums, tokens)


def test_the_share_of_the_kl_matches_the_reference() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, size=(2, 12)).tolist()
    sums = (rng.random((2, 12)) * [[9], [4]]).tolist()
    before, after = (prompt_kl(s, t) for s, t in zip(sums, counts, strict=True))
    figures = kl_closed(before, after, seed=7)
    shares = []
    for row in np.random.default_rng(7).integers(0, 12, size=(RESAMPLES, 12)).tolist():
        first, last = (sum(s[i] for i in row) / sum(t[i] for i in row)
                       for s, t in zip(sums, counts, strict=True))  # fmt: skip
        shares.append(1 - last / first)
    assert figures["closed"] == 1 - after.mean / before.mean
    bounds = [figures["closed_low"], figures["closed_high"]]
    assert bounds == pytest.approx(np.quantile(shares, [0.025, 0.975]).tolist(), abs=1e-12)
    assert (figures["prompts"], figures["negligible"]) == (12, False)
    assert figures == kl_closed(before, after, seed=7)


@pytest.mark.parametrize(
    ("sums", "negligible"),
    [
        ([NOTHING_TO_LEARN * 1.01] * 8, False),
        ([NOTHING_TO_LEARN * 0.99] * 8, True),
        ([1.0, -1.0] * 8, True),  # an estimate from sampled tokens
        ([1.0, 2.0, -0.5, 1.5] * 4, False),
    ],
)
def test_a_kl_that_is_negligible_has_no_share(sums: list[float], negligible: bool) -> None:
    tokens = [100] * len(sums)
    figures = kl_closed(prompt_kl(sums, tokens), prompt_kl([0.0] * len(sums), tokens), seed=0)
    assert figures["negligible"] is negligible
    assert figures["closed"] == (None if negligible else 1)


@pytest.mark.parametrize("sums", [[1.0] * 7, [1.0] * 7 + [float("nan")]])
def test_few_or_broken_kls_have_no_share(sums: list[float]) -> None:
    before = PromptSums(1.0, sums, [1] * len(sums))
    figures = kl_closed(before, prompt_kl([0.5] * len(sums), [1] * len(sums)), seed=0)
    assert figures["closed"] is figures["closed_low"] is figures["closed_high"] is None
    board = {f"heldout_kl_{key}": value for key, value in figures.items()}
    judged = judge({"baseline_diff": None, "heldout_kl_before": 1, "heldout_kl_after": 1,
                    "env": None, **board})  # fmt: skip
    assert judged["outcome"] == ("too_few_tasks" if len(sums) < 8 else "not_finite")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.7e308])
@pytest.mark.parametrize("place", ["before", "teacher", "student"])
def test_scores_that_are_not_finite_close_no_gap(bad: float, place: str) -> None:
    """The last one is finite, and its sum is not."""
    scores = {"before": [0.1] * 10, "teacher": [0.9] * 10, "student": [0.9] * 10}
    scores[place] = [bad] * 10
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        board = compare(scores["before"], scores["teacher"], scores["student"], None, seed=0)
    assert board["outcome"] == "not_finite"
    assert "not a finite number" in board["verdict"]


@pytest.mark.parametrize("place", ["mean", "sums"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kl_that_is_not_finite_has_no_share(place: str, when: str) -> None:
    good = PromptSums(1.0, [1.0] * 20, [1] * 20)
    changes = {"mean": float("nan")} if place == "mean" else {"sums": [float("inf")] * 20}
    sums = {"before": good, "after": good, when: replace(good, **changes)}
    figures = kl_closed(sums["before"], sums["after"], seed=0)
    assert figures["closed"] is None
    assert not figures["negligible"]


@pytest.mark.parametrize("mean", [float("nan"), float("inf")])
def test_a_final_kl_that_is_not_finite_is_not_one_that_is_still_to_come(mean: float) -> None:
    good = PromptSums(1.0, [1.0] * 20, [1] * 20)
    board = build({}, 0) | teacher_kl("heldout_kl", good, None, 0)
    assert judge(board)["outcome"] == "not_finished"
    board |= teacher_kl("heldout_kl", good, replace(good, mean=mean), 0)
    assert board["heldout_kl_after"] is None
    assert judge(board)["outcome"] == "not_finite"
