"""The files of a model's folder are checked before anything opens them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import SOKOBAN

from minidistill import cli
from minidistill.config import load_config
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.models.hub import TEACHER_KEY, load_model_config, load_tokenizer
from minidistill.models.registry import BUILT_IN
from minidistill.models.weights import check_weights

FILES = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    *("model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
]
OBJECTS = [name for name in FILES if name.endswith(".json") and name != "tokenizer.json"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    shutil.copytree(BUILT_IN["tiny-sokoban"], "model")
    return Path("model")


def run(folder: Path) -> int:
    return cli.main(["run", SOKOBAN, "--model.name", str(folder), "--output_dir", "out"])


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


MAKE: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe in a folder": lambda path: (os.mkfifo("pipe"), path.symlink_to(Path("pipe").resolve())),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_is_refused_and_not_opened(
    name: str, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a run, which ends before it writes anything."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    MAKE[kind](path)
    assert run(folder) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is not a file, but a pipe, a socket or a device")
    assert "where: model.name" in error
    assert "fix: " in error
    assert not Path("out").exists()


def test_a_special_file_that_an_index_names_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    os.mkfifo(folder / "parts/1")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "parts/1"}}))
    with pytest.raises(UserError, match="model/parts/1 is not a file"):
        check_weights(load_config([SOKOBAN, "--model.name", str(folder)]).config)


DAMAGES = {
    "nested": "[" * 100_000,
    "nested and closed": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a list": "[1, 2]",
    "null": "null",
    "empty": "",
    "half": '{"a": ',
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", OBJECTS)
def test_a_file_that_holds_no_object_is_named(name: str, damage: str, folder: Path) -> None:
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(DAMAGES[damage].encode(errors="surrogateescape"))
    config = load_config([SOKOBAN, "--teacher_inference.model.name", str(folder)]).config
    with pytest.raises(UserError) as caught:
        load_model_config(config, str(folder))
    assert str(folder / name) in caught.value.what
    place = f"{folder / name}:1, column 1" if damage == "not UTF-8" else TEACHER_KEY
    assert caught.value.where == place
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.fix


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused(damage: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(DAMAGES[damage].encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="cannot load the model 'model'") as caught:
        load_tokenizer(load_config([SOKOBAN, "--model.name", str(folder)]).config)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ({"metadata": {}}, "it has no weight_map"),
        ({"metadata": {}, "weight_map": ["a"]}, "it has no weight_map"),
        ({"metadata": {}, "weight_map": {}}, "it has no weight_map"),
        ({"metadata": {}, "weight_map": {"a": 5}}, "it names no file for a"),
        ({"metadata": {}, "weight_map": {"a": "x", "b": ["x"]}}, "it names no file for b"),
        ({"weight_map": {"a": "x"}}, "it has no metadata"),
        ({"metadata": 5, "weight_map": {"a": "x"}}, "it has no metadata"),
    ],
)
def test_an_index_of_another_shape(index: Any, problem: str, folder: Path) -> None:
    config = load_config([SOKOBAN, "--model.name", str(folder)]).config
    (folder / INDEX).write_text(json.dumps(index))
    check_weights(config)  # the weights are in one file, so it is not read
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{INDEX} is not an index of weights: {problem}") as caught:
        check_weights(config)
    assert (caught.value.where, caught.value.exit_code) == ("model.name", EXIT_USAGE)
    assert caught.value.fix
