"""What the scoreboard says before the run, after the baseline and at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import scoreboard_runs
from support.scoreboard_runs import Results, Runner, solved

from minidistill.driver.prepare import prepare
from minidistill.envs import has_task
from minidistill.evaluation.drift import judge_drift
from minidistill.evaluation.side_by_side import kept
from minidistill.reporting.run_directory import RunDirectory


@pytest.mark.parametrize(
    ("kls", "last"),
    [
        ((3.0,), None),
        ((3.0, 1.0), 1.0),
        ((3.0, 2.0, 1.0), 1.5),
        ((90.0, *range(1, 10)), 5.0),
        ((90.0, *range(1, 11)), 5.5),
        ((90.0, 80.0, *range(1, 11)), 5.5),
    ],
)
def test_the_last_kl_never_includes_the_first_step(
    tmp_path: Path, kls: Sequence[float], last: float | None
) -> None:
    board, output = scoreboard_runs.run(tmp_path / "run", Results(teacher_kls=kls))
    assert (board["teacher_kl_first"], board["teacher_kl_last"]) == (kls[0], last)
    assert last is not None or "teacher KL             3 → –\n" in output


def test_a_first_step_without_a_kl_is_not_replaced_by_the_second(tmp_path: Path) -> None:
    results = Results(teacher_kls=(float("nan"), 2.0, 1.0))
    board, _ = scoreboard_runs.run(tmp_path / "run", results)
    assert (board["teacher_kl_first"], board["teacher_kl_last"]) == (None, 1.5)


def test_an_environment_without_a_gap_is_named_right_after_the_baseline(tmp_path: Path) -> None:
    results = Results(
        before={"easy": solved(4), "spoiled": solved(30)},
        teacher={"easy": solved(40), "spoiled": solved(20)},
        after={"easy": solved(40), "spoiled": solved(20)},
    )
    board, output = scoreboard_runs.run(tmp_path / "run", results)
    [warning] = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: spoiled: The context makes the score worse (0.75 → 0.5")
    assert output.index(warning) < output.index("scoreboard")
    assert board["outcome"] == "closed"  # of both together
    assert {name: part["outcome"] for name, part in board["per_env"].items()} == {
        "easy": "closed",
        "spoiled": "context_harms",
    }
    assert any(line.split()[0] == "spoiled" and line.endswith("worse with context")
               for line in output.splitlines() if line.strip())  # fmt: skip


def test_a_baseline_of_an_older_version_invents_nothing(tmp_path: Path) -> None:
    session: Any = Runner(tmp_path / "run", Results())
    old = {"rewards": {}, "heldout_kl": 3.0, "seconds": 1.0}
    session.directory.write("baseline.json", old)
    scoreboard_runs.evaluate_baseline(session)
    session.log(1, {"teacher_kl": 1.0})
    session.trained = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scoreboard_runs.summary.checkpoint, "save_model", lambda policy, path: path / "adapter"
        )
        scoreboard_runs.summary.finish(session)
    board = session.directory.read("scoreboard.json")
    assert board["outcome"] == "no_baseline"
    assert (board["heldout_kl_before"], board["heldout_kl_after"]) == (3.0, 0.125)
    assert board["heldout_kl_closed"] is None
    assert board["completions"] == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, True),
        ({"has_rewards": False}, False),
        ({"has_rewards": True, "has_task": False}, False),
    ],
)
def test_a_context_has_a_task_if_its_reward_is_not_of_the_style_alone(
    attributes: dict[str, bool], expected: bool
) -> None:
    assert has_task(SimpleNamespace(**attributes)) is expected  # type: ignore[arg-type]


def figures(**changes: Any) -> dict[str, Any]:
    kl = {"before": 1.0, "after": 0.25, "negligible": False, "closed": 0.75}
    kl |= {"closed_low": 0.6, "closed_high": 0.9} | changes
    return {"drift_kl": 0.3} | {f"unrelated_kl_{key}": value for key, value in kl.items()}


def test_drift_is_judged_by_what_the_context_is_for() -> None:
    task, persona = (judge_drift(figures(), has_task=has_task) for has_task in (True, False))
    assert (task["drift_judged_by"], persona["drift_judged_by"]) == ("base", "teacher")
    assert "but they have changed (drift KL 0.3)" in task["drift_verdict"]
    share = "75% of the KL to the teacher there is closed (95% interval 60% to 90%)"
    assert share in persona["drift_verdict"]


@pytest.mark.parametrize(
    ("bounds", "interval"),
    [((-0.5, 0.1), " (95% interval -10% to 50%)"), ((None, None), "")],
)
def test_a_kl_on_unrelated_prompts_that_has_grown(
    bounds: tuple[float | None, float | None], interval: str
) -> None:
    low, high = bounds
    kl = figures(after=1.2, closed=-0.2, closed_low=low, closed_high=high)
    verdict = judge_drift(kl, has_task=False)["drift_verdict"]
    assert f"too: the KL to the teacher there has grown by 20%{interval}. " in verdict
    assert "closed" not in verdict


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"negligible": True, "closed": None}, "it hardly changes the teacher's answers there"),
        ({"before": None, "negligible": None, "closed": None}, "there is 0.25 now"),
        ({"after": None, "closed": None}, None),
    ],
)
def test_a_persona_without_a_share(changes: dict[str, Any], text: str | None) -> None:
    verdict = judge_drift(figures(**changes), has_task=False)["drift_verdict"]
    assert verdict is None if text is None else text in verdict


@pytest.mark.parametrize(
    ("drift", "words"),
    [(0.019, "and they do"), (0.09, "and they almost do"), (0.4, "but they have changed"),
     (9.0, "but they have changed much"), (float("nan"), None), (None, None)],
)  # fmt: skip
def test_drift_of_a_task_in_words(drift: float | None, words: str | None) -> None:
    verdict = judge_drift(figures() | {"drift_kl": drift}, has_task=True)["drift_verdict"]
    assert verdict is None if words is None else f"{words} (drift KL" in verdict


def test_kept_prompts_are_spread_evenly() -> None:
    assert kept(3) == [0, 1, 2]
    assert kept(128) == list(range(0, 128, 8))


@pytest.mark.parametrize(
    ("flags", "tasks", "level", "text"),
    [
        ((), 3, logging.WARNING, "3 held-out tasks are too few to judge by: 8 give an interval, "
         "and 100 a narrow one. The scoreboard will have no percentage: give the environments more"
         " tasks."),
        (("--orchestrator.eval.num_examples", "1"), 16, logging.WARNING, "1 held-out task is too "
         "few to judge by: 8 give an interval, and 100 a narrow one. The scoreboard will have no "
         "percentage: raise orchestrator.eval.num_examples."),
        (("--no-orchestrator.teacher_model.eval_baseline",), 3, logging.WARNING,
         "3 held-out prompts are too few to judge by"),
        ((), 16, logging.INFO, "16 held-out tasks give a mean of 0s and 1s an interval of up to "
         "±24 points, 100 give ±10: give the environments more tasks"),
        (("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline"), 16,
         logging.INFO, "There is no baseline, so nothing can be said"),
        (("--no-orchestrator.eval", "--no-orchestrator.teacher_model.eval_baseline",
          "--orchestrator.buffer.skip_verification", "--trainer.loss.adv_tau", "0"), 16,
         logging.INFO, "no reward of sokoban-env is computed"),
    ],
)  # fmt: skip
def test_what_the_scoreboard_will_lack_is_said_in_preflight(
    configure: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[str, ...],
    tasks: int,
    level: int,
    text: str,
) -> None:
    args = "--orchestrator.env.0.args.num_eval_examples", str(tasks)
    train = "--orchestrator.env.0.args.num_train_examples", "16"
    loaded = configure(*train, *args, *flags)
    with caplog.at_level(logging.INFO, "minidistill"):
        prepare(loaded, RunDirectory(tmp_path / "run"), resume=False)
    assert not (tmp_path / "run").exists()
    records = [r for r in caplog.records if r.message.startswith(text)]
    assert [r.levelno for r in records] == [level], json.dumps(caplog.messages)


def test_drift_is_not_judged_where_the_teachers_answers_are_unknown() -> None:
    verdict = judge_drift(figures(after=None), has_task=True)["drift_verdict"]
    assert verdict.startswith("The answers to unrelated prompts have changed (drift KL 0.3). ")
    assert "The context is for" not in verdict
