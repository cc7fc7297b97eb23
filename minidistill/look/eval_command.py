"""`minidistill eval`: scores of trained weights with intervals, as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minidistill.errors import EXIT_OK, UserError, printable
from minidistill.evaluation.intervals import MIN_TASKS
from minidistill.export.source import open_source
from minidistill.look.chat_command import describe
from minidistill.look.eval_settings import Asked, align
from minidistill.look.evaluation import evaluate
from minidistill.look.figures import Evaluation, Figure, Result
from minidistill.look.notes import notes_to_stderr
from minidistill.look.views import STUDENT
from minidistill.reporting.formatting import number, signed
from minidistill.reporting.terminal.json_events import events_alone
from minidistill.system.files import write_atomic


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    asked: Asked
    base: str | None = None
    context: str | None = None
    with_context: bool = False
    as_json: bool = False
    out: str | None = None


def run_evaluation(names: Sequence[str], options: Options) -> int:
    """Evaluate and print. Returns the exit code. Raises UserError."""
    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent}", "--out", "make it first")
    if out is not None and out.is_dir():
        raise UserError(f"{out} is a folder", "--out", "name a file in it")
    # what environments print is no part of the JSON
    output = events_alone() if options.as_json else contextlib.nullcontext(sys.stdout)
    with output as stream, notes_to_stderr():
        sources = [open_source(name, base=options.base, context=options.context) for name in names]
        for source in sources:
            if source.checkpoint is not None:
                print(printable(describe(source)), file=sys.stderr)
        aligned = align(sources, options.asked)
        evaluation = evaluate(aligned, names, with_context=options.with_context)
        text = json.dumps(as_data(evaluation), indent=2)
        if out is not None:
            write_atomic(out, text + "\n")
        if options.as_json:
            print(text, file=stream, flush=True)
        else:
            show(evaluation, Console(markup=False, emoji=False, highlight=False))
            sys.stdout.flush()
    return EXIT_OK


# -- JSON ------------------------------------------------------------------------------------------


def as_data(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation as JSON-able data. Differences are those from the first result."""
    first, *_ = evaluation.results
    return {
        "environments": {name: len(ids) for name, ids in evaluation.environments.items()},
        "tasks": sum(map(len, evaluation.environments.values())),
        "samples": evaluation.samples,
        "seed": evaluation.seed,
        "temperature": evaluation.temperature,
        "max_tokens": evaluation.max_tokens,
        "results": [_result(result, first) for result in evaluation.results],
    }


def _result(result: Result, first: Result) -> dict[str, Any]:
    difference, kl_difference = _difference(result, first)
    per_env = {name: _figure("score", figure) for name, figure in result.by_env.items()}
    return {
        "name": result.name,
        "view": result.view,
        **_figure("score", result.score),
        **_figure("difference", difference),
        **_figure("kl", result.kl),
        **_figure("kl_difference", kl_difference),
        "length": result.length,
        "per_env": per_env,
        "rewards": {name: list(values) for name, values in result.rewards.items()},
    }


def _figure(name: str, figure: Figure | None) -> dict[str, float | None]:
    interval = None if figure is None else figure.interval
    return {
        name: None if figure is None else figure.mean,
        f"{name}_low": None if interval is None else interval.low,
        f"{name}_high": None if interval is None else interval.high,
    }


def _difference(result: Result, first: Result) -> tuple[Figure | None, Figure | None]:
    """How far the score and the KL are from those of the first result, on the same tasks."""
    if result is first:
        return None, None
    pairs = (result.score, first.score), (result.kl, first.kl)
    score, kl = (None if a is None or b is None else a.minus(b) for a, b in pairs)
    return score, kl


# -- table -----------------------------------------------------------------------------------------


def show(evaluation: Evaluation, console: Console) -> None:
    """Print the table, and what it is of."""
    results = evaluation.results
    first = results[0]
    differences = [_difference(result, first) for result in results]
    names = _names(results)
    columns: list[tuple[str, list[str]]] = [("", names)]
    if any(result.score for result in results):
        columns.append(("score", [_shown(result.score) for result in results]))
    if any(score for score, _ in differences):
        columns.append(("difference", [_shown(score, sign=True) for score, _ in differences]))
    if any(result.kl for result in results):
        columns.append(("KL", [_shown(result.kl) for result in results]))
    if any(kl for _, kl in differences):
        columns.append(("KL difference", [_shown(kl, sign=True) for _, kl in differences]))
    columns.append(("tokens", [number(result.length) for result in results]))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, _ in columns:
        table.add_column(name, overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
    if len({env for result in results for env in result.by_env}) > 1:
        for name, result in zip(names, results, strict=True):
            scores = ", ".join(f"{env} {number(f.mean)}" for env, f in result.by_env.items())
            console.print(Text(printable(f"{name}: {scores}")))
    for line in _legend(evaluation, names):
        console.print(Text(printable(line), "dim"))


def _names(results: Sequence[Result]) -> list[str]:
    """What the rows are called: short if that tells them apart."""
    given = list(dict.fromkeys(result.name for result in results))
    if len(given) < 2:
        return [result.view for result in results]
    ends = [Path(name).name for name in given]
    short = dict(zip(given, ends if len(set(ends)) == len(ends) else given, strict=True))
    return [
        short[r.name] if r.view == STUDENT.name else f"{short[r.name]} ({r.view})" for r in results
    ]


def _shown(figure: Figure | None, *, sign: bool = False) -> str:
    if figure is None:
        return "–"
    write = signed if sign else number
    text = write(figure.mean)
    if figure.interval is None:
        return text
    return f"{text}\n{write(figure.interval.low)} to {write(figure.interval.high)}"


def _legend(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    tasks = sum(map(len, evaluation.environments.values()))
    each = f", {evaluation.samples} samples each" if evaluation.samples > 1 else ""
    intervals = "below each figure its 95% interval"
    if tasks < MIN_TASKS:
        intervals = f"fewer than {MIN_TASKS} tasks give no interval"
    lines = [
        f"{tasks} held-out tasks of {', '.join(evaluation.environments)}{each}, temperature "
        f"{evaluation.temperature:g}, at most {evaluation.max_tokens} tokens; {intervals}"
    ]
    if len(names) > 1:
        lines.append(f"differences are from {names[0]}, on the same tasks with the same seeds")
    if any(result.kl for result in evaluation.results):
        lines.append("KL: nats a token, to the base that reads the context, of held-out answers")
    return lines
