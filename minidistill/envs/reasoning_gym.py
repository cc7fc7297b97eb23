"""`reasoning-gym`: the data sets of the package reasoning-gym, by their names.

The package is imported when the environment is loaded: `pip install 'minidistill[reasoning-gym]'`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from minidistill.envs.arguments import argument_refusal, require_argument
from minidistill.envs.registry import did_you_mean
from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.seeding import stable_seed
from minidistill.types import Reward, Task

logger = logging.getLogger(__name__)
ID = "reasoning-gym"
MOST = 8
"""Entries that are made for each task that is wanted, at most: equal ones are left out."""
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAGS = "\n\nPut the final answer, and nothing else, between <answer> and </answer>."


def _ab(entry: Mapping[str, Any]) -> str:
    return str(entry["question"].partition("the following program:")[2].split("\n\n")[1].strip())


def _letters(entry: Mapping[str, Any]) -> str:
    metadata = entry["metadata"]
    return f"{metadata['target_letter']}: {' '.join(metadata['span'])}"


def _countdown(entry: Mapping[str, Any]) -> str:
    metadata = entry["metadata"]
    return f"{', '.join(map(str, metadata['numbers']))} -> {metadata['target']}"


INSTANCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ab": _ab,
    "caesar_cipher": lambda entry: str(entry["metadata"]["cipher_text"]),
    "countdown": _countdown,
    "letter_counting": _letters,
    "spell_backward": lambda entry: str(entry["metadata"]["word"]),
}
"""What is left of a question without its rules, for `rules = "omit"`."""


@dataclass(frozen=True, slots=True)
class Question(Task):
    """An entry of a data set as a task. `answer` is the entry's own, which may be one of many."""

    entry: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores with a data set's own `score_answer`."""

    dataset: Any
    tagged: bool

    def score(self, task: Question, completion: str) -> Reward:
        """The data set's score of the answer; 0 for a completion without one.

        The answer is the last `<answer>…</answer>`, or with `answer = "bare"` the whole completion.
        """
        answers = _ANSWER.findall(completion) if self.tagged else [completion]
        answer = answers[-1].strip() if answers else ""
        value = self.dataset.score_answer(answer, task.entry) if answer else 0.0
        return Reward(value, {"answered": float(bool(answer))})


@dataclass(frozen=True, slots=True)
class ReasoningGym:
    """Tasks of one data set in two splits. No question is in both."""

    train: list[Question]
    eval: list[Question]
    scoring: Scorer
    scorer: tuple[str, dict[str, Any]]
    """What a process that scores has to load: the data set, without its tasks."""

    def score(self, task: Question, completion: str) -> Reward:
        return self.scoring.score(task, completion)

    def example_answer(self, task: Question) -> str | None:
        """The entry's own answer, as a completion gives it."""
        if not isinstance(task.answer, str):
            return None
        return f"<answer>{task.answer}</answer>" if self.scoring.tagged else task.answer


def load(
    dataset: str,
    num_train_examples: int = 1000,
    num_eval_examples: int = 200,
    seed: int = 0,
    rules: str = "prompt",
    answer: str = "tag",
    **config: Any,
) -> ReasoningGym:
    """The data set `dataset`, with `config` as its configuration.

    The splits are made from seeds of their own, and each question is used once; held-out questions
    are drawn first. `rules = "omit"` leaves the rules to the context, for the data sets in
    `INSTANCES`. Raises UserError if the package is missing, or for an argument that it cannot use.
    """
    for name, value in (
        ("num_train_examples", num_train_examples),
        ("num_eval_examples", num_eval_examples),
    ):
        _require(_is_whole(value) and value > 0, name, value, "use a whole number above 0")
    _require(_is_whole(seed), "seed", seed, "use a whole number")
    _require(rules in ("prompt", "omit"), "rules", rules, 'use "prompt" or "omit"')
    _require(answer in ("tag", "bare"), "answer", answer, 'use "tag" or "bare"')
    known = ", ".join(INSTANCES)
    omits = rules == "omit"
    if omits and dataset not in INSTANCES:
        fix = f'use "prompt": what is left without the rules is known for {known}'
        raise _refusal("rules", rules, fix)
    make = partial(_make, dataset, config)
    seen: set[str] = set()
    splits = {}
    for split, count in (("eval", num_eval_examples), ("train", num_train_examples)):
        entries = make(seed=stable_seed(seed, ID, dataset, split) % 2**31, size=MOST * count)
        splits[split] = _questions(entries, split, count, seen, omits, answer == "tag")
    scorer = f"{__name__}:load_scorer", {"dataset": dataset, "answer": answer, "config": config}
    scoring = load_scorer(dataset, answer, config)
    return ReasoningGym(splits["train"], splits["eval"], scoring, scorer)


def load_scorer(dataset: str, answer: str, config: dict[str, Any]) -> Scorer:
    """What scores the answers to a data set's questions."""
    return Scorer(_make(dataset, config, seed=0, size=1), answer == "tag")


def _questions(
    entries: Any, split: str, count: int, seen: set[str], omits: bool, tagged: bool
) -> list[Question]:
    """The first `count` tasks of a data set with contents that are not `seen`, which grows."""
    dataset = entries[0]["metadata"].get("source_dataset")
    shorten = INSTANCES.get(dataset)
    questions: list[Question] = []
    for index in range(len(entries)):
        entry = entries[index]
        # equal instances may have rules in other words
        key = shorten(entry) if shorten is not None else str(entry["question"])
        if key in seen:
            continue
        seen.add(key)
        content = key if omits else f"{str(entry['question']).rstrip()}{_TAGS if tagged else ''}"
        messages = ({"role": "user", "content": content},)
        questions.append(Question(f"{split}/{index}", messages, entry["answer"], entry))
        if len(questions) == count:
            return questions
    if not questions:
        raise UserError(
            f"{ID}: {dataset} has too few different questions for both splits",
            where="args",
            fix="lower num_eval_examples, or widen the data set's configuration",
        )
    logger.warning(
        f"{ID}: {dataset} has {len(questions)} different questions for {split}, of {count} wanted"
    )
    return questions


def _make(name: str, config: dict[str, Any], *, seed: int, size: int) -> Any:
    """The data set `name`. Raises UserError."""
    try:
        import reasoning_gym  # noqa: F401, which registers the data sets
        from reasoning_gym.factory import DATASETS, create_dataset
    except ModuleNotFoundError as error:
        raise UserError(
            f"{ID}: the package {(error.name or ID).replace('_', '-')} is not installed",
            where="id",
            fix="pip install 'minidistill[reasoning-gym]'",
            exit_code=EXIT_ENVIRONMENT,
        ) from None
    if not isinstance(name, str) or name not in DATASETS:
        close = did_you_mean(name, DATASETS) if isinstance(name, str) else ""
        raise _refusal("dataset", name, f"{close}use one of {', '.join(sorted(DATASETS))}")
    names = [f.name for f in fields(DATASETS[name][1]) if f.name not in ("seed", "size")]
    for key in config:
        _require(key in names, key, config[key], f"{name} takes {', '.join(names)}")
    try:
        return create_dataset(name, seed=seed, size=size, **config)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"{ID}: {name} does not take this configuration: {error}",
            where="args",
            fix=f"its defaults are {DATASETS[name][1]()}",
        ) from error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_require = partial(require_argument, ID, names_argument=True)
_refusal = partial(argument_refusal, ID, names_argument=True)
