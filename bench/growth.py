"""How the cost of a step grows with context, completion, group, batch and vocabulary.

    python -m bench.growth [--model smollm2|tiny|FOLDER] [--only NAME]… [--repeats N] [--threads N]
                           [--clock wall|cpu]

Each point is a process of its own that takes steps apart as `bench.step` does. In a sweep all sizes
but one are fixed (`SWEEPS`). A larger vocabulary is the same model with random rows added to its
embedding and head. Says by how much the teacher's scoring grows from a context of 128 tokens to one
of 2,048. Writes bench/results/growth.json and growth.svg.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.growth_plot import svg
from bench.pair import RESULTS, ROOT
from bench.workload import (
    STEPS,
    Case,
    add_timing,
    load_tokenizer,
    make_parser,
    named_model,
    one_process_environment,
)
from minidistill.errors import EXIT_FAILED, UserError, printable
from minidistill.models.registry import resolve

Point = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Values of one size, with all others fixed."""

    values: tuple[int, ...]
    sizes: dict[str, int]


SWEEPS = {
    "context": Sweep((128, 512, 1024, 2048, 4096), {"prompt": 10}),
    "completion": Sweep((32, 128, 512), {"context": 100, "prompt": 10}),
    "group": Sweep((1, 2, 4, 8, 16), {"context": 100, "prompt": 200, "batch": 16}),
    "batch": Sweep((4, 8, 16, 32), {"context": 1024, "prompt": 10}),
    "vocabulary": Sweep((49_152, 98_304, 151_936), {"context": 1024, "prompt": 10}),
}
SCORING = (128, 2048)
"""Contexts between which the teacher's scoring is compared."""


def cases(model: str, name: str, folder: Path) -> Iterator[tuple[int, Case]]:
    """The points of a sweep. Models with a larger vocabulary are made in the folder."""
    sweep = SWEEPS[name]
    sizes: dict[str, Any] = {**sweep.sizes}
    for value in sweep.values:
        if name == "vocabulary":
            used = with_vocabulary(model, value, folder / str(value))
            yield value, Case(used, **sizes)
        else:
            yield value, Case(model, **sizes | {name: value})


def with_vocabulary(model: str, rows: int, folder: Path) -> str:
    """The model with random rows added to its embedding and head, or as it is.

    Raises UserError if it has more rows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(resolve(model), dtype=torch.float32)
    embedding = loaded.get_input_embeddings().weight
    if rows < len(embedding):
        raise UserError(
            f"the model has a vocabulary of {len(embedding)}, more than {rows}",
            where="--only vocabulary",
            fix="use a model with a smaller vocabulary, as smollm2",
        )
    if rows == len(embedding):
        return model
    torch.manual_seed(0)
    loaded.resize_token_embeddings(rows, mean_resizing=False)
    loaded.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return str(folder)


def measure(case: Case, repeats: int, threads: int, clock: str) -> Point:
    """One point, in a process of its own. Raises UserError with what it says if it fails."""
    command = [sys.executable, "-m", "bench.growth_point", json.dumps(asdict(case))]
    result = subprocess.run(
        [*command, str(repeats), str(threads), clock],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **one_process_environment(threads),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        },
    )
    if result.returncode:
        raise UserError(
            f"a step could not be measured: {result.stderr.strip()[-1000:]}",
            where=f"{asdict(case)}",
            fix="give the machine more memory, or measure other sweeps with --only",
            exit_code=EXIT_FAILED,
        )
    point: Point = json.loads(result.stdout.splitlines()[-1])
    return point


def scoring_growth(points: Mapping[str, Point]) -> float:
    """Seconds of scoring with the longer context, relative to the shorter one."""
    short, long = (points[str(context)]["pieces"]["score"] for context in SCORING)
    return float(long / short)


def show(name: str, value: int, point: Point) -> None:
    pieces = point["pieces"]
    sampling = pieces["prefill"] + pieces["decode"]
    print(
        f"{name} {value:6}: step {point['step']:7.2f} s, sampling {sampling:6.2f}, "
        f"training {point['training']:6.2f}, of it scoring {pieces['score']:5.2f}; "
        f"{point['peak_gib']:.2f} GiB",
        flush=True,
    )


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("growth", __doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2[-bf16], tiny or a folder")
    parser.add_argument("--only", choices=tuple(SWEEPS), action="append", help="by default all")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measured steps")
    add_timing(parser)
    options = parser.parse_args(argv)
    if not 1 <= options.repeats <= STEPS - 1:
        parser.error(f"--repeats takes 1 to {STEPS - 1}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    target = RESULTS / "growth.json"
    try:
        model = named_model(options.model)
        for name in options.only or SWEEPS:
            points: dict[str, Point] = {}
            with tempfile.TemporaryDirectory() as folder:
                for value, case in cases(model, name, Path(folder)):
                    points[str(value)] = measure(
                        case, options.repeats, options.threads, options.clock
                    )
                    show(name, value, points[str(value)])
            settings = {**asdict(replace(case, model=options.model)), "clock": options.clock}
            settings |= {"threads": options.threads, "repeats": options.repeats}
            report = json.loads(target.read_text()) if target.exists() else {}
            report[name] = {"settings": settings, "points": points}
            if name == "context":
                report["scoring_growth"] = scoring_growth(points)
                contexts = " to ".join(f"{context:,}" for context in SCORING)
                print(f"scoring grows {report['scoring_growth']:.2f} times from {contexts} tokens")
            # saved after each sweep, in case a long run is interrupted
            target.write_text(json.dumps(report, indent=2) + "\n")
            target.with_suffix(".svg").write_text(svg(report))
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
