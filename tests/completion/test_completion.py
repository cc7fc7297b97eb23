"""Completion in real shells. A shell that is not installed is skipped, and said so."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minidistill import cli
from minidistill.config import schema_tree as tree
from minidistill.errors import EXIT_OK, EXIT_USAGE

Complete = Callable[[str], list[str]]
"""What a shell offers for a command line whose last word is being typed."""
KEY = "--trainer.loss.estimator"


def written(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script for a shell, in a folder that the shell starts in, with some files."""
    assert cli.main(["completion", shell]) == EXIT_OK
    (folder / "script").write_text(capsys.readouterr().out)
    (folder / "my run.toml").touch()
    (folder / "runs").mkdir()
    return folder / "script"


def in_bash(script: Path) -> Complete:
    def complete(line: str) -> list[str]:
        words = line.split(" ")
        for word in list(words):  # as readline splits
            if "=" in word:
                key, _, value = word.partition("=")
                at = words.index(word)
                words[at : at + 1] = [key, "=", value] if value else [key, "="]
        program = (
            f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _minidistill; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        return output(["bash", "--norc", "-c", program, "bash", *words], script.parent)

    return complete


def in_fish(script: Path) -> Complete:
    def complete(line: str) -> list[str]:
        program = f"source {script}; complete -C '{line}'"
        environment = {"HOME": str(script.parent), "XDG_CONFIG_HOME": str(script.parent)}
        lines = output(["fish", "--no-config", "-c", program], script.parent, **environment)
        # a value after = is offered with the option in front of it
        return [text.split("\t")[0].split("=")[-1] for text in lines]

    return complete


def output(command: list[str], folder: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


ZSHRC = """\
PS1='READY> ' LISTMAX=9999
unsetopt prompt_sp
unset zle_bracketed_paste
autoload -U compinit
compinit -u -D
zstyle ':completion:*' verbose no
source ./script
"""


def in_zsh(script: Path) -> Complete:
    """zsh completes only at its prompt, so it has a terminal. Ctrl-D lists what matches."""
    (script.parent / ".zshrc").write_text(ZSHRC)

    def complete(line: str) -> list[str]:
        process, terminal = pty.fork()
        if process == 0:
            os.chdir(script.parent)
            variables = {"TERM": "dumb", "COLUMNS": "200", "ZDOTDIR": str(script.parent)}
            os.execvpe("zsh", ["zsh", "-d", "-i"], {**os.environ, **variables})
        try:
            read_until(terminal, "READY> ")
            os.write(terminal, f"{line}\x04".encode())
            # it shows the line, the list, and the line again
            read_until(terminal, line)
            return read_until(terminal, f"READY> {line}").removesuffix(line).split()[:-1]
        finally:
            os.close(terminal)
            os.waitpid(process, 0)

    return complete


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows until it has shown `text`."""
    shown, deadline = "", time.monotonic() + 20
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 1).decode(errors="replace")
    return shown


@pytest.fixture(params=["bash", "zsh", "fish"])
def complete(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Complete:
    shell: str = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = written(shell, tmp_path, capsys)
    return {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}[shell](script)


def test_commands_settings_values_and_files(complete: Complete) -> None:
    commands = complete("minidistill ")
    assert {"run", "plan", "config", "env", "export", "doctor", "completion"} <= set(commands)
    assert "--quiet" in complete("minidistill run --qu")
    keys = complete("minidistill run --trainer.loss.")
    assert {"--trainer.loss.adv_tau", KEY} <= set(keys)
    assert not any("trainer.loss.adv_tau" in word for word in complete("minidistill report --"))
    assert {"auto", "sampled", "full", "top_k"} <= set(complete(f"minidistill plan {KEY} "))
    assert complete(f"minidistill run a.toml {KEY}=sa") == ["sampled"]
    assert {"check", "prompts"} <= set(complete("minidistill env "))
    assert "--samples" in complete("minidistill env check --sam")
    assert "runs" in [word.rstrip("/") for word in complete("minidistill report ru")]


def test_words_that_are_fixed_are_no_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = in_bash(written("bash", tmp_path, capsys))
    assert complete("minidistill completion ") == ["bash", "zsh", "fish"]
    assert complete("minidistill run my") == ["my run.toml"]
    assert complete("minidistill run --max_steps ") == [""]
    assert complete("minidistill run --output-dir ru") == ["runs"]
    assert complete("minidistill run --trainer.loss.adv-t") == ["--trainer.loss.adv_tau"]
    assert "--no-trainer.model.lora" in complete("minidistill run --no-trainer.model.lo")
    assert complete("minidistill nothing ") == [""]


def test_every_setting_and_command_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert cli.main(["completion", shell]) == EXIT_OK
        text = capsys.readouterr().out
        keys = [
            ".".join("0" if part == "*" else str(part) for part in path)
            for path, node in tree.walk()
            if not tree.properties(node)
        ]
        assert len(keys) > 100
        assert [key for key in keys if key not in text] == []


def test_it_is_fast_because_it_starts_no_torch() -> None:
    code = (
        "import sys; from minidistill import cli; cli.main(['completion', 'bash']); "
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "set()"


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["tcsh"], ["bash", "more"]):
        assert cli.main(["completion", *arguments]) == EXIT_USAGE
        assert "bash, zsh and fish" in capsys.readouterr().err


def test_files_whose_names_are_patterns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = written("bash", tmp_path, capsys)
    for name in ("a*", "ab", "a b"):
        (tmp_path / name).touch()
    assert sorted(in_bash(script)("minidistill run a")) == ["a b", "a*", "ab"]
