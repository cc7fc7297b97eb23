"""Commands, their exit codes and their output."""

import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from minidistill import __version__, cli
from minidistill.errors import EXIT_OK, UserError, UserErrors
from minidistill.system.foreign import Interrupted


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A replacement for the module of the training loop, which imports torch."""
    module = types.ModuleType("minidistill.driver.loop")
    monkeypatch.setitem(sys.modules, "minidistill.driver.loop", module)
    return module


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["run", "--help"], ["plan", "--help"], []]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    heavy = "torch pydantic rich transformers vllm numpy"
    code = f"import sys\nfrom minidistill.cli import main\nmain({argv})\n"
    code += f"print([m for m in '{heavy}'.split() if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.endswith("[]\n")


def test_the_configuration_imports_no_torch() -> None:
    code = (
        "import sys, minidistill.config\nprint([m for m in ('torch', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_module_runs_as_a_command() -> None:
    argv = [sys.executable, "-m", "minidistill", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == f"minidistill {__version__}\n"


HELP = [
    ("run", ["FILES…", "--key VALUE", "--resume", "--quiet", "--json"]),
    ("bake", ["--model", "--context", "--prompts", "--steps", "--out", "--resume", "--key VALUE"]),
    ("init", ["FILE", "--model", "--context", "--prompts", "--env", "--yes", "--force"]),
    ("plan", ["FILES…", "--key VALUE", "--gpus N", "--gpu-memory GiB", "--json"]),
    ("config", ["FILES…", "--key VALUE", "--json"]),
    ("env", ["check", "prompts"]),
    ("report", ["RUN", "--out FILE"]),
    ("export", ["RUN", "--to", "--merge", "--base", "--gguf", "--push", "--no-vllm"]),
    ("bench", ["NAME", "schedule"]),
    ("chat", ["--ask", "--side-by-side", "--with-context", "--server"]),
    ("eval", ["--env", "--with-context"]),
    ("rollouts", ["RUN", "--step", "--worst", "--task", "--json"]),
    ("doctor", ["--quick", "--json"]),
    ("completion", ["SHELL", "bash"]),
]


@pytest.mark.parametrize(("command", "words"), HELP)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(
    command: str, words: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"usage: minidistill {command} ")
    _, _, options = out.partition("\n\n")
    assert not [word for word in [*words, "--traceback"] if word not in options]
    assert "example" in out
    assert "gpu_memory" not in out  # also accepted, but not shown


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("command", [name for name, _ in HELP])
def test_help_fits_the_terminal(
    command: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main([command, "--help"]) == EXIT_OK
    text = capsys.readouterr().out
    kept = "  minidistill "  # examples are to be copied
    assert [line for line in text.splitlines() if len(line) > width and kept not in line] == []
    assert "usage: minidistill " + command in text
    assert "\0" not in text


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: minidistill COMMAND")
    listed = re.findall(r"^ {4}(\S+)", out, re.MULTILINE)  # help may be on a line of its own
    assert listed == [command for command, _ in HELP]


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["rn", "x"], "minidistill run"),
        (["rl", "@", "x"], "minidistill run"),
        (["confg"], "minidistill config"),
        (["zzzz"], "minidistill --help"),
        (["sokoban"], "minidistill run sokoban"),
        (["my.toml"], "minidistill run my.toml"),
        (["run"], "minidistill run sokoban"),
        (["report"], "report runs/"),
        (["report", "a", "b"], "directory of a run"),
        (["report", "--x"], "report runs/"),
        (["report", "/nowhere"], "directory of a run"),
        (["export"], "export runs/"),
        (["export", "a", "--tox", "b"], "export runs/"),
        (["bench"], "minidistill bench kernels"),
        (["bench", "x"], "minidistill bench kernels"),
        (["--x"], "minidistill --help"),
        (["--x", "run"], "minidistill --help"),
        (["plan", "x", "--gpus"], "minidistill plan --help"),
        (["config", "x", "--json=1"], "minidistill config --help"),
    ],
)
def test_usage_errors(argv: list[str], fix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "usage:" not in err
    assert fix in err.partition("\n  fix: ")[2]


@pytest.mark.parametrize("argv", [[], ["--traceback"]])
def test_no_command_prints_help_and_fails(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: minidistill COMMAND")


def test_run_passes_the_configuration_to_the_loop(
    minimal_config: str, loop: types.ModuleType
) -> None:
    calls = []
    loop.run = lambda loaded, *, resume, display: calls.append((loaded, resume)) or 4  # type: ignore[attr-defined]
    assert cli.main(["run", minimal_config, "--resume", "--seed", "5"]) == 4
    ((loaded, resume),) = calls
    assert resume is True
    assert loaded.config.seed == 5


def test_files_and_overrides_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of the command may be anywhere between them."""
    line = "@ a.toml --seed -3 --inference_gpu_ids 0 1 --js x b.toml --no-wandb --model.name=--x"
    rest = ["--orchestrator.teacher_model.context", "two words", "@d.toml", "", "-", "-x"]
    arguments = line.split() + rest
    loads = []

    def load(argv: list[str], *, resume: bool) -> None:
        loads.append(argv)
        raise UserError("stop")

    monkeypatch.setattr("minidistill.config.load_config", load)
    for position in range(len(arguments) + 1):
        argv = [*arguments[:position], "--json", "--traceback", *arguments[position:]]
        assert cli.main(["config", *argv]) == 2
    assert loads == [arguments] * (len(arguments) + 1)
    assert cli.main(["run", "--js", "--resume", "--", "--resume"]) == 2
    assert loads[-1] == ["--js", "--", "--resume"]  # and load_config refuses these
    capsys.readouterr()


def test_the_traceback_option_may_be_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--traceback", "run", "x"], ["run", "--traceback", "x"], ["rn", "--traceback"]):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.count("\nerror: ") == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Interrupted(), 130, "interrupted"),
        (KeyboardInterrupt(), 1, "error: KeyboardInterrupt: \n  fix: --traceback"),
        (GeneratorExit(), 1, "error: GeneratorExit: \n  fix: --traceback"),
        (UserError("no GPU", fix="add one", exit_code=3), 3, "error: no GPU\n  fix: add one\n"),
        (ValueError("bad\nmore"), 1, "error: ValueError: bad\n  fix: --traceback"),
        (ModuleNotFoundError("x", name="vllm"), 3, "pip install vllm"),
        (MemoryError(), 3, "error: out of memory: MemoryError\n  fix: lower trainer."),
    ],
)
def test_errors_of_a_run(
    minimal_config: str,
    loop: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def run(*_: object, **__: object) -> int:
        raise error

    loop.run = run  # type: ignore[attr-defined]
    assert cli.main(["run", minimal_config]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert cli.main(["run", minimal_config, "--traceback"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


@pytest.mark.parametrize(
    "argv", [["\x1b[31mx"], ["run", "\x1b]0;x\x07"], ["run", "--model.\u202ex\x1b[2J", "1"]]
)
def test_control_characters_are_not_printed(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert not set(capsys.readouterr().err) & set("\x1b\x07\u202e")


def test_report_prints_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("minidistill.reporting.html")
    module.write_report = lambda run_dir: run_dir / "report.html"  # type: ignore[attr-defined]
    module.write_comparison = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minidistill.reporting.html", module)
    (tmp_path / "a\x1bb").mkdir()
    assert cli.main(["report", str(tmp_path / "a\x1bb")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/ab/report.html\n"


def test_collected_errors_are_limited() -> None:
    error = UserErrors([UserError(f"problem {i}") for i in range(6)], limit=2)
    assert str(error) == "problem 0\nproblem 1\n(and 4 more)"
    assert error.exit_code == 2


def test_ctrl_c_at_the_end_of_the_interpreter_shows_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "main", lambda: EXIT_OK)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            cli.entry()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
