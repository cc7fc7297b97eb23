"""Runs the same configuration in two checkouts and compares the results, number by number.

    python tools/compare_checkouts.py BEFORE AFTER [--steps 20] [--vllm] [-- --key VALUE ...]

BEFORE and AFTER are checkouts of this repository, or the directories of finished runs. Use it
after a change that must not alter what a run computes.

Compared are metrics.jsonl (without `time/` and `perf/`), scoreboard.json (without `seconds`), the
files in rollouts/, and the adapter. On the embedded engine every value must be the same, bit for
bit. With `--vllm`, floating-point numbers may differ by `--tolerance`; everything else, sampled
token ids included, must still be the same. Exit code 0 if the runs agree, 1 if they do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

IGNORED_METRICS = ("time/", "perf/")
SHOWN = 10  # differences printed for each file


@dataclass
class Comparison:
    """How one file of a run differs from the same file of the other run."""

    file: str
    tolerance: float = 0.0
    values: int = 0
    """Scalars compared."""
    max_difference: float = 0.0
    """Largest absolute difference between two numbers."""
    differences: list[str] = field(default_factory=list)
    added: set[str] = field(default_factory=set)
    """Keys that only the second run has."""

    def compare_json(self, before: Any, after: Any, key: str = "", place: str = "") -> None:
        """Compare two JSON values. `key` is the path without list indices, `place` the full one."""
        if isinstance(before, dict) and isinstance(after, dict):
            self.added |= {_join(key, name) for name in after.keys() - before.keys()}
            for name, value in before.items():
                if name in after:
                    self.compare_json(value, after[name], _join(key, name), _join(place, name))
                else:
                    self.differences.append(f"{_join(place, name)}: missing")
        elif isinstance(before, list) and isinstance(after, list):
            if len(before) != len(after):
                self.differences.append(f"{place}: {len(before)} items, then {len(after)}")
            for index, (old, new) in enumerate(zip(before, after, strict=False)):
                self.compare_json(old, new, key, f"{place}[{index}]")
        else:
            self._compare_scalars(before, after, place)

    def _compare_scalars(self, before: Any, after: Any, place: str) -> None:
        self.values += 1
        if type(before) is float and type(after) is float and math.isfinite(before + after):
            difference = abs(before - after)
            self.max_difference = max(self.max_difference, difference)
            if 0 < difference <= self.tolerance:
                return
        # the text of a scalar tells 0 from 0.0 and from -0.0, and NaN equals NaN
        if repr(before) != repr(after):
            self.differences.append(f"{place}: {before!r}, then {after!r}")

    def compare_tensor(self, before: np.ndarray, after: np.ndarray, name: str) -> None:
        kinds = [f"{array.dtype}{list(array.shape)}" for array in (before, after)]
        if kinds[0] != kinds[1]:
            self.differences.append(f"{name}: {kinds[0]}, then {kinds[1]}")
            return
        self.values += before.size
        if before.tobytes() == after.tobytes():
            return
        old, new = before.astype(np.float64), after.astype(np.float64)
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        difference = np.where(same, 0.0, np.abs(old - new))
        furthest = float(np.nan_to_num(difference, nan=np.inf).max())
        self.max_difference = max(self.max_difference, furthest)
        floating = np.issubdtype(before.dtype, np.floating)
        if not (floating and self.tolerance and furthest <= self.tolerance):
            count = f"{int((~same).sum())} of {before.size} values differ"
            self.differences.append(f"{name}: {count}, by up to {furthest:.3g}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def compare_runs(before: Path, after: Path, tolerance: float = 0.0) -> list[Comparison]:
    """Compare two run directories file by file; a file that only one of them has differs."""
    comparisons = []
    for name in sorted({*_files(before), *_files(after)}):
        comparison = Comparison(name, tolerance)
        comparisons.append(comparison)
        missing = [run for run in (before, after) if not (run / name).is_file()]
        if missing:
            comparison.differences += [f"missing in {run}" for run in missing]
        elif name.endswith(".safetensors"):
            _compare_safetensors(comparison, before / name, after / name)
        else:
            comparison.compare_json(_read_json(before / name), _read_json(after / name))
    return comparisons


def _files(run: Path) -> Iterator[str]:
    yield from ("metrics.jsonl", "scoreboard.json", "adapter/adapter_model.safetensors")
    for pattern in ("rollouts/*.jsonl", "rollouts/*.safetensors"):
        yield from (path.relative_to(run).as_posix() for path in run.glob(pattern))


def _read_json(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.name == "scoreboard.json":
        return {key: value for key, value in json.loads(text).items() if key != "seconds"}
    lines = [json.loads(line) for line in text.splitlines()]
    if path.name != "metrics.jsonl":
        return lines
    return [
        {key: value for key, value in line.items() if not key.startswith(IGNORED_METRICS)}
        for line in lines
    ]


def _compare_safetensors(comparison: Comparison, before: Path, after: Path) -> None:
    with safe_open(before, framework="np") as old, safe_open(after, framework="np") as new:
        names = set(new.keys())
        comparison.added |= names - set(old.keys())
        for name in old.keys():  # noqa: SIM118 - not a mapping
            if name in names:
                comparison.compare_tensor(old.get_tensor(name), new.get_tensor(name), name)
            else:
                comparison.differences.append(f"{name}: missing")


def finished_run(source: Path, label: str, folder: Path, command: Sequence[str]) -> Path:
    """`source` itself if it is a run directory, else a new run of the checkout `source`."""
    if (source / "metrics.jsonl").is_file():
        return source
    source, output = source.resolve(), folder / label
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (source, source / "kernels"))),
        # generated levels are computed by each checkout, not read from the other's cache
        "XDG_CACHE_HOME": str(folder / f"{label}-cache"),
        "HF_HOME": os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser()),
    }
    for package in ("minidistill", "minidistill_kernels"):
        imported = subprocess.run(
            [sys.executable, "-c", f"import {package}; print({package}.__file__)"],
            cwd=source,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        if not Path(imported).resolve().is_relative_to(source):
            raise SystemExit(f"{source}: {package} is imported from {imported}")
    print(f"running {label}: {source}", flush=True)
    log = folder / f"{label}.log"
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-m", "minidistill", *command, "--output_dir", str(output)],
            cwd=source,
            env=environment,
            stdout=file,
            stderr=file,
            check=False,
        ).returncode
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{source}: the run failed with exit code {code}, see {log}\n{tail}")
    return output


def report(comparisons: Sequence[Comparison], strict: bool) -> bool:
    """Print what was compared, and return whether the runs agree."""
    table = Table(box=box.SIMPLE)
    table.add_column("file")
    for column in ("values", "max abs difference", "differences"):
        table.add_column(column, justify="right")
    for c in comparisons:
        table.add_row(c.file, str(c.values), f"{c.max_difference:.3g}", str(len(c.differences)))
    console = Console(highlight=False)
    console.print(table)
    for c in comparisons:
        for difference in c.differences[:SHOWN]:
            print(f"{c.file}: {difference}")
        if len(c.differences) > SHOWN:
            print(f"{c.file}: and {len(c.differences) - SHOWN} more")
    added = sorted({(_kind(c.file), key) for c in comparisons for key in c.added})
    for file, key in added:
        print(f"{file}: only the second run has {key}")
    agree = not any(c.differences for c in comparisons) and not (strict and added)
    furthest = max(c.max_difference for c in comparisons)
    print(f"the runs {'agree' if agree else 'DIFFER'}; max abs difference {furthest:.3g}")
    return agree


def _kind(file: str) -> str:
    path = Path(file)
    return f"{path.parent}/*{path.suffix}" if path.parent.name == "rollouts" else file


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[end + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--config", default="configs/sokoban.toml", help="path in each checkout")
    parser.add_argument("--vllm", action="store_true", help="run on vLLM; numbers may be close")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="absolute, with --vllm")
    parser.add_argument("--strict", action="store_true", help="added keys are differences too")
    args = parser.parse_args(arguments[:end])

    command = ["run", args.config, "--max_steps", str(args.steps)]
    command += ["--inference.engine", "vllm" if args.vllm else "embedded", *flags]
    folder = Path(tempfile.mkdtemp(prefix="compare-checkouts-"))
    before = finished_run(args.before, "before", folder, command)
    after = finished_run(args.after, "after", folder, command)
    agree = report(compare_runs(before, after, args.tolerance if args.vllm else 0.0), args.strict)
    if agree or not any(folder.iterdir()):
        shutil.rmtree(folder)
    else:
        print(f"the new runs are kept in {folder}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
