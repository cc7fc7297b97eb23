"""Environments by built-in name, entry point and path, and errors for those that do not load."""

import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from minidistill.envs import load_environment, registry
from minidistill.envs.sokoban import SokobanEnv
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError

MODULE = """
class Echo:
    def __init__(self, word):
        self.word, self.train, self.eval = word, [], []

def make(word, times=1):
    return Echo(word * times)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module with a third-party environment."""
    (tmp_path / "echo_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "echo_env", raising=False)
    return "echo_env"


def install(monkeypatch: pytest.MonkeyPatch, **paths: str) -> None:
    """Install entry points with these paths."""
    points = EntryPoints(EntryPoint(n, v, registry.ENTRY_POINTS) for n, v in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))


def refusal(id: str, args: dict[str, Any] | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        load_environment(id, args, "a.toml:3 orchestrator.env.0")
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.fix
    return caught.value


def word(id: str, args: dict[str, Any]) -> str:
    env: Any = load_environment(id, args)
    return env.word


def test_a_built_in_environment() -> None:
    env = load_environment("sokoban-env", {"num_train_examples": 2, "num_eval_examples": 1})
    assert isinstance(env, SokobanEnv)
    assert (len(env.train), len(env.eval)) == (2, 1)
    assert len(load_environment("sokoban-env").train) == 1000


def test_a_module_and_a_function(echo: str) -> None:
    assert word(f"{echo}:make", {"word": "a", "times": 3}) == "aaa"
    assert word(f"{echo}:Echo", {"word": "b"}) == "b"


def test_a_module_of_the_current_directory(tmp_path: Path) -> None:
    """As for the installed script, where the current directory is not on the import path."""
    (tmp_path / "mine.py").write_text(MODULE)
    code = (
        "import sys; sys.path.remove(''); from minidistill.envs import load_environment as load; "
        "print(load('mine:make', {'word': 'a'}).word)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "a", done.stderr


def test_an_entry_point(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, parrot=f"{echo}:make")
    assert word("parrot", {"word": "a"}) == "a"


def test_an_entry_point_does_not_replace_a_built_in(
    echo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, **{"sokoban-env": f"{echo}:make"})
    assert isinstance(load_environment("sokoban-env"), SokobanEnv)


def test_an_unknown_id_lists_the_known(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, parrot=f"{echo}:make")
    error = refusal("sokoban")
    assert error.what == "unknown environment 'sokoban'"
    assert error.where == "a.toml:3 orchestrator.env.0"
    assert "parrot, questions, reasoning-gym, self-prompts, sokoban-env" in error.fix
    assert "module:function" in error.fix


@pytest.mark.parametrize("id", ["no_such_module:make", "echo_env:absent", "echo_env:"])
def test_a_path_that_does_not_load_is_named(echo: str, id: str) -> None:
    assert repr(id) in refusal(id).what


@pytest.mark.parametrize("args", [{}, {"word": "a", "color": "red"}, {"color": "red"}], ids=str)
def test_args_that_do_not_match_the_signature(echo: str, args: dict[str, Any]) -> None:
    error = refusal(f"{echo}:make", args)
    assert "'word'" in error.what or "'color'" in error.what
    assert error.fix == "echo_env:make takes word and may take times"


@pytest.mark.parametrize(
    ("arg", "meant"), [("colums", "columns"), ("contextcolumn", "context_column"), ("zzz", "")]
)
def test_an_unknown_arg_gets_a_suggestion(arg: str, meant: str) -> None:
    fix = refusal("dataset", {"path": "x.csv", arg: 1}).fix
    assert fix.startswith(f"did you mean {meant!r}? dataset takes" if meant else "dataset takes")


def test_a_built_in_environment_refuses_invalid_args() -> None:
    assert "'levels'" in refusal("sokoban-env", {"levels": 3}).what
    fix = refusal("jsonl", {"rewrd": "exact"}).fix
    assert fix.startswith("did you mean 'reward'? jsonl takes path and may take eval")
    assert "min_w = 9" in refusal("sokoban-env", {"min_w": 9}).what


FACTORIES = """
import sys

def wrong_type():
    return 1 + "a"

def leaves():
    sys.exit(0)

def base():
    raise BaseException("odd")

def package():
    import no_such_package_at_all
"""


@pytest.mark.parametrize(
    ("name", "cause", "line", "code"),
    [
        ("wrong_type", "TypeError: unsupported operand", 5, EXIT_USAGE),
        ("leaves", "it called sys.exit(0)", 8, EXIT_USAGE),
        ("base", "BaseException: odd", 11, EXIT_USAGE),
        ("package", "No module named 'no_such_package_at_all'", 14, EXIT_ENVIRONMENT),
    ],
)
def test_a_function_that_raises_is_named_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cause: str, line: int, code: int
) -> None:
    (tmp_path / "raising_env.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "raising_env", raising=False)
    with pytest.raises(UserError) as caught:
        load_environment(f"raising_env:{name}", {}, "orchestrator.env.0")
    error = caught.value
    assert f"the environment 'raising_env:{name}' failed: " in error.what
    assert cause in error.what
    assert f"raising_env.py:{line})" in error.what
    assert (error.where, error.exit_code) == ("orchestrator.env.0", code)


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "1 / 0", "def", "raise BaseException"])
def test_a_module_that_does_not_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_module", raising=False)
    assert "cannot load the environment 'broken_module:make'" in refusal("broken_module:make").what


@pytest.mark.parametrize(
    ("id", "meant"),
    [("sokoban", "sokoban-env"), ("sokoban_env", "sokoban-env"), ("json", "jsonl"), ("zzz", "")],
)
def test_an_unknown_id_gets_a_suggestion(id: str, meant: str) -> None:
    fix = refusal(id).fix
    assert fix.startswith(f"did you mean {meant!r}? Or use one of" if meant else "use one of")


@pytest.mark.parametrize("id", ["minidistill:__version__", ":x", ".a:b", "broken_here:make"])
def test_a_path_without_a_function_is_refused(id: str) -> None:
    assert "cannot load the environment" in refusal(id).what


def test_an_entry_point_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, broken="no_such_module_at_all:make")
    assert "no_such_module_at_all" in refusal("broken").what
