"""The contexts of bench/contexts: their data and their checks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from bench.contexts import make
from bench.contexts.topics import TOPICS, sentences
from minidistill.config import Config, load_config
from minidistill.envs import load_environment
from minidistill.types import Task

NAMES = sorted(path.stem for path in make.FOLDER.glob("*.toml"))
TASK = Task("1", ({"role": "user", "content": "What is tea?"},), "food")


def config_of(name: str) -> Config:
    return load_config([str(make.FOLDER / f"{name}.toml")]).config


def prompts(tasks: Any) -> set[str]:
    return {re.sub(r"\W+", " ", str(task.messages[-1]["content"]).casefold()) for task in tasks}


def test_the_files_are_those_that_make_writes() -> None:
    made = make.files()
    assert {path.name for path in make.FOLDER.glob("*.toml")} <= set(made)
    for name, text in made.items():
        assert (make.FOLDER / name).read_text() == text, name


@pytest.mark.parametrize("name", NAMES)
def test_training_and_held_out_prompts_are_apart(name: str) -> None:
    config = config_of(name)
    env = config.orchestrator.env[0]
    environment = load_environment(env.id, env.args)
    train, held_out = prompts(environment.train), prompts(environment.eval)
    assert len(train) >= 256
    assert len(held_out) == 96
    assert not train & held_out
    shown = config.orchestrator.teacher_model.context
    shown = re.sub(r"\W+", " ", shown.casefold())
    assert not [prompt for prompt in train | held_out if prompt in shown]


def test_each_topic_has_as_many_messages_as_the_others() -> None:
    for name in ("topics_train", "topics_held_out"):
        lines = (make.FOLDER / f"{name}.jsonl").read_text().splitlines()
        labels = [json.loads(line)["answer"] for line in lines]
        counts = {topic: labels.count(topic) for topic in TOPICS}
        assert len(set(counts.values())) == 1
        assert sum(counts.values()) == len(lines)
    assert sentences("food") == sentences("food")
    assert all("{" not in text for topic in TOPICS for text in sentences(topic))


def test_the_messages_of_training_have_other_words_than_the_held_out_ones() -> None:
    def words(name: str, topic: str) -> set[str]:
        lines = map(json.loads, (make.FOLDER / name).read_text().splitlines())
        texts = [row["prompt"] for row in lines if row["answer"] == topic]
        return set(re.findall(r"[a-z]{5,}", " ".join(texts).lower()))

    for topic in TOPICS:
        held_out = words("topics_held_out.jsonl", topic)
        assert len(held_out & words("topics_train.jsonl", topic)) <= 0.05 * len(held_out)


GOOD_AND_BAD = {
    "persona": (["Ahoy! Tea.", "\nAhoy! A leaf"], ["ahoy! Tea.", "Well. Ahoy!", "Ahoy, tea"]),
    "brevity": (
        ["Tea is a drink.", "One two three four five six seven eight nine ten eleven twelve!"],
        [
            "Tea is a",
            ".",
            "One two three four five six seven eight nine ten eleven twelve thirteen.",
            "Tea.\n\nIt is hot.",
            "",
        ],
    ),
    "json": (
        ['{"answer": "Tea is hot."}', ' {"answer": "A"}\n'],
        ['{"answer": "Tea', '{"answer": ""}', "Tea", '{"answer": "Tea."} More.', '{"a": "b"}'],
    ),
    "sign_off": (["Tea. Stay safe!", "Stay safe!\n"], ["Stay safe! Tea.", "Tea. Stay safe", ""]),
    "both": (
        ["Ahoy! Tea. Stay safe!", "Ahoy!\nTea.\nStay safe! "],
        ["Ahoy! Tea.", "Tea. Stay safe!", "Stay safe! Ahoy!"],
    ),
    "topics": (["food", " food\n"], ["Food", "food.", "sports", "food and", ""]),
}


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_the_checks_know_good_answers_from_bad_ones(name: str) -> None:
    env = config_of(name).orchestrator.env[0]
    environment = load_environment(env.id, env.args)
    good, bad = GOOD_AND_BAD[name]
    assert [environment.score(TASK, text).value for text in good] == [1.0] * len(good)
    assert [environment.score(TASK, text).value for text in bad] == [0.0] * len(bad)


def test_the_demonstrations_show_what_is_checked() -> None:
    assert set(GOOD_AND_BAD) == {name for name in NAMES if "_" not in name or name == "sign_off"}
    for name, behavior in make.BEHAVIORS.items():
        answers = [behavior.answer(answer) for _, answer in make.pairs("demonstrations.tsv")]
        bad = [answer for answer in answers if not re.search(behavior.pattern, answer)]
        assert not bad, name
    assert {label for _, label in make.pairs("topic_demonstrations.tsv")} == set(TOPICS)
