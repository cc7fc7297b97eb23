"""Data sets in every format: the same rows, splits and columns, and errors that name the row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from minidistill.envs import load_environment
from minidistill.envs.jsonl import JsonlEnv, Line
from minidistill.errors import EXIT_ENVIRONMENT, EXIT_USAGE, UserError

ROWS = [
    {"question": f'How many\n"cats" are {i}?', "solution": f"{i}, not more", "level": f"l{i % 2}"}
    for i in range(20)
]
COLUMNS = {"prompt": "question", "answer": "solution"}
SUFFIXES = {"json": "json", "jsonl": "jsonl", "csv": "csv", "tsv": "tsv", "parquet": "parquet"}


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(rows: list[dict[str, Any]], path: str) -> str:
    """A file, or a folder that `datasets` has saved, of rows with the same keys."""
    kind = Path(path).suffix[1:]
    if kind == "json":
        Path(path).write_text(json.dumps(rows, indent=1))
    elif kind == "jsonl":
        Path(path).write_text("\n".join(map(json.dumps, rows)))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        made(rows).save_to_disk(path)
    return path


def made(rows: list[dict[str, Any]]) -> Any:
    """A data set of `datasets`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    import pyarrow

    datasets.disable_progress_bars()
    return datasets.Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rows")


def load(path: str, **args: Any) -> JsonlEnv:
    env = load_environment("dataset", {"path": path, **args})
    assert isinstance(env, JsonlEnv)
    return env


def refusal(path: str, exit_code: int = EXIT_USAGE, **args: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, **args)
    assert caught.value.exit_code == exit_code
    assert caught.value.fix
    return caught.value


def content(tasks: Any) -> list[tuple[Any, ...]]:
    return [(task.messages, task.answer, task.context, task.data) for task in tasks]


@pytest.mark.parametrize("path", ["d.json", "d.csv", "d.tsv", "d.parquet", "saved"])
def test_each_format_gives_the_tasks_of_json_lines(path: str) -> None:
    lines = load(write(ROWS, "d.jsonl"), columns=COLUMNS, num_eval_examples=5)
    assert len(lines.train) == 15
    assert {task.data["level"] for task in lines.train} == {"l0", "l1"}
    other = load(write(ROWS, path), columns=COLUMNS, num_eval_examples=5)
    assert content(other.train) == content(lines.train)
    assert content(other.eval) == content(lines.eval)


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("d.json", "d.json, row 3"), ("d.jsonl", "d.jsonl:3"), ("d.csv", "d.csv:6"),
        ("d.tsv", "d.tsv:6"), ("d.parquet", "d.parquet, row 3"), ("saved", "saved, row 3"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_file(path: str, place: str) -> None:
    rows = [dict(row) for row in ROWS[:4]]
    rows[2]["question"] = " "
    error = refusal(write(rows, path), columns=COLUMNS)
    assert (error.what, error.where) == ("`question` is empty", place)


def test_numbers_are_answers_where_a_column_has_a_type() -> None:
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1, "id": i} for i in range(3)]
    assert "`answer` is 1, not text" in refusal(write(rows, "d.jsonl")).what
    env = load(write(rows, "d.parquet"))
    assert {(t.id, t.answer) for t in [*env.train, *env.eval]} == {
        (f"{i}", f"{i + 1}") for i in range(3)
    }


def test_messages_of_every_form() -> None:
    chat = [
        {"role": "user", "content": "a", "tool_calls": None},
        {"role": "assistant", "content": "b", "tool_calls": None},
    ]
    rows = [{"messages": chat}, {"messages": [{"role": "user", "content": "c"}]}]
    assert "drop_reply" in refusal(write(rows, "d.jsonl")).fix
    env = load("d.jsonl", drop_reply=True)
    first, second = sorted([*env.train, *env.eval], key=lambda task: task.id)
    assert first.messages == ({"role": "user", "content": "a"},)
    assert (first.answer, second.answer) == ("b", None)
    cells = [{"chat": json.dumps(row["messages"][:1])} for row in rows]
    env = load(write(cells, "d.csv"), columns={"messages": "chat"})
    assert {task.messages[-1]["content"] for task in [*env.train, *env.eval]} == {"a", "c"}
    # TRL's conversational prompts are lists of messages
    trl = [{"prompt": row["messages"][:1], "messages": "both are there"} for row in rows]
    env = load(write(trl, "d.jsonl"), columns={"prompt": "prompt"})
    assert {task.messages[-1]["content"] for task in [*env.train, *env.eval]} == {"a", "c"}


def test_a_context_is_taken_only_from_the_column_that_is_named() -> None:
    rows = [{"prompt": f"p{i}", "context": f"c{i}", "hint": ["x", f"y{i}"]} for i in range(4)]
    path = write(rows, "d.jsonl")
    assert {task.context for task in load(path).train} == {None}
    assert load(path).train[0].data.keys() == {"context", "hint"}
    for args in ({"context_column": "context"}, {"columns": {"context": "context"}}):
        task = load(path, **args).train[0]
        assert task.context == f"c{task.messages[0]['content'][1:]}"
        assert task.data.keys() == {"hint"}
    task = load(path, context_column="hint").train[0]
    assert task.context == f"x\n\ny{task.messages[0]['content'][1:]}"


def test_splits_of_a_saved_data_set() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    parts = {"train": ROWS[:12], "test": ROWS[12:], "again": ROWS[10:]}
    datasets.DatasetDict({k: made(v) for k, v in parts.items()}).save_to_disk("splits")
    env = load("splits", columns=COLUMNS, split="train", eval_split="test", num_eval_examples=6)
    assert (len(env.train), len(env.eval)) == (12, 6)
    assert env.eval[0].place.startswith("splits [test], row ")
    assert content(load("splits", columns=COLUMNS).train) != content(env.train)  # a part held out
    error = refusal("splits", columns=COLUMNS, eval_split="again")
    assert "also a training prompt, at splits, row 11" in error.what
    error = refusal("splits", columns=COLUMNS, split="train", eval_split="dev")
    assert (error.what, error.where) == ("splits has no split 'dev'", "args.eval_split")
    assert error.fix == "use one of train, test, again"
    error = refusal(write(ROWS, "saved"), columns=COLUMNS, split="test")
    assert error.where == "args.split"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a format": ({"format": "xml"}, "args.format"),
    "a column of another kind": ({"columns": {"text": "x"}}, "args.columns"),
    "no name": ({"columns": {"prompt": ""}}, "args.columns"),
    "a name twice": ({"columns": {"prompt": "a", "answer": "a"}}, "args.columns"),
    "both": ({"columns": {"prompt": "a", "messages": "b"}}, "args.columns"),
    "a column that is absent": ({"columns": {"prompt": "absent"}}, "d.csv:2"),
    "an answer that is absent": ({"columns": {"answer": "absent"}}, "d.csv"),
    "a context that is absent": ({"columns": {"context": "absent"}}, "d.csv:2"),
    "two contexts": ({"columns": {"context": "a"}, "context_column": "b"}, "args.context_column"),
    "a split of a file": ({"split": "train"}, "args.split"),
    "an eval split of a file": ({"eval_split": "test"}, "args.eval_split"),
    "a revision of a file": ({"revision": "main"}, "args.revision"),
    "a long delimiter": ({"delimiter": ";;"}, "args.delimiter"),
    "drop_reply": ({"drop_reply": 1}, "args.drop_reply"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_cannot_be_used_is_refused(name: str) -> None:
    args, where = REFUSED[name]
    assert refusal(write([{"prompt": "a"}, {"prompt": "b"}], "d.csv"), **args).where == where


@pytest.mark.parametrize("key", ["prompt", "context"])
def test_a_column_that_is_absent_is_named_beside_those_that_are_there(key: str) -> None:
    rows = [{"prompt": "a", "passage": "b"}, {"prompt": "c", "passage": "d"}]
    error = refusal(write(rows, "d.csv"), columns={key: "absent"})
    assert "no `absent`" in error.what
    assert error.fix.endswith("; it has prompt, passage")
    assert "{" not in error.fix, "a line of JSON, which a CSV file does not have"


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("prompt\na\n\nb,c\n", "2 cells, but the header has 1 columns", "d.csv:4"),
        ("prompt,prompt\na,b\n", "two columns are named 'prompt'", "d.csv:1"),
        ("prompt,\na,b\n", "a column has no name", "d.csv:1"),
        ('prompt\n"a\n', "not CSV", "d.csv:2"),
        ("prompt;answer\na;b\n", "neither `prompt` nor `messages`", "d.csv:2"),
        ("prompt,answer\n", "the file has no prompts", "d.csv"),
    ],
)
def test_a_damaged_csv_file_is_refused(text: str, what: str, where: str) -> None:
    Path("d.csv").write_text(text)
    error = refusal("d.csv")
    assert error.where == where
    assert what in error.what


def test_other_files_that_cannot_be_read() -> None:
    Path("d.json").write_text('[{"prompt": "a"},\n {"prompt": b}]')
    assert refusal("d.json").where == "d.json:2, column 13"
    Path("d.json").write_text('[{"prompt": "a"}, 3]')
    assert refusal("d.json").where == "d.json, row 2"
    assert 'format = "hub"' in refusal("owner/data").fix
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    Path("d.parquet").write_bytes(b"PAR1 is not enough")
    assert "cannot read d.parquet" in refusal("d.parquet").what


@pytest.mark.parametrize(
    ("path", "args", "package"),
    [("d.parquet", {}, "pyarrow"), ("o/d", {"format": "hub"}, "datasets")],
)
def test_a_missing_package_is_named_with_its_extra(
    path: str, args: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refusal(path, EXIT_ENVIRONMENT, **args)
    assert package in error.what
    assert "minidistill[datasets]" in error.fix


def test_json_lines_are_read_whatever_the_file_is_called() -> None:
    Path("prompts.json").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    env = load_environment("jsonl", {"path": "prompts.json"})
    assert {task.place for task in [*env.train, *env.eval]} == {"prompts.json:1", "prompts.json:2"}
    assert isinstance(env.train[0], Line)


def test_a_data_set_that_datasets_loads_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder stands for a repository of the hub: both are loaded by `load_dataset`."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("data").mkdir()
    write(ROWS[:4], "data/train.csv")
    write(ROWS[4:6], "data/test.csv")
    env = load("./data", format="hub", columns=COLUMNS, eval_split="test")
    assert {task.answer for task in env.train} == {row["solution"] for row in ROWS[:4]}
    assert {task.place for task in env.eval} == {f"./data [test], row {i}" for i in (1, 2)}
    assert refusal("./data", format="hub", columns=COLUMNS, split="dev").where == "args.path"
