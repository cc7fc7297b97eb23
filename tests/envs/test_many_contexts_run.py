"""Runs with many contexts and data sets of several formats, and their exact resumption."""

from __future__ import annotations

import csv
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.runs import board, records

from minidistill import cli
from minidistill.errors import EXIT_OK

TOML = """
max_steps = 4
seq_len = 192
[ckpt]
interval = 2
[trainer.scheduler]
type = "constant"
[trainer.loss]
adv_tau = 0.0
[orchestrator]
batch_size = 16
rollouts_per_example = 2
[orchestrator.sampling]
max_tokens = 8
[orchestrator.buffer]
skip_verification = true
[orchestrator.teacher_model]
context = "You are a world-class puzzle solver.\\n\\n"
[orchestrator.eval]
interval = 0
"""
TOPICS = ("cats", "dogs", "rivers", "wins", "pushes", "boxes", "walls", "goals")


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(count: int) -> list[dict[str, str]]:
    return [
        {
            "question": f"Tell me about {i} {TOPICS[i % 8]}.",
            "answer": f"It is {i}.",
            "hint": f"Think of {TOPICS[i % 8]} and of number {i}.",
        }
        for i in range(count)
    ]


def write(path: str, count: int = 24) -> None:
    if path.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("question", "answer", "hint"))
            writer.writeheader()
            writer.writerows(rows(count))
        return
    import pyarrow

    table = pyarrow.Table.from_pylist(rows(count))
    if path.endswith(".parquet"):
        from pyarrow import parquet

        parquet.write_table(table, path)
        return
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table, fingerprint="rows").save_to_disk(path)


def env(name: str, path: str, text: str = "", args: str = "") -> str:
    columns = 'columns = { prompt = "question", answer = "answer" }'
    args = f'path = "{path}", {columns}, num_eval_examples = 8{args}'
    table = f'[[orchestrator.env]]\nid = "dataset"\nname = "{name}"\n'
    return f"{table}args = {{ {args} }}\n{text}\n"


def run(name: str, *tables: str, flags: tuple[str, ...] = ()) -> int:
    Path("own.toml").write_text(TOML + "".join(tables))
    return cli.main(["run", "own.toml", "--output_dir", name, *flags])


def rollouts(name: str, step: int) -> str:
    return Path(name, "rollouts", f"step_{step:06d}.jsonl").read_text()


def context(rollout: dict[str, Any]) -> str:
    """What the teacher reads before the question."""
    text = str(rollout["teacher_prompt_text"])
    return text.removeprefix("<|user|>").partition(rollout["messages"][0]["content"])[0]


CHOICES = {"drawn/a": ("Be brief. ", 1), "drawn/b": ("Be a poet. ", 3)}
ENVIRONMENTS = (
    ("rows", 'context = "Before you answer: {context}\\n\\n"\nweight = 2'),
    (
        "drawn",
        "weight = 2\n"
        + "".join(
            f'[[orchestrator.env.contexts]]\nname = "{name[-1]}"\ncontext = "{text}"\n'
            f"weight = {weight}\n"
            for name, (text, weight) in CHOICES.items()
        ),
    ),
    (
        "shown",
        'weight = 1\n[orchestrator.env.examples]\npath = "rows.csv"\nk = 2\n'
        'args = { columns = { prompt = "question" } }\n',
    ),
)
EXTRA = all(map(find_spec, ("pyarrow", "datasets")))  # or else tests/envs/test_dataset.py skips
FILES = ("rows.csv", "rows.parquet", "saved") if EXTRA else ("rows.csv",) * 3


def test_many_contexts_and_their_exact_resumption() -> None:
    for file in FILES:
        write(file)
    hinted = {"rows": ', context_column = "hint"'}
    tables = [
        env(name, file, text, hinted.get(name, ""))
        for (name, text), file in zip(ENVIRONMENTS, FILES, strict=True)
    ]
    assert run("whole", *tables) == EXIT_OK
    assert run("parts", *tables, flags=("--max_steps", "2")) == EXIT_OK
    assert run("parts", *tables, flags=("--resume",)) == EXIT_OK
    assert records(Path("parts")) == records(Path("whole"))
    assert board(Path("parts")) == board(Path("whole"))
    steps = [rollouts("whole", step) for step in range(1, 5)]
    assert [rollouts("parts", step) for step in range(1, 5)] == steps
    found = [json.loads(line) for step in steps for line in step.splitlines()]
    assert len(found) == 64
    check_contexts(found)
    check_metrics(records(Path("whole"))[1:5])
    check_scoreboard(board(Path("whole")))
    facts = json.loads(Path("whole/env.json").read_text())
    text = f"{board(Path('whole'))['contexts']} different ones, drawn for each prompt and step"
    assert ["contexts", text] in facts["header"]


def check_contexts(found: list[dict[str, Any]]) -> None:
    hints = {row["question"]: row["hint"] for row in rows(24)}
    examples = {f"{row['question']}\n{row['answer']}\n\n": row["question"] for row in rows(24)}
    for rollout in found:
        question, text = rollout["messages"][0]["content"], context(rollout)
        assert rollout["prompt_text"] == f"<|user|>{question}<|end|><|assistant|>"
        assert rollout["teacher_prompt_text"] == f"<|user|>{text}{question}<|end|><|assistant|>"
        if rollout["env"] == "rows":
            assert text == f"Before you answer: {hints[question]}\n\n"
            assert rollout["context"] == f"rows/{rollout['task_id']}"
        elif rollout["env"] == "drawn":
            assert text == CHOICES[rollout["context"]][0]
        else:
            parts = text.removeprefix("You are a world-class puzzle solver.\n\n")
            shown = {examples[f"{part}\n\n"] for part in parts.split("\n\n")[:-1]}
            assert len(shown - {question}) == 2
    counts = Counter(rollout["env"] for rollout in found)
    assert {name: round(count / 64 * 5) for name, count in counts.items()} == {
        "rows": 2,
        "drawn": 2,
        "shown": 1,
    }
    drawn = Counter(rollout["context"] for rollout in found if rollout["env"] == "drawn")
    assert drawn["drawn/b"] > drawn["drawn/a"] > 0


def check_metrics(steps: list[dict[str, Any]]) -> None:
    """Those of the groups are parts of those of the step."""
    for record in steps:
        for kind in ("env", "context"):
            names = [key[: -len("/rollouts")] for key in record if key.endswith("/rollouts")]
            groups = [name for name in names if name.startswith(f"{kind}/")]
            sizes = [record[f"{group}/rollouts"] for group in groups]
            assert sum(sizes) == 16
            lengths = [record[f"{group}/completions/length_mean"] for group in groups]
            mean = sum(size * length for size, length in zip(sizes, lengths, strict=True)) / 16
            assert mean == pytest.approx(record["completions/length_mean"])
            assert all(record[f"{group}/teacher_kl"] > 0 for group in groups)


def check_scoreboard(scores: dict[str, Any]) -> None:
    # a hint for each of 24 rows, two that are drawn, and examples, which may be equal by chance
    assert 24 + 2 + 12 < scores["contexts"] <= 24 + 2 + 24
    assert 8 + 1 + 4 < scores["contexts_evaluated"] <= 8 + 2 + 8
    worst = scores["worst_context"]
    assert worst["heldout_kl_after"] >= scores["heldout_kl_after"]
    assert worst["heldout_kl_before"] > 0
    per_env = scores["heldout_kl_per_env"]
    assert list(per_env) == ["rows", "drawn", "shown"]
    assert {figures["heldout_kl_prompts"] for figures in per_env.values()} == {8}
    by_env = [figures["heldout_kl_after"] for figures in per_env.values()]
    assert min(by_env) <= scores["heldout_kl_after"] <= max(by_env)
