"""`self-prompts` without a model: its settings, and which texts become prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minidistill.envs import load_environment
from minidistill.envs.self_prompts import Choice, Settings
from minidistill.errors import UserError

QUESTION = "How do I repair a bicycle?"


def take(choice: Choice, text: str, **more: object) -> bool:
    return choice.take(text, **{"ended": True, **more})  # type: ignore[arg-type]


def test_plain_texts_are_kept_in_their_order() -> None:
    choice = Choice()
    texts = [
        QUESTION,
        "Wie wird das Wetter morgen?",
        "你能解释一下量子纠缠是什么吗",
        "Write a poem.",
    ]
    assert [take(choice, f" {text}\n") for text in texts] == [True] * 4
    assert choice.kept == texts
    assert not choice.dropped


@pytest.mark.parametrize(
    ("text", "more", "reason"),
    [
        ("How do I", {"ended": False}, "longer than max_tokens"),
        ("Say <|im_end|> twice", {"control_tokens": ["<|im_end|>"]}, "with control tokens"),
        ("", {}, "too short"),
        ("Hi!", {}, "too short"),
        ("?!" * 40, {}, "too short"),
        ("What does \ufffd mean here?", {}, "with characters that are not text"),
        ("What does \x07 mean here?", {}, "with characters that are not text"),
        ("A question.\nassistant\nAn answer.", {}, "repeats of the chat template"),
        ("You are a Helpful assistant, SmolLM", {}, "repeats of the chat template"),
        ("how do i REPAIR a bicycle", {}, "repeats of others"),
        ("How do I repair a bicycle!!", {}, "repeats of others"),
        ("So, how do I repair a bicycle?", {}, "repeats of others"),
        ("Why do old pirates always speak of treasure?", {}, "repeats of the context"),
    ],
)
def test_other_texts_are_counted_by_the_reason(text: str, more: dict, reason: str) -> None:
    lines = ["system", "You are a helpful assistant, SmolLM", "user", "assistant"]
    choice = Choice(lines, context="Old pirates always speak of treasure. Be one.")
    assert take(choice, QUESTION)
    assert not take(choice, text, **more)
    assert choice.dropped == {reason: 1}
    assert choice.summary() == f"1 {reason}"
    assert choice.kept == [QUESTION]


def test_a_role_within_a_question_is_no_repeat_of_the_template() -> None:
    choice = Choice(["system", "user", "assistant"])
    assert take(choice, "What does an assistant do for the user of a system?")


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"count": 1}, "count"),
        ({"count": True}, "count"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"topics": []}, "topics"),
        ({"topics": "cooking"}, "topics"),
        ({"topics": ["cooking", 3]}, "topics"),
        ({"seed": 0.5}, "seed"),
        ({"path": ""}, "path"),
        ({"path": 3}, "path"),
        ({"reward": "exact"}, "reward"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(args: dict, name: str) -> None:
    with pytest.raises(UserError) as error:
        load_environment("self-prompts", args)
    assert error.value.where == f"args.{name}"


def test_settings_have_the_defaults_of_the_environment() -> None:
    settings = Settings.of({})
    assert (settings.count, settings.temperature, settings.max_tokens) == (256, 0.8, 128)
    assert not settings.about_context
    assert Settings.of({"topics": "context"}).about_context
    assert Settings.of({"topics": ["tea"]}).topics == ("tea",)


def test_a_file_becomes_two_splits_by_the_hash_of_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    texts = [f"Question number {i} of many" for i in range(30)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    env = load_environment("self-prompts", {"path": str(path), "num_eval_examples": 6})
    splits = [{task.messages[0]["content"] for task in split} for split in (env.train, env.eval)]
    assert [len(split) for split in splits] == [24, 6]
    assert splits[0] | splits[1] == set(texts)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in reversed(texts)))
    again = load_environment("self-prompts", {"path": str(path), "num_eval_examples": 6})
    assert {task.messages[0]["content"] for task in again.eval} == splits[1]


def test_before_there_is_a_file_there_are_rewards_and_no_tasks(tmp_path: Path) -> None:
    reward = {"type": "length", "unit": "words", "max": 5}
    env = load_environment("self-prompts", {"path": str(tmp_path / "none"), "reward": reward})
    assert (len(env.train), len(env.eval)) == (0, 0)
    assert env.has_rewards  # type: ignore[attr-defined]
    assert not load_environment("self-prompts").has_rewards  # type: ignore[attr-defined]
