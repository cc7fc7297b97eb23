"""The reward `json`: whether a completion is JSON, and follows a schema."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from minidistill.envs.rewards.arguments import refusal
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.files import read_json
from minidistill.types import Reward, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Json:
    """1 if the completion is JSON and nothing else, and valid by the schema if there is one.

    `schema` is a JSON Schema as a table, `schema_file` a file with one. Other files and addresses
    that it refers to are not read.
    """

    schema: dict[str, Any] | None = None
    schema_file: str | None = None
    needs_answer = False
    _validator: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        schema, name = self.schema, "schema"
        if self.schema_file is not None:
            if schema is not None:
                raise refusal("schema_file", self.schema_file, "give either schema or schema_file")
            schema, name = _read(self.schema_file), "schema_file"
        if schema is not None:
            object.__setattr__(self, "_validator", _make_validator(name, schema))

    @property
    def scores_in_process(self) -> bool:
        return self._validator is None  # a schema's patterns may take forever

    def check(self, task: Task) -> None: ...

    def score(self, task: Task, completion: str) -> Reward:
        try:
            value = json.loads(completion, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return Reward(0.0, {"parses": 0.0})
        valid = self._validator is None or self._validator.is_valid(value)
        return Reward(float(valid), {"parses": 1.0})


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read(path: object) -> Any:
    if not isinstance(path, str) or not path:
        raise refusal("schema_file", path, "give the path of a file")
    fix = f"schema_file is relative to the current directory, {Path.cwd()}"
    return read_json(Path(path).expanduser(), where="args.reward.schema_file", fix=fix)


def _make_validator(name: str, schema: object) -> Any:
    if not isinstance(schema, dict):
        raise refusal(name, schema, "give a JSON Schema as a table (in a file: an object)")
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from jsonschema_specifications import REGISTRY
    except ImportError:
        raise UserError(
            "the reward json needs the package jsonschema for a schema",
            where=f"args.reward.{name}",
            fix="pip install 'minidistill[jsonschema]', or leave out the schema",
            exit_code=EXIT_ENVIRONMENT,
        ) from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise refusal(name, schema, "fix the JSON Schema", error.message) from None
    return kind(schema, registry=REGISTRY)  # with a registry, nothing is fetched
