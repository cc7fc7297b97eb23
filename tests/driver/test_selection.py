"""The best checkpoint and the early end of a run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.configs import MINIMAL
from support.runs import board, records, run

from minidistill.config import Config, load_config
from minidistill.driver import loop
from minidistill.driver.selection import Mark, Selection
from minidistill.driver.session import Session
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_OK, EXIT_USAGE, UserError

KL, REWARD = "eval/heldout_kl", "eval/reward"
NAN = math.nan
EVERY = (
    "--orchestrator.eval.interval", "1", "--trainer.scheduler.type", "constant",
    "--orchestrator.eval.num_examples", "2", "--orchestrator.batch_size", "4",
)  # fmt: skip
BEST = (*EVERY, "--ckpt.best", "heldout_kl", "--ckpt.keep", "1", "--ckpt.interval", "4")
PATIENT = ("--early_stopping.patience", "2")


def config(tmp_path: Path, *flags: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return load_config([str(path), "--orchestrator.eval", *flags]).config


def follow(selection: Selection, metric: str, figures: list[float | None]) -> list[Any]:
    """Take the figures of steps 0, 10, 20, …; the best after each of them."""
    found = []
    for index, figure in enumerate(figures):
        selection.take(10 * index, {metric: figure})
        selection.take(10 * index + 1, {"teacher_kl": 0.0})  # a step, not an evaluation
        found.append(selection.best and selection.best.step)
    return found


# -- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "figures", "best"),
    [
        (KL, [9.0, 2.0, 1.0, 1.5], [None, 10, 20, 20]),
        (KL, [0.1, 2.0, 3.0], [None, 10, 10]),  # the untrained student is no choice
        (KL, [9.0, 2.0, 2.0], [None, 10, 10]),  # the earlier of equal ones
        (KL, [9.0, NAN, 2.0, NAN], [None, None, 20, 20]),
        (KL, [9.0, 2.0, -math.inf, None], [None, 10, 10, 10]),
        (REWARD, [0.0, 0.2, 0.5, 0.5, 0.1], [None, 10, 20, 20, 20]),
        (REWARD, [0.0, NAN, math.inf], [None, None, None]),
    ],
)
def test_the_best_evaluation(
    metric: str, figures: list[float | None], best: list[int | None], tmp_path: Path
) -> None:
    chosen = config(tmp_path, "--ckpt.best", metric.removeprefix("eval/"))
    assert follow(Selection(chosen), metric, figures) == best


@pytest.mark.parametrize(
    ("figures", "delta", "stop", "since"),
    [
        ([3.0, 2.0, 2.0, 2.1], "0", 30, "it was 2 at step 10"),
        ([3.0, 2.0, NAN, None], "0", 30, "it was 2 at step 10"),
        ([1.0, 2.0, 3.0], "0", 20, "it was 1 before training"),
        ([3.0, 2.0, 1.95, 1.91, 1.8], "0.1", 30, "it was 2 at step 10"),
        ([3.0, 2.0, 1.95, 1.85, 1.8, 1.7], "0.1", None, ""),  # small steps add up
        ([3.0, 2.0, 2.1, 1.9, 1.95], "0", None, ""),  # in a row
        ([NAN, NAN, NAN], "0", 20, ""),
    ],
)
def test_the_end_of_patience(
    figures: list[float | None], delta: str, stop: int | None, since: str, tmp_path: Path
) -> None:
    chosen = config(tmp_path, *PATIENT, "--early_stopping.min_delta", delta)
    selection = Selection(chosen)
    follow(selection, KL, figures)
    by = "" if delta == "0" else f" by more than {delta}"
    text = f"stopped early at step {stop}: held-out KL has not fallen{by} for 2 evaluations"
    assert selection.stopped == (None if stop is None else text + (f" since {since}" * bool(since)))


def test_the_reward_has_to_rise(tmp_path: Path) -> None:
    selection = Selection(config(tmp_path, *PATIENT, "--early_stopping.metric", "reward"))
    follow(selection, KL, [3.0, 3.0, 3.0, 3.0])
    assert selection.stopped is None
    follow(selection, REWARD, [0.5, 0.6, 0.6, 0.4])
    assert selection.stopped == (
        "stopped early at step 30: held-out reward has not risen for 2 evaluations since it was "
        "0.6 at step 10"
    )


@pytest.mark.parametrize("figures", itertools.product([1.0, 2.0, NAN], repeat=4))
def test_a_resumed_run_is_where_the_uninterrupted_one_is(
    figures: tuple[float, ...], tmp_path: Path
) -> None:
    """What is not finite is null in the records."""
    chosen = config(tmp_path, *PATIENT, "--ckpt.best", "heldout_kl")
    live, resumed = Selection(chosen), Selection(chosen)
    follow(live, KL, [*figures])
    resumed.replay(
        {"step": 10 * i, KL: None if math.isnan(v) else v} for i, v in enumerate(figures)
    )
    assert (live.best, live.stopped) == (resumed.best, resumed.stopped)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--no-orchestrator.eval",), "there is no [orchestrator.eval]"),
        (("--orchestrator.eval.interval", "0"), "orchestrator.eval.interval = 0"),
    ],
)
@pytest.mark.parametrize("key", [("--ckpt.best", "reward"), ("--early_stopping",)])
def test_without_evaluations_there_is_nothing_to_compare(
    key: tuple[str, ...], flags: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        config(tmp_path, *key, *flags)
    assert what in caught.value.what
    assert "orchestrator.eval" in caught.value.fix


def test_a_reward_that_no_environment_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(24)))
    path = tmp_path / "config.toml"
    path.write_text(
        '[trainer.loss]\nadv_tau = 0.0\n[orchestrator.teacher_model]\ncontext = "Be brief."\n'
        f'[[orchestrator.env]]\nid = "jsonl"\nargs = {{ path = "{prompts}" }}\n'
        "[orchestrator.buffer]\nskip_verification = true\n[orchestrator.eval]\n"
    )
    from minidistill import cli

    arguments = ["run", str(path), "--output_dir", str(tmp_path / "run"), "--ckpt.best", "reward"]
    assert cli.main(arguments) == EXIT_USAGE
    assert 'ckpt.best = "reward", but no environment' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- runs --------------------------------------------------------------------------------------


def adapter(folder: Path) -> dict[str, Any]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def checkpoints(path: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (path / "checkpoints").glob("step_*"))


@pytest.fixture(autouse=True)
def brief_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the last passes on unrelated prompts, which take most of the time."""
    monkeypatch.setattr(Session, "unrelated_kl", lambda session: None)
    monkeypatch.setattr(Session, "drift_kl", lambda session: None)


@pytest.fixture
def falls_until(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the figure that evaluations compare: |step - best| + 1. The KL itself is computed."""
    original = Session.held_out_kl

    def set_best(best: int) -> None:
        from dataclasses import replace

        def held_out_kl(session: Session) -> Any:
            kl = original(session)
            mean = 1.0 + abs(session.last_step - best)
            return replace(kl, by_prompt=replace(kl.by_prompt, mean=mean))

        monkeypatch.setattr(Session, "held_out_kl", held_out_kl)

    return set_best


def breaks_at(number: int) -> Any:
    original = loop.train_step

    def train_step(session: Any, step: int) -> None:
        if step == number:
            raise RuntimeError("it broke")
        original(session, step)

    return train_step


def test_the_best_is_kept_chosen_and_said_and_a_resumed_run_agrees(
    tmp_path: Path,
    falls_until: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Step 2 is the best of 6, the run ends at 4; the second run is cut off twice."""
    falls_until(2)
    whole, path = tmp_path / "whole", tmp_path / "resumed"
    assert run(whole, *BEST, *PATIENT) == EXIT_OK
    output = capsys.readouterr().out
    stopped = "stopped early at step 4: held-out KL has not fallen for 2 evaluations since it was 1"
    assert f"{stopped} at step 2" in output
    assert "of step 2: lowest held-out KL of 4 evaluations, 1" in output
    found = board(whole)
    assert found["stopped_early"] == f"{stopped} at step 2"
    assert (found["steps"], found["best_step"], found["best_value"]) == (4, 2, 1.0)
    assert [r["step"] for r in records(whole) if KL in r] == [0, 1, 2, 3, 4]
    # the step-2 checkpoint besides the latest one
    assert checkpoints(whole) == [2, 4]
    assert adapter(whole / "adapter") == adapter(whole / "checkpoints" / "step_000002" / "adapter")
    assert adapter(whole / "adapter") != adapter(whole / "checkpoints" / "step_000004" / "adapter")
    # the figures are of these weights: as evaluated at step 2
    student = next(r for r in records(whole) if r["step"] == 2 and KL in r)
    assert found["student"] == student["eval/sokoban-env/student/avg"]
    assert found["length_after"] == student["eval/completions/length_mean"]

    with monkeypatch.context() as patch:  # after the best checkpoint
        patch.setattr(loop, "train_step", breaks_at(4))
        assert run(path, *BEST, *PATIENT) == EXIT_FAILED
    with monkeypatch.context() as patch:  # after the last checkpoint
        patch.setattr(Session, "restore_best", lambda session: 1 / 0)
        assert run(path, *BEST, *PATIENT, "--resume") == EXIT_FAILED
    assert run(path, *BEST, *PATIENT, "--resume") == EXIT_OK
    assert records(path) == records(whole)
    assert board(path) == board(whole)
    assert adapter(path / "adapter") == adapter(whole / "adapter")

    capsys.readouterr()
    assert run(path, *BEST, *PATIENT, "--resume") == EXIT_OK
    assert "It stopped early: a larger --early_stopping.patience" in capsys.readouterr().out
    # with more patience it goes on, as a run that had it from its start
    patient = ("--early_stopping.patience", "9")
    assert run(path, *BEST, *patient, "--resume") == EXIT_OK
    other = tmp_path / "patient"
    assert run(other, *BEST, *patient) == EXIT_OK
    assert records(path) == records(other)
    assert board(path) == board(other)
    assert "stopped_early" not in board(path)
    assert (board(path)["steps"], board(path)["best_step"]) == (6, 2)
    assert checkpoints(path) == [2, 6]


def test_the_last_step_may_be_the_best(tmp_path: Path, falls_until: Any) -> None:
    falls_until(6)
    assert run(tmp_path / "run", *BEST, *PATIENT) == EXIT_OK
    found = board(tmp_path / "run")
    assert (found["steps"], found["best_step"]) == (6, 6)
    assert "stopped_early" not in found
    assert [r["step"] for r in records(tmp_path / "run") if KL in r] == [0, 1, 2, 3, 4, 5, 6]


def test_the_choice_may_be_left_out_and_not_taken_up(
    tmp_path: Path, falls_until: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    falls_until(2)
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", breaks_at(5))
        assert run(path, *BEST) == EXIT_FAILED
    assert checkpoints(path) == [2, 4]
    assert run(path, *BEST, "--ckpt.best", "reward", "--resume") == EXIT_USAGE
    assert "ckpt.best (was 'heldout_kl', now 'reward')" in capsys.readouterr().err
    tensors = path / "checkpoints" / "step_000002" / "state.safetensors"
    kept = tensors.read_bytes()
    tensors.unlink()
    assert run(path, *BEST, "--resume") == EXIT_ENVIRONMENT
    error = capsys.readouterr().err
    assert "the best checkpoint, step_000002, cannot be used: state.safetensors is miss" in error
    assert "--no-ckpt.best" in error
    tensors.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])  # of the same size
    assert run(path, *BEST, "--resume") == EXIT_ENVIRONMENT
    assert "state.safetensors has another checksum" in capsys.readouterr().err
    assert run(path, *BEST, "--no-ckpt.best", "--resume") == EXIT_OK
    assert "best_step" not in board(path)
    assert adapter(path / "adapter") == adapter(path / "checkpoints" / "step_000006" / "adapter")


def test_every_weight_and_the_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With full fine-tuning on two sharded ranks: both take back the weights of step 1."""
    original = Selection.take

    def take(selection: Selection, step: int, metrics: dict[str, Any]) -> None:
        if REWARD in metrics:
            assert metrics[REWARD] == metrics.get("eval/sokoban-env/student/avg", metrics[REWARD])
            metrics = metrics | {REWARD: -float(step)}
        original(selection, step, metrics)

    monkeypatch.setattr(Selection, "take", take)
    path = tmp_path / "run"
    flags = (
        "--no-trainer.model.lora",
        "--trainer.world_size",
        "2",
        "--inference.engine",
        "embedded",
    )
    chosen = ("--ckpt.best", "reward", *PATIENT, "--early_stopping.metric", "reward")
    assert run(path, *EVERY, *flags, *chosen, "--ckpt.interval", "0") == EXIT_OK
    found = board(path)
    assert (found["steps"], found["best_step"], found["best_value"]) == (2, 1, -1.0)
    saved = load_file(path / "checkpoints" / "step_000001" / "state.safetensors")
    model = load_file(path / "model" / "model.safetensors")
    shared = {n: t for n, t in saved.items() if n.removeprefix("policy/student/") in model}
    assert len(shared) > 5
    assert all((model[n.removeprefix("policy/student/")] == t).all() for n, t in shared.items())
    evaluated = next(r for r in records(path) if r["step"] == 1 and REWARD in r)
    assert found["student"] == evaluated["eval/sokoban-env/student/avg"]


def test_nothing_is_computed_that_nobody_asked_for(tmp_path: Path) -> None:
    assert Selection(config(tmp_path)).best is None
    assert run(tmp_path / "run") == EXIT_OK
    assert [r["step"] for r in records(tmp_path / "run") if KL in r] == [0]
    assert not any(REWARD in r for r in records(tmp_path / "run"))
    assert not {"weights", "best_step", "stopped_early"} & board(tmp_path / "run").keys()


def test_a_context_that_is_read_once_gives_the_same_kl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with passes that read it with each prompt. The last figure is that of the choice."""
    context = "Look at each wall, at the box and at the goal before you move. " * 3
    flags = (*EVERY, "--max_steps", "1", "--orchestrator.teacher_model.context", context)
    plain, once = tmp_path / "plain", tmp_path / "once"
    assert run(plain, *flags) == EXIT_OK
    assert run(once, *flags, "--ckpt.best", "heldout_kl") == EXIT_OK
    for key in ("heldout_kl_before", "heldout_kl_after"):
        assert board(once)[key] == pytest.approx(board(plain)[key], rel=1e-5)
    assert board(once)["heldout_kl_after"] == board(once)["best_value"]
    assert capsys.readouterr().out.count("the last step alone is evaluated") == 1


def test_figures_that_are_never_finite_choose_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Selection.take

    def take(selection: Selection, step: int, metrics: dict[str, Any]) -> None:
        original(selection, step, metrics | ({KL: NAN} if KL in metrics else {}))

    monkeypatch.setattr(Selection, "take", take)
    path = tmp_path / "run"
    assert run(path, *BEST, "--max_steps", "2") == EXIT_OK
    assert "no evaluation has a finite held-out KL" in capsys.readouterr().out
    assert "best_step" not in board(path)
    assert Mark(2, 1.0).place == "at step 2"
