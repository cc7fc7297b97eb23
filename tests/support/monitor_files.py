"""Reads what the real packages of the monitors have written on disk."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> list[Any]:
    """The records of an offline file of a run that has ended. The package writes it in a process
    of its own."""
    deadline = time.monotonic() + 30
    while True:
        records = list(_wandb_records(path))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, "the run has not ended"
        time.sleep(0.05)


def _wandb_records(path: Path) -> Iterator[Any]:
    """A header of 7 bytes, then LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    new_record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]
    data, position, payload = path.read_bytes(), 7, b""
    block = 32768
    while position + 7 <= len(data):
        remaining = block - position % block
        if remaining < 7:
            position += remaining
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        payload += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            record = new_record()
            record.ParseFromString(payload)
            yield record
            payload = b""


def wandb_items(entries: Any) -> dict[str, Any]:
    return {e.key or "/".join(e.nested_key): json.loads(e.value_json) for e in entries}


def tensorboard_data(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, str]]]:
    """The scalars and texts that TensorBoard shows of a folder, by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {t: {e.step: e.value for e in events.Scalars(t)} for t in tags["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): {
            e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)
        }
        for tag in tags["tensors"]
    }
    return scalars, texts


def trackio_rows(folder: Path, project: str) -> list[tuple[str, int, dict[str, Any]]]:
    """(run, step, metrics) of each record of a project, in order."""
    [path] = folder.glob(f"{project}*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()
    return [(run, step, json.loads(metrics)) for run, step, metrics in rows]
