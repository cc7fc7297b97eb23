"""The model card of what is exported: README.md, as the hub reads it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from minidistill import __version__
from minidistill.errors import printable
from minidistill.export.base import Base
from minidistill.export.check import Agreement
from minidistill.export.source import Source
from minidistill.export.usage import Usage
from minidistill.reporting.scoreboard_rows import scoreboard_rows, verdict

_CONTEXTS = ("context", "contexts", "examples")
_PLACES = ("output_dir", "wandb")
"""Settings of the machine that trained."""
_FROM_HERE = (
    "The base was a folder of the machine that trained. Run this in the folder of this README, "
    "with the base where the commands name it:"
)


def model_card(
    source: Source,
    base: Base,
    uses: Usage,
    agreements: Sequence[Agreement],
    *,
    merged: bool,
    quotes_context: bool,
) -> str:
    """The card's text, in Markdown with the hub's header."""
    kind = "model" if merged else "adapter"
    head = {
        **({"base_model": base.written} if base.on_hub else {}),  # the hub takes no paths there
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["minidistill", "context-distillation", *([] if merged else ["lora"])],
    }
    lines = ["---", *(_yaml(key, value) for key, value in head.items()), "---", ""]
    lines += [
        f"# {_line(source.run.resolve().name)}",
        "",
        f"This {kind} makes {_line(base.title)} behave as if it had read a context that is not in "
        "its prompt. It was trained by reverse-KL on-policy context distillation with "
        f"minidistill {__version__}: the student samples without the context, and the same model, "
        "reading the context, scores the sampled tokens.",
        "",
        "## Use",
        "",
        *([] if base.on_hub or merged else [_FROM_HERE, ""]),
        *(line for command in uses.commands for line in (*_code("bash", printable(command)), "")),
        *(line for note in uses.notes for line in (note, "")),
        "Leave the context out of the prompt. The tokenizer in this folder has the chat template "
        "of the training.",
        "",
        "## Results",
        "",
        *_results(source.board),
        "",
        "## Context",
        "",
        *_context(source, quotes=quotes_context),
        "",
        "## Settings",
        "",
        "```toml",
        printable(tomli_w.dumps(_settings(source))).strip(),
        "```",
        "",
        "## Checked when it was exported",
        "",
        "Log-probs of example texts, compared with the run's weights in float32:",
        "",
        "| program | KL (nats a token) | largest difference of a log-prob |",
        "|---|---|---|",
        *(f"| {a.program} | {a.kl:.2g} | {a.largest:.2g} |" for a in agreements),
        "",
        "## Limits",
        "",
        "What was measured holds for prompts like those of the training and the evaluation. The "
        "limits of the base model, and its license, apply.",
        "",
    ]
    return "\n".join(lines)


def _yaml(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value)}"  # JSON is YAML


def _results(board: Any) -> list[str]:
    if not board:
        return ["The run had not finished, so there is no final evaluation."]
    rows = scoreboard_rows(board)
    table = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return [printable(verdict(board)), "", "| | |", "|---|---|", *table]


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _context(source: Source, *, quotes: bool) -> list[str]:
    teacher = source.config.orchestrator.teacher_model
    text = teacher.context
    if not text:
        return ["Contexts of environments or rows, which are not part of the run's settings."]
    digest = hashlib.sha256(text.encode()).hexdigest()
    facts = f"{len(text)} characters, SHA-256 `{digest}`."
    if not quotes:
        return [facts]
    return [facts, "", *_code("text", printable(text).strip("\n"))]


def _code(language: str, text: str) -> list[str]:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return [f"{fence}{language}", text, fence]


def _line(text: str) -> str:
    return " ".join(printable(text).split())


def _settings(source: Source) -> dict[str, Any]:
    """What was set, without contexts and places on the machine that trained."""
    data = tomli.loads((source.run / "config.toml").read_text())

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in _CONTEXTS}
        if isinstance(value, list):
            return [clean(item) for item in value]
        path = os.path.expanduser(value) if isinstance(value, str) else ""
        return Path(path).name if os.path.isabs(path) and os.path.exists(path) else value

    cleaned: dict[str, Any] = clean({k: v for k, v in data.items() if k not in _PLACES})
    return cleaned
