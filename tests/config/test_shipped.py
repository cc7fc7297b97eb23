"""Configurations that ship with the package, by name, and files beside a configuration."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.config import load_config, shipped
from minidistill.envs import load_environment
from minidistill.errors import EXIT_OK, EXIT_USAGE, UserError


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory outside the checkout."""
    monkeypatch.chdir(tmp_path)


def test_names_mean_the_files_of_the_checkout() -> None:
    files = sorted((ROOT / "configs").rglob("*.toml"))
    assert sorted(shipped.names().values()) == files, "no two have the same name"
    assert shipped.find("sokoban") == str(ROOT / "configs" / "sokoban.toml")


def test_in_an_installed_package_they_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "site" / "minidistill" / "configs")
    module = tmp_path / "site" / "minidistill" / "config" / "shipped.py"
    monkeypatch.setattr(shipped, "__file__", str(module))
    assert shipped.folder() == tmp_path / "site" / "minidistill" / "configs"


OVERLAYS = {n for n, path in shipped.names().items() if path.read_text().startswith("# An overlay")}
MADE_BY_USERS = {"opcd-medical", "opcd-safety"}
"""Configurations whose data is not in the package."""


@pytest.mark.parametrize("name", sorted(set(shipped.names()) - OVERLAYS))
def test_each_loads_outside_a_checkout_with_its_files(name: str) -> None:
    config = load_config([name]).config
    for env in [*config.orchestrator.env, *(((e := config.orchestrator.eval) and e.env) or [])]:
        for key in ("path", "eval_path"):
            if key in env.args and name not in MADE_BY_USERS:
                assert os.path.isfile(env.args[key])
        for word in env.args.get("command", ())[1:]:
            assert os.path.isfile(word)


def test_overlays_by_name() -> None:
    assert {"pure", "placebo", "opcd-sokoban", "opcd-full"} <= OVERLAYS
    assert load_config(["sokoban", "@", "pure"]).config.trainer.loss.adv_tau == 0
    assert load_config(["sokoban", "@pure"]).files[0].stem == "sokoban"


def test_a_file_beats_a_name_and_an_unknown_name_lists_them() -> None:
    Path("sokoban").write_text((ROOT / "configs" / "sokoban.toml").read_text() + "rollouts = 1\n")
    with pytest.raises(UserError) as caught:
        load_config(["sokoban"])
    assert caught.value.where.startswith("sokoban:")
    with pytest.raises(UserError) as caught:
        load_config(["sokobn"])
    assert "sokoban-turns, sokoban;" in caught.value.fix
    with pytest.raises(UserError) as caught:
        load_config(["configs/sokoban.toml"])
    assert caught.value.fix.endswith("the package has a configuration `sokoban`")


def test_commands_take_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "frozen-lake"]) == EXIT_OK
    assert cli.main(["plan", "own-prompts", "--gpus", "1", "--gpu-memory", "80"]) == EXIT_OK
    assert cli.main(["run", "nothing"]) == EXIT_USAGE
    capsys.readouterr()
    assert cli.main(["env", "check", "questions", "--samples", "1"]) == EXIT_OK
    assert cli.main(["env", "check", "reasoning"]) == EXIT_USAGE
    assert "unknown environment 'reasoning'" in capsys.readouterr().err


def test_a_file_is_looked_for_here_and_then_beside_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    text = (ROOT / "configs" / "own-prompts.toml").read_text()
    (folder / "mine.toml").write_text(text.replace("own-prompts.jsonl", "mine.jsonl"))

    def path() -> object:
        return load_config(["there/mine.toml"]).config.orchestrator.env[0].args["path"]

    assert path() == "mine.jsonl", "in neither place: the environment says that it is not there"
    (folder / "mine.jsonl").write_text("")
    assert path() == "there/mine.jsonl"
    Path("mine.jsonl").write_text("")
    assert path() == "mine.jsonl"
    # a flag's file is here
    flags = ["--orchestrator.env.0.args.path", "other.jsonl"]
    (folder / "other.jsonl").write_text("")
    args = load_config(["there/mine.toml", *flags]).config.orchestrator.env[0].args
    assert args["path"] == "other.jsonl"


@pytest.mark.parametrize(
    ("env", "kept"),
    [
        ({"id": "my:env", "args": {"path": "data.txt"}}, "data.txt"),
        ({"id": "jsonl", "args": {"path": "\0"}}, "\0"),
        ({"id": "jsonl", "args": "data.txt"}, None),
        ("jsonl", None),
        ({"id": 3, "args": {"path": "data.txt"}}, "data.txt"),
    ],
)
def test_other_arguments_stay(tmp_path: Path, env: object, kept: str | None) -> None:
    (tmp_path / "data.txt").write_text("")
    data = {"orchestrator": {"env": [env], "eval": 3}}
    expected = json.loads(json.dumps(data))
    shipped.find_beside(data, tmp_path / "..")
    shipped.find_beside(data, tmp_path)
    assert data == expected


def test_the_questions() -> None:
    questions = load_environment("questions")
    texts = [task.messages[0]["content"] for task in [*questions.eval, *questions.train]]
    assert len(questions.eval) == 64
    assert len(set(texts)) == len(texts) == 96
    short = {"type": "length", "unit": "words", "max": 9}
    fewer = load_environment("questions", {"num_eval_examples": 8, "reward": short})
    assert len(fewer.eval) == 8
    with pytest.raises(UserError, match="num_eval_examples = 96"):
        load_environment("questions", {"num_eval_examples": 96})
