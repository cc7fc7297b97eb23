"""Checks 1 to 3: the kernels' tests, the products they rely on, and their speed.

They need torch, triton and pytest, and nothing of minidistill but its kernels.

Legend: _N tokens, _H hidden, _V vocabulary.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import torch
from torch import Tensor

from bench import kernels as benchmark
from bench.checks.report import ROOT, Findings, Setting
from bench.kernels_cases import BASELINE, OURS, Case, Shape, absent, linear_cases, row_cases
from bench.kernels_measure import peak_bytes
from bench.kernels_report import floor_ms, save
from bench.kernels_report import machine as benchmark_machine
from minidistill_kernels import gemm

OUTCOME = re.compile(r"::(\S+) (PASSED|FAILED|ERROR|SKIPPED)")
# (quantity, mode): milliseconds to reach on an H100 at N 8192, V 151936, H 4096. Other cards have
# the same share of their own floor to reach.
GOALS = {
    ("linear reverse KL", "forward+backward"): 36.0,
    ("selective log-prob", "forward"): 0.85,
}
FLOORS_H100 = {
    ("linear reverse KL", "forward+backward"): 30.93,
    ("selective log-prob", "forward"): 0.743,
}


def ops(setting: Setting, findings: Findings) -> None:
    """tests/ops/test_ops_gpu.py, whole; in a rehearsal a few of its tests."""
    run_tests(
        setting,
        findings,
        "tests/ops/test_ops_gpu.py",
        setting.size((), ("-k", "test_opcheck or test_torch_backend")),
    )


def run_tests(
    setting: Setting, findings: Findings, path: str, options: tuple[str, ...] = ()
) -> None:
    """Run a file of tests in a process of its own. Its outcomes count as they come."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    process = Popen(
        [*command, str(ROOT / path), *options],
        cwd=ROOT,
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
    )
    assert process.stdout is not None
    counts = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    failures = []
    with open(setting.folder / f"{findings.path.stem}.log", "w") as log:
        for line in process.stdout:
            log.write(line)
            log.flush()
            if match := OUTCOME.search(line):
                name, outcome = match.groups()
                counts[outcome] += 1
                if outcome in ("FAILED", "ERROR"):
                    failures.append(name)
                findings.figure("tests", dict(counts))
    code = process.wait()
    findings.figure("failures", failures)
    findings.at_least("tests that passed", counts["PASSED"], 1)
    findings.at_most(
        "tests that failed or were skipped", sum(counts.values()) - counts["PASSED"], 0
    )
    findings.at_most("pytest's exit code", code, 0)


def products(setting: Setting, findings: Findings) -> None:
    """A product of bf16 into a slice of an fp32 buffer, and the ones around the row kernels."""
    n, v, h = setting.size((1728, 151936, 2560), (48, 1031, 64))
    draw = torch.Generator(setting.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=setting.device).bfloat16()

    hidden_NH, weight_VH = normal(n, h), normal(v, h) / h**0.5
    buffer_NV = torch.full((n, v), float("nan"), device=setting.device)
    rows = n - n // 4
    mm = product_into_fp32(setting.device)
    out_NV, h_NH = buffer_NV[:rows], hidden_NH[:rows]

    def call() -> None:
        mm(h_NH, weight_VH.t(), out_dtype=torch.float32, out=out_NV)

    call()
    columns = torch.arange(0, v, max(1, v // 2048), device=setting.device)
    exact = h_NH.double() @ weight_VH[columns].double().t()
    # rounding the output to bf16 would give 2e-3
    findings.at_most("error of mm into fp32", _error(out_NV[:, columns], exact), 1e-4)
    findings.figure("error of mm into bf16", _error((h_NH @ weight_VH.t())[:, columns], exact))
    findings.holds("rows after the slice are untouched", bool(buffer_NV[rows:].isnan().all()))
    extra = peak_bytes(call, setting.device.type)
    # a hidden copy of the output or of the head has 700 MiB and more, cuBLAS's workspace 32 MiB
    findings.at_most("MiB allocated by mm", extra / 2**20, 64)
    seconds = setting.seconds(call)
    findings.figure("TFLOP/s of mm into fp32", 2 * rows * v * h / seconds / 1e12)

    gemm.project(out_NV, h_NH, weight_VH)
    findings.at_most("error of project", _error(out_NV[:, columns], exact), 1e-4)
    grad_NV = normal(rows, v) / v**0.5
    exact = grad_NV.double() @ weight_VH[:, :64].double()
    # on a CPU gradients are fp32
    found = gemm.pull_back(setting.size(grad_NV, grad_NV.float()), weight_VH)
    findings.at_most("error of pull_back", _error(found[:, :64], exact), 5e-3)
    total_VH = torch.zeros(v, h, device=setting.device)
    gemm.add_outer(total_VH, grad_NV, h_NH)
    exact = grad_NV[:, columns].double().t() @ h_NH.double()
    findings.at_most("error of add_outer", _error(total_VH[columns], exact), 1e-4)


def product_into_fp32(device: torch.device) -> Callable[..., Any]:
    """torch.mm. A CPU has no product of bf16 into fp32: there a stand-in makes the same call on
    torch's meta device, which checks the arguments, and then computes it in fp32."""
    if device.type == "cuda":
        return torch.mm

    def stand_in(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> None:
        torch.mm(a.to("meta"), b.to("meta"), out_dtype=out_dtype, out=out.to("meta"))
        torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)

    return stand_in


def _error(got: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - exact).norm() / exact.norm())


def speed(setting: Setting, findings: Findings) -> None:
    """Time and memory beside eager torch, torch.compile and other packages, as bench.kernels."""
    n, v, h = setting.size((8192, 151936, 4096), (32, 997, 64))
    dtype = setting.size(torch.bfloat16, torch.float32)
    shape = Shape(n, v, h, dtype, setting.device.type)
    bounds = benchmark.limits(shape)
    for name, error in benchmark.correctness(shape).items():
        findings.at_most(f"error: {name}", error, bounds[name])
    rows: list[dict[str, Any]] = []
    for case, mode in _cases(setting, shape):
        budget = setting.size(0.5, 0.0)
        try:
            row = benchmark.measure(case, mode, shape, budget)
        except Exception as error:  # of another package, or out of memory
            if case.who == OURS:
                raise
            row = {"quantity": case.quantity, "mode": mode, "who": case.who, "error": _line(error)}
        rows.append(row)
        findings.figure(
            f"{case.quantity}, {mode}, {case.who}",
            row.get("error")
            or {k: row[k] for k in ("p20", "p50", "p80", "peak_mib", "floor_share")},
        )
        if case.who == OURS and (goal := GOALS.get((case.quantity, mode))):
            _judge(findings, row, goal, shape)
        if "error" in row and setting.device.type == "cuda":
            gc.collect()  # what the failed call held
            torch.cuda.empty_cache()
    findings.figure("not installed", absent())
    report = {
        "machine": benchmark_machine(setting.device.type),
        "shape": shape.label,
        "absent": absent(),
        "rows": benchmark.with_ratios([row for row in rows if "error" not in row]),
    }
    save(setting.folder / "kernels.json", report)


def _cases(setting: Setting, shape: Shape) -> Iterator[tuple[Case, str]]:
    """Ours and eager's first. torch.compile, which takes a while to compile, comes last."""
    for compiled in (False, True):
        for family in (row_cases, linear_cases):
            for case in family(shape):
                modes = case.modes
                if compiled:
                    goals = [mode for quantity, mode in GOALS if quantity == case.quantity]
                    if case.who != BASELINE or not goals:
                        continue
                    backend = setting.size("inductor", "aot_eager")
                    loss = torch.compile(case.loss, backend=backend, dynamic=False)
                    case, modes = replace(case, who="torch.compile", loss=loss), tuple(goals)
                for mode in modes:
                    yield case, mode


def _judge(findings: Findings, row: dict[str, Any], goal: float, shape: Shape) -> None:
    key = row["quantity"], row["mode"]
    floor = floor_ms(row["flops"], row["bytes"], shape.dtype, shape.device)
    limit = goal if floor is None else goal * floor / FLOORS_H100[key]
    findings.at_most(f"ms of {', '.join(key)}", row["p50"], limit, gpu_only=True)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
