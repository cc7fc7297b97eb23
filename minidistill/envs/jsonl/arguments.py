"""Checks of the arguments that say how rows are read."""

from __future__ import annotations

from typing import Any

from minidistill.envs.jsonl.lines import KEYS, Columns, refusal
from minidistill.envs.jsonl.rows import FORMATS, WITH_SPLITS, Source


def checked_source(
    argument: str,
    path: object,
    format: object = "auto",
    split: object = None,
    name: object = None,
    revision: object = None,
    delimiter: object = None,
    split_argument: str = "split",
) -> Source:
    """The source of these arguments. Raises UserError for one that cannot be used."""
    if not isinstance(path, str) or not path:
        raise refusal(argument, path, "give the path of a file")
    if format not in ("auto", *FORMATS) or not isinstance(format, str):
        raise refusal("format", format, f"use one of auto, {', '.join(FORMATS)}")
    source = Source(argument, path, format)
    needs = {
        "split": (WITH_SPLITS, "is for a data set that has splits"),
        "name": (("hub",), 'is for a data set of the hub (format = "hub")'),
        "revision": (("hub",), 'is for a data set of the hub (format = "hub")'),
        "delimiter": (("csv", "tsv"), "is for a CSV file"),
    }
    texts: dict[str, Any] = {}
    given = {"split": split, "name": name, "revision": revision, "delimiter": delimiter}
    for key, value in given.items():
        shown = split_argument if key == "split" else key
        if value is not None and (not isinstance(value, str) or not value):
            raise refusal(shown, value, "give a text that is not empty")
        kinds, what = needs[key]
        if value is not None and source.kind not in kinds:
            raise refusal(shown, value, f"leave it out: it {what}, and {path} is {source.kind}")
        texts[key] = value
    if isinstance(delimiter, str) and len(delimiter) != 1:
        raise refusal("delimiter", delimiter, "use one character")
    return Source(argument, path, format, **texts, split_argument=split_argument)


def checked_columns(
    columns: object = None, context_column: object = None, drop_reply: object = False
) -> Columns:
    """The columns of these arguments. Raises UserError for one that cannot be used."""
    keys = (*KEYS, "context")
    columns = {} if columns is None else columns
    if not isinstance(columns, dict) or not all(
        key in keys and isinstance(name, str) and name for key, name in columns.items()
    ):
        fix = f"give a table of {', '.join(keys)}, each the name of a column"
        raise refusal("columns", columns, fix)
    if {"prompt", "messages"} <= columns.keys():
        raise refusal("columns", columns, "name the column of `prompt` or of `messages`, not both")
    if context_column is not None:
        if not isinstance(context_column, str) or not context_column or "context" in columns:
            fix = "name a column, here or as columns.context"
            raise refusal("context_column", context_column, fix)
        columns = columns | {"context": context_column}
    twice = [name for name in columns.values() if list(columns.values()).count(name) > 1]
    if twice:
        raise refusal("columns", columns, f"{twice[0]!r} is there twice: name each column once")
    if not isinstance(drop_reply, bool):
        raise refusal("drop_reply", drop_reply, "use true or false")
    return Columns(columns, drop_reply)
