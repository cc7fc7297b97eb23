"""Several runs on one page, the command `minidistill report`, and the summary for notebooks."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.reported_runs import Page, finished_run

from minidistill import cli
from minidistill.errors import EXIT_OK, EXIT_USAGE, UserError
from minidistill.reporting.html import summary_html, write_comparison
from minidistill.reporting.html.chart import Series, draw
from minidistill.reporting.html.comparison import labels
from minidistill.reporting.html.curves import groups, points
from minidistill.reporting.html.plots import PLOTS, step_rate
from minidistill.reporting.html.settings import differences


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs of the same tasks."""
    made = []
    for name, rank in (("a", 8), ("b", 16)):
        run = finished_run(tmp_path / name)
        settings = {
            "max_steps": 20,
            "output_dir": name,
            "trainer": {"model": {"lora": {"rank": rank}}},
            "orchestrator": {"env": [{"id": "x"}, {"id": "y" if rank == 8 else "z"}]},
        }
        (run / "config.resolved.json").write_text(json.dumps(settings))
        board = json.loads((run / "scoreboard.json").read_text()) | {
            "gap_closed": rank / 20,
            "completions": [
                {"prompt": "Q1", "before": "no", "teacher": "yes", "after": f"answer {name}"},
                {"prompt": f"only {name}", "before": "no", "teacher": "yes", "after": "x"},
            ],
        }
        (run / "scoreboard.json").write_text(json.dumps(board))
        made.append(run)
    return made


def cells(html: str) -> list[list[str]]:
    """The rows of the page's tables."""

    class Tables(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[str]] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")

        def handle_data(self, data: str) -> None:
            if self.rows and self.rows[-1] and self.lasttag in ("td", "th") and data.strip():
                self.rows[-1][-1] += data

    tables = Tables()
    tables.feed(html)
    return tables.rows


def test_the_page_compares_results_settings_curves_and_answers(
    runs: list[Path], tmp_path: Path
) -> None:
    path = write_comparison(runs, tmp_path / "page.html")
    html = path.read_text(encoding="utf-8")
    page, rows = Page(html), cells(html)
    assert [
        "gap closed",
        "40%  (95% interval 88% to 95%)",
        "80%  (95% interval 88% to 95%)",
    ] in rows
    assert ["steps", "20 of 20", "20 of 20"] in rows
    assert ["trainer.model.lora.rank", "8", "16"] in rows
    assert ["orchestrator.env.2.id", "y", "z"] in rows
    names = [row[0] for row in rows]
    assert not {"output_dir", "max_steps", "orchestrator.env.1.id"} & set(names)
    spoken = [value for name, value in page.attributes if name == "aria-label"]
    assert any("a: from 4.93 to 0.246. b: from 4.93 to 0.246." in label for label in spoken)
    # the prompt that both have kept, with the answers of each
    assert page.text.count("Question ") == 1
    assert "answer a" in page.text
    assert "answer b" in page.text
    assert "only a" not in page.text


def test_names_are_the_shortest_ends_of_the_paths_that_differ(tmp_path: Path) -> None:
    assert labels([Path("/r/x"), Path("/r/y")]) == ["x", "y"]
    assert labels([Path("/r/1/x"), Path("/r/2/x"), Path("/s/y")]) == ["1/x", "2/x", "s/y"]
    alike = labels([Path("/r/" + "x" * 50 + end) for end in "ab"])
    assert [label[:10] for label in alike] == ["1. xxxxxxx", "2. xxxxxxx"]


def test_a_run_has_the_same_color_in_every_chart() -> None:
    chart = draw("t", "n", [Series("a", [(1, 1.0)]), Series("b", []), Series("c", [(1, 2.0)])])
    assert [(line.name, line.color) for line in chart.lines] == [("a", 0), ("c", 2)]


def test_settings_that_one_run_lacks_differ() -> None:
    rows = differences([{"a": {"b": 1}, "c": [1, 2]}, {"c": [1, 2], "d": "x"}])
    assert rows == [("a.b", ("1", "–")), ("d", ("–", "x"))]
    # an integer and its text, as a file would have them
    assert differences([{"a": True}, {"a": False}]) == [("a", ("true", "false"))]
    assert differences([{}, {}]) == []


def test_the_command(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "a"]) == EXIT_OK
    assert cli.main(["report", "a", "b"]) == EXIT_OK
    assert cli.main(["report", "b", "--out", "other.html"]) == EXIT_OK
    assert capsys.readouterr().out == "a/report.html\ncomparison.html\nother.html\n"
    assert "runs compared" in (tmp_path / "comparison.html").read_text()
    assert (tmp_path / "other.html").read_text() != ""
    assert not (tmp_path / "b" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "a/../a"], "a run is given twice"),
        (["a", "--out", "a/metrics.jsonl"], "is there already, and is no report"),
        (["a", "b", "--out", "a/metrics.jsonl"], "is there already, and is no report"),
        (["a", "b", "--out", "a"], "is there already, and is no report"),
        (["a", "--out", "nowhere/x.html"], "nowhere is no folder"),
        (["a", "empty"], "is not a run directory"),
        (["a", *[f"r{i}" for i in range(8)]], "9 runs cannot be compared"),
    ],
)
def test_what_the_command_refuses(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", *[f"r{i}" for i in range(8)]):
        (tmp_path / name).mkdir()
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert cli.main(["report", *arguments]) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "comparison.html").exists()


# -- figures that the curves compute -----------------------------------------------------------


def test_whole_steps_have_a_throughput() -> None:
    step = {"time/train": 2.0, "perf/train_tokens_per_second": 300.0, "time/step": 4.0}
    assert step_rate(step) == 150.0
    sampled = {"time/sample": 1.0, "perf/sample_tokens_per_second": 400.0, "time/step": 4.0}
    assert step_rate(sampled) == 100.0
    assert step_rate(step | {"perf/tokens_per_second": 140.0}) == 140.0
    assert step_rate({"time/step": 4.0}) is None
    assert step_rate(step | {"time/step": 0.0}) is None


def test_idle_time_is_the_rest_of_a_step() -> None:
    [plot] = [plot for plot in PLOTS if plot.title == "Idle time"]
    steps = {
        1: {"time/train": 3.0, "time/sync": 0.5, "time/sample": 6.0, "time/step": 10.0},
        2: {"time/train": 7.0, "time/sample": 8.0, "time/step": 7.0},  # they overlap
        3: {"time/step": 1.0},
    }
    trainer, sampler = (points(curve, steps) for _, curve in plot.curves)
    assert trainer == [(1, pytest.approx(0.65)), (2, 0.0)]
    assert sampler == [(1, pytest.approx(0.4)), (2, 0.0)]


def test_kl_by_position_is_that_of_the_beginning_the_middle_and_the_end() -> None:
    steps = {
        step: {"kl/by_position/0": float(step), "kl/by_position/2-3": 1.0, "kl/by_position/1": 0.5}
        for step in range(1, 21)
    }
    steps[20]["kl/by_position/16384-"] = 3.0
    [chart] = [
        c for group in groups(steps, {}) for c in group.charts if c.title == "KL by position"
    ]
    assert [line.name for line in chart.lines] == [
        "steps 1 to 2",
        "steps 10 to 11",
        "steps 19 to 20",
    ]
    assert chart.rows == (
        ("0", "1.5", "10.5", "19.5"),
        ("1", "0.5", "0.5", "0.5"),
        ("2 to 3", "1", "1", "1"),
        ("16384 and more", "", "", "3"),
    )
    assert [label for _, label in chart.x_ticks] == ["0", "1", "2", "16.4k"]


def test_the_held_out_kl_ends_with_that_of_the_scoreboard() -> None:
    steps = {0: {"eval/heldout_kl": 2.0}, 5: {"teacher_kl": 1.0}}
    board = {"heldout_kl_after": 0.25}
    [chart] = [c for g in groups(steps, board) for c in g.charts if c.title == "Held-out KL"]
    assert chart.rows == (("0", "2"), ("5", "0.25"))


def test_the_held_out_kl_of_chosen_weights_is_at_their_step() -> None:
    steps = {0: {"eval/heldout_kl": 2.0}, 4: {"teacher_kl": 1.0}, 5: {"teacher_kl": 1.0}}
    board = {"heldout_kl_after": 0.25, "best_step": 4}
    [chart] = [c for g in groups(steps, board) for c in g.charts if c.title == "Held-out KL"]
    assert chart.rows == (("0", "2"), ("4", "0.25"))


# -- the summary -------------------------------------------------------------------------------


def test_the_summary_is_a_fragment_of_inline_styles(runs: list[Path]) -> None:
    html = summary_html(runs[0])
    page = Page(html)
    assert "40%  (95% interval 88% to 95%)" in page.text
    assert "teacher KL: 4.93 → 0.246" in page.text
    assert not {"script", "style", "html", "body"} & set(page.tags)
    assert not {"id", "href", "src", "class"} & {name for name, _ in page.attributes}
    assert len(html) < 20_000
    assert summary_html(str(runs[0])) == html


def test_the_summary_of_a_run_without_a_scoreboard(runs: list[Path], tmp_path: Path) -> None:
    (runs[0] / "scoreboard.json").unlink()
    assert "Step 20; no scoreboard yet." in Page(summary_html(runs[0])).text
    with pytest.raises(UserError):
        summary_html(tmp_path)
