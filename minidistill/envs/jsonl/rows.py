"""Rows of data sets: JSON Lines, JSON, CSV, parquet, and data sets of Hugging Face `datasets`.

Every format gives the same rows, so what is made of them does not depend on the format.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidistill.errors import EXIT_ENVIRONMENT, UserError
from minidistill.system.files import InvalidJsonError, parse_json, read_text
from minidistill.system.foreign import describe, foreign_code

LINE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
ENDINGS = {".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
"""The format of a file's name; that of all others is `jsonl`."""
FORMATS = ("jsonl", *ENDINGS.values(), "text", "saved", "hub")
"""`text` has one prompt a line, `saved` is a folder that `save_to_disk` has written, `hub` a data
set by its name."""
WITH_SPLITS = ("saved", "hub")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes
_LONGEST_CELL = 1 << 30  # characters; `csv` allows 131,072 by default


@dataclass(frozen=True, slots=True)
class Row:
    """One row, before it is known whether it has a prompt."""

    values: dict[str, Any]
    place: str
    """file:line, or the file and the row's number from 1."""
    number: str
    """Of the row or line, the id of a task that has none."""
    typed: bool = False
    """A column has a type, so that a number in it is no slip."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows are, as arguments of the environment say it."""

    argument: str
    """The one that has the path."""
    path: str
    format: str = "auto"
    split: str | None = None
    name: str | None = None
    """Of a configuration of a data set of the hub."""
    revision: str | None = None
    delimiter: str | None = None
    """Of a CSV file: "," by default."""
    split_argument: str = "split"
    """The argument that has the split."""

    @property
    def where(self) -> str:
        return f"args.{self.argument}"

    @property
    def file(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def kind(self) -> str:
        """The format, found by the path if it is "auto"."""
        if self.format != "auto":
            return self.format
        file = self.file
        if any((file / name).is_file() for name in _SAVED):
            return "saved"
        return ENDINGS.get(file.suffix.lower(), "jsonl")


def read_rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in order. Raises UserError for what cannot be read."""
    kind = source.kind
    if kind in ("csv", "tsv"):
        return _csv_rows(source, source.delimiter or ("\t" if kind == "tsv" else ","))
    if kind == "parquet":
        return _numbered(_parquet_values(source), source.path)
    if kind in WITH_SPLITS:
        return _dataset_rows(source)
    text = _text(source)
    if kind == "text":
        return _text_rows(text, source.path)
    if kind == "json" and text.lstrip().startswith("["):
        return _json_rows(text, source.path)
    return _line_rows(text, source.path)


def _text(source: Source) -> str:
    argument, path = source.argument, source.path
    fix = f"{argument} = {path!r} is relative to the current directory, {Path.cwd()}"
    if path.count("/") == 1 and not source.file.suffix:
        fix += '; format = "hub" reads a data set of that name from the Hugging Face hub'
    return read_text(source.file, where=source.where, fix=fix)


def _line_rows(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            values = parse_json(line)
        except InvalidJsonError as error:
            where = f"{place}, column {error.column}" if error.column else place
            raise UserError(f"not JSON: {error}", where, f"write a line as {LINE}") from None
        if not isinstance(values, dict):
            raise UserError("not a JSON object", place, f"write a line as {LINE}")
        yield Row(values, place, str(number))


def _text_rows(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if prompt := line.strip():
            yield Row({"prompt": prompt}, f"{path}:{number}", str(number))


def _json_rows(text: str, path: str) -> Iterator[Row]:
    try:
        rows = parse_json(text)
    except InvalidJsonError as error:
        where = f"{path}:{error.line}, column {error.column}" if error.line else path
        raise UserError(f"not JSON: {error}", where, "correct the file there") from None
    for number, values in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        if not isinstance(values, dict):
            raise UserError("not a JSON object", place, f"write a row as {LINE}")
        yield Row(values, place, str(number))


def _csv_rows(source: Source, delimiter: str) -> Iterator[Row]:
    """An empty cell is None. A row is placed at its first line."""
    path, lines = source.path, io.StringIO(_text(source), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        while True:
            place = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                fix = 'put a text with quotation marks or line breaks between ", and double its "'
                raise UserError(f"not CSV: {error}", place, fix) from None
            if cells is None:
                return
            if not any(cells):
                continue
            if columns is None:
                columns = _checked_header(cells, place)
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{len(cells)} cells, but the header has {len(columns)} columns",
                    place,
                    f"correct the row; the columns are {', '.join(columns)}, and the delimiter is "
                    f"{delimiter!r}",
                )
            values = {name: cell or None for name, cell in zip(columns, cells, strict=True)}
            yield Row(values, place, place.rpartition(":")[2])
    finally:
        csv.field_size_limit(limit)


def _checked_header(names: Sequence[str], place: str) -> list[str]:
    columns = [name.strip() for name in names]
    for name in columns:
        if not name or columns.count(name) > 1:
            what = "a column has no name" if not name else f"two columns are named {name!r}"
            fix = "the first row has the columns' names, each another one"
            raise UserError(what, place, fix)
    return columns


def _numbered(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for number, values in enumerate(rows, start=1):
        yield Row(values, f"{name}, row {number}", str(number), typed=True)


def _parquet_values(source: Source) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise _missing("pyarrow", "a parquet file", source) from None
    with _reading(source), parquet.ParquetFile(source.file) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _dataset_rows(source: Source) -> Iterator[Row]:
    """The rows of one split of a data set that `datasets` loads."""
    try:
        import datasets
    except ImportError:
        raise _missing("datasets", "this data set", source) from None
    datasets.disable_progress_bars()
    with _reading(source):
        if source.kind == "saved":
            loaded = datasets.load_from_disk(str(source.file))
        else:
            split = source.split or "train"
            loaded = datasets.load_dataset(
                source.path, source.name, split=split, revision=source.revision
            )
    if isinstance(loaded, dict):
        loaded = _split(loaded, source)
    elif source.kind == "saved" and source.split is not None:
        key = source.split_argument
        what = f"{source.path} has no splits, but {key} = {source.split!r}"
        raise UserError(what, f"args.{key}", f"leave out {key}")
    name = source.path if source.split is None else f"{source.path} [{source.split}]"
    with _reading(source):
        yield from _numbered(loaded.with_format(None), name)


def _split(splits: dict[str, Any], source: Source) -> Any:
    wanted = source.split or ("train" if "train" in splits else None)
    if wanted is None and len(splits) == 1:
        return next(iter(splits.values()))
    if wanted not in splits:
        key = source.split_argument
        what = f"{source.path} has no split {wanted!r}" if wanted else f"{key} is not set"
        fix = f"use one of {', '.join(splits)}"
        raise UserError(what, f"args.{key}", fix)
    return splits[wanted]


def _missing(package: str, what: str, source: Source) -> UserError:
    return UserError(
        f"reading {what} needs the package {package}",
        where=source.where,
        fix="pip install 'minidistill[datasets]', or convert it to JSON Lines or CSV",
        exit_code=EXIT_ENVIRONMENT,
    )


def _reading(source: Source) -> Any:
    def failure(error: BaseException) -> UserError:
        return UserError(
            f"cannot read {source.path}: {describe(error)}",
            where=source.where,
            fix=f"check the path, the format ({source.kind}) and the split",
        )

    return foreign_code(failure, ours=(UserError, GeneratorExit))
