"""The files of a run that others may have changed: its records, checkpoints and adapters."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from minidistill import cli
from minidistill.config import load_config
from minidistill.errors import EXIT_OK
from tools.soak import mutate
from tools.soak.commands import SMALL, run_arguments

RECORDS = (
    "metrics.jsonl", "env.json", "baseline.json", "scoreboard.json", "config.resolved.json",
    "config.toml", "rollouts/step_000001.jsonl", "rollouts/step_000004.safetensors",
)  # fmt: skip
CHECKPOINT = ("MANIFEST.json", "state.json", "state.safetensors", "../latest")


def run_targets(folder: Path) -> list[Any]:
    from tools.soak.targets import Target

    run = FinishedRun(folder / "run")
    return [
        Target(t.name, t.make, t.run, run.prepare)
        for t in (Records(run), Checkpoints(run), Adapters(run))
    ]


class FinishedRun:
    """A small run in a folder, a copy of it to change, and a trainer to restore it into."""

    def __init__(self, path: Path) -> None:
        self.original, self.copy = path, path.with_name("copy")

    def prepare(self) -> None:
        if self.original.exists():
            return
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(run_arguments(self.original, SMALL, resume=False))
        assert code == EXIT_OK, f"the run for the soak failed with exit code {code}"
        shutil.copytree(self.original, self.copy)
        assert self.trainer is not None

    @cached_property
    def loaded(self) -> Any:
        return load_config(run_arguments(self.copy, SMALL, resume=False)[1:])

    @cached_property
    def trainer(self) -> Any:
        from minidistill.models.hub import load_tokenizer
        from minidistill.placement.machine import GIB, Machine
        from minidistill.placement.planner import plan_run
        from minidistill.trainer.build import build_trainer
        from minidistill.trainer.distributed.rank_group import RankGroup
        from minidistill.trainer.forward import PrefixCache
        from minidistill.trainer.loading import load_policy

        config = self.loaded.config
        machine = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
        placement = plan_run(self.loaded, machine).placement
        policy = load_policy(config, load_tokenizer(config), placement)
        return build_trainer(policy, config, placement, RankGroup(), PrefixCache(policy, False))

    def hostile(self, random: Random, file: str, source: Path) -> dict[str, str]:
        """A changed file of the run, as JSON if it is JSON."""
        data = source.read_bytes()
        if file.endswith(".json") and random.random() < 0.7:
            changed = mutate.change(random, json.loads(data))
            data = mutate.encode(mutate.as_json(random, changed))
        elif file.endswith(".jsonl") and random.random() < 0.7:
            lines = data.splitlines()
            index = random.randrange(len(lines))
            row = mutate.change(random, json.loads(lines[index]))
            lines[index] = mutate.encode(mutate.as_json(random, row))
            data = b"\n".join(lines) + b"\n"
        else:
            data = mutate.damage(random, data)
        return {"file": file, "data": data.decode("latin-1")}

    @contextlib.contextmanager
    def changed(self, file: str, data: bytes) -> Any:
        """The copy with another content of one file, for a while."""
        path = self.copy / file
        before = path.read_bytes()
        path.write_bytes(data)
        try:
            yield self.copy
        finally:
            path.write_bytes(before)


class Records:
    """A finished run's records: its report is made, and it is resumed."""

    name = "records"

    def __init__(self, run: FinishedRun) -> None:
        self.finished = run

    def make(self, random: Random) -> dict[str, str]:
        file = random.choice(RECORDS)
        return self.finished.hostile(random, file, self.finished.original / file)

    def run(self, value: dict[str, str]) -> None:
        from minidistill.driver.resume import is_extended
        from minidistill.reporting.html import write_report
        from minidistill.reporting.run_directory import RunDirectory

        with self.finished.changed(value["file"], value["data"].encode("latin-1")) as path:
            write_report(path)
            directory = RunDirectory(path)
            is_extended(self.finished.loaded, directory)
            _read_records(directory)


def _read_records(directory: Any) -> None:
    """What a resumed run reads. Other users of the records may be added here."""
    directory.check_same_tasks("x" * 8) if directory.read("env.json") is None else None
    directory.began()
    directory.column("teacher_kl")
    directory.has(2, "teacher_kl")
    directory.read("baseline.json")
    directory.read("scoreboard.json")


class Checkpoints:
    """A checkpoint's manifest, state and tensors, also with checksums that fit."""

    name = "checkpoint"

    def __init__(self, run: FinishedRun) -> None:
        self.finished = run

    @property
    def newest(self) -> str:
        return "checkpoints/step_000004"

    def make(self, random: Random) -> dict[str, str]:
        file = f"{self.newest}/{random.choice(CHECKPOINT)}"
        value = self.finished.hostile(random, file, self.finished.original / file)
        return value | {"sealed": "yes" if random.random() < 0.5 else ""}

    def run(self, value: dict[str, str]) -> None:
        from minidistill.trainer import checkpoint

        data, file = value["data"].encode("latin-1"), value["file"]
        logger = logging.getLogger("minidistill")
        with contextlib.ExitStack() as stack:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
            root = stack.enter_context(self.finished.changed(file, data)) / "checkpoints"
            if value["sealed"] and "state" in file:
                manifest = f"{self.newest}/MANIFEST.json"
                content = json.loads((self.finished.original / manifest).read_bytes())
                _seal(content, Path(file).name, data)
                sealed = json.dumps(content).encode()
                stack.enter_context(self.finished.changed(manifest, sealed))
            checkpoint.restore(self.finished.trainer, root)


def _seal(manifest: Any, name: str, data: bytes) -> None:
    """Put a file's checksum, and its size where there is one, into a manifest."""
    digest = hashlib.sha256(data).hexdigest()
    for table in manifest.values():
        if isinstance(table, dict) and name in table:
            known = table[name]
            table[name] = digest if isinstance(known, str) else len(data)


class Adapters:
    """The configuration of an adapter that a run starts from."""

    name = "adapter"

    def __init__(self, run: FinishedRun) -> None:
        self.finished = run

    def make(self, random: Random) -> dict[str, str]:
        file = "adapter/adapter_config.json"
        source = self.finished.original / file
        if random.random() < 0.1:
            file, source = "checkpoints/latest", self.finished.original / "checkpoints" / "latest"
        return self.finished.hostile(random, file, source)

    def run(self, value: dict[str, str]) -> None:
        from minidistill.placement.machine import GIB, Machine
        from minidistill.placement.planner import plan_run

        with self.finished.changed(value["file"], value["data"].encode("latin-1")) as path:
            start = (
                path / "adapter"
                if value["file"].startswith("adapter")
                else path / "checkpoints" / ".."
            )
            loaded = load_config(
                run_arguments(
                    path, (*SMALL, "--trainer.model.lora.init", str(start)), resume=False
                )[1:]
            )
            machine = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)
            plan_run(loaded, machine)
