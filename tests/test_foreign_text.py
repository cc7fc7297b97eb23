"""What models, environments, files and servers say is data: bounded, escaped, and never obeyed."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path

import pytest
from support import hostile_env
from support.configs import MINIMAL
from support.paths import SOKOBAN
from support.runs import records

from minidistill import cli, logs
from minidistill.config import load_config
from minidistill.envs.outcomes import ScoringError, to_reward
from minidistill.errors import EXIT_FAILED, EXIT_OK, LONGEST, UserError, UserErrors
from minidistill.reporting import formatting
from minidistill.reporting.formatting import clean
from minidistill.system.files import read_text, write_atomic

logger = logging.getLogger("minidistill.some.module")
RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")
SECOND = 1.0  # of this process's time
RUN = """\
max_steps = 1
seq_len = 256
[model]
name = "tiny-sokoban"
[orchestrator]
batch_size = 4
rollouts_per_example = 2
max_env_error_frac = 0.5
[orchestrator.sampling]
max_tokens = 4
[orchestrator.eval]
num_examples = 2
[orchestrator.teacher_model]
context = "Be \\u001b[31mbold\\u001b[0m. <script>alert(2)</script>\\n"
[[orchestrator.env]]
id = "support.hostile_env:load"
score_timeout = "off"
"""


# -- a run on hostile texts --------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run whose environment is hostile, and its output."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("hostile")
    (folder / "run.toml").write_text(RUN)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main(["run", str(folder / "run.toml"), "--output_dir", str(folder / "run")])
    assert code == EXIT_OK, output.getvalue()[-2000:]
    return folder / "run", output.getvalue()


def test_the_terminal_shows_no_control_characters_and_no_forged_line(
    hostile: tuple[Path, str],
) -> None:
    _, output = hostile
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", output)
    assert "rollouts dropped" in output
    assert not any(line.startswith(("step 9/9", "2030")) for line in output.splitlines())
    assert max(map(len, output.splitlines())) < 2 * formatting.LONGEST


def test_the_log_has_one_record_for_each_message(hostile: tuple[Path, str]) -> None:
    path, _ = hostile
    log = (path / "logs" / "run.log").read_text()
    assert all(RECORD.match(line) or line.startswith("  ") for line in log.split("\n")[:-1])
    assert not any(line.startswith("2030") for line in log.splitlines())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", log)
    assert len(log) < 4 * logs.LONGEST_RECORD


def test_metrics_of_an_environment_overwrite_none_of_the_runs(hostile: tuple[Path, str]) -> None:
    path, _ = hostile
    for record in (r for r in records(path) if "teacher_kl" in r):
        assert record["reward/loss/total"] == 7.0 != record["loss/total"]
        assert record["reward/mean"] == 0.5


def test_the_report_escapes_what_it_shows(hostile: tuple[Path, str]) -> None:
    path, _ = hostile
    html = (path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", html)


def test_rollouts_hold_lone_surrogates(hostile: tuple[Path, str]) -> None:
    path, _ = hostile
    rows = [
        json.loads(line)
        for line in (path / "rollouts" / "step_000001.jsonl").read_text("utf-8").splitlines()
    ]
    ids = {row["task_id"] for row in rows}
    tasks = {task.id for task in hostile_env.Hostile().train}
    assert ids <= tasks
    assert all("\ud800" in id for id in ids)


# -- the parts ---------------------------------------------------------------------------------


def test_a_record_of_the_log_is_bounded_and_cannot_be_forged(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    with logs.to_file(path):
        logger.warning("a\nb\r\n2030-01-01 00:00:00  forged\x1b[2J\u202e\ud800\x85c")
        logger.debug("x" * 5_000_000)
        try:
            raise ValueError("bad\n2030-01-01 00:00:00  forged")
        except ValueError as error:
            logger.debug("it failed", exc_info=error)
    lines = path.read_text().split("\n")
    assert lines[1:4] == ["  b", "  2030-01-01 00:00:00  forged\\x1b[2J\\u202e\\ud800", "  c"]
    assert len(lines[4]) < logs.LONGEST_RECORD + 100
    assert sum(bool(RECORD.match(line)) for line in lines) == 3


def test_a_line_in_the_terminal_is_bounded() -> None:
    assert len(clean("x" * 5_000_000)) < formatting.LONGEST + 100
    assert clean("a\n\x1b]0;t\x07b\u2028c") == "a⏎]0;tb⏎c"


def test_an_error_is_bounded_and_says_how_much_is_left_out() -> None:
    text = str(UserError("a" * 5_000_000, "b" * 5_000_000, "c" * 5_000_000))
    assert len(text) < 3 * LONGEST + 200
    assert f"… ({5_000_000 - LONGEST} more characters)" in text


def test_no_line_of_an_error_is_forged() -> None:
    forged = "x\nerror: y\n  fix: rm\r\nerror: z"
    lines = str(UserError(forged, forged, forged)).splitlines()
    assert [line for line in lines if not line.startswith("    ")] == [
        "x", "  where: x", "  fix: x",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--traceback"]])
def test_the_error_of_somebodys_code_is_bounded_and_escaped(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("\x1b[2J\udfff" + "x" * 5_000_000)

    monkeypatch.setattr("minidistill.config.load_config", fail)
    assert cli.main(["config", SOKOBAN, *flags]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert ("Traceback" in error) == bool(flags)
    assert "ValueError: [2Jxxx" in error
    assert "\x1b" not in error
    assert len(error) < 100_000


def test_a_lone_surrogate_in_json_reads_back(tmp_path: Path) -> None:
    value = {"text": "\ud83d \ud800 \U0001d54f"}
    write_atomic(tmp_path / "a.json", json.dumps(value, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mean", "the name of one that the run records itself"),
        ("", "1 to 100 printable characters"),
        ("x" * 101, "1 to 100 printable characters"),
        ("x" * 1_000_000, "1 to 100 printable characters"),
        ("a\nb", "1 to 100 printable characters"),
        ("a\x1b[2Jb", "1 to 100 printable characters"),
        ("a\u202eb", "1 to 100 printable characters"),
        ("\ud800", "1 to 100 printable characters"),
        (7, "has no text as its name"),
        (None, "has no text as its name"),
    ],
)
def test_metrics_with_other_names_are_refused(name: object, reason: str) -> None:
    with pytest.raises(ScoringError, match=reason) as caught:
        to_reward({"reward": 1.0, name: 2.0})
    assert len(str(caught.value)) < 300


def test_a_reward_with_very_many_metrics_is_refused() -> None:
    with pytest.raises(ScoringError, match="it returned 5000 metrics"):
        to_reward({"reward": 1.0, **{f"m{i}": 0.0 for i in range(5000)}})


# -- large and deep configurations ---------------------------------------------------------------

KEYS = "".join(f"unknown_key_{i} = {i}\n" for i in range(8000))
LARGE = {
    "unknown keys": (KEYS + MINIMAL, "and 7996 more"),
    "unknown keys in a table": (f"{MINIMAL}\n[trainer.optim]\n{KEYS}", "and 7996 more"),
    "unknown tables": (MINIMAL + "".join(f"[t{i}]\na = 1\n" for i in range(8000)), "7996 more"),
    "environments": (MINIMAL + '[[orchestrator.env]]\nid = "jsonl"\n' * 3000, "3000 entries|3001"),
    "10 MB": (MINIMAL + "#" + "x" * 10_000_000, "more than 524288 bytes"),
    "250 kB of keys": ("".join(f"key_{i} = 1\n" for i in range(16_000)) + MINIMAL, "15996 more"),
    "a URL of 400 kB": (f'{MINIMAL}\nz = "http://{"?" * 400_000}"\n', r"env\.0\.z = "),
    "a key of 500 kB": ("x" * 500_000 + " = 1\n" + MINIMAL, "more characters"),
    "deep lists": ("z = " + "[" * 100_000 + "\n" + MINIMAL, "not valid TOML"),
    "lists that are closed": (f"z = {'[' * 90}{']' * 90}\n{MINIMAL}", "nested more than 64"),
    "a deep key": (".".join("a" * 900) + " = 1\n" + MINIMAL, "nested more than 64"),
    "a deeper key": (".".join("a" * 3000) + " = 1\n" + MINIMAL, "not valid TOML"),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_configurations_end_in_an_error_soon(name: str, tmp_path: Path) -> None:
    text, reason = LARGE[name]
    path = tmp_path / "large.toml"
    path.write_text(text)
    load_config_seconds([str(path)], reason)


FLAGS = {
    "unknown flags": ([f"--k{i}=1" for i in range(8000)], "there is no k0"),
    "a long flag": (["--" + "a" * 120_000, "1"], "more characters"),
    "a flag of many parts": (["--" + "a." * 60_000, "1"], "60001 parts"),
    "a deep value": (["--orchestrator.env.0.args.x", '{"a":' * 80 + "1" + "}" * 80], "64 deep"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_large_flags_end_in_an_error_soon(name: str, minimal_config: str, tmp_path: Path) -> None:
    flags, reason = FLAGS[name]
    load_config_seconds([minimal_config, *flags], reason)


def load_config_seconds(argv: list[str], reason: str) -> None:
    """Loading is refused for a reason, in less than a second."""
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        load_config(argv)
    assert time.process_time() - began < SECOND
    error = caught.value
    assert re.search(reason, str(error)), str(error)[:500]
    assert len(str(error)) < 20_000
    assert isinstance(error, UserErrors) or error.fix


def test_a_device_without_an_end_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        read_text(Path("/dev/zero"))
    assert read_text(Path("/dev/null")) == ""
