"""Ahead-of-time compile of every shipped kernel configuration: registers, spills, shared memory.

No GPU and no driver is needed: Triton compiles to PTX for a named target, and the ptxas in Triton's
wheel assembles it and reports its resources. Run it in a process without TRITON_INTERPRET:

    python -m minidistill_kernels.aot bench/results/kernels_aot.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 89, 90, 100)
# Limit of bytes spilled to local memory, stores and loads together.
SPILL_LIMIT = {80: 0, 89: 0, 90: 0, 100: 64}
# Limit of shared memory per block, bytes.
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True, slots=True)
class Configuration:
    """One compile: pointer dtypes by argument, constexprs, launch options."""

    kernel: str
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    aligned: bool = True
    """Strides and vocabulary are multiples of 16, as the vocabularies of most models are."""

    @property
    def name(self) -> str:
        dtypes = ",".join(f"{k}:{v}" for k, v in self.pointers.items())
        constants = ",".join(f"{k}={v}" for k, v in self.constants.items())
        return f"{self.kernel}[{dtypes}|{constants}]" + ("" if self.aligned else "/unaligned")


def configurations() -> Iterator[Configuration]:
    """Every configuration that the launchers can use."""
    from minidistill_kernels.triton_rows import BLOCKS, DELTA, NONE, PAIR, TEACHER_BLOCKS
    from minidistill_kernels.triton_score import REDUCE, TILES

    floats = ("fp32", "bf16", "fp16")
    same = tuple((d, d) for d in floats)
    # stats: (kind, student, second input); linear chunks are fp32 with delta in the input's dtype
    kinds = [(NONE, d, d) for d in floats] + [(DELTA, "fp32", d) for d in floats]
    kinds += [(PAIR, *pair) for pair in same]
    # dlogits: (kind, SCALE, TARGET, student, second, out)
    shapes = [(NONE, False, True, "fp32", "fp32", d) for d in floats]
    shapes += [(NONE, False, True, d, d, d) for d in floats[1:]]
    shapes += [(NONE, True, target, d, d, d) for d in floats for target in (True, False)]
    shapes += [(DELTA, True, True, "fp32", d, d) for d in floats]
    shapes += [(PAIR, True, True, "fp32", "fp32", d) for d in floats]
    shapes += [(PAIR, True, False, d, d, d) for d in floats]
    for size, aligned in ((0, True), (1, True), (1, False)):
        for kind, s, x in kinds:
            block, warps = (BLOCKS if kind == NONE else TEACHER_BLOCKS)[size]
            pointers = {"s_ptr": s, "x_ptr": x, "ids_ptr": "i64", "out_ptr": "fp32"}
            constants = {"X": kind, "BLOCK": block}
            yield Configuration("stats_kernel", pointers, constants, warps, aligned=aligned)
        block, warps = BLOCKS[size]
        for kind, scale, target, s, x, out in shapes:
            pointers = {"s_ptr": s, "x_ptr": x, "out_ptr": out, "ids_ptr": "i64"}
            constants = {"X": kind, "SCALE": scale, "TARGET": target, "BLOCK": block}
            yield Configuration("dlogits_kernel", pointers, constants, warps, aligned=aligned)
    short = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
    for dtype, (n, v, h, warps, stages) in TILES.items():
        d = short[str(dtype)]
        pointers = {"h_ptr": d, "w_ptr": d, "ids_ptr": "i64", "part_ptr": "fp32"}
        constants = {"UPCAST": False, "BLOCK_N": n, "BLOCK_V": v, "BLOCK_H": h}
        yield Configuration("score_kernel", pointers, constants, warps, stages)
    yield Configuration("reduce_kernel", {}, {"BLOCK": REDUCE[0]}, REDUCE[1])


def compile_one(configuration: Configuration, architecture: int) -> dict[str, Any]:
    """Registers per thread, spilled bytes, shared memory and warps of one compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minidistill_kernels import triton_rows, triton_score

    kernel = getattr(triton_rows, configuration.kernel, None)
    kernel = kernel or getattr(triton_score, configuration.kernel)
    floats = ("inv_t", "mix_x", "mix_z")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in configuration.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + configuration.pointers.get(name, "fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in floats else "i32"
            divisible = name.endswith("_stride") or name in ("vocab", "width")
            if divisible and configuration.aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, configuration.constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": configuration.warps, "num_stages": configuration.stages},
    )
    usage = assemble(compiled.asm["ptx"], architecture)
    return {**usage, "shared_bytes": compiled.metadata.shared, "warps": configuration.warps}


def assemble(ptx: str, architecture: int) -> dict[str, int]:
    """Registers per thread and spilled bytes of a kernel, as ptxas reports them."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    ptxas = tools / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        target = f"--gpu-name=sm_{architecture}{suffix}"
        command = [str(ptxas), "-v", target, str(path), "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    text = result.stderr + result.stdout
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    if spills is None or registers is None:
        raise RuntimeError(f"ptxas reported no registers or no spills:\n{text}")
    stores, loads = (int(x) for x in spills.groups())
    return {"registers": int(registers[1]), "spill_bytes": stores + loads}


def digest() -> str:
    """Hash of the kernels' source, by which a stored report is recognized as stale."""
    folder = Path(__file__).parent
    names = ("triton_rows.py", "triton_score.py")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Rows of a report that exceed the limits of spills or shared memory."""
    return [
        f"sm_{row['sm']} {row['name']}: {row['spill_bytes']} B spilled, {row['shared_bytes']} B"
        for row in rows
        if row["spill_bytes"] > SPILL_LIMIT[row["sm"]]
        or row["shared_bytes"] > SHARED_LIMIT[row["sm"]]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON report to write")
    parser.add_argument(
        "--match", action="append", help="only configurations whose name contains this; repeatable"
    )
    parser.add_argument("--sm", type=int, choices=ARCHITECTURES, action="append")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("error: unset TRITON_INTERPRET; interpreted kernels are not compiled")
    import triton

    selected = [c for c in configurations() if any(m in c.name for m in args.match or [""])]
    rows = [
        {"sm": sm, "name": c.name, **compile_one(c, sm)}
        for sm in args.sm or ARCHITECTURES
        for c in selected
    ]
    report = {"triton": triton.__version__, "source_sha256": digest(), "kernels": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    problems = failures(rows)
    print(f"{len(rows)} compiles, {len(problems)} over the limits", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
