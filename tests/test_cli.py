"""Commands, exit codes and what is printed where."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from minidistill import __version__, cli
from minidistill.config import load_config
from minidistill.errors import UserError, UserErrors

CONFIG = """\
[orchestrator.teacher_model]
context = "Think."
[[orchestrator.env]]
id = "sokoban-env"
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a.toml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for the training loop, which imports torch."""
    module = types.ModuleType("minidistill.run.loop")
    monkeypatch.setitem(sys.modules, "minidistill.run.loop", module)
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


def test_configuration_imports_no_torch() -> None:
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
    ("run", ["FILES…", "--key VALUE", "--resume"]),
    ("plan", ["FILES…", "--key VALUE", "--gpus N", "--gpu-memory GiB", "--json"]),
    ("config", ["FILES…", "--key VALUE", "--json"]),
    ("report", ["DIR"]),
    ("bench", ["NAME", "schedule"]),
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


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_names_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: minidistill COMMAND")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("    ")]
    assert listed == [command for command, _ in HELP]


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["rn", "x"], "minidistill run"),
        (["rl", "@", "x"], "minidistill run"),
        (["confg"], "minidistill config"),
        (["zzzz"], "minidistill --help"),
        (["run"], "configs/sokoban.toml"),
        (["report"], "report runs/"),
        (["report", "a", "b"], "report runs/"),
        (["report", "--x"], "report runs/"),
        (["report", "/nowhere"], "directory of a run"),
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


def test_run_hands_over_the_configuration(config: str, loop: types.ModuleType) -> None:
    seen = []
    loop.run = lambda loaded, *, resume: seen.append((loaded, resume)) or 4  # type: ignore[attr-defined]
    assert cli.main(["run", config, "--resume", "--seed", "5"]) == 4
    ((loaded, resume),) = seen
    assert resume is True
    assert loaded.config.seed == 5


def test_files_and_overrides_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options of the command may stand anywhere between them."""
    line = "@ a.toml --seed -3 --inference_gpu_ids 0 1 --js x b.toml --no-wandb --model.name=--x"
    rest = ["--orchestrator.teacher_model.context", "two words", "@d.toml", "", "-", "-x"]
    arguments = line.split() + rest
    seen = []

    def load(argv: list[str]) -> None:
        seen.append(argv)
        raise UserError("stop")

    monkeypatch.setattr("minidistill.config.load_config", load)
    for position in range(len(arguments) + 1):
        argv = [*arguments[:position], "--json", "--traceback", *arguments[position:]]
        assert cli.main(["config", *argv]) == 2
    assert seen == [arguments] * (len(arguments) + 1)
    assert cli.main(["run", "--json", "--resume", "--", "--resume"]) == 2
    assert seen[-1] == ["--json", "--", "--resume"]  # and load_config refuses these
    capsys.readouterr()


def test_traceback_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--traceback", "run", "x"], ["run", "--traceback", "x"], ["rn", "--traceback"]):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback")
        assert err.count("\nerror: ") == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("no GPU", fix="add one", exit_code=3), 3, "error: no GPU\n  fix: add one\n"),
        (ValueError("bad\nmore"), 1, "error: ValueError: bad\n  fix: --traceback"),
        (ModuleNotFoundError("x", name="vllm"), 3, "pip install vllm"),
        (MemoryError(), 3, "error: MemoryError"),
    ],
)
def test_errors_of_a_run(
    config: str,
    loop: types.ModuleType,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def run(*_: object, **__: object) -> int:
        raise error

    loop.run = run  # type: ignore[attr-defined]
    assert cli.main(["run", config]) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert cli.main(["run", config, "--traceback"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_config_errors_print_what_where_fix(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(config).write_text("max_step = 5\n" + CONFIG)
    assert cli.main(["config", config]) == 2
    assert capsys.readouterr().err == (
        "error: there is no max_step = 5\n"
        f"  where: {config}:1, max_step\n"
        "  fix: did you mean `max_steps`?\n"
    )


def test_config_prints_value_and_origin(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", config, "--trainer.optim.lr", "2e-3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["trainer.optim.lr", "0.002", "--trainer.optim.lr"] in rows
    assert ["seed", "0", "default"] in rows
    assert ["orchestrator.env.0.id", '"sokoban-env"', f"{config}:4"] in rows


def test_config_as_json(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", config, "--json", "--orchestrator.env.0.args.x", "inf"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["config"]["orchestrator"]["env"][0]["args"] == {"x": "Infinity"}
    assert printed["provenance"]["orchestrator.teacher_model.context"] == f"{config}:2"


def test_config_on_a_terminal_is_a_table_that_takes_no_markup(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["config", config, "--model.name", "[red]x"]) == 0
    out = capsys.readouterr().out
    assert '"[red]x"' in out
    assert "setting" in out


@pytest.mark.parametrize(
    "argv", [["\x1b[31mx"], ["run", "\x1b]0;x\x07"], ["run", "--model.\u202ex\x1b[2J", "1"]]
)
def test_control_characters_are_not_printed(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert not set(capsys.readouterr().err) & set("\x1b\x07\u202e")


def test_report_prints_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = types.ModuleType("minidistill.reporting.html")
    module.write_report = lambda run_dir: run_dir / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minidistill.reporting.html", module)
    (tmp_path / "a\x1bb").mkdir()
    assert cli.main(["report", str(tmp_path / "a\x1bb")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/ab/report.html\n"


def test_collected_errors_show_the_first_few() -> None:
    error = UserErrors([UserError(f"problem {i}") for i in range(6)], limit=2)
    assert str(error) == "problem 0\nproblem 1\n(and 4 more)"
    assert error.exit_code == 2


FOREIGN = """
trainer.max_steps orchestrator.max_steps orchestrator.seq_len trainer.model.seq_len
trainer.model.name orchestrator.model.name inference.model.name trainer.loss.type
trainer.loss.ratio_type trainer.loss.kl_tau trainer.weight_broadcast weight_broadcast.type
orchestrator.client.base_url orchestrator.async_level max_async_level orchestrator.max_async_level
orchestrator.buffer.hard_fraction orchestrator.buffer.online_difficulty_filtering
orchestrator.sampling.top_p orchestrator.sampling.top_k orchestrator.sampling.repetition_penalty
orchestrator.teacher_model.model.name teacher_rollout_model.name orchestrator.max_concurrent
orchestrator.teacher_rollout_model orchestrator.oversampling_factor orchestrator.token_batch_size
trainer.model.experimental.x trainer.model.fsdp_cpu_offload trainer.model.compile
trainer.dist_timeout_seconds trainer.memory_profiler_path slurm.job_name deployment.type
trainer.model.lora.use_dora trainer.model.lora.modules_to_save trainer.model.lora.bias
ckpt.keep_last ckpt.resume_step
"""


@pytest.mark.parametrize("key", FOREIGN.split())
def test_keys_of_the_public_trainer_are_refused_with_a_fix(tmp_path: Path, key: str) -> None:
    head, _, leaf = key.rpartition(".")
    path = tmp_path / "b.toml"
    path.write_text(f"[{head}]\n{leaf} = 1\n" if head else f"{leaf} = 1\n")
    base = tmp_path / "a.toml"
    base.write_text(CONFIG)
    for argv in ([str(base), str(path)], [str(base), f"--{key}", "1"]):
        with pytest.raises(UserError) as caught:
            load_config(argv)
        assert "is not a setting of minidistill" in caught.value.what
        assert caught.value.fix.startswith(("use ", "drop it", "run again"))
        assert caught.value.where.startswith((f"{path}:", f"--{key}"))


NEAREST = [
    ("loss.adv_tau", "trainer.loss.adv_tau"),
    ("lr", "trainer.optim.lr"),
    ("batch_size", "orchestrator.batch_size"),
    ("trainer.lora.rank", "trainer.model.lora.rank"),
    ("trainer.lr", "trainer.optim.lr"),
    ("max_step", "max_steps"),
    ("orchestrator.teacher_model.contxt", "orchestrator.teacher_model.context"),
    ("orchestrator.teacher.context", "orchestrator.teacher_model.context"),
    ("orchestrator.env.1.nam", "orchestrator.env.1.name"),
    ("orchestrater.batch_size", "orchestrator.batch_size"),
]


@pytest.mark.parametrize(("wrong", "right"), NEAREST)
def test_an_unknown_key_names_the_nearest(
    config: str, capsys: pytest.CaptureFixture[str], wrong: str, right: str
) -> None:
    assert cli.main(["config", config, f"--{wrong}", "1"]) == 2
    assert f"fix: did you mean `{right}`?" in capsys.readouterr().err


def test_a_key_like_none_lists_what_the_table_takes(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["config", config, "--orchestrator.sampling.zzz", "1"]) == 2
    assert "[orchestrator.sampling] takes: temperature, max_tokens" in capsys.readouterr().err
