"""The environment of a file of prompts or a data set: its splits and its rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minidistill.envs.jsonl.arguments import checked_columns, checked_source
from minidistill.envs.jsonl.lines import Line, is_int, read_lines, refusal
from minidistill.envs.outcomes import Attempt, Report, score_attempts
from minidistill.envs.protocol import check_ready
from minidistill.envs.rewards import RewardFunction, build
from minidistill.errors import UserError
from minidistill.types import Reward, Task

EVAL_SHARE = 10  # by default, one task in ten is held out


@dataclass(frozen=True, slots=True)
class JsonlEnv:
    """Prompts in two splits. `scoring` is made from `reward`; without it, there are no rewards."""

    train: Sequence[Line]
    eval: Sequence[Line]
    reward: object
    scoring: RewardFunction | None

    @property
    def has_rewards(self) -> bool:
        return self.scoring is not None

    @property
    def has_task(self) -> bool:
        """Whether the reward compares with an answer; what a function does is not known."""
        scoring = self.scoring
        return scoring is not None and bool(getattr(scoring, "has_task", scoring.needs_answer))

    @property
    def scores_in_process(self) -> bool:
        return self.scoring is None or self.scoring.scores_in_process

    @property
    def scorer(self) -> tuple[str, dict[str, Any]]:
        """What a process that scores has to load: the reward, without the prompts."""
        return "minidistill.envs.rewards:build", {"reward": self.reward}

    def score(self, task: Task, completion: str) -> Reward:
        """The completion's reward, 0 without a reward."""
        return Reward(0.0) if self.scoring is None else self.scoring.score(task, completion)

    def score_all(self, attempts: Sequence[Attempt], report: Report) -> None:
        """Score many completions at once."""
        score_attempts(self.scoring, attempts, report)

    def check_ready(self) -> None:
        """Raise UserError if the reward needs a server that is not reached."""
        check_ready(self.scoring)

    def close(self) -> None:
        """Stop scoring that is in progress."""
        if (close := getattr(self.scoring, "close", None)) is not None:
            close()


def load(
    path: str,
    eval_path: str | None = None,
    reward: str | dict[str, Any] | None = None,
    num_train_examples: int | None = None,
    num_eval_examples: int | None = None,
    seed: int = 0,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    context_column: str | None = None,
    split: str | None = None,
    eval_split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    delimiter: str | None = None,
    drop_reply: bool = False,
) -> JsonlEnv:
    """An environment from `path`: a file of rows, or a data set of Hugging Face `datasets`.

    Held-out tasks come from `eval_path` or `eval_split`, or else `num_eval_examples` of the rows
    are held out (by default a tenth, at least one). Both numbers are upper bounds, and `seed`
    decides which tasks are kept, whatever their order. Tasks with the same messages stay in one
    split; if every such group is too large, one whole group is held out. `reward` is a type of
    `minidistill.envs.rewards`, a table with a `type` and its arguments, "module:function", or
    "none". The other arguments say how rows are read: see `Source` and `Columns`. Raises UserError
    for a file or an argument it cannot use.
    """
    check_counts(num_train_examples, num_eval_examples, seed)
    source = checked_source("path", path, format, split, name, revision, delimiter)
    wanted = checked_columns(columns, context_column, drop_reply)
    places: dict[str, str] = {}
    lines = read_lines(source, wanted, places)
    eval_lines: list[Line] = []
    if eval_path is not None or eval_split is not None:
        argument = "path" if eval_path is None else "eval_path"
        place = path if eval_path is None else eval_path
        options: tuple[Any, ...] = (format, eval_split, name, revision, delimiter, "eval_split")
        held_out = checked_source(argument, place, *options)
        eval_lines = read_lines(held_out, wanted, places, prefix="eval/")
    scoring = _build_reward(reward, [*lines, *eval_lines])
    train, evaluation = in_splits(lines, eval_lines, path, seed, num_eval_examples)
    return JsonlEnv(train[:num_train_examples], evaluation, reward, scoring)


def read_dataset(path: str, args: dict[str, Any], what: str) -> list[Line]:
    """The rows of a data set, with those of `load`'s arguments that say how they are read."""
    reading = ("format", "split", "name", "revision", "delimiter")
    mapping = ("columns", "context_column", "drop_reply")
    for key in args:
        if key not in (*reading, *mapping):
            fix = f"use {', '.join((*reading, *mapping))}"
            raise UserError(f"{what} do not take {key!r}", f"args.{key}", fix)
    source = checked_source("path", path, **{k: args[k] for k in reading if k in args})
    columns = checked_columns(**{k: args[k] for k in mapping if k in args})
    return read_lines(source, columns, {})


# -- splitting ---------------------------------------------------------------------------------


def check_counts(num_train_examples: object, num_eval_examples: object, seed: object) -> None:
    """Raise UserError for numbers that cannot be used."""
    counts = {"num_train_examples": num_train_examples, "num_eval_examples": num_eval_examples}
    for argument, count in counts.items():
        if count is not None and (not isinstance(count, int) or not is_int(count) or count < 1):
            raise refusal(argument, count, "use a whole number above 0")
    if not is_int(seed):
        raise refusal("seed", seed, "use a whole number")


def in_splits(
    lines: Sequence[Line],
    eval_lines: Sequence[Line],
    path: str,
    seed: int,
    num_eval_examples: int | None,
) -> tuple[list[Line], list[Line]]:
    """Both splits, shuffled. Without `eval_lines`, some of `lines` are held out. Raises UserError
    if a prompt is in both, or none is left."""
    _refuse_shared_prompts(lines, eval_lines)
    train = _shuffled(lines, seed)
    if eval_lines:
        return train, _shuffled(eval_lines, seed)[:num_eval_examples]
    return _split(train, num_eval_examples, path)


def _shuffled(lines: Sequence[Line], seed: int) -> list[Line]:
    """In an order that depends on the seed and the messages, not on the file."""
    return sorted(
        lines, key=lambda line: hashlib.blake2b(f"{seed}/{prompt_key(line)}".encode()).digest()
    )


def prompt_key(task: Line) -> str:
    """Equal for tasks with the same messages."""
    return json.dumps([[m["role"], m["content"]] for m in task.messages])


def _split(lines: Sequence[Line], count: int | None, path: str) -> tuple[list[Line], list[Line]]:
    """Training and held-out tasks. At most `count` are held out; groups of equal messages stay
    together."""
    limit = max(1, len(lines) // EVAL_SHARE) if count is None else count
    groups: dict[str, list[Line]] = {}
    for task in lines:
        groups.setdefault(prompt_key(task), []).append(task)
    held_out: list[Line] = []
    for group in groups.values():
        if len(held_out) + len(group) <= limit:
            held_out += group
    # if every group is larger than the limit, hold out the smallest
    held_out = held_out or min(groups.values(), key=len)
    held_out_ids = {task.id for task in held_out}
    train = [task for task in lines if task.id not in held_out_ids]
    if not train:
        raise UserError(
            f"holding out {len(held_out)} of {len(lines)} tasks ({len(groups)} different "
            "prompts) leaves none to train on",
            where=path,
            fix="add prompts, lower num_eval_examples, or put held-out prompts into a file of "
            "their own and set eval_path",
        )
    return train, held_out


def _refuse_shared_prompts(train: Sequence[Line], held_out: Sequence[Line]) -> None:
    train_places = {prompt_key(task): task.place for task in reversed(train)}
    for task in held_out:
        if (place := train_places.get(prompt_key(task))) is not None:
            raise UserError(
                f"this held-out prompt is also a training prompt, at {place}",
                where=task.place,
                fix="remove one of the two lines",
            )


# -- rewards -----------------------------------------------------------------------------------


def _build_reward(reward: object, lines: Sequence[Line]) -> RewardFunction | None:
    """What scores the completions, None without a reward. Raises UserError if it cannot."""
    if reward is None or reward == "none":
        return None
    scoring = build(reward)
    name = reward["type"] if isinstance(reward, dict) else reward
    for line in lines:
        if scoring.needs_answer and line.answer is None:
            raise UserError(
                f'reward = "{name}" needs an `answer`, and this line has none',
                where=line.place,
                fix="add an answer to every line, or change `reward`",
            )
        try:
            scoring.check(line)
        except ValueError as error:
            raise UserError(
                f"the answer {error}",
                where=line.place,
                fix='fix the pattern, or use reward = "exact"',
            ) from None
    return scoring
