"""Table, JSON and plot of the measured rows."""

from __future__ import annotations

import json
import platform
from html import escape
from pathlib import Path
from typing import Any

import torch

# Dense bf16 TFLOP/s and memory TB/s from data sheets, for the floor
PEAKS = {"H100": (989.0, 3.35), "H200": (989.0, 4.8), "A100": (312.0, 2.04), "B200": (2250.0, 8.0)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def machine(device: str) -> dict[str, Any]:
    """The machine and the package versions of the measurements."""
    import triton

    return {
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def floor_ms(flops: float, moved: float, dtype: torch.dtype, device: str) -> float | None:
    """The time of the products or the memory traffic alone, at the data sheet's rates."""
    rates = next((r for name, r in PEAKS.items() if name in device_name(device)), None)
    if rates is None or dtype == torch.float32:
        return None
    return max(flops / (rates[0] * 1e12), moved / (rates[1] * 1e12)) * 1e3


def table(rows: list[dict[str, Any]], title: str) -> Any:
    from rich.table import Table

    out = Table(title=title)
    for name in ("device", "quantity", "mode", "who"):
        out.add_column(name)
    for name in ("ms p50", "p20-p80", "MiB", "rate", "floor", "× time", "× memory"):
        out.add_column(name, justify="right")
    last = None
    for row in rows:
        if last is not None and (row["quantity"], row["mode"]) != last:
            out.add_section()
        last = (row["quantity"], row["mode"])
        rate = f"{row['gflops']:,.0f} GFLOP/s" if row["flops"] else f"{row['gbytes']:,.1f} GB/s"
        share = f"{row['floor_share']:.0%}" if row["floor_share"] else "-"
        ratios = [f"{row[k]:.2f}" if row[k] else "-" for k in ("time_ratio", "memory_ratio")]
        out.add_row(
            row["device"],
            row["quantity"],
            row["mode"],
            row["who"],
            f"{row['p50']:,.1f}",
            f"{row['p20']:,.0f}-{row['p80']:,.0f}",
            f"{row['peak_mib']:,.1f}",
            rate,
            share,
            *ratios,
        )
    return out


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".svg").write_text(svg(report))


def svg(report: dict[str, Any]) -> str:
    """Bars of time and memory relative to eager torch, on one scale."""
    rows = [r for r in report["rows"] if r["who"] != "eager" and r["time_ratio"]]
    width, line, left, scale = 760, 34, 330, 150.0
    height = 70 + line * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="12" y="20" font-size="14">{escape(report["machine"]["device"])}, '
        f"{escape(report['shape'])}</text>",
        '<text x="12" y="38" fill="#666">relative to eager torch (line at 1): '
        '<tspan fill="#2a6f97">time</tspan>, <tspan fill="#c9793a">peak memory</tspan></text>',
    ]
    for i, row in enumerate(rows):
        y = 52 + i * line
        label = f"{row['quantity']}, {row['mode']}"
        parts.append(f'<text x="12" y="{y + 11}">{escape(label)}</text>')
        parts.append(f'<text x="12" y="{y + 24}" fill="#666">{escape(row["who"])}</text>')
        for offset, key, color in ((2, "time_ratio", "#2a6f97"), (15, "memory_ratio", "#c9793a")):
            value = row[key]
            bar = min(value * scale, width - left - 50)
            parts.append(
                f'<rect x="{left}" y="{y + offset}" width="{bar:.1f}" height="11" fill="{color}"/>'
                f'<text x="{left + bar + 4:.1f}" y="{y + offset + 9}">{value:.2f}</text>'
            )
    x = left + scale
    parts.append(f'<line x1="{x}" y1="48" x2="{x}" y2="{height - 8}" stroke="#999"/>')
    return "\n".join([*parts, "</svg>", ""])
