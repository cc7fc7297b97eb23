"""The rewards that need no code: their values, and errors for what they cannot use."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minidistill.config.orchestrator import EnvConfig
from minidistill.envs import has_task
from minidistill.envs.outcomes import Attempt, Outcome, ScoringError, score_attempts
from minidistill.envs.registry import load_environments
from minidistill.envs.rewards import build
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError
from minidistill.types import Reward, Task


def score(
    completion: str, reward: Any, answer: str | None = None, tokens: int | None = None
) -> Any:
    outcomes: list[Outcome] = []
    attempt = Attempt(Task("t", (), answer), completion, tokens)
    score_attempts(build(reward), [attempt], lambda _, outcome: outcomes.append(outcome))
    return outcomes[0]


def length(completion: str, unit: str = "words", **bounds: int) -> Any:
    return score(completion, {"type": "length", "unit": unit, **bounds}, tokens=7)


@pytest.mark.parametrize(
    ("count", "bounds", "earned"),
    [
        (4, {"target": 4}, 1.0), (3, {"target": 4}, 0.75), (5, {"target": 4}, 0.8),
        (0, {"target": 4}, 0.0), (400, {"target": 4}, 0.01),
        (4, {"max": 4}, 1.0), (0, {"max": 4}, 1.0), (8, {"max": 4}, 0.5),
        (4, {"min": 4}, 1.0), (9, {"min": 4}, 1.0), (1, {"min": 4}, 0.25),
        (2, {"min": 2, "max": 4}, 1.0), (4, {"min": 2, "max": 4}, 1.0),
        (1, {"min": 2, "max": 4}, 0.5), (5, {"min": 2, "max": 4}, 0.8),
    ],
)  # fmt: skip
def test_the_length_reward(count: int, bounds: dict[str, int], earned: float) -> None:
    assert length("a\n" * count, **bounds) == Reward(earned, {"length": count})


def test_the_units_of_a_length() -> None:
    text = "  two wörds\n"
    for unit, count in {"words": 2, "characters": 9, "tokens": 7}.items():
        assert length(text, unit, target=count) == Reward(1.0, {"length": count})
    reward = build({"type": "length", "unit": "tokens", "max": 3})
    with pytest.raises(ScoringError, match="number of tokens is not known"):
        reward.score(Task("t", ()), "a")
    assert isinstance(score("a", {"type": "length", "unit": "tokens", "max": 3}), ScoringError)


@pytest.mark.parametrize(
    ("completion", "args", "present"),
    [
        ("the answer is 4", {"text": "answer"}, True),
        ("the Answer is 4", {"text": "answer"}, False),
        ("the Answer is 4", {"text": "aNSWER", "ignore_case": True}, True),
        ("straße", {"text": "STRASSE", "ignore_case": True}, True),
        ("a.b", {"text": "a.b"}, True),
        ("axb", {"text": "a.b"}, False),
        ("its own yes", {}, True),
        ("", {}, False),
    ],
)
def test_contains_and_not_contains(completion: str, args: dict[str, Any], present: bool) -> None:
    assert score(completion, {"type": "contains", **args}, "yes") == Reward(float(present))
    assert score(completion, {"type": "not_contains", **args}, "yes") == Reward(float(not present))


def test_contains_several() -> None:
    texts = {"text": ["a", "b"]}
    for completion, every, none in [("ab", 1, 0), ("a", 0, 0), ("x", 0, 1)]:
        assert score(completion, {"type": "contains", **texts}) == Reward(every)
        assert score(completion, {"type": "not_contains", **texts}) == Reward(none)


def test_a_pattern_of_the_configuration_or_of_the_line() -> None:
    pattern = {"type": "regex", "pattern": "(?i)^yes[.!]$"}
    assert score("YES!", pattern) == Reward(1.0)
    assert score("oh yes!", pattern) == Reward(0.0)
    assert score("oh yes!", "regex", "yes") == Reward(1.0)
    assert not build(pattern).needs_answer
    assert build("regex").needs_answer


SCHEMA = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}, "age": {"minimum": 0}},
}


@pytest.mark.parametrize(
    ("completion", "parses", "valid"),
    [
        (' {"name": "ann", "age": 3}\n', 1, 1),
        ('{"name": "Ann"}', 1, 0),
        ("{}", 1, 0),
        ("7", 1, 0),
        ('{"name": "ann", "age": NaN}', 0, 0),
        ('```json\n{"name": "ann"}\n```', 0, 0),
        ('{"name": "ann"} ok', 0, 0),
        ("", 0, 0),
        ("[" * 100_000, 0, 0),
    ],
)
def test_the_json_reward(completion: str, parses: int, valid: int, tmp_path: Path) -> None:
    assert score(completion, "json") == Reward(parses, {"parses": parses})
    expected = Reward(valid, {"parses": parses})
    assert score(completion, {"type": "json", "schema": SCHEMA}) == expected
    file = tmp_path / "schema.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(SCHEMA).encode())
    table = {"type": "json", "schema_file": str(file)}
    assert score(completion, table) == expected


@pytest.mark.parametrize(
    ("data", "what", "place"),
    [
        (b'{"type": "object", "type": "array"}', "the key 'type' is there twice", ""),
        (b'{\n  "type": objekt}', "not valid JSON: Expecting value", ":2, column 11"),
        (b'{\n "title": "caf\xe9"}', "is not UTF-8 text: the byte 0xe9", ":2, column 15"),
    ],
)
def test_a_file_that_is_no_schema(data: bytes, what: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        build({"type": "json", "schema_file": str(file)})
    assert what in caught.value.what
    assert caught.value.where == f"{file}{place}"
    assert caught.value.exit_code == EXIT_USAGE


def test_a_schema_fetches_nothing() -> None:
    reference = {"type": "json", "schema": {"$ref": "http://127.0.0.1:9/schema.json"}}
    outcome = score("{}", reference)
    assert isinstance(outcome, ScoringError)
    assert "Unresolvable" in str(outcome)
    reward = {
        "type": "json",
        "schema": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
    }
    assert score('{"type": "object"}', reward) == Reward(1.0, {"parses": 1.0})


def test_a_schema_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert score("{}", "json") == Reward(1.0, {"parses": 1.0})
    with pytest.raises(UserError, match="jsonschema") as caught:
        build({"type": "json", "schema": SCHEMA})
    assert caught.value.exit_code == EXIT_ENVIRONMENT
    assert "pip install" in caught.value.fix


def test_what_needs_a_process_of_its_own() -> None:
    judge = {"type": "judge", "url": "http://a/v1", "model": "m", "prompt": "{completion}"}
    in_process = ["exact", "contains", "not_contains", "json", judge]
    in_process.append({"type": "length", "unit": "words", "max": 3})
    assert all(build(reward).scores_in_process for reward in in_process)
    isolated = ["regex", {"type": "json", "schema": SCHEMA}, "math:sin"]
    assert not any(build(reward).scores_in_process for reward in isolated)


@pytest.mark.parametrize(
    ("reward", "where", "mentioned"),
    [
        ("exakt", "", "did you mean 'exact'"),
        ("not-contains", "", "did you mean 'not_contains'"),
        ("notcontain", "", "did you mean 'not_contains'"),
        (3, "", '"length"'),
        (["exact"], "", '"exact"'),
        ({"pattern": "a"}, "", "add `type`"),
        ({"type": "length"}, "", "length takes unit"),
        ({"type": "length", "unit": "words", "maximum": 3}, "", "'maximum'"),
        ({"type": "length", "unit": "lines", "max": 3}, ".unit", "tokens, words, characters"),
        ({"type": "length", "unit": "words"}, ".target", "target, or min, max"),
        ({"type": "length", "unit": "words", "target": 3, "max": 3}, ".target", "either"),
        ({"type": "length", "unit": "words", "max": 0}, ".max", "above 0"),
        ({"type": "length", "unit": "words", "max": 2.5}, ".max", "whole number"),
        ({"type": "length", "unit": "words", "min": 5, "max": 3}, ".min", "max = 3"),
        ({"type": "contains", "text": ""}, ".text", "not empty"),
        ({"type": "contains", "text": []}, ".text", "not empty"),
        ({"type": "contains", "text": ["a", 3]}, ".text[1]", "not empty"),
        ({"type": "contains", "text": "a", "ignore_case": 1}, ".ignore_case", "true or false"),
        ({"type": "regex", "pattern": "a("}, ".pattern", "not a valid regular expression"),
        ({"type": "json", "schema": {"type": "objekt"}}, ".schema", "'objekt' is not valid"),
        ({"type": "json", "schema": 3}, ".schema", "3"),
        ({"type": "json", "schema_file": "absent.json"}, ".schema_file", "No such file"),
        ({"type": "json", "schema": {}, "schema_file": "a"}, ".schema_file", "either"),
        ({"type": "math:sin", "x": 1}, "", "no arguments"),
    ],
)
def test_a_reward_that_cannot_be_used(reward: Any, where: str, mentioned: str) -> None:
    with pytest.raises(UserError) as caught:
        build(reward)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.where == f"args.reward{where}"
    assert mentioned in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "is_task"),
    [
        ("exact", True), ("regex", True), ("contains", True), ("math:sin", True), ("none", False),
        ({"type": "regex", "pattern": "^Ahoy"}, False), ("json", False),
        ({"type": "length", "unit": "words", "max": 9}, False),
    ],
)  # fmt: skip
def test_rewards_of_a_task_and_of_the_style_alone(
    reward: Any, is_task: bool, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "{i}", "answer": "{i}"}}\n' for i in range(4)))
    config = EnvConfig(id="jsonl", args={"path": str(file), "reward": reward})
    [env] = load_environments([config], "orchestrator.env").values()
    assert has_task(env) is is_task
