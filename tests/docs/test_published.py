"""docs/published.md, its configurations, and the script that makes their data."""

from __future__ import annotations

import importlib.util
import json
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

from minidistill import cli
from minidistill.config import load_config, shipped
from minidistill.envs import load_environment
from minidistill.errors import EXIT_OK
from tools import published_plans
from tools.published_plans import FULL, NAMES, PAGE

LIVE = " --orchestrator.teacher_model.update live"
PREPARE = ROOT / "configs" / "published" / "prepare.py"

pytestmark = pytest.mark.usefixtures("offline")


def test_the_page_says_what_plan_prints() -> None:
    text = PAGE.read_text()
    assert published_plans.page(text) == text, "python -m tools.published_plans"


def test_a_stale_page_is_found_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "published.md"
    page.write_text(PAGE.read_text().replace("| Sokoban | adapter | 1 × 24 |", "| Sokoban |"))
    monkeypatch.setattr(published_plans, "PAGE", page)
    assert published_plans.main(["--check"]) == 1
    assert published_plans.main([]) == 0
    assert published_plans.main(["--check"]) == 0
    assert page.read_text() == PAGE.read_text()


@pytest.mark.parametrize(("name", "added"), product(NAMES, ["", FULL, LIVE]))
def test_each_row_of_the_tables_can_be_planned(
    name: str, added: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (NAMES[name] + added).split()
    config = load_config(arguments).config
    assert (config.max_steps, config.orchestrator.rollouts_per_example) == (50, 1)
    assert config.trainer.loss.adv_tau == 0
    assert config.orchestrator.teacher_model.eval_baseline, "base and in context"
    assert (config.trainer.model.lora is False) is (added == FULL)
    assert config.trainer.optim.lr == (5e-6 if added == FULL else 5e-5)
    assert config.orchestrator.teacher_model.update == ("live" if added == LIVE else "frozen")
    argv = ["plan", *arguments, "--gpus", "4", "--gpu-memory", "80", "--json"]
    assert cli.main(argv) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["estimator"] == "full"


@pytest.mark.parametrize("name", ["Sokoban", "Frozen Lake"])
def test_the_games_are_those_of_the_page(name: str) -> None:
    env = load_config(NAMES[name].split()).config.orchestrator.env[0]
    games = load_environment(env.id, env.args)
    assert (len(games.train), len(games.eval)) == (4096, 128)
    assert "at most 1 " in games.eval[0].messages[0]["content"]
    if name == "Frozen Lake":
        assert sum(task.answer.moves > 5 for task in games.eval) == 16, "the page has the share"


def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare", PREPARE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS = {
    "train": [
        {"content": [{"role": "user", "content": f"Is {n} kind? <answer>"}], "answer": "Yes"}
        for n in range(4)
    ]
    + [{"content": "Is it?", "answer": "no"}, {"content": "Held out?", "answer": "no"}],
    "test": [{"content": "Held out?", "answer": " NO"}, {"content": "Held out?", "answer": "no"}],
}


def test_prepared_data_is_what_the_configuration_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare().write("safety", ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "opcd-safety-train.jsonl: 5 prompts, 4 of them ask for <answer>",
        "opcd-safety-test.jsonl: 1 prompts, 0 of them ask for <answer>",
    ]
    env = load_config(["opcd-safety"]).config.orchestrator.env[0]
    loaded = load_environment(env.id, env.args)
    assert [task.messages[0]["content"] for task in loaded.eval] == ["Held out?"]
    (task,) = loaded.eval
    right, wrong, none = "I see. <ANSWER>no</ANSWER> It is.", "<answer>yes</answer> no", "no"
    scores = [loaded.score(task, text).value for text in (right, wrong, none)]
    assert scores == [1, 0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Which?", "answer": "A"}, r"row 2 has no content: \['answer', 'prompt'\]"),
        ({"content": "Which?", "answer": "E"}, "row 2 has the answer 'E'"),
        ({"content": "Which?", "answer": 1}, "row 2 has the answer 1"),
    ],
)
def test_rows_of_another_form_are_refused(row: dict[str, object], message: str) -> None:
    rows = [{"content": "What?", "answer": "b"}, row]
    with pytest.raises(ValueError, match=message):
        list(prepare().converted("medical", rows))


@pytest.mark.parametrize("overlay", ["sft", "off-policy"])
def test_the_order_of_overlays_does_not_matter(overlay: str) -> None:
    """Another estimator on the settings of `sft` would be a loss without its entropy term."""
    base = ["sokoban-turns-qwen3-4b", "@", "opcd-sokoban"]
    before, after = (
        load_config([*base, "@", first, "@", second]).config
        for first, second in ((overlay, "opcd-full"), ("opcd-full", overlay))
    )
    assert before == after
    assert before.trainer.model.lora is False


def test_all_of_them_are_shipped() -> None:
    files = {path.stem for path in (ROOT / "configs" / "published").glob("*.toml")}
    assert files == {name for name in shipped.names() if name.startswith("opcd")}
