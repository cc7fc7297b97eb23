"""Checks the kernels' results, then compares time and memory with eager torch and other packages.

    python -m bench.kernels [--device cpu|cuda] [--n N] [--v N] [--h N] [--only QUANTITY]

Ratios are relative to eager torch in the same run. The time of a row is the median of repeated
calls. Peak memory is what torch allocates during a call: outputs count, inputs do not
(kernels_measure.py). On a GPU a row also shows which share of its time is the floor: the time of
the head's products, or of moving the logits, at the data sheet's rates. Exit code 1 if results are
wrong or a gate is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels_cases import BASELINE, OURS, Case, Shape, absent, inputs, linear_cases, row_cases
from bench.kernels_measure import peak_bytes, percentiles, times_ms
from bench.kernels_report import device_name, floor_ms, machine, save, table
from minidistill_kernels import linear_distill, linear_logprob, linear_reverse_kl, reference

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
# Largest time and memory relative to eager torch, on a CPU at this shape.
CPU_SHAPE = (2048, 49152, 576)
CPU_GATES = (
    ("linear reverse KL", "forward+backward", 0.8, 1 / 8),
    ("linear log-prob and entropy", "no grad", 1.0, 1 / 8),
)


def correctness(shape: Shape) -> dict[str, float]:
    """The largest error of each quantity against float64, at a small shape; see `limits`."""
    small = Shape(64, min(shape.v, 5003), min(shape.h, 256), shape.dtype, shape.device)
    x = inputs(small)
    truth = x["h_s"].double().requires_grad_()
    weight = x["weight"].double()
    s, t = truth @ weight.t(), x["h_t"].double() @ weight.t()
    want_logp, want_entropy = reference.selective_logprob(s, x["ids"])
    want_kl = reference.reverse_kl(s, t)
    logp, entropy = linear_logprob(x["h_s"], x["weight"], x["ids"], return_entropy=True)
    assert entropy is not None
    hidden = x["h_s"].clone().requires_grad_()
    kl = linear_reverse_kl(hidden, x["h_t"], x["weight"])
    kl.sum().backward()
    want_kl.sum().backward()
    assert hidden.grad is not None
    assert truth.grad is not None
    loss = linear_distill(x["h_s"], x["weight"], x["ids"], h_t_NH=x["h_t"]).loss

    def worst(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got.detach().double() - want.detach()).abs().max())

    return {
        "log-prob": worst(logp, want_logp),
        "entropy": worst(entropy, want_entropy),
        "KL, relative": worst(kl, want_kl) / float(want_kl.detach().mean()),
        "distill loss": worst(loss, 0.5 * want_kl) / max(1.0, float(want_kl.detach().max())),
        "d_hidden, relative L2": float((hidden.grad - truth.grad).norm() / truth.grad.norm()),
    }


def limits(shape: Shape) -> dict[str, float]:
    """The largest permitted error of each quantity."""
    half = shape.dtype != torch.float32
    small = 1e-2 if half else 2e-5
    gradient = 5e-3 if half else 1e-4
    return {
        "log-prob": 2e-5,
        "entropy": 2e-5,
        "KL, relative": small,
        "distill loss": small,
        "d_hidden, relative L2": gradient,
    }


def measure(case: Case, mode: str, shape: Shape, budget_s: float) -> dict[str, Any]:
    call = case.call(mode)
    times = percentiles(times_ms(call, shape.device, budget_s))
    seconds = times["p50"] / 1e3
    floor = floor_ms(case.flops[mode], case.moved[mode], shape.dtype, shape.device)
    return {
        "device": device_name(shape.device),
        "quantity": case.quantity,
        "mode": mode,
        "who": case.who,
        **times,
        "peak_mib": peak_bytes(call, shape.device) / MIB,
        "flops": case.flops[mode],
        "bytes": case.moved[mode],
        "gflops": case.flops[mode] / seconds / 1e9,
        "gbytes": case.moved[mode] / seconds / 1e9,
        "floor_share": None if floor is None else floor / times["p50"],
        "time_ratio": None,
        "memory_ratio": None,
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratios to eager torch, sorted by quantity and mode."""
    eager = {(r["quantity"], r["mode"]): r for r in rows if r["who"] == BASELINE}
    for row in rows:
        base = eager.get((row["quantity"], row["mode"]))
        if base is not None:
            row["time_ratio"] = row["p50"] / base["p50"]
            row["memory_ratio"] = row["peak_mib"] / base["peak_mib"]
    order = list(dict.fromkeys(r["quantity"] for r in rows))
    modes = ("no grad", "forward", "forward+backward")
    return sorted(rows, key=lambda r: (order.index(r["quantity"]), modes.index(r["mode"])))


def growth(shape: Shape) -> float:
    """Ratio of peak memory at N tokens to that at N / 2, both without the outputs."""

    def extra(n: int) -> int:
        x = inputs(Shape(n, shape.v, shape.h, shape.dtype, shape.device))
        hidden = x["h_s"].requires_grad_()
        call = lambda: linear_reverse_kl(hidden, x["h_t"], x["weight"]).sum().backward()  # noqa: E731
        outputs = 2 * hidden.numel() * hidden.element_size() + 30 * 4 * n
        return peak_bytes(call, shape.device) - outputs

    return extra(shape.n) / extra(shape.n // 2)


def cpu_gates(rows: list[dict[str, Any]], memory_growth: float) -> list[dict[str, Any]]:
    ours = {(r["quantity"], r["mode"]): r for r in rows if r["who"] == OURS}
    gates = [
        {"gate": f"{quantity}, {mode}: {what} / eager's", "value": row[key], "limit": limit}
        for quantity, mode, time, memory in CPU_GATES
        if (row := ours.get((quantity, mode))) is not None
        for what, key, limit in (("time", "time_ratio", time), ("memory", "memory_ratio", memory))
    ]
    gates.append({"gate": "peak memory, N doubled / N", "value": memory_growth, "limit": 1.02})
    return [{**gate, "held": gate["value"] <= gate["limit"]} for gate in gates]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--n", type=int, default=8192 if cuda else CPU_SHAPE[0], help="tokens")
    parser.add_argument(
        "--v", type=int, default=151936 if cuda else CPU_SHAPE[1], help="vocabulary"
    )
    parser.add_argument("--h", type=int, default=4096 if cuda else CPU_SHAPE[2], help="hidden size")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--budget", type=float, default=6.0, help="seconds per row, at least 3 calls"
    )
    parser.add_argument("--only", default="", help="only quantities whose name contains this")
    parser.add_argument("--ours", action="store_true", help="leave out the other packages")
    parser.add_argument("--out", type=Path, help="JSON report; the plot is written beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    args = arguments(argv)
    shape = Shape(args.n, args.v, args.h, getattr(torch, args.dtype), args.device)
    errors, bounds = correctness(shape), limits(shape)
    for name, error in errors.items():
        verdict = "ok" if error <= bounds[name] else "WRONG"
        console.print(
            f"{device_name(args.device)}  {name}: {error:.1e} of {bounds[name]:.0e}  {verdict}"
        )
    if any(errors[name] > bounds[name] for name in errors):
        console.print("the results are wrong, so nothing is measured")
        return 1
    rows = []
    for family in (row_cases, linear_cases):
        for case in family(shape):
            if args.only in case.quantity and not (args.ours and case.who not in (BASELINE, OURS)):
                for mode in case.modes:
                    console.print(f"[dim]{case.quantity}, {mode}, {case.who}[/dim]")
                    rows.append(measure(case, mode, shape, args.budget))
    rows = with_ratios(rows)
    gates = cpu_gates(rows, growth(shape)) if (shape.n, shape.v, shape.h) == CPU_SHAPE else []
    report: dict[str, Any] = {
        "machine": machine(args.device),
        "shape": shape.label,
        "errors": errors,
        "absent": absent(),
        "gates": gates,
        "rows": rows,
    }
    name = "cpu" if args.device == "cpu" else device_name("cuda").lower().replace(" ", "-")
    save(args.out or RESULTS / f"kernels_{name}.json", report)
    console.print(table(rows, f"{report['machine']['device']}, {shape.label}"))
    for gate in gates:
        verdict = "held" if gate["held"] else "MISSED"
        console.print(f"CPU  {gate['gate']}: {gate['value']:.3f} of {gate['limit']:.3f}  {verdict}")
    if report["absent"]:
        console.print("not available:", ", ".join(report["absent"]))
    return 0 if all(gate["held"] for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
