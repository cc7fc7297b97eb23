"""Contexts in the configuration: one or several, and examples from a data set."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from minidistill.config.base import Positive, PositiveFloat, Table, Text


class ContextConfig(Table):
    """Several contexts, of which each prompt gets one in each step, by the weights."""

    context: str = ""
    """The text. This or `context_file` is required."""
    context_file: Text | None = None
    """A text file with it, relative to the TOML file that names it."""
    name: Text | None = None
    """A unique name in the metrics and the records; by default its number."""
    weight: PositiveFloat = 1.0
    """How often it is drawn, in proportion to the others."""


class ExamplesConfig(Table):
    """Examples from a data set, which the teacher reads before the prompt. They stand where
    `{examples}` is in the context, or else at its end."""

    path: Text
    """A file or a data set with prompts and answers, as for the environment `dataset`."""
    k: Positive = 4
    """Examples in a context."""
    seed: int = 0
    """Which examples are drawn."""
    per_prompt: bool = True
    """Whether each prompt has examples of its own, the same in every step. Otherwise all have the
    same ones. In neither case does a prompt see its own row, or one of a held-out prompt."""
    template: Text = "{prompt}\n{answer}\n\n"
    """An example's text."""
    args: dict[str, Any] = Field(default={})
    """How its rows are read: `format`, `columns`, `split` and so on, as for `dataset`."""
