"""The results: records that survive, runs that are made, and tables made from them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import support.forked
from support.experiment_records import OTHER, SHORT, record
from support.processes import wait_for

from bench import results
from bench.experiments import document
from bench.experiments.catalog import EXPERIMENTS
from bench.experiments.claims import EverySeed
from bench.experiments.measures import MEASURES
from bench.experiments.runs import ROOT, Maker, Record, Run, Store, filled, locked
from bench.experiments.tables import GAP, STUDENT, Experiment, Row, Table, answers, markdown, means
from minidistill.config import load_config
from minidistill.errors import (
    EXIT_ENVIRONMENT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    UserError,
)
from tools import forked


def test_answers_of_a_model_are_no_markup() -> None:
    """The first seed's, below the table."""
    texts = {"prompt": "a|b", "base": "1\n2", "in_context": "`x`\x1b[1m", "student": ""}
    made = {
        "short": [record(SHORT, seed, answers=[texts | {"base": f"1\n{seed}"}]) for seed in (0, 1)]
    }
    table = Table("games", "Games", (Row("a row", "short"), Row("another", "other")), answers=True)
    lines = answers(table, made | {"other": []})
    assert lines[2:] == ["| a row | `a\\|b` | `1 ↵ 0` | `` `x`[1m `` | (nothing) |"]
    assert answers(table, {"short": [], "other": []}) == []


def test_records_survive(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 1, gap_closed=0.5))
    store.add(record(SHORT, 0, error="exit code 4: it broke"))
    again = Store.open(tmp_path, "games")
    assert again.records == store.records
    assert [json.loads(line)["seed"] for line in again.path.read_text().splitlines()] == [0, 1]
    assert list(tmp_path.iterdir()) == [again.path]


def test_two_stores_keep_each_others_records(tmp_path: Path) -> None:
    ours, theirs = Store.open(tmp_path, "games"), Store.open(tmp_path, "games")
    ours.add(record(SHORT, 0, gap_closed=0.5))
    theirs.add(record(OTHER, 0, gap_closed=0.6))
    ours.add(record(SHORT, 1, gap_closed=0.7))
    assert len(Store.open(tmp_path, "games").records) == 3


def test_a_record_waits_for_the_lock(tmp_path: Path) -> None:
    """Another process may be writing."""
    store = Store.open(tmp_path, "games")
    writer = threading.Thread(target=store.add, args=[record(SHORT, 0, gap_closed=0.5)])
    with locked(tmp_path):
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
    writer.join()
    assert len(Store.open(tmp_path, "games").records) == 1


@pytest.mark.parametrize("line", ['{"name": "short", "se', '{"name": "short", "seed": 0}', "3", ""])
def test_a_damaged_line_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = EXPERIMENTS[0].name
    store = Store.open(tmp_path, name)
    store.add(record(SHORT, 0, gap_closed=0.5))
    store.path.write_text(store.path.read_text() + line + "\n")
    assert results.main(["--list", "--out", str(tmp_path), name]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert f"{name}.jsonl:2" in error
    assert "remove the line" in error


def test_a_folder_that_takes_no_records_is_refused_before_the_runs(tmp_path: Path) -> None:
    experiment = Experiment("games", (SHORT,), (Table("games", "", (Row("", "short"),)),), seeds=1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="records cannot be written"):
        results.make([(experiment, list(experiment.tables))], tmp_path / "file" / "records", 1)


def test_a_run_knows_what_its_files_say(tmp_path: Path) -> None:
    """Those of the commands before it too, and the data beside them."""
    config, data = tmp_path / "a.toml", tmp_path / "a.jsonl"
    config.write_text('path = "a.jsonl"')
    data.write_text("1")

    plain, after = Run("a", (str(config),)), Run("a", ("x",), first=(("run", str(config)),))
    before = plain.inputs(), after.inputs()
    assert plain.inputs() == Run("b", ("--max_steps", "3", str(config))).inputs()
    data.write_text("2")
    changed = plain.inputs(), after.inputs()
    config.write_text('path = "b.jsonl"')
    again = plain.inputs(), after.inputs()
    assert all(len(set(of_one)) == 3 for of_one in zip(before, changed, again, strict=True))
    made = record(plain, 0)
    assert made.is_of(plain)
    config.write_text("max_steps = 3")
    assert not made.is_of(plain)


def test_a_line_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 0, error="it broke"))
    store.add(record(SHORT, 1, gap_closed=0.5))
    store.path.write_text(store.path.read_text().splitlines()[1] + "\n")
    store.add(record(SHORT, 2, gap_closed=0.5))
    assert [seed for _, seed in Store.open(tmp_path, "games").records] == [1, 2]


def test_what_is_made_is_not_made_again(tmp_path: Path) -> None:
    """Unless its command or its measures are others now."""
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 0, gap_closed=0.5))
    assert [(r.name, seed) for r, seed in store.missing([SHORT, OTHER], range(2))] == [
        ("other", 0), ("short", 1), ("other", 1),
    ]  # fmt: skip
    changed = Run("short", ("configs/sokoban.toml", "--max_steps", "3"))
    measured = Run("short", SHORT.arguments, ("curve",))
    assert [r for r, _ in store.missing([changed], [0])] == [changed]
    assert [r for r, _ in store.missing([measured], [0])] == [measured]
    assert store.of(changed, [0]) == []


def test_a_table(tmp_path: Path) -> None:
    claim = EverySeed("It closes half.", "short", "gap_closed", 0.5)
    table = Table(
        "games",
        "Games",
        (Row("short", "short"), Row("the other", "other")),
        (STUDENT, GAP),
        (claim,),
    )
    experiment = Experiment("games", (SHORT, OTHER), (table,), seeds=3)
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 0, student=0.5, gap_closed=0.6))
    store.add(record(SHORT, 1, student=0.7, gap_closed=0.4))
    store.add(record(SHORT, 2, student=0.6, gap_closed=0.5))
    store.add(record(OTHER, 0, error="exit code 4: it broke"))
    lines = markdown(experiment, table, store).splitlines()
    assert lines[0] == "| run | student | gap closed |"
    assert lines[2] == "| short | 60.0% (35.2 to 84.8) | 50.0% (25.2 to 74.8) |"
    assert lines[3] == "| the other (0 of 3 seeds) | – | – |"
    assert "- `other`, seed 0, failed: exit code 4: it broke." in lines
    assert "- It closes half. **Contradicted**: worst of 3 seeds: 0.4." in lines
    assert "4 of 6 runs, seeds 0 to 2, 4 minutes of a core; commit 0123abcd; a CPU." in lines[-1]


def test_a_figure_that_some_runs_lack_is_marked(tmp_path: Path) -> None:
    table = Table("games", "Games", (Row("short", "short"),), (GAP, STUDENT), plot=GAP)
    experiment = Experiment("games", (SHORT,), (table,), seeds=3)
    store = Store.open(tmp_path, "games")
    for seed, closed in enumerate((0.6, None, 0.8)):
        store.add(record(SHORT, seed, gap_closed=closed, student=0.5))
    row = markdown(experiment, table, store).splitlines()[2]
    assert row == "| short | 70.0% (2 of 3) | 50.0% (50.0 to 50.0) |"
    assert means(table, experiment.records(store)) == []


def test_a_run_with_two_lines_counts_once(tmp_path: Path) -> None:
    rows = (Row("small boards", "short", "small_"), Row("large boards", "short", "large_"))
    table = Table("games", "Games", rows, (STUDENT,), plot=STUDENT)
    experiment = Experiment("games", (SHORT,), (table,), seeds=1)
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 0, small_student=0.5, large_student=0.25))
    lines = markdown(experiment, table, store).splitlines()
    assert lines[2:4] == ["| small boards | 50.0% |", "| large boards | 25.0% |"]
    assert "`python -m bench.results games`: 1 runs" in lines[-1]
    plotted = means(table, experiment.records(store))
    assert [(label, measured.value) for label, measured in plotted] == [
        ("small boards", 0.5),
        ("large boards", 0.25),
    ]
    store = Store.open(tmp_path / "failed", "games")
    store.add(record(SHORT, 0, error="it broke"))
    assert markdown(experiment, table, store).count("it broke") == 1


def test_failures_are_counted_however_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("games", "Games", (Row("short", "short"),), (GAP,))
    experiment = Experiment("games", (SHORT,), (table,), seeds=1)
    monkeypatch.setattr(results, "EXPERIMENTS", (experiment,))
    Store.open(tmp_path, "games").add(record(SHORT, 0, error="it broke"))
    assert results.main(["--out", str(tmp_path)]) == EXIT_FAILED
    assert "1 runs failed" in capsys.readouterr().out


def test_the_page_has_the_table_in_its_place(tmp_path: Path) -> None:
    table = Table("games", "Games", (Row("short", "short"),), (GAP,))
    experiment = Experiment("games", (SHORT,), (table,), seeds=1)
    store = Store.open(tmp_path, "games")
    store.add(record(SHORT, 0, gap_closed=0.6))
    page = tmp_path / "results.md"
    page.write_text("before\n<!-- table: games -->\nold\n<!-- end: games -->\nafter\n")
    document.write(experiment, [table], store, page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table: games -->\n| run |")
    assert text.endswith("<!-- end: games -->\nafter\n")
    assert "old" not in text
    assert ">60.0</text>" in (tmp_path / "results" / "games.svg").read_text()
    page.write_text("nothing\n")
    with pytest.raises(ValueError, match="no place for games"):
        document.write(experiment, [table], store, page)


def test_runs_are_made(tmp_path: Path) -> None:
    """One that ends well, one that the configuration refuses, and one that cannot be measured."""
    flags = (
        "--max_steps", "1", "--orchestrator.batch_size", "4", "--no-orchestrator.eval",
        "--no-orchestrator.teacher_model.eval_baseline",
    )  # fmt: skip
    good = Run("good", ("configs/sokoban.toml", *flags))
    bad = Run("bad", ("configs/sokoban.toml", "--max_steps", "many"))
    odd = Run("odd", good.arguments, ("curve",))
    made: list[Record] = []
    support.forked.start_server()  # the one of all tests, and not one for runs only
    Maker(2).make([(good, 3), (bad, 3), (odd, 3)], lambda r, count, total: made.append(r))
    by_name = {r.name: r for r in made}
    assert by_name["good"].error is None
    assert by_name["good"].number("samples") == 4
    assert by_name["good"].number("steps") == 1
    assert by_name["good"].command.startswith("minidistill run configs/sokoban.toml --max_steps 1")
    assert "exit code 2" in str(by_name["bad"].error)
    assert "max_steps" in str(by_name["bad"].error)
    assert by_name["bad"].figures == by_name["odd"].figures == {}
    assert "measures, exit code 1: ValueError: the run has no baseline" in str(by_name["odd"].error)


@pytest.mark.parametrize(
    ("killed", "what"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("print('error: no space'); exit(3)", "no space"),
        ("print('stopped after step 3'); exit(130)", "stopped after step 3"),
    ],
)
def test_a_run_that_was_ended_is_no_result(
    killed: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not kept as one that failed."""
    replace_runs(monkeypatch, killed)
    with pytest.raises(UserError, match=what):
        Maker(1).make([(SHORT, 0)], lambda r, count, total: pytest.fail("a record was made"))


def replace_runs(monkeypatch: pytest.MonkeyPatch, *codes: str) -> list[Any]:
    """Have each run execute its code instead, those after the last of them that code too. Returns
    a list that gets their processes."""
    started: list[Any] = []
    popen = subprocess.Popen

    def start(command: list[str], **settings: Any) -> Any:
        code = codes[min(len(started), len(codes) - 1)]
        started.append(popen([sys.executable, "-c", code], **settings))
        return started[-1]

    monkeypatch.setattr(forked, "start_server", lambda *_: None)
    monkeypatch.setattr(forked, "ForkedPopen", start)
    return started


def test_what_stops_one_run_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for their turn do not start."""
    started = replace_runs(
        monkeypatch, "import time; time.sleep(1); exit(3)", "import time; time.sleep(600)"
    )
    with pytest.raises(UserError):
        Maker(2).make([(SHORT, seed) for seed in range(9)], lambda r, count, total: None)
    assert 2 <= len(started) <= 3
    assert all(process.returncode is not None for process in started)


ENDLESS = """
import os, pathlib, time
pathlib.Path("{pid}").write_text(f"{{os.getpid()}}\\n")
time.sleep(600)
"""
CALL = """
import sys
from bench.experiments.runs import Maker
from minidistill.errors import UserError
from tools import forked
forked.start_server([], [])
print(forked.forkserver._forkserver._forkserver_pid, flush=True)
try:
    Maker(1).call("endless", [])
except UserError as error:
    assert "killed by signal 9" in str(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("which", ["program", "server"])
def test_runs_end_with_what_is_killed(which: str, tmp_path: Path) -> None:
    """The program, or the process that its runs are forked from."""
    pid = tmp_path / "pid"
    (tmp_path / "endless.py").write_text(ENDLESS.format(pid=pid))
    with subprocess.Popen(
        [sys.executable, "-c", CALL],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])},
    ) as program:
        assert program.stdout is not None
        server = int(program.stdout.readline())
        wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
        os.kill({"program": program.pid, "server": server}[which], signal.SIGKILL)
        assert program.wait() == {"program": -signal.SIGKILL, "server": EXIT_ENVIRONMENT}[which]
    for ended in (int(pid.read_text()), server):
        stat = Path(f"/proc/{ended}/stat")
        wait_for(lambda stat=stat: not stat.exists() or ") Z " in stat.read_text())


def test_a_reader_that_goes_away() -> None:
    """It is no success: what was to be compared may not have been."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "bench.results", "--list"]
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (EXIT_INTERRUPTED, "")


def test_verdicts_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = EverySeed("It closes half.", "short", "gap_closed", 0.5)
    table = Table("games", "Games", (Row("short", "short"),), (GAP,), (claim,))
    picked = [(Experiment("games", (SHORT,), (table,), seeds=1), [table])]
    for folder, closed in (("a", 0.6), ("b", 0.7), ("c", 0.1)):
        Store.open(tmp_path / folder, "games").add(record(SHORT, 0, gap_closed=closed))
    assert results.compare(tmp_path / "a", tmp_path / "b", picked) == 0
    assert results.compare(tmp_path / "a", tmp_path / "c", picked) == 1
    assert "contradicted" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        results.compare(tmp_path / "a", tmp_path / "none", picked)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of the 1 verdicts"):
        results.compare(tmp_path / "a", tmp_path / "empty", picked)


@pytest.mark.parametrize("what", ["--list", "--tables"])
def test_a_folder_that_is_not_there(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page would lose its tables."""
    assert results.main([what, "--out", str(tmp_path / "recrods")]) == EXIT_USAGE
    assert "there is no such folder" in capsys.readouterr().err


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        results.main(["nonsense"])
    assert "no table 'nonsense'; there are" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_each_run_has_a_valid_configuration(experiment: Experiment) -> None:
    for run in experiment.runs:
        first = [command[1:] for command in run.first if command[0] == "run"]
        for arguments in (run.arguments, *first):
            flags = [filled(part, {"model": "m", "scratch": "s"}) for part in arguments]
            if "--trainer.model.lora.init" in flags:  # there is no such adapter yet
                where = flags.index("--trainer.model.lora.init")
                del flags[where : where + 2]
            load_config(flags)
        assert set(run.measures) <= set(MEASURES)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_figures_of_tables_are_measured(experiment: Experiment) -> None:
    """A name that is misspelled would show as a dash."""
    records = experiment.records(Store.open(results.RECORDS, experiment.name))
    for table in experiment.tables:
        made = [(r, row.prefix) for row in table.rows for r in records[row.run]]
        for column in (*table.columns, table.plot):
            measured = any(r.number(prefix + column.figure) is not None for r, prefix in made)
            assert measured or not made, (table.name, column.figure)
        for claim in table.claims:
            measured = any(r.number(claim.figure) is not None for r, _ in made)
            assert measured or not made, (table.name, claim.figure)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_claims_are_about_rows_of_their_table(experiment: Experiment) -> None:
    for table in experiment.tables:
        shown = set(table.runs)
        for claim in table.claims:
            about = {getattr(claim, name) for name in ("run", "other") if hasattr(claim, name)}
            assert about <= shown, claim.text


def test_the_page_is_what_the_records_say() -> None:
    """No figure of a table was written by hand."""
    text = document.PAGE.read_text()
    for experiment in EXPERIMENTS:
        store = Store.open(results.RECORDS, experiment.name)
        for table in experiment.tables:
            assert document.placed(text, table.name, markdown(experiment, table, store)) == text
            plot = document.PAGE.parent / "results" / f"{table.name}.svg"
            assert document.plot(experiment, table, store) == plot.read_text()
    names = [table.name for experiment in EXPERIMENTS for table in experiment.tables]
    assert sorted(re.findall("<!-- table: (.*) -->", text)) == sorted(names)
    assert {path.stem for path in plot.parent.glob("*.svg")} == set(names)
