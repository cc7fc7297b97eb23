"""A run's directory in which every text is an attack on the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

EVIL = '</pre></script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}'
BIDI = "\u202eesrever\u2066 \u0000\x1b[31m \ud800 \u05e9\u05dc\u05d5\u05dd"
LONG = "W" * 5_000
HUGE = "<&'\"" * 250_000  # 1 MB, which escaping makes five times as long
EDGES = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e308",
    "-1e308",
    "1e-320",
    "null",
    '"high"',
    "true",
    "[]",
)


def hostile_run(path: Path, samples: int = 64, steps: int = 200) -> Path:
    """A finished run of many steps, with hostile texts and figures, and damaged lines."""
    (path / "rollouts").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(_metrics(steps)), errors="surrogatepass")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "teacher_kl": \xff}\n\n[1]\n{"step": -1}\n{"step": 201, "tea')
    texts = (EVIL, BIDI, LONG, HUGE, "", "word " * 900)
    for step in (1, 100, 200):
        rows = [_rollout(step, i, texts[(i + step) % len(texts)]) for i in range(6)]
        _write_rollouts(path / "rollouts" / f"step_{step:06d}.jsonl", rows)
    (path / "config.toml").write_text(f"# {EVIL}\n# {HUGE}\n")
    settings = {"max_steps": steps, EVIL: {LONG: EVIL}, "context": HUGE}
    (path / "config.resolved.json").write_text(json.dumps(settings))
    header = [[EVIL, LONG], [BIDI, EVIL], "x", [1, 2, 3]]
    facts = {"header": header, EVIL: EVIL, "packages": {EVIL: LONG}, "argv": ["run", EVIL, "a b"]}
    (path / "env.json").write_text(json.dumps(facts))
    (path / "scoreboard.json").write_text(json.dumps(_board(samples, texts)))
    return path


def _metrics(steps: int) -> list[str]:
    lines = []
    for step in range(steps + 1):
        edge = EDGES[step % len(EDGES)]
        figures: dict[str, Any] = {
            "step": step,
            "teacher_kl": 4 / (1 + step),
            "eval/heldout_kl": 3.0,
            "entropy/student": 1000 + step * 1e-7,
            "completions/length_mean": 10.0**step if step < 150 else step,
            "perf/train_tokens_per_second": 1e12,
            "time/train": 0.0,
            "time/sample": 1.0,
            "time/step": 3600.0 * step,
            "optim/grad_norm": -1e-30 * step,
            "perf/peak_memory_gib/trainer": 0.0,
            f"eval/{EVIL}/student/avg": step / 200,
            f"eval/{LONG}/{BIDI}/avg": 0.5,
            f"env/{EVIL}/teacher_kl": 1.0,
            f"env/{LONG}/teacher_kl": 2.0,
            "kl/by_position/0": 1.0,
            "kl/by_position/8192-16383": 2.0,
            "kl/by_position/16384-": 5e-324,
            f"kl/by_position/{EVIL}": 2.0,
        }
        text = json.dumps(figures)
        lines.append(f'{text[:-1]}, "reward/mean": {edge}, "kl/sampler_mismatch": {edge}}}\n')
    return lines


def _rollout(step: int, index: int, text: str) -> dict[str, Any]:
    tokens = [text] if len(text) > 9_000 else list(text[:600]) or [""]
    return {
        "step": step, "env": text, "task_id": f"{index} {EVIL}", "reward": 1e308, "stop": BIDI,
        "prompt_text": text, "teacher_prompt_text": HUGE, "tokens": tokens,
        "inserted": [{"at": 1, "text": EVIL}, {"at": 10**9, "text": ""}],
    }  # fmt: skip


def _write_rollouts(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kl = [np.linspace(-1, 5, len(row["tokens"]), dtype=np.float32) for row in rows]
    kl[0][:1] = np.nan
    offsets = np.cumsum([0, *map(len, kl)]).astype(np.int64)
    save_file({"kl": np.concatenate(kl), "offsets": offsets}, path.with_suffix(".safetensors"))


def _board(samples: int, texts: tuple[str, ...]) -> dict[str, Any]:
    rows: list[Any] = [
        {
            "prompt": f"{i} {texts[i % 6]}",
            **{name: texts[(i + j) % 6] for j, name in enumerate(("before", "teacher", "after"))},
        }
        for i in range(samples)
    ]
    return {
        "env": EVIL, "verdict": f"{EVIL} {BIDI} {LONG}", "gap_closed": 1e308, "student": LONG,
        "baseline_student": -1e308, "baseline_teacher": EVIL, "teacher_kl_first": BIDI,
        "drift_verdict": HUGE, "steps": EVIL, "seconds": 1e308, "outcome": LONG,
        "per_env": {EVIL: {"student": EVIL}, LONG: {"outcome": LONG}, "b": 7},
        "completions": [*rows, EVIL, 7, None, {"prompt": ["a"]}],
    }  # fmt: skip
