"""The HTML report: its content, damaged files, and no active content."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.reported_runs import Page, finished_run, rollout, write_rollouts

from minidistill.errors import EXIT_USAGE, UserError
from minidistill.reporting.html import write_report
from minidistill.reporting.html.chart import MAX_POINTS, Series, draw, thin

EVIL = '</pre><script>alert(1)</script><img src=x onerror="alert(2)">\x1b[31m\u202e{{ 7*7 }}'


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "sokoban")


def page_of(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert "92% 95% interval 88% to 95%" in page.text
    assert "20 steps in 1m13s" in page.text
    assert "max_steps = 20" in page.text
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("teacher_kl: from 4.93 to 0.246" in label for label in labels)
    [evaluation] = [label for label in labels if label.startswith("Evaluation: sokoban-env")]
    assert "baseline_teacher: 0.95." in evaluation
    assert "student: from 0.05 to 0.8." in evaluation  # from its score before training
    assert page.tags["figure"] == 7
    assert page.tags["table"] == 8  # one behind each chart, and the facts of env.json
    # one page, no temporary file
    assert not list(run_dir.glob("*.tmp"))


def test_the_first_middle_and_last_step_show_one_rollout_of_each_task(run_dir: Path) -> None:
    page = page_of(run_dir)
    texts = [text for _, text in page.spans if re.match(r"s\d", text)]
    assert texts == [f"s{step}t{task}" for step in (1, 10, 20) for task in (0, 1, 2)]
    classes = {text: name for name, text in page.spans}
    assert classes["s1t0"] == "h0"
    assert classes["⏎\n"] == "h4"


def test_the_report_loads_nothing_and_runs_its_own_script_alone(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert not {"link", "iframe", "img", "object", "form", "base"} & set(page.tags)
    assert not {"src", "srcset", "style"} & {name for name, _ in page.attributes}
    assert {value[0] for name, value in page.attributes if name == "href"} == {"#"}
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    [policy] = [value for _, value in page.attributes if value.startswith("default-src")]
    hashes = [
        "'sha256-" + b64encode(sha256(text.encode()).digest()).decode() + "'"
        for tag in ("style", "script")
        for text in re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    ]
    assert policy == (
        f"default-src 'none'; style-src {hashes[0]}; script-src {hashes[1]}; "
        "base-uri 'none'; form-action 'none'"
    )
    assert len(hashes) == 2
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html


def test_text_from_models_and_files_is_escaped(run_dir: Path) -> None:
    for step in (1, 2):
        rows = [rollout(step, EVIL, [EVIL], env=EVIL, teacher_prompt_text=EVIL, stop=EVIL)]
        write_rollouts(run_dir, step, rows, [[EVIL.count("x") * 1.0]])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, f"eval/{EVIL}/student/avg": 0.5}) + "\n")
        file.write(json.dumps({"step": 20, f"eval/sokoban-env/{EVIL[7:20]}/avg": 0.5}) + "\n")
    (run_dir / "config.toml").write_text(EVIL)
    (run_dir / "env.json").write_text(json.dumps({EVIL: EVIL}))
    board = {"env": EVIL, "verdict": EVIL, "gap_closed": EVIL, "student": EVIL}
    board |= {"drift_verdict": EVIL, "outcome": EVIL, "judged_by": EVIL, "missing": [EVIL]}  # type: ignore[dict-item]
    board["completions"] = [dict.fromkeys(("prompt", "before", "teacher", "after"), EVIL), EVIL]  # type: ignore[assignment]
    board["per_env"] = {EVIL: {"student": EVIL}, "b": {}}  # type: ignore[assignment]
    (run_dir / "scoreboard.json").write_text(json.dumps(board))
    renamed = run_dir.with_name("a<script>b")
    run_dir.rename(renamed)
    page = page_of(renamed)
    assert page.tags["script"] == 1
    assert not page.tags["img"]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page.text
    html = (renamed / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_killed_run(run_dir: Path) -> None:
    (run_dir / "scoreboard.json").unlink()
    metrics = run_dir / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 21, "teacher_kl": 0.\xff')
    (run_dir / "env.json").write_text("[1")
    last = run_dir / "rollouts" / "step_000020.jsonl"
    last.write_text(last.read_text()[:-40])
    tensors = last.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:50])
    page = page_of(run_dir)
    assert "metrics.jsonl: 1 damaged line left out." in page.text
    assert "env.json is damaged" in page.text
    assert "This run stopped before its end." in page.text
    assert "up to step 20" in page.text
    classes = {text: name for name, text in page.spans}
    assert classes["s20t0"] == ""


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_a_run_without_metrics(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    page = page_of(tmp_path)
    assert "There are no metrics yet." in page.text
    assert page.tags["figure"] == 0


def test_values_that_are_not_finite_numbers_are_omitted(tmp_path: Path) -> None:
    rows = ['{"step": 1, "teacher_kl": NaN, "reward/mean": 1}', "7", '{"teacher_kl": 1.0}']
    rows += ['{"step": 2, "teacher_kl": Infinity, "reward/mean": "high"}', '{"step": true}']
    rows += ['{"step": 3, "loss/policy": 1' + "0" * 400 + "}"]
    rows += ['{"step": 4, "reward/mean": 0.5}', '{"step": 4, "reward/mean": 0.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    page = page_of(tmp_path)
    assert page.tags["figure"] == 1
    labels = [value for name, value in page.attributes if name == "aria-label"]
    [label] = [label for label in labels if "over steps" in label]
    assert "from 1 to 0.25" in label


@pytest.mark.parametrize("kl", [[[0.1]], [[0.1, 0.2], [0.3]], []])
def test_kl_of_another_shape_colors_no_tokens(tmp_path: Path, kl: list[list[float]]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    write_rollouts(tmp_path, 1, [rollout(1, "a", ["x", "y", "z"])], kl)
    assert ("", "x") in page_of(tmp_path).spans


TENSORS: dict[str, tuple[Any, Any]] = {
    "rows of offsets": ([[0, 1], [1, 1]], [0.5]),
    "one offset": (1, [0.5]),
    "offsets that are no integers": ([0.0, 1.0], [0.5]),
    "rows of KL": ([0, 1], [[0.5, 0.5]]),
    "one KL": ([0, 1], 0.5),
    "a KL of integers": ([0, 1], [1]),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_another_shape_are_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    write_rollouts(tmp_path, 1, [rollout(1, "a", ["x"])], None)
    offsets, kl = map(np.array, TENSORS[kind])
    save_file({"offsets": offsets, "kl": kl}, tmp_path / "rollouts/step_000001.safetensors")
    page = page_of(tmp_path)
    assert ("", "x") in page.spans
    assert "step_000001.safetensors cannot be read: the tokens have no colors." in page.text
    assert len(caplog.messages) == 1


def test_integers_that_no_float_can_hold(run_dir: Path) -> None:
    huge = "1" + "0" * 400
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {huge}, "teacher_kl": 1.0}}\n{{"step": 20, "kl/p99": {huge}}}\n')
    keys = ("steps", "seconds", "student", "gap_closed", "drift_kl", "baseline_diff")
    for key in keys:
        (run_dir / "scoreboard.json").write_text(f'{{"steps": 20, "{key}": {huge}}}')
        assert "up to step 20" in page_of(run_dir).text


def test_a_place_that_is_infinite_inserts_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    row = rollout(1, "a", ["x"], inserted=[{"at": float("inf"), "text": "y"}])
    write_rollouts(tmp_path, 1, [row], None)
    assert ("", "x") in page_of(tmp_path).spans


def test_a_long_rollout_is_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    write_rollouts(tmp_path, 1, [rollout(1, "a", ["x"] * 1000)], [[float("nan")] * 1000])
    assert "… 600 more tokens" in page_of(tmp_path).text


def test_a_page_is_bounded_whatever_a_run_holds(tmp_path: Path) -> None:
    path = finished_run(tmp_path / "run")
    long = "<" * 3000
    for step in (1, 10, 20):
        rows = [rollout(step, f"t{i}", [long] * 500, teacher_prompt_text=long) for i in range(3)]
        write_rollouts(path, step, rows, [[5.0] * 500] * 3)
    row = dict.fromkeys(("prompt", "before", "teacher", "after"), long)
    board = {"completions": [row] * 500, "verdict": long, "per_env": {}}
    board["per_env"] = {f"{i}{long}": {"student": long} for i in range(500)}
    (path / "scoreboard.json").write_text(json.dumps(board))
    (path / "env.json").write_text(json.dumps({f"{i}{long}": long for i in range(500)}))
    with (path / "metrics.jsonl").open("a") as file:
        for i in range(200):
            file.write(json.dumps({"step": 1, f"eval/{i}{long}/student/avg": i}) + "\n")
    page = page_of(path)
    assert (path / "report.html").stat().st_size < 2_000_000
    assert "Question 64 " in page.text
    assert "more characters" in page.text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError) as caught:
            write_report(path)
        assert caught.value.exit_code == EXIT_USAGE
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


FLOATS = st.floats(width=64, min_value=-1e200, max_value=1e200) | st.just(float("nan"))


@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_every_curve_is_inside_its_chart(values: list[float]) -> None:
    chart = draw("t", "n", [Series("s", list(enumerate(values)), marked=True)])
    for line in chart.lines:
        for path in (line.path, line.faint):
            places = re.findall(r"[ML](\S+?) ([^MLh]+)", path)
            assert all(chart.left <= float(x) <= chart.right for x, _ in places)
            assert all(0 <= float(y) <= chart.bottom for _, y in places)
        assert line.path
    assert len(chart.y_ticks) <= 12
    assert bool(chart.lines) == any(v == v for v in values)


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(i, float(i % 7)) for i in range(10_000)]
    points[1234] = (1234, 99.0)
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS + 2
    assert {points[0], points[-1], (1234, 99.0)} <= set(thinned)


def test_the_report_and_the_displays_need_no_torch() -> None:
    code = (
        "import sys, minidistill.reporting.terminal.live, minidistill.reporting.html;"
        "import minidistill.reporting.monitors.background;"
        "sys.exit(' '.join({'torch', 'wandb', 'transformers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
