"""A configuration as a TOML document that people edit: short, and with comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import tomli
import tomli_w

from minidistill.config.toml import dotted, inline, to_toml
from minidistill.errors import printable

INLINE = ("args", "chat_template_kwargs")
"""Tables that are written on one line."""
_LAST = ("teacher_model", "env", "eval")
"""Of `[orchestrator]`: its long tables."""
_COMMENTS = {
    "max_steps": "optimizer steps",
    "seq_len": "longest context + prompt + completion, in tokens",
    "model.name": "a hub id, a folder, or a built-in model",
    "model.chat_template_kwargs": "answers without thinking first",
    "trainer.model.lora": "The adapter: a higher rank holds more.",
    "trainer.optim": "Lower lr if the KL jumps, raise it if it hardly falls.",
    "trainer.loss": "Weights of the reward, the teacher (distillation) and the student's entropy.",
    "orchestrator.batch_size": "completions in a step",
    "orchestrator.rollouts_per_example": "completions of each prompt",
    "orchestrator.sampling.max_tokens": "of a completion: long enough to show the behavior",
    "orchestrator.buffer.skip_verification": "no rewards in training",
    "orchestrator.teacher_model": "What the student should learn to do without reading it.",
    "orchestrator.teacher_model.eval_baseline": "score both roles first: is there a gap to close?",
    "orchestrator.eval": "Before and after training, on prompts that it is not trained on.",
    "orchestrator.eval.interval": "only before and after",
    "orchestrator.eval.env": "Questions that people ask. They ship with the package.",
}
_TRAINED_ON = {
    "self-prompts": "What it is trained on: prompts that the model writes itself.",
    "jsonl": "What it is trained on: your prompts.",
}


def commented(data: Mapping[str, Any], title: str) -> str:
    """The settings of a run as a document, with a comment where one helps."""
    orchestrator = data["orchestrator"]
    last = [key for key in _LAST if key in orchestrator]
    order = [key for key in orchestrator if key not in last] + last
    data = {**data, "orchestrator": {key: orchestrator[key] for key in order}}
    trained = _TRAINED_ON.get(str(orchestrator["env"][0].get("id")), "What it is trained on.")
    return document(data, title, {**_COMMENTS, "orchestrator.env": trained})


def document(data: Mapping[str, Any], title: str, comments: Mapping[str, str]) -> str:
    """`data` as TOML that reads back equal, below `title` as a comment.

    `comments` are those of tables and settings, by their dotted names without the numbers of lists.
    A table's is above it, a setting's on its line.
    """
    # a comment in TOML has no control characters, which a file's name may have
    head = [f"# {line}" if line else "" for line in printable(title).splitlines()]
    text = "\n".join([*head, *_table((), data, comments)]) + "\n"
    exact = to_toml(data)
    # what is odd (a context with "\r\n") is written as the configuration writes it
    return text if tomli.loads(text) == tomli.loads(exact) else "\n".join([*head, exact])


def _table(
    path: tuple[str, ...], table: Mapping[str, Any], comments: Mapping[str, str]
) -> Iterator[str]:
    """The lines of a table: its settings first, as TOML wants them, then the tables in it."""
    below = {key: value for key, value in table.items() if _is_table(key, value)}
    settings = {key: v for key, v in table.items() if key not in below and v is not None}
    for key, value in settings.items():
        comment = comments.get(".".join((*path, key)), "")
        yield from _setting(key, value, comment)
    for key, value in below.items():
        inner = (*path, key)
        for item in value if isinstance(value, list) else [value]:
            yield from _below(inner, item, comments, is_item=isinstance(value, list))


def _below(
    path: tuple[str, ...], table: Mapping[str, Any], comments: Mapping[str, str], *, is_item: bool
) -> Iterator[str]:
    has_settings = any(not _is_table(key, value) for key, value in table.items())
    if is_item or has_settings or not table:
        yield ""
        comment = comments.get(".".join(path), "")
        yield from (f"# {line}" for line in comment.splitlines())
        yield f"[[{dotted(path)}]]" if is_item else f"[{dotted(path)}]"
    yield from _table(path, table, comments)


def _setting(key: str, value: Any, comment: str) -> Iterator[str]:
    if isinstance(value, str) and "\n" in value:
        text = tomli_w.dumps({key: value}, multiline_strings=True).removesuffix("\n")
    else:
        text = f"{dotted((key,))} = {inline(value)}"
    yield f"{text:<35} # {comment}" if comment else text


def _is_table(key: str, value: Any) -> bool:
    if isinstance(value, Mapping):
        return key not in INLINE
    return isinstance(value, list) and bool(value) and all(isinstance(x, Mapping) for x in value)
