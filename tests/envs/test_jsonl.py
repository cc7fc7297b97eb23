"""A file of prompts: its lines, splits and rewards, and errors for invalid input."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from minidistill.envs import load_environment
from minidistill.envs.jsonl import JsonlEnv, Line
from minidistill.errors import EXIT_USAGE, UserError
from minidistill.types import Reward

REWARDS = """
from minidistill.types import Reward

def length(task, completion):
    return len(completion) / task.data["longest"]

def parts(task, completion):
    return Reward(0.5, {"count": completion.count(task.answer)})

NUMBER = 3
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets an empty current directory with an importable module of rewards."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


def write(lines: list[Any], name: str = "prompts.jsonl") -> None:
    """Write a file of these lines, as JSON unless they are text."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(name).write_text("\n".join(texts) + "\n", encoding="utf-8")


def load(lines: list[Any] | None = None, **args: Any) -> JsonlEnv:
    if lines is not None:
        write(lines)
    env = load_environment("jsonl", {"path": "prompts.jsonl", **args})
    assert isinstance(env, JsonlEnv)
    return env


def prompts(count: int, **keys: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", **keys} for i in range(count)]


def last_messages(tasks: Any) -> set[str]:
    return {task.messages[-1]["content"] for task in tasks}


# -- lines -------------------------------------------------------------------------------------


def test_a_line_becomes_a_task() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "  Bye\u2028 "},
    ]
    text = json.dumps({"messages": chat, "answer": "x", "id": 7, "level": {"a": [1]}}) + "\r\n"
    text += '\n \n{"prompt": "Wie weiß?", "messages": null, "answer": null}\n'
    Path("prompts.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    env = load()
    first, second = sorted([*env.train, *env.eval], key=lambda task: task.place)
    assert first == Line("7", tuple(chat), "x", {"level": {"a": [1]}}, "prompts.jsonl:1")
    message = {"role": "user", "content": "Wie weiß?"}
    assert second == Line("4", (message,), None, {}, "prompts.jsonl:4")


# -- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "requested", "held_out"), [(2, None, 1), (19, None, 1), (20, None, 2), (20, 7, 7)]
)
def test_the_number_of_held_out_prompts(count: int, requested: int | None, held_out: int) -> None:
    env = load(prompts(count), num_eval_examples=requested)
    assert (len(env.train), len(env.eval)) == (count - held_out, held_out)
    assert last_messages(env.train) | last_messages(env.eval) == {
        f"question {i}" for i in range(count)
    }


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    lines = prompts(40)
    first = load(lines, num_eval_examples=10)
    again = load(num_eval_examples=10)
    assert (again.train, again.eval) == (first.train, first.eval)
    for end in (lines[:10], lines[-10:]):
        assert last_messages(first.eval) != {line["prompt"] for line in end}
    shuffled = random.Random(0).sample(lines, len(lines))
    assert last_messages(load(shuffled, num_eval_examples=10).eval) == last_messages(first.eval)
    assert last_messages(load(num_eval_examples=10, seed=1).eval) != last_messages(first.eval)
    cut = load(num_eval_examples=10, num_train_examples=5)
    assert cut.eval == load(num_eval_examples=10).eval
    assert len(cut.train) == 5
    assert last_messages(cut.train) < last_messages(first.train)
    assert last_messages(load(num_train_examples=5, seed=1).train) != last_messages(cut.train)


@pytest.mark.parametrize("seed", range(8))
def test_equal_prompts_are_in_one_split(seed: int) -> None:
    lines = [{"prompt": f"question {i % 6}", "answer": str(i)} for i in range(15)]
    lines[7] = {"messages": [{"content": "question 1", "role": "user"}]}
    env = load(lines, num_eval_examples=5, seed=seed)
    assert len(env.eval) in (4, 5)  # groups of three and of two do not always add up to five
    assert len(env.train) + len(env.eval) == 15
    assert not last_messages(env.train) & last_messages(env.eval)


def test_duplicates_of_every_prompt_exceed_the_requested_number() -> None:
    env = load([*prompts(3), *prompts(3)], num_eval_examples=1)
    assert (len(env.train), len(env.eval)) == (4, 2)
    assert not last_messages(env.train) & last_messages(env.eval)


def test_a_file_of_held_out_prompts() -> None:
    write([{"prompt": "b"}, {"prompt": "c", "id": "own"}, {"prompt": "c"}], "held.jsonl")
    env = load(prompts(3), eval_path="held.jsonl")
    assert last_messages(env.train) == {"question 0", "question 1", "question 2"}
    assert sorted(task.id for task in env.eval) == ["eval/1", "eval/3", "own"]
    assert len(load(eval_path="held.jsonl", num_eval_examples=2).eval) == 2


# -- rewards -----------------------------------------------------------------------------------


def score(completion: str, reward: str | None, **line: Any) -> Reward:
    env = load(prompts(2, **line), reward=reward)
    return env.score(env.train[0], completion)


@pytest.mark.parametrize(
    ("completion", "earned"),
    [("yes", 1.0), (" yes\n", 1.0), ("Yes", 0.0), ("yes.", 0.0), ("", 0.0), ("y", 0.0)],
)
def test_the_exact_reward(completion: str, earned: float) -> None:
    assert score(completion, "exact", answer="\tyes ") == Reward(earned)


@pytest.mark.parametrize(
    ("completion", "earned"),
    [("it is 12.", 1.0), ("12", 1.0), ("123", 0.0), ("no number", 0.0), ("", 0.0)],
)
def test_the_regex_reward(completion: str, earned: float) -> None:
    assert score(completion, "regex", answer=r"\b1[0-9]\b") == Reward(earned)


def test_a_reward_function() -> None:
    assert score("abc", "own_rewards:length", longest=4) == Reward(0.75)
    reward = score("a b a", "own_rewards:parts", answer="a")
    assert reward == Reward(0.5, {"count": 2})


@pytest.mark.parametrize("reward", [None, "none"])
def test_no_reward(reward: str | None) -> None:
    env = load(prompts(2), reward=reward)
    assert not env.has_rewards
    assert env.score(env.train[0], "anything") == Reward(0.0)
    assert load(prompts(2, answer="a"), reward="exact").has_rewards


# -- refusals ----------------------------------------------------------------------------------

GOOD = {"prompt": "a", "answer": "a"}


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "x"}
TEXT = {"type": "text", "text": "One. "}
LINES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{prompt: a}", "not JSON"),
    "half a line": ('{"prompt": "a', "not JSON"),
    "nested too deeply": ("[" * 100_000, "not JSON"),
    "a list": (["a"], "not a JSON object"),
    "no prompt": ({"text": "a"}, "neither `prompt` nor `messages`"),
    "two prompts": ({"prompt": "b", "messages": [USER]}, "both `prompt` and `messages`"),
    "a number as prompt": ({"prompt": 3}, "`prompt` is 3, not text"),
    "an empty prompt": ({"prompt": " \n"}, "`prompt` is empty"),
    "a lone surrogate": ('{"prompt": "\\ud83d"}', "surrogate"),
    "messages as text": ({"messages": "hello"}, "not a list of messages"),
    "no messages": (chat(), "not a list of messages"),
    "a message as text": (chat("hello"), "`messages[0]` is not an object"),
    "a message without content": (chat({"role": "user"}), "`messages[0]` is not an object"),
    "a message's other key": (chat({**USER, "name": "b"}), "`messages[0]` is not an object"),
    "an unknown role": (chat(USER, {**USER, "role": "human"}), "[1]` has the role 'human'"),
    "a role of another type": (chat({**USER, "role": ["user"]}), "has the role ['user']"),
    "empty content": (chat({**USER, "content": ""}), "`messages[0].content` is empty"),
    "a part of another type": (
        chat({**USER, "content": [TEXT, {"type": "image_url", "image_url": "x"}]}),
        "`messages[0].content`: part 1 is 'image_url', and only text can be distilled",
    ),
    "a part without a type": (chat({**USER, "content": [1]}), "`messages[0].content`: part 0 is 1"),
    "a text part without text": (
        chat({**USER, "content": [{"type": "text"}]}), "part 0 is not an object of type and text",
    ),
    "parts without text": (chat({**USER, "content": []}), "`messages[0].content` is empty"),
    "a key twice": ('{"prompt": "b", "prompt": "c"}', "the key 'prompt' is there twice"),
    "a key of a table twice": (
        '{"prompt": "b", "level": {"a": 1, "a": 1}}', "the key 'a' is there twice",
    ),
    "an answer last": (
        chat(USER, {"role": "assistant", "content": "y"}), "does not end with a user message",
    ),
    "a number as answer": ({"prompt": "b", "answer": 12}, "`answer` is 12, not text"),
    "an empty answer": ({"prompt": "b", "answer": ""}, "`answer` is empty"),
    "an id of another type": ({"prompt": "b", "id": True}, "`id` is true, not text"),
    "a second id": ({"prompt": "b", "id": "1"}, "the id '1' is already used at prompts.jsonl:1"),
}  # fmt: skip


def refusal(lines: list[Any] | None = None, **args: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(lines, **args)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("name", LINES)
def test_an_invalid_line_is_refused(name: str) -> None:
    line, what = LINES[name]
    error = refusal([GOOD, "", line, GOOD])
    assert what in error.what
    assert error.where.split(",")[0] == "prompts.jsonl:3"


def test_invalid_json_is_refused_with_its_column() -> None:
    error = refusal([GOOD, '{"prompt": "a" "b"}'])
    assert error.where == "prompts.jsonl:2, column 16"
    assert "Expecting ',' delimiter" in error.what


def test_text_parts_become_one_text() -> None:
    lines = chat({**USER, "content": [TEXT, {"type": "text", "text": "Two."}]})
    env = load([lines, GOOD])
    messages = {task.place: task.messages for task in [*env.train, *env.eval]}
    assert messages["prompts.jsonl:1"] == ({"role": "user", "content": "One. Two."},)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    error = refusal(path="absent.jsonl")
    assert error.what == "cannot read absent.jsonl: No such file or directory"
    assert error.where == "args.path"
    assert f"relative to the current directory, {tmp_path}" in error.fix
    assert refusal([GOOD], eval_path="absent.jsonl").where == "args.eval_path"
    assert "Is a directory" in refusal(path=".").what
    Path("latin.jsonl").write_bytes(b'{"prompt": "a"}\n\n{"prompt": "\xe9"}')
    error = refusal(path="latin.jsonl")
    assert error.what == "latin.jsonl is not UTF-8 text: the byte 0xe9"
    assert error.where == "latin.jsonl:3, column 13"
    Path("notepad.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16"))
    assert "it seems to be UTF-16" in refusal(path="notepad.jsonl").what


def test_impossible_splits_are_refused() -> None:
    assert "no prompts" in refusal(["", " "]).what
    assert "leaves none to train on" in refusal([GOOD]).what
    assert "1 different prompts" in refusal([GOOD, GOOD]).what
    assert "holding out 4 of 4" in refusal(prompts(4), num_eval_examples=9).what
    write([{"prompt": "b"}, {"prompt": "a"}], "held.jsonl")
    error = refusal([GOOD, GOOD], eval_path="held.jsonl")
    assert error.where == "held.jsonl:2"
    assert "prompts.jsonl:1" in error.what
    assert "prompts.jsonl:1" in refusal([GOOD], eval_path="prompts.jsonl").what
    write([{"prompt": "b", "id": "x"}], "held.jsonl")
    assert "prompts.jsonl:1" in refusal([{**GOOD, "id": "x"}], eval_path="held.jsonl").what


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", 3), ("path", ""), ("eval_path", ["a"]), ("reward", "exakt"), ("reward", 1),
        ("reward", ["exact"]), ("num_eval_examples", 0), ("num_eval_examples", "4"),
        ("num_train_examples", -1), ("num_train_examples", 2.0), ("num_train_examples", True),
        ("seed", "a"), ("seed", None),
    ],
)  # fmt: skip
def test_an_invalid_argument_is_refused(name: str, value: Any) -> None:
    error = refusal(prompts(4), **{name: value})
    assert error.what == f"{name} = {value!r} cannot be used"
    assert error.where == f"args.{name}"


def test_a_reward_that_does_not_fit_the_lines_is_refused() -> None:
    without = {"prompt": "b"}
    for reward in ("exact", "regex"):
        error = refusal([GOOD, without, without], reward=reward)
        assert error.where == "prompts.jsonl:2"
        assert f'"{reward}" needs an `answer`' in error.what
    write([without], "held.jsonl")
    assert refusal([GOOD], reward="exact", eval_path="held.jsonl").where == "held.jsonl:1"
    error = refusal([GOOD, {"prompt": "b", "answer": "a(b"}], reward="regex")
    assert error.where == "prompts.jsonl:2"
    assert "'a(b' is not a valid regular expression: missing )" in error.what
    for path in ("own_rewards:absent", "no_such_module:f", "own_rewards:NUMBER", "own_rewards:"):
        assert f"cannot load the reward {path!r}" in refusal(prompts(2), reward=path).what
