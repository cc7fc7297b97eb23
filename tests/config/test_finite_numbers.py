"""No number of the configuration may be NaN or infinite."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from support.configs import MINIMAL

from minidistill.config import Config, load_config
from minidistill.errors import UserError


def tables(annotation: Any) -> list[type[BaseModel]]:
    """The tables within a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [t for argument in typing.get_args(annotation) for t in tables(argument)]


def takes_numbers(annotation: Any) -> bool:
    if annotation in (int, float):
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return takes_numbers(typing.get_args(annotation)[0])
    union = origin in (typing.Union, types.UnionType)
    return union and any(map(takes_numbers, typing.get_args(annotation)))


def numbers(table: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[str]:
    """The dotted keys of all numbers. Lists of tables have an entry 0."""
    for name, field in table.model_fields.items():
        inner = tables(field.annotation)
        index = ("0",) if "list" in str(field.annotation) else ()
        for each in inner:
            yield from numbers(each, (*path, name, *index))
        if takes_numbers(field.annotation):
            yield ".".join((*path, name))


KEYS = sorted(set(numbers(Config)))


def test_the_keys_are_those_of_the_configuration() -> None:
    assert len(KEYS) > 45
    assert {
        "trainer.optim.lr", "trainer.loss.kl_clip", "trainer.loss.max_sampler_mismatch",
        "trainer.model.lora.alpha", "inference.gpu_memory_utilization", "health.patience",
        "orchestrator.env.0.score_timeout", "orchestrator.max_env_error_frac",
    } <= set(KEYS)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_number_that_is_not_finite_is_refused(key: str, tmp_path: Path) -> None:
    """On the command line, and in a file with its place."""
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    needed = ["--orchestrator.eval"] if ".eval." in key else []
    if ".eval.env." in key:
        needed += ["--orchestrator.eval.env.0.id", "sokoban-env"]
    for value in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(UserError) as caught:
            load_config([str(path), *needed, f"--{key}", value])
        assert key.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_file_with_such_a_number_is_refused_with_its_place(value: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f"{MINIMAL}[trainer.optim]\nlr = {value}\n")
    with pytest.raises(UserError) as caught:
        load_config([str(path)])
    assert f"{path}:6" in caught.value.where
