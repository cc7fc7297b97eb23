"""What Python uses: `from minidistill import bake, run, load_config, Run`."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.paths import SOKOBAN

import minidistill
from minidistill import Run, UserError, load_config
from minidistill.driver import loop
from minidistill.reporting.run_lock import locked

# support.runs.TINY as settings
TINY: dict[str, Any] = {
    "max_steps": 6,
    "ckpt": {"interval": 2},
    "orchestrator.batch_size": 8,
    "orchestrator.eval": {"num_examples": 8, "interval": 3},
    "orchestrator.env.0.args": {"num_train_examples": 16, "num_eval_examples": 8},
}


def run(directory: Path, **more: Any) -> Run:
    return minidistill.run([SOKOBAN, TINY], output_dir=directory, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("api") / "run", quiet=True)


# -- configuration ---------------------------------------------------------------------------------


def test_python_gives_the_configuration_of_the_command_line(tmp_path: Path) -> None:
    by_flags = minidistill.config.load_config([SOKOBAN, *runs.TINY])
    for config in ([SOKOBAN, TINY], [Path(SOKOBAN), TINY], load_config([SOKOBAN, TINY])):
        loaded = load_config(config)
        assert loaded.config == by_flags.config
        assert loaded.files == by_flags.files
    assert load_config(SOKOBAN, max_steps=6).provenance["max_steps"] == "Python"
    again = load_config(load_config(SOKOBAN), max_steps=6)
    assert (again.config.max_steps, again.files) == (6, (Path(SOKOBAN),))
    file = tmp_path / "again.toml"
    file.write_text(load_config([SOKOBAN, TINY]).text)
    assert load_config(file).config == by_flags.config


def test_a_later_layer_beats_an_earlier_one() -> None:
    assert load_config([{"max_steps": 1}, SOKOBAN, {"max_steps": 2}]).config.max_steps == 2
    assert load_config([SOKOBAN, {"max_steps": 2}], max_steps=3).config.max_steps == 3
    none = {"orchestrator": {"eval": None, "teacher_model": {"eval_baseline": False}}}
    loaded = load_config([SOKOBAN, none])
    assert loaded.config.orchestrator.eval is None


def test_files_in_settings_are_found_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "persona.txt").write_text("You are terse.")
    for settings in (
        {"orchestrator": {"teacher_model": {"context_file": "persona.txt"}}},
        {"orchestrator.teacher_model.context_file": Path("persona.txt")},
    ):
        loaded = load_config([SOKOBAN, settings])
        assert loaded.config.orchestrator.teacher_model.context == "You are terse."


@pytest.mark.parametrize(
    ("settings", "what", "where"),
    [
        ({"trainer": {"loss": {"adv_tu": 1}}}, "adv_tu", "Python, trainer.loss.adv_tu"),
        ({"trainer.loss.adv_tu": 1}, "adv_tu", "Python, trainer.loss.adv_tu"),
        ({"max_steps": "many"}, "many", "Python, max_steps"),
        ({"seed": object()}, "of the type object", "seed"),
        ({"trainer": {"loss": 1j}}, "of the type complex", "trainer.loss"),
        ({"orchestrator.env.7.id": "x"}, "no entry 7", "Python"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([SOKOBAN, settings])
    assert what in caught.value.what
    assert caught.value.where == where
    assert caught.value.exit_code == 2


def test_settings_that_contain_themselves_are_refused() -> None:
    settings: dict[str, Any] = {}
    settings["trainer"] = settings
    with pytest.raises(UserError, match="nested more than"):
        load_config([SOKOBAN, settings])


def test_a_setting_that_is_missing_is_asked_for() -> None:
    with pytest.raises(UserError) as caught:
        load_config({"max_steps": 2})
    assert (caught.value.what, caught.value.where) == (
        "orchestrator.env is required",
        "Python, orchestrator.env",
    )


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_is_that_of_the_command(finished: Run, tmp_path: Path) -> None:
    """Also the third one in a process, and one in a thread, where no signal can be handled."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert runs.run(tmp_path / "command") == 0
    expected = runs.records(tmp_path / "command")
    assert runs.records(finished.directory) == expected
    threads = set(threading.enumerate())
    made: list[Run] = []
    thread = threading.Thread(target=lambda: made.append(run(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert runs.records(made[0].directory) == expected
    assert {n: signal.getsignal(n) for n in before} == before
    assert set(threading.enumerate()) <= threads


def test_a_run_shows_what_it_has_reached(finished: Run) -> None:
    assert finished.status == "finished"
    assert finished.config.max_steps == 6
    assert str(finished.context).startswith("You are a world-class puzzle solver")
    raw = json.loads((finished.directory / "scoreboard.json").read_text())
    board = finished.scoreboard
    assert board is not None
    assert (board.verdict, board.outcome, board.steps) == (raw["verdict"], raw["outcome"], 6)
    assert (board.student, board.drift_kl) == (raw["student"], raw["drift_kl"])
    assert board.gap_closed is not None
    assert (board.gap_closed.value, board.gap_closed.low) == (
        raw["gap_closed"],
        raw["gap_closed_low"],
    )
    assert finished.verdict == raw["verdict"]
    assert [row["step"] for row in finished.metrics] == list(range(7))
    assert finished.metrics[3]["teacher_kl"] > 0
    assert "eval/sokoban-env/student/avg" in finished.metrics[3], "the evaluation is in its step"
    assert len(finished.samples) == 8
    assert finished.samples[0].after == raw["completions"][0]["after"]
    assert finished.adapter == finished.directory / "adapter"
    assert finished.report == finished.directory / "report.html"
    assert raw["verdict"] in repr(finished)
    assert raw["verdict"] in finished._repr_html_()


def test_rollouts_have_the_figures_of_their_tokens(finished: Run) -> None:
    rollouts = finished.rollouts(2)
    assert len(rollouts) == 8
    metrics = finished.metrics[2]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    assert sum(rewards) / 8 == pytest.approx(metrics["reward/mean"])
    kl = [kl for r in rollouts for kl in r.kl]
    assert sum(kl) / len(kl) == pytest.approx(metrics["teacher_kl"], rel=1e-5)
    for rollout in rollouts:
        assert rollout.completion in "".join(rollout.tokens)
        assert str(finished.context) in rollout.teacher_prompt
        assert str(finished.context) not in rollout.prompt
        assert len(rollout.tokens) == len(rollout.kl) == len(rollout.gaps)
    assert finished.rollouts() == finished.rollouts(6)
    with pytest.raises(UserError, match="has no rollouts of step 7"):
        finished.rollouts(7)


def test_a_question_to_what_was_trained(finished: Run) -> None:
    answers = finished.chat(finished.samples[0].prompt)
    assert list(answers) == ["base", "base in context", "student"]
    assert all(answer.startswith("<answer>") for answer in answers.values())
    assert answers["base in context"] == finished.samples[0].teacher, "it is sure of itself"


def test_metrics_as_a_data_frame(finished: Run) -> None:
    pytest.importorskip("pandas")
    frame = finished.to_pandas()
    assert list(frame.index) == list(range(7))
    assert frame["teacher_kl"][4] == finished.metrics[4]["teacher_kl"]


def test_an_adapter_that_cannot_be_read_is_not_none(finished: Run, tmp_path: Path) -> None:
    lost = Run(shutil.copytree(finished.directory, tmp_path / "lost"))
    for folder in ("adapter", "checkpoints"):
        shutil.rmtree(lost.directory / folder)
    with pytest.raises(UserError):
        _ = lost.adapter
    for text in ('{"completions": 7}', '{"completions": [5]}', '{"completions": [{}]}'):
        (lost.directory / "scoreboard.json").write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            _ = lost.samples
    (lost.directory / "scoreboard.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        _ = lost.adapter
    (lost.directory / "config.toml").write_text("max_steps =")
    with pytest.raises(UserError, match="not valid TOML"):
        _ = lost.adapter


def test_paths_of_python_and_of_the_home(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert finished.export("~/out", vllm=False) == tmp_path / "out"
    with pytest.raises(UserError, match="cannot load the model") as caught:
        minidistill.bake(tmp_path / "none", "Be brief.")
    assert str(tmp_path / "none") in caught.value.what


def test_a_run_that_has_crashed_or_goes_on(finished: Run, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    shutil.copytree(finished.directory, directory)
    killed = Run(str(directory))
    (directory / "scoreboard.json").unlink()
    latest = directory / "checkpoints" / "latest"
    latest.write_text("step_000004\n")
    assert (killed.status, killed.scoreboard, killed.verdict) == ("crashed", None, None)
    assert killed.samples[0].after is None
    assert killed.samples[0].teacher == finished.samples[0].teacher
    with locked(directory):
        assert killed.status == "running"
    file = directory / "rollouts" / "step_000002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        killed.rollouts(2)


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        Run(tmp_path)


# -- ends ------------------------------------------------------------------------------------------


def after(step: int, do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something in the middle of a step."""
    real = loop.train_step

    def train_step(session: Any, number: int) -> None:
        if number == step:
            do()
        real(session, number)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_a_cell_of_a_notebook_runs_within_an_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines that are servers, agents and judges have event loops of their own."""

    async def cell() -> bool:
        before = asyncio.get_running_loop()
        assert run(tmp_path / "run", max_steps=1).status == "finished"
        await asyncio.sleep(0)
        return asyncio.get_running_loop() is asyncio.get_event_loop() is before

    asked: list[float] = []
    after(1, lambda: asked.append(asyncio.run(asyncio.sleep(0, 1.0))), monkeypatch)
    assert asyncio.run(cell())
    assert asked == [1.0]


def test_ctrl_c_saves_the_step_and_resume_continues(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        after(3, lambda: signal.raise_signal(signal.SIGINT), patch)
        with pytest.raises(KeyboardInterrupt, match="resume=True continues it"):
            run(tmp_path / "run")
    stopped = Run(tmp_path / "run")
    assert (stopped.status, stopped.metrics[-1]["step"]) == ("stopped", 3)
    assert run(tmp_path / "run", resume=True).status == "finished"
    assert runs.records(tmp_path / "run") == runs.records(finished.directory)


def test_ctrl_c_before_the_first_step_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "prepare", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (SystemExit(3), RuntimeError, "something called sys.exit"),
        (OSError(28, "No space left on device", "/disk/x"), UserError, "cannot write /disk/x"),
        (ModuleNotFoundError("No module", name="somewhere"), UserError, "somewhere is missing"),
        (ZeroDivisionError("mine"), ZeroDivisionError, "mine"),
    ],
    ids=["exit", "disk", "package", "other"],
)
def test_errors_are_raised_and_end_no_process(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: type[BaseException],
    text: str,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(loop, "prepare", fail)
    with pytest.raises(kind, match=text):
        run(tmp_path / "run")


def test_a_run_that_is_there_is_not_replaced(finished: Run) -> None:
    with pytest.raises(UserError) as caught:
        run(finished.directory)
    assert caught.value.what.endswith("already holds a run")
    assert caught.value.where == "Python"


def test_a_launch_by_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        run(tmp_path / "run")


# -- the package -----------------------------------------------------------------------------------


def test_the_names_are_there_and_their_import_is_light() -> None:
    code = (
        "import sys, minidistill; light = set(sys.modules)\n"
        "from minidistill import *\n"
        "assert run is minidistill.run and Run.__name__ == 'Run' and set(minidistill.__all__) <= "
        "set(dir(minidistill))\n"
        "print([m for m in ('pydantic', 'minidistill.api') if m in light],"
        " [m for m in ('torch', 'transformers', 'rich', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = minidistill.nothing
