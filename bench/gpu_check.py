"""Proves what only a GPU can show, in minutes, from a plain checkout.

    PYTHONPATH=.:kernels python -m bench.gpu_check --out DIR [--only NAME…] [--minutes 8]
    PYTHONPATH=.:kernels python -m bench.gpu_check --out DIR --rehearse

Each check runs in a process of its own, so that an error, out of memory or a hang in one does not
stop the others. It prints a line and writes DIR/<number>_<name>.json, in which its figures are as
soon as they are known. DIR/summary.json has them all. No check starts after `--minutes`. The most
informative ones come first.

Nothing is downloaded: models are the shipped one, or random weights in a real model's shape. The
checks ops, products, speed and handles need torch, triton and pytest. The others also need
transformers, peft, pydantic, tomli and tomli_w, and are skipped without them. The last ones need
vLLM. `--rehearse` runs the same code on the CPU with tiny sizes; it proves nothing about a GPU.

Exit code 0 if all checks passed; those with vLLM may be missing. Otherwise 1; 2 if the folder
cannot be written, 3 without a GPU, 130 after Ctrl-C or SIGTERM, which keep what is known so far.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.checks.report import ROOT, Findings, Setting, machine, shown, write_json

MODELS = ("transformers", "peft", "pydantic", "tomli", "tomli_w")
LEAST = 15.0  # seconds that must be left for a check to start
WITHOUT_VLLM = "not installed: vllm"
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class Check:
    """One check. It is a function of a Setting and Findings."""

    number: int
    name: str
    what: str
    function: str
    """module:function, imported only to run it."""
    seconds: float
    """After which it is ended."""
    needs: tuple[str, ...] = ()
    """Modules without which it is skipped."""

    def run(self, setting: Setting, findings: Findings) -> None:
        module, _, function = self.function.partition(":")
        getattr(importlib.import_module(f"bench.checks.{module}"), function)(setting, findings)

    @property
    def file(self) -> str:
        return f"{self.number:02}_{self.name}.json"


CHECKS = (
    Check(1, "ops", "the kernels' tests", "kernels:ops", 150),
    Check(2, "products", "bf16 products into fp32", "kernels:products", 60),
    Check(3, "speed", "the kernels beside others", "kernels:speed", 120),
    Check(4, "micro_batch", "a step in the 4B shape", "training:micro_batch", 120, MODELS),
    Check(5, "embedded", "runs in bf16 and fp32", "runs:embedded", 150, MODELS),
    Check(6, "handles", "weights over IPC", "handles:check", 90),
    Check(7, "shared", "held-out KL beside an engine", "sharing:check", 120, MODELS),
    Check(8, "numerics", "errors of bf16", "numerics:check", 90, MODELS),
    Check(9, "resume", "a run killed and resumed", "runs:resume", 120, MODELS),
    Check(10, "full", "every weight in the 0.6B shape", "training:full_fine_tuning", 90, MODELS),
    Check(11, "vllm_run", "a run with vLLM", "runs:vllm", 300, (*MODELS, "vllm")),
    Check(12, "vllm_tests", "the tests with vLLM", "runs:vllm_tests", 900, (*MODELS, "vllm")),
)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"cannot write to {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whole runs stay on the CPU too
    setting = Setting(args.rehearse, args.out.resolve())
    if args.child:
        (check,) = (check for check in CHECKS if check.name == args.child)
        return execute(check, setting)
    problem = missing_gpu(setting)
    if problem:
        print(problem, file=sys.stderr)
        return 3
    ends = time.monotonic() + 60 * args.minutes
    results = []
    for check in CHECKS:
        if args.only and check.name not in args.only:
            continue
        result = perform(check, setting, ends - time.monotonic())
        results.append(result)
        print(line(result), flush=True)
        summary = {**machine(setting.rehearse), "checks": results}
        write_json(setting.folder / "summary.json", summary)
        if result["message"] == INTERRUPTED:
            break
    print(table(results, setting))
    if results and results[-1]["message"] == INTERRUPTED:
        return 130
    return 0 if results and all(map(is_good, results)) else 1


def is_good(result: dict[str, Any]) -> bool:
    """It passed, or was left out because vLLM, which is optional, is not installed."""
    return result["status"] == "pass" or result["message"] == WITHOUT_VLLM


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [check.name for check in CHECKS]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=minutes, default=8.0, help="no check starts after them")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--child", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def minutes(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise ValueError  # no check would be bounded by it
    return value


def missing_gpu(setting: Setting) -> str | None:
    import torch

    if setting.rehearse or torch.cuda.is_available():
        return None
    return "this machine has no GPU that torch can use; --rehearse runs the checks on the CPU"


def perform(check: Check, setting: Setting, left: float) -> dict[str, Any]:
    """Run a check if its modules are there and time is left. Returns what its file says."""
    findings = Findings(setting.folder / check.file, about(check, setting), setting.rehearse)
    absent = [name for name in check.needs if find_spec(name) is None]
    if absent:
        findings.save("skipped", f"not installed: {', '.join(absent)}")
    elif left < LEAST:
        findings.save("not run", "the minutes are used up")
    else:
        findings.save("running")
        try:
            if setting.rehearse:
                execute(check, setting)
            else:
                in_a_process(check, setting, min(check.seconds, left), findings)
        except KeyboardInterrupt:
            end(findings, INTERRUPTED)
    return json.loads((setting.folder / check.file).read_text())


def in_a_process(check: Check, setting: Setting, seconds: float, findings: Findings) -> None:
    """Run a check in a process of its own, and end it and what it started after some seconds."""
    command = [sys.executable, "-m", "bench.gpu_check", "--child", check.name]
    command += ["--out", str(setting.folder), *(["--rehearse"] if setting.rehearse else [])]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with open(setting.folder / f"{check.number:02}_{check.name}.out", "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            message = f"its process ended with code {code}: see {Path(output.name).name}"
        except subprocess.TimeoutExpired:
            message = f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    end(findings, message)


def end(findings: Findings, message: str) -> None:
    """Write the end of a check that could not write it, with the figures that it had."""
    partial = json.loads(findings.path.read_text())
    if partial["status"] == "running":
        findings.figures, findings.limits = partial["figures"], partial["limits"]
        findings.save("error", message)


def execute(check: Check, setting: Setting) -> int:
    """Run a check in this process and write its file. Returns 0 if it passed."""
    findings = Findings(setting.folder / check.file, about(check, setting), setting.rehearse)
    findings.save("running")
    try:
        check.run(setting, findings)
    except Exception as error:
        traceback.print_exc()
        findings.save("error", f"{type(error).__name__}: {str(error).strip()[:500]}")
        return 1
    return 0 if findings.finish() == "pass" else 1


def about(check: Check, setting: Setting) -> dict[str, Any]:
    return {"number": check.number, "name": check.name, "what": check.what} | machine(
        setting.rehearse
    )


def line(result: dict[str, Any]) -> str:
    """A result in one line: what was missed first, then the figures that have a limit."""
    judged = [limit for limit in result["limits"] if limit["held"] is not None]
    limits = sorted(judged, key=lambda limit: limit["held"])
    texts = [
        f"{'MISSED ' if limit['held'] is False else ''}{limit['what']} {shown(limit['value'])}"
        f" ({limit['kind']} {shown(limit['limit'])})"
        for limit in limits
    ]
    details = "; ".join([*filter(None, [result["message"]]), *texts])
    head = f"{result['number']:2} {result['name']:12} {result['status']:8}"
    return f"{head} {result['seconds']:6.1f} s  {details}"


def table(results: Sequence[dict[str, Any]], setting: Setting) -> str:
    """The end of the output: a row for each check, and the checks that were not run."""
    rehearsal = " rehearsed: this proves nothing about a GPU" if setting.rehearse else ""
    device = results[0]["device"] if results else ""
    rows = [f"{device}{rehearsal}"]
    for result in results:
        judged = [limit for limit in result["limits"] if limit["held"] is not None]
        held = sum(limit["held"] for limit in judged)
        rows.append(
            f"  {result['number']:2} {result['what']:32} {result['status']:8} "
            f"{held}/{len(judged)} limits held  {result['seconds']:6.1f} s"
        )
    left_out = [r["name"] for r in results if r["status"] in ("skipped", "not run")]
    if left_out:
        rows.append(f"not run: {', '.join(left_out)}")
    return "\n".join([*rows, f"results: {setting.folder}"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the check's process too
    sys.exit(main())
