"""`minidistill bake` and `init` as users run them, on the model that ships with the package."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.baking.init import init
from minidistill.config import load_config
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_FAILED, EXIT_OK, EXIT_USAGE

CONTEXT = "You are a world-class puzzle solver."
FEW = ("--orchestrator.env.0.args.count", "12", "--orchestrator.env.0.args.at_least", "8")
SMALL = (*FEW, "--orchestrator.batch_size", "4", "--orchestrator.eval.num_examples", "8")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def bake(*flags: str) -> int:
    command = ["bake", "--model", "tiny-sokoban", "--context", CONTEXT, "--steps", "2"]
    return cli.main([*command, *SMALL, *flags])


def kl_by_step(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["teacher_kl"] for r in records if "teacher_kl" in r}


def test_one_line_makes_a_run_that_can_be_edited_and_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bake() == EXIT_OK
    run = Path("runs/you-are-a-world")
    out = capsys.readouterr().out
    commands = re.findall("^  minidistill (.*)$", out, re.MULTILINE)
    assert commands == [
        f"chat {run} --side-by-side",
        f"report {run}",
        f"export {run} --to exported/you-are-a-world",
        f"run {run}/config.toml --output_dir {run}-2",
    ]
    board = json.loads((run / "scoreboard.json").read_text())
    assert board["heldout_kl_prompts"] == len(board["completions"]) == 8
    assert {"prompt", "before", "teacher", "after"} <= board["completions"][0].keys()
    assert board["completions"][0]["prompt"] in out, "side by side in the terminal"

    # the file that it wrote gives the same run again
    assert (run / "config.toml").read_text().startswith("# Written by `minidistill bake`")
    assert cli.main(commands[-1].split()) == EXIT_OK
    assert len(kl_by_step(run)) == 2
    assert kl_by_step(run) == kl_by_step(Path(f"{run}-2"))

    # the same line starts another run, and with --resume goes on with the last one
    assert bake("--out", str(run)) == EXIT_USAGE
    assert "choose another --out, or continue with --resume" in capsys.readouterr().err
    assert bake("--resume") == EXIT_OK
    assert f"{run}-2 is already finished: 2 steps" in capsys.readouterr().out


def test_a_model_that_repeats_itself_writes_fewer_prompts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bake("--steps", "1", "--orchestrator.env.0.args.count", "60") == EXIT_OK
    assert "(60 are wanted, but it repeats itself)" in capsys.readouterr().out
    [file] = Path("cache/minidistill/self-prompts").iterdir()
    assert 8 <= len(file.read_text().splitlines()) < 60
    few = ["--orchestrator.env.0.args.count", "60", "--orchestrator.env.0.args.at_least", "60"]
    assert bake(*few) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "60 are wanted" in error
    assert "where: --prompts (orchestrator.env.0)" in error


def test_files_are_checked_before_torch_is_loaded() -> None:
    code = "import sys; from minidistill.cli import main\n"
    code += "main(['bake', '--model', 'm', '--context', 'no.txt']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "there is no file no.txt" in done.stderr
    assert done.stdout == "False\n"


def test_errors_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    def error(*args: str) -> str:
        assert cli.main(["bake", *args]) == EXIT_USAGE
        return capsys.readouterr().err

    assert "bake needs --model and --context" in error()
    assert "--steps 'x' cannot be used" in error("--model", "m", "--context", "c", "--steps", "x")
    assert "there is no file no.txt" in error("--model", "m", "--context", "no.txt")
    given = ("--model", "m", "--context", "c")
    assert "there is no file no.csv" in error(*given, "--prompts", "no.csv")
    for flag, meant in (
        ("--prompt", "--prompts"),
        ("--step=3", "--steps"),
        ("--contexts", "--context"),
    ):
        assert f"did you mean {meant}?" in error(*given, flag, "x")


# -- init --------------------------------------------------------------------------------------


def test_init_by_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--context", CONTEXT, "--yes"]) == EXIT_OK
    assert "minidistill run minidistill.toml" in capsys.readouterr().out
    assert cli.main(["config", "minidistill.toml"]) == EXIT_OK
    before = Path("minidistill.toml").read_bytes()
    other = ["init", "--context", "Be brief.", "--model", "tiny-sokoban"]
    assert cli.main(other) == EXIT_USAGE
    assert Path("minidistill.toml").read_bytes() == before
    assert cli.main([*other, "--force"]) == EXIT_OK
    assert load_config(["minidistill.toml"]).config.model.name == "tiny-sokoban"


def test_init_with_an_environment(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--context", CONTEXT, "--model", "tiny-sokoban"]
    assert cli.main(["init", "a.toml", *flags, "--env", "sokoban-env"]) == EXIT_OK
    config = load_config(["a.toml"]).config
    assert [env.id for env in config.orchestrator.env] == ["sokoban-env"]
    assert config.orchestrator.teacher_model.eval_baseline
    assert config.trainer.loss.adv_tau == 0.5
    assert cli.main(["init", "b.toml", *flags, "--env", "sokobn"]) == EXIT_USAGE
    assert "unknown environment 'sokobn'" in capsys.readouterr().err
    Path("q.txt").write_text("Who?\n")
    both = ["--env", "sokoban-env", "--prompts", "q.txt"]
    assert cli.main(["init", "b.toml", *flags, *both]) == EXIT_USAGE
    assert not Path("b.toml").exists()


def test_init_without_a_terminal_never_waits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def readline() -> str:
        raise AssertionError("it waits for an answer")

    monkeypatch.setattr(sys.stdin, "readline", readline, raising=False)
    assert cli.main(["init", "a.toml"]) == EXIT_USAGE
    assert "init needs --context" in capsys.readouterr().err
    assert cli.main(["init", "no/such/a.toml", "--context", CONTEXT]) == EXIT_OK
    assert cli.main(["init", ".", "--context", CONTEXT]) == EXIT_USAGE


def test_init_by_questions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = "tiny-lake\nno.txt\nBe brief.\nq.pdf\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    assert init("a.toml", None, None, None, None, asks=True, force=False) == EXIT_OK
    out = capsys.readouterr().out
    assert "there is no file no.txt" in out
    assert "q.pdf has no ending" in out
    config = load_config(["a.toml"]).config
    assert config.model.name == "tiny-lake"
    assert config.orchestrator.teacher_model.context == "\n\nBe brief."

    monkeypatch.setattr(sys, "stdin", io.StringIO("tiny-lake\n"))
    assert cli.main(["init", "b.toml"]) == EXIT_USAGE
    assert not Path("b.toml").exists()


def test_a_pipe_that_breaks_in_a_run_is_no_reader_that_went_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(*args: object, **more: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("minidistill.baking.command.run", breaks)
    assert bake() == EXIT_FAILED
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_ends_well_says_so_without_a_reader(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidistill.baking.command.run", lambda *args, **more: EXIT_OK)
    where = "/dev/full" if full else "/dev/null"
    with contextlib.suppress(OSError), open(where, "w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        code = bake("--out", "runs/h\u00e4user")
    assert code == EXIT_OK


def test_a_home_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bake("--prompts", "~nobody-here/questions.txt") == EXIT_USAGE
    assert "there is no such home directory" in capsys.readouterr().err


def test_what_init_writes_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x1b[31m\x7f.toml"  # no comment of TOML may have these
    assert cli.main(["init", odd, "--context", CONTEXT]) == EXIT_OK
    assert load_config([odd]).config.orchestrator.teacher_model.context == f"\n\n{CONTEXT}"
    Path("long.txt").write_text("Think. " * 100_000)
    assert cli.main(["init", "long.toml", "--context", "long.txt"]) == EXIT_USAGE
    assert "which cannot be read" in capsys.readouterr().err
    assert not Path("long.toml").exists()
    Path("file").touch()
    assert cli.main(["init", "file/a.toml", "--context", CONTEXT]) == EXIT_ENVIRONMENT
    assert "--resume" not in capsys.readouterr().err
